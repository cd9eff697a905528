"""Pixels, labels and metadata of files depend on nothing but the file, whole or by windows."""

import struct
import tracemalloc
from zlib import compress, crc32

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from nucsam.data import find_records, images, slides
from nucsam.data.images import (
    open_image,
    read_image,
    read_label,
    read_mask,
    read_metadata,
    read_mpp,
)
from nucsam.data.samples import Samples
from nucsam.data.slides import TiffWindows
from nucsam.data.summary import inspect_folder
from nucsam.errors import UserError

H, W = 150, 210
PLACES = [
    (0, 0, 150, 210),
    (3, 40, 70, 200),
    (63, 127, 66, 130),
    (140, 190, 500, 400),
    (10, 5, 10, 9),
]
ZIP = {"compression": "zlib"}
TILES = {"tile": (64, 64)} | ZIP
LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 16},
    "deflated strips": {"rowsperstrip": 16} | ZIP,
    "one deflated strip": {"rowsperstrip": H} | ZIP,
    "predictor": {"rowsperstrip": 7, "predictor": True} | ZIP,
    "tiles": {"tile": (64, 48)},
    "deflated tiles": {"tile": (64, 48)} | ZIP,
    "predicted tiles": {"tile": (32, 32), "predictor": True} | ZIP,
    "big-endian": {"tile": (64, 48), "byteorder": ">"},
    "big-endian, one strip": {"byteorder": ">"},
    "BigTIFF": {"tile": (64, 48), "bigtiff": True},
}


def picture(dtype=np.uint8, top: int = 255) -> np.ndarray:
    y, x = np.mgrid[:H, :W]
    image = np.stack([y * W + x, 3 * y * x, y**2 + 5 * x], -1) % (top + 1)
    return image.astype(dtype)


