"""Large TIFFs read by windows: the same pixels as read whole, whatever their layout."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucsam import images
from nucsam.images import TiffWindows, open_image, read_image

H, W = 150, 210
PLACES = [np.s_[0:150, 0:210], np.s_[3:70, 40:200], np.s_[63:66, 127:130], np.s_[140:500, 190:400], np.s_[10:10, 5:9]]


def picture(dtype=np.uint8, top: int = 255) -> np.ndarray:
    y, x = np.mgrid[:H, :W]
    image = np.stack([y * W + x, 3 * y * x, y**2 + 5 * x], -1) % (top + 1)
    return image.astype(dtype)


LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 16},
    "deflated strips": {"rowsperstrip": 16, "compression": "zlib"},
    "one deflated strip": {"rowsperstrip": H, "compression": "zlib"},
    "predictor": {"rowsperstrip": 7, "compression": "zlib", "predictor": True},
    "tiles": {"tile": (64, 48)},
    "deflated tiles": {"tile": (64, 48), "compression": "zlib"},
    "predicted tiles": {"tile": (32, 32), "compression": "zlib", "predictor": True},
    "big-endian": {"tile": (64, 48), "byteorder": ">"},
    "big-endian, one strip": {"byteorder": ">"},
    "BigTIFF": {"tile": (64, 48), "bigtiff": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, top", [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize("channels", ["rgb", "rgba", "grey", "planes", "pages"])
def test_windows_are_the_whole(tmp_path, layout, dtype, top, channels):
    options, image = dict(LAYOUTS[layout]), picture(dtype, top)
    if channels == "rgba":
        image, options = np.dstack([image, image[..., 0]]), options | {"extrasamples": ["unassalpha"]}
    image = {"grey": image[..., 1], "planes": image.transpose(2, 0, 1), "pages": image.transpose(2, 0, 1)}.get(
        channels, image
    )
    options["photometric"] = "minisblack" if channels in ("grey", "pages") else "rgb"
    if channels == "planes":
        options["planarconfig"] = "separate"
    if channels == "pages":
        options |= {"ome": True, "metadata": {"axes": "CYX"}}
    tifffile.imwrite(path := tmp_path / "a.ome.tif" if channels == "pages" else tmp_path / "a.tif", image, **options)
    whole, windows = read_image(path), TiffWindows(path)
    assert windows.shape == whole.shape == (H, W, 3)
    assert len(np.unique(whole)) > 100
    for place in PLACES:
        found = windows[place]
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, whole[place])


@pytest.mark.parametrize("top, shift", [(65535, 8), (4000, 4), (200, 0)])
def test_all_windows_of_a_16_bit_image_drop_the_same_bits(tmp_path, top, shift):
    """The brightest pixel is in the last corner, and a window elsewhere must know of it."""
    image = np.full((H, W), 150, np.uint16)
    image[-1, -1] = top
    tifffile.imwrite(path := tmp_path / "a.tif", image, tile=(64, 64), compression="zlib")
    assert (TiffWindows(path)[0:20, 0:20] == 150 >> shift).all()
    np.testing.assert_array_equal(TiffWindows(path)[0:H, 0:W], read_image(path))


@pytest.mark.parametrize("subifds", [False, True])
def test_of_a_pyramid_the_full_resolution_is_read(tmp_path, subifds):
    image = picture()
    with tifffile.TiffWriter(path := tmp_path / "a.tif") as tiff:
        options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb"}
        tiff.write(image, subifds=1 if subifds else None, **options)
        tiff.write(image[::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(TiffWindows(path)[0:H, 0:W], image)


def test_missing_tiles_are_black(tmp_path):
    with tifffile.TiffWriter(path := tmp_path / "a.tif") as tiff:
        blocks = iter([np.full((64, 64, 3), 9, np.uint8), None, None, np.full((64, 64, 3), 5, np.uint8)])
        tiff.write(blocks, shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb", compression="zlib")
    found = TiffWindows(path)[0:128, 0:128]
    assert [int(found[y, x].sum()) for y, x in ((0, 0), (0, 64), (64, 0), (127, 127))] == [27, 0, 0, 15]


def test_few_segments_are_kept(tmp_path, monkeypatch):
    """At most CACHE bytes, and a window decodes only what is under it."""
    monkeypatch.setattr(images, "CACHE", 3 * 64 * 64 * 3)
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), tile=(64, 64), compression="zlib")
    windows = TiffWindows(path)
    assert windows._segment.cache_info().maxsize == 3
    windows[70:80, 70:80], windows[70:80, 70:80]
    assert windows._segment.cache_info()[:2] == (1, 2)  # found, decoded: one when opened, one here
    windows[0:H, 0:W]
    assert windows._segment.cache_info().currsize == 3


def test_large_tiffs_are_opened_by_windows(tmp_path, monkeypatch):
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), tile=(64, 64))
    assert isinstance(open_image(path), np.ndarray)
    monkeypatch.setattr(images, "WHOLE", 1000)
    opened = open_image(path)
    assert isinstance(opened, TiffWindows)
    np.testing.assert_array_equal(opened[0:H, 0:W], picture())
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), picture())


def test_what_windows_cannot_read_is_read_whole(tmp_path, monkeypatch):
    """Palettes, and compressions that tifffile lacks."""
    monkeypatch.setattr(images, "WHOLE", 1000)
    palette = Image.fromarray(picture()).quantize(64)
    palette.save(tmp_path / "palette.tif")
    np.testing.assert_array_equal(open_image(tmp_path / "palette.tif"), np.asarray(palette.convert("RGB")))
    for compression in ("tiff_lzw", "packbits", "jpeg"):
        Image.fromarray(picture()).save(path := tmp_path / "a.tif", compression=compression)
        np.testing.assert_array_equal(open_image(path)[0:H, 0:W], read_image(path))
    Image.fromarray(picture()).save(path := tmp_path / "lzw.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(open_image(path)[0:H, 0:W], picture())
    tifffile.imwrite(tmp_path / "float.tif", picture().astype(np.float32), photometric="rgb")
    with pytest.raises(ValueError, match=r"float.tif: found float32 .* expected 8 or 16 bits"):
        open_image(tmp_path / "float.tif")


def test_too_large_to_be_read_whole_says_what_to_install(tmp_path, monkeypatch):
    def none(self, path):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    tifffile.imwrite(path := tmp_path / "a.tif", picture())
    monkeypatch.setattr(images, "WHOLE", 10)
    monkeypatch.setattr(images, "MOST", 100)
    monkeypatch.setattr(TiffWindows, "__init__", none)
    with pytest.raises(ValueError, match=r"a.tif: cannot be read by windows .*LZW.*; pip install imagecodecs"):
        open_image(path)


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    """A cut file when it is opened; a tile of garbage when it is reached."""
    monkeypatch.setattr(images, "WHOLE", 1000)
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), tile=(64, 64), compression="zlib")
    content = bytearray(path.read_bytes())
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut.tif: cannot be read"):
        open_image(tmp_path / "cut.tif")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[-1], tiff.pages[0].databytecounts[-1]
    content[offset : offset + count] = b"\x07" * count
    path.write_bytes(content)
    opened = open_image(path)
    np.testing.assert_array_equal(opened[0:64, 0:64], picture()[:64, :64])
    with pytest.raises(ValueError, match=r"a.tif: cannot be read .* expected a whole tiff file"):
        opened[0:H, 0:W]
