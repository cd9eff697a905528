"""Large TIFFs read by windows: the same pixels as read whole, whatever their layout."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucsam.data import images, slides
from nucsam.data.images import open_image, read_image
from nucsam.data.slides import TiffWindows
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
    assert windows.shape == whole.shape == (H, W, 3)
    assert len(np.unique(whole)) > 100
    for top, left, bottom, right in PLACES:
        window = windows[top:bottom, left:right]
        assert window.dtype == np.uint8
        np.testing.assert_array_equal(window, whole[top:bottom, left:right])


@pytest.mark.parametrize("top, shift", [(65535, 8), (4096, 8), (4095, 4), (256, 4), (255, 0)])
def test_all_windows_of_a_16_bit_image_drop_the_same_bits(tmp_path, top, shift):
    """The brightest pixel is in the last corner, and a window elsewhere must know of it."""
    image = np.full((H, W), 150, np.uint16)
    image[-1, -1] = top
    tifffile.imwrite(path := tmp_path / "a.tif", image, **TILES)
    assert (TiffWindows(path)[0:20, 0:20] == 150 >> shift).all()
    np.testing.assert_array_equal(TiffWindows(path)[0:H, 0:W], read_image(path))


@pytest.mark.parametrize("subifds", [False, True])
def test_of_a_pyramid_the_full_resolution_is_read(tmp_path, subifds):
    options = TILES | {"photometric": "rgb"}
    with tifffile.TiffWriter(path := tmp_path / "a.tif") as tiff:
        tiff.write(picture(), subifds=1 if subifds else None, **options)
        tiff.write(picture()[::2, ::2], subfiletype=1, **options)
    np.testing.assert_array_equal(TiffWindows(path)[0:H, 0:W], picture())


def test_missing_tiles_are_black(tmp_path):
    first, last = np.full((64, 64, 3), 9, np.uint8), np.full((64, 64, 3), 5, np.uint8)
    options = TILES | {"shape": (128, 128, 3), "dtype": np.uint8, "photometric": "rgb"}
    tifffile.imwrite(path := tmp_path / "a.tif", iter([first, None, None, last]), **options)
    expected = np.zeros((128, 128, 3), np.uint8)
    expected[:64, :64], expected[64:, 64:] = first, last
    np.testing.assert_array_equal(TiffWindows(path)[0:128, 0:128], expected)


def test_few_segments_are_kept(tmp_path, monkeypatch):
    """At most CACHE bytes, and a window decodes only what is under it."""
    monkeypatch.setattr(slides, "CACHE", 3 * 64 * 64 * 3)
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), **TILES)
    windows = TiffWindows(path)
    assert windows._segment.cache_info().maxsize == 3
    for _ in range(2):
        windows[70:80, 70:80]
    assert windows._segment.cache_info()[:2] == (1, 2)  # hits; misses: opening, the first window
    windows[0:H, 0:W]
    assert windows._segment.cache_info().currsize == 3


def test_large_tiffs_are_opened_by_windows(tmp_path, monkeypatch):
    tifffile.imwrite(path := tmp_path / "a.tif", picture(), tile=(64, 64))
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "WHOLE", H * W)
    assert isinstance(open_image(path), np.ndarray)
    monkeypatch.setattr(images, "WHOLE", H * W - 1)
    assert isinstance(open_image(path), TiffWindows)
    np.testing.assert_array_equal(open_image(path)[0:H, 0:W], picture())
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "jpeg", "palette"])
def test_what_windows_cannot_read_is_read_whole(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(images, "WHOLE", 1000)
    image, options = Image.fromarray(picture()), {"compression": compression}
    if compression == "palette":
        image, options = image.quantize(64), {}
    image.save(path := tmp_path / "a.tif", **options)
    expected = np.asarray(image.convert("RGB"))
    if compression == "jpeg":  # which loses
        expected = np.asarray(Image.open(path))
    np.testing.assert_array_equal(open_image(path)[0:H, 0:W], expected)


def test_too_large_to_be_read_whole_is_refused(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(path := tmp_path / "a.tif", compression="tiff_lzw")
    monkeypatch.setattr(TiffWindows, "__init__", lambda self, path: 1 / 0)  # as without a decoder
    monkeypatch.setattr(images, "WHOLE", 10)
    monkeypatch.setattr(images, "MOST", H * W)
    np.testing.assert_array_equal(open_image(path), picture())
    monkeypatch.setattr(images, "MOST", H * W - 1)
    with pytest.raises(UserError, match=r"a\.tif"):
        open_image(path)


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
