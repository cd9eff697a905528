import numpy as np
import pytest

from nucsam.measure import measure


def image_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_by_hand():
    label = np.zeros((20, 30), np.uint16)
    label[4:10, 10:20], label[15, 3] = 5, 2
    image = np.zeros((20, 30, 3), np.uint8)
    image[4:10, 10:15] = 200, 100, 50
    image[15, 3] = 10, 20, 30
    found = measure(label, image, mpp=0.5)
    assert {name: column.tolist() for name, column in found.items() if name not in ("eccentricity", "mean_grey")} == {
        "id": [2, 5],
        "centroid_x": [3.5, 15.0],  # pixels 10 to 19 reach from 10 to 20
        "centroid_y": [15.5, 7.0],
        "area_px": [1, 60],
        "perimeter_px": [0.0, 28.0],  # through the centres of the 10 x 6 rectangle's outer pixels: 2 * (9 + 5)
        "solidity": [1.0, 1.0],
        "mean_red": [10.0, 100.0],
        "mean_green": [20.0, 50.0],
        "mean_blue": [30.0, 25.0],
        "centroid_x_um": [1.75, 7.5],
        "centroid_y_um": [7.75, 3.5],
        "area_um2": [0.25, 15.0],
        "perimeter_um": [0.0, 14.0],
    }
    # variances of n whole numbers in a row: (n² - 1) / 12
    assert found["eccentricity"] == pytest.approx([0, np.sqrt(1 - 35 / 99)])
    assert found["mean_grey"] == pytest.approx(
        [0.299 * 10 + 0.587 * 20 + 0.114 * 30, 0.299 * 100 + 0.587 * 50 + 0.114 * 25]
    )


def test_nothing_in_nothing_and_no_microns_without_a_scale():
    found = measure(np.zeros((5, 6), np.int32), image_of((5, 6)))
    assert len(found) == 11
    assert all(len(column) == 0 for column in found.values())
    assert not any("um" in name for name in found)
    assert measure(np.eye(3, dtype=np.int32), image_of((3, 3)), 0.25).keys() - found.keys() == {
        "centroid_x_um",
        "centroid_y_um",
        "area_um2",
        "perimeter_um",
    }
