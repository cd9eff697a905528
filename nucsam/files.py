"""Atomic writes, JSON documents and their form, and names for messages and tables."""

import csv
import errno
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from nucsam.errors import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # full, or no right to write


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name on success and vanishes on failure.

    The folder is made where there is none.

    Raises:
        UserError: the file cannot be written; `path` still holds what it held before.
    """
    check_regular_file(path)  # replacing one would remove it
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


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        UserError: a file is in the way, or the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: expected a folder ({error})") from error


def check_regular_file(path: Path) -> None:
    """Check that a path is a file or nothing: reading a pipe, for example, would block."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: found a folder or device, expected a file")


def expanded(path: str | Path) -> Path:
    """The path with the home folder for a first `~`, unless a file of that very name is there."""
    try:
        return Path(path) if os.path.lexists(path) else Path(path).expanduser()
    except (RuntimeError, ValueError):  # no such user; a null byte
        return Path(path)


def folder_name(path: str | Path) -> str:
    """The name of a folder as it was given, that of a link too; also of `.` and `..`."""
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).resolve().name


def stale_partials(folder: Path) -> dict[Path, Path]:
    """Temporary files of `atomic` whose process no longer runs here, and the file each was to be.

    Those in subfolders are left out. A temporary file may itself be written by `atomic`.
    """
    stale = {}
    for path in folder.glob(".*.partial"):
        result, process = path.name, None
        while match := _PARTIAL.fullmatch(result):
            result, process = match[1], int(match[2])
        if process is not None and not psutil.pid_exists(process):
            stale[path] = path.with_name(result)
    return stale


_PARTIAL = re.compile(r"\.(.+)\.(\d{1,9})\.partial")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically, with the line ends of `text`.

    Names of files may hold any bytes: they are written as they are.
    """
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def read_json(text: str | bytes, source: str, form: Any = dict) -> dict[str, Any]:
    """Parse a JSON document that must be a dict.

    Args:
        text: the document.
        source: its file, for messages.
        form: as in `check_form`.

    Raises:
        UserError: the text is not JSON, or has another form.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(document, dict):  # naming the type says more than the start of a long list
        raise UserError(f"{source}: found a {type(document).__name__}, expected a dict")
    return check_form(document, form, source)


class Leaf(NamedTuple):
    """A rule for one value of a document: what was expected, and whether a value is that."""

    expected: str
    holds: Callable[[Any], bool]


TEXT = Leaf("a string", lambda value: isinstance(value, str))
FLAG = Leaf("true or false", lambda value: isinstance(value, bool))
COUNT = Leaf("a whole number from 0", lambda value: type(value) is int and 0 <= value < 1e15)
# any plausible result; neither NaN nor a bool
NUMBER = Leaf("a number", lambda value: type(value) in (int, float) and abs(value) < 1e15)
SHARE = Leaf("0 to 1 or null", lambda v: v is None or (NUMBER.holds(v) and 0 <= v <= 1) or v != v)


def check_form(document: Any, form: Any, source: str) -> Any:
    """Check the form of a document, and return it.

    Args:
        document: nested dicts and lists.
        form: a Leaf; a type; [form] for a list of at least one; or {key: form} for a dict that has
            at least these keys, where the key `str` stands for every key.
        source: file and place in it, for messages.

    Raises:
        UserError: names the first place with another form.
    """
    if isinstance(form, Leaf):
        if not form.holds(document):
            raise UserError(f"{source}: found {_short(document)}, expected {form.expected}")
        return document
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(document, kind) or (isinstance(form, list) and not document):
        raise UserError(f"{source}: found {_short(document)}, expected a {kind.__name__}")
    if isinstance(form, list):
        for k, item in enumerate(document):
            check_form(item, form[0], f"{source}[{k}]")
    elif isinstance(form, dict):
        for key, inner in form.items():
            for name in document if key is str else [key]:
                if name not in document:
                    raise UserError(f"{source}: found no {name}, expected one")
                check_form(document[name], inner, f"{source}: {name}")
    return document


def _short(value: Any) -> str:
    """A value for a message."""
    text = repr(value) if value or not isinstance(value, list | dict) else f"an empty {value!r}"
    return text if len(text) <= 60 else f"{text[:60]}..."


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


def shortened(names: list[str], most: int = 5, between: str = ", ") -> str:
    """The first `most` names with commas or others `between`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


# control characters except line end and tab; invisible marks of direction; lone surrogates
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def printable(name: str) -> str:
    """A text as valid UTF-8 that controls no terminal: names of files may hold any bytes.

    Control characters, marks of writing direction and lone surrogates appear as escapes; line ends
    and tabs stay.
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), name)


def to_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Rows of cells as a CSV document: None is empty, and every text is `csv_text`."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    for row in rows:
        writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in row])
    return file.getvalue()


def csv_text(text: str) -> str:
    """A text as a cell that no spreadsheet takes for a formula: an apostrophe goes before one.

    It is `printable` too.
    """
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text
