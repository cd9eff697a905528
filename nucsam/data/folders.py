"""Folders of H&E images with nucleus masks.

    plain:  images/NAME.png with labels/NAME.tif, masks/NAME.tif or annotations/NAME.geojson, and
            vague/NAME.png; or images/ORGAN/NAME.png, images/PATIENT1/NAME.png,
            PATIENT1/images/NAME.png, ...
    flat:   NAME.png with NAME_mask.png, NAME_cp_masks.tif, NAME-labels.png, NAME.geojson, ...

`nucsam.data.published` has the layouts of public sets, `nucsam.data.images` the file types. The
stem of a label may end as _mask, _cp_masks, _seg, -labels and the like. A stem ends before
`.ome.tif`; its Unicode form does not matter. Vague areas are optional: they are the non-zero pixels
of an image file. Hidden files are ignored. Symbolic links are followed, wherever they lead.
"""

import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nucsam.config import compiled
from nucsam.data import rois
from nucsam.data.images import IMAGES, LABELS, TIFF
from nucsam.data.published import LAYOUTS, stack_images
from nucsam.errors import UserError
from nucsam.files import expanded

KNOWN_LABELS = (*LABELS, *rois.SUFFIXES, ".mat")
OVERLAYS = "overlays"  # folder of pictures in a folder of label maps
PREDICTIONS = "predict.json"  # file in a folder of results of nucsam predict: their settings
HIDDEN = (".", "lost+found", "System Volume Information", "$RECYCLE.BIN")  # how names begin
MASK_SUFFIX = re.compile(
    r"[-_ .](cp_)?(mask|label|labell?ed|seg|segmentation|instance|inst|gt|annotation)s?$", re.I
)


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
    region_class: str = ""  # in a file of outlines, a class of regions beside `Region*`
    region: int | None = None  # which region of the outlines to read, from 0; None: the whole image


def list_folder(folder: Path, *, folders_only: bool = False) -> list[Path]:
    """The sorted entries of a folder without hidden ones; none where there is no such folder.

    What a system keeps at the root of a disk counts as hidden.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:  # no glob, because real names hold brackets
            paths = [Path(entry) for entry in entries if not folders_only or _is_folder(entry)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        raise UserError(f"{folder}: cannot be listed ({reason}), expected a folder") from error
    return sorted(path for path in paths if not path.name.startswith(HIDDEN))


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; only for a link it asks the disk."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry).is_dir())


def stem_of(path: Path) -> str:
    """The name without its suffix, `.ome.tif` being one, in the composed Unicode form."""
    stem = path.stem
    if path.suffix.lower() in (*TIFF, ".gz"):
        stem = re.sub(r"\.(ome|geojson)$", "", stem, flags=re.I)
    return unicodedata.normalize("NFC", stem)  # macOS writes the decomposed form


def bare_stem(stem: str) -> str:
    """A label's stem without _mask, _cp_masks, _seg, -labels and the like."""
    return MASK_SUFFIX.sub("", stem)


