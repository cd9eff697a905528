from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nucsam.draw import CAPTION, GAP, PREDICTION, TRUTH, contact_sheet, contours, overlay, write_png

RED = (255, 0, 0)


def drawn(label: list[list[int]], thickness: int = 1) -> list[str]:
    label = np.array(label)
    image = contours(np.full((*label.shape, 3), 7, np.uint8), label, RED, thickness)
    assert {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()} <= {(7, 7, 7), RED}
    return ["".join(".#"[pixel] for pixel in row) for row in (image[..., 0] == 255).astype(int)]


def test_the_boundary_lies_inside_of_the_instance():
    label = np.zeros((7, 7), int)
    label[1:6, 1:6] = 4
    assert drawn(label.tolist()) == [".......", ".#####.", ".#...#.", ".#...#.", ".#...#.", ".#####.", "......."]
    assert drawn(label.tolist(), 2) == [".......", ".#####.", ".#####.", ".##.##.", ".#####.", ".#####.", "......."]


def test_instances_that_touch_are_separated_and_image_edges_are_open():
    assert drawn([[1, 1, 1, 2, 2, 2]] * 2) == ["..##.."] * 2
    assert drawn([[3, 3, 3]] * 3) == ["..."] * 3
    assert drawn([[0, 0, 0]] * 3) == ["..."] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_contours_equal_a_look_at_every_neighbour(seed, thickness):
    label = np.random.default_rng(seed).integers(0, 3, (4, 5)).repeat(3, 0).repeat(2, 1)
    expected = np.zeros(label.shape, bool)
    for row, column in np.argwhere(label > 0):
        rows = slice(max(0, row - thickness), row + thickness + 1)
        columns = slice(max(0, column - thickness), column + thickness + 1)
        expected[row, column] = (label[rows, columns] != label[row, column]).any()
    image = np.zeros((*label.shape, 3), np.uint8)
    found = contours(image, label, RED, thickness)
    assert np.array_equal((found == RED).all(-1), expected)
    assert not image.any()


def test_overlay_is_three_panels():
    image = np.full((100, 120, 3), 90, np.uint8)
    truth, prediction = np.zeros((2, 100, 120), np.int32)
    truth[10:20, 10:20], prediction[40:60, 40:60] = 3, 8
    panel = overlay(image, truth, prediction)
    height, width = 400, 480  # a whole factor of 4 brings the longer side over 384
    assert panel.shape == (height + CAPTION, 3 * width + 2 * GAP, 3)
    assert panel.dtype == np.uint8
    parts = [panel[CAPTION:, start : start + width] for start in (0, width + GAP, 2 * (width + GAP))]
    assert (parts[0] == 90).all()
    for part, colour, side in ((parts[1], TRUTH, 40), (parts[2], PREDICTION, 80)):
        assert (part == colour).all(-1).sum() == 4 * (side - 1)
        assert (part == 90).all(-1).sum() == height * width - 4 * (side - 1)
    assert (panel[:CAPTION] < 128).any()
    assert overlay(image, None, prediction).shape == (height + CAPTION, 2 * width + GAP, 3)
    assert overlay(image.repeat(4, 0), truth.repeat(4, 0), prediction.repeat(4, 0)).shape[0] == 400 + CAPTION


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (3, 1, 3), (7, 3, 3)])
def test_contact_sheet(tmp_path, count, rows, columns):
    tiles = [
        (f"tile {number} with a long name", np.full((200, 100, 3), 20 + number, np.uint8)) for number in range(count)
    ]
    contact_sheet(tiles, tmp_path / "sheet.png", columns=3, width=64)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (rows * (64 + CAPTION + GAP) - GAP, columns * (32 + GAP) - GAP, 3)
    last = sheet[(count - 1) // 3 * (64 + CAPTION + GAP) + CAPTION :, (count - 1) % 3 * (32 + GAP) :][:64, :32]
    assert (last == 20 + count - 1).all()


def test_a_tile_narrower_than_its_caption(tmp_path):
    contact_sheet([("name", np.zeros((64, 3, 3), np.uint8))], tmp_path / "sheet.png")
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape == (64 + CAPTION, 3, 3)


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    first = np.arange(300, dtype=np.uint16).reshape(10, 10, 3).astype(np.uint8)
    write_png(path, first)
    write_png(tmp_path / "grey.png", first[..., 0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), first[..., 0])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_png(path, first + 1)
    assert np.array_equal(np.asarray(Image.open(path)), first)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "grey.png"]
