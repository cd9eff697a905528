"""Folders of H&E images with nucleus masks -> samples, folds, crops, batches.

    nuinsseg:  ORGAN/tissue images/NAME.png, ORGAN/label masks modify/NAME.tif,
               ORGAN/vague areas/mask binary/NAME.png
    plain:     images/NAME.png, labels/NAME.tif, vague/NAME.png; or images/ORGAN/NAME.png, ...

Images are PNG, TIFF, JPEG or BMP; labels TIFF, PNG or NPY, 0 = background and one id per nucleus; vague
areas, which need not be there, are the non-zero pixels of an image file. Hidden files and other types are
ignored.
"""

import io
import math
import os
import re
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

TIFF = (".tif", ".tiff")
IMAGES = (".png", *TIFF, ".jpg", ".jpeg", ".bmp")
LABELS = (*TIFF, ".png", ".npy")
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


def _visible(folder: Path) -> list[Path]:
    # iterdir, not glob: real folder names hold brackets
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _by_stem(folders: Sequence[Path], suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Stem -> file, from the first folder that has it."""
    files: dict[str, Path] = {}
    for path in (path for folder in folders for path in _visible(folder)):
        if path.suffix.lower() in suffixes and not path.is_dir():  # a dangling link stays, and fails when read
            stem = unicodedata.normalize("NFC", path.stem)  # macOS writes the decomposed form
            if files.setdefault(stem, path) != path and files[stem].parent == path.parent:
                problems.append(f"{path}: found the stem of {files[stem].name} again, expected one file a stem")
    return files


def _folders(root: Path, layout: str) -> list[tuple[str, list[Path], list[Path], list[Path]]]:
    """(organ, image folders, label folders, vague folders), the folders of a kind in order of preference."""
    if layout not in ("auto", "nuinsseg", "plain"):
        raise ValueError(f"data.layout: found {layout!r}, expected auto, nuinsseg or plain")
    organs = [path for path in _visible(root) if (path / "tissue images").is_dir()]
    images = root / "images"
    if organs and layout != "plain":
        names = (
            ("tissue images",),
            ("label masks modify", "label masks"),
            ("mask binary", "mask binary_vague"),
        )
        tops = "", "", "vague areas"
        return [(o.name, *([o / top / name for name in kind] for top, kind in zip(tops, names))) for o in organs]
    if images.is_dir() and layout != "nuinsseg":
        parts = [Path(), *(path.relative_to(images) for path in _visible(images) if path.is_dir())]
        return [(part.name, *([root / kind / part] for kind in ("images", "labels", "vague"))) for part in parts]
    raise ValueError(f"{root}: found no data set, expected ORGAN/tissue images (nuinsseg) or images (plain) in it")


def _scan(root: Path, layout: str, group: str) -> tuple[list[Record], list[str], list[str]]:
    """(records in the official order, problems, remarks)."""
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"data.group: found {group!r}, expected a regular expression ({error})") from error
    records, problems, orphans = [], [], []
    for organ, *folders in _folders(root, layout):
        kinds = zip(folders, (IMAGES, LABELS, IMAGES))
        images, labels, vague = (_by_stem(paths, suffixes, problems) for paths, suffixes in kinds)
        orphans += [str(path) for stem, path in labels.items() if stem not in images]
        for stem, image in images.items():
            match = pattern.search(stem)
            key = (match and match[min(1, pattern.groups)]) if group else f"{organ}/{stem}"
            if not key:
                problems.append(f"{image}: found a name that data.group={group!r} does not match")
            elif stem not in labels:
                problems.append(f"{image}: found no label of this stem, expected one in {folders[1][0]}")
            else:
                records.append(Record(stem, organ, image, labels[stem], vague.get(stem), key))
    records.sort(key=lambda record: str(record.image))
    stems = Counter(record.name for record in records)
    records = [replace(r, name=f"{r.organ}_{r.name}") if stems[r.name] > 1 else r for r in records]
    if not records and not problems:
        problems.append(f"{root}: found no image, expected {', '.join(IMAGES)}")
    sums = [str(record.label) for record in records if record.label.parent.name == "label masks"]
    kinds = {"labels from 'label masks', where overlaps are sums of ids: expect spurious nuclei": sums}
    kinds["labels without an image, not used"] = orphans
    return records, problems, [f"{root}: {len(v)} {k}; first: {v[0]}" for k, v in kinds.items() if v]


def _refuse(title: object, problems: Sequence[object]) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{title}: found {len(problems)} problem(s)", *map(str, problems)]))


def find_records(root: str | Path, *, layout: str = "auto", group: str = "") -> list[Record]:
    """Records of a data set, sorted by the image path as a plain string (NuInsSeg's official order).

    `layout` is auto, nuinsseg or plain. `group` is a regular expression searched in the file stem: its first
    capture group (or the whole match) names the group, whose images no split parts; "" makes each image its
    own group. Warns once of labels from NuInsSeg's `label masks`, once of labels without an image. Raises one
    ValueError that names every image without a label, stem that comes twice in a folder, and name that
    `group` does not match.
    """
    records, problems, remarks = _scan(Path(root), layout, group)
    _refuse(root, problems)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return records


# ---- files ----


def _read_pillow(path: Path, label: bool) -> np.ndarray:
    from PIL import Image

    with Image.open(path, formats=("PNG", "TIFF") if label else ("PNG", "TIFF", "JPEG", "BMP")) as image:
        stored = label or image.mode in ("1", "L", "RGB", "RGBA", "F") or image.mode.startswith("I")
        return np.asarray(image if stored else image.convert("RGB"))


def _read_tiff(path: Path, label: bool) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        if series.axes not in ("YX", "YXS", "SYX", "CYX"):
            raise ValueError(f"found axes {series.axes} of shape {series.shape}, expected one image")
        # tifffile gives zeros for what lies behind the end of a truncated file
        end = max(sum(part) for page in series.pages for part in zip(page.dataoffsets, page.databytecounts))
        if end > tiff.filehandle.size:
            raise ValueError(f"found {tiff.filehandle.size} of {end} bytes")
        # tifffile alone has no LZW or JPEG, and leaves palettes and inverted grey as they are
        if page.compression in (1, 8, 32946) and page.predictor == 1 and (label or page.photometric in (1, 2)):
            pixels = series.asarray()
            return np.moveaxis(pixels, 0, -1) if series.axes[0] in "SC" else pixels
    return _read_pillow(path, label)


def _read_pixels(path: Path, suffixes: tuple[str, ...], label: bool) -> np.ndarray:
    """As stored, (H, W) or (H, W, C); a palette is looked up for an image, and stays indices for a label."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{path}: found {suffix or 'no'} suffix, expected {', '.join(suffixes)}")
    try:
        if suffix == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        return (_read_tiff if suffix in TIFF else _read_pillow)(path, label)
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: cannot be read ({reason}), expected a whole {suffix[1:]} file") from error


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 (H, W, 3), in 0..255.

    Grey is repeated, palettes are looked up, alpha is dropped. 16-bit values lose their 8 low bits; 4 if none
    is over 4095 (12-bit cameras), none if none is over 255. Raises ValueError on other values or shapes, and
    on damaged files.
    """
    pixels = _read_pixels(path := Path(path), IMAGES, label=False)
    low, high, shape = pixels.min(initial=0), pixels.max(initial=0), (*pixels.shape, 1)[:3]
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype.kind not in "ui" or low < 0 or high > 65535 or shape[2] > 4:
        found = f"{pixels.dtype} in {low}..{high} of shape {pixels.shape}"
        raise ValueError(f"{path}: found {found}, expected 8 or 16 bits in (H, W) or (H, W, 1 to 4)")
    if pixels.dtype != np.uint8:
        pixels = (pixels >> (8 if high > 4095 else 4 if high > 255 else 0)).astype(np.uint8)
    pixels = pixels.reshape(shape)
    return np.array(pixels[..., :3] if shape[2] > 2 else pixels[..., [0, 0, 0]], order="C")  # writable


def read_label(path: str | Path) -> np.ndarray:
    """A label file as int32 (H, W): 0 = background, one id per nucleus, gaps allowed; indices of a palette
    are ids.

    Raises ValueError on RGB, float, negative or over-large (int32) ids, and damaged files.
    """
    label = _read_pixels(path := Path(path), LABELS, label=True)
    if label.ndim != 2 or label.dtype.kind not in "uib":
        raise ValueError(f"{path}: found {label.dtype} of shape {label.shape}, expected integer ids (H, W)")
    low, high, most = label.min(initial=0), label.max(initial=0), np.iinfo(np.int32).max
    if low < 0 or high > most:
        raise ValueError(f"{path}: found ids in {low}..{high}, expected 0..{most}")
    return np.ascontiguousarray(label, np.int32)


def write_label(path: str | Path, label: np.ndarray) -> None:
    """Writes ids >= 0 (H, W) as a deflated TIFF: uint16, or uint32 where an id is over 65535. Atomic."""
    import tifffile

    assert label.ndim == 2 and label.dtype.kind in "ui" and label.min(initial=0) >= 0
    dtype = np.uint16 if label.max(initial=0) <= 65535 else np.uint32
    tifffile.imwrite(file := io.BytesIO(), label.astype(dtype), compression="zlib", photometric="minisblack")
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(file.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_mpp(path: str | Path) -> float | None:
    """Microns per pixel of a TIFF from OME, ImageJ or resolution tags. None where there are none, or where
    they are those of a screen or printer (over 20)."""
    import tifffile

    if Path(path).suffix.lower() not in TIFF:
        return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        pixels, per = page.tags["XResolution"].value if "XResolution" in page.tags else (0, 1)
        unit, text = int(page.resolutionunit), page.description
    if ome := re.search(r'PhysicalSizeX="([\d.eE+-]+)"', text):
        named = re.search(r'PhysicalSizeXUnit="([^"]+)"', text)
        mpp = float(ome[1]) * {"nm": 1e-3, "mm": 1e3}.get(named[1] if named else "", 1.0)
    elif text.startswith("ImageJ"):
        mpp = per / pixels if pixels and re.search(r"unit=(micron|um|µm|\\u00B5m)", text) else 0.0
    else:
        mpp = {2: 25400.0, 3: 10000.0}.get(unit, 0.0) * per / pixels if pixels else 0.0
    return mpp if 0 < mpp < 20 else None


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


def read_sample(record: Record) -> Sample:
    """Reads and checks one record. Raises ValueError on a bad file, sizes that differ, a side under 64 px,
    and a binary mask in place of ids (several components that all have one id)."""
    from scipy import ndimage
    from skimage.segmentation import relabel_sequential

    image, label = read_image(record.image), read_label(record.label)
    vague = read_image(record.vague).any(-1) if record.vague else None
    size = image.shape[:2]
    if min(size) < MIN_SIDE:
        raise ValueError(f"{record.image}: found {_size(size)} px, expected at least {MIN_SIDE} px a side")
    for path, mask in ((record.label, label), (record.vague, vague)):
        if mask is not None and mask.shape != size:
            raise ValueError(f"{path}: found {_size(mask.shape)} px, expected {_size(size)} as in {record.image}")
    value, label = label.max(), relabel_sequential(label)[0]
    if label.max() == 1 and (parts := ndimage.label(label, np.ones((3, 3)))[1]) > 1:
        found = f"a binary mask ({parts} components that all have the value {value})"
        raise ValueError(f"{record.label}: found {found}, expected one id per nucleus")
    return Sample(image, label, vague)


# ---- folds ----


def _kfold(count: int, folds: int, seed: int) -> np.ndarray:
    """Fold of each item as in scikit-learn's KFold(folds, shuffle=True, random_state=seed)."""
    order, fold = np.arange(count), np.empty(count, int)
    np.random.RandomState(seed).shuffle(order)
    for number, part in enumerate(np.array_split(order, folds)):
        fold[part] = number
    return fold


def _stratified(organs: Sequence[str], sizes: Sequence[int], parts: int, seed: int | tuple) -> np.ndarray:
    """Part of each group, by organ and large groups first: the part with the fewest images of the organ, then
    of all."""
    order = np.random.default_rng(seed).permutation(len(organs)).tolist()
    rank = {organs[item]: place for place, item in enumerate(order)}
    part, load = np.empty(len(organs), int), np.zeros(parts, int)
    here = {organ: np.zeros(parts, int) for organ in organs}
    for item in sorted(order, key=lambda item: (rank[organs[item]], -sizes[item])):
        part[item] = np.lexsort((load, here[organs[item]]))[0]
        for count in (load, here[organs[item]]):
            count[part[item]] += sizes[item]
    return part


def split_records(
    records: Sequence[Record], *, scheme="official", folds=5, fold: int | str = 0, inner=0.15, seed=19
) -> Split:
    """Splits records into training, inner validation and test. A group never parts.

    "official" is scikit-learn's KFold(folds, shuffle=True, random_state=seed) over the records in their
    order, or over the sorted groups where a group has several images. "organ" gives each fold its share of
    every organ. fold "all" tests on nothing. `inner` in 0..0.5 is the share of the training images to choose
    the epoch by: one part in round(1 / inner), stratified by organ, never empty where there are two groups,
    the same for a (seed, fold). Raises ValueError naming data.split, data.folds, data.fold or data.inner.
    """
    keys = [record.group for record in records]
    groups = keys if len(set(keys)) == len(keys) else sorted(set(keys))
    organs = [records[keys.index(group)].organ for group in groups]
    sizes = list(map(Counter(keys).__getitem__, groups))
    if scheme not in ("official", "organ"):
        raise ValueError(f"data.split: found {scheme!r}, expected official or organ")
    if not 0 <= inner <= 0.5:
        raise ValueError(f"data.inner: found {inner}, expected a share in 0..0.5")
    if fold == "all":
        test, number = np.zeros(len(groups), bool), folds
    elif not 2 <= folds <= len(groups):
        raise ValueError(f"data.folds: found {folds}, expected 2 to {len(groups)}, the number of groups")
    elif fold not in range(folds):
        raise ValueError(f"data.fold: found {fold!r}, expected 0 to {folds - 1} or all")
    else:
        of = _kfold(len(groups), folds, seed) if scheme == "official" else _stratified(organs, sizes, folds, seed)
        test, number = of == fold, fold
    part, rest = np.where(test, 2, 0), np.flatnonzero(~test)
    if inner and len(rest) > 1:
        kept = [organs[item] for item in rest], [sizes[item] for item in rest]
        part[rest[_stratified(*kept, round(1 / inner), (seed, number)) == 0]] = 1
    where = dict(zip(groups, part))
    return Split(*(tuple(i for i, key in enumerate(keys) if where[key] == kind) for kind in range(3)))


# ---- samples in memory ----


def _each(function: Callable, items: Sequence, title: str, progress: bool) -> Iterator:
    """The result or ValueError of each item, in order, by threads; a progress bar once it takes over two
    seconds."""
    from rich.progress import Progress

    def attempt(item: object) -> object:
        try:
            return function(item)
        except ValueError as error:
            return error

    start, bar = time.perf_counter(), Progress(transient=True, disable=not progress)
    task, pool = bar.add_task(title, total=len(items)), ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for result in pool.map(attempt, items):
            yield result
            bar.advance(task)
            if time.perf_counter() - start > 2 and not bar.live.is_started:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()
        pool.shutdown(cancel_futures=True)


def _pack(planes: list, dtype: str):
    """The pixels of all planes in one flat tensor in shared memory. Empties the list as it goes."""
    import torch

    buffer = torch.empty(sum(plane.size for plane in planes), dtype=getattr(torch, dtype))
    try:
        buffer.share_memory_()
    except RuntimeError:  # the /dev/shm of a container is often 64 MB
        found = f"shared memory (/dev/shm) has no room for {buffer.nbytes / 2**20:.1f} MiB of decoded images"
        warnings.warn(f"{found}: forked loader workers share them, spawned ones copy them", stacklevel=3)
    flat, start = buffer.numpy(), 0
    for index, plane in enumerate(planes):
        flat[start : start + plane.size] = plane.ravel()
        start, planes[index] = start + plane.size, None
    return buffer


class Samples:
    """The samples of the records, decoded once and kept in shared memory, which loader workers share under
    fork, forkserver and spawn: one flat tensor each of images (uint8, each (3, H, W)), labels (uint16, or
    int32 where an image has over 65,535 nuclei) and vague areas (bool). Where they would be over
    `memory_gib`, `kept` is False and a sample is read when asked for; all are read once to check them.
    Decoding takes up to 1.6 times the memory kept. Raises one ValueError that names every file that cannot be
    used.
    """

    def __init__(self, records: Sequence[Record], *, memory_gib: float = 8.0, progress: bool = True):
        self.records, self.sizes, self.kept = list(records), [], True
        bad, planes = [], ([], [], [])
        masks = any(record.vague for record in self.records)
        for sample in _each(read_sample, self.records, "Decoding images", progress):
            if isinstance(sample, ValueError):
                bad.append(sample)
                continue
            size = sample.label.shape
            self.sizes.append(size)
            self.kept &= sum(map(math.prod, self.sizes)) * (5 + masks) <= memory_gib * 2**30
            label = sample.label.astype(np.uint16) if sample.label.max() <= 65535 else sample.label
            vague = np.zeros(size if masks else 0, bool) if sample.vague is None else sample.vague
            for kind, plane in zip(planes, (sample.image.transpose(2, 0, 1), label, vague)):
                kind.append(plane)
                if not self.kept:
                    kind.clear()
        _refuse(f"{len(self.records)} images", bad)
        if self.kept:
            wide = any(label.dtype != np.uint16 for label in planes[1])
            self.starts = [0, *np.cumsum(list(map(math.prod, self.sizes))).tolist()]
            self.image, self.label, self.vague = map(_pack, planes, ("uint8", "int32" if wide else "uint16", "bool"))

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


def _numbers(record: Record) -> tuple:
    sample = read_sample(record)
    areas, vague = np.bincount(sample.label.ravel())[1:], sample.vague
    return (
        _size(sample.label.shape),
        areas,
        vague if vague is None else 100 * vague.mean(),
        read_mpp(record.image),
    )


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
    organs: dict[str, list] = defaultdict(list)
    for record, numbers in zip(records, _each(_numbers, records, "Reading images", True)):
        if isinstance(numbers, ValueError):
            bad.append(str(numbers))
        else:
            organs[record.organ].append((record, numbers))
    found = [pair for pairs in organs.values() for pair in pairs]
    rows = [_row(organ, pairs) for organ, pairs in organs.items()] + ([_row("all", found)] if found else [])
    turns = sorted((rank, organ) for organ, pairs in organs.items() for rank in range(len(pairs)))
    shown = [organs[organ][rank][0] for rank, organ in turns[:24]]
    examples = [(record.name, str(record.image), str(record.label)) for record in shown]
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
