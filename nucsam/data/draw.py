"""Nuclei as pictures: outlines over images, panels, contact sheets."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nucsam.files import atomic

TRUTH, PREDICTION = (0, 200, 80), (255, 210, 0)  # RGB
GAP = 6  # px between tiles
CAPTION = 16  # px: least height of a caption's line
CAPTION_SHARE = 15  # a line has 1 / 15 of its tile's width: 8 pt where a panel fills a page
MIN_PANEL = 384  # px: smaller images are drawn enlarged
COLUMNS = 6  # tiles in a row of a contact sheet
TILE = 256  # px: longest side of a tile of a contact sheet


def contours(image: np.ndarray, label: np.ndarray, colour: Sequence[int] = TRUTH) -> np.ndarray:
    """Outline every nucleus inside its own edge, so that two that touch each keep a line.

    Args:
        image: uint8 (H, W, 3).
        label: integer (H, W), 0 = background.
        colour: RGB, 0..255.

    Returns:
        A copy of the image with lines 1 px wide.
    """
    from skimage.segmentation import find_boundaries

    outlined = image.copy()
    outlined[find_boundaries(label, connectivity=2, mode="inner")] = colour
    return outlined


def overlay(image: np.ndarray, truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Draw image, ground truth and prediction side by side, with captions and numbers of nuclei.

    An image under MIN_PANEL px is enlarged by a whole factor, which keeps its pixels square.

    Args:
        image: uint8 (H, W, 3).
        truth: integer (H, W), 0 = background.
        pred: integer (H, W), 0 = background.

    Returns:
        The panel, uint8.
    """
    height, width = image.shape[:2]
    factor = math.ceil(MIN_PANEL / max(height, width))
    large = _enlarged(image, factor)
    tiles = [_captioned(large, f"image {width}x{height}")]
    for name, label, colour in (("truth", truth, TRUTH), ("prediction", pred, PREDICTION)):
        nuclei = len(np.unique(label[label > 0]))
        outlined = contours(large, _enlarged(label, factor), colour)
        tiles.append(_captioned(outlined, f"{name}: {nuclei} nuclei"))
    return _grid(tiles, len(tiles))


def contact_sheet(tiles: Iterable[tuple[str, np.ndarray]], path: str | Path) -> None:
    """Write captioned images as one PNG, each shrunk to at most TILE px a side.

    Args:
        tiles: pairs of caption and image uint8 (H, W, 3).
        path: the PNG file.
    """
    small = []
    for text, tile in tiles:
        picture = Image.fromarray(tile)
        picture.thumbnail((TILE, TILE))
        small.append(_captioned(np.asarray(picture), text))
    write_png(path, _grid(small, min(COLUMNS, len(small))))


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as a PNG, or leave the old file."""
    with atomic(Path(path)) as partial:
        Image.fromarray(array).save(partial, format="PNG")


def _enlarged(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _captioned(tile: np.ndarray, text: str) -> np.ndarray:
    """The tile under a line of text, which ends in … where it is wider than the tile."""
    height, width = tile.shape[:2]
    line = max(CAPTION, width // CAPTION_SHARE)
    canvas = Image.new("RGB", (width, height + line), "white")
    canvas.paste(Image.fromarray(tile), (0, line))
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(0.75 * line)
    text = " ".join(text.split())  # a file name may hold a line end
    while len(text) > 1 and pen.textlength(text) > width - 4:
        text = text[:-2] + "…"
    pen.text((2, 0), text, fill="black")
    return np.asarray(canvas)


def _grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles in rows on white, in cells of the largest tile's size."""
    height, width = np.max([tile.shape[:2] for tile in tiles], axis=0) + GAP
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        cell = sheet[row * height :, column * width :]
        cell[: tile.shape[0], : tile.shape[1]] = tile
    return sheet[:-GAP, :-GAP]
