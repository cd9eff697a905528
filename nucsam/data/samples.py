"""Decoded images, crops and batches."""

import hashlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.data import geojson, published, rois
from nucsam.data.folders import Record, format_size, raise_problems
from nucsam.data.images import open_image, read_image, read_label, read_mask, read_metadata
from nucsam.data.labels import components, median_area, not_instances
from nucsam.data.rois import Outlines, Place
from nucsam.errors import UserError
from nucsam.progress import with_bar

MIN_SIDE = 64  # px, the least that the encoder takes
TRIES = 16  # places of a crop until one has a pixel that counts
SAME_SCALE = 0.05  # below this difference of log magnification an image is not resampled
ZOOM = 3.0  # most by which the size of its nuclei changes an image's magnification
DRAWS = 32  # uniform numbers that a crop hands to its augmentation


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    image: np.ndarray  # uint8 (H, W, 3)
    label: np.ndarray  # int32 (H, W), 0 = background, ids 1..n without gaps
    vague: np.ndarray | None  # bool (H, W), True where the annotators were unsure
    # whether `vague` also covers what nobody annotated; no score counts it
    partly_annotated: bool = False
    problem: str = ""  # why the label seems to be no map of instances

    def counted(self, label: np.ndarray) -> np.ndarray:
        """A label map (H, W) of the image without the pixels that no score counts."""
        return np.where(self.vague, 0, label) if self.partly_annotated else label


READERS = {
    **dict.fromkeys((".geojson", ".json", ".gz"), geojson.read_shapes),
    **dict.fromkeys((".zip", ".roi"), rois.read_imagej),
    ".xml": rois.read_aperio,
}


def read_outlines(path: Path, region_class: str = "") -> Outlines | None:
    """Read a file of outlines; None for a label map.

    Args:
        path: a file of a type in `rois.SUFFIXES`, or a label file, also one of a public data set.
        region_class: as in `Outlines`.

    Raises:
        UserError: names the file that cannot be read.
    """
    read_shapes = READERS.get(path.suffix.lower())
    return Outlines(path, *read_shapes(path), region_class) if read_shapes else None


def read_nuclei(
    path: Path, size: tuple[int, int], region_class: str = "", region: int | None = None
) -> tuple[np.ndarray, np.ndarray | None, Place]:
    """Read a label map, or draw outlines.

    Args:
        path, region_class: as in `read_outlines`.
        size: (H, W) of the image, which outlines need.
        region: number of the region to draw alone, from 0; None = the whole image.

    Returns:
        Integer ids (h, w), 0 = background; bool (h, w), True where nobody annotated, or None where
        all was annotated; their place in the image.
    """
    outlines = read_outlines(path, region_class)
    if outlines is None:
        return _read_map(path), None, np.s_[:, :]
    place = None if region is None else outlines.window(region, size)
    rest = outlines.uncounted(size, place, region)
    return outlines.label(size, place), rest, place or np.s_[:, :]


def read_vague(path: Path | None, size: tuple[int, int], image: Path) -> np.ndarray | None:
    """The vague area of an image, bool (H, W); None without a mask.

    Raises:
        UserError: the mask cannot be read, or has another size than the image.
    """
    if path is None:
        return None
    vague = read_mask(path)
    check_same_size(path, vague, size, image)
    return vague


def check_same_size(path: Path, array: np.ndarray, size: tuple[int, int], image: Path) -> None:
    """Check that the array (H, W, ...) of a file has the size (H, W) of its image."""
    if array.shape[:2] != size:
        found, expected = format_size(array.shape), format_size(size)
        raise UserError(f"{path}: found {found} px, expected {expected} as in {image}")


def _read_map(path: Path) -> np.ndarray:
    instances = published.read_instances(path)
    if instances is not None:
        return instances
    label = read_label(path)
    return components(label) if published.is_split_mask(path) else label


