"""Image and label files as arrays.

Images are PNG, TIFF, JPEG or BMP. Labels are TIFF, PNG or NPY: 0 = background, one id per nucleus.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from operator import add
from pathlib import Path

import numpy as np
import tifffile

from nucsam.data import published
from nucsam.errors import UserError
from nucsam.files import atomic

TIFF = (".tif", ".tiff")
IMAGES = (".png", *TIFF, ".jpg", ".jpeg", ".bmp")
LABELS = (*TIFF, ".png", ".npy")

WHOLE = 2**22  # px: largest TIFF that `open_image` reads whole at once
MOST = 2**27  # px: largest TIFF that `open_image` reads whole where windows fail
CACHE = 2**27  # bytes of decoded tiles or strips that a TIFF keeps

# Microns in a unit of OME. Two different letters look like µ.
_MICRONS = {"nm": 1e-3, "um": 1.0, "µm": 1.0, "\u03bcm": 1.0, "mm": 1e3, "cm": 1e4}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"

# tifffile logs a problem and then raises it; the UserError is enough.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file in colour.

    Grey is repeated, palettes are looked up and alpha is dropped. 16-bit values lose low bits: 8
    where the largest value is over 4095, 4 where it is over 255 (12-bit cameras), none below.

    Args:
        path: a PNG, TIFF, JPEG or BMP file.

    Returns:
        uint8 (H, W, 3), 0..255.

    Raises:
        UserError: the file is damaged, or has other values or another shape.
    """
    path = Path(path)
    pixels = _read_pixels(path, IMAGES, label=False)
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    shape = (*pixels.shape, 1)[:3]
    if pixels.dtype.kind not in "ui" or low < 0 or high > 65535 or shape[2] > 4:
        found = f"{pixels.dtype} in {low}..{high} of shape {pixels.shape}"
        raise UserError(f"{path}: found {found}, expected 8 or 16 bits in (H, W) or (H, W, 1 to 4)")
    return _rgb(pixels.reshape(shape), _low_bits(high))


def open_image(path: str | Path) -> "np.ndarray | TiffWindows":
    """Read an image, or open it by windows where it is a TIFF over WHOLE px.

    A TIFF that windows cannot read is read whole up to MOST px.

    Args:
        path: as of `read_image`.

    Returns:
        uint8 (H, W, 3), or an object that is sliced like it.

    Raises:
        UserError: as of `read_image`, and for a larger TIFF that windows cannot read.
    """
    path = Path(path)
    pixels = 0
    if path.suffix.lower() in TIFF and path.is_file():
        try:
            with tifffile.TiffFile(path) as tiff:
                pixels = tiff.pages[0].imagelength * tiff.pages[0].imagewidth
            if pixels > WHOLE:
                return TiffWindows(path)
        except Exception as error:  # a damaged file makes decoders raise nearly anything
            if pixels > MOST:
                raise UserError(f"{path}: cannot be read by windows ({error})") from error
    return read_image(path)


def read_label(path: str | Path) -> np.ndarray:
    """Read a label file.

    Args:
        path: a TIFF, PNG or NPY file of integers >= 0. In a palette file the indices are the ids.

    Returns:
        int32 (H, W): 0 = background, one id per nucleus, gaps allowed.

    Raises:
        UserError: the file is damaged, is RGB, has no pixels, or has ids that int32 cannot hold.
    """
    path = Path(path)
    label = _read_pixels(path, LABELS, label=True)
    if label.ndim != 2 or label.dtype.kind not in "uib" or not label.size:
        found = f"{label.dtype} of shape {label.shape}"
        raise UserError(f"{path}: found {found}, expected integer ids (H, W)")
    low, high, largest = label.min(), label.max(), np.iinfo(np.int32).max
    if low < 0 or high > largest:
        raise UserError(f"{path}: found ids in {low}..{high}, expected 0..{largest}")
    return np.ascontiguousarray(label, np.int32)


def write_label(path: str | Path, label: np.ndarray) -> None:
    """Write a label map as a deflated TIFF, or leave the old file.

    Args:
        path: the TIFF file.
        label: ids >= 0 (H, W). The file is uint16, or uint32 where an id is over 65535.
    """
    assert label.ndim == 2 and label.dtype.kind in "ui" and label.min(initial=0) >= 0
    dtype = np.uint16 if label.max(initial=0) <= 65535 else np.uint32
    with atomic(Path(path)) as partial:
        tifffile.imwrite(partial, label.astype(dtype), compression="zlib", photometric="minisblack")