def files_by_stem(
    paths: Iterable[Path],
    suffixes: Sequence[str],
    problems: list[str],
    *,
    key: Callable[[Path], str] = stem_of,
    ranked: bool = True,
) -> dict[str, Path]:
    """Stem -> file, from the first folder that has it.

    Args:
        paths: files, those of the best folder first.
        suffixes: of the files, in lower case.
        problems: takes a sentence for each stem that a folder has twice.
        key: gives the stem of a file.
        ranked: whether a label map may replace an outline, and the reverse. Otherwise a stem with
            both is a problem.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if not _is_of_kind(path, suffixes):
            continue
        first = files.setdefault(key(path), path)
        if first is path:
            continue
        if first.parent == path.parent:
            problems.append(f"{path}: found the stem of {first.name} again")
        elif not ranked and _is_of_kind(first, LABELS) != _is_of_kind(path, LABELS):
            problems.append(f"{path}: found {first} too, expected one of them")
    return files


def _is_of_kind(path: Path, suffixes: Sequence[str]) -> bool:
    name = path.name.lower()
    return name.endswith(tuple(suffixes)) and not name.endswith("_seg.npy")  # Cellpose's pickle


def _advice(path: Path) -> str:
    """What to do with a file that lies where a label should."""
    if path.name.endswith("_seg.npy"):
        return "save the masks as PNG or TIFF in Cellpose, because its own file may hold code"
    if path.suffix.lower() in IMAGES:
        return "save labels as PNG or TIFF, or swap the folders if these are the images"
    return "convert to TIFF"


def first_group(pattern: re.Pattern[str], stem: str) -> str | None:
    """The first capture group of a match, or the whole match; None where nothing matches."""
    match = pattern.search(stem)
    return match and match[min(1, pattern.groups)]


Place = tuple[str, str]  # organ and patient; "" where no folder names one


def _find_folders(root: Path, patterns: Sequence[str]) -> dict[Place, list[Path]]:
    """The folders that patterns of a `Layout` match, the best first."""
    places = defaultdict(list)
    for pattern in patterns:
        folders: list[tuple[dict, Path]] = [({}, root)]
        for part in filter(None, pattern.split("/")):
            expression = re.compile(part, re.IGNORECASE)
            folders = [
                (names | match.groupdict(), child)
                for names, folder in folders
                for child in list_folder(folder, folders_only=True)
                if (match := expression.fullmatch(unicodedata.normalize("NFC", child.name)))
            ]
        for names, folder in folders:
            paths = places[names.get("organ", ""), names.get("group", "")]
            if folder not in paths:
                paths.append(folder)
    return places


def is_data_set(root: Path, layout: str = "auto") -> bool:
    """Whether a folder has images with labels, or the folders for them."""
    return _best_scan(root, layout, "") is not None


def _best_scan(root: Path, layout: str, group: str) -> "Scan | None":
    """The scan of the first layout that has a record, or else of one whose folders are there."""
    empty = None
    for name in LAYOUTS if layout == "auto" else [layout]:
        scan = Scan(root, name, group)
        if scan.records:
            return scan
        # Without a record, only these two are common enough to be told by their folders
        if scan.found and (layout != "auto" or name in ("nuinsseg", "plain")):
            empty = empty or scan
    return empty


def scan_folder(root: Path, layout: str = "auto", group: str = "") -> "Scan":
    """Look what data set lies in a folder.

    Args:
        root, layout, group: as for `find_records`.

    Raises:
        UserError: there is no data set, or an argument is not valid.
    """
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"layout: found {layout!r}, expected auto, {', '.join(LAYOUTS)}")
    root = expanded(root)
    scan = _best_scan(root, layout, group)
    if scan is None:
        parts = "ORGAN/tissue images (nuinsseg), images and labels (plain), NAME_mask.png (flat)"
        expected = f"{parts} or a public set in it"
        if layout != "auto":
            expected = f"the folders of layout {layout}"
        flat = any(_is_of_kind(path, IMAGES) for path in list_folder(root))
        remarks = Scan(root, "flat", group).remarks if flat else []
        found = f"found no data set{_what(root)}, expected {expected}{_near(root)}"
        raise UserError("\n  ".join([f"{root}: {found}", *remarks]))
    return scan


def _what(root: Path) -> str:
    if root.is_file():
        return " (a file; unpack it)"
    return "" if root.is_dir() else " (no such folder)"


def _near(root: Path) -> str:
    """A hint to a data set one level below or above."""
    near = [path for path in list_folder(root, folders_only=True) if is_data_set(path)]
    if (root / "tissue images").is_dir():
        near.append(root.parent)
    return f"; did you mean {near[0]}?" if near else ""


class Scan:
    """A data set in one layout; a problem does not stop the scan.

    `records` are in NuInsSeg's official order. `problems` and `remarks` are sentences: the former
    make the data set unusable, the latter do not. `found` says whether folders of images are there.

    Args:
        root: folder of the data set.
        layout: a name in LAYOUTS.
        group: as for `find_records`.
    """

    def __init__(self, root: Path, layout: str, group: str) -> None:
        self.layout = layout
        self._rules = rules = LAYOUTS[layout]
        self._pattern = compiled("group", group)
        self._unused = defaultdict(list)  # files by the reason why they are not used
        self._prefixes: dict[Path, str] = {}  # of the names of images whose stem comes twice
        self.records, self.problems = [], []
        folders = [_find_folders(root, kind) for kind in (rules.images, rules.labels, rules.vague)]
        self.found = any(path != root for paths in folders[0].values() for path in paths)
        for place in sorted(set().union(*folders)):
            self._add_place(place, [kind.get(place, []) for kind in folders])
        if layout == "pannuke":
            for stem, organ, image, label in stack_images(root):
                self._add(stem, (organ, ""), image, label)
        if not self.records and not self.problems:
            self.problems.append(f"{root}: found no image, expected {', '.join(IMAGES)}")
        records = sorted(self.records, key=lambda record: str(record.image))
        stems = Counter(record.name for record in records)
        self.records = records = [
            replace(r, name=f"{self._prefixes[r.image]}_{r.name}") if stems[r.name] > 1 else r
            for r in records
        ]
        self._check_repeats("file", [os.path.realpath(record.image) for record in records])
        self._check_repeats("name", [record.name for record in records])
        self.remarks = self._remarks(root)

    def _add_place(self, place: Place, kinds: Sequence[list[Path]]) -> None:
        """Pair the files of one organ and patient, in their folders of images, labels and vague."""
        pictures, others, masks = (
            [path for folder in folders for path in list_folder(folder)] for folders in kinds
        )
        stems = {stem_of(path) for path in pictures if _is_of_kind(path, IMAGES)}
        flat = bool(set(kinds[0]) & set(kinds[1]))

        def key(path: Path) -> str:
            stem = stem_of(path)
            bare = bare_stem(stem)
            if stem in stems and (not flat or bare == stem):
                return stem
            names = (bare, f"{bare}_image", f"{bare}_img")
            return next((name for name in names if name in stems), stem)

        if flat:  # the end of its stem makes a picture a label
            pictures = [p for p in pictures if _is_of_kind(p, IMAGES) and key(p) == stem_of(p)]
            others = [path for path in others if path not in set(pictures)]
        suffixes = self._rules.suffixes or KNOWN_LABELS
        find = partial(files_by_stem, problems=self.problems)
        images = find(pictures, IMAGES)
        labels = find(others, suffixes, key=key, ranked=self._rules.ranked)
        vague = find(masks, IMAGES, key=key)
        near = {key(p): p for p in others if p.suffix and not _is_of_kind(p, suffixes)}
        for stem, image in images.items():
            if stem in labels:
                self._add(stem, place, image, labels[stem], vague.get(stem))
            elif flat:
                self._unused["images without a label, not used"].append(image)
            else:
                alike = [path for name, path in labels.items() if name.startswith(f"{stem}_")]
                self._miss_label(image, kinds[1], near.pop(stem, None), alike)
        for stem, path in near.items():
            if stem in images:
                self._unused[f"files that are not taken as labels: {_advice(path)}"].append(path)
        self._unused["files that are not taken as images: convert to TIFF"] += [
            p for p in pictures if p.suffix and not _is_of_kind(p, IMAGES) and key(p) in labels
        ]
        for kind, files in (("labels", labels), ("vague areas", vague)):
            unused = [path for stem, path in files.items() if stem not in images]
            self._unused[f"{kind} without an image, not used"] += unused

    def _miss_label(
        self, image: Path, folders: Sequence[Path], near: Path | None, alike: Sequence[Path]
    ) -> None:
        """Note an image without a label, and what lies where the label should."""
        places = " or ".join(map(str, folders)) or f"a folder of labels beside {image.parent}"
        problem = f"{image}: found no label of this stem, expected one in {places}"
        if near:
            problem += f"; {near}: {_advice(near)}"
        elif alike:
            count = f"{len(alike)} file(s) that begin alike, such as {alike[0].name}"
            problem += f"; found {count}: expected one map of all nuclei, with an id each"
        self.problems.append(problem)

    def _add(
        self, stem: str, place: Place, image: Path, label: Path, vague: Path | None = None
    ) -> None:
        organ, patient = place
        if self._rules.organ:
            organ = first_group(re.compile(self._rules.organ), stem) or organ
        grouped = self._pattern.pattern
        group = first_group(self._pattern, stem) if grouped else patient or f"{organ}/{stem}"
        if not group:
            self.problems.append(f"{image}: found a name that group={grouped!r} does not match")
            return
        self._prefixes[image] = "_".join(filter(None, (organ, patient)))
        self.records.append(Record(stem, organ, image, label, vague, group))

    def _check_repeats(self, what: str, keys: Sequence[str]) -> None:
        """Note each record whose key an earlier record has."""
        first: dict[str, Record] = {}
        for key, record in zip(keys, self.records):
            earlier = first.setdefault(key, record)
            if earlier is not record:
                found = f"the {what} of {earlier.image} again"
                self.problems.append(f"{record.image}: found {found}, expected each image once")

    def _remarks(self, root: Path) -> list[str]:
        kinds = dict(self._unused)
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

    Warns of labels from NuInsSeg's `label masks`, and of files that are not used: once for each
    reason.

    Args:
        root: folder of the data set.
        layout: auto, or a name in `nucsam.data.published.LAYOUTS`.
        group: regular expression, searched in the file stem. Its first capture group, or else the
            whole match, names the group. No split separates images of one group. "" takes the
            patient's folder, or else makes each image its own group.

    Raises:
        UserError: names every image without a label, stem that comes twice in a folder, image that
            comes twice, and name that `group` does not match; or the folder that has no data set
            or cannot be listed.
    """
    if not str(root):
        raise UserError("root: found an empty path, expected a folder of images and label maps")
    scan = scan_folder(Path(root), layout, group)
    raise_problems(root, scan.problems)
    for remark in scan.remarks:
        warnings.warn(remark, stacklevel=2)
    return scan.records


def describe_records(records: Sequence[Record]) -> str:
    """One line on what makes up a data set: images, and the folders and names of the labels."""
    kinds = Counter()
    for record in records:
        end = unicodedata.normalize("NFC", record.label.name).partition(stem_of(record.image))[2]
        kinds[f"{record.label.parent.name}/NAME{end}" if end else record.label.parent.name] += 1
    labels = ", ".join(
        f"{kind} ({count})" if len(kinds) > 1 else kind for kind, count in kinds.most_common()
    )
    groups = len({record.group for record in records})
    organs = len({record.organ for record in records})
    vague = sum(record.vague is not None for record in records)
    parts = [f"{len(records)} images", f"labels: {labels}"]
    parts += [f"{vague} with vague areas"] if vague else []
    parts += [f"{organs} organs"] if organs > 1 else []
    parts += [f"{groups} groups, which no split separates"] if groups < len(records) else []
    return "; ".join(parts)


def format_size(shape: tuple[int, ...]) -> str:
    """(H, W, ...) as WIDTHxHEIGHT."""
    return f"{shape[1]}x{shape[0]}"
