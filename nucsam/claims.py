"""Claims: file locks on jobs. The system drops a lock when its last holder dies.

Claims let launched processes share jobs without talking to each other: folds to train, images to
predict. They work between machines where the shared file system has locks (NFS; Lustre with
`-o flock`).
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from nucsam.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

FAR = 2**30  # offset of the byte that Windows locks, behind the note: nobody else could read it
RETRY = 0.1  # s between attempts on Windows, which gives up waiting after 10 s


class Claim:
    """A lock on a job's file, with a note in it that others may read.

    A child process that inherits `descriptor` holds the claim as well, except on Windows.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> "Claim | None":
        """The claim on `path`, or None where another process holds it.

        Args:
            path: the job's file.
            wait: until no other process holds it.

        Raises:
            UserError: the system or the file system has no such locks.
        """
        descriptor = _lock(path, wait=wait)
        return None if descriptor is None else cls(descriptor)

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


def is_claimed(path: Path) -> bool:
    """Whether a process holds the claim on `path`. Two that look do not see each other."""
    descriptor = _lock(path, wait=False, shared=True)
    if descriptor is None:
        return True
    Claim(descriptor).release()
    return False


def read_note(path: Path) -> dict[str, Any]:
    """The note that the last holder left; empty where there is none."""
    try:
        note = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _lock(path: Path, *, wait: bool, shared: bool = False) -> int | None:
    """The descriptor of the locked file, or None where another process holds the lock."""
    binary = getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | binary, 0o666)
    try:
        if fcntl:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        else:
            _lock_byte(descriptor, wait=wait)
    except (BlockingIOError, PermissionError):  # the second one on Windows
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"{path}: cannot be locked ({error}); expected a file system with locks"
        ) from None
    if os.fstat(descriptor).st_nlink == 0:  # the holder before has removed the file
        os.close(descriptor)
        return _lock(path, wait=wait, shared=shared)
    return descriptor


def _lock_byte(descriptor: int, *, wait: bool) -> None:
    """Lock one byte of a file on Windows, where all locks exclude each other.

    Raises:
        PermissionError: another process holds the lock, and `wait` is off.
    """
    os.lseek(descriptor, FAR, os.SEEK_SET)
    while True:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:
            if not wait:
                raise
            time.sleep(RETRY)
