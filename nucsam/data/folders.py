"""Folders of H&E images with nucleus masks.

    nuinsseg:  ORGAN/tissue images/NAME.png, ORGAN/label masks modify/NAME.tif,
               ORGAN/vague areas/mask binary/NAME.png
    plain:     images/NAME.png, labels/NAME.tif or annotations/NAME.geojson, vague/NAME.png;
               or images/ORGAN/NAME.png, ...

`nucsam.data.images` lists the file types. Annotations are outlines, as QuPath exports them. Vague
areas are optional: they are the non-zero pixels of an image file. Hidden files and other types are
ignored. Symbolic links are followed, wherever they lead.
"""

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from nucsam.config import compiled
from nucsam.data.images import IMAGES, LABELS
from nucsam.errors import UserError

# Folders of an organ with its images, labels, vague areas and annotations, the best first.
NUINSSEG = (
    ("tissue images",),
    ("label masks modify", "label masks"),
    ("vague areas/mask binary", "vague areas/mask binary_vague"),
    (),
)
PLAIN = ("images", "labels", "vague", "annotations")
SUFFIXES = (IMAGES, LABELS, IMAGES, (".geojson",))

Organs = dict[str, list[list[Path]]]  # organ -> its folders of each kind, as in NUINSSEG


@dataclass(frozen=True)
class Record:
    """One image on disk. `name` is the file stem, or `ORGAN_STEM` where organs share a stem.

    With `connected`, each connected component of the label is a nucleus.
    """

    name: str
    organ: str
    image: Path
    label: Path
    vague: Path | None
    group: str
    connected: bool = False


