"""The grid of tiles, the windows, and which window keeps a nucleus."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.segmentation import relabel_sequential

from nucsam.errors import UserError
from nucsam.predict.tiles import (
    STRIP,
    Tiles,
    Window,
    grid,
    meet,
    own_nuclei,
    ramps,
    usual_tiles,
    windows,
)


def test_the_usual_tiles_of_a_crop():
    assert usual_tiles(512) == (512, 32)
    assert usual_tiles(64) == usual_tiles(256) == (256, 16)
    assert usual_tiles(512, tile=100) == (100, 6)
    assert usual_tiles(512, overlap=50) == (512, 50)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 4000),
    tile=st.integers(64, 512),
    part=st.floats(0, 0.5),
    scale=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
)
def test_tiles_cover_and_overlap(size, tile, part, scale):
    overlap = int(part * tile)
    starts, px, model_px = grid(size, tile, overlap, scale)
    assert model_px % 32 == 0 and px == round(model_px / scale)
    assert starts[0] == 0
    if len(starts) == 1:
        assert px >= size  # an image under a tile is padded
        return
    assert starts[-1] + px == size
    steps = np.diff(starts)
    assert (steps <= px - overlap).all()  # neighbours share at least the overlap
    assert (steps > 0).all()
    largest = grid(tile, tile, 0, scale)[1]
    assert px <= largest < max(tile, 64 / scale) + 32 / scale + 1
    fewest = next(n for n in range(2, size) if n * (largest - overlap) + overlap >= size)
    assert len(starts) in (fewest, fewest + 1)
    assert len(starts) * px <= fewest * largest
    smaller = px - 32 / scale - 1
    assert model_px == 64 or (smaller - overlap) * len(starts) + overlap < size


@pytest.mark.parametrize(
    "arguments, starts, px, model_px",
    [
        ((5000, 512, 64, 1.0), [round(4520 * k / 11) for k in range(12)], 480, 480),
        ((500, 512, 64, 2.0), [0], 512, 1024),
        ((513, 512, 0, 1.0), [0, 225], 288, 288),
        ((5000, 512, 32, 1.0), [round(4552 * k / 11) for k in range(12)], 448, 448),  # 11 need 512
    ],
)
def test_tiles_by_hand(arguments, starts, px, model_px):
    assert grid(*arguments) == (starts, px, model_px)


@settings(max_examples=100, deadline=None)
@given(side=st.integers(1, 300), overlap=st.integers(0, 300))
def test_weights_are_positive_and_sum_to_one(side, overlap):
    starts = [0, side - min(overlap, side // 2), 2 * side - min(overlap, side // 2)]
    weights = ramps(starts, side, overlap)
    total = np.zeros(starts[-1] + side)
    for start, part in zip(starts, weights, strict=True):
        assert len(part) == side and (part > 0).all()
        total[start : start + side] += part
    np.testing.assert_allclose(total, 1, atol=1e-6)
    first, second = ramps([0, 96], 100, 4)
    assert first.tolist() == pytest.approx([1.0] * 96 + [0.8, 0.6, 0.4, 0.2])
    assert second.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 96)


@settings(max_examples=100, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    core=st.integers(16, 900),
    margin=st.integers(0, 200),
)
def test_cores_cover_the_image_once_and_margins_surround_them(height, width, core, margin):
    parts = windows((height, width), core, margin)
    for axis, size in enumerate((height, width)):
        bounds = sorted({(w.core[axis].start, w.core[axis].stop) for w in parts})
        assert (bounds[0][0], bounds[-1][1]) == (0, size)
        assert all(before[1] == after[0] for before, after in pairwise(bounds))
        assert max(high - low for low, high in bounds) <= core
        for window in parts:
            inner, outer = window.core[axis], window.outer[axis]
            assert outer.start == max(0, inner.start - margin)
            assert outer.stop == min(size, inner.stop + margin)
    down, across = (len({w.core[axis].start for w in parts}) for axis in (0, 1))
    assert len(parts) == down * across == len({(w.core[0].start, w.core[1].start) for w in parts})


def test_windows_go_down_in_strips():
    parts = windows((30, 10 * (STRIP + 2)), 10, 0)
    corners = [(w.core[0].start, w.core[1].start) for w in parts]
    assert corners[: STRIP + 1] == [*((0, 10 * k) for k in range(STRIP)), (10, 0)]
    assert corners[-3:] == [(10, 10 * STRIP + 10), (20, 10 * STRIP), (20, 10 * STRIP + 10)]


def test_where_two_stretches_meet():
    assert meet(10, 5, slice(12, 40)) == (slice(2, 5), slice(0, 3))
    assert meet(10, 50, slice(12, 40)) == (slice(2, 30), slice(0, 28))


def noise(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def stitched(image, core, margin, overlap=20, tile=64):
    """Each window's maps, of tiles with random maps; the tiles asked for; how many were held."""
    places = windows(image.shape[:2], core, margin)
    tiles = Tiles(image, scale=1.0, tile=tile, overlap=overlap, windows=places)
    parts, asked, held = [], [], []
    for k, window in enumerate(places):
        for key in tiles.ask(k):
            assert not tiles.ready(k)
            assert tiles.read(key).shape == (*tiles.sides, 3)
            asked.append(key[:2])
            tiles.add(key, np.random.default_rng(key[:2]).random((2, *tiles.sides), np.float32))
        assert tiles.ready(k)
        held.append(len(tiles._maps))
        parts.append((window, tiles.stitch(k, tiles.take(k))))
    assert not tiles._maps
    assert len(tiles.asked) == len(asked)
    return parts, asked, held


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(16, 300),
    width=st.integers(16, 300),
    core=st.integers(30, 200),
    margin=st.integers(0, 60),
)
def test_maps_do_not_depend_on_the_windows(height, width, core, margin):
    image = noise(height, width)
    ((_, whole),), _, _ = stitched(image, 2**20, 0)
    assert whole.shape == (2, height, width)
    parts, asked, _ = stitched(image, core, margin)
    for window, maps in parts:
        np.testing.assert_array_equal(maps, whole[:, *window.outer])
    one_strip = -(-width // core) <= STRIP
    assert len(asked) == len(set(asked)) or not one_strip


@pytest.mark.parametrize("height, width", [(700, 200), (700, 900), (1400, 900)])
def test_few_tiles_wait(height, width):
    """Not more in a larger image: tiles between two strips are run for each, instead of waiting."""
    _, asked, held = stitched(noise(height, width), 60, 20)
    down, across = (-(-(s - 20) // 44) for s in (height, width))
    assert len(set(asked)) == down * across
    assert down * across <= len(asked) <= 1.3 * down * across
    assert max(held) <= 4 * min(across, STRIP * 60 // 44 + 4)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), overlap=st.integers(0, 30))
def test_tiles_show_the_image_and_weights_sum_to_one(height, width, overlap):
    image = noise(height, width)
    (window,) = windows((height, width), 2**20, 0)
    tiles = Tiles(image, scale=1.0, tile=64, overlap=overlap, windows=[window])
    for key in tiles.ask(0):
        tiles.add(key, tiles.read(key).transpose(2, 0, 1).astype(np.float32))
    np.testing.assert_allclose(tiles.stitch(0, tiles.take(0)), image.transpose(2, 0, 1), atol=1e-4)


def test_one_window_keeps_a_nucleus():
    """Of 300 random rectangles, that whose core holds the centroid, taken from the whole image."""
    rng = np.random.default_rng(0)
    label = np.zeros((300, 400), np.int32)
    for k in range(300):
        y, x, h, w = *rng.integers(0, (290, 390)), *rng.integers(1, 30, 2)
        place = label[y : y + h, x : x + w]
        place[place == 0] = k + 1
    keepers = np.zeros(301, int)
    for window in windows(label.shape, 100, 60):
        seen = label[window.outer]
        kept = own_nuclei(relabel_sequential(seen)[0], window)
        ids = np.unique(seen[kept > 0])
        keepers[ids] += 1
        for new, old in enumerate(ids, 1):
            np.testing.assert_array_equal(kept == new, seen == old)
            for axis, core in zip(np.nonzero(label == old), window.core):
                assert core.start <= int(axis.mean()) < core.stop
    present = np.unique(label[label > 0])
    assert len(present) > 200
    assert (keepers[present] == 1).all() and keepers.sum() == len(present)


def test_a_window_that_is_the_whole_image_keeps_all():
    label = np.array([[0, 1], [2, 2]], np.int32)
    everything = (slice(0, 2), slice(0, 2))
    np.testing.assert_array_equal(own_nuclei(label, Window(everything, everything)), label)
    left = Window((slice(0, 2), slice(0, 1)), everything)
    # The centroid 0.5 of nucleus 2 counts as column 0
    np.testing.assert_array_equal(own_nuclei(label, left), [[0, 0], [1, 1]])
    nothing = own_nuclei(np.zeros((2, 2), np.int32), left)
    assert nothing.dtype == np.int32 and not nothing.any()


@pytest.mark.parametrize("error", [UserError("torn.tif"), OSError("torn.tif")])
def test_an_image_that_cannot_be_read_to_its_end_fails(error):
    class Torn:
        shape = (200, 64, 3)

        def __getitem__(self, place):
            if place[0].start > 100:
                raise error
            return np.zeros((64, 64, 3), np.uint8)

    tiles = Tiles(Torn(), scale=1.0, tile=64, overlap=10, windows=windows((200, 64), 100, 0))
    keys = list(tiles.ask(0))
    assert [key[:2] for key in keys] == [(0, 0), (1, 0), (2, 0)]
    assert all(tiles.read(key) is not None for key in keys) and tiles.failed is None
    assert [tiles.read(key) for key in tiles.ask(1)] == [None]
    assert tiles.failed is error
