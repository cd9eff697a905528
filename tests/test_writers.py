"""The files of an image, written window by window."""

import csv
import errno
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from tempfile import TemporaryFile

import geopandas
import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.measure import regionprops
from skimage.segmentation import find_boundaries, relabel_sequential

from nucsam.data import draw, geojson
from nucsam.data.images import read_label, read_mpp
from nucsam.errors import UserError
from nucsam.model.instances import Nuclei
from nucsam.predict import writers
from nucsam.predict.tiles import Window, own_nuclei, windows
from nucsam.predict.writers import LabelBlocks, draw_overlay

SIZE = (700, 1100)
ALL = ("labels", "geojson", "geojson.gz", "csv", "parquet", "overlay")


@pytest.fixture(scope="module")
def scene():
    """An image, and 400 rectangles on it, that meet the borders of blocks and windows."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    label = np.zeros(SIZE, np.int32)
    for k in range(400):
        y, x, h, w = *rng.integers(0, (690, 1090)), *rng.integers(3, 40, 2)
        place = label[y : y + h, x : x + w]
        if not place.any():
            place[:] = k + 1
    return image, label


def in_windows(label, core=200, margin=60):
    """What a predictor gives: windows, and the nuclei that each keeps."""
    for window in windows(label.shape, core, margin):
        own = own_nuclei(relabel_sequential(label[window.outer])[0], window)
        yield window, Nuclei(own, np.linspace(0.5, 1, own.max()))


def rows(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def same_nuclei(a, b) -> bool:
    """Whether two label maps are equal but for their ids."""
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    one_to_one = all(len(np.unique(side)) == pairs.shape[1] for side in pairs)
    return one_to_one and bool(((pairs[0] > 0) == (pairs[1] > 0)).all())


@pytest.mark.parametrize("core", [200, 5000])
def test_all_files_show_the_same_nuclei(scene, tmp_path, core):
    image, label = scene
    files = writers.output_files(tmp_path / "new", "a b", ALL)
    count = writers.write_files(files, image, in_windows(label, core), mpp=0.25)
    paths = {str(p.relative_to(tmp_path / "new")) for p in tmp_path.rglob("*.*")}
    tables = {"a b.geojson", "a b.geojson.gz", "a b.csv", "a b.parquet"}
    assert paths == tables | {"a b.tif", "overlays/a b.png"}
    written = read_label(files["labels"])
    assert same_nuclei(written, label)
    assert np.unique(written).tolist() == list(range(count + 1))
    for name in ("geojson", "geojson.gz"):
        np.testing.assert_array_equal(geojson.read(files[name], SIZE), written)
    table = rows(files["csv"])
    for row, region in zip(table, regionprops(written), strict=True):
        y, x = region.centroid
        red = image[..., 0][written == region.label].mean()
        expected = {"id": region.label, "centroid_y": y + 0.5, "centroid_x": x + 0.5}
        expected |= {"centroid_x_um": (x + 0.5) / 4, "area_um2": region.area / 16}
        expected |= {"centroid_y_um": (y + 0.5) / 4, "area_px": region.area, "mean_red": red}
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    measured = json.loads(files["geojson"].read_text())["features"][7]["properties"]["measurements"]
    assert measured == pytest.approx(table[7], rel=1e-5)
    assert list(measured) == list(table[7]) and 0.5 <= measured["confidence"] <= 1
    with Image.open(files["overlay"]) as picture:
        pixels = np.asarray(picture)
    edge = (pixels == draw.PREDICTION).all(-1)
    np.testing.assert_array_equal(pixels[~edge], image[~edge])
    np.testing.assert_array_equal(edge, find_boundaries(label, mode="inner"))


def test_readers_of_others_see_the_nuclei(scene, tmp_path, monkeypatch):
    """GeoPandas opens both formats; every outline is valid, and its area that of the pixels."""
    monkeypatch.setattr(writers, "GROUP", 100)
    image, label = scene
    files = writers.output_files(tmp_path, "a", ["geojson", "parquet", "csv"])
    count = writers.write_files(files, image, in_windows(label))
    table = rows(files["csv"])
    collection = json.loads(files["geojson"].read_text())
    frames = (
        geopandas.GeoDataFrame.from_features(collection),
        geopandas.read_parquet(files["parquet"]),
    )
    for frame in frames:
        assert len(frame) == count > 200 and frame.crs is None
        assert frame.geometry.is_valid.all()
        np.testing.assert_array_equal(frame.geometry.area, [row["area_px"] for row in table])
    assert frames[0].geometry.geom_equals(frames[1].geometry).all()
    columns = frames[1].drop(columns="geometry")
    assert list(columns) == list(table[0])
    np.testing.assert_allclose(columns, [list(row.values()) for row in table], rtol=1e-8)


@pytest.mark.parametrize("formats", [["labels"], ["csv", "labels"], ["geojson"]])
def test_writers_work_without_asserts_and_without_torch(tmp_path, formats):
    code = f"""
import sys
from pathlib import Path
import numpy as np
from nucsam.model.instances import Nuclei
from nucsam.predict.tiles import windows
from nucsam.predict.writers import output_files, write_files
(window,) = windows((9, 9), 99, 0)
files = output_files(Path({str(tmp_path)!r}), "a", {formats})
nuclei = Nuclei(np.eye(9, dtype=np.int32), np.ones(1))
count = write_files(files, np.zeros((9, 9, 3), np.uint8), [(window, nuclei)])
print(count, __debug__, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "False", "False"]
    if "labels" in formats:
        np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), np.eye(9))
    if "csv" in formats:
        assert len(rows(tmp_path / "a.csv")) == 1


