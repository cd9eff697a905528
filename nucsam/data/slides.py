"""Windows of large images: TIFFs by tifffile, the formats of slide scanners by OpenSlide.

Which decoder reads a file follows from its suffix alone, so pixels never depend on what else is
installed. OpenSlide is the extra `slides`; it reads no file that tifffile reads.

A value of 16 bits becomes the top 8 of its used bits. These are the fewest of 8, 10, 12, 14 or 16
that hold 99.9 % of the image's values, and at least as many as the file declares.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from importlib import import_module
from itertools import product
from operator import add
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from nucsam.errors import UserError, reading

TIFF = (".tif", ".tiff", ".svs")
SCANNERS = (".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".svslide", ".dcm")

BAND = 2**24  # px that are counted at once
CACHE = 2**27  # bytes of decoded tiles or strips that a TIFF keeps
MOST = 2**30  # px: largest array that is read whole
HOT = 1e-3  # share of values that may exceed the bits of a 16-bit image
# How many channels an image may have, by its photometric tag: white-is-zero, black-is-zero, RGB,
# palette, CMYK, YCbCr
CHANNELS = {0: (1, 2, 3, 4), 1: (1, 2, 3, 4), 2: (1, 2, 3, 4), 3: (1, 2), 5: (4,), 6: (1, 3, 4)}
SIDE_IMAGES = re.compile(r"label|macro|thumbnail|overview", re.IGNORECASE)

# tifffile logs a problem and then raises it; the UserError is enough.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Windows:
    """An image that is sliced like an array: `image[y0:y1, x0:x1]` is uint8 (h, w, 3).

    A window is cut off at the edges of the image. Threads may share an image.

    Attributes:
        shape: (H, W, 3).
        sizes: (H, W) of each level of the pyramid, the full resolution first.
    """

    shape: tuple[int, int, int]
    sizes: list[tuple[int, int]]

    def _read(self, level: int, rows: slice, columns: slice) -> np.ndarray:
        """A window of a level, uint8 (h, w, 3)."""
        raise NotImplementedError

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (slice(*s.indices(side)[:2]) for s, side in zip(window, self.shape))
        return self._read(0, rows, columns)

    def level(self, scale: float) -> int:
        """The coarsest level with at least 0.9 `scale` px per px of the full resolution."""
        needed = 0.9 * scale * self.shape[0]
        return max((k for k, (height, _) in enumerate(self.sizes) if height >= needed), default=0)

    def resampled(
        self, level: int, rows: slice, columns: slice, size: tuple[int, int]
    ) -> np.ndarray:
        """A window, read from a level.

        Args:
            level: number of the level.
            rows, columns: the window in px of the full resolution.
            size: height and width of the result, px.

        Returns:
            uint8 (*size, 3), with the same edges as the window to a fraction of a px.
        """
        from PIL import Image

        full, sides = np.array([self.shape[:2], self.sizes[level]])
        low = [rows.start, columns.start] * sides / full
        high = np.minimum([rows.stop, columns.stop] * sides / full, sides)
        start, stop = np.floor(low).astype(int), np.ceil(high).astype(int)
        pixels = Image.fromarray(self._read(level, *map(slice, start.tolist(), stop.tolist())))
        box = (*(low - start)[::-1], *(high - start)[::-1])
        return np.asarray(pixels.resize(size[::-1], Image.Resampling.BILINEAR, box))


# ---- orientation: tag 274 of TIFF and EXIF, 1 to 8 ----


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (h, w, ...) as a viewer shows them."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _stored_place(
    rows: slice, columns: slice, size: Sequence[int], orientation: int
) -> tuple[slice, slice]:
    """Rows and columns as stored of a window of the turned image of this size."""
    if orientation in (3, 4, 7, 8):
        rows = slice(size[0] - rows.stop, size[0] - rows.start)
    if orientation in (2, 3, 6, 7):
        columns = slice(size[1] - columns.stop, size[1] - columns.start)
    return (columns, rows) if orientation > 4 else (rows, columns)


# ---- TIFF ----


def open_tiff(path: Path) -> tuple[tifffile.TiffFile, tifffile.TiffPageSeries]:
    """Open a TIFF and find its one image: of a slide the largest tiled one.

    Raises:
        UserError: the file is damaged, or holds no image, several or a stack.
    """
    with decoding(path):
        tiff = tifffile.TiffFile(path)
        try:
            return tiff, _only_image(tiff)
        except (AttributeError, LookupError):  # of OME-XML that does not describe the file
            tiff = tifffile.TiffFile(path, is_ome=False)
            return tiff, _only_image(tiff)


def decoding(path: Path) -> AbstractContextManager[None]:
    """Context of reading an image or a label, as in `reading`."""
    expected = f"a whole {path.suffix} file"
    if path.suffix.lower() in (*SCANNERS, ".svs"):
        expected += "; if the scanner's own program opens it, convert it to TIFF"
    return reading(path, expected)


def check_size(path: Path, shape: Sequence[int]) -> None:
    """Refuse to read an array whole, before it takes memory, if it has more than MOST px.

    Args:
        path: the file.
        shape: (H, W, ...).
    """
    pixels = math.prod(shape[:2])
    if pixels > MOST:
        found = f"{shape[1]}x{shape[0]} px"
        raise UserError(f"{path}: found {found}, expected at most {MOST:,} px; cut it into pieces")


def _only_image(tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    if not tiff.pages:
        raise UserError("found no page, expected a whole TIFF")
    file = tiff.filehandle
    file.seek(tiff.pages.next_page_offset)
    end_mark = bytes(tiff.tiff.offsetsize)
    if file.read(len(end_mark)) != end_mark:  # tifffile leaves out pages that it cannot reach
        found = f"{len(tiff.pages)} page(s) and no end of the page table"
        raise UserError(f"found {found}, expected a whole TIFF")
    every = [s for s in tiff.series if all(page.parent is tiff for page in s.pages)]
    if not every:  # each page must be read from the file that it lies in
        raise UserError("found an image whose channels lie in several files, expected one file")
    images = [s for s in every if not s.keyframe.subfiletype & 5]  # smaller copy, mask
    images = [s for s in images if not SIDE_IMAGES.search(s.name)] or images or every
    images = [s for s in images if s.keyframe.is_tiled] or images
    first, *others = sorted(images, key=_area, reverse=True)
    if first.keyframe.is_tiled:
        others = [series for series in others if _area(series) == _area(first)]
    if others:
        sizes = ", ".join(f"{s.keyframe.imagewidth}x{s.keyframe.imagelength}" for s in images)
        raise UserError(f"found {len(images)} images ({sizes} px), expected one")
    if "".join(_axes(first)) not in ("YX", "YXS", "SYX", "CYX"):
        found = f"a stack with axes {first.axes} of shape {first.shape}"
        raise UserError(f"found {found}, expected one image")
    # tifffile reads zeros past the end of the file
    end = max(e for page in first.pages for e in map(add, page.dataoffsets, page.databytecounts))
    if end > file.size:
        raise UserError(f"found {file.size} of {end} bytes, expected a whole TIFF")
    return first


def _area(series: tifffile.TiffPageSeries) -> int:
    return series.keyframe.imagelength * series.keyframe.imagewidth


def _axes(series: tifffile.TiffPageSeries) -> dict[str, int]:
    """Axes that have more than one element, rows and columns always, and their lengths."""
    return {axis: n for axis, n in zip(series.axes, series.shape) if n > 1 or axis in "YX"}


def ome_pixels(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> dict[str, str]:
    """Attributes of the OME-XML element Pixels of an image; none where there is no such element."""
    text = tiff.pages.first.description
    try:
        root = ElementTree.fromstring(text.encode() if "<OME" in text else "<none/>")
    except ElementTree.ParseError:
        return {}
    every = [dict(element.attrib) for element in root.iter() if element.tag.endswith("}Pixels")]
    size = (str(page.imagewidth), str(page.imagelength))
    same = [pixels for pixels in every if (pixels.get("SizeX"), pixels.get("SizeY")) == size]
    return (same or every or [{}])[0]


class TiffPixels:
    """The stored values of one level of a TIFF by windows, turned as its orientation tag says.

    A window decodes the tiles or strips under it; the last CACHE bytes of them are kept.
    Uncompressed pixels are memory-mapped.

    Args:
        path: of the file, for messages.
        tiff: the open file.
        series: the level.
        blank: value of tiles that the file leaves out.

    Raises:
        UserError: the pixels cannot be decoded; slicing raises it too.
    """

    def __init__(
        self, path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, blank: int = 0
    ) -> None:
        self._tiff, self._series, self._blank = tiff, series, blank
        self.page = page = series.keyframe
        size = page.imagelength, page.imagewidth
        self.channels = series.size // math.prod(size)
        tag = page.tags.valueof(274, 1)
        self.orientation = tag if tag in range(1, 9) else 1
        self.size = size[::-1] if self.orientation > 4 else size
        self.alpha = bool(page.extrasamples) and self.channels in (2, 4)
        self._segment = _decoder(path, tiff, series)
        self._segment(0, 0, 0)  # fails where the codec is missing

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """A window (h, w, channels)."""
        place = _stored_place(*window, self.size, self.orientation)
        return turned(self._stored(*place), self.orientation)

    def bands(self) -> Iterator[np.ndarray]:
        """All pixels, at most one row of tiles or strips at a time."""
        height, width = self.page.imagelength, self.page.imagewidth
        step = min(self.page.chunks[0], max(1, BAND // width))
        for top in range(0, height, step):
            yield self._stored(slice(top, min(top + step, height)), slice(0, width))

    def _stored(self, rows: slice, columns: slice) -> np.ndarray:
        if self._series.dataoffset is not None:
            # a new map each time releases the memory of earlier windows
            path, dtype = self._tiff.filehandle.path, self._tiff.byteorder + self.page.dtype.char
            axes = _axes(self._series)
            pixels = np.memmap(path, dtype, "r", self._series.dataoffset, tuple(axes.values()))
            if next(iter(axes)) in "SC":
                pixels = np.moveaxis(pixels, 0, -1)
            pixels = pixels[rows, columns]
            return pixels.reshape(*pixels.shape[:2], self.channels)
        size = (rows.stop - rows.start, columns.stop - columns.start, self.channels)
        pixels = np.full(size, self._blank, self.page.dtype)
        high, wide, *depth = self.page.chunks
        planes = np.split(pixels, self.channels // math.prod(depth), axis=2)  # views
        for plane, part in enumerate(planes):
            for axes in product(segments_under(rows, high), segments_under(columns, wide)):
                (row, column), in_segment, in_window = zip(*axes)
                segment = self._segment(plane, row, column)
                if segment is not None:  # else the file leaves it out
                    part[in_window] = segment[in_segment]
        return pixels


def _decoder(
    path: Path, tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries
) -> Callable[..., np.ndarray | None]:
    """Make a cached function from (plane, row, column) to a tile or strip, (h, w, channels).

    All channels share a plane, or each has its own. The function returns None where the file
    leaves a segment out.
    """
    file = tiff.filehandle
    file.lock = True
    page = series.keyframe
    check_size(path, page.chunks)  # a strip or tile is decoded whole
    across = math.ceil(page.imagewidth / page.chunks[1])
    segments = math.ceil(page.imagelength / page.chunks[0]) * across
    separate = page.samplesperpixel if page.planarconfig == 2 else 1
    planes = [(p, k * segments) for p in series.pages for k in range(separate)]
    segment_bytes = math.prod(page.chunks) * page.dtype.itemsize

    @lru_cache(max(1, CACHE // segment_bytes))
    def decode(plane: int, row: int, column: int) -> np.ndarray | None:
        with decoding(path):
            plane_page, first = planes[plane]
            index = first + row * across + column
            offset, count = plane_page.dataoffsets[index], plane_page.databytecounts[index]
            data, _ = next(file.read_segments([offset], [count]))
            if data is None:
                return None
            try:
                return page.decode(data, index, jpegtables=plane_page.jpegtables)[0][0]
            except (ValueError, NotImplementedError) as error:  # which may be no fault of the file
                expected = "expected a common compression; save it as TIFF with deflate"
                raise UserError(f"{path}: cannot be decoded ({error}), {expected}") from error

    return decode


def segments_under(window: slice, step: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield what a window meets on one axis: segment number, place in segment, place in window."""
    for number in range(window.start // step, math.ceil(window.stop / step)):
        yield number, *meet(number * step, step, window)


def meet(start: int, length: int, place: slice) -> tuple[slice, slice]:
    """The intersection of `length` px from `start` with `place`, counted from the start of each."""
    low = max(start, place.start)
    high = min(start + length, place.stop)
    return slice(low - start, high - start), slice(low - place.start, high - place.start)


class TiffWindows(Windows):
    """A TIFF in colour, by windows.

    Grey is repeated, palettes are looked up, white-is-zero is inverted, alpha is dropped, and tiles
    that the file leaves out are white. A 16-bit file is read once when opened: its values set its
    bits, and tiles that it leaves out are black.

    Args:
        path: the TIFF file.

    Raises:
        UserError: the file is damaged, or is no grey, RGB, CMYK or YCbCr image of 8 or 16 bits.
            Slicing raises it for a damaged window.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        tiff, series = open_tiff(path)
        page = series.keyframe
        blank = 255 if page.dtype == np.uint8 and page.photometric in (1, 2, 6) else 0
        with decoding(path):
            if page.dtype is None or page.dtype.kind not in "uib":
                raise UserError(f"found values of {page.dtype}, expected 8 or 16 bits")
            levels = sorted(series.levels, key=_area, reverse=True)
            self._levels = [TiffPixels(path, tiff, level, blank) for level in levels]
            channels = self._levels[0].channels
            if channels not in CHANNELS.get(page.photometric, ()):
                found = f"{channels} channels of {page.photometric.name}"
                raise UserError(f"found {found}, expected grey, RGB, CMYK or YCbCr")
            if page.photometric == 3 and page.colormap is None:
                raise UserError("found a palette image without its palette, expected one")
            self.sizes = [level.size for level in self._levels]
            self.shape = (*self.sizes[0], 3)
            self._bits = _tiff_bits(tiff, self._levels[0])

    def _read(self, level: int, rows: slice, columns: slice) -> np.ndarray:
        pixels = self._levels[level]
        with decoding(self._path):
            return _colour(pixels[rows, columns], pixels.page, self._bits)


def _tiff_bits(tiff: tifffile.TiffFile, pixels: TiffPixels) -> int:
    """Bits of a value, 1 to 16."""
    page = pixels.page
    if page.dtype.itemsize == 1 and page.dtype.kind != "i":
        return page.bitspersample
    declared = [page.bitspersample, ome_pixels(tiff, page).get("SignificantBits", "16")]
    declared.append(int(np.max(page.tags.valueof(281, 65535))).bit_length())
    counts = np.zeros(2**16, np.int64)
    for band in pixels.bands():
        values = band[..., : pixels.channels - pixels.alpha]
        low, high = values.min(initial=0), values.max(initial=0)
        if low < 0 or high > 65535:
            raise UserError(f"found {page.dtype} in {low}..{high}, expected 8 or 16 bits")
        counts += np.bincount(values.astype(np.uint16).ravel(), minlength=2**16)
    return used_bits(counts, min(int(bits) for bits in declared if str(bits).isdecimal()))


def used_bits(counts: np.ndarray, declared: int = 16) -> int:
    """Bits of the values of a 16-bit image: 8, 10, 12, 14 or 16, or more as declared.

    Args:
        counts: number of px of each value, (65536,).
        declared: what the file says; 16 says nothing, because many writers always say it.
    """
    most = HOT * counts.sum()
    used = next((bits for bits in (8, 10, 12, 14) if counts[2**bits :].sum() <= most), 16)
    return max(used, declared) if declared < 16 else used


def to_bytes(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Values of 1 to 16 bits as uint8 of 8 bits."""
    if pixels.dtype == np.uint8 and bits == 8:
        return pixels
    if bits < 8:
        return pixels.astype(np.uint8) * np.uint8(255 // (2**bits - 1))
    return np.minimum(pixels.astype(np.uint16, copy=False) >> (bits - 8), 255).astype(np.uint8)


def _colour(pixels: np.ndarray, page: tifffile.TiffPage, bits: int) -> np.ndarray:
    """Stored values (h, w, 1 to 4) as uint8 (h, w, 3)."""
    from PIL import Image

    if page.photometric == 3:
        colours = page.colormap.T  # (values, 3), 16 bits; some writers put 8 bits in it
        colours = (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
        return colours[pixels[..., 0]]
    pixels = to_bytes(pixels, bits)
    if page.photometric == 0:
        pixels = 255 - pixels
    if page.photometric == 5:
        return np.asarray(Image.fromarray(pixels, "CMYK").convert("RGB"))
    # codecs of pictures decode YCbCr to RGB, but Aperio's 33003 stores it unmarked
    plain = page.compression not in tifffile.TIFF.IMAGE_COMPRESSIONS
    if page.compression == 33003 or (page.photometric == 6 and plain):
        pixels = np.ascontiguousarray(pixels[..., :3])
        return np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB"))
    return np.array(pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., [0, 0, 0]], order="C")


# ---- formats of slide scanners ----


class ScannerWindows(Windows):
    """A slide that OpenSlide reads: the scanned part of its canvas, white where nothing is scanned.

    Coordinates begin at the corner of `openslide.bounds`, as in QuPath.

    Args:
        path: a file of one of SCANNERS. A DICOM slide is any file of its folder.

    Raises:
        UserError: OpenSlide is not installed or cannot read the file. Slicing raises it too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide = open_slide(path)
        known = self._slide.properties
        whole = (0, 0, *self._slide.dimensions)
        names = ("x", "y", "width", "height")
        left, top, width, height = (
            int(known.get(f"openslide.bounds-{name}", value)) for name, value in zip(names, whole)
        )
        self._corner = left, top
        self._scales = self._slide.level_downsamples
        self.shape = (height, width, 3)
        self.sizes = [(round(height / s), round(width / s)) for s in self._scales]

    def _read(self, level: int, rows: slice, columns: slice) -> np.ndarray:
        left, top = self._corner
        scale = self._scales[level]
        corner = left + round(columns.start * scale), top + round(rows.start * scale)
        size = columns.stop - columns.start, rows.stop - rows.start
        if 0 in size:
            return np.zeros((*size[::-1], 3), np.uint8)
        with decoding(self.path):
            pixels = np.asarray(self._slide.read_region(corner, level, size))
        alpha = pixels[..., 3:].astype(np.uint16)
        return ((pixels[..., :3] * alpha + 255 * (255 - alpha)) // 255).astype(np.uint8)


def open_slide(path: Path):
    """An `openslide.OpenSlide`.

    Raises:
        UserError: as in `ScannerWindows`.
    """
    try:
        openslide = import_module("openslide")
    except ImportError as error:
        need = f"a {path.suffix} slide needs OpenSlide: pip install 'nucsam[slides]' adds it"
        raise UserError(f"{path}: {need} ({error})") from error
    with decoding(path):
        return openslide.OpenSlide(path)


def one_file_each(paths: Sequence[Path]) -> list[Path]:
    """Files without the other levels of a DICOM slide, which lie beside its first file."""
    first: dict[object, Path] = {}
    for path in paths:
        key: object = path
        if path.suffix.lower() == ".dcm":
            with suppress(UserError):  # which opening it repeats
                known = open_slide(path).properties
                key = path.parent, known.get("openslide.quickhash-1", path)
        first.setdefault(key, path)
    return list(first.values())
