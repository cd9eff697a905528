"""Image and label files <-> arrays.

Images are PNG, TIFF, JPEG or BMP; labels TIFF, PNG or NPY, 0 = background and one id per nucleus.
"""

import logging
import os
import re
from pathlib import Path

import numpy as np
import tifffile

TIFF = (".tif", ".tiff")
IMAGES = (".png", *TIFF, ".jpg", ".jpeg", ".bmp")
LABELS = (*TIFF, ".png", ".npy")

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # our ValueError says what it would print


def _read_pillow(path: Path, label: bool) -> np.ndarray:
    from PIL import Image

    formats = ("TIFF",) if path.suffix.lower() in TIFF else ("PNG",) if label else ("PNG", "JPEG", "BMP")
    with Image.open(path, formats=formats) as image:
        image.verify()  # a PNG's checksums, which reading its pixels does not look at
    with Image.open(path, formats=formats) as image:
        if image.format == "PNG" and image.n_frames > 1:
            raise ValueError(f"found {image.n_frames} frames, expected one image")
        stored = label or image.mode in ("1", "L", "RGB", "RGBA", "F") or image.mode.startswith("I")
        return np.asarray(image if stored else image.convert("RGB"))


def _read_tiff(path: Path, label: bool) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        if not tiff.pages:
            raise ValueError("found no page")
        file, size = tiff.filehandle, tiff.tiff.offsetsize
        file.seek(tiff.pages.next_page_offset)
        if file.read(size) != bytes(size):  # tifffile leaves out the pages that it cannot reach
            raise ValueError(f"found {len(tiff.pages)} page(s) and no end of the page table in {file.size} bytes")
        images = [series for series in tiff.series[1:] if not series.keyframe.subfiletype & 1]  # 1: a smaller copy
        if images:
            raise ValueError(f"found {1 + len(images)} images, expected one")
        series, page = tiff.series[0], tiff.pages[0]
        if series.axes not in ("YX", "YXS", "SYX", "CYX"):
            raise ValueError(f"found axes {series.axes} of shape {series.shape}, expected one image")
        # tifffile gives zeros for what lies behind the end of a truncated file
        end = max(sum(part) for page in series.pages for part in zip(page.dataoffsets, page.databytecounts))
        if end > file.size:
            raise ValueError(f"found {file.size} of {end} bytes")
        # tifffile alone has no LZW or JPEG, and leaves palettes and inverted grey as they are
        if page.compression in (1, 8, 32946) and page.predictor == 1 and (label or page.photometric in (1, 2)):
            pixels = series.asarray()
            return np.moveaxis(pixels, 0, -1) if series.axes[0] in "SC" else pixels
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
    if pixels.dtype != np.uint8:
        pixels = (pixels >> (8 if high > 4095 else 4 if high > 255 else 0)).astype(np.uint8)
    pixels = pixels.reshape(shape)
    return np.array(pixels[..., :3] if shape[2] > 2 else pixels[..., [0, 0, 0]], order="C")  # writable


def read_label(path: str | Path) -> np.ndarray:
    """A label file as int32 (H, W): 0 = background, one id per nucleus, gaps allowed; indices of a palette
    are ids.

    Raises ValueError on RGB, float, negative or over-large (int32) ids, no pixels, and damaged files.
    """
    label = _read_pixels(path := Path(path), LABELS, label=True)
    if label.ndim != 2 or label.dtype.kind not in "uib" or not label.size:
        raise ValueError(f"{path}: found {label.dtype} of shape {label.shape}, expected integer ids (H, W)")
    low, high, most = label.min(initial=0), label.max(initial=0), np.iinfo(np.int32).max
    if low < 0 or high > most:
        raise ValueError(f"{path}: found ids in {low}..{high}, expected 0..{most}")
    return np.ascontiguousarray(label, np.int32)


def write_label(path: str | Path, label: np.ndarray) -> None:
    """Writes ids >= 0 (H, W) as a deflated TIFF: uint16, or uint32 where an id is over 65535. Atomic."""
    assert label.ndim == 2 and label.dtype.kind in "ui" and label.min(initial=0) >= 0
    dtype = np.uint16 if label.max(initial=0) <= 65535 else np.uint32
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        tifffile.imwrite(partial, label.astype(dtype), compression="zlib", photometric="minisblack")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
        mpp = float(ome[1]) * {"nm": 1e-3, "mm": 1e3}.get(named[1] if named else "", 1.0)
    else:
        microns = {2: 25400.0, 3: 10000.0}.get(unit, 0.0)  # of an inch, of a centimetre
        if text.startswith("ImageJ"):
            microns = 1.0 if re.search(r"unit=(micron|um|µm|\\u00B5m)", text) else 0.0
        mpp = microns / pixels if pixels else 0.0
    return mpp if 0 < mpp < 20 else None
