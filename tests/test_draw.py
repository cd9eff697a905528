import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nucsam.data.draw import (
    CAPTION,
    GAP,
    PREDICTION,
    TRUTH,
    contact_sheet,
    contours,
    overlay,
    write_png,
)

RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("00000 04440 04440 04440 00000", "..... .###. .#.#. .###. ....."),
        ("111222 111222", "..##.. ..##.."),
        ("333 333", "... ..."),  # the edge of the image is no boundary
        ("000 000", "... ..."),
    ],
)
def test_the_boundary_lies_inside_of_the_instance(rows, expected):
    label = np.array([list(row) for row in rows.split()], int)
    image = np.full((*label.shape, 3), 7, np.uint8)
    edge = np.array([list(row) for row in expected.split()]) == "#"
    assert np.array_equal(contours(image, label, RED), np.where(edge[..., None], RED, 7))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_contours_equal_a_look_at_every_neighbour(seed):
    label = np.random.default_rng(seed).integers(0, 3, (4, 5)).repeat(3, 0).repeat(2, 1)
    expected = np.zeros(label.shape, bool)
    for row, column in np.argwhere(label > 0):
        around = label[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        expected[row, column] = (around != label[row, column]).any()
    image = np.zeros((*label.shape, 3), np.uint8)
    assert np.array_equal((contours(image, label, RED) == RED).all(-1), expected)
    assert not image.any()


def test_overlay_is_three_panels():
    image = np.full((100, 120, 3), 90, np.uint8)
    truth, prediction = np.zeros((2, 100, 120), np.int32)
    truth[10:20, 10:20], prediction[40:60, 40:60] = 3, 8
    panel = overlay(image, truth, prediction)
    height, width = 400, 480  # a whole factor of 4 brings the longer side over 384
    line = 32  # of text: readable where the panel is as wide as a page
    assert panel.shape == (height + line, 3 * width + 2 * GAP, 3)
    assert panel.dtype == np.uint8
    assert (panel[line // 4 : 3 * line // 4] < 128).any()
    plain, *outlined = (panel[line:, k * (width + GAP) :][:, :width] for k in range(3))
    assert (plain == 90).all()
    for part, colour, side in zip(outlined, (TRUTH, PREDICTION), (40, 80)):
        assert (part == colour).all(-1).sum() == 4 * (side - 1)
        assert (part == 90).all(-1).sum() == height * width - 4 * (side - 1)


def test_a_large_image_is_not_enlarged():
    label = np.zeros((400, 120), np.int32)
    assert overlay(np.zeros((400, 120, 3), np.uint8), label, label).shape[0] == 400 + CAPTION


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (3, 1, 3), (13, 3, 6)])
def test_contact_sheet(tmp_path, count, rows, columns):
    tiles = [
        (f"tile {number} with a long name", np.full((600, 300, 3), 20 + number, np.uint8))
        for number in range(count)
    ]
    contact_sheet(tiles, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (rows * (256 + CAPTION + GAP) - GAP, columns * (128 + GAP) - GAP, 3)
    row, column = divmod(count - 1, 6)
    last = sheet[row * (256 + CAPTION + GAP) + CAPTION :, column * (128 + GAP) :]
    assert (last[:256, :128] == 20 + count - 1).all()


def test_a_tile_narrower_than_its_caption(tmp_path):
    contact_sheet([("na\nme", np.zeros((64, 3, 3), np.uint8))], tmp_path / "sheet.png")
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape == (64 + CAPTION, 3, 3)


def test_a_png_holds_what_was_written(tmp_path):
    image, path = np.arange(300).reshape(10, 10, 3).astype(np.uint8), tmp_path / "a.png"
    for array in (image[..., 0], image):
        write_png(path, array)
        assert np.array_equal(np.asarray(Image.open(path)), array)