def arranged(image: np.ndarray, channels: str) -> tuple[np.ndarray, dict]:
    """Pixels and options of `tifffile.imwrite` for one way to store channels."""
    separate = image.transpose(2, 0, 1)
    with_alpha = np.dstack([image, image[..., 0]])
    pages = {"photometric": "minisblack", "ome": True, "metadata": {"axes": "CYX"}}
    return {
        "rgb": (image, {"photometric": "rgb"}),
        "rgba": (with_alpha, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "grey": (image[..., 1], {"photometric": "minisblack"}),
        "planes": (separate, {"photometric": "rgb", "planarconfig": "separate"}),
        "pages": (separate, pages),
    }[channels]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, top", [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize("channels", ["rgb", "rgba", "grey", "planes", "pages"])
def test_windows_are_the_whole(tmp_path, layout, dtype, top, channels):
    pixels, options = arranged(picture(dtype, top), channels)
    tifffile.imwrite(path := tmp_path / "a.ome.tif", pixels, **options, **LAYOUTS[layout])
    whole, windows = read_image(path), TiffWindows(path)
    shown = np.dstack([pixels] * 3) if channels == "grey" else picture(dtype, top)
    np.testing.assert_array_equal(whole, shown >> (8 if dtype == np.uint16 else 0))
    assert windows.shape == (H, W, 3)
    for top, left, bottom, right in PLACES:
        window = windows[top:bottom, left:right]
        assert window.dtype == np.uint8
        np.testing.assert_array_equal(window, whole[top:bottom, left:right])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_hot_pixels_change_no_other_pixel(tmp_path, bits):
    """Of windows and of a PNG, dark in https://github.com/danforthcenter/plantcv/issues/1804."""
    image = picture().astype(np.uint16) << (bits - 8)
    image[-1, -20:] = 65535
    tifffile.imwrite(path := tmp_path / "a.tif", image, photometric="rgb", **TILES)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    expected = picture()
    expected[-1, -20:] = 255
    for name in ("a.tif", "a.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)
    np.testing.assert_array_equal(TiffWindows(path)[0:20, 0:20], expected[:20, :20])


def test_alpha_does_not_set_the_bits(tmp_path):
    image = np.dstack([picture().astype(np.uint16) << 4, np.full((H, W), 65535, np.uint16)])
    alpha = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "a.tif", image, **alpha)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    for name in ("a.tif", "a.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), picture())


@pytest.mark.parametrize(
    ("options", "shift"),
    [
        # SignificantBits beside the unit µm: https://github.com/DIAGNijmegen/rse-panimg/issues/107
        ({"ome": True, "metadata": {"axes": "YXS", "SignificantBits": 12}}, 4),
        # Bio-Formats writes 16 where it knows nothing
        ({"ome": True, "metadata": {"axes": "YXS", "SignificantBits": 16}}, 2),
        ({"extratags": [(281, "H", 3, (4095,) * 3, True)]}, 4),
        ({"extratags": [(281, "H", 3, (99,) * 3, True)]}, 2),  # less than the values need
        ({}, 2),
    ],
)
def test_declared_bits_count_where_values_do_not_exceed_them(tmp_path, options, shift):
    """10-bit values of a 12-bit camera: https://github.com/python-pillow/Pillow/issues/2610."""
    image = picture(np.uint16, 1023)
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="rgb", **options)
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif"), image >> shift)


@pytest.mark.parametrize("subifds", [False, True])
def test_of_a_pyramid_the_full_resolution_is_read(tmp_path, subifds):
    options = TILES | {"photometric": "rgb"}
    with tifffile.TiffWriter(path := tmp_path / "a.tif") as tiff:
        tiff.write(picture(), subifds=1 if subifds else None, **options)
        tiff.write(picture()[::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(TiffWindows(path)[0:H, 0:W], picture())
    np.testing.assert_array_equal(read_image(path), picture())


def test_missing_tiles_are_white_in_images_and_background_in_labels(tmp_path):
    first, last = np.full((64, 64), 9, np.uint8), np.full((64, 64), 5, np.uint8)
    options = TILES | {"shape": (128, 128), "dtype": np.uint8, "photometric": "minisblack"}
    tifffile.imwrite(path := tmp_path / "a.tif", iter([first, None, None, last]), **options)
    for blank, read in ((255, lambda path: read_image(path)[..., 0]), (0, read_label)):
        expected = np.full((128, 128), blank)
        expected[:64, :64], expected[64:, 64:] = first, last
        np.testing.assert_array_equal(read(path), expected)


def test_few_segments_are_kept(tmp_path, monkeypatch):
    """At most CACHE bytes, and a window decodes only what is under it."""
    monkeypatch.setattr(slides, "CACHE", 3 * 64 * 64 * 3)
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), **TILES)
    windows = TiffWindows(path)
    assert windows._levels[0]._segment.cache_info().maxsize == 3
    for _ in range(2):
        windows[70:80, 70:80]
    assert windows._levels[0]._segment.cache_info()[:2] == (
        1,
        2,
    )  # hits; misses: opening, the first window
    windows[0:H, 0:W]
    assert windows._levels[0]._segment.cache_info().currsize == 3


def test_large_tiffs_are_opened_by_windows(tmp_path, monkeypatch):
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), tile=(64, 64))
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "WHOLE", H * W)
    assert isinstance(open_image(path), np.ndarray)
    monkeypatch.setattr(images, "WHOLE", H * W - 1)
    assert isinstance(open_image(path), TiffWindows)
    np.testing.assert_array_equal(open_image(path)[0:H, 0:W], picture())
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("kind", ["palette", "cmyk", "ycbcr", "bilevel", "4 bits", "inverted"])
def test_colours_are_those_of_pillow(tmp_path, monkeypatch, kind):
    """Whatever the photometric interpretation: https://github.com/python-pillow/Pillow/pull/9779."""
    path, image = tmp_path / "a.tif", Image.fromarray(picture())
    if kind == "4 bits":
        grey = picture()[..., 0] // 16
        tifffile.imwrite(path, grey, bitspersample=4, photometric="minisblack")
        expected = np.dstack([grey * 17] * 3)
    elif kind == "inverted":
        tifffile.imwrite(path, picture()[..., 0], photometric="miniswhite", **TILES)
        expected = np.dstack([255 - picture()[..., 0]] * 3)
    elif kind == "ycbcr":
        stored = np.asarray(image.convert("YCbCr"))
        tifffile.imwrite(path, stored, photometric="ycbcr", subsampling=(1, 1), **TILES)
        expected = np.asarray(image.convert("YCbCr").convert("RGB"))
    else:
        image = {"palette": image.quantize(64), "bilevel": image.convert("1")}.get(kind) or (
            image.convert("CMYK")
        )
        image.save(path)
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)
    monkeypatch.setattr(images, "WHOLE", 1000)
    np.testing.assert_array_equal(open_image(path)[10:50, 70:90], expected[10:50, 70:90])


