import math
import re
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from sklearn.model_selection import KFold

from nucsam.config import Config, Data, Train
from nucsam.data import geojson
from nucsam.data.folders import Record, find_records
from nucsam.data.images import read_image, read_label, read_mpp, write_label
from nucsam.data.samples import Crops, EpochBatches, Samples, read_sample
from nucsam.data.splits import find_split, inventory, split_records, with_epochs
from nucsam.data.summary import inspect_folder, summary_table
from nucsam.errors import UserError
from nucsam.model import targets
from nucsam.train.training import magnification

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


COMPACT = np.searchsorted([0, 2, 5, 9], three())  # `three` with ids 1, 2 and 3


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, compression="zlib")
    else:
        Image.fromarray(array).save(path)
    return path


def nuinsseg(root: Path, organ: str, *stems: str, labels: str = "label masks modify") -> None:
    for stem in stems:
        put(root / organ / "tissue images" / f"{stem}.png", ramp())
        put(root / organ / labels / f"{stem}.tif", three())


def plain(root: Path, count: int, *, size: tuple[int, int] = (H, W)) -> Path:
    for number in range(count):
        image = ramp(*size)
        image[..., 2] = number
        put(root / "images" / f"slide{number // 2}_{number}.png", image)
        put(root / "labels" / f"slide{number // 2}_{number}.tif", three(*size))
    return root