def list_folder(folder: Path) -> list[Path]:
    """The sorted entries of a folder without hidden ones; none where there is no such folder.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        entries = list(folder.iterdir())  # no glob, because real names hold brackets
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        raise UserError(f"{folder}: cannot be listed ({reason}), expected a folder") from error
    return sorted(path for path in entries if not path.name.startswith("."))


def files_by_stem(
    folders: Iterable[Path], suffixes: Sequence[str], problems: list[str]
) -> dict[str, Path]:
    """Stem -> file, from the first folder that has it.

    Args:
        folders: where to look.
        suffixes: of the files, in lower case.
        problems: takes a sentence for each stem that a folder has twice.
    """
    files: dict[str, Path] = {}
    for path in chain.from_iterable(map(list_folder, folders)):
        if path.suffix.lower() not in suffixes:
            continue
        stem = unicodedata.normalize("NFC", path.stem)  # macOS writes the decomposed form
        first = files.setdefault(stem, path)
        if first is not path and first.parent == path.parent:
            problems.append(f"{path}: found the stem of {first.name} again")
    return files


def first_group(pattern: re.Pattern[str], stem: str) -> str | None:
    """The first capture group of a match, or the whole match; None where nothing matches."""
    match = pattern.search(stem)
    return match and match[min(1, pattern.groups)]


def _nuinsseg_organs(root: Path) -> Organs:
    known = {*NUINSSEG[0], *NUINSSEG[1]}
    names = {path: {child.name for child in list_folder(path)} for path in list_folder(root)}
    if not any("tissue images" in children for children in names.values()):
        return {}
    organs = [path for path, children in names.items() if children & known]
    return {path.name: [[path / name for name in kind] for kind in NUINSSEG] for path in organs}


def _plain_organs(root: Path) -> Organs:
    if root / "images" not in list_folder(root):
        return {}
    inside = [path for kind in PLAIN for path in list_folder(root / kind)]
    organs = {"", *(path.name for path in inside if path.is_dir())}
    return {organ: [[root / kind / organ] for kind in PLAIN] for organ in sorted(organs)}


def _find_organs(root: Path, layout: str) -> Organs:
    if layout not in ("auto", "nuinsseg", "plain"):
        raise UserError(f"layout: found {layout!r}, expected auto, nuinsseg or plain")
    organs = {} if layout == "plain" else _nuinsseg_organs(root)
    if not organs and layout != "nuinsseg":
        organs = _plain_organs(root)
    if not organs:
        expected = "ORGAN/tissue images (nuinsseg) or images (plain) in it"
        raise UserError(f"{root}: found no data set{_what(root)}, expected {expected}{_near(root)}")
    return organs


def _what(root: Path) -> str:
    if root.is_file():
        return " (a file; unpack it)"
    return "" if root.is_dir() else " (no such folder)"


def _near(root: Path) -> str:
    """A hint to a data set one level below or above."""
    near = [path for path in list_folder(root) if _nuinsseg_organs(path) or _plain_organs(path)]
    if (root / "tissue images").is_dir():
        near.append(root.parent)
    return f"; did you mean {near[0]}?" if near else ""


class Scan:
    """A data set as it lies on disk; a problem does not stop the scan.

    `records` are in NuInsSeg's official order. `problems` and `remarks` are sentences: the former
    make the data set unusable, the latter do not.

    Args:
        root, layout, group: as for `find_records`.

    Raises:
        UserError: there is no data set, or an argument is not valid.
    """

    def __init__(self, root: Path, layout: str, group: str) -> None:
        self._pattern = compiled("group", group)
        self._unused = {"labels": [], "vague areas": []}  # files without an image
        self.records, self.problems = [], []
        for organ, folders in _find_organs(root, layout).items():
            self._add_organ(organ, folders)
        if not self.records and not self.problems:
            self.problems.append(f"{root}: found no image, expected {', '.join(IMAGES)}")
        records = sorted(self.records, key=lambda record: str(record.image))
        stems = Counter(record.name for record in records)
        records = [
            replace(r, name=f"{r.organ}_{r.name}") if stems[r.name] > 1 else r for r in records
        ]
        self.records = records
        self._check_repeats("file", [os.path.realpath(record.image) for record in records])
        self._check_repeats("name", [record.name for record in records])
        self.remarks = self._remarks(root)

    def _add_organ(self, organ: str, folders: list[list[Path]]) -> None:
        find = partial(files_by_stem, problems=self.problems)
        images, labels, vague, outlines = map(find, folders, SUFFIXES)
        self.problems += [
            f"{outlines[stem]}: found {labels[stem]} too, expected one of them"
            for stem in sorted(labels.keys() & outlines.keys())
        ]
        labels |= outlines
        places = "one in " + " or ".join(
            str(paths[0]) for paths in (folders[1], folders[3]) if paths
        )
        for stem, image in images.items():
            grouped = self._pattern.pattern
            group = first_group(self._pattern, stem) if grouped else f"{organ}/{stem}"
            if not group:
                self.problems.append(f"{image}: found a name that group={grouped!r} does not match")
            elif stem not in labels:
                self.problems.append(f"{image}: found no label of this stem, expected {places}")
            else:
                label, mask = labels[stem], vague.get(stem)
                self.records.append(Record(stem, organ, image, label, mask, group))
        for kind, files in (("labels", labels), ("vague areas", vague)):
            self._unused[kind] += [path for stem, path in files.items() if stem not in images]

    def _check_repeats(self, what: str, keys: Sequence[str]) -> None:
        """Note each record whose key an earlier record has."""
        first: dict[str, Record] = {}
        for key, record in zip(keys, self.records):
            earlier = first.setdefault(key, record)
            if earlier is not record:
                found = f"the {what} of {earlier.image} again"
                self.problems.append(f"{record.image}: found {found}, expected each image once")

    def _remarks(self, root: Path) -> list[str]:
        kinds = {f"{kind} without an image, not used": self._unused[kind] for kind in self._unused}
        summed = "labels from 'label masks', where overlaps are sums of ids: expect spurious nuclei"
        kinds[summed] = [r.label for r in self.records if r.label.parent.name == "label masks"]
        return [
            f"{root}: {len(paths)} {kind}; first: {paths[0]}"
            for kind, paths in kinds.items()
            if paths
        ]


def raise_problems(title: object, problems: Sequence[str]) -> None:
    """Raise one UserError that lists all problems, if there are any."""
    if problems:
        raise UserError("\n  ".join([f"{title}: found {len(problems)} problem(s)", *problems]))


def find_records(root: str | Path, *, layout: str = "auto", group: str = "") -> list[Record]:
    """Find the images of a data set, in NuInsSeg's official order: by path as a plain string.

    Warns once of labels from NuInsSeg's `label masks`, once of labels without an image and once of
    vague areas without an image.

    Args:
        root: folder of the data set.
        layout: auto, nuinsseg or plain.
        group: regular expression, searched in the file stem. Its first capture group, or else the
            whole match, names the group. No split separates images of one group. "" makes each
            image its own group.

    Raises:
        UserError: names every image without a label, stem that comes twice in a folder, image that
            comes twice, and name that `group` does not match; or the folder that has no data set
            or cannot be listed.
    """
    if not str(root):
        raise UserError("root: found an empty path, expected a folder of images and label maps")
    scan = Scan(Path(root), layout, group)
    raise_problems(root, scan.problems)
    for remark in scan.remarks:
        warnings.warn(remark, stacklevel=2)
    return scan.records


def format_size(shape: tuple[int, ...]) -> str:
    """(H, W, ...) as WIDTHxHEIGHT."""
    return f"{shape[1]}x{shape[0]}"
