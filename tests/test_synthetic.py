from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu

from nucsam.cli import run_command
from nucsam.data.folders import find_records
from nucsam.data.images import read_label
from nucsam.data.samples import read_sample
from nucsam.data.synthetic import ORGANS, make_image, write_dataset
from nucsam.errors import UserError


@pytest.fixture(scope="module")
def images() -> list[tuple]:
    return [make_image(192, (5, number), organ=organ) for number in range(6) for organ in ORGANS]


def test_layout_of_an_image(images):
    for image, label, vague in images:
        assert (image.shape, image.dtype) == ((192, 192, 3), np.uint8)
        assert (label.shape, label.dtype) == ((192, 192), np.int32)
        assert (vague.shape, vague.dtype) == ((192, 192), bool)
        assert label.min() == 0


def test_a_seed_fixes_the_image_and_another_changes_it():
    first, again, other = (make_image(96, seed, organ="human bladder") for seed in (4, 4, 5))
    assert all(np.array_equal(array, same) for array, same in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_nuclei_are_of_many_sizes_and_touch(images):
    labels = [label for _, label, _ in images]
    counts = [len(np.unique(label)) - 1 for label in labels]
    areas = np.concatenate([np.bincount(label.ravel())[1:] for label in labels])
    diameters = np.sqrt(areas[areas > 0] * 4 / np.pi)
    touching = 0
    for label in labels:
        pairs = np.sort([label[:, 1:], label[:, :-1]], 0)
        pairs = pairs[:, (pairs[0] > 0) & (pairs[0] != pairs[1])]
        touching += len(np.unique(pairs, axis=1).T)
    assert np.mean(counts) > 12
    assert np.quantile(diameters, 0.05) < 10
    assert np.quantile(diameters, 0.99) > 24
    assert diameters.max() < 40
    assert touching > 0.2 * sum(counts)
    assert 5 <= sum(vague.any() for *_, vague in images) <= 25


def test_some_images_have_no_nuclei():
    labels = [make_image(96, (0, number), organ="mouse spleen")[1] for number in range(120)]
    assert 1 <= sum(not label.any() for label in labels) <= 20


def test_nuclei_are_bluer_than_what_is_around_them(images):
    contrasts = []
    for image, label, _ in images:
        redness = image[..., 0] / (image[..., 2] + 1.0)
        for index, window in enumerate(ndimage.find_objects(label), 1):
            if window is not None and (label[window] == 0).any():
                inside, outside = label[window] == index, label[window] == 0
                contrasts.append(redness[window][outside].mean() - redness[window][inside].mean())
    assert len(contrasts) > 300
    assert np.mean(np.array(contrasts) > 0) > 0.95


def test_a_threshold_does_not_solve_it(images):
    dice, objects, nuclei = [], 0, 0
    for image, label, _ in images:
        if label.any():
            grey = image.mean(-1)
            dark, truth = grey < threshold_otsu(grey), label > 0
            dice.append(2 * (dark & truth).sum() / (dark.sum() + truth.sum()))
            objects += ndimage.label(truth)[1]
            nuclei += len(np.unique(label)) - 1
    assert np.mean(dice) < 0.7
    assert objects < 0.85 * nuclei  # not even the true foreground separates the nuclei


def test_dataset_reads_back_as_nuinsseg(tmp_path):
    out = tmp_path / "new" / "set"
    write_dataset(out, images=8, size=80, seed=2)
    numbers, gaps = [], 0
    for record in find_records(out):
        place = int(record.name.rsplit("_", 1)[1]) - 1
        numbers.append(place * len(ORGANS) + list(ORGANS).index(record.organ))
        image, label, vague = make_image(80, (2, numbers[-1]), organ=record.organ)
        sample = read_sample(record)
        assert record.label.parent.name == "label masks modify"
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.vague, vague)
        assert np.array_equal(sample.label, np.searchsorted(np.unique(label), label))
        written = read_label(record.label)
        gaps += written.max() - len(np.unique(written)) + 1
    assert sorted(numbers) == list(range(8))
    assert gaps > 20
    assert list(out.parent.iterdir()) == [out]


def test_dataset_repeats_byte_for_byte(tmp_path):
    write_dataset(tmp_path / "a", images=3, size=72, seed=9)
    options = ["--images", "3", "--size", "72", "--seed", "9"]
    assert run_command(["synth", str(tmp_path / "b"), *options]) == 0
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 9


def test_dataset_leaves_other_files_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(UserError, match=out.name):
            write_dataset(out, images=1, size=64, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", images=1, size=64, seed=0)
    assert len(find_records(tmp_path / "empty")) == 1


@pytest.mark.parametrize(("images", "size", "seed"), [(0, 64, 0), (1, 63, 0), (1, 64, -1)])
def test_numbers_out_of_range_are_refused(tmp_path, images, size, seed):
    with pytest.raises(UserError, match=r": found .*expected at least"):
        write_dataset(tmp_path / "set", images=images, size=size, seed=seed)
    assert not list(tmp_path.iterdir())


def test_the_folder_where_a_shell_is_gets_the_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(".", images=2, size=64, seed=0)
    assert len(find_records(Path.cwd())) == 2
    assert not list(tmp_path.glob(".*"))