def outlined(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    geojson.write_geojson(path, geojson.features(geojson.geometries(three())))
    return path


def fake_records(organs: list[str], groups: list[str] | None = None) -> list[Record]:
    groups = groups or [str(number) for number in range(len(organs))]
    path = Path("none")
    return [Record(str(i), organ, path, path, None, groups[i]) for i, organ in enumerate(organs)]


# ---- folders ----


def test_records_are_in_the_order_of_path_strings(tmp_path):
    nuinsseg(tmp_path, "mouse fat (white and brown)_subscapula", "fat_1")
    nuinsseg(tmp_path, "mouse fat", "fat_9")
    nuinsseg(tmp_path, "human testis", "human_testis_6", "human_testis_10")
    (tmp_path / "human testis" / "tissue images" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "human testis" / "tissue images" / "._human_testis_6.png").write_bytes(b"x")
    (tmp_path / ".trash" / "tissue images").mkdir(parents=True)
    (tmp_path / "README.txt").write_text("x")
    records = find_records(tmp_path)
    assert [record.name for record in records] == [
        "human_testis_10",
        "human_testis_6",
        "fat_1",
        "fat_9",
    ]
    organs = ["mouse fat (white and brown)_subscapula", "mouse fat"]
    assert [record.organ for record in records][2:] == organs
    assert [str(r.image) for r in records] == sorted(str(r.image) for r in records)
    assert len({record.group for record in records}) == 4


def test_modified_labels_come_first_and_the_fallback_warns_once(tmp_path):
    nuinsseg(tmp_path, "human liver", "a_1", "a_2")
    nuinsseg(tmp_path, "human liver", "a_1", "a_2", labels="label masks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = find_records(tmp_path)
    assert [record.label.parent.name for record in records] == ["label masks modify"] * 2
    nuinsseg(tmp_path, "human brain", "b_1", "b_2", labels="label masks")
    with pytest.warns(UserWarning, match="2 labels from 'label masks'") as caught:
        records = find_records(tmp_path)
    assert len(caught) == 1
    places = ["label masks"] * 2 + ["label masks modify"] * 2
    assert [record.label.parent.name for record in records] == places


@pytest.mark.parametrize("folder", ["mask binary", "mask binary_vague"])
def test_vague_areas_have_two_names(tmp_path, folder):
    nuinsseg(tmp_path, "human liver", "a_1", "a_2")
    mask = np.zeros((H, W), np.uint8)
    mask[3:7, 10:20] = 255
    put(tmp_path / "human liver" / "vague areas" / folder / "a_2.png", np.dstack([mask] * 4))
    first, second = map(read_sample, find_records(tmp_path))
    assert first.vague is None
    assert second.vague.dtype == bool
    assert np.array_equal(second.vague, mask > 0)


def test_the_plain_layout_has_organs_and_composed_names(tmp_path):
    name = "naïve é [1]"
    put(tmp_path / "images" / "x.png", ramp())
    put(tmp_path / "labels" / "x.npy", three())
    put(tmp_path / "vague" / "x.png", np.full((H, W), 255, np.uint8))
    put(tmp_path / "images" / "Leber (li)" / f"{unicodedata.normalize('NFD', name)}.png", ramp())
    put(tmp_path / "labels" / "Leber (li)" / f"{unicodedata.normalize('NFC', name)}.tif", three())
    liver, x = find_records(tmp_path)
    assert (liver.name, liver.organ) == (unicodedata.normalize("NFC", name), "Leber (li)")
    assert (x.name, x.organ) == ("x", "")
    assert liver.vague is None and read_sample(liver).label.max() == 3
    assert read_sample(x).vague.all()


def test_a_layout_can_be_asked_for(tmp_path):
    nuinsseg(tmp_path, "liver", "a")
    plain(tmp_path, 2)
    assert len(find_records(tmp_path)) == len(find_records(tmp_path, layout="nuinsseg")) == 1
    assert len(find_records(tmp_path, layout="plain")) == 2


def test_all_problems_of_a_folder_are_named_at_once(tmp_path):
    nuinsseg(tmp_path, "human liver", "a_1")
    images = tmp_path / "human liver" / "tissue images"
    paths = [put(images / f"a_{name}", ramp()) for name in ("2.png", "3.png", "1.tif")]
    paths.append(put(tmp_path / "human liver" / "label masks modify" / "a_1.tif", three()))
    put(tmp_path / "human liver" / "label masks modify" / "a_1.png", three())
    with pytest.raises(UserError) as error:
        find_records(tmp_path)
    title, *lines = str(error.value).splitlines()
    assert title.startswith(f"{tmp_path}: ") and len(lines) == len(paths)
    assert all(sum(line.strip().startswith(f"{path}: ") for line in lines) == 1 for path in paths)


@pytest.mark.parametrize(
    "name", ["labels/x.png", "labels/liver/x.png", "vague/x.png", "annotations/x.geojson"]
)
def test_files_without_an_image_are_told(tmp_path, name):
    path = plain(tmp_path, 2) / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.warns(UserWarning) as caught:
        assert len(find_records(tmp_path)) == 2
    (message,) = (str(w.message) for w in caught if w.category is UserWarning)
    assert message.startswith(f"{tmp_path}: 1 ") and str(path) in message


def test_stems_that_organs_share_get_the_organ(tmp_path):
    nuinsseg(tmp_path, "a", "1")
    nuinsseg(tmp_path, "b", "1", "2")
    records = find_records(tmp_path)
    assert [record.name for record in records] == ["a_1", "b_1", "2"]
    assert len({record.group for record in records}) == 3


def test_annotations_are_labels_of_the_plain_layout(tmp_path):
    for place in ("", "liver/"):
        put(tmp_path / f"images/{place}a.png", ramp())
        outlined(tmp_path / f"annotations/{place}a.geojson")
    put(tmp_path / "images" / "b.png", ramp())
    put(tmp_path / "labels" / "b.tif", three())
    (tmp_path / "annotations" / "a.txt").write_text("notes")
    records = find_records(tmp_path)
    assert [(r.name, r.organ, str(r.label.relative_to(tmp_path))) for r in records] == [
        ("_a", "", "annotations/a.geojson"),
        ("b", "", "labels/b.tif"),
        ("liver_a", "liver", "annotations/liver/a.geojson"),
    ]
    samples = Samples(records)
    assert all(np.array_equal(samples[k].label, COMPACT) for k in range(3))
    rows = inspect_folder(tmp_path)[0]["rows"]
    assert [(row["organ"], row["nuclei"], row["median_area_px"]) for row in rows] == [
        ("", 6, 100),
        ("liver", 3, 100),
        ("all", 9, 100),
    ]


def test_a_bad_annotation_is_named(tmp_path):
    put(tmp_path / "images" / "bad.png", ramp())
    bad = outlined(tmp_path / "annotations" / "bad.geojson")
    bad.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(bad))):
        Samples(find_records(tmp_path))
    assert [str(bad) in text for text in inspect_folder(tmp_path)[0]["bad"]] == [True]


def test_a_group_is_the_first_capture_or_the_match(tmp_path):
    plain(tmp_path, 5)
    slides = ["slide0"] * 2 + ["slide1"] * 2 + ["slide2"]
    assert [r.group for r in find_records(tmp_path, group=r"^(.*)_\d+$")] == slides
    assert [r.group for r in find_records(tmp_path, group=r"e\d")] == [s[4:] for s in slides]


@pytest.mark.parametrize("layout", ["auto", "plain", "nuinsseg"])
def test_what_is_no_data_set_is_named(tmp_path, layout):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"^{re.escape(str(root))}: "):
            find_records(root, layout=layout)


