"""The grid of model tiles over one image, and the windows in which its nuclei are extracted.

One grid covers the whole image, so that dense maps do not depend on the windows. A window is a core with a margin; a
nucleus belongs to the window whose core holds its centroid, and is seen there with all around it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

STRIP = 8  # windows abreast: down a strip of them, few maps wait for the next row of windows

Place = tuple[slice, slice]  # rows, columns
Key = tuple[int, int, int]  # row and column of a tile, and the first window that it is run for


class Window(NamedTuple):
    """Places in the image: `core`s part it, `outer` is the core and a margin, as far as the image goes."""

    core: Place
    outer: Place


def windows(size: tuple[int, int], core: int, margin: int) -> list[Window]:
    """Windows of an image of `size` (H, W), their cores at most `core` px a side; in strips of `STRIP` columns."""
    edges = [np.linspace(0, s, -(-s // core) + 1).round().astype(int).tolist() for s in size]
    rows, columns = (
        [(slice(a, b), slice(max(0, a - margin), min(s, b + margin))) for a, b in pairwise(e)]
        for e, s in zip(edges, size)
    )
    return [
        Window((y, x), (y_outer, x_outer))
        for first in range(0, len(columns), STRIP)
        for (y, y_outer), (x, x_outer) in product(rows, columns[first : first + STRIP])
    ]


def side(size: int, scale: float) -> tuple[int, int]:
    """Image px, at least `size`, that make a side of whole 32 model px, at least 64, and those model px."""
    model = 32 * max(2, math.ceil(round(size * scale / 32, 6)))
    return round(model / scale), model


def grid(size: int, tile: int, overlap: int, scale: float) -> tuple[list[int], int, int]:
    """Tiles up to `tile` that cover `size` evenly and share at least `overlap`: their starts, and `side` of one.

    The fewest that do, or one more where those, as small as so many can be, have fewer px in all.
    """
    largest, model = side(min(size, tile), scale)
    if size <= largest:
        return [0], largest, model
    fewest = -(-(size - overlap) // (largest - overlap))
    sides = {n: min((largest, model), side(-(-(size + (n - 1) * overlap) // n), scale)) for n in (fewest, fewest + 1)}
    count, (px, model) = min(sides.items(), key=lambda s: s[0] * s[1][0])
    return [round(i * (size - px) / (count - 1)) for i in range(count)], px, model


def ramp(side: int, overlap: int) -> np.ndarray:
    """Weights that rise from each end over `overlap` px and are never 0."""
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    return np.minimum(distance / max(1, overlap), 1).astype(np.float32)


def meet(start: int, length: int, place: slice) -> tuple[slice, slice]:
    """Where `length` px from `start` and a place meet, counted from the start of each."""
    low, high = max(start, place.start), min(start + length, place.stop)
    return slice(low - start, high - start), slice(low - place.start, high - place.start)


class Tiles:
    """One image's tiles out and dense maps in; the maps of a tile stay until the last window that needs them.

    Args:
        image: uint8 (H, W, 3), or what is sliced like it, such as `images.TiffWindows`.
        scale: model px per image px.
        tile, overlap: side of a tile and what neighbours share, image px; tiles fade into each other over it.
        windows: the windows, of this image, that will be asked for, in this order.
    """

    def __init__(self, image: Any, *, scale: float, tile: int, overlap: int, windows: Sequence[Window]) -> None:
        self.image, self.scale, self.windows = image, scale, windows
        self.size = tuple(image.shape[:2])
        found = (grid(s, tile, overlap, scale) for s in self.size)
        self.starts, self.sides, self.model_sides = zip(*found)  # image px, image px, model px
        self.ramps = [ramp(side, overlap) for side in self.sides]
        self.failed: Exception | None = None  # why the image could not be read to its end
        self._keys = self._plan()
        self._uses = Counter(key for keys in self._keys for key in keys)
        self._maps: dict[Key, np.ndarray] = {}
        self._asked: set[Key] = set()

    def ask(self, k: int) -> Iterator[tuple[Key, np.ndarray]]:
        """Key and pixels of each tile that window k needs, and that was not asked for by one shortly before.

        Ends early where the image cannot be read, and sets `failed`.
        """
        for key in self._keys[k]:
            if key in self._asked:
                continue
            self._asked.add(key)
            at = key[:2]
            y, x = (start[n] for start, n in zip(self.starts, at))
            h, w = self.sides
            try:
                tile = self.image[y : y + h, x : x + w]
            except (ValueError, OSError) as error:
                self.failed = error
                return
            missing = ((0, h - tile.shape[0]), (0, w - tile.shape[1]), (0, 0))  # of an image under a tile
            yield key, np.pad(tile, missing, mode="symmetric")

    def add(self, key: Key, maps: np.ndarray) -> None:
        """Take the dense maps float32 (C, h, w) of a tile."""
        self._maps[key] = maps

    def ready(self, k: int) -> bool:
        """Whether the maps of all tiles of window k are there."""
        return all(key in self._maps for key in self._keys[k])

    def maps(self, k: int) -> np.ndarray:
        """Dense maps (C, h, w) of window k's outer place; tiles that no window soon needs are forgotten."""
        window, keys = self.windows[k], self._keys[k]
        rows, columns = window.outer
        single = len(self.starts[0]) == len(self.starts[1]) == 1
        total, weight = 0.0, np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        if not single:
            total = np.zeros((len(self._maps[keys[0]]), *weight.shape), np.float32)
        for key in keys:
            maps = self._maps[key]
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._maps[key]
            (y, y_in), (x, x_in) = (
                meet(start[n], length, place)
                for start, n, length, place in zip(self.starts, key[:2], self.sides, window.outer)
            )
            if single:
                return maps[:, y, x]
            fade = self.ramps[0][y, None] * self.ramps[1][x]
            total[:, y_in, x_in] += maps[:, y, x] * fade
            weight[y_in, x_in] += fade
        return total / weight

    def _plan(self) -> list[list[Key]]:
        """The keys of each window's tiles. Between strips a tile is run anew: else those at their sides would wait."""
        last: dict[tuple[int, int], tuple[int, int]] = {}  # of a tile, the last window that needs it, and its run
        plan = []
        for k, window in enumerate(self.windows):
            keys = []
            for at in self._under(window):
                before, run = last.get(at, (k, k))
                run = run if k - before <= STRIP + 1 else k
                last[at] = k, run
                keys.append((*at, run))
            plan.append(keys)
        return plan

    def _under(self, window: Window) -> list[tuple[int, int]]:
        """The tiles that a window's outer place meets."""
        rows, columns = (
            [k for k, y in enumerate(start) if y < place.stop and y + length > place.start]
            for start, length, place in zip(self.starts, self.sides, window.outer)
        )
        return list(product(rows, columns))


def own(label: np.ndarray, window: Window) -> np.ndarray:
    """A label map (h, w) of a window's outer place without the nuclei whose centroid lies outside of its core.

    Ids stay in order and become 1, 2, ... Centroids are cut to whole px, the same in each window that sees all of one.
    """
    if window.core == window.outer:
        return label
    flat = label.ravel()
    pixels = np.flatnonzero(flat)
    area = np.bincount(flat[pixels], minlength=1)
    kept = area > 0
    for values, core, outer in zip(np.divmod(pixels, label.shape[1]), window.core, window.outer):
        total = np.bincount(flat[pixels], values, len(area)).astype(np.int64)
        centre = total // np.maximum(area, 1) + outer.start
        kept &= (centre >= core.start) & (centre < core.stop)
    return (np.cumsum(kept) * kept).astype(np.int32)[label]
