"""Training targets against loops over pixels and nuclei, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nucsam.model.targets import BACKGROUND, BOUNDARY, INSIDE, REACH, classes, depth


def random_labels(seed: int, images: int = 3, height: int = 20, width: int = 27) -> torch.Tensor:
    """Boxes on boxes; one image is empty.

    Ids have gaps. Nuclei touch, nest, and are cut in pieces by others or by the border.
    """
    draw = np.random.default_rng(seed)
    labels = np.zeros((images, height, width), np.int32)
    for image in labels[: images - 1]:
        for number in draw.choice(np.arange(1, 40), draw.integers(1, 9), replace=False):
            y, x = draw.integers(-4, height), draw.integers(-4, width)
            h, w = draw.integers(1, 12, 2)
            image[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = number
    return torch.from_numpy(labels)


random_maps = st.integers(0, 10**6).map(random_labels)


def slow_classes(label: np.ndarray) -> np.ndarray:
    expected = np.full(label.shape, BACKGROUND)
    H, W = label.shape
    for y, x in zip(*np.nonzero(label)):
        around = label[max(y - 1, 0) : min(y + 2, H), max(x - 1, 0) : min(x + 2, W)]
        expected[y, x] = INSIDE if (around == label[y, x]).all() else BOUNDARY
    return expected


def slow_depth(label: np.ndarray) -> np.ndarray:
    expected = np.zeros(label.shape)
    outside = np.argwhere(slow_classes(label) != INSIDE)
    for number in np.unique(label[label > 0]):
        pixels = np.argwhere(label == number)
        nearest = [
            min((np.hypot(*(pixel - other)) for other in outside), default=np.inf)
            for pixel in pixels
        ]
        px = 1 + np.minimum(nearest, REACH)
        expected[tuple(pixels.T)] = px / px.max()
    return expected


def depth_of(labels: torch.Tensor, spare: int = 0) -> torch.Tensor:
    return depth(labels, classes(labels), int(labels.max()) + spare)


@settings(max_examples=40, deadline=None)
@given(labels=random_maps)
def test_classes_equal_a_loop_over_pixels(labels):
    found = classes(labels)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found, [slow_classes(label) for label in labels.numpy()])


@settings(max_examples=15, deadline=None)
@given(labels=random_maps, spare=st.integers(0, 5))
def test_depth_equals_a_loop_over_nuclei(labels, spare):
    found = depth_of(labels, spare)
    assert found.dtype == torch.float32
    assert torch.equal(found > 0, labels > 0)
    np.testing.assert_allclose(found, [slow_depth(label) for label in labels.numpy()], atol=1e-5)


def test_classes_by_hand():
    labels = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 2, 2, 2],
        [1, 1, 1, 2, 2, 2],
        [0, 0, 0, 2, 2, 2],
    ]
    expected = [
        [1, 1, 2, 0, 0, 0],  # the image border is no boundary
        [1, 1, 2, 2, 2, 2],  # a neighbour is
        [2, 2, 2, 2, 1, 1],
        [0, 0, 0, 2, 1, 1],
    ]
    assert classes(torch.tensor([labels])).tolist() == [expected]


def test_depth_by_hand():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[0, 1:6, 1:6] = 3  # depths 1, 2 and 3 px by ring
    labels[0, 8, 1] = labels[0, 8, 5] = 7  # two pieces of one nucleus
    labels[0, 8, 8] = 9
    found = depth_of(labels)[0]
    assert found[1, 1:6].tolist() == pytest.approx([1 / 3] * 5)
    assert found[2, 1:6].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3, 1 / 3])
    assert found[3, 1:6].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert found[8].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1]  # a lone pixel is as deep as it gets


def test_large_ids_and_large_images_stay_exact():
    """uint16 ids; a nucleus of 61 x 61 px at row 3000."""
    labels = torch.zeros(1, 3061, 80, dtype=torch.int32)
    labels[0, 3000:, 10:71] = 65535
    labels[0, 2999, 10:71] = 65534
    found = depth_of(labels)[0]
    assert found[3000, 40].item() == pytest.approx(1 / 31)
    assert found[3060, 40].item() == 1  # the image's border is no boundary
    assert classes(labels)[0, 2999:3002, 40].tolist() == [2, 2, 1]


def test_depth_ends_at_its_reach():
    labels = torch.zeros(1, 101, 101, dtype=torch.int64)
    labels[0, 1:100, 1:100] = 1
    found = depth_of(labels)[0, 50]
    depths = torch.minimum(torch.arange(1.0, 51), torch.tensor(REACH + 1.0))
    torch.testing.assert_close(found[1:51], depths / (REACH + 1))
    assert found[50].item() == 1


@pytest.mark.parametrize("value", [0, 1])
def test_an_image_that_is_all_background_or_one_nucleus(value):
    labels = torch.full((2, 40, 40), value)
    assert torch.equal(classes(labels), labels)  # INSIDE is 1
    assert torch.equal(depth_of(labels), labels.float())
