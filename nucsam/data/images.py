"""Image and label files as arrays.

Images are PNG, JPEG, BMP, TIFF, or slides of scanners. Labels are TIFF, PNG or NPY: 0 = background,
one id per nucleus. The suffix alone decides what reads a file: Pillow, or `nucsam.data.slides`.

An orientation tag, of TIFF or EXIF, turns images, labels and masks alike, as every viewer does.
"""

import math
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import tifffile

from nucsam.data import published, slides
from nucsam.data.slides import SCANNERS, TIFF, Windows, check_size, decoding, turned
from nucsam.errors import UserError
from nucsam.files import atomic, check_regular_file

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
IMAGES = (*PICTURES, *TIFF, *SCANNERS)
ANY = ("PNG", "JPEG", "BMP")  # what a picture may be, whatever its suffix
LABELS = (".tif", ".tiff", ".png", ".npy")

WHOLE = 2**22  # px: largest TIFF without a pyramid that `open_image` reads whole at once
FINEST, COARSEST = 0.05, 4.0  # microns per px of microscopes

# Microns of the units that OME, ImageJ and TIFF name. Normalised, both letters µ are a Greek one.
_NAMES = {
    1e-3: "nm nanometer",
    1.0: "um μm micron microns micrometer micrometre",
    1e3: "mm millimeter",
    1e4: "cm centimeter",
    25400.0: "in inch",
    1e6: "m meter",
}
MICRONS = {name: microns for microns, names in _NAMES.items() for name in names.split()}


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file in colour.

    Grey is repeated, palettes are looked up, white-is-zero is inverted and alpha is dropped.
    `nucsam.data.slides` says how 16 bits become 8.

    Args:
        path: a file of one of IMAGES.

    Returns:
        uint8 (H, W, 3), 0..255.

    Raises:
        UserError: the file is damaged, has other values, another shape or more than MOST px.
    """
    path = Path(path)
    if published.is_slice(path):
        return published.read_picture(path)
    if _suffix(path, IMAGES) not in PICTURES:
        image = _open_windows(path)
        check_size(path, image.shape)
        return image[:, :]
    pixels, _ = _read_picture(path, ANY, colour=True)
    if pixels.dtype == np.uint16:
        counts = np.bincount(pixels.ravel(), minlength=2**16)
        pixels = slides.to_bytes(pixels, slides.used_bits(counts))
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    return np.ascontiguousarray(pixels)


def open_image(path: str | Path) -> np.ndarray | Windows:
    """Read an image, or open it by windows: a slide, and a TIFF with a pyramid or over WHOLE px.

    Args:
        path: as in `read_image`.

    Returns:
        uint8 (H, W, 3), or an object that is sliced like it.

    Raises:
        UserError: as in `read_image`.
    """
    path = Path(path)
    if published.is_slice(path) or _suffix(path, IMAGES) in PICTURES:
        return read_image(path)
    image = _open_windows(path)
    whole = len(image.sizes) == 1 and math.prod(image.sizes[0]) <= WHOLE
    return image[:, :] if whole and isinstance(image, slides.TiffWindows) else image


def _open_windows(path: Path) -> Windows:
    return slides.TiffWindows(path) if path.suffix.lower() in TIFF else slides.ScannerWindows(path)


def read_label(path: str | Path) -> np.ndarray:
    """Read a label file: its stored values, without a look-up in a palette and without inversion.

    Args:
        path: a TIFF, PNG or NPY file of whole numbers >= 0, of any type.

    Returns:
        int32 (H, W): 0 = background, one id per nucleus, gaps allowed. 0 where alpha is 0.

    Raises:
        UserError: the file is damaged, is RGB or a stack, has no pixels or more than MOST px, or
            has ids that int32 cannot hold.
    """
    path = Path(path)
    label, alpha = _stored(path, LABELS)
    whole = label.dtype.kind in "uib" or (
        label.dtype.kind == "f" and bool((np.rint(label) == label).all())
    )
    if label.ndim != 2 or not whole or not label.size:
        found = f"{label.dtype} of shape {label.shape}"
        raise UserError(f"{path}: found {found}, expected integer ids (H, W)")
    low, high, largest = label.min(), label.max(), np.iinfo(np.int32).max
    if low < 0 or high > largest:
        raise UserError(f"{path}: found ids in {low}..{high}, expected 0..{largest}")
    label = np.ascontiguousarray(label, np.int32)
    return label if alpha is None else label * (alpha > 0)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask: stored values other than 0 are marked, except where alpha is 0.

    Args:
        path: a PNG, JPEG, BMP or TIFF file.

    Returns:
        bool (H, W).

    Raises:
        UserError: the file is damaged, or has other values or another shape.
    """
    path = Path(path)
    values, alpha = _stored(path, (*PICTURES, *TIFF))
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels > 4 or values.dtype.kind not in "uib":
        found = f"{values.dtype} of shape {values.shape}"
        raise UserError(f"{path}: found {found}, expected integers (H, W) or (H, W, 1 to 4)")
    marked = values != 0 if values.ndim == 2 else values.any(-1)
    return marked if alpha is None else marked & (alpha > 0)


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


