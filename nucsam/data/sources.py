"""Where public data sets come from: downloads, and pages for the others."""

import json
import shutil
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from nucsam import download
from nucsam.data.folders import is_data_set, list_folder
from nucsam.errors import UserError
from nucsam.progress import with_bar

ZENODO = "https://zenodo.org"
RECORDS = {"nuinsseg": 10518968, "tnbc": 1175282}  # at Zenodo
PAGES = {  # of the data sets, for a person
    "nuinsseg": f"{ZENODO}/records/{RECORDS['nuinsseg']}",
    "tnbc": f"{ZENODO}/records/{RECORDS['tnbc']}",
    "monuseg": "https://monuseg.grand-challenge.org/Data/",
    "pannuke": "https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke",
    "consep": "https://warwick.ac.uk/fac/cross_fac/tia/data/hovernet",
    "lizard": "https://warwick.ac.uk/fac/cross_fac/tia/data/lizard",
    "cryonuseg": "https://www.kaggle.com/datasets/ipateam/"
    "segmentation-of-nuclei-in-cryosectioned-he-images",
}
UNPACKING = ".unpacking"  # end of the name of a folder that is not whole
DEPTH = 3  # folders between the one that is unpacked into and the data set


class Archive(NamedTuple):
    """A zip file at one or more addresses; checksum and size as in `nucsam.download.fetch`."""

    name: str
    urls: tuple[str, ...]
    checksum: str
    size: int = 0


# The training images. Address and checksum: torch_em/data/datasets/histopathology/monuseg.py of
# https://github.com/constantinpape/torch-em
MONUSEG = Archive(
    "MoNuSeg 2018 Training Data.zip",
    (
        "https://drive.usercontent.google.com/download?export=download&confirm=t"
        "&id=1ZgqFJomqQGNnsx7w7QBzQQMVA16lbVCA",
    ),
    "sha256:25d3d3185bb2970b397cafa72eb664c9b4d24294aee382e7e3df9885affce742",
)


def download_set(name: str, folder: Path) -> Path:
    """Download a public data set and unpack it. A second call resumes, or finds it there.

    Args:
        name: a key of PAGES.
        folder: where to unpack it.

    Returns:
        The folder that `nucsam.data.find_records` takes: `folder` or one below it.

    Raises:
        UserError: no address serves the data set, or only after a click; names its page.
    """
    if name not in PAGES:
        raise UserError(f"name: found {name!r}, expected one of {', '.join(PAGES)}")
    unfinished = any(folder.glob(f".*{UNPACKING}"))
    if not unfinished and (root := _find_set(folder, name)):
        return root
    advice = f", from {PAGES[name]}, and unpack it into {folder}"
    if name not in (*RECORDS, "monuseg"):
        raise UserError(f"{name}: no address serves it without a click; get it yourself{advice}")
    archives = _zenodo_archives(name, advice) if name in RECORDS else [MONUSEG]
    paths = [folder / archive.name for archive in archives]
    for archive, path in zip(archives, paths):
        if not path.is_file():
            checks = {"checksum": archive.checksum, "size": archive.size}
            download.fetch(path, archive.urls, **checks, advice=advice)
    for path in paths:
        _unpack(path)
    if root := _find_set(folder, name):
        return root
    raise UserError(f"{folder}: found no data set after unpacking {archives[0].name}")


def _zenodo_archives(name: str, advice: str) -> list[Archive]:
    """The zip files of a record, with the sizes and checksums that Zenodo gives for them."""
    url = f"{ZENODO}/api/records/{RECORDS[name]}"
    try:
        with urllib.request.urlopen(url, timeout=download.TIMEOUT_SECONDS) as response:
            files = json.load(response)["files"]
        archives = []
        for file in files:
            key = str(file["key"])
            if key.lower().endswith(".zip"):
                page = f"{ZENODO}/records/{RECORDS[name]}/files/{quote(key)}?download=1"
                urls = (str(file["links"]["self"]), page)
                archives.append(Archive(Path(key).name, urls, str(file["checksum"]), file["size"]))
        if archives:
            return archives
        reason = "found no .zip file in the record"
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{name}: {url} does not list its files ({reason}); get them yourself{advice}")


def _unpack(path: Path) -> None:
    """Unpack a zip file into its folder, without folders around everything, and remove it."""
    partial = path.with_name(f".{path.stem}{UNPACKING}")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was cut off
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
            for name in with_bar(names, len(names), "Unpacking"):
                archive.extract(name, partial)  # never outside of the folder
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); delete it and try again") from error
    inner = partial
    while len(entries := list(inner.iterdir())) == 1 and entries[0].is_dir():
        inner = entries[0]
    for entry in entries:
        if not (path.parent / entry.name).exists():  # else an earlier call has moved it
            entry.rename(path.parent / entry.name)
    path.unlink()
    shutil.rmtree(partial)


def _find_set(folder: Path, name: str, depth: int = DEPTH) -> Path | None:
    """The first folder with a set's own layout, in or below a folder."""
    if is_data_set(folder, name):
        return folder
    below = list_folder(folder, folders_only=True) if depth else []
    return next((root for path in below if (root := _find_set(path, name, depth - 1))), None)
