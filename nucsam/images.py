"""Image and label files <-> arrays.

Images are PNG, TIFF, JPEG or BMP; labels TIFF, PNG or NPY, 0 = background and one id per nucleus.
"""

import logging
import re
import threading
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import tifffile

from nucsam.atomic import atomic

TIFF = (".tif", ".tiff")
IMAGES = (".png", *TIFF, ".jpg", ".jpeg", ".bmp")
LABELS = (*TIFF, ".png", ".npy")
WHOLE = 2**22  # px: a TIFF up to this is read whole
MOST = 2**27  # px: a TIFF that cannot be read by windows is read whole up to this
CACHE = 2**27  # bytes of decoded tiles or strips that a TIFF keeps
_MICRONS = {"nm": 1e-3, "µm": 1.0, "\u03bcm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}  # OME's; two letters look like µ

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # our ValueError says what it would print


def _read_pillow(path: Path, label: bool) -> np.ndarray:
    from PIL import Image

    formats = ("TIFF",) if path.suffix.lower() in TIFF else ("PNG",) if label else ("PNG", "JPEG", "BMP")
    try:
        opened = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        most = f"over {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} Mpx, expected fewer; a TIFF may be of any size"
        raise ValueError(f"found {most}") from error
    with opened as image:
        image.verify()  # a PNG's checksums, which reading its pixels does not look at
    with Image.open(path, formats=formats) as image:
        if image.format == "PNG" and image.n_frames > 1:
            raise ValueError(f"found {image.n_frames} frames, expected one image")
        stored = label or image.mode in ("1", "L", "RGB", "RGBA", "F") or image.mode.startswith("I")
        return np.asarray(image if stored else image.convert("RGB"))


def _series(tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The one image of a TIFF, smaller copies with it; ValueError on several, on a stack, and on a part of a file."""
    if not tiff.pages:
        raise ValueError("found no page")
    file, size = tiff.filehandle, tiff.tiff.offsetsize
    file.seek(tiff.pages.next_page_offset)
    if file.read(size) != bytes(size):  # tifffile leaves out the pages that it cannot reach
        raise ValueError(f"found {len(tiff.pages)} page(s) and no end of the page table in {file.size} bytes")
    images = [series for series in tiff.series[1:] if not series.keyframe.subfiletype & 1]  # 1: a smaller copy
    if images:
        raise ValueError(f"found {1 + len(images)} images, expected one")
    series = tiff.series[0]
    if series.axes not in ("YX", "YXS", "SYX", "CYX"):
        raise ValueError(f"found axes {series.axes} of shape {series.shape}, expected one image")
    # tifffile gives zeros for what lies behind the end of a truncated file
    end = max(sum(part) for page in series.pages for part in zip(page.dataoffsets, page.databytecounts))
    if end > file.size:
        raise ValueError(f"found {file.size} of {end} bytes")
    return series


def _read_tiff(path: Path, label: bool) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        series, page = _series(tiff), tiff.pages[0]
        # tifffile alone has no LZW or JPEG, and leaves palettes and inverted grey as they are
        if page.compression in (1, 8, 32946) and page.predictor in (1, 2) and (label or page.photometric in (1, 2)):
            pixels = series.asarray()
            return np.moveaxis(pixels, 0, -1) if series.axes[0] in "SC" else pixels
        if len(series.pages) > 1:  # of which pillow would take the first
            raise ValueError(f"found a page for each channel, {page.compression!r}, {page.photometric!r}")
    pixels = _read_pillow(path, label)
    return pixels.view(np.int8) if page.dtype == np.int8 else pixels  # pillow takes them for uint8


def _read_pixels(path: Path, suffixes: tuple[str, ...], label: bool) -> np.ndarray:
    """As stored, (H, W) or (H, W, C); a palette is looked up for an image, and stays indices for a label."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"{path}: found {suffix or 'no'} suffix, expected {', '.join(suffixes)}")
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise ValueError("found a folder or device")
        if suffix == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        return (_read_tiff if suffix in TIFF else _read_pillow)(path, label)
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: cannot be read ({reason}), expected a whole {suffix[1:]} file") from error


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 (H, W, 3), in 0..255.

    Grey is repeated, palettes are looked up, alpha is dropped. 16-bit values lose their 8 low bits; 4 if none
    is over 4095 (12-bit cameras), none if none is over 255. Raises ValueError on other values or shapes, and
    on damaged files.
    """
    pixels = _read_pixels(path := Path(path), IMAGES, label=False)
    low, high, shape = pixels.min(initial=0), pixels.max(initial=0), (*pixels.shape, 1)[:3]
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype.kind not in "ui" or low < 0 or high > 65535 or shape[2] > 4:
        found = f"{pixels.dtype} in {low}..{high} of shape {pixels.shape}"
        raise ValueError(f"{path}: found {found}, expected 8 or 16 bits in (H, W) or (H, W, 1 to 4)")
    return _rgb(pixels.reshape(shape), _shift(high))


def _shift(high: int) -> int:
    """Low bits to drop of an image whose largest value is `high`."""
    return 8 if high > 4095 else 4 if high > 255 else 0


def _rgb(pixels: np.ndarray, shift: int) -> np.ndarray:
    """(H, W, 1 to 4) as uint8 (H, W, 3), writable."""
    if pixels.dtype != np.uint8:
        pixels = (pixels >> shift).astype(np.uint8)
    return np.array(pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., [0, 0, 0]], order="C")


class TiffWindows:
    """A TIFF read by windows: `image[y0:y1, x0:x1]` is uint8 (h, w, 3), the same pixels as of `read_image`.

    Tiles or strips under a window are decoded when needed, and the last CACHE bytes of them kept; uncompressed pixels
    are mapped. Of a pyramid the full resolution is read. All of a 16-bit file is read once beforehand, for its largest
    value says which bits to drop. Threads may share it. ValueError where the file, or later a window, cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._shift = path, 0
        self._tiff = tifffile.TiffFile(path)
        self._series = series = _series(self._tiff)
        self._page = page = series.keyframe
        size = tuple(series.shape[series.axes.index(axis)] for axis in "YX")
        self.shape = (*size, 3)
        self._channels, self._chunk = series.size // (size[0] * size[1]), page.chunks[:2]
        known = page.photometric in (1, 2) or (page.photometric, page.compression) == (6, 7)  # 6, 7: YCbCr, JPEG
        if page.dtype not in (np.uint8, np.uint16) or self._channels > 4 or not known:
            raise ValueError(f"found {page.dtype} in {self._channels} channels, photometric {int(page.photometric)}")
        down, self._across = (-(-s // chunk) for s, chunk in zip(size, self._chunk))
        separate = page.samplesperpixel if page.planarconfig == 2 else 1
        self._planes = [(p, k * down * self._across) for p in series.pages for k in range(separate)]
        bytes_each = self._chunk[0] * self._chunk[1] * page.dtype.itemsize * self._channels // len(self._planes)
        decode = partial(_decode, path, self._tiff.filehandle, page, self._planes, threading.Lock())
        self._segment = lru_cache(max(1, CACHE // bytes_each))(decode)
        self._segment(0, 0)
        if page.dtype == np.uint16:
            rows = (slice(y, min(y + self._chunk[0], size[0])) for y in range(0, size[0], self._chunk[0]))
            self._shift = _shift(max(int(self._stored(row, slice(0, size[1])).max()) for row in rows))

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (slice(*s.indices(length)[:2]) for s, length in zip(place, self.shape))
        return _rgb(self._stored(rows, columns), self._shift)

    def _stored(self, rows: slice, columns: slice) -> np.ndarray:
        """(h, w, channels) as they are in the file."""
        (high, wide), page = self._chunk, self._page
        pixels = np.zeros((rows.stop - rows.start, columns.stop - columns.start, self._channels), page.dtype)
        if self._series.dataoffset is not None:
            dtype = page.dtype.newbyteorder(self._tiff.byteorder)
            # mapped anew each time, which lets go of the pages read before
            mapped = np.memmap(self._path, dtype, "r", self._series.dataoffset, self._series.shape)
            mapped = np.moveaxis(mapped, 0, -1) if self._series.axes[0] in "SC" else mapped
            pixels[:] = mapped[rows, columns].reshape(pixels.shape)
            return pixels
        down = range(rows.start // high, -(-rows.stop // high))
        across = range(columns.start // wide, -(-columns.stop // wide))
        for plane, row, column in product(range(len(self._planes)), down, across):
            if (segment := self._segment(plane, row * self._across + column)) is None:
                continue  # left out of the file: zeros
            top, left = row * high - rows.start, column * wide - columns.start
            part = segment[max(0, -top) : len(pixels) - top, max(0, -left) : pixels.shape[1] - left]
            y, x = max(0, top), max(0, left)
            channels = slice(None) if len(self._planes) == 1 else slice(plane, plane + 1)
            pixels[y : y + part.shape[0], x : x + part.shape[1], channels] = part
        return pixels


def _decode(path, file, keyframe, planes, lock, plane: int, index: int) -> np.ndarray | None:
    """A tile or strip (h, w, channels) of a plane, which is a page and its first segment; None if it has no bytes."""
    page, first = planes[plane]
    offset, count = page.dataoffsets[first + index], page.databytecounts[first + index]
    if not count:
        return None
    with lock:
        file.seek(offset)
        data = file.read(count)
    try:
        return keyframe.decode(data, first + index, jpegtables=page.jpegtables)[0][0]
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: cannot be read ({reason}), expected a whole tiff file") from error


def open_image(path: str | Path) -> "np.ndarray | TiffWindows":
    """An image file as uint8 (H, W, 3): a TIFF over WHOLE px by windows, else whole, as of `read_image`.

    A TIFF whose pixels cannot be read by windows is read whole up to MOST px, and is a ValueError beyond.
    """
    path, pixels = Path(path), 0
    if path.suffix.lower() in TIFF and path.is_file():
        try:
            with tifffile.TiffFile(path) as tiff:
                pixels = tiff.pages[0].imagelength * tiff.pages[0].imagewidth
            if pixels > WHOLE:
                return TiffWindows(path)
        except Exception as error:  # as in _decode
            if pixels > MOST:
                advice = "; pip install imagecodecs reads more" if "imagecodecs" in str(error) else ""
                raise ValueError(f"{path}: cannot be read by windows ({error}){advice}") from error
    return read_image(path)


def read_label(path: str | Path) -> np.ndarray:
    """A label file as int32 (H, W): 0 = background, one id per nucleus, gaps allowed; indices of a palette
    are ids.

    Raises ValueError on RGB, float, negative or over-large (int32) ids, no pixels, and damaged files.
    """
    label = _read_pixels(path := Path(path), LABELS, label=True)
    if label.ndim != 2 or label.dtype.kind not in "uib" or not label.size:
        no = ", not a picture" if label.ndim == 3 else ""
        raise ValueError(f"{path}: found {label.dtype} of shape {label.shape}, expected integer ids (H, W){no}")
    low, high, most = label.min(initial=0), label.max(initial=0), np.iinfo(np.int32).max
    if low < 0 or high > most:
        raise ValueError(f"{path}: found ids in {low}..{high}, expected 0..{most}")
    return np.ascontiguousarray(label, np.int32)


def write_label(path: str | Path, label: np.ndarray) -> None:
    """Writes ids >= 0 (H, W) as a deflated TIFF: uint16, or uint32 where an id is over 65535. Atomic."""
    assert label.ndim == 2 and label.dtype.kind in "ui" and label.min(initial=0) >= 0
    dtype = np.uint16 if label.max(initial=0) <= 65535 else np.uint32
    with atomic(Path(path)) as partial:
        tifffile.imwrite(partial, label.astype(dtype), compression="zlib", photometric="minisblack")


def read_mpp(path: str | Path) -> float | None:
    """Microns per pixel of a TIFF from OME, ImageJ or resolution tags. None where there are none, or where
    they are those of a screen or printer (over 20)."""
    if Path(path).suffix.lower() not in TIFF:
        return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        pixels, unit, text = page.resolution[0], int(page.resolutionunit), page.description
    if ome := re.search(r'PhysicalSizeX="((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"', text):
        named = re.search(r'PhysicalSizeXUnit="([^"]+)"', text)
        mpp = float(ome[1]) * _MICRONS.get(named[1] if named else "µm", 0.0)
    else:
        microns = {2: 25400.0, 3: 10000.0}.get(unit, 0.0)  # of an inch, of a centimetre
        if text.startswith("ImageJ"):
            microns = 1.0 if re.search(r"unit=(micron|um|µm|\\u00B5m)", text) else 0.0
        mpp = microns / pixels if pixels else 0.0
    return mpp if 0 < mpp < 20 else None
