"""The files of one image's nuclei, written window by window: label TIFF, GeoJSON, CSV, overlay."""

import csv
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from skimage.segmentation import find_boundaries

from nucsam import draw, geojson
from nucsam.atomic import atomic
from nucsam.measure import measure
from nucsam.tiles import Window, meet

FILES = {"labels": "{}.tif", "geojson": "{}.geojson", "csv": "{}.csv", "overlay": "overlays/{}.png"}
BLOCK = 512  # px: side of a tile of a label TIFF
STRIPS = 2048  # px: a label map up to this is written in strips, without tiles
OVERLAY = 4096  # px: longest side of an overlay


def files(folder: Path, stem: str, formats: Iterable[str]) -> dict[str, Path]:
    """Format -> file of an image in a folder."""
    return {name: folder / FILES[name].format(stem) for name in formats}


def write(
    files: Mapping[str, Path], image: Any, found: Iterable[tuple[Window, np.ndarray]], mpp: float | None = None
) -> int:
    """Write the files of one image, all or none, and return how many nuclei there are.

    image: uint8 (H, W, 3), or what is sliced like it. found: windows that part the image, and label maps of their outer
    places, ids 1, 2, ...; ids go on from window to window, and where two nuclei claim a pixel the first has it.
    mpp: microns per px, for the units.
    """
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(files.values()))
    with ExitStack() as stack:
        partial = {name: stack.enter_context(atomic(file)) for name, file in files.items()}
        labels = stack.enter_context(LabelBlocks(image.shape[:2], first.parent))
        overlay = Overlay(image) if "overlay" in files else None
        table = stack.enter_context(partial["csv"].open("w", newline="", encoding="utf-8")) if "csv" in files else None

        def features() -> Iterator[dict[str, Any]]:
            for window, label in found:
                before, label = labels.count, labels.add(window, label)
                if overlay:
                    overlay.add(window, label)
                if not {"csv", "geojson"} & files.keys():
                    continue
                columns = _columns(window, label, image, before, mpp)
                if table:
                    write_rows(table, columns)
                if "geojson" in files:
                    rows, columns_outer = window.outer
                    yield from geojson.features(label, offset=(columns_outer.start, rows.start), measurements=columns)

        if "geojson" in files:
            geojson.write(partial["geojson"], features())
        else:
            assert not list(features())
        if table:
            table.close()
        if "labels" in files:
            labels.write(partial["labels"], mpp)
        if overlay:
            draw.write_png(partial["overlay"], overlay.picture())
    return labels.count