def read_mpp(path: str | Path) -> float | None:
    """Read the microns per pixel of a TIFF from its OME, ImageJ or resolution tags.

    Args:
        path: an image file.

    Returns:
        Microns per px. None without such a tag, for another format, and from 20 up: such a
        resolution is that of a screen or printer.
    """
    if Path(path).suffix.lower() not in TIFF:
        return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        text, resolution, unit = page.description, page.resolution[0], int(page.resolutionunit)
    microns = {2: 25400.0, 3: 10000.0}.get(unit, 0.0)  # of an inch, of a centimetre
    if text.startswith("ImageJ"):
        microns = 1.0 if re.search(r"unit=(micron|um|µm|\\u00B5m)", text) else 0.0
    mpp = microns / resolution if resolution else 0.0
    if size := re.search(rf'PhysicalSizeX="({_NUMBER})"', text):
        unit_name = re.search(r'PhysicalSizeXUnit="([^"]+)"', text)
        mpp = float(size[1]) * _MICRONS.get(unit_name[1] if unit_name else "µm", 0.0)
    return mpp if 0 < mpp < 20 else None


class TiffWindows:
    """A TIFF read by windows: `image[y0:y1, x0:x1]` has the pixels of `read_image`.

    A window decodes the tiles or strips under it; the last CACHE bytes of them are kept.
    Uncompressed pixels are memory-mapped. A pyramid is read at full resolution. A 16-bit file is
    read once when opened, because its largest value sets the bits to drop. Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Args:
            path: the TIFF file.

        Raises:
            UserError: the file cannot be read by windows. Slicing raises it for a bad window.
        """
        self._tiff = tifffile.TiffFile(path)
        self._series = series = _only_image(self._tiff)
        self._page = page = series.keyframe
        self.shape = (page.imagelength, page.imagewidth, 3)
        self._channels = series.size // (page.imagelength * page.imagewidth)
        plain = page.photometric in (1, 2)  # grey, RGB
        jpeg = (page.photometric, page.compression) == (6, 7)  # YCbCr, which decodes to RGB
        if page.dtype not in (np.uint8, np.uint16) or self._channels > 4 or not (plain or jpeg):
            found = f"{page.dtype} in {self._channels} channels, {page.photometric!r}"
            raise UserError(f"found {found}, expected grey or RGB of 8 or 16 bits")
        self._segment = _decoder(path, self._tiff)
        self._segment(0, 0, 0)  # fails on a compression that tifffile lacks
        self._low_bits = _low_bits(self._highest()) if page.dtype == np.uint16 else 0

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """Read a window as uint8 (h, w, 3), cut off at the edges of the image."""
        rows, columns = (slice(*s.indices(side)[:2]) for s, side in zip(window, self.shape))
        return _rgb(self._stored(rows, columns), self._low_bits)

    def _highest(self) -> int:
        """The largest stored value, found by one row of tiles or strips at a time."""
        height, width = self.shape[:2]
        step = self._page.chunks[0]
        bands = (slice(top, min(top + step, height)) for top in range(0, height, step))
        return max(int(self._stored(band, slice(0, width)).max()) for band in bands)

    def _stored(self, rows: slice, columns: slice) -> np.ndarray:
        """A window as the file stores it, (h, w, channels)."""
        if self._series.dataoffset is not None:
            # a new map each time releases the memory of earlier windows
            pixels = tifffile.memmap(self._tiff.filehandle.path, mode="r")
            pixels = _channels_last(pixels, self._series.axes)[rows, columns]
            return pixels.reshape(*pixels.shape[:2], self._channels)
        size = (rows.stop - rows.start, columns.stop - columns.start, self._channels)
        pixels = np.zeros(size, self._page.dtype)
        high, wide, *depth = self._page.chunks
        planes = np.split(pixels, self._channels // math.prod(depth), axis=2)  # views
        for plane, part in enumerate(planes):
            for row, to_rows, from_rows in _segments_under(rows, high):
                for column, to_columns, from_columns in _segments_under(columns, wide):
                    segment = self._segment(plane, row, column)
                    if segment is not None:  # else the file leaves it out: zeros
                        part[to_rows, to_columns] = segment[from_rows, from_columns]
        return pixels


def _decoder(path: Path, tiff: tifffile.TiffFile) -> Callable[..., np.ndarray | None]:
    """Make a cached function from (plane, row, column) to a tile or strip, (h, w, channels).

    All channels share a plane, or each has its own. The function returns None where the file
    leaves a segment out.
    """
    file, series = tiff.filehandle, tiff.series[0]
    file.lock = True
    page = series.keyframe
    across = math.ceil(page.imagewidth / page.chunks[1])
    segments = math.ceil(page.imagelength / page.chunks[0]) * across
    separate = page.samplesperpixel if page.planarconfig == 2 else 1
    planes = [(p, k * segments) for p in series.pages for k in range(separate)]
    segment_bytes = math.prod(page.chunks) * page.dtype.itemsize

    @lru_cache(max(1, CACHE // segment_bytes))
    def decode(plane: int, row: int, column: int) -> np.ndarray | None:
        try:
            plane_page, first = planes[plane]
            index = first + row * across + column
            offset, count = plane_page.dataoffsets[index], plane_page.databytecounts[index]
            data, _ = next(file.read_segments([offset], [count]))
            if data is None:
                return None
            return page.decode(data, index, jpegtables=plane_page.jpegtables)[0][0]
        except Exception as error:  # a damaged file makes decoders raise nearly anything
            raise _unreadable(path, error) from error

    return decode


def _segments_under(window: slice, step: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield what a window meets on one axis: segment number, place in window, place in segment."""
    for number in range(window.start // step, math.ceil(window.stop / step)):
        origin = number * step
        start, stop = max(window.start, origin), min(window.stop, origin + step)
        to_window = slice(start - window.start, stop - window.start)
        yield number, to_window, slice(start - origin, stop - origin)


def _read_pixels(path: Path, suffixes: tuple[str, ...], label: bool) -> np.ndarray:
    """Stored pixels, (H, W) or (H, W, C). A palette is looked up, but for a label."""
    pixels = published.read_slice(path)
    if pixels is not None:
        return pixels
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(f"{path}: found {suffix or 'no'} suffix, expected {', '.join(suffixes)}")
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise UserError("found a folder or device")
        if suffix == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        return _read_tiff(path, label) if suffix in TIFF else _read_pillow(path, label)
    except Exception as error:  # a damaged file makes decoders raise nearly anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return UserError(f"{path}: cannot be read ({reason}), expected a whole {path.suffix} file")


def _read_tiff(path: Path, label: bool) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        series = _only_image(tiff)
        page = tiff.pages[0]
        # pillow has LZW and JPEG, looks up palettes and inverts white-is-zero grey
        known = page.compression in (1, 8, 32946) and page.predictor in (1, 2)
        if known and (label or page.photometric in (1, 2)):
            return _channels_last(series.asarray(), series.axes)
        if len(series.pages) > 1:  # pillow would read only the first
            raise UserError(f"found a page a channel in {page.compression!r}, {page.photometric!r}")
    pixels = _read_pillow(path, label)
    return pixels.view(np.int8) if page.dtype == np.int8 else pixels  # pillow says uint8


def _only_image(tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The one image of a whole TIFF, with its smaller copies. A UserError on anything else."""
    if not tiff.pages:
        raise UserError("found no page")
    file = tiff.filehandle
    file.seek(tiff.pages.next_page_offset)
    end_mark = bytes(tiff.tiff.offsetsize)
    if file.read(len(end_mark)) != end_mark:  # tifffile leaves out pages that it cannot reach
        raise UserError(f"found {len(tiff.pages)} page(s) and no end of the page table")
    series, *others = tiff.series
    images = [other for other in others if not other.keyframe.subfiletype & 1]  # 1: smaller copy
    if images:
        raise UserError(f"found {1 + len(images)} images, expected one")
    if series.axes not in ("YX", "YXS", "SYX", "CYX"):
        raise UserError(f"found axes {series.axes} of shape {series.shape}, expected one image")
    # tifffile reads zeros past the end of the file
    end = max(e for page in series.pages for e in map(add, page.dataoffsets, page.databytecounts))
    if end > file.size:
        raise UserError(f"found {file.size} of {end} bytes")
    return series


def _read_pillow(path: Path, label: bool) -> np.ndarray:
    from PIL import Image

    formats = ("PNG",) if label else ("PNG", "JPEG", "BMP")
    if path.suffix.lower() in TIFF:
        formats = ("TIFF",)
    with Image.open(path, formats=formats) as image:
        image.verify()  # the checksums of a PNG, which reading its pixels skips
    with Image.open(path, formats=formats) as image:
        if image.format == "PNG" and image.n_frames > 1:
            raise UserError(f"found {image.n_frames} frames, expected one image")
        if not label and image.mode[0] not in "FI":  # neither float nor integers over 8 bits
            image = image.convert("RGB")
        return np.asarray(image)


def _channels_last(pixels: np.ndarray, axes: str) -> np.ndarray:
    return np.moveaxis(pixels, 0, -1) if axes[0] in "SC" else pixels


def _low_bits(highest: int) -> int:
    """Low bits to drop from an image whose largest value is `highest`."""
    if highest > 4095:
        return 8
    return 4 if highest > 255 else 0


def _rgb(pixels: np.ndarray, low_bits: int) -> np.ndarray:
    """(H, W, 1 to 4) as a new uint8 (H, W, 3)."""
    if pixels.dtype != np.uint8:
        pixels = (pixels >> low_bits).astype(np.uint8)
    return np.array(pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., [0, 0, 0]], order="C")
