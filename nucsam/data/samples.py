"""Decoded images, crops and batches."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.data import geojson
from nucsam.data.folders import Record, format_size, raise_problems
from nucsam.data.images import read_image, read_label
from nucsam.data.labels import components, not_instances
from nucsam.errors import UserError
from nucsam.progress import with_bar

MIN_SIDE = 64  # px, the least that the encoder takes
DRAWS = 32  # uniform numbers that a crop hands to its augmentation


@dataclass(frozen=True)
class Sample:
    """One decoded image."""

    image: np.ndarray  # uint8 (H, W, 3)
    label: np.ndarray  # int32 (H, W), 0 = background, ids 1..n without gaps
    vague: np.ndarray | None  # bool (H, W), True where the annotators were unsure
    problem: str = ""  # why the label seems to be no map of instances


def read_nuclei(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a label map, or draw the outlines of a GeoJSON file.

    Args:
        path: a label file or a .geojson file.
        shape: (H, W) of the image, which outlines need.

    Returns:
        Integer ids (H, W), 0 = background.
    """
    if path.suffix.lower() == ".geojson":
        return geojson.read(path, shape)
    return read_label(path)


def read_sample(record: Record) -> Sample:
    """Read and check the files of one record.

    Raises:
        UserError: a file is bad, sizes differ, or a side is under MIN_SIDE px.
    """
    from skimage.segmentation import relabel_sequential

    image = read_image(record.image)
    size = image.shape[:2]
    label = read_nuclei(record.label, size)
    vague = read_image(record.vague).any(-1) if record.vague else None
    if min(size) < MIN_SIDE:
        found = format_size(size)
        raise UserError(f"{record.image}: found {found} px, expected at least {MIN_SIDE} px a side")
    for path, mask in ((record.label, label), (record.vague, vague)):
        if mask is not None and mask.shape != size:
            found, expected = format_size(mask.shape), format_size(size)
            raise UserError(f"{path}: found {found} px, expected {expected} as in {record.image}")
    problem = ""
    if record.connected:
        label = components(label)
    elif found := not_instances(label):
        expected = "one id per nucleus; data.connected = true makes each component a nucleus"
        problem = f"{record.label}: found {found}, expected {expected}"
    return Sample(image, relabel_sequential(label)[0], vague, problem)


def attempt(function: Callable[[Any], Any], item: Any) -> Any:
    """The function's result; a UserError in its place where one was raised."""
    try:
        return function(item)
    except UserError as error:
        return error


def read_each(
    function: Callable[[Record], Any], records: Sequence[Record], title: str, progress: bool = True
) -> Iterator[Any]:
    """`attempt` a function on each record, in threads.

    Args:
        function: reads one record.
        records: what to read.
        title: the text beside the progress bar.
        progress: whether to show a bar.

    Returns:
        Results in the order of the records.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(partial(attempt, function), records)
        yield from with_bar(results, len(records), title) if progress else results


Planes = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # image, label, vague


def _planes(sample: Sample) -> Planes:
    """A sample as crops are cut from it, in 5 bytes a pixel and one more with a vague area."""
    label = sample.label
    if label.max() <= 65535:
        label = label.astype(np.uint16)
    return np.ascontiguousarray(sample.image.transpose(2, 0, 1)), label, sample.vague


class Samples:
    """The samples of the records, decoded once and kept in memory.

    Every image is read once to check it. Forked loader workers share what is kept; spawned ones
    copy it. Where it would exceed the limit, `kept` is False and each access reads the files again.

    Args:
        records: the images.
        memory_gib: the limit of the memory kept, GiB.
        progress: whether to show a progress bar.

    Raises:
        UserError: names every file that cannot be used; also a label that is no map of instances.
    """

    def __init__(
        self, records: Sequence[Record], *, memory_gib: float = 8.0, progress: bool = True
    ):
        self.records = list(records)
        self.sizes = []  # (H, W) of each image
        self.kept = True
        self._planes: list[Planes] = []
        problems = []
        kept_bytes = 0
        for sample in read_each(read_sample, self.records, "Decoding images", progress):
            if isinstance(sample, UserError) or sample.problem:
                problems.append(getattr(sample, "problem", "") or str(sample))
                continue
            self.sizes.append(sample.label.shape)
            planes = _planes(sample)
            kept_bytes += sum(plane.nbytes for plane in planes if plane is not None)
            self.kept &= kept_bytes <= memory_gib * 2**30
            if self.kept:
                self._planes.append(planes)
            else:
                self._planes.clear()
        raise_problems(f"{len(self.records)} images", problems)

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
        return Sample(np.ascontiguousarray(image.transpose(1, 2, 0)), label.astype(np.int32), vague)


class Crops:
    """A map-style data set of square crops.

    A key (epoch, index) fixes everything random, so that batch size, loader workers and processes
    change nothing. An image smaller than the window lies somewhere in the crop, reflected around
    its edges.

    Args:
        samples: the images.
        window: side S of a crop, image px.
        seed: of the place of a crop and of its draws.

    Returns:
        An item is a dict of tensors: image uint8 (3, S, S); label int32 (S, S) with the ids of
        the whole image; counted bool (S, S), False where vague or outside the image; draws float32
        (DRAWS,), uniform in [0, 1); index int64 (), into the samples.
    """

    def __init__(self, samples: Samples, *, window: int, seed: int):
        self.samples, self.window, self.seed = samples, window, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        import torch

        epoch, index = key
        window = self.window
        rng = np.random.default_rng((self.seed, epoch, index))
        image, label, vague = self.samples.planes(index)
        room = [side - window for side in label.shape]  # negative where the image is smaller
        starts = [int(rng.integers(min(0, spare), max(0, spare) + 1)) for spare in room]
        rows, columns = (slice(max(0, start), start + window) for start in starts)
        image = image[:, rows, columns]
        label = label[rows, columns].astype(np.int32)
        counted = np.ones_like(label, bool) if vague is None else ~vague[rows, columns]
        if min(room) < 0:
            before = [max(0, -start) for start in starts]
            edges = [(pad, window - side - pad) for pad, side in zip(before, label.shape)]
            image = np.pad(image, ((0, 0), *edges), mode="reflect")
            label, counted = np.pad(label, edges), np.pad(counted, edges)
        item = {
            "image": np.ascontiguousarray(image),
            "label": label,
            "counted": counted,
            "draws": rng.random(DRAWS, dtype=np.float32),
            "index": np.array(index),
        }
        return {name: torch.from_numpy(array) for name, array in item.items()}


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