# ---- values as they are stored ----


def _suffix(path: Path, suffixes: Sequence[str]) -> str:
    """The suffix in lower case, if it is one of these and the file is a file."""
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(f"{path}: found {suffix or 'no'} suffix, expected {', '.join(suffixes)}")
    check_regular_file(path)
    return suffix


def _stored(path: Path, suffixes: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (H, W) or (H, W, C), and alpha (H, W) or None."""
    suffix = _suffix(path, suffixes)
    if suffix in PICTURES:
        return _read_picture(path, ("PNG",) if suffixes is LABELS else ANY, colour=False)
    with decoding(path):
        return _read_npy(path) if suffix == ".npy" else _read_tiff(path)


def _read_npy(path: Path) -> tuple[np.ndarray, None]:
    values = np.lib.format.open_memmap(path, mode="r")  # takes no memory
    while values.ndim > 2 and 1 in values.shape:
        values = values.squeeze(values.shape.index(1))
    check_size(path, (*values.shape, 1))
    return np.array(values), None


def _read_tiff(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    tiff, series = slides.open_tiff(path)
    check_size(path, (series.keyframe.imagelength, series.keyframe.imagewidth))
    pixels = slides.TiffPixels(path, tiff, series)
    height, width = pixels.size
    values, alpha = pixels[0:height, 0:width], None
    if pixels.alpha:
        values, alpha = values[..., :-1], values[..., -1]
    return values[..., 0] if values.shape[2] == 1 else values, alpha


def _read_picture(
    path: Path, formats: Sequence[str], *, colour: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels of a PNG, JPEG or BMP, turned, and alpha (H, W) or None.

    Args:
        path: the file.
        formats: what the file may be.
        colour: whether to convert to RGB what has 8 bits. Otherwise palettes are not looked up.
    """
    from PIL import Image

    with decoding(path):
        try:
            with Image.open(path, formats=formats) as image:
                check_size(path, image.size[::-1])
                image.verify()  # the checksums of a PNG, which reading its pixels skips
        except Image.DecompressionBombError as error:
            expected = "expected a tiled TIFF, which is read by windows"
            raise UserError(f"found too many px ({error}), {expected}") from error
        with Image.open(path, formats=formats) as image:
            if image.format == "PNG" and image.n_frames > 1:
                raise UserError(f"found {image.n_frames} frames, expected one image")
            pixels, alpha = _decode_picture(path, image, colour)
            orientation = _orientation(image)
    return turned(pixels, orientation), None if alpha is None else turned(alpha, orientation)


def _decode_picture(path: Path, image, colour: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and alpha of an open Pillow image, which gives PNGs of 16 bits only 8."""
    bits, alpha = 8, None
    if image.format == "PNG":
        with path.open("rb") as file:
            bits = file.read(25)[24]  # of the header
    if bits == 16:
        pixels = import_module("imagecodecs").png_decode(path.read_bytes())
    elif colour:
        pixels = np.asarray(image.convert("RGB"))
    else:
        pixels = np.asarray(image)
        if image.mode == "L" and bits < 8:  # Pillow has scaled them
            pixels = pixels // (255 // (2**bits - 1))
        if image.mode == "P" and image.has_transparency_data:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels, alpha = pixels[..., :-1], pixels[..., -1]
    return (pixels[..., 0] if pixels.shape[2:] == (1,) else pixels), alpha


def _orientation(image) -> int:
    """The orientation of a Pillow image, 1 to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking for its EXIF would decode it
    tag = image.getexif().get(274, 1)
    return tag if tag in range(1, 9) else 1


# ---- metadata ----


def read_mpp(path: str | Path) -> float | None:
    """Read the microns per pixel of a TIFF or a slide.

    A TIFF has them in OME-XML, in Aperio's or ImageJ's description, or in its resolution tags.

    Args:
        path: an image file.

    Returns:
        Microns per px. None where the file has none, or a value outside FINEST to COARSEST, such as
        a printer's resolution.
    """
    return read_metadata(Path(path))[0]


def check_mpp(mpp: float | None) -> None:
    """Check that microns per px, where they are given, are those of a microscope.

    Raises:
        UserError: they are not between FINEST and COARSEST.
    """
    try:
        if mpp is None or FINEST <= mpp <= COARSEST:
            return
        found = f"{mpp:g}"
    except (TypeError, ValueError):  # text, or several numbers
        found = repr(mpp)
    raise UserError(f"mpp: found {found}, expected {FINEST:g} to {COARSEST:g} microns per px")


def read_metadata(path: Path) -> tuple[float | None, list[str]]:
    """The microns per px of `read_mpp`, and what a user must know of how an image file is read.

    The remarks are on its orientation, and on a resolution that is ignored.
    """
    suffix = path.suffix.lower()
    orientation, sizes = 1, []
    if suffix in SCANNERS:
        sizes = [float(slides.open_slide(path).properties.get("openslide.mpp-x", 0))]
    elif suffix in TIFF:
        tiff, series = slides.open_tiff(path)
        with tiff:
            orientation = series.keyframe.tags.valueof(274, 1)
            sizes = _tiff_sizes(tiff, series.keyframe)
    elif suffix in PICTURES:
        from PIL import Image

        with decoding(path), Image.open(path) as image:
            orientation = _orientation(image)
    remarks = []
    if orientation in range(2, 9):
        turn = f"orientation tag {orientation} turns the image"
        remarks.append(f"{turn}, and labels must match the turned image")
    sizes = [size for size in sizes if size]
    mpp = next((size for size in sizes if FINEST <= size <= COARSEST), None)
    if sizes and not mpp:
        dpi = 25400 / sizes[-1]
        remarks.append(f"{dpi:.0f} dpi is no microscope's resolution, so nucsam ignores it")
    return mpp, remarks


def _tiff_sizes(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> list[float | None]:
    """Microns per px as each kind of metadata says, the most trusted first."""
    pixels = slides.ome_pixels(tiff, page)
    sizes = [_times(pixels.get("PhysicalSizeX"), pixels.get("PhysicalSizeXUnit", "um"))]
    text = tiff.pages.first.description
    if text.startswith("Aperio"):
        sizes.append(_times(_fields(text.split("|")).get("MPP"), "um"))
    resolution = page.resolution[0]
    per_px = 1 / resolution if resolution else None
    if text.startswith("ImageJ"):
        unit = _fields(text.splitlines()).get("unit", "")
        sizes.append(_times(per_px, unit.replace("\\u00B5", "u")))
    unit = {2: "inch", 3: "cm"}.get(int(page.resolutionunit), "")
    return [*sizes, _times(per_px, unit)]


def _fields(parts: Sequence[str]) -> dict[str, str]:
    """Name -> value of texts `name = value`."""
    pairs = (part.partition("=") for part in parts)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _times(number: str | float | None, unit: str) -> float | None:
    """Microns of a length; None where it is not one. Some writers use a decimal comma."""
    try:
        value = float(str(number).replace(",", "."))
    except ValueError:
        return None
    microns = MICRONS.get(unicodedata.normalize("NFKC", unit).strip().lower(), 0.0)
    return value * microns if math.isfinite(value) and value * microns > 0 else None
