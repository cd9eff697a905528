"""Download a file from the first of several addresses that serves it whole."""

import hashlib
import shutil
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from rich.progress import wrap_file

from nucsam.claims import Claim
from nucsam.console import PlainConsole
from nucsam.errors import UserError
from nucsam.files import UNWRITABLE

TIMEOUT_SECONDS = 10.0


def fetch(
    path: Path, urls: Sequence[str], *, checksum: str, size: int = 0, advice: str = ""
) -> None:
    """Download `path` from the first of `urls` that serves the right bytes.

    `path` appears once it is complete and checked. Until then a hidden file beside it holds what
    has come, and the next call resumes there. Of several processes one downloads; the others wait.

    Args:
        path: file to write; its folder is made.
        urls: addresses of the same file, in order of preference.
        checksum: ALGORITHM:HEXADECIMAL of the whole file, such as md5:0cc1...
        size: of the whole file, bytes; 0 where it is not known, and then nothing is resumed.
        advice: end of the message where no address serves the file.

    Raises:
        UserError: no address serves the file; names each with its reason, and `path`. Or the file
            cannot be written.
    """
    partial = path.with_name(f".{path.name}.download")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        claim = Claim.take(partial, wait=True)
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be written ({error}){advice}") from error
    failures = []
    with claim:
        for url in urls:
            if path.is_file():  # another process has downloaded it
                return
            try:
                _transfer(url, partial, size)
            except (OSError, HTTPException, ValueError) as error:
                if getattr(error, "errno", None) in UNWRITABLE:
                    raise UserError(f"{path}: cannot be written ({error}){advice}") from error
                failures.append(f"{url}: {error}")
                continue
            digest = file_checksum(partial, checksum.partition(":")[0])
            if digest == checksum:
                partial.replace(path)
                return
            failures.append(f"{url}: found {digest}, expected {checksum}")
    reasons = "\n  ".join(failures)
    raise UserError(
        f"{path.name}: no address serves it.\n  {reasons}\n"
        f"Put the file there yourself: {path}{advice}"
    )


def file_checksum(path: Path, algorithm: str = "sha256") -> str:
    """ALGORITHM:HEXADECIMAL of a file."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _transfer(url: str, partial: Path, size: int) -> None:
    """Append to `partial` what is missing of the body at `url`, with a progress bar on stderr.

    Raises:
        OSError, HTTPException: the transfer fails.
        ValueError: the server announces or sends another number of bytes than `size`, if known.
    """
    # a partial file of the whole size failed its checksum: start again
    start = partial.stat().st_size % size if size else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole file
            start = 0
        announced = response.headers["Content-Length"]
        if size and announced is not None and int(announced) != size - start:
            raise ValueError(f"found a Content-Length of {announced}, expected {size - start}")
        total = size - start if size else int(announced or 0)
        shown = {"total": total, "description": url, "console": PlainConsole(stderr=True)}
        with partial.open("r+b") as file, wrap_file(response, **shown) as body:
            file.seek(start)
            file.truncate()
            shutil.copyfileobj(body, file)
            written = file.tell()
    if size and written > size:
        partial.write_bytes(b"")
    if size and written != size:
        raise ValueError(f"found {written} bytes, expected {size}")
