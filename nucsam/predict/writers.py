"""The files of one image's nuclei, written window by window: label TIFF, GeoJSON, CSV, overlay."""

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TextIO

import imagecodecs
import numpy as np
import tifffile
from skimage.measure import block_reduce
from skimage.segmentation import find_boundaries

from nucsam.data import draw, geojson
from nucsam.files import atomic
from nucsam.predict.measure import measure
from nucsam.predict.tiles import Window, meet

FILES = {"labels": "{}.tif", "geojson": "{}.geojson", "csv": "{}.csv", "overlay": "overlays/{}.png"}
USUAL = ("labels", "geojson", "overlay")  # formats where none are named
RECENT = 64  # blocks of labels that stay in memory as they are, 1 MiB each
BLOCK = 512  # px: side of a block of labels, and of a tile of a label TIFF
STRIPS = 2048  # px: a label map up to this side is a TIFF of strips, without tiles
OVERLAY = 4096  # px: longest side of an overlay


def output_files(folder: Path, stem: str, formats: Iterable[str]) -> dict[str, Path]:
    """The file of each format, of an image in a folder."""
    return {name: folder / FILES[name].format(stem) for name in formats}


def write_files(
    files: Mapping[str, Path],
    image: Any,
    windows: Iterable[tuple[Window, np.ndarray]],
    mpp: float | None = None,
) -> int:
    """Write the files of one image, all or none.

    Ids continue from window to window. Where two nuclei claim a pixel, the first has it.

    Args:
        files: the file of each format, keys of `FILES`.
        image: uint8 (H, W, 3), or what slices like it.
        windows: every window of the image, each with the label map int32 (h, w) of its outer place,
            ids 1, 2, ...
        mpp: microns per px; None = not known.

    Returns:
        The number of nuclei.
    """
    folder = next(iter(files.values())).parent
    with ExitStack() as stack:
        partial = {name: stack.enter_context(atomic(file)) for name, file in files.items()}
        labels = LabelBlocks(image.shape[:2], stack.enter_context(TemporaryFile(dir=folder)))
        table = None
        if "csv" in files:
            table = partial["csv"].open("w", newline="", encoding="utf-8")
            stack.enter_context(table)

        def features() -> Iterator[dict[str, Any]]:
            """The GeoJSON Features of each window, which this adds to the other files."""
            for window, label in windows:
                before = labels.count
                label = labels.add(window, label)
                corner = window.outer[0].start, window.outer[1].start
                columns = {}
                if table or "geojson" in files:
                    columns = measure(label, image[window.outer], mpp, corner)
                    columns["id"] += before
                if table:
                    write_rows(table, columns)
                if "geojson" in files:
                    yield from geojson.features(label, offset=corner[::-1], measurements=columns)

        if "geojson" in files:
            geojson.write_geojson(partial["geojson"], features())
        else:
            deque(features(), maxlen=0)
        if "labels" in files:
            labels.write(partial["labels"], mpp)
        if "overlay" in files:
            draw.write_png(partial["overlay"], draw_overlay(image, labels))
    return labels.count


def write_rows(table: TextIO, columns: Mapping[str, np.ndarray]) -> None:
    """Append rows to a CSV file, after the names of the columns where it is empty."""
    writer = csv.writer(table)
    if not table.tell():
        writer.writerow(columns)
    for row in zip(*(column.tolist() for column in columns.values())):
        writer.writerow(f"{value:.9g}" if isinstance(value, float) else value for value in row)