def by_region(
    records: Sequence[Record], region_class: str = "", connected: bool = False
) -> list[Record]:
    """One record per region of each image that has regions and is read by windows.

    An image that cannot be read stays one record, so that `read_sample` says why. Regions keep the
    group of their image, but in a data set of one image each is a group of its own.

    Args:
        records: of `find_records`.
        region_class: as in `Outlines`.
        connected: each connected component of a label map is a nucleus.

    Returns:
        The records, with `region_class` and `connected` set.
    """
    parts = []
    for record in records:
        record = replace(record, region_class=region_class, connected=connected)
        count = attempt(_count_regions, record)
        if not count or isinstance(count, UserError):
            parts.append(record)
            continue
        for region in range(count):
            name = f"{record.name}_region{region + 1}"
            group = record.group if len(records) > 1 else name
            parts.append(replace(record, name=name, group=group, region=region))
    return parts


def _count_regions(record: Record) -> int:
    """The number of regions of an image that is read by windows; 0 for another image."""
    outlines = read_outlines(record.label, record.region_class)
    if outlines is None or not outlines.regions:
        return 0
    return 0 if isinstance(open_image(record.image), np.ndarray) else len(outlines.regions)


def read_sample(record: Record) -> Sample:
    """Read and check the files of one record.

    If outlines mark regions, or unsure areas, `vague` also covers what was not annotated, and
    nuclei that lie there entirely are removed.

    Raises:
        UserError: a file is bad, sizes differ, or a side is under MIN_SIDE px.
    """
    from skimage.segmentation import relabel_sequential

    try:
        image, label, rest, vague = _read_files(record)
    except UserError:
        _check_swapped(record)
        raise
    size = image.shape[:2]
    if min(size) < MIN_SIDE:
        found = format_size(size)
        raise UserError(f"{record.image}: found {found} px, expected at least {MIN_SIDE} px a side")
    check_same_size(record.label, label, size, record.image)
    drawn = record.label.suffix.lower() in READERS
    found = "" if record.connected or drawn else not_instances(label)
    expected = "one id per nucleus; data.connected = true makes each component a nucleus"
    problem = f"{record.label}: found {found}, expected {expected}" if found else ""
    if record.connected and not drawn:
        label = components(label)
    if rest is not None:
        counted = np.bincount(label[~rest], minlength=label.max() + 1) > 0
        label = np.where(counted[label], label, 0)
        vague = rest if vague is None else rest | vague
    label = relabel_sequential(label)[0]
    return Sample(image, label, vague, partly_annotated=rest is not None, problem=problem)


def _read_files(record: Record) -> tuple[np.ndarray, ...]:
    """Image, label map, what was not annotated or None, vague area or None; of its region alone."""
    whole = read_image(record.image) if record.region is None else open_image(record.image)
    size = whole.shape[:2]
    label, rest, place = read_nuclei(record.label, size, record.region_class, record.region)
    vague = read_vague(record.vague, size, record.image)
    return whole[place], label, rest, None if vague is None else vague[place]


def _check_swapped(record: Record) -> None:
    """Raise a UserError where the label is a picture and the image a label map."""
    files = attempt(read_image, record.label), attempt(read_label, record.image)
    if not any(isinstance(file, UserError) for file in files):
        found = f"a picture, and a label map in {record.image}"
        raise UserError(f"{record.label}: found {found}; swap the folders of images and labels")


def summed_remarks(remarks: Iterable[tuple[Path, Sequence[str]]]) -> list[str]:
    """The remarks of `read_metadata` on image files, each once with its number and first file."""
    files = defaultdict(dict)
    for path, texts in remarks:
        for text in texts:
            files[text][path] = None  # once, however many regions it has
    return [
        f"{len(paths)} image(s): {text}; first: {next(iter(paths))}"
        for text, paths in files.items()
    ]


def digest(sample: Sample) -> str:
    """SHA-256 of an image's pixels, ids and vague area, in hexadecimal; no file format matters."""
    sha256 = hashlib.sha256()
    for array in (sample.image, sample.label.astype(np.int32), sample.vague):
        if array is not None:
            sha256.update(f"{array.dtype}{array.shape}".encode())
            sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def read_digest(record: Record) -> str:
    """The `digest` of a record. Raises as `read_instances` does."""
    return digest(read_instances(record))


def read_instances(record: Record) -> Sample:
    """As `read_sample`, but raises a UserError where the label seems to be no map of instances."""
    sample = read_sample(record)
    if sample.problem:
        raise UserError(sample.problem)
    return sample