@pytest.mark.parametrize("arrangement", ["rgb", "planes", "pages"])
@pytest.mark.parametrize("compression", ["lzw", "zstd", "packbits", "jpeg2000", "webp", "jpegxl"])
def test_pixels_do_not_depend_on_compression(tmp_path, compression, arrangement):
    if compression == "webp" and arrangement != "rgb":
        return  # WebP stores no grey
    pixels, options = arranged(picture(), arrangement)
    lossless = {"webp": {"lossless": True}, "jpegxl": {"lossless": True}}.get(compression)
    options |= {"compression": compression, "compressionargs": lossless, "tile": (64, 48)}
    tifffile.imwrite(path := tmp_path / "a.ome.tif", pixels, **options)
    np.testing.assert_array_equal(read_image(path), picture())


@pytest.mark.parametrize("space", ["rgb", "ycbcr"])
def test_jpeg_of_either_colour_space_is_read(tmp_path, space):
    """Aperio stores both; pink white: https://github.com/cgohlke/tifffile/issues/271."""
    image = np.full((64, 64, 3), (250, 240, 245), np.uint8)
    image[16:48, 16:48] = (120, 40, 130)
    options = {"compression": "jpeg", "tile": (64, 64), "photometric": "rgb"}
    spaces = {"outcolorspace": space}
    tifffile.imwrite(tmp_path / "a.tif", image, compressionargs=spaces, **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.pages[0].photometric.name.lower() == space
    difference = np.abs(read_image(tmp_path / "a.tif").astype(int) - image)
    assert difference[24:40, 24:40].max() < 5 and difference[:8].max() < 5


def test_a_codec_that_fails_is_no_damaged_file(tmp_path, monkeypatch):
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), photometric="rgb", compression="zlib")
    content = path.read_bytes().replace(
        struct.pack("<HHIH", 259, 3, 1, 8), b"\3\1\3\0\1\0\0\0\x99\x99"
    )
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif: cannot be decoded .*39321"):
        read_image(path)


def test_signed_bytes_are_read_as_others(tmp_path):
    grey = np.tile(np.arange(128, dtype=np.int8), (64, 1))
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="minisblack")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], grey)


# ---- orientation ----

