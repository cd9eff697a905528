"""Nuclei measured by hand."""

import numpy as np
import pytest

from nucsam.predict.measure import measure

MICRONS = {"centroid_x_um", "centroid_y_um", "area_um2", "perimeter_um"}


def test_by_hand():
    label = np.zeros((20, 30), np.uint16)
    label[4:10, 10:20], label[15, 3] = 5, 2
    image = np.zeros((20, 30, 3), np.uint8)
    image[4:10, 10:15] = 200, 100, 50
    image[15, 3] = 10, 20, 30
    columns = measure(label, image, mpp=0.5)
    eccentricity, grey = columns.pop("eccentricity"), columns.pop("mean_grey")
    assert {name: column.tolist() for name, column in columns.items()} == {
        "id": [2, 5],
        "centroid_x": [3.5, 15.0],  # pixels 10 to 19 reach from 10 to 20
        "centroid_y": [15.5, 7.0],
        "area_px": [1, 60],
        "perimeter_px": [0.0, 28.0],  # through the centres of a 10 x 6 rectangle's outer pixels
        "solidity": [1.0, 1.0],
        "mean_red": [10.0, 100.0],
        "mean_green": [20.0, 50.0],
        "mean_blue": [30.0, 25.0],
        "centroid_x_um": [1.75, 7.5],
        "centroid_y_um": [7.75, 3.5],
        "area_um2": [0.25, 15.0],
        "perimeter_um": [0.0, 14.0],
    }
    # The variance of n whole numbers in a row is (n² - 1) / 12
    assert eccentricity == pytest.approx([0, np.sqrt(1 - 35 / 99)])
    weights = np.array([0.299, 0.587, 0.114])
    assert grey == pytest.approx([weights @ (10, 20, 30), weights @ (100, 50, 25)])


def test_no_nuclei_make_empty_columns_and_no_scale_makes_no_microns():
    columns = measure(np.zeros((5, 6), np.int32), np.zeros((5, 6, 3), np.uint8))
    assert len(columns) == 11
    assert all(len(column) == 0 for column in columns.values())
    image = np.zeros((3, 3, 3), np.uint8)
    assert measure(np.eye(3, dtype=int), image, 0.25).keys() - columns.keys() == MICRONS
