"""Where a slide shows tissue: tiles of glass are not predicted.

The darkness of a pixel, 255 minus its lowest channel, rises with saturation and falls with
brightness. In the H&E images of four public sets every nucleus has a square of `BLOCK` px with a
mean darkness of 42 or more; glass has 7 to 20.

1. `find_tissue` takes an overview of the slide: the darkest pixel of each cell. Otsu's threshold of
   all pixels, from `FLOOR` to `PALE`, tells tissue from glass. Holes are filled, and a margin is
   added.
2. `is_glass` looks at all pixels of a tile that the mask calls tissue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from nucsam.data import geojson
from nucsam.data.slides import Windows

CELL = 64  # px: side of a cell of the mask
BLOCK = 4  # px: side of the squares of `is_glass`
DETAIL = 1 / 8  # px of the overview per px of the image, at least
FLOOR, PALE = 24, 32  # the lowest and the highest limit between glass and tissue
ANNOTATION = {"objectType": "annotation", "classification": {"name": "Tissue"}}  # of QuPath
BAND = 8  # rows of cells that are read at once


@dataclass(frozen=True)
class Tissue:
    """A mask of tissue.

    Args:
        cells: bool (ceil(H / CELL), ceil(W / CELL)).
        limit: highest darkness of glass.
    """

    cells: np.ndarray
    limit: int = PALE

    def features(self, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Yield a GeoJSON Feature of each piece of tissue, an annotation in QuPath.

        Args:
            size: height and width of the image, px.
        """
        from scipy import ndimage

        pieces, _ = ndimage.label(self.cells)
        ends = size[::-1]
        for geometry in geojson.geometries(pieces):
            polygons = geometry["coordinates"]
            polygons = [polygons] if geometry["type"] == "Polygon" else polygons
            scaled = [
                [np.minimum(np.multiply(ring, CELL), ends).tolist() for ring in rings]
                for rings in polygons
            ]
            geometry = {"type": "MultiPolygon", "coordinates": scaled}
            yield {"type": "Feature", "geometry": geometry, "properties": ANNOTATION}

    def meets(self, place: tuple[slice, slice]) -> bool:
        """Whether a place of the image has tissue."""
        rows, columns = (slice(p.start // CELL, -(-p.stop // CELL)) for p in place)
        return bool(self.cells[rows, columns].any())


def find_tissue(image: Any, *, whole: bool = False) -> Tissue:
    """The tissue of an image.

    Args:
        image: uint8 (H, W, 3), or what slices like it. Of a pyramid, the coarsest level with at
            least `DETAIL` of the resolution is read.
        whole: read an image without a pyramid too; else all of it counts as tissue.

    Raises:
        UserError: the image cannot be read.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu
    from skimage.measure import block_reduce

    H, W = image.shape[:2]
    level = image.level(DETAIL) if isinstance(image, Windows) else 0
    shape = -(-H // CELL), -(-W // CELL)
    if not (level or whole):
        return Tissue(np.ones(shape, bool))
    counts = np.zeros(256, np.int64)
    darkest = np.zeros(shape, np.uint8)
    # of the overview, a cell
    px = max(1, round(CELL * image.sizes[level][0] / H)) if level else CELL // BLOCK
    for top in range(0, H, BAND * CELL):
        rows, columns = slice(top, min(top + BAND * CELL, H)), slice(0, W)
        if level:
            size = [-(-(place.stop - place.start) * px // CELL) for place in (rows, columns)]
            dark = darkness(image.resampled(level, rows, columns, size))
        else:
            dark = darkness(shrunk(image[rows, columns]))
        counts += np.bincount(dark.ravel(), minlength=256)
        cells = block_reduce(dark, (px, px), np.max)
        darkest[top // CELL :][: len(cells)] = cells
    several = np.count_nonzero(counts) > 1
    otsu = threshold_otsu(hist=(counts, np.arange(256))) if several else FLOOR
    limit = int(np.clip(otsu, FLOOR, PALE))
    mask = ndimage.binary_fill_holes(darkest > limit)
    return Tissue(ndimage.binary_dilation(mask, np.ones((3, 3))), limit)


def darkness(pixels: np.ndarray) -> np.ndarray:
    """255 minus the lowest channel: uint8 (h, w, 3) -> (h, w)."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return 255 - np.minimum(np.minimum(red, green), blue)


def is_glass(pixels: np.ndarray, limit: int = PALE) -> bool:
    """Whether the mean of no square of `BLOCK` px is darker than glass.

    Args:
        pixels: uint8 (h, w, 3).
        limit: highest darkness of glass.
    """
    if darkness(pixels[:: 2 * BLOCK, :: 2 * BLOCK]).mean() > limit:
        return False
    return int(darkness(shrunk(pixels)).max()) <= limit


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """The means of squares of `BLOCK` px, uint8."""
    return np.asarray(Image.fromarray(pixels).reduce(BLOCK))
