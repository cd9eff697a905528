"""The grid of tiles over an image, and the windows in which its nuclei are extracted.

A seam between tiles: neighbours share at least `overlap` px. Each tile's maps are weighted by a
ramp that rises from its edges over the overlap, and the weighted mean is taken. So one tile fades
into the next. No seam cuts a nucleus, because nuclei are extracted from the stitched maps.

A nucleus at a window's border: windows keep memory small. A window is a core and a margin around
it. The cores cover the image without overlap. A window extracts the nuclei of core and margin, and
keeps those whose centroid lies in its core. So a nucleus across a border is seen whole by each
window beside it, and kept by one, if it reaches no farther than `margin` px from its centroid. One
grid of tiles covers the whole image, so all windows see the same maps.

A place is a pair of slices: rows, columns.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from nucsam.data.slides import Windows, meet
from nucsam.errors import UserError
from nucsam.predict.tissue import Tissue, is_glass

SMALLEST = 256  # px: longest side of a tile where crops are smaller
SHARE = 16  # neighbours share a 16th of it
STRIP = 8  # windows abreast: in a narrow strip, few maps wait for the next row of windows

Place = tuple[slice, slice]
Area = Callable[[Place], np.ndarray]  # bool (h, w): which pixels of a place to predict
Key = tuple[int, int, int]  # a tile's row and column, and the first window that it is run for


class Window(NamedTuple):
    """A core, and `outer`, the core with its margin as far as the image goes."""

    core: Place
    outer: Place


def usual_tiles(crop: int, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
    """The longest side of a tile and what neighbours share, px.

    Scoring and prediction both take these, so that a run's scores are those of its predictions.

    Args:
        crop: side of a crop in training, px.
        tile, overlap: what the user asks for; None = the default.
    """
    tile = max(crop, SMALLEST) if tile is None else tile
    return tile, tile // SHARE if overlap is None else overlap


def usual_batch(trained: int, *, on_cpu: bool) -> int:
    """Tiles that go through the model together: as many as in training, on a CPU 1.

    As in `usual_tiles`, scoring takes as many: another number rounds otherwise.
    """
    return 1 if on_cpu else trained


def windows(size: tuple[int, int], core: int, margin: int) -> list[Window]:
    """The windows of an image, in strips of `STRIP` columns.

    Args:
        size: height and width of the image, px.
        core: longest side of a core, px.
        margin: px around a core.
    """
    axes = []
    for length in size:
        edges = np.linspace(0, length, -(-length // core) + 1).round().astype(int).tolist()
        cores = [slice(low, high) for low, high in pairwise(edges)]
        outer = [slice(max(0, c.start - margin), min(length, c.stop + margin)) for c in cores]
        axes.append(list(zip(cores, outer)))
    rows, columns = axes
    return [
        Window((y, x), (y_outer, x_outer))
        for first in range(0, len(columns), STRIP)
        for (y, y_outer), (x, x_outer) in product(rows, columns[first : first + STRIP])
    ]


def windows_in(places: Sequence[Window], area: Area, margin: int) -> list[Window]:
    """The windows whose core meets an area, each cut to the part that does.

    Args:
        places: of `windows`.
        area: where to predict.
        margin: px around a core.
    """
    inside = []
    for window in places:
        hits = [np.flatnonzero(area(window.core).any(axis)) for axis in (1, 0)]
        if not len(hits[0]):
            continue
        core, outer = [], []
        for place, around, hit in zip(*window, hits):
            low, high = place.start + int(hit[0]), place.start + int(hit[-1]) + 1
            core.append(slice(low, high))
            outer.append(slice(max(around.start, low - margin), min(around.stop, high + margin)))
        inside.append(Window(tuple(core), tuple(outer)))
    return inside


def side(size: int, scale: float) -> tuple[int, int]:
    """The side of a tile over at least `size` image px: in image px, and in model px.

    The encoder takes multiples of 32 model px, from 64.
    """
    model_px = 32 * max(2, math.ceil(round(size * scale / 32, 6)))
    return round(model_px / scale), model_px


def grid(size: int, tile: int, overlap: int, scale: float) -> tuple[list[int], int, int]:
    """Tiles that cover an axis of `size` px evenly.

    They are as few as possible, or one more where smaller tiles then have fewer px in all.

    Args:
        size: side of the image, px.
        tile: longest side of a tile, px; `side` rounds it up.
        overlap: least that neighbours share, px.
        scale: model px per image px.

    Returns:
        The start of each tile, image px, and `side` of a tile.
    """
    largest, model_px = side(min(size, tile), scale)
    if size <= largest:
        return [0], largest, model_px
    fewest = -(-(size - overlap) // (largest - overlap))
    sides = {}
    for count in (fewest, fewest + 1):
        needed = -(-(size + (count - 1) * overlap) // count)
        sides[count] = min((largest, model_px), side(needed, scale))
    count = min(sides, key=lambda count: count * sides[count][0])
    px, model_px = sides[count]
    return [round(k * (size - px) / (count - 1)) for k in range(count)], px, model_px


def ramps(starts: Sequence[int], side: int, overlap: int) -> list[np.ndarray]:
    """The weights of each tile of an axis, float32 (side,) in 0..1: they sum to 1 at every px.

    They rise from each end of a tile over `overlap` px and are never 0.
    """
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    ramp = np.minimum(distance / max(1, overlap), 1)
    total = np.zeros(starts[-1] + side)
    for start in starts:
        total[start : start + side] += ramp
    return [(ramp / total[start : start + side]).astype(np.float32) for start in starts]


@dataclass(eq=False)
class Tiles:
    """Gives one image's tiles, takes their dense maps, and stitches the maps of each window.

    The maps of a tile stay until the last window that needs them. Only `read` and `stitch` may run
    in other threads.

    Args:
        image: uint8 (H, W, 3), or a `data.slides.Windows`. Its pyramid is read at the level nearest
            to the scale.
        scale: model px per image px.
        tile: longest side of a tile, image px.
        overlap: what neighbours share, image px.
        windows: windows of this image, in the order in which they are asked for.
        tissue: tiles without tissue are not run, and their maps are 0; None = all tiles are run.
        area: where nuclei are kept; None = everywhere.
    """

    image: Any
    scale: float
    tile: InitVar[int]
    overlap: InitVar[int]
    windows: Sequence[Window]
    tissue: Tissue | None = None
    area: Area | None = None

    def __post_init__(self, tile: int, overlap: int) -> None:
        self.size = tuple(self.image.shape[:2])
        grids = [grid(length, tile, overlap, self.scale) for length in self.size]
        self.starts, self.sides, self.model_sides = zip(*grids)  # image px, image px, model px
        self.ramps = [
            ramps(starts, length, overlap) for starts, length in zip(self.starts, self.sides)
        ]
        self.failed: Exception | None = None  # why the image could not be read to its end
        self.asked: set[Key] = set()  # tiles given so far
        self.run = 0  # tiles whose maps have come
        self.level = self.image.level(self.scale) if isinstance(self.image, Windows) else 0
        self._keys = self._plan()
        self._last = {key: k for k, keys in enumerate(self._keys) for key in keys}
        self._maps: dict[Key, np.ndarray | None] = {}

    def ask(self, k: int) -> Iterator[Key]:
        """The key of each tile that window k needs and that is still to run."""
        for key in self._keys[k]:
            if key not in self.asked:
                self.asked.add(key)
                yield key

    def read(self, key: Key) -> np.ndarray | None:
        """The pixels uint8 (h, w, 3) of a tile; None where it is glass or cannot be read.

        A tile from a smaller level has the model's px. An image smaller than a tile is mirrored.
        Where the image cannot be read, `failed` is set.
        """
        corner = [starts[n] for starts, n in zip(self.starts, key)]
        ends = [min(y + side, end) for y, side, end in zip(corner, self.sides, self.size)]
        rows, columns = map(slice, corner, ends)
        if self.tissue and not self.tissue.meets((rows, columns)):
            return None
        try:
            if self.level:
                size = [round((place.stop - place.start) * self.scale) for place in (rows, columns)]
                tile = self.image.resampled(self.level, rows, columns, size)
            else:
                tile = self.image[rows, columns]
        except (UserError, OSError) as error:
            self.failed = error
            return None
        if self.tissue and is_glass(tile, self.tissue.limit):
            return None
        height, width = self.model_sides if self.level else self.sides
        missing = ((0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0))
        return np.pad(tile, missing, mode="symmetric")

    def add(self, key: Key, maps: np.ndarray | None) -> None:
        """Take the dense maps float (C, h, w) of a tile; None for one that is not run."""
        self.run += maps is not None
        self._maps[key] = maps

    def ready(self, k: int) -> bool:
        """Whether the maps of all tiles of window k are there."""
        return all(key in self._maps for key in self._keys[k])

    def take(self, k: int) -> list[tuple[Key, np.ndarray]]:
        """The tiles of window k that were run, with their maps. Drops what no window needs."""
        keys = self._keys[k]
        maps = [self._maps.pop(key) if self._last[key] == k else self._maps[key] for key in keys]
        return [pair for pair in zip(keys, maps) if pair[1] is not None]

    def stitch(self, k: int, parts: Sequence[tuple[Key, np.ndarray]]) -> np.ndarray:
        """Dense maps float32 (C, h, w) of window k's outer place, of what `take` gave."""
        outer = self.windows[k].outer
        total = np.zeros((len(parts[0][1]), *(p.stop - p.start for p in outer)), np.float32)
        for key, maps in parts:
            (y, y_in), (x, x_in) = (
                meet(starts[n], length, place)
                for starts, n, length, place in zip(self.starts, key, self.sides, outer)
            )
            down, across = (ramps[n][part] for ramps, n, part in zip(self.ramps, key, (y, x)))
            total[:, y_in, x_in] += maps[:, y, x] * (down[:, None] * across)
        return total

    def _plan(self) -> list[list[Key]]:
        """The keys of each window's tiles.

        Two strips run the tiles between them twice: the maps of a strip's whole side would
        otherwise wait for the next strip.
        """
        last: dict[tuple[int, int], tuple[int, int]] = {}  # tile -> last window, window it ran for
        plan = []
        for k, window in enumerate(self.windows):
            keys = []
            meeting = (
                range(bisect_right(starts, place.start - length), bisect_left(starts, place.stop))
                for starts, length, place in zip(self.starts, self.sides, window.outer)
            )
            for tile in product(*meeting):
                before, run = last.get(tile, (k, k))
                if k - before > STRIP + 1:
                    run = k
                last[tile] = k, run
                keys.append((*tile, run))
            plan.append(keys)
        return plan


def own_nuclei(label: np.ndarray, window: Window, area: Area | None = None) -> np.ndarray:
    """Remove the nuclei whose centroid lies outside a window's core, or outside an area.

    Centroids are rounded down to whole px, so that all windows that see a nucleus whole agree.

    Args:
        label: int32 (h, w) of the window's outer place, 0 = background, ids 1, 2, ...
        window: the window.
        area: where nuclei are kept; None = everywhere.

    Returns:
        The label map int32 (h, w) of the other nuclei, in the same order, ids 1, 2, ...
    """
    if window.core == window.outer and area is None:
        return label
    pixels = np.flatnonzero(label)
    ids = label.ravel()[pixels]
    sizes = np.bincount(ids, minlength=1)
    inside = sizes > 0
    centroids = []
    for values, core, outer in zip(np.divmod(pixels, label.shape[1]), *window):
        total = np.bincount(ids, values, len(sizes)).astype(np.int64)
        centroid = total // np.maximum(sizes, 1)
        inside &= (centroid >= core.start - outer.start) & (centroid < core.stop - outer.start)
        centroids.append(centroid)
    if area is not None:
        inside &= area(window.outer)[tuple(centroids)]
    return (np.cumsum(inside) * inside).astype(np.int32)[label]