def test_an_image_without_nuclei(tmp_path):
    files = writers.output_files(tmp_path, "a", ALL)
    image = np.zeros((16, 16, 3), np.uint8)
    assert writers.write_files(files, image, in_windows(np.zeros((16, 16), np.int32))) == 0
    assert not read_label(files["labels"]).any()
    assert json.loads(files["geojson"].read_text()) == {"type": "FeatureCollection", "features": []}
    assert files["csv"].read_text().startswith("id,centroid_x,centroid_y,area_px,")
    assert rows(files["csv"]) == []
    assert geopandas.read_parquet(files["parquet"]).empty
    assert Image.open(files["overlay"]).size == (16, 16)


@pytest.mark.parametrize("before", ["", "old"])
def test_all_files_or_none(scene, tmp_path, before):
    image, label = scene
    files = writers.output_files(tmp_path, "a", ALL)

    def torn():
        yield next(in_windows(label))
        raise UserError("torn.tif")

    if before:
        files["labels"].write_text(before)
    with pytest.raises(UserError, match=r"torn\.tif"):
        writers.write_files(files, image, torn())
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == (["a.tif"] if before else [])
    assert not before or files["labels"].read_text() == before


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_not_blamed_on_one_file(scene, tmp_path, monkeypatch, name):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = writers.output_files(tmp_path, "a", ALL)
    image, label = scene
    if name in writers.TABLES:
        monkeypatch.setitem(writers.TABLES, name, contextmanager(full))
    else:
        place = {"labels": "tifffile.imwrite", "overlay": "nucsam.data.draw.write_png"}[name]
        monkeypatch.setattr(place, full)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: \[Errno 28\] No space"):
        writers.write_files(files, image, in_windows(label))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("mpp", [None, 0.5])
def test_large_label_maps_are_tiled_bigtiff(tmp_path, mpp):
    label = np.zeros((2100, 520), np.int32)
    label[2090:, 500:] = 1
    label[500:530, 500:515] = 2
    files = writers.output_files(tmp_path, "a", ["labels"])
    writers.write_files(files, np.zeros((*label.shape, 3), np.uint8), in_windows(label, 600), mpp)
    with tifffile.TiffFile(files["labels"]) as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff and page.is_tiled and page.compression == 8
        assert page.dtype == np.uint16 and page.shape == label.shape
    assert same_nuclei(read_label(files["labels"]), label)
    assert read_mpp(files["labels"]) == (pytest.approx(mpp) if mpp else None)


@pytest.mark.parametrize("count, dtype", [(65535, np.uint16), (65536, np.uint32)])
def test_many_nuclei_need_32_bits(tmp_path, count, dtype):
    label = np.zeros(600 * 600, np.int32)
    label[: 4 * count : 4] = np.arange(1, count + 1)
    label = label.reshape(600, 600)
    everything = (slice(0, 600), slice(0, 600))
    with TemporaryFile() as file:
        blocks = LabelBlocks(label.shape, file)
        blocks.add(Window(everything, everything), Nuclei(label, np.ones(count)))
        blocks.write(tmp_path / "a.tif", None)
    assert tifffile.imread(tmp_path / "a.tif").dtype == dtype
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), label)


def test_pixels_stay_with_the_first_nucleus(tmp_path):
    """The second label map overlaps a nucleus, repeats a part of it, and brings a new one."""
    place = (slice(500, 520), slice(505, 525))  # over four blocks
    window = Window(place, place)
    first, second = np.zeros((2, 20, 20), np.int32)
    first[2:15, 2:15] = 1
    second[10:18, 10:18], second[4:6, 4:6], second[18:20, 0:3] = 1, 2, 3
    given = second.copy()
    with TemporaryFile() as file:
        blocks = LabelBlocks((600, 600), file)
        assert blocks.add(window, Nuclei(first, np.ones(1))).label.tolist() == first.tolist()
        added, confidence = blocks.add(window, Nuclei(second, np.array([0.7, 0.8, 0.9])))
        assert confidence.tolist() == [0.7, 0.9]
        assert blocks.count == 3
        blocks.write(tmp_path / "a.tif", None)
    np.testing.assert_array_equal(second, given)
    expected = np.where(first > 0, 0, np.array([0, 1, 0, 2])[second])
    np.testing.assert_array_equal(added, expected)
    whole = np.zeros((600, 600), int)
    whole[place] = np.where(first > 0, 1, np.array([0, 2, 3])[expected])
    np.testing.assert_array_equal(read_label(tmp_path / "a.tif"), whole)


def test_large_overlays_are_shrunk(monkeypatch):
    """By the mean of blocks, whatever the windows; the last block may be a part of one."""
    monkeypatch.setattr(writers, "OVERLAY", 100)
    image = np.random.default_rng(0).integers(0, 256, (250, 203, 3), dtype=np.uint8)
    label = np.zeros((250, 203), np.int32)
    label[30:90, 60:150] = 1
    pictures = []
    for core in (64, 1000):
        with TemporaryFile() as file:
            blocks = LabelBlocks(label.shape, file)
            for window, part in in_windows(label, core, 100):
                blocks.add(window, part)
            pictures.append(draw_overlay(image, blocks))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape == (84, 68, 3)
    edge = (pictures[0] == draw.PREDICTION).all(-1)
    assert edge.sum() == 2 * 20 + 2 * 30 - 4 and edge[10, 20] and not edge[11, 21]
    for place, block in (((5, 7), image[15:18, 21:24]), ((-1, 0), image[249:, 0:3])):
        np.testing.assert_allclose(pictures[0][place], block.mean((0, 1)), atol=1)