def test_a_data_set_nearby_is_named(tmp_path):
    nuinsseg(tmp_path / "a" / "set", "liver", "1")
    (tmp_path / "b" / "mine" / "images").mkdir(parents=True)
    for root, near in (("a", "a/set"), ("b", "b/mine"), ("a/set/liver", "a/set")):
        with pytest.raises(UserError, match=f"mean {re.escape(str(tmp_path / near))}\\?"):
            find_records(tmp_path / root)


# ---- files ----

GREY = (np.arange(H * W).reshape(H, W) % 256).astype(np.uint8)
CLEAR = np.dstack([ramp(), np.zeros((H, W), np.uint8)])
GREYS = np.dstack([GREY] * 3)


@pytest.mark.parametrize(
    ("names", "stored", "expected"),
    [
        ("rgb.png rgb.tif rgb.bmp", ramp(), ramp()),
        ("alpha.png alpha.tif", CLEAR, ramp()),
        ("grey.png grey.tif", GREY, GREYS),
        ("grey_and_alpha.png", GREYS[..., :2], GREYS),
        ("one_bit.png", GREY > 9, 255 * (GREYS > 9)),
    ],
)
def test_alpha_is_dropped_and_grey_is_repeated(tmp_path, names, stored, expected):
    for name in names.split():
        image = read_image(put(tmp_path / name, stored))
        assert image.dtype == np.uint8
        assert np.array_equal(image, expected)


@pytest.mark.parametrize("top, shift", [(65535, 8), (4095, 4), (255, 0)])
def test_sixteen_bits_lose_their_low_bits(tmp_path, top, shift):
    wide = np.linspace(0, top, H * W).astype(np.uint16).reshape(H, W)
    expected = (wide >> shift).astype(np.uint8)
    assert expected.max() == 255
    image = read_image(put(tmp_path / "a.png", wide))
    assert np.array_equal(image, np.dstack([expected] * 3))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["int", "uint"])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_integer_labels_are_read(tmp_path, kind, bits, suffix):
    label = read_label(put(tmp_path / f"a{suffix}", three().astype(f"{kind}{bits}")))
    assert label.dtype == np.int32
    assert np.array_equal(label, three())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(1, 40))
def test_a_written_label_reads_back(tmp_path_factory, top, height, width):
    path = tmp_path_factory.mktemp("label") / "a.tif"
    label = np.random.default_rng(top).integers(0, top, (height, width), endpoint=True)
    write_label(path, label)
    assert np.array_equal(read_label(path), label)
    assert tifffile.imread(path).dtype == (np.uint16 if label.max() <= 65535 else np.uint32)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.tif"]


def ome(**tags: object) -> dict:
    return {"ome": True, "metadata": {"axes": "YXS", **tags}}


@pytest.mark.parametrize(
    ("mpp", "options"),
    [
        (0.25, {"resolution": (101600, 101600), "resolutionunit": "INCH"}),
        (0.5, {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}),
        (None, {"resolution": (300, 300), "resolutionunit": "INCH"}),
        (None, {}),
        (0.25, {"resolution": (4, 4), "imagej": True, "metadata": {"unit": "um"}}),
        (None, {"resolution": (4, 4), "imagej": True}),
        (0.3, ome(PhysicalSizeX=0.3)),
        (0.3, ome(PhysicalSizeX=300.0, PhysicalSizeXUnit="nm")),
        (0.3, ome(PhysicalSizeX=3e-5, PhysicalSizeXUnit="cm")),
        (None, ome(PhysicalSizeX=0.3, PhysicalSizeXUnit="pixel")),
    ],
)
def test_microns_per_pixel_come_from_the_tags(tmp_path, mpp, options):
    tifffile.imwrite(tmp_path / "a.tif", ramp(), **options)
    assert read_mpp(tmp_path / "a.tif") == (None if mpp is None else pytest.approx(mpp))
    assert read_mpp(put(tmp_path / "a.png", ramp())) is None


# ---- samples ----


def sample_of(root: Path, image: np.ndarray, label: np.ndarray, vague: Path | None = None):
    image, label = put(root / "a.png", image), put(root / "a.tif", label)
    return read_sample(Record("a", "", image, label, vague, "a"))