class LabelBlocks:
    """A label map of any size in a file, as compressed blocks: memory is that of `RECENT` blocks.

    Args:
        size: height and width, px.
        file: an empty file, open for reading and writing.
    """

    def __init__(self, size: tuple[int, int], file: IO[bytes]) -> None:
        self.size = size
        self.grid = tuple(-(-length // BLOCK) for length in size)  # rows and columns of blocks
        self.count = 0  # nuclei so far
        self._file = file
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}  # block -> offset, length
        self._recent: dict[tuple[int, ...], np.ndarray] = {}  # blocks, the last changed one last

    def block(self, at: tuple[int, ...]) -> np.ndarray:
        """int32 (BLOCK, BLOCK) at a row and column of blocks, 0 beyond the image."""
        if at in self._recent:
            return self._recent[at]
        if at not in self._places:
            return np.zeros((BLOCK, BLOCK), np.int32)
        offset, length = self._places[at]
        self._file.seek(offset)
        data = bytearray(imagecodecs.zstd_decode(self._file.read(length)))
        return np.frombuffer(data, np.int32).reshape(BLOCK, BLOCK)

    def _keep(self, at: tuple[int, ...], block: np.ndarray) -> None:
        """Keep a changed block; the one that has not changed for longest goes into the file."""
        self._recent.pop(at, None)
        self._recent[at] = block
        if len(self._recent) > RECENT:
            at = next(iter(self._recent))
            data = imagecodecs.zstd_encode(self._recent.pop(at), 1)
            self._places[at] = self._file.seek(0, 2), len(data)
            self._file.write(data)

    def add(self, window: Window, label: np.ndarray) -> np.ndarray:
        """Add a window's nuclei.

        A pixel stays with the nucleus that had it first. A nucleus without a pixel of its own is
        left out.

        Args:
            window: the window.
            label: int32 (h, w) of its outer place, ids 1, 2, ...; they go on from `count` here.

        Returns:
            The label map int32 (h, w) of what was added, ids 1, 2, ...
        """
        label = label.copy()
        pieces = []
        hidden = False
        for at in product(*(range(p.start // BLOCK, -(-p.stop // BLOCK)) for p in window.outer)):
            (y, y_in), (x, x_in) = (
                meet(BLOCK * k, BLOCK, place) for k, place in zip(at, window.outer)
            )
            piece = label[y_in, x_in]
            if piece.any():
                block = self.block(at)
                taken = (block[y, x] > 0) & (piece > 0)
                if taken.any():
                    piece[taken] = 0
                    hidden = True
                pieces.append((at, block, block[y, x], piece))
        ids = np.arange(label.max(initial=0) + 1, dtype=np.int32)
        if hidden:
            visible = np.bincount(label.ravel(), minlength=len(ids)) > 0
            visible[0] = False
            ids = (np.cumsum(visible) * visible).astype(np.int32)
        numbers = np.where(ids > 0, ids + self.count, 0).astype(np.int32)
        for at, block, place, piece in pieces:
            np.maximum(place, numbers[piece], out=place)
            self._keep(at, block)
        self.count += int(ids.max())
        return ids[label] if hidden else label

    def write(self, path: Path, mpp: float | None) -> None:
        """Write a deflated TIFF: uint16, or uint32 where an id is over 65535.

        Over `STRIPS` px a side it is a tiled BigTIFF.
        """
        dtype = np.dtype(np.uint16 if self.count <= 65535 else np.uint32)
        places = list(product(*map(range, self.grid)))
        tags: dict[str, Any] = {"compression": "zlib", "photometric": "minisblack"}
        if mpp:
            tags |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        if max(self.size) > STRIPS:
            empty = imagecodecs.deflate_encode(np.zeros((BLOCK, BLOCK), dtype))
            blocks = (
                imagecodecs.deflate_encode(self.block(at).astype(dtype))
                if at in self._places or at in self._recent
                else empty
                for at in places
            )
            tags |= {"shape": self.size, "dtype": dtype, "tile": (BLOCK, BLOCK), "bigtiff": True}
            tifffile.imwrite(path, blocks, buffersize=2**24, **tags)
        else:
            whole = np.zeros([BLOCK * length for length in self.grid], dtype)
            for y, x in places:
                whole[BLOCK * y :, BLOCK * x :][:BLOCK, :BLOCK] = self.block((y, x))
            tifffile.imwrite(path, whole[: self.size[0], : self.size[1]], **tags)


def draw_overlay(image: Any, labels: LabelBlocks) -> np.ndarray:
    """Draw the contours of all nuclei over their image.

    An image over `OVERLAY` px a side is shrunk by a whole factor. A pixel is then the mean of a
    square. At the image's end its edge repeats.

    Args:
        image: uint8 (H, W, 3), or what slices like it.
        labels: of the image.

    Returns:
        uint8 (h, w, 3).
    """
    f = -(-max(labels.size) // OVERLAY)
    size = [-(-length // f) for length in labels.size]
    picture = np.zeros((*size, 3), np.uint8)
    small = np.zeros(size, np.int32)
    for at in product(*map(range, labels.grid)):
        rows, columns = (
            slice(-(-BLOCK * k // f), min(-(-BLOCK * (k + 1) // f), end))
            for k, end in zip(at, size)
        )
        pixels = image[rows.start * f : rows.stop * f, columns.start * f : columns.stop * f]
        missing = ((0, -pixels.shape[0] % f), (0, -pixels.shape[1] % f), (0, 0))
        pixels = np.pad(pixels, missing, mode="edge")
        picture[rows, columns] = block_reduce(pixels, (f, f, 1), np.mean).round()
        first = rows.start * f - BLOCK * at[0], columns.start * f - BLOCK * at[1]
        ids = labels.block(at)[first[0] :: f, first[1] :: f]
        small[rows, columns] = ids[: rows.stop - rows.start, : columns.stop - columns.start]
    picture[find_boundaries(small, mode="inner")] = draw.PREDICTION
    return picture
