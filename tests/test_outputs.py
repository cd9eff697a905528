"""The files of an image, written window by window."""

import csv
import json

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.measure import regionprops

from nucsam import draw, geojson, outputs
from nucsam.images import read_label
from nucsam.outputs import LabelBlocks, Overlay
from nucsam.tiles import Window, own, windows

SIZE = (700, 1100)
ALL = ("labels", "geojson", "csv", "overlay")


@pytest.fixture(scope="module")
def scene():
    """An image, and 400 rectangles on it, ids 1.. in no order, that meet the blocks' and windows' borders."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    label = np.zeros(SIZE, np.int32)
    for k in range(400):
        y, x, h, w = *rng.integers(0, (690, 1090)), *rng.integers(3, 40, 2)
        place = label[y : y + h, x : x + w]
        if not place.any():
            place[:] = k + 1
    return image, label


def found(label, core=200, margin=60):
    """What a predictor gives: windows and the nuclei that they own."""
    for window in windows(label.shape, core, margin):
        yield window, own(label[window.outer], window)


def rows(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def same_nuclei(a, b) -> bool:
    """Whether two label maps are equal but for their ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return all(len(np.unique(side)) == pairs.shape[1] for side in pairs) and bool(
        (pairs[0] > 0).tolist() == (pairs[1] > 0).tolist()
    )


@pytest.mark.parametrize("core", [200, 5000])
def test_every_file_tells_of_the_same_nuclei(scene, tmp_path, core):
    image, label = scene
    files = outputs.files(tmp_path / "new", "a b", ALL)
    assert outputs.write(files, image, found(label, core), mpp=0.25) == (count := len(np.unique(label)) - 1)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {
        "new/a b.tif",
        "new/a b.geojson",
        "new/a b.csv",
        "new/overlays/a b.png",
    }
    written = read_label(files["labels"])
    assert same_nuclei(written, label)
    assert np.unique(written).tolist() == list(range(count + 1))
    np.testing.assert_array_equal(geojson.read(files["geojson"], SIZE), written)  # ids are the order of the file
    table = rows(files["csv"])
    regions = regionprops(written)
    assert [row["id"] for row in table] == [region.label for region in regions]
    for row, region in zip(table, regions):
        y, x = region.centroid
        assert (row["centroid_y"], row["centroid_x"]) == pytest.approx((y + 0.5, x + 0.5), rel=1e-5)
        assert (row["centroid_x_um"], row["area_um2"]) == pytest.approx(((x + 0.5) / 4, region.area / 16), rel=1e-5)
        assert row["area_px"] == region.area
        assert row["mean_red"] == pytest.approx(image[..., 0][written == row["id"]].mean(), rel=1e-5)
    measured = json.loads(files["geojson"].read_text())["features"][7]["properties"]["measurements"]
    assert measured == pytest.approx(table[7], rel=1e-5)
    with Image.open(files["overlay"]) as picture:
        pixels = np.asarray(picture)
    edge = (pixels == draw.PREDICTION).all(-1)
    np.testing.assert_array_equal(pixels[~edge], image[~edge])
    assert not edge[label == 0].any() and edge[label > 0].mean() > 0.1


def test_the_windows_change_no_byte_but_ids(scene, tmp_path):
    image, label = scene
    pictures = []
    for core in (200, 5000):
        files = outputs.files(tmp_path / str(core), "a", ["overlay"])
        outputs.write(files, image, found(label, core))
        pictures.append(files["overlay"].read_bytes())
    assert pictures[0] == pictures[1]


def test_an_image_without_nuclei(tmp_path):
    files = outputs.files(tmp_path, "a", ALL)
    image = np.zeros((16, 16, 3), np.uint8)
    assert outputs.write(files, image, found(np.zeros((16, 16), np.int32))) == 0
    assert not read_label(files["labels"]).any()
    assert json.loads(files["geojson"].read_text()) == {"type": "FeatureCollection", "features": []}
    assert files["csv"].read_text().startswith("id,centroid_x,centroid_y,area_px,")
    assert rows(files["csv"]) == []
    assert Image.open(files["overlay"]).size == (16, 16)


