"""Folders of H&E images with nucleus masks -> samples, folds, crops, batches.

    nuinsseg:  ORGAN/tissue images/NAME.png, ORGAN/label masks modify/NAME.tif,
               ORGAN/vague areas/mask binary/NAME.png
    plain:     images/NAME.png, labels/NAME.tif or annotations/NAME.geojson, vague/NAME.png;
               or images/ORGAN/NAME.png, ...

The types of the files are those of `nucsam.images`; annotations are outlines, as QuPath exports them. Vague areas,
which need not be there, are the non-zero pixels of an image file. Hidden files and other types are ignored; symbolic
links are followed, wherever they lead.
"""

import hashlib
import math
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from nucsam import geojson
from nucsam.images import IMAGES, LABELS, read_image, read_label, read_mpp, write_label  # noqa: F401 (for others)

NUINSSEG = (  # folders of an organ with its images, labels and vague areas, in order of preference
    ("tissue images",),
    ("label masks modify", "label masks"),
    ("vague areas/mask binary", "vague areas/mask binary_vague"),
)
MIN_SIDE = 64  # px: the least that the encoder takes
DRAWS = 32  # uniform numbers that one crop hands to its augmentation


@dataclass(frozen=True)
class Record:
    """One image on disk. `name` is the file stem, or `ORGAN_STEM` where organs share a stem."""

    name: str
    organ: str
    image: Path
    label: Path
    vague: Path | None
    group: str


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    image: np.ndarray  # uint8 (H, W, 3)
    label: np.ndarray  # int32 (H, W), 0 = background, ids 1..n without gaps
    vague: np.ndarray | None  # bool (H, W), True where the annotators were unsure


@dataclass(frozen=True)
class Split:
    """Indices into the records, ascending: to train on, to choose the epoch by, to test on."""

    train: tuple[int, ...]
    inner: tuple[int, ...]
    test: tuple[int, ...]


# ---- folders ----


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")  # no glob: real names hold brackets
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{folder}: cannot be listed ({reason}), expected a readable folder") from error


