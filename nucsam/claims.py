"""Claims: file locks on jobs. The system drops a lock when its last holder dies.

Claims let launched processes share jobs without talking to each other: folds to train, images to
predict. They work between machines where the shared file system has locks (NFS; Lustre with
`-o flock`).
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nucsam.errors import UserError
from nucsam.processes import signals_handled

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

FAR = 2**30  # offset of the byte that Windows locks: past the note, which others read
RETRY = 0.1  # s between attempts
USED = ".used"  # file of a folder of claims on which each of its users holds a shared claim


class Claim:
    """A lock on a job's file, with a note in it that others may read.

    A child process that inherits `descriptor` holds the claim as well, except on Windows.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path, *, wait: bool = False, shared: bool = False) -> "Claim | None":
        """The claim on `path`, or None where another process holds it.

        Args:
            path: the job's file.
            wait: until no other process holds it.
            shared: exclude only claims that are not shared.

        Raises:
            UserError: the system or the file system has no such locks.
        """
        binary = getattr(os, "O_BINARY", 0)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | binary, 0o666)
            try:
                if fcntl:
                    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                else:
                    os.lseek(descriptor, FAR, os.SEEK_SET)
                    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                if os.fstat(descriptor).st_nlink:  # else the holder before has removed the file
                    return cls(descriptor)
                os.close(descriptor)
            except (BlockingIOError, PermissionError):  # the second one on Windows
                os.close(descriptor)
                if not wait:
                    return None
                time.sleep(RETRY)
            except OSError as error:
                os.close(descriptor)
                expected = "expected a file system with locks"
                raise UserError(f"{path}: cannot be locked ({error}); {expected}") from None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def note(self, record: dict[str, Any]) -> None:
        """Replace the note by `record`, JSON values."""
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        os.write(self.descriptor, json.dumps(record).encode())

    def release(self) -> None:
        """Give the claim up, also where a child that outlives its job still has the file open."""
        if fcntl:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        else:
            os.lseek(self.descriptor, FAR, os.SEEK_SET)
            msvcrt.locking(self.descriptor, msvcrt.LK_UNLCK, 1)
        os.close(self.descriptor)


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Context that one process at a time may enter; its lock is a file, removed at the end.

    Where the file system has no locks, processes do not wait for each other.
    """
    claim = None
    with suppress(UserError):
        claim = Claim.take(path, wait=True)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()  # before the release: the file may then be that of another process
        if claim:
            claim.release()


@contextmanager
def folder_of_claims(folder: Path) -> Iterator[None]:
    """Context that makes a folder for claims; the last process to leave it removes the folder.

    Until then another process may read the notes in it. A dead process counts as gone. On Windows,
    which lacks shared claims, the folder stays.
    """
    presence = _enter(folder)
    try:
        yield
    finally:
        if presence:
            presence.release()
            # SIGTERM waits: a launcher whose first process has failed ends the others by it.
            with signals_handled(lambda *_: None, signal.SIGTERM), suppress(FileNotFoundError):
                _remove_unused(folder)


def _enter(folder: Path) -> Claim | None:
    """Make the folder, and take a shared claim on its use; None on Windows."""
    while True:
        # A process that leaves may remove the folder at any moment, even within `mkdir`.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Claim.take(folder / USED, wait=True, shared=True) if fcntl else None
        except FileNotFoundError:
            continue
        except FileExistsError:
            if folder.is_file():
                raise


def _remove_unused(folder: Path) -> None:
    """Remove the folder unless a process uses it."""
    if claim := Claim.take(folder / USED):
        with claim:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == USED):  # USED last
                path.unlink()
            with suppress(OSError):  # a process has just entered
                folder.rmdir()


def is_claimed(path: Path) -> bool:
    """Whether a process holds the claim on `path`. Two checks at once do not disturb each other."""
    claim = Claim.take(path, shared=True)
    if claim:
        claim.release()
    return claim is None


def read_note(path: Path) -> dict[str, Any]:
    """The note that the last holder left; empty where there is none."""
    try:
        note = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}
