"""Claims: file locks on jobs. The system drops a lock when its last holder dies.

Claims let launched processes share jobs without talking to each other: folds to train, images to
predict. They work between machines where the shared file system has locks (NFS; Lustre with
`-o flock`).
"""

import json
import os
from pathlib import Path
from typing import Any

from nucsam.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where everything else of nucsam can be imported
    fcntl = None


class Claim:
    """A lock on a job's file, with a note in it that others may read.

    A child process that inherits `descriptor` holds the claim as well.
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
        os.pwrite(self.descriptor, json.dumps(record).encode(), 0)

    def release(self) -> None:
        """Give the claim up, also where a child that outlives its job still has the file open."""
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


def is_claimed(path: Path) -> bool:
    """Whether a process holds the claim on `path`. Two that look do not see each other."""
    descriptor = _lock(path, wait=False, shared=True)
    if descriptor is None:
        return True
    os.close(descriptor)
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
    if fcntl is None:
        raise UserError(f"{path}: cannot be locked on this system; expected Linux or macOS")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
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
