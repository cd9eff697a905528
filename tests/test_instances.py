"""Dense maps -> label map, on discs whose maps are known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

from nucsam.instances import from_depth, from_foreground, whole
from nucsam.targets import classes, depth


def discs(*places: tuple[float, float, float], side: int = 64) -> np.ndarray:
    """Labels 1.. of discs (row, column, radius); a later one covers an earlier one."""
    y, x = np.mgrid[:side, :side]
    label = np.zeros((side, side), np.int32)
    for number, (row, column, radius) in enumerate(places, 1):
        label[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = number
    return label


def perfect(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Foreground and depth as training has them."""
    labels = torch.from_numpy(label)[None]
    return (label > 0).astype(np.float32), depth(labels, classes(labels), int(label.max()))[0].numpy()


def same_up_to_ids(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = {*zip(a.ravel().tolist(), b.ravel().tolist())}
    return len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) and ((a == 0) == (b == 0)).all()


touching = discs((20, 20, 10), (20, 39, 9), (38, 30, 11))


def test_perfect_maps_give_the_nuclei_back():
    found = from_depth(*perfect(touching))
    assert found.dtype == np.int32
    assert sorted(np.unique(found)) == [0, 1, 2, 3]
    assert (found > 0).sum() == (touching > 0).sum()
    # the flood cuts along the valley of the depth, which may be a pixel off
    assert all(max((found[touching == k] == j).mean() for j in (1, 2, 3)) > 0.97 for k in (1, 2, 3))
    assert ndimage.label(touching)[1] == 1  # negative control: without depth they are one


def test_a_flat_depth_splits_nothing():
    foreground, depth = perfect(touching)
    for flat in (0 * depth, 0 * depth + 1):
        assert np.array_equal(from_depth(foreground, flat), (touching > 0).astype(np.int32))


@pytest.mark.parametrize(("rise", "found"), [(0.29, 2), (0.31, 1)])
def test_a_seed_rises_so_much_above_the_pass_to_a_deeper_one(rise, found):
    """Two ridges, 1.0 and 0.8 deep, with a pass of 0.5 between them; a third, 0.6, on the way is never enough."""
    depth = np.full((9, 90), 0.5)
    for column, top in ((15, 1.0), (45, 0.6), (75, 0.8)):
        depth[:, column - 10 : column + 11] = top
    label = from_depth(np.ones_like(depth), depth, rise=rise)
    assert label.max() == found
    assert len({label[4, 15], label[4, 75]}) == found
    assert (label > 0).all()


def test_threshold_is_exclusive_and_a_nucleus_lies_within_it():
    foreground, depth = perfect(discs((30, 30, 12)))
    foreground = np.where((foreground > 0) & (np.arange(64) < 30), 0.6, 0.5 * foreground)
    found = from_depth(foreground, depth, threshold=0.5)
    assert (found > 0).sum() == (foreground > 0.5).sum() > 0
    assert (found[:, 30:] == 0).all()


def test_nuclei_under_the_area_are_dropped():
    label = discs((15, 15, 8), (45, 45, 4))
    small = int((label == 2).sum())
    for area, left in ((small, 2), (small + 1, 1)):
        assert from_depth(*perfect(label), area=area).max() == left
        assert from_foreground((label > 0).astype(float), area=area).max() == left


def test_unsure_nuclei_are_dropped_by_their_mean():
    label = discs((15, 15, 8), (45, 45, 6))
    _, depth = perfect(label)
    foreground = np.choose(label, [0.1, 0.8, 0.6])
    foreground[45, 45] = 1.0  # one sure pixel makes no sure nucleus
    for confidence, left in ((0.0, [1, 2]), (0.6, [1, 2]), (0.7, [1]), (0.9, [])):
        for found in (
            from_depth(foreground, depth, confidence=confidence),
            from_foreground(foreground, confidence=confidence),
        ):
            assert same_up_to_ids(found, np.where(np.isin(label, left), label, 0))
            assert found.max() == len(left)