@pytest.mark.parametrize("before", ["", "old"])
def test_all_files_or_none(scene, tmp_path, before):
    image, label = scene
    files = outputs.files(tmp_path, "a", ALL)

    def torn():
        yield next(found(label))
        raise ValueError("torn.tif: cannot be read")

    if before:
        files["labels"].write_text(before)
    with pytest.raises(ValueError, match=r"torn\.tif"):
        outputs.write(files, image, torn())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == (["a.tif"] if before else [])
    assert not before or files["labels"].read_text() == before


@pytest.mark.parametrize("mpp", [None, 0.5])
def test_large_label_maps_are_tiled_bigtiff(tmp_path, mpp):
    label = np.zeros((2100, 520), np.int32)
    label[2090:, 500:] = 1
    label[500:530, 500:515] = 2
    files = outputs.files(tmp_path, "a", ["labels"])
    outputs.write(files, np.zeros((*label.shape, 3), np.uint8), found(label, 600), mpp)
    with tifffile.TiffFile(files["labels"]) as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff and page.is_tiled and page.compression == 8 and page.dtype == np.uint16
        assert page.shape == label.shape
    assert same_nuclei(read_label(files["labels"]), label)
    from nucsam.images import read_mpp

    assert read_mpp(files["labels"]) == (pytest.approx(mpp) if mpp else None)


def test_many_nuclei_need_32_bits(tmp_path):
    label = np.zeros((600, 600), np.int32)
    label[::2, ::2] = np.arange(1, 90001).reshape(300, 300)
    with LabelBlocks(label.shape, tmp_path) as blocks:
        everything = (slice(0, 600), slice(0, 600))
        blocks.add(Window(everything, everything), label)
        blocks.write(tmp_path / "a.tif", None)
    assert tifffile.imread(tmp_path / "a.tif").dtype == np.uint32
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), label)


def test_pixels_stay_with_the_first_nucleus(tmp_path):
    """The second window brings a nucleus that overlaps one, one that lies within it, and a new one."""
    place = (slice(500, 520), slice(505, 525))  # over four blocks
    window = Window(place, place)
    first, second = np.zeros((2, 20, 20), np.int32)
    first[2:15, 2:15] = 1
    second[10:18, 10:18], second[4:6, 4:6], second[18:20, 0:3] = 1, 2, 3
    with LabelBlocks((600, 600), tmp_path) as blocks:
        np.testing.assert_array_equal(blocks.add(window, first), first)
        added = blocks.add(window, second)
        assert blocks.count == 3
        blocks.write(tmp_path / "a.tif", None)
    expected = np.where(first > 0, 0, np.array([0, 1, 0, 2])[second])
    np.testing.assert_array_equal(added, expected)
    whole = read_label(tmp_path / "a.tif")
    np.testing.assert_array_equal(whole[place], np.where(first > 0, 1, np.array([0, 2, 3])[expected]))
    assert (whole > 0).sum() == (whole[place] > 0).sum()
    assert second[4, 4] == 2  # what was given is as it was


def test_large_overlays_are_made_smaller(monkeypatch):
    """By the mean of whole blocks, the same by windows as at once; a part of a block at the end is a block."""
    monkeypatch.setattr(outputs, "OVERLAY", 100)
    image = np.random.default_rng(0).integers(0, 256, (250, 203, 3), dtype=np.uint8)
    label = np.zeros((250, 203), np.int32)
    label[30:90, 60:150] = 1
    pictures = []
    for core in (64, 1000):
        overlay = Overlay(image)
        assert overlay.factor == 3
        for window, part in found(label, core, 100):
            overlay.add(window, part)
        pictures.append(overlay.picture())
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (84, 68, 3)
    edge = (pictures[0] == draw.PREDICTION).all(-1)
    assert edge.sum() == 2 * 20 + 2 * 30 - 4 and edge[10, 20] and not edge[11, 21]
    np.testing.assert_array_equal(pictures[0][5, 7], image[15:18, 21:24].mean((0, 1)).round())
    np.testing.assert_array_equal(pictures[0][-1, 0], image[249:, 0:3].mean((0, 1)).round())
