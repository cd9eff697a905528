import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label as components

from nucsam.targets import BACKGROUND, BOUNDARY, INSIDE, centre_offsets, classes


def random_labels(seed: int, images: int = 3, height: int = 20, width: int = 27) -> np.ndarray:
    """Boxes on boxes: ids with gaps, nuclei that touch, nest, are cut in pieces or by the border; one image empty."""
    draw = np.random.default_rng(seed)
    labels = np.zeros((images, height, width), np.int32)
    for image in labels[: images - 1]:
        for identity in draw.choice(np.arange(1, 40), draw.integers(1, 9), replace=False):
            y, x = draw.integers(-4, height), draw.integers(-4, width)
            h, w = draw.integers(1, 12, 2)
            image[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = identity
    return labels


def slow_classes(label: np.ndarray) -> np.ndarray:
    found = np.full(label.shape, BACKGROUND)
    H, W = label.shape
    for y, x in zip(*np.nonzero(label)):
        around = label[max(y - 1, 0) : min(y + 2, H), max(x - 1, 0) : min(x + 2, W)]
        found[y, x] = INSIDE if (around == label[y, x]).all() else BOUNDARY
    return found


def slow_offsets(label: np.ndarray, unit: float) -> np.ndarray:
    found = np.zeros((2, *label.shape))
    for identity in np.unique(label[label > 0]):
        y, x = np.nonzero(label == identity)
        found[0, y, x], found[1, y, x] = (y.mean() - y) / unit, (x.mean() - x) / unit
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_classes_equal_a_loop_over_pixels(seed):
    labels = random_labels(seed)
    found = classes(torch.from_numpy(labels))
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), [slow_classes(label) for label in labels])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), spare=st.integers(0, 5), unit=st.sampled_from([1.0, 8.0]))
def test_centre_offsets_equal_a_loop_over_nuclei(seed, spare, unit):
    labels = random_labels(seed)
    found = centre_offsets(torch.from_numpy(labels), int(labels.max()) + spare, unit)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [slow_offsets(label, unit) for label in labels], atol=1e-5)


def test_the_random_label_maps_hold_the_hard_cases():
    maps = [label for seed in range(40) for label in random_labels(seed)]
    ids = [np.unique(label[label > 0]) for label in maps]
    assert sum(len(i) == 0 for i in ids) >= 40
    assert sum(len(i) > 0 and i[-1] > len(i) for i in ids) >= 20  # gaps
    assert sum((label[:, 0] > 0).any() for label in maps) >= 10  # at the border
    pieces = [max((components(label == i)[1] for i in own), default=0) for label, own in zip(maps, ids)]
    assert sum(count > 1 for count in pieces) >= 5


def test_classes_by_hand():
    labels = torch.tensor(
        [
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 2, 2, 2],
            [1, 1, 1, 2, 2, 2],
            [0, 0, 0, 2, 2, 2],
        ]
    )[None]
    expected = [
        [1, 1, 2, 0, 0, 0],  # the image border is no boundary
        [1, 1, 2, 2, 2, 2],  # a neighbour is
        [2, 2, 2, 2, 1, 1],
        [0, 0, 0, 2, 1, 1],
    ]
    assert classes(labels)[0].tolist() == expected


def test_a_corner_neighbour_makes_a_boundary():
    labels = torch.ones(1, 3, 3, dtype=torch.int32)
    labels[0, 0, 0] = 2
    assert classes(labels)[0].tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def test_centre_offsets_by_hand():
    labels = torch.zeros(1, 3, 8, dtype=torch.int32)
    labels[0, 0, :4] = 3  # centre at x = 1.5
    labels[0, 2, 0] = labels[0, 2, 6] = 7  # two pieces of one nucleus, centre at x = 3, outside both
    dy, dx = centre_offsets(labels, 7, 2.0)[0]
    assert dy.tolist() == [[0.0] * 8] * 3
    assert dx.tolist() == [
        [0.75, 0.25, -0.25, -0.75, 0, 0, 0, 0],
        [0.0] * 8,
        [1.5, 0, 0, 0, 0, 0, -1.5, 0],
    ]
    down = torch.stack([centre_offsets(labels.mT, 7, 2.0)[0, 0], centre_offsets(labels.mT, 7, 2.0)[0, 1]])
    assert torch.equal(down, torch.stack([dx.mT, dy.mT]))


def test_the_same_id_in_two_images_is_two_nuclei():
    labels = torch.zeros(2, 4, 4, dtype=torch.int32)
    labels[0, 0, 0], labels[1, 3, 3], labels[1, 3, 1] = 1, 1, 1
    found = centre_offsets(labels, 1, 1.0)
    assert found[0].eq(0).all()
    assert found[1, 1, 3].tolist() == [0, 1, 0, -1]


def test_offsets_point_at_the_centroid():
    labels = torch.from_numpy(random_labels(4))
    offsets = centre_offsets(labels, int(labels.max()), 8.0) * 8
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(27.0), indexing="ij")
    aims = offsets + torch.stack([y, x])
    checked = 0
    for image, aim in zip(labels, aims):
        for identity in image[image > 0].unique():
            points = aim[:, image == identity]
            torch.testing.assert_close(points, points[:, :1].expand_as(points), atol=1e-4, rtol=0)
            checked += 1
    assert checked >= 4
    assert offsets[(labels == 0)[:, None].expand_as(offsets)].eq(0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ids_mean_nothing_but_sameness(seed):
    labels = torch.from_numpy(random_labels(seed))
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(50, generator=torch.Generator().manual_seed(seed))]
    )
    renamed = order[labels.long()]
    assert torch.equal(classes(labels), classes(renamed))
    torch.testing.assert_close(centre_offsets(labels, 40, 8.0), centre_offsets(renamed, 50, 8.0), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), turns=st.integers(0, 3), flip=st.booleans())
def test_turned_labels_give_turned_targets(seed, turns, flip):
    labels = torch.from_numpy(random_labels(seed))

    def turn(maps):
        maps = maps.rot90(turns, (-2, -1))
        return maps.flip(-1) if flip else maps

    n = int(labels.max())
    assert torch.equal(classes(turn(labels)), turn(classes(labels)))
    found = centre_offsets(turn(labels), n, 1.0)
    dy, dx = turn(centre_offsets(labels, n, 1.0)).unbind(1)
    for _ in range(turns):  # counter-clockwise: what pointed right points up, what pointed down points right
        dy, dx = -dx, dy
    torch.testing.assert_close(found, torch.stack([dy, -dx if flip else dx], 1), atol=1e-5, rtol=0)


def test_large_ids_and_large_images_stay_exact():
    """uint16 ids; a nucleus of 60 x 60 px at row 3000."""
    labels = torch.zeros(1, 3060, 80, dtype=torch.int32)
    labels[0, 3000:, 10:70] = 65535
    labels[0, 2999, 10:70] = 65534
    found = centre_offsets(labels, 65535, 1.0)[0]
    assert found[:, 3000, 10].tolist() == pytest.approx([29.5, 29.5], abs=0.01)
    assert found[:, 3059, 69].tolist() == pytest.approx([-29.5, -29.5], abs=0.01)
    assert classes(labels)[0, 2999:3002, 40].tolist() == [2, 2, 1]


def test_empty_label_map():
    labels = torch.zeros(2, 5, 5, dtype=torch.int64)
    assert classes(labels).eq(0).all()
    assert centre_offsets(labels, 0, 8.0).eq(0).all()
    assert centre_offsets(labels, 0, 8.0).shape == (2, 2, 5, 5)