def test_ids_are_made_compact(tmp_path):
    sample = sample_of(tmp_path, ramp(), three())
    assert sample.label.dtype == np.int32
    assert np.array_equal(sample.label, COMPACT)
    far = three().astype(np.uint32)
    far[far == 9] = 2**31 - 1
    assert np.array_equal(sample_of(tmp_path, ramp(), far).label, COMPACT)
    assert sample_of(tmp_path, ramp(), three() * 0).label.max() == 0


@pytest.mark.parametrize("value", [1, 255, 65535])
def test_binary_masks_are_not_instances(tmp_path, value):
    binary = (three() > 0) * np.uint16(value)
    problem = sample_of(tmp_path, ramp(), binary).problem
    assert re.search(rf"a\.tif: .*3 separate .* {value},", problem)
    with pytest.raises(UserError, match=r"a\.tif: .*3 separate"):
        Samples([Record("a", "", tmp_path / "a.png", tmp_path / "a.tif", None, "a")])
    binary[20:] = 0
    sample = sample_of(tmp_path, ramp(), binary)
    areas = np.bincount(sample.label.ravel())
    assert sample.problem == ""
    assert areas.tolist() == [H * W - 100, 100]


def test_sizes_must_agree_and_suffice(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: found 90x63 px"):
        sample_of(tmp_path, ramp(63), three(63))
    assert sample_of(tmp_path, ramp(64), three(64)).image.shape == (64, 90, 3)
    vague = put(tmp_path / "v.png", GREY[:, :50])
    with pytest.raises(UserError, match=r"v\.png: found 50x70 px, expected 90x70"):
        sample_of(tmp_path, ramp(), three(), vague)


def mixed(root: Path) -> list[Record]:
    """Three images of different sizes; the second has no nuclei, the third a vague area."""
    for number, (height, width) in enumerate([(70, 90), (200, 64), (128, 128)]):
        put(root / "images" / f"{number}.png", ramp(height, width) + np.uint8(number))
        put(root / "labels" / f"{number}.tif", three(height, width) * (number != 1))
    mask = np.zeros((128, 128), np.uint8)
    mask[:40] = 255
    put(root / "vague" / "2.png", mask)
    return find_records(root)


KEPT = 5 * (70 * 90 + 200 * 64) + 6 * 128 * 128  # bytes


@pytest.mark.parametrize("spare, kept", [(0, True), (-1, False)])
def test_samples_are_those_on_disk(tmp_path, spare, kept):
    records = mixed(tmp_path)
    samples = Samples(records, memory_gib=(KEPT + spare) / 2**30)
    assert samples.kept == kept
    assert len(samples) == 3
    for index, record in enumerate(records):
        expected, sample = read_sample(record), samples[index]
        assert np.array_equal(sample.image, expected.image) and sample.image.dtype == np.uint8
        assert np.array_equal(sample.label, expected.label) and sample.label.dtype == np.int32
        assert (sample.vague is None) == (expected.vague is None) == (index != 2)
    assert np.array_equal(samples[2].vague, read_sample(records[2]).vague)


def test_more_nuclei_than_16_bits_hold_are_kept(tmp_path):
    plain(tmp_path, 1, size=(300, 300))
    many = np.arange(90000, dtype=np.uint32).reshape(300, 300) % 65537
    tifffile.imwrite(tmp_path / "labels" / "slide0_0.tif", many)
    samples = Samples(find_records(tmp_path))
    assert samples.planes(0)[1].dtype == np.int32
    assert np.array_equal(samples[0].label, many)


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_all_bad_files_are_named_at_once(tmp_path, memory_gib):
    plain(tmp_path, 6)
    (tmp_path / "images" / "slide0_0.png").write_bytes(b"")
    put(tmp_path / "labels" / "slide0_1.tif", three(71, 90))
    put(tmp_path / "labels" / "slide1_3.tif", (three() > 0) * np.uint8(255))
    with pytest.raises(UserError, match=r"^6 images: ") as error:
        Samples(find_records(tmp_path), memory_gib=memory_gib)
    lines = str(error.value).splitlines()[1:]
    for line, name in zip(lines, ("slide0_0.png", "slide0_1.tif", "slide1_3.tif"), strict=True):
        assert f"{name}: " in line


# ---- folds ----


@pytest.mark.parametrize("count, folds, seed", [(665, 5, 19), (17, 3, 0), (52, 5, 42), (5, 5, 1)])
def test_official_folds_equal_scikit_learn(count, folds, seed):
    expected = KFold(folds, shuffle=True, random_state=seed).split(np.zeros(count))
    for fold, (train, test) in enumerate(expected):
        records = fake_records([""] * count)
        split = split_records(records, Data(folds=folds, fold=fold, seed=seed))
        assert sorted(split.train + split.inner) == train.tolist()
        assert split.test == tuple(test)


def test_official_folds_of_groups_are_those_of_the_sorted_groups():
    groups = [f"g{number % 7}" for number in range(20)][::-1]
    for fold in range(3):
        of_groups = split_records(fake_records([""] * 7), Data(folds=3, fold=fold)).test
        split = split_records(fake_records([""] * 20, groups), Data(folds=3, fold=fold))
        assert {groups[index] for index in split.test} == {f"g{number}" for number in of_groups}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_are_never_separated_and_nothing_is_lost(data):
    count = data.draw(st.integers(2, 40))
    organs = data.draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    number = st.integers(0, 11).map(str)
    groups = data.draw(st.lists(number, min_size=count, max_size=count))
    parts = len(set(groups))
    section = Data(
        split=data.draw(st.sampled_from(["official", "organ"])),
        folds=max(2, min(3, parts)),
        fold=data.draw(st.sampled_from(["all", *range(min(3, parts))])) if parts > 1 else "all",
        inner=data.draw(st.sampled_from([0.1, 0.15, 0.5])),
        seed=data.draw(st.integers(0, 9)),
    )
    records = fake_records(organs, groups)
    split = split_records(records, section)
    assert sorted(split.train + split.inner + split.test) == list(range(count))
    kinds = [{groups[index] for index in part} for part in (split.train, split.inner, split.test)]
    assert sum(map(len, kinds)) == parts
    assert (split.test == ()) == (section.fold == "all")
    assert split.train
    assert bool(split.inner) == (parts - len(kinds[2]) > 1)
    assert split_records(records, section) == split


def test_organ_folds_hold_their_share_of_each_organ():
    organs = ["a"] * 50 + ["b"] * 10 + ["c"] * 23
    records = fake_records(organs)
    tests = [split_records(records, Data(split="organ", fold=fold)).test for fold in range(5)]
    assert sorted(index for test in tests for index in test) == list(range(83))
    counts = [[sum(organs[index] == organ for index in test) for organ in "abc"] for test in tests]
    assert sorted(counts) == [[10, 2, 4]] * 2 + [[10, 2, 5]] * 3
    assert sorted(len(test) for test in tests) == [16, 16, 17, 17, 17]


def test_leave_one_out_tests_all_images_of_an_organ():
    organs = ["b"] * 3 + ["a"] * 9 + ["c"] * 5
    records = fake_records(organs)
    for fold, organ in enumerate("abc"):
        section = Data(split="leave-one-out", folds=3, fold=fold)
        split = split_records(records, section)
        assert {organs[i] for i in split.test} == {organ}
        assert organ not in {organs[i] for i in split.train + split.inner}
        assert len(split.train + split.inner + split.test) == 17
    with pytest.raises(UserError, match=r"^data\.folds: found 5, expected 3.*a, b, c"):
        split_records(records, Data(split="leave-one-out"))
    shared = fake_records(["a", "b", "b"], ["x", "x", "y"])  # leaving a out would leave b's x out
    with pytest.raises(UserError, match=r"^data\.split: found .*group 'x' in several organs"):
        split_records(shared, Data(split="leave-one-out", folds=2))


@pytest.mark.parametrize(
    "batch, accumulate, expected",
    [(1, 1, 111), (4, 1, 83), (2, 4, 62), (64, 64, 1)],  # of 9, 12, 16 and 4,096 a pass
)
def test_presentations_count_what_the_last_batch_repeats(tmp_path, batch, accumulate, expected):
    plain(tmp_path, 11)
    config = Config(
        Data(root=str(tmp_path), fold="all"),
        train=Train(presentations=1000, batch=batch, accumulate=accumulate),
    )
    assert len(find_split(config.data)[1].train) == 9
    changed = with_epochs(config)
    assert changed.train.epochs == expected
    assert with_epochs(changed) == changed
    one = replace(config, train=replace(config.train, batch=1, accumulate=accumulate))
    assert with_epochs(one, processes=batch).train.epochs == expected
    assert with_epochs(Config()) == Config()


def test_the_inner_split_is_stratified_and_depends_on_the_seed():
    records = fake_records(["a"] * 70 + ["b"] * 35 + ["c"] * 7)
    split = split_records(records, Data(fold="all"))
    counts = np.bincount(np.digitize(split.inner, [70, 105]))
    assert counts.tolist() == [10, 5, 1]
    assert split.inner != split_records(records, Data(fold="all", seed=20)).inner


def test_the_inner_split_depends_on_the_fold():
    """Each fold draws other places among its training images, with one seed."""
    places = set()
    for fold in range(5):
        split = split_records(fake_records([""] * 60), Data(fold=fold, seed=7))
        training = sorted(split.train + split.inner)
        places.add(tuple(training.index(index) for index in split.inner))
    assert len(places) == 5


@pytest.mark.parametrize("count, inner", [(2, 0), (3, 1)])
def test_two_training_images_are_enough_for_an_inner_split(count, inner):
    assert len(split_records(fake_records([""] * count), Data(folds=count)).inner) == inner


def test_a_large_group_does_not_take_the_inner_split():
    groups = ["large"] * 100 + [f"small {number // 10}" for number in range(40)]
    records = fake_records([""] * 140, groups)
    for fold in (*range(5), "all"):
        assert len(split_records(records, Data(fold=fold)).inner) == 10
    assert len(split_records(records, Data(fold="all", inner=1e-320)).inner) == 10
    three = fake_records(["a"] * 120 + ["b"] * 10, [str(max(k // 40, k - 117)) for k in range(130)])
    assert len(split_records(three, Data(fold="all")).inner) == 41  # 1 or 2 of b would be worse


def test_fewer_images_are_part_of_more_and_leave_the_test_fold_alone():
    groups = [f"g{number // 2}" for number in range(60)]
    records = fake_records([""] * 60, groups)
    whole = split_records(records, Data(fold=1))
    last = set()
    for images in (5, 16, 30, 200):
        split = split_records(records, Data(fold=1, images=images))
        used = {*split.train, *split.inner}
        assert split.test == whole.test
        assert len(used) == min(images, 48)
        assert len({groups[i] for i in used}) == min(images, 24)  # each group before any twice
        assert not {groups[i] for i in split.train} & {groups[i] for i in split.inner}
        assert last < used and split.inner
        last = used
    assert split == whole
    unused = split_records(records, Data(images=8))
    parts = [entry["part"] for entry in inventory(records, unused, ["0"] * 60).values()]
    assert parts.count("unused") == 40 and parts.count("test") == 12


def test_more_folds_than_groups_are_refused():
    records = fake_records([""] * 8)
    assert len(split_records(records, Data(folds=8)).test) == 1
    with pytest.raises(UserError, match=r"^data\.folds: found 9.* 8"):
        split_records(records, Data(folds=9))


# ---- crops ----


def test_a_crop_is_a_window_of_the_image(tmp_path):
    samples = Samples(mixed(tmp_path))
    expected = read_sample(samples.records[2])
    places = set()
    for epoch in range(40):
        item = Crops(samples, window=64, seed=3)[epoch, 2]
        top, left = (int(item["image"][axis, 0, 0]) - 2 for axis in (0, 1))
        rows, columns = slice(top, top + 64), slice(left, left + 64)
        image = item["image"].numpy().transpose(1, 2, 0)
        assert np.array_equal(image, expected.image[rows, columns])
        assert np.array_equal(item["label"].numpy(), expected.label[rows, columns])
        assert np.array_equal(item["counted"].numpy(), ~expected.vague[rows, columns])
        assert item["index"].item() == 2
        assert item["draws"].shape == (32,) and item["draws"].min() >= 0 and item["draws"].max() < 1
        places.add((top, left))
    assert len(places) > 30
    assert min(map(min, places)) >= 0 and max(map(max, places)) <= 64
    kinds = [str(item[key].dtype) for key in ("image", "label", "counted", "draws", "index")]
    assert kinds == [f"torch.{kind}" for kind in ("uint8", "int32", "bool", "float32", "int64")]


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
        # The image's own row and column of every pixel: a triangle wave through the counted part
        waves = []
        for axis, side, inside in ((0, 70, rows), (1, 90, columns)):
            line = image[axis, :, columns[0]] if axis == 0 else image[axis, rows[0], :]
            start = int(line[inside[0]]) - inside[0]
            wave = (np.arange(window) + start) % (2 * side - 2)
            waves.append(np.minimum(wave, 2 * side - 2 - wave))
            assert np.array_equal(line, waves[-1])
        if window >= 90:
            assert np.array_equal(label, COMPACT[np.ix_(*waves)])


def test_targets_at_the_border_of_a_small_image_are_those_of_the_image(tmp_path):
    """A nucleus that the border cuts, and one in its corner; their reflections may be cut."""
    import torch

    label = np.zeros((64, 64), np.uint8)
    label[:12, 20:40], label[50:, 56:] = 1, 2
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(label).save(tmp_path / "a_mask.png")
    samples = Samples(find_records(tmp_path))
    whole = torch.from_numpy(label.astype(np.int64))[None]
    classes = targets.classes(whole)
    depth = targets.depth(whole, classes, 2)
    for epoch in range(20):
        item = Crops(samples, window=108, seed=1)[epoch, 0]
        padded, counted = item["label"][None].long(), item["counted"][None]
        of_padded = targets.classes(padded)
        assert counted.sum() == 64 * 64
        assert torch.equal(of_padded[counted], classes.flatten())
        found = targets.depth(padded, of_padded, 2, counted)
        assert torch.equal(found[counted], depth.flatten())


def batches_of(crops: Crops, batches, **options) -> list[dict]:
    from torch.utils.data import DataLoader

    return list(DataLoader(crops, batch_sampler=batches, **options))


@pytest.mark.parametrize("context, workers", [("fork", 2), ("forkserver", 1), ("spawn", 1)])
def test_workers_change_nothing(tmp_path, context, workers):
    """A second worker that starts afresh would import PyTorch once more."""
    import torch

    crops = Crops(Samples(mixed(tmp_path)), window=96, seed=5)
    batches = EpochBatches(range(3), batch=2, seed=5)
    alone = batches_of(crops, batches)
    beside = batches_of(crops, batches, num_workers=workers, multiprocessing_context=context)
    assert len(alone) == len(beside) == 2
    for a, b in zip(alone, beside):
        assert a["image"].shape == (2, 3, 96, 96)
        assert all(torch.equal(a[key], b[key]) for key in a)
    batches.set_epoch(1)
    assert not torch.equal(batches_of(crops, batches)[0]["draws"], alone[0]["draws"])


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
    options = {"accumulation": accumulation, "seed": 1, "epoch": epoch}
    alone = EpochBatches(indices, batch=batch * processes, **options)
    ranks = [
        EpochBatches(indices, batch=batch, rank=rank, processes=processes, **options)
        for rank in range(processes)
    ]
    joined = [[key for part in parts for key in part] for parts in zip(*ranks)]
    assert joined == list(alone)
    assert len(alone) == len(joined) == alone.steps * accumulation
    assert alone.steps == ranks[0].steps == -(-count // (batch * processes * accumulation))
    assert {first for keys in alone for first, _ in keys} == {epoch}
    order = [index for keys in alone for _, index in keys]
    assert sorted(order[:count]) == indices
    assert order[count:] == (order[:count] * len(order))[: len(order) - count]


def test_epochs_differ_and_resume_in_the_middle():
    batches = EpochBatches(range(50), batch=4, accumulation=2, seed=7)
    first = list(batches)
    assert len(first) == len(batches) == 14
    batches.set_epoch(0, skip=5)
    assert list(batches) == first[5:]
    assert len(batches) == 9
    batches.set_epoch(1)
    assert len(batches) == 14
    assert [[i for _, i in keys] for keys in batches] != [[i for _, i in keys] for keys in first]


# ---- inspection ----


def test_inspection_counts_and_lists_what_is_bad(tmp_path):
    nuinsseg(tmp_path, "liver (x)", "a_1", "a_2")
    nuinsseg(tmp_path, "brain", "b_1", "b_2", "b_3")
    mask = np.zeros((H, W), np.uint8)
    mask[:7] = 255
    put(tmp_path / "brain" / "vague areas" / "mask binary" / "b_1.png", mask)
    put(tmp_path / "brain" / "label masks modify" / "b_2.tif", three() * 0)
    put(tmp_path / "liver (x)" / "label masks modify" / "a_1.tif", three().astype(np.float32) / 2)
    put(tmp_path / "brain" / "tissue images" / "alone.png", ramp())
    (tmp_path / "brain" / "tissue images" / "b_3.png").write_bytes(b"no image")
    summary, examples = inspect_folder(tmp_path, group=r"^(\w+)_|alone")
    brain, liver, total = summary["rows"]
    assert brain == brain | {"organ": "brain", "images": 2, "nuclei": 3, "images_without": 1}
    assert brain["vague_percent"] == pytest.approx(10)
    assert brain["nuclei_per_image"] == 1.5
    assert liver == liver | {"organ": "liver (x)", "images": 1, "median_area_px": 100.0}
    assert liver["vague_percent"] is None
    assert total == total | {"images": 3, "nuclei": 6, "groups": 2, "sizes": {"90x70": 3}}
    bad = sorted(Path(line.partition(":")[0]).name for line in summary["bad"])
    assert bad == ["a_1.tif", "alone.png", "b_3.png"]
    assert [record.name for record in examples] == ["b_1", "a_2", "b_2"]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(summary))
    assert "liver (x)" in capture.get() and "90x70" in capture.get()


def test_import_is_light():
    code = "import sys, nucsam.data; print({'torch', 'scipy', 'PIL', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_crop_of_another_magnification_is_resampled(tmp_path):
    """Of an image with half the microns per px a crop takes twice the side."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    squares = np.kron(np.arange(1, 65).reshape(8, 8), np.ones((16, 16), int)).astype(np.uint16)
    tags = {"resolutionunit": "CENTIMETER", "photometric": "rgb"}
    for name, mpp in (("fine", 0.25), ("near", 0.51), ("same", 0.5)):
        picture = np.repeat(squares[..., None] * 3, 3, 2).astype(np.uint8)
        place = tmp_path / "images" / f"{name}.tif"
        tifffile.imwrite(place, picture, resolution=(1e4 / mpp, 1e4 / mpp), **tags)
        tifffile.imwrite(tmp_path / "labels" / f"{name}.tif", squares)
    samples = Samples(find_records(tmp_path))
    assert samples.mpps == pytest.approx([0.25, 0.51, 0.5])
    with pytest.warns(UserWarning, match="resample them to 0.5"):
        _, ratios = magnification(Data(mpp=0.5), samples.mpps, samples.areas, range(3))
    fine, near, same = (Crops(samples, window=64, seed=1, ratios=ratios)[0, k] for k in range(3))
    assert len(np.unique(fine["label"])) == 64 and fine["label"].shape == (64, 64)
    assert np.array_equal(fine["label"], squares[::2, ::2])  # squares of 16 px become 8 px
    assert np.array_equal(fine["image"][0, 4::8, 4::8], 3 * np.arange(1, 65).reshape(8, 8))
    assert len(np.unique(near["label"])) <= 25 and len(np.unique(same["label"])) <= 25
    whole = Crops(samples, window=128, seed=1)[0, 0]  # microns of the run not known
    assert np.array_equal(whole["label"], squares)


def test_a_crop_is_resampled_to_the_nucleus_area_of_the_run(tmp_path):
    squares = np.kron(np.arange(1, 65, dtype=np.uint8).reshape(8, 8), np.ones((16, 16), np.uint8))
    squares[(squares == 1) | (squares == 3)] = 2  # a larger nucleus leaves the median at 256 px
    few = np.where(squares > 55, squares, 0)  # nine, which do not tell
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, label in (("few", few), ("none", 0 * squares), ("nuclei", squares)):
        put(tmp_path / "images" / f"{name}.png", np.zeros((128, 128, 3), np.uint8))
        put(tmp_path / "labels" / f"{name}.png", label)
    samples = Samples(find_records(tmp_path))
    assert samples.areas == [0, 0, 256]  # in the order of names
    wide = 256 / 64 * math.exp(0.04)  # the nearest step of 5 % is taken

    def ratios(area):
        return magnification(Data(nucleus_area=area), samples.mpps, samples.areas, range(3))[1]

    assert ratios(256 / wide) == pytest.approx([1, 1, 2], rel=0.03)
    crop = Crops(samples, window=64, seed=1, ratios=[1, 1, 2.0])[0, 2]
    assert np.array_equal(crop["label"], samples[2].label[::2, ::2])
    assert ratios(1.0) == [1, 1, 3]
    assert ratios(1e9) == [1, 1, 1 / 3]
    assert ratios(256 * 1.04) == [1, 1, 1]  # exactly


def test_an_image_is_known_by_its_pixels_and_ids_not_by_its_files(tmp_path):
    first = Samples(find_records(plain(tmp_path / "a", 2))).digests
    moved = find_records(plain(tmp_path / "b", 2))
    for record in moved:  # another format, the same pixels
        Image.open(record.image).convert("RGB").save(record.image.with_suffix(".tif"))
        record.image.unlink()
    moved = find_records(tmp_path / "b")
    assert Samples(moved).digests == first and len(set(first)) == 2
    pixels = read_image(moved[0].image).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(moved[0].image)
    second = Samples(moved).digests
    assert second[0] != first[0] and second[1] == first[1]
