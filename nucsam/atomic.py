"""Files that appear whole or not at all."""

import os
from pathlib import Path

_UNHARMED = "what was there before is unharmed"


class atomic:
    """Context of a temporary path beside `path` that takes its name on success and vanishes on failure."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if kind is None:
                with self.partial.open("rb+") as file:
                    os.fsync(file.fileno())
                self.partial.replace(self.path)
        except OSError as failed:  # such as a folder of that name
            error = failed
        finally:  # also where a signal has come meanwhile
            self.partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and _UNHARMED not in str(error):  # of several files at a time the first says it
            raise OSError(f"{self.path}: {error}; {_UNHARMED}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, or leave what was there."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
