import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from nucsam import geojson
from nucsam.data import (
    Crops,
    EpochBatches,
    Record,
    Samples,
    find_records,
    inspect_folder,
    read_image,
    read_label,
    read_mpp,
    read_sample,
    split_records,
    summary_table,
    write_label,
)

H, W = 70, 90


def ramp(height: int = H, width: int = W) -> np.ndarray:
    """An image whose first two channels are the row and the column of each pixel."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows ^ columns], -1).astype(np.uint8)


def three(height: int = H, width: int = W) -> np.ndarray:
    """A label map with ids 2, 5 and 9: areas 100, 200 and 24."""
    label = np.zeros((height, width), np.uint16)
    label[5:15, 5:15], label[30:40, 10:30], label[50:54, 60:66] = 2, 5, 9
    return label


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, compression="zlib")
    else:
        Image.fromarray(array).save(path)
    return path


def nuinsseg(root: Path, organ: str, stem: str, *, labels: str = "label masks modify") -> None:
    put(root / organ / "tissue images" / f"{stem}.png", ramp())
    put(root / organ / labels / f"{stem}.tif", three())


def plain(root: Path, count: int, *, size: tuple[int, int] = (H, W)) -> Path:
    for number in range(count):
        image = ramp(*size)
        image[..., 2] = number
        put(root / "images" / f"slide{number // 2}_{number}.png", image)
        put(root / "labels" / f"slide{number // 2}_{number}.tif", three(*size))
    return root


def fake_records(organs: list[str], groups: list[str] | None = None) -> list[Record]:
    groups = groups or [str(number) for number in range(len(organs))]
    path = Path("none")
    return [Record(str(i), organ, path, path, None, groups[i]) for i, organ in enumerate(organs)]


# ---- folders ----


def test_records_are_in_the_order_of_path_strings(tmp_path):
    for organ, stem in [
        ("mouse fat (white and brown)_subscapula", "fat_1"),
        ("mouse fat", "fat_9"),
        ("human testis", "human_testis_6"),
        ("human testis", "human_testis_10"),
    ]:
        nuinsseg(tmp_path, organ, stem)
    (tmp_path / "human testis" / "tissue images" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "human testis" / "tissue images" / "._human_testis_6.png").write_bytes(b"x")
    (tmp_path / ".trash" / "tissue images").mkdir(parents=True)
    (tmp_path / "README.txt").write_text("x")
    records = find_records(tmp_path)
    assert [record.name for record in records] == ["human_testis_10", "human_testis_6", "fat_1", "fat_9"]
    assert [record.organ for record in records][2:] == ["mouse fat (white and brown)_subscapula", "mouse fat"]
    assert [str(r.image) for r in records] == sorted(map(str, tmp_path.glob("*/tissue images/[!.]*.png")))
    assert len({record.group for record in records}) == 4


def test_modified_labels_come_first_and_the_fallback_warns_once(tmp_path):
    for stem in ("a_1", "a_2"):
        nuinsseg(tmp_path, "human liver", stem)
        nuinsseg(tmp_path, "human liver", stem, labels="label masks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = find_records(tmp_path)
    assert [record.label.parent.name for record in records] == ["label masks modify"] * 2
    for stem in ("b_1", "b_2"):
        nuinsseg(tmp_path, "human brain", stem, labels="label masks")
    with pytest.warns(UserWarning, match="2 labels from 'label masks'") as caught:
        records = find_records(tmp_path)
    assert len(caught) == 1
    assert [record.label.parent.name for record in records] == ["label masks"] * 2 + ["label masks modify"] * 2


@pytest.mark.parametrize("folder", ["mask binary", "mask binary_vague"])
def test_vague_areas_under_both_names(tmp_path, folder):
    nuinsseg(tmp_path, "human liver", "a_1")
    nuinsseg(tmp_path, "human liver", "a_2")
    mask = np.zeros((H, W), np.uint8)
    mask[3:7, 10:20] = 255
    put(tmp_path / "human liver" / "vague areas" / folder / "a_2.png", np.dstack([mask] * 4))
    first, second = map(read_sample, find_records(tmp_path))
    assert first.vague is None
    assert second.vague.dtype == bool
    assert np.array_equal(second.vague, mask > 0)


def test_plain_layout_with_organs_and_composed_names(tmp_path):
    put(tmp_path / "images" / "x.png", ramp())
    put(tmp_path / "labels" / "x.npy", three())
    name = "naïve é [1]"
    put(tmp_path / "images" / "Leber (li)" / f"{unicodedata.normalize('NFD', name)}.png", ramp())
    put(tmp_path / "labels" / "Leber (li)" / f"{unicodedata.normalize('NFC', name)}.tif", three())
    put(tmp_path / "vague" / "x.png", np.full((H, W), 255, np.uint8))
    records = find_records(tmp_path)
    assert [(r.name, r.organ) for r in records] == [(unicodedata.normalize("NFC", name), "Leber (li)"), ("x", "")]
    assert records[0].vague is None
    assert read_sample(records[1]).vague.all()
    assert read_sample(records[0]).label.max() == 3


def test_all_problems_of_a_folder_are_named_at_once(tmp_path):
    nuinsseg(tmp_path, "human liver", "a_1")
    images = tmp_path / "human liver" / "tissue images"
    put(images / "a_2.png", ramp())
    put(images / "a_3.png", ramp())
    put(images / "a_1.tif", ramp())
    put(tmp_path / "human liver" / "label masks modify" / "a_1.png", three())
    with pytest.raises(ValueError) as error:
        find_records(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: found 4 problem(s)"
    assert sum("found no label" in line for line in lines) == 2
    assert sum("found the stem of" in line for line in lines) == 2


def test_labels_without_image_are_told(tmp_path):
    plain(tmp_path, 2)
    put(tmp_path / "labels" / "alone.tif", three())
    with pytest.warns(UserWarning, match=r"1 labels without an image, not used.*alone\.tif"):
        assert len(find_records(tmp_path)) == 2


def test_stems_that_organs_share_get_the_organ(tmp_path):
    for organ in ("a", "b"):
        nuinsseg(tmp_path, organ, "1")
    nuinsseg(tmp_path, "b", "2")
    records = find_records(tmp_path)
    assert [record.name for record in records] == ["a_1", "b_1", "2"]
    assert len({record.group for record in records}) == 3


# ---- annotations ----


def outlined(path: Path, label: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert geojson.write(path, geojson.features(label)) == len(np.unique(label)) - 1
    return path


def test_annotations_are_labels_of_the_plain_layout(tmp_path):
    for place in ("", "liver/"):
        put(tmp_path / f"images/{place}a.png", ramp())
    put(tmp_path / "images" / "b.png", ramp())
    put(tmp_path / "labels" / "b.tif", three())
    drawn = [outlined(tmp_path / f"annotations/{place}a.geojson", three()) for place in ("", "liver/")]
    (tmp_path / "annotations" / "a.txt").write_text("notes")
    records = find_records(tmp_path)
    assert [(r.name, r.organ, r.label) for r in records] == [
        ("_a", "", drawn[0]),
        ("b", "", tmp_path / "labels" / "b.tif"),
        ("liver_a", "liver", drawn[1]),
    ]
    expected = np.searchsorted([0, 2, 5, 9], three())
    samples = Samples(records, progress=False)
    assert len(samples) == 3
    assert all(np.array_equal(samples[k].label, expected) for k in range(3))
    rows = inspect_folder(tmp_path)["rows"]
    assert [(row["organ"], row["nuclei"], row["median_area_px"]) for row in rows] == [
        ("", 6, 100),
        ("liver", 3, 100),
        ("all", 9, 100),
    ]


def test_problems_of_annotations_are_named(tmp_path):
    for stem in ("bad", "both", "none"):
        put(tmp_path / "images" / f"{stem}.png", ramp())
    put(tmp_path / "labels" / "both.tif", three())
    both = outlined(tmp_path / "annotations" / "both.geojson", three())
    bad = outlined(tmp_path / "annotations" / "bad.geojson", three())
    with pytest.raises(ValueError, match="found 2 problem") as caught:
        find_records(tmp_path)
    assert str(caught.value).split("\n  ")[1:] == [
        f"{both}: found {tmp_path / 'labels' / 'both.tif'} too, expected one of them",
        f"{tmp_path / 'images' / 'none.png'}: found no label of this stem, expected one in {tmp_path / 'labels'} or "
        f"{tmp_path / 'annotations'}",
    ]
    both.unlink()
    (tmp_path / "images" / "none.png").unlink()
    bad.write_text("{")
    with pytest.raises(ValueError, match="not a readable GeoJSON file") as caught:
        Samples(find_records(tmp_path), progress=False)
    assert str(bad) in str(caught.value)
    assert [str(bad) in text for text in inspect_folder(tmp_path)["bad"]] == [True]


def test_annotations_without_an_image_are_told(tmp_path):
    put(tmp_path / "images" / "a.png", ramp())
    outlined(tmp_path / "annotations" / "a.geojson", three())
    left = outlined(tmp_path / "annotations" / "b.geojson", three())
    with pytest.warns(UserWarning) as caught:
        assert len(find_records(tmp_path)) == 1
    assert [str(w.message) for w in caught] == [f"{tmp_path}: 1 labels without an image, not used; first: {left}"]


def test_groups(tmp_path):
    plain(tmp_path, 5)
    assert [r.group for r in find_records(tmp_path, group=r"^(.*)_\d+$")] == ["slide0"] * 2 + ["slide1"] * 2 + [
        "slide2"
    ]
    assert [r.group for r in find_records(tmp_path, group=r"e\d")] == ["e0", "e0", "e1", "e1", "e2"]
    put(tmp_path / "images" / "odd.png", ramp())
    put(tmp_path / "labels" / "odd.tif", three())
    with pytest.raises(ValueError, match=r"1 problem\(s\)\n.*odd\.png: found a name that data.group='_' does not"):
        find_records(tmp_path, group="_")
    with pytest.raises(ValueError, match=r"data\.group: found '\(', expected a regular expression"):
        find_records(tmp_path, group="(")


@pytest.mark.parametrize(
    "layout, message",
    [
        ("auto", "found no data set"),
        ("plain", "found no data set"),
        ("tiles", "data.layout: found 'tiles', expected auto, nuinsseg or plain"),
    ],
)
def test_not_a_data_set(tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        find_records(tmp_path, layout=layout)
    with pytest.raises(ValueError, match=message):
        find_records(tmp_path / "nowhere", layout=layout)


def test_an_empty_image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"found no image, expected \.png"):
        find_records(tmp_path)


# ---- files ----

GREY = (np.arange(H * W).reshape(H, W) % 256).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_rgb(tmp_path, suffix):
    image = read_image(put(tmp_path / f"a{suffix}", ramp()))
    assert image.dtype == np.uint8
    assert np.array_equal(image, ramp())


def test_alpha_is_dropped(tmp_path):
    clear = np.dstack([ramp(), np.zeros((H, W), np.uint8)])
    for suffix in (".png", ".tif"):
        assert np.array_equal(read_image(put(tmp_path / f"a{suffix}", clear)), ramp())


def test_grey_is_repeated(tmp_path):
    expected = np.dstack([GREY] * 3)
    assert np.array_equal(read_image(put(tmp_path / "a.png", GREY)), expected)
    assert np.array_equal(read_image(put(tmp_path / "b.tif", GREY)), expected)
    assert np.array_equal(read_image(put(tmp_path / "c.png", np.dstack([GREY, GREY]))), expected)
    assert np.array_equal(read_image(put(tmp_path / "d.png", GREY > 9)), 255 * (expected > 9))


def test_palettes_are_looked_up(tmp_path):
    few = np.repeat(np.repeat(np.array([[[9, 200, 30], [250, 0, 1]]], np.uint8), H, 0), W // 2, 1)
    for name in ("a.png", "a.tif"):
        Image.fromarray(few).quantize(4).save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name).astype(int) - few).max() <= 2


@pytest.mark.parametrize("top, shift", [(65535, 8), (4095, 4), (255, 0)])
def test_sixteen_bits(tmp_path, top, shift):
    wide = np.linspace(0, top, H * W).astype(np.uint16).reshape(H, W)
    expected = (wide >> shift).astype(np.uint8)
    assert expected.max() == 255
    for suffix in (".png", ".tif"):
        assert np.array_equal(read_image(put(tmp_path / f"a{suffix}", wide))[..., 1], expected)
    assert np.array_equal(read_image(put(tmp_path / "b.tif", np.dstack([wide] * 3)))[..., 2], expected)


def test_tiff_flavours(tmp_path):
    path = tmp_path / "a.tif"
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", None):
        Image.fromarray(ramp()).save(path, compression=compression)
        assert np.array_equal(read_image(path), ramp()), compression
    tifffile.imwrite(path, ramp().transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_image(path), ramp())
    tifffile.imwrite(path, ramp().transpose(2, 0, 1), photometric="minisblack", ome=True, metadata={"axes": "CYX"})
    assert np.array_equal(read_image(path), ramp())
    tifffile.imwrite(path, ramp(640, 320), tile=(64, 64), compression="zlib", predictor=True)
    assert np.array_equal(read_image(path), ramp(640, 320))


def test_images_refused(tmp_path):
    whole = {suffix: put(tmp_path / f"whole{suffix}", ramp()).read_bytes() for suffix in (".png", ".tif", ".jpg")}
    for suffix, content in whole.items():
        for part in (0.0, 0.1, 0.5, 0.9):
            path = tmp_path / f"cut{part}{suffix}"
            path.write_bytes(content[: int(part * len(content))])
            with pytest.raises(ValueError, match=rf"cut{part}\{suffix}: cannot be read"):
                read_image(path)
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name, array, message in [
        ("float.tif", ramp().astype(np.float32), "found float32 in 0.0..*expected 8 or 16 bits"),
        ("deep.tif", ramp().astype(np.uint32) * 70000, "found uint32 in 0..*expected 8 or 16 bits"),
        ("negative.tif", -GREY.astype(np.int16), "found int16 in -255..0"),
        ("stack.tif", np.zeros((5, H, W), np.uint8), "expected one image"),
    ]:
        tifffile.imwrite(tmp_path / name, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack")
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)
    for name, message in [
        ("a.svg", "found .svg suffix, expected .png"),
        ("none.png", "cannot be read .FileNotFoundError"),
        ("link.png", "cannot be read .FileNotFoundError"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_integer_labels(tmp_path, dtype):
    for suffix in (".tif", ".npy"):
        label = read_label(put(tmp_path / f"a{suffix}", three().astype(dtype)))
        assert label.dtype == np.int32
        assert np.array_equal(label, three())


def test_png_labels(tmp_path):
    assert np.array_equal(read_label(put(tmp_path / "a.png", three() * 1000)), three() * 1000)
    palette = Image.new("P", (W, H))
    palette.putdata(three().ravel().tolist())
    palette.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    palette.save(tmp_path / "b.png")
    assert np.array_equal(read_label(tmp_path / "b.png"), three())
    Image.fromarray(three().astype(np.int32) * 50000).save(tmp_path / "c.tif", compression="tiff_lzw")
    assert np.array_equal(read_label(tmp_path / "c.tif"), three().astype(np.int32) * 50000)


def test_labels_refused(tmp_path):
    ids = three().astype(np.int64)
    cases = [
        ("rgb.png", ramp(), r"found uint8 of shape \(70, 90, 3\), expected integer ids"),
        ("rgba.png", np.dstack([ramp(), GREY]), r"found uint8 of shape \(70, 90, 4\)"),
        ("float.npy", ids.astype(float), "found float64"),
        ("float.tif", ids.astype(np.float32), "found float32"),
        ("depth.npy", ids[..., None], r"found int64 of shape \(70, 90, 1\)"),
        ("negative.npy", -ids, r"found ids in -9..0, expected 0..2147483647"),
        ("negative.tif", -ids, r"found ids in -9..0"),
        ("huge.npy", ids * 2**40, "found ids in 0..9895604649984"),
        ("huge.tif", ids.astype(np.uint32) * 400_000_000, "found ids in 0..3600000000"),
        ("label.jpg", GREY, "found .jpg suffix, expected .tif"),
    ]
    for name, array, message in cases:
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read_label(put(tmp_path / name, array))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    whole = put(tmp_path / "whole.npy", ids).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-10])
    (tmp_path / "empty.npy").write_bytes(b"")
    Image.fromarray(GREY).save(tmp_path / "disguised.png", format="JPEG")
    for name in ("objects.npy", "cut.npy", "empty.npy", "disguised.png"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            read_label(tmp_path / name)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(1, 40))
def test_written_labels_read_back(tmp_path_factory, top, height, width):
    path = tmp_path_factory.mktemp("label") / "a.tif"
    label = np.random.default_rng(top).integers(0, top, (height, width), endpoint=True)
    write_label(path, label)
    assert np.array_equal(read_label(path), label)
    assert tifffile.imread(path).dtype == (np.uint16 if label.max() <= 65535 else np.uint32)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tif"]


def test_a_failed_write_leaves_the_old_label(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write_label(path, three())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_label(path, three() * 2)
    assert np.array_equal(read_label(path), three())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tif"]


def test_microns_per_pixel(tmp_path):
    path = tmp_path / "a.tif"
    for expected, options in [
        (0.25, {"resolution": (101600, 101600), "resolutionunit": "INCH"}),
        (0.5, {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}),
        (None, {"resolution": (300, 300), "resolutionunit": "INCH"}),
        (None, {}),
        (0.25, {"resolution": (4, 4), "imagej": True, "metadata": {"unit": "um"}}),
        (None, {"resolution": (4, 4), "imagej": True}),
        (0.3, {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.3}}),
        (0.3, {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 300.0, "PhysicalSizeXUnit": "nm"}}),
        (0.3, {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 3e-5, "PhysicalSizeXUnit": "cm"}}),
        (None, {"ome": True, "metadata": {"axes": "YXS", "PhysicalSizeX": 0.3, "PhysicalSizeXUnit": "pixel"}}),
    ]:
        tifffile.imwrite(path, ramp(), **options)
        assert read_mpp(path) == (None if expected is None else pytest.approx(expected)), options
    assert read_mpp(put(tmp_path / "a.png", ramp())) is None


# ---- samples ----


def sample_of(root: Path, image: np.ndarray, label: np.ndarray):
    return read_sample(Record("a", "", put(root / "a.png", image), put(root / "a.tif", label), None, "a"))


def test_ids_are_made_compact(tmp_path):
    sample = sample_of(tmp_path, ramp(), three())
    assert sample.label.dtype == np.int32
    assert np.array_equal(sample.label, np.searchsorted([0, 2, 5, 9], three()))
    far = three().astype(np.uint32)
    far[far == 9] = 2**31 - 1
    assert np.array_equal(sample_of(tmp_path, ramp(), far).label, sample.label)
    assert sample_of(tmp_path, ramp(), three() * 0).label.max() == 0


@pytest.mark.parametrize("value", [1, 255, 65535])
def test_binary_masks_are_not_instances(tmp_path, value):
    binary = (three() > 0) * np.uint16(value)
    with pytest.raises(
        ValueError, match=rf"a\.tif: found a binary mask \(3 components that all have the value {value}\)"
    ):
        sample_of(tmp_path, ramp(), binary)
    binary[20:] = 0
    assert np.bincount(sample_of(tmp_path, ramp(), binary).label.ravel()).tolist() == [H * W - 100, 100]


def test_sizes_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"a\.tif: found 90x80 px, expected 90x70 as in .*a\.png"):
        sample_of(tmp_path, ramp(), three(80, 90))
    with pytest.raises(ValueError, match=r"a\.png: found 90x63 px, expected at least 64 px a side"):
        sample_of(tmp_path, ramp(63), three(63))
    vague = put(tmp_path / "v.png", GREY[:, :50])
    record = Record("a", "", put(tmp_path / "a.png", ramp()), put(tmp_path / "a.tif", three()), vague, "a")
    with pytest.raises(ValueError, match=r"v\.png: found 50x70 px, expected 90x70"):
        read_sample(record)


def mixed(root: Path) -> list[Record]:
    for number, (height, width) in enumerate([(70, 90), (200, 64), (128, 128)]):
        put(root / "images" / f"{number}.png", ramp(height, width) + np.uint8(number))
        put(root / "labels" / f"{number}.tif", three(height, width) * (number != 1))
    mask = np.zeros((128, 128), np.uint8)
    mask[:40] = 255
    put(root / "vague" / "2.png", mask)
    return find_records(root)


@pytest.mark.parametrize("memory_gib, kept", [(1.0, True), (0.0, False)])
def test_samples_are_those_on_disk(tmp_path, memory_gib, kept):
    records = mixed(tmp_path)
    samples = Samples(records, memory_gib=memory_gib)
    assert samples.kept == kept
    assert len(samples) == 3
    for index, record in enumerate(records):
        expected, found = read_sample(record), samples[index]
        assert np.array_equal(found.image, expected.image) and found.image.dtype == np.uint8
        assert np.array_equal(found.label, expected.label) and found.label.dtype == np.int32
        assert (found.vague is None) == (expected.vague is None) == (index != 2)
    assert np.array_equal(samples[2].vague, read_sample(records[2]).vague)
    if kept:
        pixels = 70 * 90 + 200 * 64 + 128 * 128
        assert [len(buffer) for buffer in (samples.image, samples.label, samples.vague)] == [3 * pixels, pixels, pixels]
        assert samples.image.is_shared() and samples.label.is_shared() and samples.vague.is_shared()
        assert samples.label.element_size() == 2


def test_without_room_in_shared_memory_samples_stay_private(tmp_path, monkeypatch):
    import torch

    def full(_):
        raise RuntimeError("no space left")

    records = mixed(tmp_path)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.warns(UserWarning, match=r"/dev/shm\) has no room for 0\.1 MiB of decoded images"):
        samples = Samples(records)
    assert samples.kept and not samples.image.is_shared()
    assert np.array_equal(samples[1].image, read_sample(records[1]).image)


def test_more_nuclei_than_16_bits(tmp_path):
    plain(tmp_path, 1, size=(300, 300))
    many = np.arange(90000, dtype=np.uint32).reshape(300, 300)
    tifffile.imwrite(tmp_path / "labels" / "slide0_0.tif", many)
    samples = Samples(find_records(tmp_path))
    assert samples.label.element_size() == 4
    assert np.array_equal(samples[0].label, many)


def test_all_bad_files_are_named_at_once(tmp_path):
    plain(tmp_path, 6)
    (tmp_path / "images" / "slide0_0.png").write_bytes(b"")
    put(tmp_path / "labels" / "slide0_1.tif", three(71, 90))
    put(tmp_path / "labels" / "slide1_3.tif", (three() > 0) * np.uint8(255))
    records = find_records(tmp_path)
    for memory_gib in (1.0, 0.0):
        with pytest.raises(ValueError, match=r"^6 images: found 3 problem\(s\)\n") as error:
            Samples(records, memory_gib=memory_gib)
        assert [name in str(error.value) for name in ("slide0_0.png", "slide0_1.tif", "slide1_3.tif")] == [True] * 3


# ---- folds ----

OFFICIAL = [  # sklearn.model_selection.KFold(5, shuffle=True, random_state=19) over 665 items: first test indices, sum
    ([26, 27, 38, 40, 41, 49, 54, 58], 44986),
    ([1, 7, 10, 12, 15, 16, 17, 24], 43520),
    ([2, 6, 8, 13, 23, 28, 30, 36], 43940),
    ([9, 11, 14, 18, 20, 21, 22, 31], 44880),
    ([0, 3, 4, 5, 19, 29, 32, 39], 43454),
]


@pytest.mark.parametrize("fold", range(5))
def test_official_folds_of_nuinsseg(fold):
    split = split_records(fake_records([""] * 665), fold=fold)
    assert len(split.test) == 133
    assert (list(split.test[:8]), sum(split.test)) == OFFICIAL[fold]


@pytest.mark.parametrize("count, folds, seed", [(665, 5, 19), (17, 3, 0), (52, 5, 42), (5, 5, 1)])
def test_official_folds_equal_scikit_learn(count, folds, seed):
    KFold = pytest.importorskip("sklearn.model_selection").KFold
    expected = KFold(folds, shuffle=True, random_state=seed).split(np.zeros(count))
    for fold, (train, test) in enumerate(expected):
        split = split_records(fake_records([""] * count), folds=folds, fold=fold, seed=seed, inner=0)
        assert (split.train, split.inner, split.test) == (tuple(train), (), tuple(test))


def test_official_folds_of_groups_are_those_of_the_sorted_groups():
    groups = [f"g{number % 7}" for number in range(20)][::-1]
    for fold in range(3):
        of_groups = split_records(fake_records([""] * 7), folds=3, fold=fold).test
        split = split_records(fake_records([""] * 20, groups), folds=3, fold=fold)
        assert {groups[index] for index in split.test} == {f"g{number}" for number in of_groups}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_never_part_and_nothing_is_lost(data):
    count = data.draw(st.integers(2, 40))
    organs = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    groups = data.draw(st.lists(st.sampled_from([*map(str, range(12))]), min_size=count, max_size=count))
    parts = len(set(groups))
    fold = data.draw(st.sampled_from(["all", *range(min(3, parts))])) if parts > 1 else "all"
    options = {
        "scheme": data.draw(st.sampled_from(["official", "organ"])),
        "folds": max(2, min(3, parts)),
        "fold": fold,
        "inner": data.draw(st.sampled_from([0, 0.1, 0.15, 0.5])),
        "seed": data.draw(st.integers(0, 9)),
    }
    records = fake_records(organs, groups)
    split = split_records(records, **options)
    assert sorted(split.train + split.inner + split.test) == list(range(count))
    kinds = [{groups[index] for index in part} for part in (split.train, split.inner, split.test)]
    assert sum(map(len, kinds)) == parts
    assert (split.test == ()) == (fold == "all")
    left = parts - len(kinds[2])
    assert split.train
    assert bool(split.inner) == (options["inner"] > 0 and left > 1)
    assert split_records(records, **options) == split


def test_organ_folds_hold_their_share_of_each_organ():
    organs = ["a"] * 50 + ["b"] * 10 + ["c"] * 23
    tests = [split_records(fake_records(organs), scheme="organ", fold=fold).test for fold in range(5)]
    assert sorted(index for test in tests for index in test) == list(range(83))
    counts = [[sum(organs[index] == organ for index in test) for organ in "abc"] for test in tests]
    assert sorted(counts) == [[10, 2, 4]] * 2 + [[10, 2, 5]] * 3
    assert sorted(len(test) for test in tests) == [16, 16, 17, 17, 17]


def test_the_inner_split_is_stratified_and_depends_on_seed_and_fold():
    records = fake_records(["a"] * 70 + ["b"] * 35 + ["c"] * 7)
    split = split_records(records, fold="all")
    counts = np.bincount(np.digitize(split.inner, [70, 105]))
    assert counts.tolist() == [10, 5, 1]
    assert split.inner != split_records(records, fold="all", seed=20).inner
    assert len({split_records(records, fold=fold).inner for fold in range(5)}) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scheme": "random"}, "data.split: found 'random', expected official or organ"),
        ({"folds": 9}, "data.folds: found 9, expected 2 to 8, the number of groups"),
        ({"folds": 1}, "data.folds: found 1"),
        ({"fold": 5}, "data.fold: found 5, expected 0 to 4 or all"),
        ({"fold": "none"}, "data.fold: found 'none'"),
        ({"inner": 0.6}, "data.inner: found 0.6, expected a fraction over 0, at most 0.5"),
    ],
)
def test_split_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        split_records(fake_records([""] * 8), **options)


# ---- crops ----


def test_a_crop_is_a_window_of_the_image(tmp_path):
    samples = Samples(mixed(tmp_path))
    places = set()
    for epoch in range(40):
        item = Crops(samples, window=64, seed=3)[epoch, 2]
        top, left = (int(item["image"][axis, 0, 0]) - 2 for axis in (0, 1))
        rows, columns = slice(top, top + 64), slice(left, left + 64)
        expected = read_sample(samples.records[2])
        assert np.array_equal(item["image"].numpy().transpose(1, 2, 0), expected.image[rows, columns])
        assert np.array_equal(item["label"].numpy(), expected.label[rows, columns])
        assert np.array_equal(item["counted"].numpy(), ~expected.vague[rows, columns])
        assert item["index"].item() == 2
        assert item["draws"].shape == (32,) and item["draws"].min() >= 0 and item["draws"].max() < 1
        places.add((top, left))
    assert len(places) > 30
    assert min(map(min, places)) >= 0 and max(map(max, places)) <= 64
    assert [str(item[key].dtype)[6:] for key in item] == ["uint8", "int32", "bool", "float32", "int64"]


@pytest.mark.parametrize("window", [80, 128, 300])
def test_a_small_image_is_reflected_and_not_counted_outside(tmp_path, window):
    samples = Samples(mixed(tmp_path))
    for epoch in range(5):
        item = Crops(samples, window=window, seed=1)[epoch, 0]
        image, label, counted = (item[key].numpy() for key in ("image", "label", "counted"))
        assert image.shape == (3, window, window)
        rows, columns = (np.flatnonzero(counted.any(axis)) for axis in (1, 0))
        assert len(rows) == min(window, 70) and len(columns) == min(window, 90)
        assert counted.sum() == len(rows) * len(columns)
        assert (label[~counted] == 0).all()
        # The image's own row and column of every pixel: a triangle wave through the counted part
        for axis, side, inside in ((0, 70, rows), (1, 90, columns)):
            line = image[axis, :, columns[0]] if axis == 0 else image[axis, rows[0], :]
            start = int(line[inside[0]]) - inside[0]
            wave = (np.arange(window) + start) % (2 * side - 2)
            assert np.array_equal(line, np.minimum(wave, 2 * side - 2 - wave))
        if window >= 90:
            expected = read_sample(samples.records[0]).label
            assert np.array_equal(label[np.ix_(rows, columns)], expected)


def batches_of(crops: Crops, batches, **options) -> list[dict]:
    from torch.utils.data import DataLoader

    return list(DataLoader(crops, batch_sampler=batches, **options))


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_workers_change_nothing(tmp_path, context):
    import torch

    crops = Crops(Samples(mixed(tmp_path)), window=96, seed=5)
    batches = EpochBatches(range(3), batch=2, seed=5)
    alone = batches_of(crops, batches)
    beside = batches_of(crops, batches, num_workers=2, multiprocessing_context=context)
    assert len(alone) == len(beside) == 2
    for one, other in zip(alone, beside):
        assert one["image"].shape == (2, 3, 96, 96)
        assert all(torch.equal(one[key], other[key]) for key in one)
    batches.set_epoch(1)
    assert not torch.equal(batches_of(crops, batches)[0]["draws"], alone[0]["draws"])


def test_reading_as_needed_changes_nothing(tmp_path):
    records = mixed(tmp_path)
    kept, read = (Crops(Samples(records, memory_gib=gib), window=96, seed=5) for gib in (1, 0))
    for index in range(3):
        one, other = kept[4, index], read[4, index]
        assert all(np.array_equal(one[key], other[key]) for key in one)


# ---- batches ----


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 4),
    processes=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    epoch=st.integers(0, 5),
)
def test_processes_together_see_what_one_sees(count, batch, processes, accumulation, epoch):
    indices = [3 * index for index in range(count)]
    one = EpochBatches(indices, batch=batch * processes, accumulation=accumulation, seed=1)
    ranks = [
        EpochBatches(indices, batch=batch, rank=rank, processes=processes, accumulation=accumulation, seed=1)
        for rank in range(processes)
    ]
    for sampler in (one, *ranks):
        sampler.set_epoch(epoch)
    joined = [[key for part in parts for key in part] for parts in zip(*ranks)]
    assert joined == list(one)
    assert len(one) == len(joined) == one.steps * accumulation
    assert one.steps == ranks[0].steps == -(-count // (batch * processes * accumulation))
    flat = [index for batch_ in one for _, index in batch_]
    assert sorted(flat[:count]) == indices
    assert flat[count:] == (flat[:count] * len(flat))[: len(flat) - count]
    assert all(key[0] == epoch for batch_ in one for key in batch_)


def test_epochs_differ_and_resume_in_the_middle():
    batches = EpochBatches(range(50), batch=4, accumulation=2, seed=7)
    first = list(batches)
    assert len(first) == len(batches) == 14
    batches.set_epoch(0, skip=5)
    assert list(batches) == first[5:]
    assert len(batches) == 9
    batches.set_epoch(1)
    assert [[index for _, index in batch] for batch in batches] != [[index for _, index in batch] for batch in first]
    assert len(batches) == 14
    with pytest.raises(ValueError, match="found no image to train on"):
        EpochBatches([], batch=4)


# ---- inspection ----


def test_inspection_counts_and_lists_what_is_bad(tmp_path):
    for organ, stem in [
        ("liver (x)", "a_1"),
        ("liver (x)", "a_2"),
        ("brain", "b_1"),
        ("brain", "b_2"),
        ("brain", "b_3"),
    ]:
        nuinsseg(tmp_path, organ, stem)
    mask = np.zeros((H, W), np.uint8)
    mask[:7] = 255
    put(tmp_path / "brain" / "vague areas" / "mask binary" / "b_1.png", mask)
    put(tmp_path / "brain" / "label masks modify" / "b_2.tif", three() * 0)
    put(tmp_path / "liver (x)" / "label masks modify" / "a_1.tif", three().astype(np.float32))
    put(tmp_path / "brain" / "tissue images" / "alone.png", ramp())
    (tmp_path / "brain" / "tissue images" / "b_3.png").write_bytes(b"no image")
    summary = inspect_folder(tmp_path, group=r"^(\w+)_|alone")
    brain, liver, total = summary["rows"]
    assert (brain["organ"], brain["images"], brain["nuclei"], brain["images_without"]) == ("brain", 2, 3, 1)
    assert brain["vague_percent"] == pytest.approx(10)
    assert (liver["organ"], liver["images"], liver["median_area_px"]) == ("liver (x)", 1, 100.0)
    assert (total["images"], total["nuclei"], total["groups"]) == (3, 6, 2)
    assert total["sizes"] == {"90x70": 3}
    assert len(summary["bad"]) == 3
    for name in ("a_1.tif", "alone.png", "b_3.png"):
        assert sum(name in line for line in summary["bad"]) == 1
    assert [name for name, _, _ in summary["examples"]] == ["b_1", "a_2", "b_2"]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(summary))
    assert "liver (x)" in capture.get() and "90x70 (3)" in capture.get()


def test_import_is_light():
    code = "import sys, nucsam.data; print([name for name in ('torch', 'scipy', 'PIL', 'rich') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