def _by_stem(folders: Sequence[Path], suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Stem -> file, from the first folder that has it."""
    files: dict[str, Path] = {}
    for path in (path for folder in folders for path in visible(folder) if path.suffix.lower() in suffixes):
        first = files.setdefault(unicodedata.normalize("NFC", path.stem), path)  # macOS writes the decomposed form
        if first is not path and first.parent == path.parent:
            problems.append(f"{path}: found the stem of {first.name} again, expected one file a stem")
    return files


def _folders(root: Path, layout: str) -> list[tuple[str, list[list[Path]]]]:
    """(organ, its folders as in NUINSSEG, then those of annotations) of each organ."""
    if layout not in ("auto", "nuinsseg", "plain"):
        raise ValueError(f"data.layout: found {layout!r}, expected auto, nuinsseg or plain")
    inside = visible(root)
    known = {name for kind in NUINSSEG[:2] for name in kind}
    organs = {path: known & {child.name for child in visible(path)} for path in inside} if layout != "plain" else {}
    organs = {path: names for path, names in organs.items() if names}
    if any("tissue images" in names for names in organs.values()):
        return [(organ.name, [*([organ / name for name in kind] for kind in NUINSSEG), []]) for organ in organs]
    if root / "images" in inside and layout != "nuinsseg":
        kinds = ("images", "labels", "vague", "annotations")
        names = {"", *(path.name for kind in kinds for path in visible(root / kind) if path.is_dir())}
        return [(name, [[root / kind / name] for kind in kinds]) for name in sorted(names)]
    what = "" if root.is_dir() else " (a file; unpack it)" if root.is_file() else " (no such folder)"
    near = [path for path in inside if any((p / "tissue images").is_dir() for p in visible(path))]
    near += [path for path in inside if (path / "images").is_dir()] + [root.parent] * (root / "tissue images" in inside)
    raise ValueError(
        f"{root}: found no data set{what}, expected ORGAN/tissue images (nuinsseg) or images (plain) in it"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _scan(root: Path, layout: str, group: str) -> tuple[list[Record], list[str], list[str]]:
    """(records in the official order, problems, remarks)."""
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"data.group: found {group!r}, expected a regular expression ({error})") from error
    records, problems, orphans, unused = [], [], [], []
    for organ, folders in _folders(root, layout):
        kinds = zip(folders, (IMAGES, LABELS, IMAGES, (".geojson",)))
        images, labels, vague, drawn = (_by_stem(paths, suffixes, problems) for paths, suffixes in kinds)
        twice = sorted(labels.keys() & drawn.keys())
        problems += [f"{drawn[stem]}: found {labels[stem]} too, expected one of them" for stem in twice]
        labels |= drawn
        orphans += [path for stem, path in labels.items() if stem not in images]
        unused += [path for stem, path in vague.items() if stem not in images]
        for stem, image in images.items():
            match = pattern.search(stem)
            key = (match and match[min(1, pattern.groups)]) if group else f"{organ}/{stem}"
            if not key:
                problems.append(f"{image}: found a name that data.group={group!r} does not match")
            elif stem not in labels:
                places = " or ".join(str(paths[0]) for paths in (folders[1], folders[3]) if paths)
                problems.append(f"{image}: found no label of this stem, expected one in {places}")
            else:
                records.append(Record(stem, organ, image, labels[stem], vague.get(stem), key))
    if not records and not problems:
        problems.append(f"{root}: found no image, expected {', '.join(IMAGES)}")
    records.sort(key=lambda record: str(record.image))
    stems = Counter(record.name for record in records)
    records = [replace(r, name=f"{r.organ}_{r.name}") if stems[r.name] > 1 else r for r in records]
    for what, key in (("file", lambda r: os.path.realpath(r.image)), ("name", lambda r: r.name)):
        first: dict[str, Record] = {}
        problems += [
            f"{record.image}: found the {what} of {other.image} again, expected each image once"
            for record in records
            if (other := first.setdefault(key(record), record)) is not record
        ]
    sums = [record.label for record in records if record.label.parent.name == "label masks"]
    remarks = {"labels without an image, not used": orphans, "vague areas without an image, not used": unused}
    remarks["labels from 'label masks', where overlaps are sums of ids: expect spurious nuclei"] = sums
    remarks = [f"{root}: {len(paths)} {what}; first: {paths[0]}" for what, paths in remarks.items() if paths]
    return records, problems, remarks


def _refuse(title: object, problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{title}: found {len(problems)} problem(s)", *problems]))


def find_records(root: str | Path, *, layout: str = "auto", group: str = "") -> list[Record]:
    """Records of a data set, sorted by the image path as a plain string (NuInsSeg's official order).

    `layout` is auto, nuinsseg or plain. `group` is a regular expression searched in the file stem: its first
    capture group (or the whole match) names the group, whose images no split parts; "" makes each image its
    own group. Warns once of labels from NuInsSeg's `label masks`, once of labels and once of vague areas without
    an image. Raises one ValueError that names every image without a label, stem that comes twice in a folder,
    image that comes twice (by links), and name that `group` does not match; or one that names a folder that
    cannot be listed.
    """
    if not str(root):
        raise ValueError("data.root: found an empty path, expected a folder of images and label maps")
    records, problems, remarks = _scan(Path(root), layout, group)
    _refuse(root, problems)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return records


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def read_nuclei(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A label file, or the GeoJSON of an image of `shape` (H, W), as int32 (H, W): see `read_label`, `geojson.read`."""
    return geojson.read(path, shape) if path.suffix.lower() == ".geojson" else read_label(path)


def read_sample(record: Record) -> Sample:
    """Reads and checks one record. Raises ValueError on a bad file, sizes that differ, a side under 64 px,
    and a binary mask in place of ids (several components that all have one id)."""
    from scipy import ndimage
    from skimage.segmentation import relabel_sequential

    image = read_image(record.image)
    size = image.shape[:2]
    label = read_nuclei(record.label, size)
    vague = read_image(record.vague).any(-1) if record.vague else None
    if min(size) < MIN_SIDE:
        raise ValueError(f"{record.image}: found {_size(size)} px, expected at least {MIN_SIDE} px a side")
    for path, mask in ((record.label, label), (record.vague, vague)):
        if mask is not None and mask.shape != size:
            raise ValueError(f"{path}: found {_size(mask.shape)} px, expected {_size(size)} as in {record.image}")
    value, label = label.max(), relabel_sequential(label)[0]
    if label.max() == 1 and (parts := ndimage.label(label, np.ones((3, 3)))[1]) > 1:
        found = f"a binary mask ({parts} components that all have the value {value})"
        raise ValueError(f"{record.label}: found {found}, expected one id per nucleus, as of skimage.measure.label")
    return Sample(image, label, vague)


# ---- folds ----


def _stratified(organs: np.ndarray, sizes: np.ndarray, parts: int, seed: int | tuple) -> np.ndarray:
    """Part of each group, by organ and large groups first: the part with the fewest images of the organ, then
    of all."""
    order = np.random.default_rng(seed).permutation(len(organs))
    rank = {organs[item]: place for place, item in enumerate(order)}
    part, images = np.empty(len(organs), int), Counter()
    for item in sorted(order, key=lambda item: (rank[organs[item]], -sizes[item])):
        organ = organs[item]
        part[item] = least = min(range(parts), key=lambda part: (images[part, organ], images[part]))
        images[least, organ] += sizes[item]
        images[least] += sizes[item]
    return part


def identity(records: Sequence[Record]) -> str:
    """SHA-256 over organ, name and group of the records in their order: the same images are split alike."""
    names = "\n".join(f"{record.organ}/{record.name}/{record.group}" for record in records)
    return hashlib.sha256(names.encode()).hexdigest()


def split_records(
    records: Sequence[Record], *, scheme="official", folds=5, fold: int | str = 0, inner=0.15, seed=19
) -> Split:
    """Splits records into training, inner validation and test. A group never parts.

    "official" is scikit-learn's KFold(folds, shuffle=True, random_state=seed) over the records in their
    order, or over the sorted groups where a group has several images. "organ" gives each fold its share of
    every organ. fold "all" tests on nothing. `inner`, at most 0.5, is the share of the training images to choose
    the epoch by: one part in round(1 / inner), stratified by organ, never empty where there are two groups,
    the same for a (seed, fold); 0 takes none. Raises ValueError naming data.split, data.folds, data.fold or
    data.inner.
    """
    images = Counter(record.group for record in records)
    groups = list(images) if len(images) == len(records) else sorted(images)
    organ = {record.group: record.organ for record in reversed(records)}
    organs, sizes = np.array([organ[group] for group in groups]), np.array([images[group] for group in groups])
    if scheme not in ("official", "organ"):
        raise ValueError(f"data.split: found {scheme!r}, expected official or organ")
    if not 0 <= seed < 2**32:
        raise ValueError(f"data.seed: found {seed}, expected 0 to {2**32 - 1}")
    if not 0 <= inner <= 0.5:
        raise ValueError(f"data.inner: found {inner}, expected a fraction over 0, at most 0.5")
    kind = np.zeros(len(groups), int)  # 0 = train, 1 = inner, 2 = test
    if fold != "all":
        if not 2 <= folds <= len(groups):
            raise ValueError(f"data.folds: found {folds}, expected 2 to {len(groups)}, the number of groups")
        if fold not in range(folds):
            raise ValueError(f"data.fold: found {fold!r}, expected 0 to {folds - 1} or all")
        if scheme == "official":
            test = np.array_split(np.random.RandomState(seed).permutation(len(groups)), folds)[fold]
        else:
            test = _stratified(organs, sizes, folds, seed) == fold
        kind[test] = 2
    rest = np.flatnonzero(kind == 0)
    if inner and len(rest) > 1:
        number = folds if fold == "all" else fold
        kind[rest[_stratified(organs[rest], sizes[rest], round(1 / inner), (seed, number)) == 0]] = 1
    of = dict(zip(groups, kind))
    return Split(*(tuple(i for i, record in enumerate(records) if of[record.group] == k) for k in range(3)))


# ---- samples in memory ----


def _each(function: Callable, records: Sequence[Record], title: str, bad: list[str], progress: bool) -> Iterator:
    """(record, result) in order, by threads, with a progress bar; the text of a ValueError goes to `bad`."""
    from rich.console import Console
    from rich.progress import track

    def attempt(record: Record) -> object:
        try:
            return function(record)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results, console = pool.map(attempt, records), Console(stderr=True)
        if progress and (console.is_terminal or console.is_jupyter):  # into a file, rich writes an empty line
            results = track(results, title, len(records), console=console, transient=True)
        for result, record in zip(results, records):  # in this order the bar sees the end
            if isinstance(result, ValueError):
                bad.append(str(result))
            else:
                yield record, result


def _shared(planes: list[np.ndarray]):
    """The pixels of all planes in one flat tensor in shared memory. Empties the list."""
    import torch

    flat = torch.from_numpy(np.concatenate(planes, axis=None))
    planes.clear()
    try:
        flat.share_memory_()
    except RuntimeError:  # the /dev/shm of a container is often 64 MB
        found = f"shared memory (/dev/shm) has no room for {flat.nbytes / 2**20:.1f} MiB of decoded images"
        warnings.warn(f"{found}: forked loader workers share them, spawned ones copy them", stacklevel=3)
    return flat


class Samples:
    """The samples of the records, decoded once and kept in shared memory, which loader workers share under
    fork, forkserver and spawn: one flat tensor each of images (uint8, each (3, H, W)), labels (uint16, or
    int32 where an image has over 65,535 nuclei) and vague areas (bool). Where they would be over
    `memory_gib`, `kept` is False and a sample is read when asked for; all are read once to check them.
    Decoding takes up to 1.6 times the memory kept. Raises one ValueError that names every file that cannot be
    used.
    """

    def __init__(self, records: Sequence[Record], *, memory_gib: float = 8.0, progress: bool = True):
        self.records, self.sizes, self.starts, self.kept = list(records), [], [0], True
        bad, planes, masks = [], ([], [], []), any(record.vague for record in records)
        for _, sample in _each(read_sample, self.records, "Decoding images", bad, progress):
            label, vague = sample.label, sample.vague
            self.sizes.append(label.shape)
            self.starts.append(self.starts[-1] + label.size)
            self.kept &= self.starts[-1] * (5 + masks) <= memory_gib * 2**30
            if vague is None:
                vague = np.zeros(label.shape if masks else 0, bool)
            if label.max() <= 65535:
                label = label.astype(np.uint16)
            for kind, plane in zip(planes, (sample.image.transpose(2, 0, 1), label, vague)):
                kind.append(plane)
                if not self.kept:
                    kind.clear()
        _refuse(f"{len(self.records)} images", bad)
        if self.kept:
            self.image, self.label, self.vague = map(_shared, planes)

    def planes(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """image uint8 (3, H, W), label (H, W), vague bool (H, W) or None; views of the memory kept."""
        if not self.kept:
            sample = read_sample(self.records[index])
            return sample.image.transpose(2, 0, 1), sample.label, sample.vague
        first, last, size = self.starts[index], self.starts[index + 1], self.sizes[index]
        image = self.image.numpy()[3 * first : 3 * last].reshape(3, *size)
        vague = self.vague.numpy()[first:last].reshape(size) if self.records[index].vague else None
        return image, self.label.numpy()[first:last].reshape(size), vague

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        image, label, vague = self.planes(index)
        vague = None if vague is None else vague.copy()
        return Sample(np.ascontiguousarray(image.transpose(1, 2, 0)), label.astype(np.int32), vague)


class Crops:
    """Map-style data set of square crops. A key (epoch, index) fixes all that is random, so that batch size,
    loader workers and processes change nothing.

    An item holds tensors: image uint8 (3, S, S); label int32 (S, S), with the ids of the whole image; counted
    bool (S, S), False where vague or outside of the image; draws float32 (32,), uniform in [0, 1); index
    int64 (), into the samples. S is `window`, in image px. An image smaller than S lies somewhere in the
    crop, reflected around.
    """

    def __init__(self, samples: Samples, *, window: int, seed: int):
        if seed < 0:
            raise ValueError(f"train.seed: found {seed}, expected 0 or more")
        self.samples, self.window, self.seed = samples, window, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        import torch

        epoch, index = key
        rng, window = np.random.default_rng((self.seed, epoch, index)), self.window
        image, label, vague = self.samples.planes(index)
        spare = [side - window for side in label.shape]
        place = [int(rng.integers(min(0, room), max(0, room) + 1)) for room in spare]
        rows, columns = (slice(max(0, start), start + window) for start in place)
        image, label = image[:, rows, columns], label[rows, columns].astype(np.int32)
        counted = np.ones_like(label, bool) if vague is None else ~vague[rows, columns]
        if min(spare) < 0:
            edges = [(max(0, -start), window - side - max(0, -start)) for start, side in zip(place, label.shape)]
            image = np.pad(image, ((0, 0), *edges), mode="reflect")
            label, counted = np.pad(label, edges), np.pad(counted, edges)
        draws, image = rng.random(DRAWS, dtype=np.float32), np.ascontiguousarray(image)
        item = {"image": image, "label": label, "counted": counted, "draws": draws, "index": np.array(index)}
        return {name: torch.from_numpy(array) for name, array in item.items()}


@dataclass
class EpochBatches:
    """Batch sampler of one process: lists of (epoch, index) for `Crops`.

    An epoch is a permutation of the indices drawn from (seed, epoch), completed from its own beginning to
    whole optimizer steps of batch * processes * accumulation images. Micro-batch k of all processes is one
    run of batch * processes images; process r takes its r-th part: N processes see what one with the N-fold
    batch sees. `steps` counts the optimizer steps of an epoch; `len` the micro-batches that are left of it
    after `skip`.
    """

    indices: Sequence[int]
    batch: int
    rank: int = 0
    processes: int = 1
    accumulation: int = 1
    seed: int = 0
    epoch: int = 0
    skip: int = 0

    def __post_init__(self):
        if not len(self.indices):
            raise ValueError("data: found no image to train on, expected at least one")
        self.steps = math.ceil(len(self.indices) / (self.batch * self.processes * self.accumulation))

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The epoch that iteration gives next, without its first `skip` micro-batches."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.steps * self.accumulation - self.skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.indices)
        order = np.resize(order, (self.steps * self.accumulation, self.processes, self.batch))
        for part in order[self.skip :, self.rank].tolist():
            yield [(self.epoch, index) for index in part]


# ---- what is in a folder ----


def _numbers(record: Record) -> tuple[str, np.ndarray, float | None, float | None]:
    """(size, nuclear areas in px, vague area in percent, microns per pixel)."""
    sample = read_sample(record)
    vague = None if sample.vague is None else 100 * sample.vague.mean()
    return _size(sample.label.shape), np.bincount(sample.label.ravel())[1:], vague, read_mpp(record.image)


def _row(organ: str, found: Sequence[tuple[Record, tuple]]) -> dict:
    sizes, areas, vague, mpp = zip(*(numbers for _, numbers in found))
    vague, nuclei = [share for share in vague if share is not None], np.concatenate(areas)
    return {
        "organ": organ,
        "images": len(found),
        "groups": len({record.group for record, _ in found}),
        "nuclei": len(nuclei),
        "nuclei_per_image": len(nuclei) / len(found),
        "images_without": sum(len(area) == 0 for area in areas),
        "median_area_px": float(np.median(nuclei)) if len(nuclei) else None,
        "vague_percent": float(np.mean(vague)) if vague else None,
        "microns_per_px": sorted({value for value in mpp if value}),
        "sizes": dict(Counter(sizes).most_common()),
    }


def inspect_folder(root: str | Path, *, layout: str = "auto", group: str = "") -> dict:
    """Reads a whole data set; what is in it, fit for JSON.

    `rows`, one an organ and a last one for all: images, groups, nuclei, median nuclear area in px, vague area
    in percent of the images that have a mask, microns per pixel, sizes. `bad`: every problem; such images are
    not counted. `remarks`. `examples`: up to 24 images, of all organs in turn, as name, image path, label
    path.
    """
    records, bad, remarks = _scan(Path(root), layout, group)
    found, organs = list(_each(_numbers, records, "Reading images", bad, True)), defaultdict(list)
    for record, numbers in found:
        organs[record.organ].append((record, numbers))
    rows = [_row(organ, pairs) for organ, pairs in organs.items()] + ([_row("all", found)] if found else [])
    turns = [record for turn in zip_longest(*organs.values()) for record, _ in filter(None, turn)]
    examples = [(record.name, str(record.image), str(record.label)) for record in turns[:24]]
    return {"root": str(root), "rows": rows, "bad": bad, "remarks": remarks, "examples": examples}


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count})" for key, count in value.items())
    if isinstance(value, list):
        return ", ".join(f"{number:.3g}" for number in value) or "-"
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)


def summary_table(summary: dict):
    """The rows of `inspect_folder` as a rich Table; its problems and remarks are left to the caller."""
    from rich.table import Table

    table = Table(title=summary["root"])
    for name in summary["rows"][0] if summary["rows"] else ():
        left = name in ("organ", "sizes")
        table.add_column(name.replace("_", " "), justify="left" if left else "right", overflow="fold")
    for row in summary["rows"]:
        table.add_row(*map(_cell, row.values()))
    return table
