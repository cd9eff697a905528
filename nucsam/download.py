"""Download a file from the first of several addresses that serves it whole."""

import hashlib
import shutil
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from rich.console import Console
from rich.progress import wrap_file

from nucsam.claims import Claim
from nucsam.errors import UserError

TIMEOUT_SECONDS = 10.0


def fetch(path: Path, urls: Sequence[str], *, sha256: str, size: int, advice: str = "") -> None:
    """Download `path` from the first of `urls` that serves the right bytes.

    `path` appears once it is complete and checked. Until then a hidden file beside it holds what
    has come, and the next call resumes there. Of several processes one downloads; the others wait.

    Args:
        path: file to write; its folder is made.
        urls: addresses of the same file, in order of preference.
        sha256: of the whole file, in hexadecimal.
        size: of the whole file, bytes.
        advice: end of the message where no address serves the file.

    Raises:
        UserError: no address serves the file; names each with its reason, and `path`.
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
                failures.append(f"{url}: {error}")
                continue
            digest = file_sha256(partial)
            if digest == sha256:
                partial.replace(path)
                return
            failures.append(f"{url}: found SHA-256 {digest}, expected {sha256}")
    reasons = "\n  ".join(failures)
    raise UserError(
        f"{path.name}: no address serves it.\n  {reasons}\n"
        f"Put the file there yourself: {path}{advice}"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _transfer(url: str, partial: Path, size: int) -> None:
    """Append to `partial` what is missing of the body at `url`, with a progress bar on stderr.

    Raises:
        OSError, HTTPException: the transfer fails.
        ValueError: the server announces or sends another number of bytes than `size`.
    """
    start = partial.stat().st_size % size  # a file of the whole size has failed its checksum
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole file
            start = 0
        announced = response.headers["Content-Length"]
        if announced is not None and int(announced) != size - start:
            raise ValueError(f"found a Content-Length of {announced}, expected {size - start}")
        shown = {"total": size - start, "description": url, "console": Console(stderr=True)}
        with partial.open("r+b") as file, wrap_file(response, **shown) as body:
            file.seek(start)
            file.truncate()
            shutil.copyfileobj(body, file)
            written = file.tell()
    if written > size:
        partial.write_bytes(b"")
    if written != size:
        raise ValueError(f"found {written} bytes, expected {size}")
