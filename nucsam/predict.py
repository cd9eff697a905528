"""Any image, any size -> label map: scaled, padded, cut into overlapping tiles, stitched as dense maps."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from nucsam.config import Instances
from nucsam.model import Nucsam


class Predictor:
    """Runs a model over whole images.

    Args:
        scale: model px per image px, as in training.
        tile, overlap: side of a tile and what neighbours share, image px; an image up to a tile is one tile.
        batch: tiles of one size that go through the model together.
        autocast: dtype of the forward pass on a GPU or CPU; None = the model's own.
    """

    def __init__(
        self,
        model: Nucsam,
        *,
        scale: float,
        instances: Instances,
        tile: int = 512,
        overlap: int = 64,
        batch: int = 4,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.scale, self.instances = model, scale, instances
        self.tile, self.overlap, self.batch = tile, overlap, batch
        self.device = next(model.parameters()).device
        self.autocast = autocast

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Image uint8 (H, W, 3) -> label map int32 (H, W), 0 = background."""
        return next(self.predict_many([image]))

    def predict_many(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Label maps of images, in order; instances are extracted while the next tiles are on the device."""
        with ThreadPoolExecutor(1) as pool:
            extracting: deque[Future] = deque()
            for maps in self.maps(images):
                extracting.append(pool.submit(self.model.instances, maps, self.instances))
                while len(extracting) > 2 or (extracting and extracting[0].done()):
                    yield extracting.popleft().result()
            while extracting:
                yield extracting.popleft().result()

    def maps(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Dense maps float32 (C, H, W) of images, in order."""
        canvases: deque[_Canvas] = deque()
        group: list[tuple[_Canvas, int, int, np.ndarray]] = []
        for image in images:
            sides = tuple(self._side(min(size, self.tile))[0] for size in image.shape[:2])
            canvas = _Canvas(image, sides, self.overlap)
            canvases.append(canvas)
            for y, x, tile in canvas.tiles():
                if group and (len(group) == self.batch or group[0][-1].shape != tile.shape):
                    self._run(group)
                    group = []
                group.append((canvas, y, x, tile))
            while canvases and canvases[0].left == 0:
                yield canvases.popleft().maps()
        if group:
            self._run(group)
        while canvases:
            yield canvases.popleft().maps()

    def _side(self, size: int) -> tuple[int, int]:
        """Image px, at least `size`, that make a side of whole 32 model px, at least 64, and those model px."""
        model = 32 * max(2, math.ceil(round(size * self.scale / 32, 6)))
        return round(model / self.scale), model

    def _run(self, group: list[tuple["_Canvas", int, int, np.ndarray]]) -> None:
        tiles = torch.from_numpy(np.stack([tile for *_, tile in group])).to(self.device)
        size = tuple(tiles.shape[1:3])
        images = tiles.permute(0, 3, 1, 2).float()
        side = tuple(self._side(s)[1] for s in size)
        if side != size:
            images = F.interpolate(images, size=side, mode="bilinear")
        with torch.no_grad(), self._autocast():
            maps = self.model(images, size).float().cpu().numpy()
        for (canvas, y, x, _), tile_maps in zip(group, maps):
            canvas.add(y, x, tile_maps)

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


class _Canvas:
    """One image's tiles out and dense maps in; tiles fade into each other over their overlap."""

    def __init__(self, image: np.ndarray, sides: tuple[int, ...], overlap: int) -> None:
        self.size, self.sides = image.shape[:2], sides
        pad = [(0, max(0, side - s)) for side, s in zip(self.sides, self.size)]
        self.image = np.pad(image, (*pad, (0, 0)), mode="symmetric")
        self.starts = [_starts(s, side, overlap) for s, side in zip(self.image.shape[:2], self.sides)]
        self.left = len(self.starts[0]) * len(self.starts[1])
        self.single = self.left == 1
        self.ramps = [_ramp(side, overlap) for side in self.sides]
        self.total: np.ndarray | None = None
        self.weight: np.ndarray | None = None

    def tiles(self) -> Iterator[tuple[int, int, np.ndarray]]:
        h, w = self.sides
        for y in self.starts[0]:
            for x in self.starts[1]:
                yield y, x, self.image[y : y + h, x : x + w]

    def add(self, y: int, x: int, maps: np.ndarray) -> None:
        self.left -= 1
        if self.single:
            self.total = maps
            return
        if self.total is None:
            self.total = np.zeros((len(maps), *self.image.shape[:2]), np.float32)
            self.weight = np.zeros(self.image.shape[:2], np.float32)
        fade = self.ramps[0][:, None] * self.ramps[1]
        at = np.s_[..., y : y + self.sides[0], x : x + self.sides[1]]
        self.total[at] += maps * fade
        self.weight[at] += fade

    def maps(self) -> np.ndarray:
        total = self.total if self.single else self.total / self.weight
        return total[:, : self.size[0], : self.size[1]]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Evenly spread starts of the fewest tiles that cover `size` and share at least `overlap`."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _ramp(side: int, overlap: int) -> np.ndarray:
    """Weights that rise from each end over `overlap` px and are never 0."""
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) + 1
    return np.minimum(distance / max(1, overlap), 1).astype(np.float32)
