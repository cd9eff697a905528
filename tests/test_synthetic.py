import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu

from nucsam.data import find_records, read_label, read_sample
from nucsam.synthetic import ORGANS, make_image, write_dataset


@pytest.fixture(scope="module")
def images() -> list[tuple]:
    return [make_image(192, (5, number), organ=organ) for number in range(6) for organ in ORGANS]


def test_layout_of_an_image(images):
    assert len(images) == 36
    for image, label, vague in images:
        assert (image.shape, image.dtype) == ((192, 192, 3), np.uint8)
        assert (label.shape, label.dtype) == ((192, 192), np.int32)
        assert (vague.shape, vague.dtype) == ((192, 192), bool)
        assert label.min() == 0


def test_a_seed_fixes_the_image_and_another_changes_it():
    first, again, other = (make_image(96, seed) for seed in (4, 4, 5))
    assert all(np.array_equal(one, same) for one, same in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_nuclei_are_of_many_sizes_and_touch(images):
    counts = [len(np.unique(label)) - 1 for _, label, _ in images]
    assert np.mean(counts) > 12
    areas = np.concatenate([np.bincount(label.ravel())[1:] for _, label, _ in images])
    diameters = np.sqrt(areas[areas > 0] * 4 / np.pi)
    assert np.quantile(diameters, 0.05) < 10 and np.quantile(diameters, 0.99) > 24
    assert diameters.max() < 40
    touching = 0
    for _, label, _ in images:
        right, left = label[:, 1:], label[:, :-1]
        touching += len({*zip(*np.sort([right, left], 0)[:, (right != left) & (right > 0) & (left > 0)])})
    assert touching > 0.2 * sum(counts)
    assert 5 <= sum(vague.any() for *_, vague in images) <= 25


def test_some_images_have_no_nuclei():
    empty = sum(not make_image(96, (0, number), organ="mouse spleen")[1].any() for number in range(120))
    assert 1 <= empty <= 20


def test_nuclei_are_bluer_than_what_is_round_them(images):
    contrasts = []
    for image, label, _ in images:
        for index, window in enumerate(ndimage.find_objects(label), 1):
            if window is None:
                continue
            red, blue = (image[window][..., channel].astype(float) for channel in (0, 2))
            inside, outside = label[window] == index, label[window] == 0
            if outside.any():
                contrasts.append((red / (blue + 1))[outside].mean() - (red / (blue + 1))[inside].mean())
    assert len(contrasts) > 300
    assert np.mean(np.array(contrasts) > 0) > 0.95


def test_a_threshold_does_not_solve_it(images):
    dice, objects, nuclei = [], 0, 0
    for image, label, _ in images:
        if not label.any():
            continue
        grey = image.mean(-1)
        dark, truth = grey < threshold_otsu(grey), label > 0
        dice.append(2 * (dark & truth).sum() / (dark.sum() + truth.sum()))
        objects += ndimage.label(truth)[1]
        nuclei += len(np.unique(label)) - 1
    assert np.mean(dice) < 0.7
    assert objects < 0.85 * nuclei  # not even the true foreground tells the nuclei apart


def test_dataset_reads_back_as_nuinsseg(tmp_path):
    out = tmp_path / "new" / "set"
    write_dataset(out, images=8, size=80, seed=2)
    records = find_records(out)
    assert [record.organ for record in records].count("mouse fat (white and brown)_subscapula") == 1
    assert len(records) == 8 and len({record.name for record in records}) == 8
    assert {record.label.parent.name for record in records} == {"label masks modify"}
    gaps = 0
    for record in records:
        organ_number, place = list(ORGANS).index(record.organ), int(record.name.rsplit("_", 1)[1]) - 1
        image, label, vague = make_image(80, (2, place * len(ORGANS) + organ_number), organ=record.organ)
        sample = read_sample(record)
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.vague, vague)
        assert np.array_equal(sample.label, np.searchsorted(np.unique(label), label))
        written = read_label(record.label)
        gaps += written.max() - len(np.unique(written)) + 1
    assert gaps > 20
    assert [path.name for path in out.parent.iterdir()] == ["set"]


def test_dataset_repeats_byte_for_byte(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name, images=3, size=72, seed=9)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_dataset_leaves_other_files_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="found files there, expected a new or empty folder"):
        write_dataset(tmp_path, images=1, size=64, seed=0)
    with pytest.raises(ValueError, match=r"kept\.txt: found files there"):
        write_dataset(tmp_path / "kept.txt", images=1, size=64, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", images=1, size=64, seed=0)
    assert len(find_records(tmp_path / "empty")) == 1
