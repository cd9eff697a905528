"""Instances as pictures: contours over images, panels, contact sheets."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nucsam.atomic import atomic

TRUTH, PREDICTION = (0, 200, 80), (255, 210, 0)  # RGB
GAP, CAPTION = 6, 16  # px between tiles and of a caption's line
MIN_PANEL = 384  # px: smaller images are drawn enlarged


def contours(image: np.ndarray, label: np.ndarray, colour: Sequence[int] = TRUTH, thickness: int = 1) -> np.ndarray:
    """A copy of the image, uint8 (H, W, 3), with the boundary of every instance of label (H, W) in RGB
    `colour`.

    Lines are `thickness` px wide on the instance's own side, so that two that touch keep a line each.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    # Where all of a (2t + 1)-wide window has one id a pixel is inside; outside of the image counts as its edge pixels
    size = 2 * thickness + 1
    edge = (label > 0) & (minimum_filter(label, size) != maximum_filter(label, size))
    drawn = image.copy()
    drawn[edge] = colour
    return drawn


def _caption(tile: np.ndarray, text: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    height, width = tile.shape[:2]
    canvas = Image.new("RGB", (width, height + CAPTION), "white")
    canvas.paste(Image.fromarray(tile), (0, CAPTION))
    pen = ImageDraw.Draw(canvas)
    while len(text) > 1 and pen.textlength(text) > width - 4:
        text = text[:-2] + "…"
    pen.text((2, 2), text, fill="black")
    return np.asarray(canvas)


def _grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top, left = row * (height + GAP), column * (width + GAP)
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def overlay(image: np.ndarray, truth: np.ndarray | None, pred: np.ndarray) -> np.ndarray:
    """A panel uint8: image | contours of truth | contours of pred, each with a caption and its number of
    nuclei.

    image uint8 (H, W, 3); truth and pred integer (H, W); without truth (None) the panel has two parts. An
    image under MIN_PANEL px is enlarged by a whole factor, pixels staying square.
    """
    factor = math.ceil(MIN_PANEL / max(image.shape[:2]))
    image = image.repeat(factor, 0).repeat(factor, 1)
    tiles = [_caption(image, f"image {image.shape[1] // factor}x{image.shape[0] // factor}")]
    for name, label, colour in (("truth", truth, TRUTH), ("prediction", pred, PREDICTION)):
        if label is not None:
            count = len(np.unique(label[label > 0]))
            drawn = contours(image, label.repeat(factor, 0).repeat(factor, 1), colour)
            tiles.append(_caption(drawn, f"{name}: {count} nuclei"))
    return _grid(tiles, len(tiles))


def contact_sheet(
    tiles: Iterable[tuple[str, np.ndarray]], path: str | Path, *, columns: int = 6, width: int = 256
) -> None:
    """Writes (caption, image uint8 (H, W, 3)) pairs as one PNG, each scaled to at most `width` px a side.
    Atomic."""
    from PIL import Image

    small = []
    for text, tile in tiles:
        picture = Image.fromarray(tile)
        picture.thumbnail((width, width))
        small.append(_caption(np.asarray(picture), text))
    write_png(path, _grid(small, min(columns, len(small))))


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Writes uint8 (H, W) or (H, W, 3) as a PNG. Atomic: the name holds the old file or the whole new one."""
    from PIL import Image

    with atomic(Path(path)) as partial:
        Image.fromarray(array).save(partial, format="PNG")
