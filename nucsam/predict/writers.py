"""The files of one image's nuclei, written window by window: labels, tables, overlay."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from skimage.segmentation import find_boundaries

from nucsam.data import draw, geojson
from nucsam.data.folders import OVERLAYS
from nucsam.data.slides import segments_under
from nucsam.errors import UserError
from nucsam.files import atomic
from nucsam.model.instances import Nuclei
from nucsam.predict.measure import measure
from nucsam.predict.threads import in_threads
from nucsam.predict.tiles import Window

FILES = {  # format -> file, by the stem of the image
    "labels": "{}.tif",
    "geojson": "{}.geojson",
    "geojson.gz": "{}.geojson.gz",
    "csv": "{}.csv",
    "parquet": "{}.parquet",
    "overlay": f"{OVERLAYS}/{{}}.png",
    "tissue": "{}.tissue.geojson",
}
USUAL = ("labels", "geojson", "overlay")  # formats where none are named
RECENT = 64  # blocks of labels that stay in memory as they are, 1 MiB each
BLOCK = 512  # px: side of a block of labels, and of a tile of a label TIFF
STRIPS = 2048  # px: a label map up to this side is a TIFF of strips, without tiles
GROUP = 10_000  # least rows of a group of a Parquet file
OUTLINED = ("geojson", "geojson.gz", "parquet")
OVERLAY = 4096  # px: longest side of an overlay

Columns = Mapping[str, np.ndarray]
Geometries = list[dict[str, Any]]  # GeoJSON geometries
Table = tuple[Callable[[Columns, Geometries], Any], Callable[[Any], Any]]  # encode, write


def output_files(folder: Path, stem: str, formats: Iterable[str]) -> dict[str, Path]:
    """The file of each format, of an image in a folder."""
    return {name: folder / FILES[name].format(stem) for name in formats}


def write_files(
    files: Mapping[str, Path],
    image: Any,
    windows: Iterable[tuple[Window, Nuclei]],
    mpp: float | None = None,
    *,
    finished: Callable[[Mapping[Path, Path]], None] | None = None,
) -> int:
    """Write the files of one image, all or none.

    Ids continue from window to window. Where two nuclei claim a pixel, the first has it. Threads
    measure and outline the nuclei of several windows at a time.

    Args:
        files: the file of each format, keys of `FILES`.
        image: uint8 (H, W, 3), or what slices like it.
        windows: every window of the image, each with the nuclei of its outer place.
        mpp: microns per px; None = not known.
        finished: called with each file's temporary one, before the first of them takes its name.

    Returns:
        The number of nuclei.

    Raises:
        UserError: a file cannot be written.
    """
    folder = next(iter(files.values())).parent
    with ExitStack() as stack:
        paths = {name: stack.enter_context(atomic(file)) for name, file in files.items()}
        try:
            count = _write(paths, folder, image, windows, mpp)
            if finished:
                finished({file: paths[name] for name, file in files.items()})
            return count
        except OSError as error:  # `atomic` would name the last file, whichever has no room
            raise UserError(f"{folder}: {error}; what was there before is unharmed") from error


def _write(
    paths: Mapping[str, Path],
    folder: Path,
    image: Any,
    windows: Iterable[tuple[Window, Nuclei]],
    mpp: float | None,
) -> int:
    """`write_files` into temporary files, with another one in `folder`."""
    with ExitStack() as stack:
        labels = LabelBlocks(image.shape[:2], stack.enter_context(TemporaryFile(dir=folder)))
        dot = np.zeros((1, 1, 3), np.uint8)
        names = measure(dot[..., 0], dot, mpp, confidence=np.zeros(0))  # columns without rows
        tables = [
            stack.enter_context(TABLES[name](paths[name], names)) for name in paths.keys() & TABLES
        ]
        outlined = paths.keys() & OUTLINED

        def encoded(window: Window, nuclei: Nuclei, before: int) -> list[Any]:
            """What each table takes of a window."""
            corner = window.outer[0].start, window.outer[1].start
            columns = measure(nuclei.label, image[window.outer], mpp, corner, nuclei.confidence)
            columns["id"] += before
            outlines = list(geojson.geometries(nuclei.label, corner[::-1])) if outlined else []
            return [encode(columns, outlines) for encode, _ in tables]

        def jobs() -> Iterator[tuple[Window, Nuclei, int]]:
            for window, nuclei in windows:
                before = labels.count
                nuclei = labels.add(window, nuclei)
                if tables and labels.count > before:
                    yield window, nuclei, before

        for parts in in_threads(encoded, jobs()):
            for (_, write), part in zip(tables, parts):
                write(part)
        if "labels" in paths:
            labels.write(paths["labels"], mpp)
        if "overlay" in paths:
            draw.write_png(paths["overlay"], draw_overlay(image, labels))
    return labels.count


# A table yields two functions: one encodes the rows of a window in any thread, the other writes
# them in order.


@contextmanager
def geojson_table(
    path: Path, _: Columns, *, pack: Callable[[bytes], bytes] = bytes
) -> Iterator[Table]:
    """A GeoJSON file. `pack` compresses each window on its own: parts of gzip can be joined."""

    def encode(columns: Columns, outlines: Geometries) -> bytes:
        text = geojson.to_json(geojson.features(outlines, columns))
        return pack((text if columns["id"][0] == 1 else ",\n" + text).encode())

    with path.open("wb") as file:
        file.write(pack(geojson.HEAD.encode()))
        yield encode, file.write
        file.write(pack(geojson.TAIL.encode()))


@contextmanager
def csv_table(path: Path, columns: Columns) -> Iterator[Table]:
    """A CSV file, with the names of the columns first."""

    def encode(columns: Columns, _: Geometries) -> str:
        rows = zip(*(column.tolist() for column in columns.values()))
        text = StringIO()
        csv.writer(text).writerows(
            [f"{value:.9g}" if isinstance(value, float) else value for value in row] for row in rows
        )
        return text.getvalue()

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(columns)
        yield encode, file.write


@contextmanager
def parquet_table(path: Path, columns: Columns) -> Iterator[Table]:
    """A GeoParquet 1.0 file: the columns, and the outlines as WKB.

    Rows are written in groups of at least `GROUP`, because each group takes memory until the end.
    """
    import pyarrow
    import shapely
    from pyarrow.parquet import ParquetWriter

    def encode(columns: Columns, outlines: Geometries) -> pyarrow.Table:
        shapes = shapely.from_geojson([geojson.to_json([outline]) for outline in outlines])
        geometry = pyarrow.array(shapely.to_wkb(shapes).tolist(), pyarrow.binary())
        return pyarrow.table({**columns, "geometry": geometry})

    def write(part: pyarrow.Table) -> None:
        waiting.append(part)
        if sum(map(len, waiting)) >= GROUP:
            file.write_table(pyarrow.concat_tables(waiting).combine_chunks())
            waiting.clear()

    waiting = [encode(columns, [])]
    about = {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"], "crs": None}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": about}}
    schema = waiting[0].schema.with_metadata({"geo": json.dumps(geo)})
    # an open file, because pyarrow takes a path with a colon for a URI
    with path.open("wb") as opened, ParquetWriter(opened, schema, compression="zstd") as file:
        yield encode, write
        file.write_table(pyarrow.concat_tables([encode(columns, []), *waiting]))


TABLES = {
    "geojson": geojson_table,
    "geojson.gz": partial(geojson_table, pack=partial(gzip.compress, compresslevel=4, mtime=0)),
    "csv": csv_table,
    "parquet": parquet_table,
}


class LabelBlocks:
    """A label map of any size in a file, as compressed blocks; only `RECENT` of them are in memory.

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

    def add(self, window: Window, nuclei: Nuclei) -> Nuclei:
        """Add a window's nuclei.

        A pixel stays with the nucleus that had it first. A nucleus without a pixel of its own is
        left out.

        Args:
            window: the window.
            nuclei: of its outer place; their ids continue from `count` here.

        Returns:
            What was added, ids 1, 2, ...
        """
        label = nuclei.label.copy()
        pieces = []
        hidden = False
        for axes in product(*(segments_under(place, BLOCK) for place in window.outer)):
            at, in_block, in_window = zip(*axes)
            piece = label[in_window]
            if piece.any():
                block = self.block(at)
                place = block[in_block]
                taken = (place > 0) & (piece > 0)
                if taken.any():
                    piece[taken] = 0
                    hidden = True
                pieces.append((at, block, place, piece))
        visible = np.ones(len(nuclei.confidence) + 1, bool)
        if hidden:
            visible = np.bincount(label.ravel(), minlength=len(visible)) > 0
        visible[0] = False
        ids = (np.cumsum(visible) * visible).astype(np.int32)
        numbers = np.where(visible, ids + self.count, 0).astype(np.int32)
        for at, block, place, piece in pieces:
            np.maximum(place, numbers[piece], out=place)
            self._keep(at, block)
        self.count += int(ids.max())
        return Nuclei(ids[label] if hidden else label, nuclei.confidence[visible[1:]])

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
            rows, columns = map(range, self.grid)
            whole = np.block([[self.block((y, x)) for x in columns] for y in rows])
            whole = whole[: self.size[0], : self.size[1]].astype(dtype)
            tifffile.imwrite(path, whole, **tags)


def draw_overlay(image: Any, labels: LabelBlocks) -> np.ndarray:
    """Draw the contours of all nuclei over their image.

    An image over `OVERLAY` px a side is shrunk by a whole factor. A pixel is then the mean of a
    square, or of what of it lies in the image.

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
        if pixels.size:
            picture[rows, columns] = Image.fromarray(np.ascontiguousarray(pixels)).reduce(f)
        first = rows.start * f - BLOCK * at[0], columns.start * f - BLOCK * at[1]
        ids = labels.block(at)[first[0] :: f, first[1] :: f]
        small[rows, columns] = ids[: rows.stop - rows.start, : columns.stop - columns.start]
    picture[find_boundaries(small, mode="inner")] = draw.PREDICTION
    return picture
