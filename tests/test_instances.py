"""Dense maps -> label map: on discs whose maps are known, and against slow ways to the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

from nucsam.config import Instances
from nucsam.model.instances import from_depth, from_foreground, lenient, whole, with_confidence
from nucsam.model.targets import classes, depth


def limits(**values: float) -> Instances:
    return Instances(**{"confidence": 0.0} | values)


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
    depths = depth(labels, classes(labels), int(label.max()))
    return (label > 0).astype(np.float32), depths[0].numpy()


def same_up_to_ids(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = {*zip(a.ravel().tolist(), b.ravel().tolist())}
    one_to_one = len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs})
    return one_to_one and ((a == 0) == (b == 0)).all()


touching = discs((20, 20, 10), (20, 39, 9), (38, 30, 11))


def test_perfect_maps_give_the_nuclei_back():
    label = from_depth(*perfect(touching), limits())
    assert label.dtype == np.int32
    assert sorted(np.unique(label)) == [0, 1, 2, 3]
    assert ((label > 0) == (touching > 0)).all()
    # The flood cuts along the valley of the depth, which may be a pixel off.
    for nucleus in (1, 2, 3):
        assert np.bincount(label[touching == nucleus]).max() > 0.97 * (touching == nucleus).sum()
    assert ndimage.label(touching)[1] == 1  # negative control: without depth they are one


def test_thresholds_fall_with_the_certainty():
    usual = Instances(foreground=0.5, confidence=0.8, seed_rise=0.2, area=7)
    for certainty in (0.9, 0.95):
        assert lenient(usual, certainty, 0.9) == usual
    lower = lenient(usual, 0.81, 0.9)
    assert lower.foreground == pytest.approx(0.5 * 0.9**8)
    assert lower.confidence == pytest.approx(0.8 * 0.9**3)
    assert (lower.seed_rise, lower.area) == (0.2, 7)


def test_certainty_is_a_mean_over_the_pixels_of_at_least_ten_nuclei():
    label, foreground = np.zeros((40, 10), np.int32), np.zeros((40, 10), np.float32)
    for number in range(1, 11):
        label[4 * number - 4 : 4 * number - 1, :number] = number
        foreground[4 * number - 4 : 4 * number - 1, :number] = number / 10
    found = with_confidence(label, foreground)
    assert found.certainty == pytest.approx(foreground[label > 0].mean())
    label[label == 10] = 0
    assert with_confidence(label, foreground).certainty is None


def test_a_flat_depth_splits_nothing():
    foreground, depths = perfect(touching)
    for flat in (0 * depths, 0 * depths + 1):
        assert np.array_equal(
            from_depth(foreground, flat, limits()), (touching > 0).astype(np.int32)
        )


@pytest.mark.parametrize(("rise", "nuclei"), [(0.249, 2), (0.25, 2), (0.251, 1)])
def test_a_seed_rises_at_least_so_much_above_its_saddle(rise, nuclei):
    """Two ridges, 1 and 0.75 high, with a saddle of 0.5; a third, 0.625, is never a seed."""
    depths = np.full((9, 90), 0.5)
    for column, top in ((15, 1.0), (45, 0.625), (75, 0.75)):
        depths[:, column - 10 : column + 11] = top
    label = from_depth(np.ones_like(depths), depths, limits(seed_rise=rise))
    assert label.max() == nuclei
    assert len({label[4, 15], label[4, 75]}) == nuclei
    assert (label > 0).all()


def test_the_end_of_a_row_does_not_touch_the_next_one():
    foreground = np.zeros((2, 6))
    foreground[0, 3:] = foreground[1, :3] = 1.0
    label = from_depth(foreground, foreground, limits(area=1))
    assert label.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 0, 0, 0]]


def test_ids_follow_the_first_pixels_not_the_seeds():
    depths = np.zeros((9, 9))
    depths[:, :3] = np.linspace(0.1, 0.9, 9)[:, None]  # its seed is in the last row
    depths[1:4, 5:] = 0.5
    label = from_depth((depths > 0).astype(float), depths, limits(area=1))
    assert (label[0, 0], label[1, 5]) == (1, 2)


def test_the_threshold_is_exclusive_and_a_nucleus_lies_within_it():
    foreground, depths = perfect(discs((30, 30, 12)))
    foreground = np.where((foreground > 0) & (np.arange(64) < 30), 0.6, 0.5 * foreground)
    label = from_depth(foreground, depths, limits())
    assert label.any()
    assert ((label > 0) == (foreground > 0.5)).all()


def test_nuclei_under_the_area_are_dropped():
    label = discs((15, 15, 8), (45, 45, 4))
    small = int((label == 2).sum())
    for area, nuclei in ((small, 2), (small + 1, 1)):
        assert from_depth(*perfect(label), limits(area=area)).max() == nuclei
        assert from_foreground((label > 0).astype(float), limits(area=area)).max() == nuclei


@pytest.mark.parametrize(
    ("confidence", "ids"), [(0.0, [1, 2]), (0.6, [1, 2]), (0.7, [1]), (0.9, [])]
)
def test_unsure_nuclei_are_dropped_by_their_mean(confidence, ids):
    label = discs((15, 15, 8), (45, 45, 6))
    _, depths = perfect(label)
    foreground = np.choose(label, [0.1, 0.8, 0.6])
    foreground[45, 45] = 1.0  # one sure pixel makes no sure nucleus
    expected = np.where(np.isin(label, ids), label, 0)
    for found in (
        from_depth(foreground, depths, limits(confidence=confidence)),
        from_foreground(foreground, limits(confidence=confidence)),
    ):
        assert same_up_to_ids(found, expected)
        assert found.max() == len(ids)


def test_nothing_from_nothing():
    empty = np.zeros((16, 24))
    assert from_depth(empty, empty, limits()).tolist() == empty.tolist()
    assert from_foreground(empty, limits()).tolist() == empty.tolist()


def test_a_foregrounds_own_depth_splits_a_waist():
    """Two discs that overlap a little are two; a disc and a long ellipse are one each."""
    waist = discs((30, 20, 10), (30, 37, 10)) > 0
    label = from_foreground(np.where(waist, 0.9, 0.1), limits())
    assert label.max() == 2
    assert len({label[30, 20], label[30, 37]}) == 2
    y, x = np.mgrid[:64, :64]
    ellipse = ((y - 32) / 7) ** 2 + ((x - 32) / 16) ** 2 <= 1
    for shape in (discs((30, 30, 14)) > 0, ellipse):
        assert same_up_to_ids(
            from_foreground(np.where(shape, 0.8, 0.2), limits()), shape.astype(int)
        )


@pytest.mark.parametrize(("gap", "nuclei"), [(5, 1), (6, 2), (-5, 1), (-6, 2)])
def test_a_seed_is_the_highest_pixel_within_reach(gap, nuclei):
    """A slope with its top at column 20, and a lower one `gap` columns from it."""
    column = np.tile(np.arange(41), (9, 1))
    depths = np.where(column == 20 + gap, 0.999, 1 - np.abs(column - 20) / 100)
    label = from_foreground(np.ones((9, 41)), limits(), depths, sigma=0, reach=5)
    assert label.max() == nuclei


def slow_whole(labels: np.ndarray, foreground: np.ndarray, area: int, confidence: float):
    """A loop over nuclei and pieces: the largest, of equal ones the last in raster order."""
    masks = []
    for value in np.unique(labels[labels > 0]):
        pieces, n = ndimage.label(labels == value)
        sizes = [(pieces == k).sum() for k in range(1, n + 1)]
        best = max(range(n), key=lambda k: (sizes[k], k))
        mask = pieces == best + 1
        if sizes[best] >= area and foreground[mask].sum() >= confidence * sizes[best]:
            masks.append(mask)
    expected = np.zeros(labels.shape, np.int32)
    for number, mask in enumerate(sorted(masks, key=lambda mask: int(mask.ravel().argmax())), 1):
        expected[mask] = number
    return expected


@settings(max_examples=150, deadline=None)
@given(
    labels=arrays(np.int32, st.tuples(*[st.integers(1, 9)] * 2), elements=st.integers(0, 4)),
    area=st.integers(0, 6),
    confidence=st.sampled_from([0.0, 0.5, 0.75]),
    seed=st.integers(0, 99),
)
def test_whole_equals_a_loop(labels, area, confidence, seed):
    quarters = np.random.default_rng(seed).integers(0, 5, labels.shape)
    foreground = quarters / 4  # sums without rounding
    found = whole(labels, foreground, limits(area=area, confidence=confidence))
    assert found.dtype == np.int32
    assert np.array_equal(found, slow_whole(labels, foreground, area, confidence))


def plain_from_depth(nucleus: np.ndarray, depths: np.ndarray, rise: float) -> np.ndarray:
    """`from_depth` by reconstruction and a queue over all pixels."""
    depths = np.where(nucleus, depths, -1.0)  # so far below that no component is lost in it
    cross = ndimage.generate_binary_structure(2, 1)
    rebuilt = reconstruction(np.maximum(depths - rise, -1), depths, footprint=cross)
    seeds, _ = ndimage.label(local_maxima(rebuilt, connectivity=1) & nucleus)
    return watershed(-depths, seeds, mask=nucleus)


def uniform_noise(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise, evenly spread over 0..1."""
    smooth = ndimage.gaussian_filter(rng.random((90, 110)), 2)
    return np.argsort(np.argsort(smooth.ravel())).reshape(smooth.shape) / smooth.size


@pytest.mark.parametrize("share", [0.35, 0.6, 1.0])
@pytest.mark.parametrize("rise", [0.05, 0.2, 0.5])
def test_equals_a_flood_from_the_h_maxima(share, rise):
    """Components of the foreground have one maximum or many, of all heights."""
    nuclei = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        nucleus, depths = uniform_noise(rng) < share, 0.2 + 0.8 * uniform_noise(rng)
        label = from_depth(np.where(nucleus, 0.9, 0.1), depths, limits(seed_rise=rise, area=0))
        expected = plain_from_depth(nucleus, depths.astype(np.float32), rise)
        assert label.max() == len(np.unique(expected[nucleus]))
        overlap = np.zeros((label.max() + 1, expected.max() + 1), int)
        np.add.at(overlap, (label[nucleus], expected[nucleus]), 1)
        # Where floods meet, a pixel may go to either.
        assert overlap.max(1).sum() > 0.98 * nucleus.sum()
        components, n = ndimage.label(nucleus)
        nuclei |= {len(np.unique(label[components == part])) for part in range(1, n + 1)}
    assert max(nuclei) > 3  # many in one component
    assert len(nuclei) > 1 or share == 1.0