def attempt(function: Callable[[Any], Any], item: Any) -> Any:
    """The function's result; a UserError in its place where one was raised."""
    try:
        return function(item)
    except UserError as error:
        return error


def read_each(
    function: Callable[[Record], Any], records: Sequence[Record], title: str
) -> Iterator[Any]:
    """`attempt` a function on each record, in threads.

    Args:
        function: reads one record.
        records: what to read.
        title: the text beside the progress bar.

    Returns:
        Results in the order of the records.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from with_bar(pool.map(partial(attempt, function), records), len(records), title)


Planes = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # image, label, vague


def _planes(sample: Sample) -> Planes:
    """A sample as crops are cut from it, in 5 bytes a pixel and one more with a vague area."""
    label = sample.label
    if label.max() <= 65535:
        label = label.astype(np.uint16)
    return np.ascontiguousarray(sample.image.transpose(2, 0, 1)), label, sample.vague


def _read_whole(record: Record) -> tuple:
    """Everything that `Samples` keeps of a record, so that its threads do all the work."""
    sample = read_instances(record)
    area = median_area([sample.label])
    return (
        _planes(sample),
        sample.partly_annotated,
        digest(sample),
        area,
        *read_metadata(record.image),
    )


class Samples:
    """The samples of the records, decoded once and kept in memory.

    Every image is read once to check it. Forked loader workers share what is kept; spawned ones
    copy it. Where it would exceed the limit, `kept` is False and each access reads the files again.
    `digests` are those of `digest`, `areas` those of `median_area`, and `mpps` the microns per px
    of the image files; None = not known.

    Args:
        records: the images.
        memory_gib: the limit of the memory kept, GiB.

    Raises:
        UserError: names every file that cannot be used; also a label that is no map of instances.
    """

    def __init__(self, records: Sequence[Record], *, memory_gib: float = 8.0):
        self.records = list(records)
        self.kept = True
        self._planes: list[Planes] = []
        self.kept_bytes = 0
        facts, problems, remarks = [], [], []
        results = read_each(_read_whole, self.records, "Decoding images")
        for record, result in zip(self.records, results):
            if isinstance(result, UserError):
                problems.append(str(result))
                continue
            planes, *known, texts = result
            facts.append((planes[1].shape, *known))
            remarks.append((record.image, texts))
            self.kept_bytes += sum(plane.nbytes for plane in planes if plane is not None)
            self.kept &= self.kept_bytes <= memory_gib * 2**30
            if self.kept:
                self._planes.append(planes)
            else:
                self._planes.clear()
        raise_problems(f"{len(self.records)} images", problems)
        # (H, W), whether it is partly annotated, digest, area and microns per px of each image
        self.sizes, self.partly_annotated, self.digests, self.areas, self.mpps = map(
            list, zip(*facts)
        )
        for remark in summed_remarks(remarks):
            warnings.warn(remark, stacklevel=2)

    def planes(self, index: int) -> Planes:
        """One image as it is kept, not to be changed.

        Returns:
            image uint8 (3, H, W); label uint16 or int32 (H, W); vague bool (H, W) or None.
        """
        return self._planes[index] if self.kept else _planes(read_sample(self.records[index]))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        image, label, vague = self.planes(index)
        image = np.ascontiguousarray(image.transpose(1, 2, 0))
        return Sample(image, label.astype(np.int32), vague, self.partly_annotated[index])


def by_nuclei(area: float, nucleus_area: float) -> float:
    """Px of an image per px of the run, so that its median nucleus has `nucleus_area` px there.

    Args:
        area: median area of the image's nuclei, px; 0 = not known.
        nucleus_area: what it is to be in the run, px.

    Returns:
        1 / ZOOM to ZOOM in steps of SAME_SCALE, so that images of nearly one size are alike.
    """
    if not area:
        return 1.0
    steps = round(math.log(area / nucleus_area) / 2 / SAME_SCALE)
    return min(max(math.exp(steps * SAME_SCALE), 1 / ZOOM), ZOOM)


def is_resampled(ratio: float) -> bool:
    """Whether crops of an image with `ratio` px per px of the run are resampled."""
    return round(abs(math.log(ratio)), 6) >= SAME_SCALE


class Crops:
    """A map-style data set of square crops.

    A key (epoch, index) fixes everything random, so that batch size, loader workers and processes
    change nothing. A place that is entirely vague is drawn again, up to TRIES times. An image
    smaller than the window lies somewhere in the crop, reflected around its edges. Where the
    magnification of an image differs from that of the run by over 5 %, its crop is resampled to
    that of the run, as prediction does.

    Args:
        samples: the images.
        window: side S of a crop, px of the run.
        seed: of the place of a crop and of its draws.
        ratios: px of each image per px of the run; None = 1 of all.

    Returns:
        An item is a dict of tensors: image uint8 (3, S, S); label int32 (S, S) with the ids of
        the whole image; counted bool (S, S), False where vague or outside the image; draws float32
        (DRAWS,), uniform in [0, 1); index int64 (), into the samples.
    """

    def __init__(
        self, samples: Samples, *, window: int, seed: int, ratios: Sequence[float] | None = None
    ):
        self.samples, self.window, self.seed = samples, window, seed
        self.ratios = [1.0] * len(samples) if ratios is None else ratios

    def __len__(self) -> int:
        return len(self.samples)

    def _side(self, index: int) -> int:
        """Side of a crop in px of its image."""
        ratio = self.ratios[index]
        return round(self.window * ratio) if is_resampled(ratio) else self.window

    def __getitem__(self, key: tuple[int, int]) -> dict:
        import torch

        epoch, index = key
        window = self._side(index)
        rng = np.random.default_rng((self.seed, epoch, index))
        image, label, vague = self.samples.planes(index)
        room = [side - window for side in label.shape]  # negative where the image is smaller
        for _ in range(TRIES):
            starts = [int(rng.integers(min(0, spare), max(0, spare) + 1)) for spare in room]
            rows, columns = (slice(max(0, start), start + window) for start in starts)
            if vague is None or not vague[rows, columns].all():
                break
        image = image[:, rows, columns]
        label = label[rows, columns].astype(np.int32)
        counted = np.ones_like(label, bool) if vague is None else ~vague[rows, columns]
        if min(room) < 0:
            before = [max(0, -start) for start in starts]
            edges = [(pad, window - side - pad) for pad, side in zip(before, label.shape)]
            image = np.pad(image, ((0, 0), *edges), mode="reflect")
            # Labels are reflected too, because the border of an image is no boundary (`targets`).
            label, counted = np.pad(label, edges, mode="reflect"), np.pad(counted, edges)
        if window != self.window:
            image, label, counted = _resampled(image, label, counted, self.window)
        item = {
            "image": np.ascontiguousarray(image),
            "label": label,
            "counted": counted,
            "draws": rng.random(DRAWS, dtype=np.float32),
            "index": np.array(index),
        }
        return {name: torch.from_numpy(array) for name, array in item.items()}


def _resampled(
    image: np.ndarray, label: np.ndarray, counted: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A square crop at another side: pixels smoothed against aliasing, ids of the nearest pixel."""
    from PIL import Image

    planes = [Image.fromarray(plane).resize((side, side), Image.BILINEAR) for plane in image]
    nearest = ((np.arange(side) + 0.5) * label.shape[0] / side).astype(int)
    rows_and_columns = np.ix_(nearest, nearest)
    return np.stack(planes), label[rows_and_columns], counted[rows_and_columns]


@dataclass
class EpochBatches:
    """A batch sampler of one process: lists of (epoch, index) for `Crops`.

    An epoch is a permutation of the indices, drawn from (seed, epoch). It repeats from its own
    beginning to fill whole optimizer steps of batch * processes * accumulation images. Process r
    takes the r-th batch of each micro-batch, so that N processes see what one process with the
    N-fold batch sees. `steps` counts the optimizer steps of an epoch; `len` counts the
    micro-batches after `skip`.
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
        images = self.batch * self.processes * self.accumulation
        self.steps = math.ceil(len(self.indices) / images)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next iteration, without its first `skip` micro-batches."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.steps * self.accumulation - self.skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.indices)
        order = np.resize(order, (self.steps * self.accumulation, self.processes, self.batch))
        for indices in order[self.skip :, self.rank].tolist():
            yield [(self.epoch, index) for index in indices]