# what a viewer does with each orientation, by the letters of the EXIF standard
TURNS = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.swapaxes(image, 0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(np.swapaxes(image, 0, 1), 2),
    8: lambda image: np.rot90(image, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_one_orientation_for_images_labels_masks_and_windows(tmp_path, orientation):
    """Tag 274 on labels: https://github.com/CellProfiler/CellProfiler/issues/317."""
    tag = {"extratags": [(274, "H", 1, orientation, True)]}
    shown, grey = TURNS[orientation](picture()), picture()[..., 0]
    for name, options in (("raw", {}), ("lzw", {"compression": "lzw"}), ("tiles", TILES)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, picture(), photometric="rgb", **options, **tag)
        np.testing.assert_array_equal(read_image(path), shown)
        np.testing.assert_array_equal(TiffWindows(path)[20:90, 5:77], shown[20:90, 5:77])
        tifffile.imwrite(path, grey, photometric="minisblack", **options, **tag)
        np.testing.assert_array_equal(read_label(path), TURNS[orientation](grey))
        np.testing.assert_array_equal(read_mask(path), TURNS[orientation](grey) > 0)
        assert f"orientation tag {orientation}" in read_metadata(path)[1][0]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_exif_turns_a_photograph_and_is_named(tmp_path, suffix):
    """Masks that do not match: https://github.com/wkentaro/labelme/issues/1529.

    6 is clockwise: https://github.com/imageio/imageio/pull/983.
    """
    exif = Image.Exif()
    exif[274] = 6
    for k, folder in enumerate(("images", "labels")):
        (tmp_path / folder).mkdir()
        pixels = np.tile(np.arange(W, dtype=np.uint8) // 10, (H, 1)) if k else picture()
        Image.fromarray(pixels).save(tmp_path / folder / f"a{('.png', suffix)[not k]}", exif=exif)
    path = tmp_path / "images" / f"a{suffix}"
    with Image.open(path) as stored:
        np.testing.assert_array_equal(read_image(path), np.rot90(np.asarray(stored), -1))
    assert read_label(tmp_path / "labels/a.png").shape == (W, H)
    assert "orientation tag 6" in " ".join(inspect_folder(tmp_path)[0]["remarks"])
    with pytest.warns(UserWarning, match="orientation tag 6"):
        Samples(find_records(tmp_path))


# ---- labels and masks ----


def test_labels_are_stored_values(tmp_path):
    """ImageJ inverts masks: https://github.com/MouseLand/cellpose/issues/9.

    A script of Fiji gives floats: https://github.com/angelolab/Nimbus-Inference/issues/18.
    """
    ids = np.arange(H * W).reshape(H, W) // 5000 * 3
    grey = Image.fromarray(ids.astype(np.uint8))
    tifffile.imwrite(tmp_path / "white.tif", ids.astype(np.uint8), photometric="miniswhite")
    tifffile.imwrite(tmp_path / "float.tif", ids.astype(np.float32), compression="lzw")
    tifffile.imwrite(tmp_path / "one.tif", ids[None].astype(np.uint16), imagej=True)
    np.save(tmp_path / "float64.npy", ids[..., None].astype(float))
    shades = (ids // 3).astype(np.uint8)
    tifffile.imwrite(tmp_path / "four.tif", shades, bitspersample=4, photometric="minisblack")
    (tmp_path / "four.png").write_bytes(png_of_4_bits(shades))
    for name in ("white.tif", "float.tif", "one.tif", "float64.npy"):
        np.testing.assert_array_equal(read_label(tmp_path / name), ids)
    for name in ("four.tif", "four.png"):
        np.testing.assert_array_equal(read_label(tmp_path / name), shades)
    clear = Image.fromarray(np.where(ids == 6, 0, 255).astype(np.uint8))
    Image.merge("LA", (grey, clear)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_label(tmp_path / "clear.png"), ids * (ids != 6))


def png_of_4_bits(values: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    rows = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 4, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_label_of_an_array_file_is_a_copy(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((9, 9), np.int32))
    label = read_label(tmp_path / "a.npy")
    label[:] = 2
    assert read_label(tmp_path / "a.npy").max() == 1


@pytest.mark.parametrize(
    "array", [np.ones((2, 70, 90)), np.full((70, 90), 0.5), np.full((70, 90), np.inf)]
)
def test_stacks_and_fractions_are_no_labels(tmp_path, array):
    """Probabilities: https://github.com/chanzuckerberg/napari-cryoet-data-portal/issues/22."""
    tifffile.imwrite(tmp_path / "a.tif", array.astype(np.float32), photometric="minisblack")
    np.save(tmp_path / "a.npy", array)
    for name in ("a.tif", "a.npy"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            read_label(tmp_path / name)


def test_a_mask_marks_what_is_stored_and_not_transparent(tmp_path):
    """Of a palette: https://github.com/facebookresearch/detectron2/issues/1760."""
    marked = np.zeros((70, 90), bool)
    marked[:20, :30] = True
    grey = Image.fromarray((marked * 255).astype(np.uint8))
    palette = Image.fromarray(marked.astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # white where nothing is marked
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "palette.tif")
    tifffile.imwrite(tmp_path / "white.tif", np.asarray(grey), photometric="miniswhite")
    white = Image.new("L", grey.size, 255)
    Image.merge("RGBA", (white, white, white, grey)).save(tmp_path / "alpha.png")
    Image.merge("RGBA", (white, white, white, grey)).save(tmp_path / "alpha.tif")
    clear = Image.fromarray(np.where(marked, 2, 1).astype(np.uint8), "P")
    clear.putpalette([9] * 9)
    clear.save(tmp_path / "clear.png", transparency=1)
    files = list(tmp_path.iterdir())
    assert len(files) == 6
    for path in files:
        np.testing.assert_array_equal(read_mask(path), marked, err_msg=path.name)


def test_an_enormous_label_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    """60,000 x 60,000 px in one strip of a few bytes; and as NPY."""
    tifffile.imwrite(path := tmp_path / "a.tif", np.ones((64, 64), np.uint8), compression="zlib")
    content = path.read_bytes()
    for tag in (256, 257, 278):
        old = struct.pack("<HHIH", tag, 3, 1, 64), struct.pack("<HHII", tag, 4, 1, 64)
        new = struct.pack("<HHII", tag, 4, 1, 60_000)
        content = content.replace(old[0] + b"\0\0", new).replace(old[1], new)
    path.write_bytes(content)
    tracemalloc.start()
    for read in (read_label, read_image, open_image):
        with pytest.raises(UserError, match=r"a\.tif: found 60000x60000 px"):
            read(path)
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (60_000, 60_000))
    with pytest.raises(UserError, match=r"a\.npy: found 60000x60000 px"):
        read_label(tmp_path / "a.npy")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


# ---- which image ----


def test_two_equal_images_are_refused_by_name(tmp_path):
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        tiff.write(picture(), photometric="rgb", tile=(64, 64), compression="zlib", metadata=None)
        tiff.write(picture(), photometric="rgb", tile=(32, 32), metadata=None)
    with pytest.raises(UserError, match=r"two\.tif: found 2 images \(210x150, 210x150 px\)"):
        read_image(tmp_path / "two.tif")


def test_ome_names_of_side_images_are_known(tmp_path):
    """Bio-Formats' form of a slide: label and macro are not marked as smaller."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        for name in ("macro image", "Image 1", "label image"):
            size = slice(None) if name == "Image 1" else slice(0, 90)
            metadata = {"axes": "YXS", "Name": name}
            tiff.write(picture()[size], photometric="rgb", metadata=metadata)
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif"), picture())


# ---- microns per px ----

OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image>'
    '<Pixels SizeX="9" SizeY="9" PhysicalSizeX="5"/></Image><Image><Pixels SizeX="210" '
    "SizeY='150' {}/></Image></OME>"
)


@pytest.mark.parametrize(
    ("mpp", "text"),
    [
        # one of two images has this size, like a slide and its label
        (0.25, OME.format("PhysicalSizeX='0.25' PhysicalSizeXUnit='&#181;m'")),
        # https://github.com/scifio/scifio/issues/318
        (0.108333, OME.format('PhysicalSizeX="108.333" PhysicalSizeXUnit="nm"')),
        (None, OME.format('PhysicalSizeX="0.25" PhysicalSizeXUnit="reference frame"')),
        (None, OME.format('PhysicalSizeX="0.25" PhysicalSizeXUnit="mm"')),
        # https://github.com/ome/bioformats/pull/3676
        (0.5, "ImageJ=1.53\nunit=cm\n"),
        (None, "ImageJ=1.53\nunit=\\u00B5m\n"),
        # https://github.com/DigitalSlideArchive/ImageDePHI/issues/141
        (
            0.263158,
            "Aperio Leica Biosystems Segue v1.0 \n9x9 Q=91|AppMag = 40|MPP = 0.263158|Top = 0",
        ),
        (0.4990, "Aperio Image Library\r\n9x9|AppMag = 20|MPP = 0,4990"),
    ],
)
def test_microns_per_px_of_descriptions(tmp_path, mpp, text):
    resolution = {"resolution": (20000, 20000), "resolutionunit": "NONE"}
    tifffile.imwrite(
        path := tmp_path / "a.tif",
        picture(),
        **resolution,
        photometric="rgb",
        description=text.encode(),
        metadata=None,
    )
    assert read_mpp(path) == (mpp and pytest.approx(mpp))


@pytest.mark.parametrize(("dpi", "mpp"), [(72, None), (300, None), (4800, None), (101600, 0.25)])
def test_the_resolution_of_a_printer_is_ignored_and_named(tmp_path, dpi, mpp):
    """72 dpi taken for 352 µm: https://github.com/ome/bioformats/pull/3535."""
    options = {"resolution": (dpi, dpi), "resolutionunit": "INCH", "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", picture(), **options)
    assert read_mpp(tmp_path / "a.tif") == mpp
    remarks = read_metadata(tmp_path / "a.tif")[1]
    assert len(remarks) == (mpp is None) and all(f"{dpi} dpi" in remark for remark in remarks)


# ---- damage ----


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    """A cut file when it is opened; a tile of garbage when it is reached."""
    monkeypatch.setattr(images, "WHOLE", 1000)
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), **TILES)
    content = bytearray(path.read_bytes())
    cut, floats = tmp_path / "cut.tif", tmp_path / "floats.tif"
    cut.write_bytes(content[: len(content) // 2])
    tifffile.imwrite(floats, picture().astype(np.float32), photometric="rgb")
    for bad in (cut, floats):
        with pytest.raises(UserError, match=bad.name):
            open_image(bad)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    content[offset : offset + count] = b"\x07" * count
    path.write_bytes(content)
    opened = open_image(path)
    np.testing.assert_array_equal(opened[0:64, 0:64], picture()[:64, :64])
    with pytest.raises(UserError, match=r"a\.tif"):
        opened[0:H, 0:W]


def test_an_orientation_that_the_standard_lacks_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[274] = 99
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == picture().shape


ODD = {
    "YCbCr with alpha": ((24, 20, 4), "ycbcr", {"subsampling": (1, 1), "extrasamples": [2]}),
    "CMY": ((24, 20, 3), "rgb", {}),
    "CMYK with one channel": ((24, 20), "minisblack", {}),
}


@pytest.mark.parametrize("name", ODD)
def test_channels_that_do_not_go_with_the_colours_are_refused_or_read(tmp_path, name):
    shape, photometric, options = ODD[name]
    pixels = np.full(shape, 128, np.uint8)
    tifffile.imwrite(path := tmp_path / "a.tif", pixels, photometric=photometric, **options)
    if name == "YCbCr with alpha":
        np.testing.assert_array_equal(read_image(path), np.full((24, 20, 3), 128))
    else:
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tiff.pages[0].tags["PhotometricInterpretation"].overwrite(5)
        with pytest.raises(UserError, match=r"a\.tif: found \d channels of SEPARATED"):
            read_image(path)


def test_a_palette_image_without_its_palette_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    colours = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(path, picture()[..., 0], photometric="palette", colormap=colours)
    tag = struct.pack("<H", 320)  # ColorMap
    data = path.read_bytes()
    assert data.count(tag + struct.pack("<H", 3)) == 1
    path.write_bytes(data.replace(tag + struct.pack("<H", 3), struct.pack("<HH", 65000, 3)))
    with pytest.raises(UserError, match=r"a\.tif: found a palette image without its palette"):
        read_image(path)


def test_an_image_in_several_files_is_refused(tmp_path):
    """Channels of an OME-TIFF that lie in a file each."""
    planes = picture().transpose(2, 0, 1)
    names = [f"m{k}.ome.tif" for k in range(3)]
    blocks = "".join(
        f'<TiffData FirstC="{k}" IFD="0" PlaneCount="1"><UUID FileName="{name}">urn:uuid:'
        f"00000000-0000-0000-0000-00000000000{k}</UUID></TiffData>"
        for k, name in enumerate(names)
    )
    for k, name in enumerate(names):
        ome = (
            '<?xml version="1.0" encoding="UTF-8"?><OME '
            'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:00000000-0000-0000-0000-00000000000{k}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeC="3" SizeT="1" '
            f'SizeZ="1" SizeX="{W}" SizeY="{H}">{blocks}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / name, planes[k], description=ome, metadata=None, compression="zlib"
        )
    assert tifffile.imread(tmp_path / names[1]).shape == (3, H, W)
    with pytest.raises(UserError, match=r"m1\.ome\.tif: found an image .* several files"):
        read_image(tmp_path / names[1])
