"""Dense maps -> label map, on discs whose maps are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.segmentation import watershed

from nucsam.instances import SEED_AREA, from_distances, from_foreground, whole
from nucsam.targets import classes, distances


def discs(*places: tuple[float, float, float], side: int = 64) -> np.ndarray:
    """Labels 1.. of discs (row, column, radius); a later one covers an earlier one."""
    y, x = np.mgrid[:side, :side]
    label = np.zeros((side, side), np.int32)
    for number, (row, column, radius) in enumerate(places, 1):
        label[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = number
    return label


def perfect(label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Foreground, centre and boundary distance as training has them."""
    labels = torch.from_numpy(label)[None]
    centre, boundary = distances(labels, classes(labels), int(label.max()))[0].numpy()
    return (label > 0).astype(np.float32), centre, boundary


def same_up_to_ids(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = {*zip(a.ravel().tolist(), b.ravel().tolist())}
    return len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) and ((a == 0) == (b == 0)).all()


touching = discs((20, 20, 10), (20, 39, 9), (38, 30, 11))


def test_perfect_maps_give_the_nuclei_back():
    found = from_distances(*perfect(touching))
    assert found.dtype == np.int32
    assert sorted(np.unique(found)) == [0, 1, 2, 3]
    assert (found > 0).sum() == (touching > 0).sum()
    # the watershed cuts along the crest of the boundary distance, which may be a pixel off
    assert all(max((found[touching == k] == j).mean() for j in (1, 2, 3)) > 0.97 for k in (1, 2, 3))
    assert ndimage.label(touching)[1] == 1  # negative control: without distances they are one


def test_seeds_need_both_distances():
    foreground, centre, boundary = perfect(touching)
    assert from_distances(foreground, centre, boundary, seed_centre=1e-6).max() == 0
    assert from_distances(foreground, centre, boundary, seed_boundary=1e-6).max() == 0
    everywhere = from_distances(foreground, centre * 0, boundary * 0)  # all foreground is one seed
    assert everywhere.max() == 1


def test_threshold_is_exclusive_and_a_nucleus_lies_within_it():
    foreground, centre, boundary = perfect(discs((30, 30, 12)))
    foreground = np.where((foreground > 0) & (np.arange(64) < 30), 0.6, 0.5 * foreground)
    found = from_distances(foreground, centre, boundary, threshold=0.5)
    assert (found > 0).sum() == (foreground > 0.5).sum() > 0
    assert (found[:, 30:] == 0).all()


@pytest.mark.parametrize(("pixels", "found"), [(SEED_AREA - 1, 0), (SEED_AREA, 1)])
def test_small_seeds_are_noise(pixels, found):
    foreground = np.ones((20, 20))
    centre = np.ones((20, 20))
    centre[5, 2 : 2 + pixels] = 0
    label = from_distances(foreground, centre, np.zeros((20, 20)))
    assert label.max() == found
    assert (label > 0).all() == bool(found)  # the one seed floods all


def test_nuclei_under_the_area_are_dropped():
    label = discs((15, 15, 8), (45, 45, 4))
    small = int((label == 2).sum())
    for area, left in ((small, 2), (small + 1, 1)):
        assert from_distances(*perfect(label), area=area).max() == left
        assert from_foreground((label > 0).astype(float), area=area).max() == left


def test_nothing_from_nothing():
    empty = np.zeros((16, 24))
    assert from_distances(empty, empty + 1, empty + 1).tolist() == empty.tolist()
    assert from_foreground(empty).tolist() == empty.tolist()


def test_a_foregrounds_own_depth_splits_a_waist():
    """Two discs that overlap a little are two, a disc and a long ellipse one each, whatever the probability's slope."""
    waist = discs((30, 20, 10), (30, 37, 10)) > 0
    found = from_foreground(np.where(waist, 0.9, 0.1))
    assert found.max() == 2
    assert len({found[30, 20], found[30, 37]}) == 2
    y, x = np.mgrid[:64, :64]
    ellipse = ((y - 32) / 7) ** 2 + ((x - 32) / 16) ** 2 <= 1
    for shape in (discs((30, 30, 14)) > 0, ellipse):
        assert same_up_to_ids(from_foreground(np.where(shape, 0.8, 0.2)), shape.astype(int))


def slow_whole(labels: np.ndarray, area: int) -> np.ndarray:
    """A loop over nuclei and pieces: of each id its largest piece, of equal ones the last in raster order."""
    kept = np.zeros(labels.shape, np.int32)
    found = []
    for value in np.unique(labels[labels > 0]):
        pieces, n = ndimage.label(labels == value)
        sizes = [(pieces == k).sum() for k in range(1, n + 1)]
        best = max(range(n), key=lambda k: (sizes[k], k)) + 1
        if sizes[best - 1] >= area:
            found.append(pieces == best)
    for number, mask in enumerate(sorted(found, key=lambda mask: int(mask.ravel().argmax())), 1):
        kept[mask] = number
    return kept


@settings(max_examples=150, deadline=None)
@given(
    labels=arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4)),
    area=st.integers(0, 6),
)
def test_whole_equals_a_loop(labels, area):
    assert np.array_equal(whole(labels, area), slow_whole(labels, area))


def test_whole_by_hand():
    labels = np.array([[7, 7, 0, 3], [0, 0, 7, 3], [7, 0, 0, 3], [2, 2, 0, 0]])
    assert whole(labels, 2).tolist() == [[1, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2], [3, 3, 0, 0]]
    assert whole(labels, 3).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def plain_from_distances(foreground, centre, boundary, area):
    """What `from_distances` says, with a queue over all pixels."""
    nucleus = foreground > 0.5
    seeds, n = ndimage.label(nucleus & (centre < 0.5) & (boundary < 0.5))
    for seed in range(1, n + 1):
        if (seeds == seed).sum() < SEED_AREA:
            seeds[seeds == seed] = 0
    return whole(watershed(boundary, seeds, mask=nucleus), area)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.8, 1.0])
def test_flooding_only_where_seeds_meet_changes_nothing(share):
    """Smooth noise, in which a part of the components of the foreground have no seed, one, or many."""
    seeded = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        noise = [ndimage.gaussian_filter(rng.random((90, 110)), 2) for _ in range(3)]
        foreground, centre, boundary = (np.argsort(np.argsort(m.ravel())).reshape(m.shape) / m.size for m in noise)
        foreground = np.where(foreground < share, 0.9, 0.1)
        for area in (0, 30):
            found, expected = (
                f(foreground, centre, boundary, area=area) for f in (from_distances, plain_from_distances)
            )
            assert np.array_equal(found, expected)
        parts, n = ndimage.label(foreground > 0.5)
        seeded |= {len(np.unique(found[parts == part])) for part in range(1, n + 1)}
    assert max(seeded) > 3  # many in one component
    assert len(seeded) > 1 or share == 1.0
