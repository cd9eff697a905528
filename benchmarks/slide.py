"""A whole slide"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

TILE = 512  # px: side of a tile of the slide, and of a tissue image
GLASS = 236  # grey level of glass, with noise of 2


@dataclass
class Slide:
    """A synthetic slide in Aperio's form: a mosaic of tissue tiles in two ellipses, glass around.

    Args:
        side: px, a multiple of `TILE`.
        tissue: uint8 (N, TILE, TILE, 3), the tiles that the mosaic repeats.
        share: of the slide that is tissue.
    """

    side: int
    tissue: np.ndarray
    share: float = 0.2

    def __post_init__(self) -> None:
        n = self.side // TILE
        y, x = (np.mgrid[:n, :n] + 0.5) / n
        radius = np.sqrt(self.share / np.pi)  # of two ellipses, each half of the share
        self.kinds = np.full((n, n), -1)  # number of each tile's tissue image, -1 = glass
        for cy, cx, turn in ((0.32, 0.34, 2.0), (0.68, 0.66, 0.5)):
            inside = ((y - cy) ** 2 * turn + (x - cx) ** 2 / turn) < radius**2 / 2
            places = np.indices(self.kinds.shape).sum(0) + 2 * (
                np.indices(self.kinds.shape)[0] // 2
            )
            self.kinds[inside] = places[inside] % len(self.tissue)
        noise = np.random.default_rng(0).normal(GLASS, 2, (TILE, TILE, 3))
        self.glass = noise.round().clip(0, 255).astype(np.uint8)

    def tiles(self, shrink: int) -> Iterator[bytes]:
        """The JPEG of each tile of a level, row by row."""

        @cache
        def encode(block: bytes, shape: tuple[int, int]) -> bytes:
            kinds = np.frombuffer(block, self.kinds.dtype).reshape(shape)
            pixels = np.tile(self.glass, (shrink, shrink, 1))
            for row, column in product(*map(range, shape)):
                if kinds[row, column] >= 0:
                    place = np.s_[TILE * row :, TILE * column :]
                    pixels[place][:TILE, :TILE] = self.tissue[kinds[row, column]]
            if shrink > 1:
                pixels = np.asarray(Image.fromarray(pixels).reduce(shrink))
            return imagecodecs.jpeg8_encode(
                pixels, level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
            )

        for row, column in product(range(0, len(self.kinds), shrink), repeat=2):
            kinds = self.kinds[row : row + shrink, column : column + shrink]
            yield encode(np.ascontiguousarray(kinds).tobytes(), kinds.shape)

    def write(self, path: Path, levels: tuple[int, ...] = (1, 4, 16)) -> None:
        about = f"Aperio Image Library v11\n{self.side}x{self.side}|AppMag = 40|MPP = 0.25"
        options = {"photometric": "ycbcr", "subsampling": (2, 2), "metadata": None}
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            for number, shrink in enumerate(levels):
                shape = (*[-(-self.side // shrink)] * 2, 3)
                form = {"shape": shape, "dtype": np.uint8, "tile": (TILE, TILE)}
                text = about if shrink == 1 else "Aperio Image Library"
                file.write(
                    self.tiles(shrink), **form, **options, compression="jpeg", description=text
                )
                if number == 0 and len(levels) > 1:  # Aperio's second page
                    thumbnail = np.full((64, 64, 3), GLASS, np.uint8)
                    file.write(thumbnail, photometric="rgb", metadata=None, description=text)