def test_nothing_from_nothing():
    empty = np.zeros((16, 24))
    assert from_depth(empty, empty).tolist() == empty.tolist()
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


def slow_whole(labels: np.ndarray, foreground: np.ndarray, area: int, confidence: float) -> np.ndarray:
    """A loop over nuclei and pieces: of each id its largest piece, of equal ones the last in raster order."""
    kept = np.zeros(labels.shape, np.int32)
    found = []
    for value in np.unique(labels[labels > 0]):
        pieces, n = ndimage.label(labels == value)
        sizes = [(pieces == k).sum() for k in range(1, n + 1)]
        best = max(range(n), key=lambda k: (sizes[k], k)) + 1
        if sizes[best - 1] >= area and foreground[pieces == best].sum() >= confidence * sizes[best - 1]:
            found.append(pieces == best)
    for number, mask in enumerate(sorted(found, key=lambda mask: int(mask.ravel().argmax())), 1):
        kept[mask] = number
    return kept


@settings(max_examples=150, deadline=None)
@given(
    labels=arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4)),
    area=st.integers(0, 6),
    confidence=st.sampled_from([0.0, 0.5, 0.75]),
    seed=st.integers(0, 99),
)
def test_whole_equals_a_loop(labels, area, confidence, seed):
    foreground = np.random.default_rng(seed).integers(0, 5, labels.shape) / 4  # sums without rounding
    found = whole(labels, foreground, area=area, confidence=confidence)
    assert np.array_equal(found, slow_whole(labels, foreground, area, confidence))


def test_whole_by_hand():
    labels = np.array([[7, 7, 0, 3], [0, 0, 7, 3], [7, 0, 0, 3], [2, 2, 0, 0]])
    sure, of = np.ones(labels.shape), {"confidence": 0.0}
    assert whole(labels, sure, area=2, **of).tolist() == [[1, 1, 0, 2], [0, 0, 0, 2], [0, 0, 0, 2], [3, 3, 0, 0]]
    assert whole(labels, sure, area=3, **of).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    sure[1, 3] = 0.0  # the long one's mean is two thirds
    assert whole(labels, sure, area=3, confidence=0.7).max() == 0


def plain_from_depth(foreground, depth, rise):
    """What `from_depth` says, by reconstruction and a queue over all pixels."""
    depth = np.where(foreground > 0.5, depth, -1.0)  # so far below that no component is lost in it
    rebuilt = reconstruction(np.maximum(depth - rise, -1), depth, footprint=ndimage.generate_binary_structure(2, 1))
    seeds, _ = ndimage.label(local_maxima(rebuilt, connectivity=1) & (foreground > 0.5))
    return watershed(-depth, seeds, mask=foreground > 0.5)


@pytest.mark.parametrize("share", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("rise", [0.05, 0.2, 0.5])
def test_equals_a_flood_from_the_h_maxima(share, rise):
    """Smooth noise, in which components of the foreground have one maximum or many, of all heights."""
    split = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        noise = [ndimage.gaussian_filter(rng.random((90, 110)), 2) for _ in range(2)]
        foreground, depth = (np.argsort(np.argsort(m.ravel())).reshape(m.shape) / m.size for m in noise)
        foreground = np.where(foreground < share, 0.9, 0.1)
        found = from_depth(foreground, 0.2 + 0.8 * depth, rise=rise, area=0)
        expected = plain_from_depth(foreground, (0.2 + 0.8 * depth).astype(np.float32), rise)
        assert found.max() == len(np.unique(expected[expected > 0]))
        pairs, counts = np.unique(np.stack([found, expected])[:, expected > 0], axis=1, return_counts=True)
        largest = np.zeros(found.max() + 1, int)
        np.maximum.at(largest, pairs[0], counts)
        assert largest.sum() > 0.98 * (expected > 0).sum()  # where floods meet, pixels of equal right
        parts, n = ndimage.label(foreground > 0.5)
        split |= {len(np.unique(found[parts == part])) for part in range(1, n + 1)}
    assert max(split) > 3  # many in one component
    assert len(split) > 1 or share == 1.0