def write_rows(table: Any, columns: Mapping[str, np.ndarray]) -> None:
    """Add rows of columns to a CSV file, after their names where it is empty."""
    writer = csv.writer(table)
    if not table.tell():
        writer.writerow(columns)
    rows = zip(*(column.tolist() for column in columns.values()))
    writer.writerows([f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in rows)


def _columns(window: Window, label: np.ndarray, image: Any, before: int, mpp: float | None) -> dict[str, np.ndarray]:
    """`measure` of a window's nuclei, in the frame and with the ids of the whole image."""
    columns = measure(label, image[window.outer], mpp)
    columns["id"] = columns["id"] + before
    for axis, place in zip("yx", window.outer):
        columns[f"centroid_{axis}"] = columns[f"centroid_{axis}"] + place.start
        if mpp:
            columns[f"centroid_{axis}_um"] = columns[f"centroid_{axis}"] * mpp
    return columns


class LabelBlocks:
    """A label map of any size as deflated blocks in a temporary file without a name: memory is that of a block."""

    def __init__(self, size: tuple[int, int], folder: Path) -> None:
        self.size, self.count = size, 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._where: dict[tuple[int, int], tuple[int, int]] = {}  # offset and length

    def __enter__(self) -> "LabelBlocks":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def block(self, row: int, column: int) -> np.ndarray:
        """int32 (BLOCK, BLOCK), 0 beyond the image."""
        if (row, column) not in self._where:
            return np.zeros((BLOCK, BLOCK), np.int32)
        offset, length = self._where[row, column]
        self._file.seek(offset)
        return np.frombuffer(zlib.decompress(self._file.read(length)), np.int32).reshape(BLOCK, BLOCK).copy()

    def add(self, window: Window, label: np.ndarray) -> np.ndarray:
        """Add a window's nuclei, ids 1.. in `label`, as `count` + 1.., and return `label` as it was added.

        Pixels of nuclei added before stay theirs; a nucleus that has no other is left out, and ids close up.
        """
        label, parts = label.copy(), []
        for at in product(*(range(place.start // BLOCK, -(-place.stop // BLOCK)) for place in window.outer)):
            (y, y_in), (x, x_in) = (meet(BLOCK * k, BLOCK, place) for k, place in zip(at, window.outer))
            part = label[y_in, x_in]
            if part.any():
                block = self.block(*at)
                part[block[y, x] > 0] = 0
                parts.append((at, block, block[y, x], part))
        kept = np.bincount(label.ravel()) > 0
        kept[0] = False
        ids = (np.cumsum(kept) * kept).astype(np.int32)
        for at, block, place, part in parts:
            np.copyto(place, ids[part] + self.count, where=part > 0)
            data = zlib.compress(block, 1)
            self._where[at] = self._file.seek(0, 2), len(data)
            self._file.write(data)
        self.count += int(kept.sum())
        return ids[label]

    def write(self, path: Path, mpp: float | None) -> None:
        """Deflated TIFF, uint16, or uint32 where an id is over 65535; over STRIPS px a side a tiled BigTIFF."""
        dtype = np.dtype(np.uint16 if self.count <= 65535 else np.uint32)
        count = [-(-size // BLOCK) for size in self.size]
        blocks = (self.block(*at).astype(dtype) for at in product(*map(range, count)))
        known = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
        known |= {"compression": "zlib", "photometric": "minisblack"}
        if max(self.size) > STRIPS:
            known |= {"shape": self.size, "dtype": dtype, "tile": (BLOCK, BLOCK), "bigtiff": True, "buffersize": 2**24}
            tifffile.imwrite(path, blocks, **known)
        else:
            rows = [np.hstack([next(blocks) for _ in range(count[1])]) for _ in range(count[0])]
            tifffile.imwrite(path, np.vstack(rows)[: self.size[0], : self.size[1]], **known)


class Overlay:
    """An image with the contours of its nuclei, made smaller by a whole factor where it is over OVERLAY px a side."""

    def __init__(self, image: Any) -> None:
        self.image, self.factor = image, -(-max(image.shape[:2]) // OVERLAY)
        size = [-(-s // self.factor) for s in image.shape[:2]]
        self._picture, self._edges = np.zeros((*size, 3), np.uint8), np.zeros(size, bool)

    def add(self, window: Window, label: np.ndarray) -> None:
        """Draw the image of a window's core, and its nuclei wherever they reach."""
        f = self.factor
        rows, columns = (slice(-(-place.start // f), -(-place.stop // f)) for place in window.core)
        pixels = self.image[rows.start * f : rows.stop * f, columns.start * f : columns.stop * f]
        missing = ((0, -pixels.shape[0] % f), (0, -pixels.shape[1] % f), (0, 0))
        pixels = np.pad(pixels, missing, mode="edge") if f > 1 else pixels
        blocks = pixels.reshape(pixels.shape[0] // f, f, pixels.shape[1] // f, f, 3)
        self._picture[rows, columns] = blocks.mean((1, 3)).round() if f > 1 else pixels
        top, left = (-(-place.start // f) for place in window.outer)
        small = label[top * f - window.outer[0].start :: f, left * f - window.outer[1].start :: f]
        edges = find_boundaries(small, mode="inner")
        self._edges[top : top + edges.shape[0], left : left + edges.shape[1]] |= edges

    def picture(self) -> np.ndarray:
        """uint8 (h, w, 3)."""
        self._picture[self._edges] = draw.PREDICTION
        return self._picture
