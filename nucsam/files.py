"""Atomic writes, JSON documents, and names for messages."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nucsam.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name on success and vanishes on failure.

    The folder is made where there is none.

    Raises:
        UserError: the file cannot be written; `path` still holds what it held before.
    """
    if path.exists() and not path.is_file():  # replacing a device would remove it
        raise UserError(f"{path}: found a folder or a device, expected the name of a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: {error}; what was there before is unharmed") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically, with the line ends of `text`.

    Names of files may hold any bytes: they are written as they are.
    """
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def read_json(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse a JSON document that must be a dict.

    Args:
        text: the document.
        source: its file, for messages.

    Raises:
        UserError: the text is not JSON, or not a dict.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise UserError(f"{source}: found a {type(document).__name__}, expected a dict")
    return document


def to_json(document: Any) -> str:
    """A JSON document of nested dicts and lists; NaN is written as null."""
    return json.dumps(without_nan(document), indent=1, allow_nan=False)


def without_nan(value: Any) -> Any:
    """Nested dicts, lists and tuples with None for NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def shortened(names: list[str], most: int = 5) -> str:
    """The first `most` names with commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(name: str) -> str:
    """A file name as valid UTF-8: its bytes may be anything."""
    return name.encode("utf-8", "replace").decode()
