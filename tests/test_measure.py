"""Nuclei measured by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.color import rgb_from_hed
from skimage.measure import regionprops_table

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
    columns.pop("haematoxylin_od"), columns.pop("eosin_od")
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
    assert len(columns) == 13
    assert all(len(column) == 0 for column in columns.values())
    image = np.zeros((3, 3, 3), np.uint8)
    assert measure(np.eye(3, dtype=int), image, 0.25).keys() - columns.keys() == MICRONS


THEIRS = {  # columns of scikit-image
    "id": "label",
    "area_px": "area",
    "perimeter_px": "perimeter",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "mean_red": "intensity_mean-0",
    "mean_blue": "intensity_mean-2",
}


@settings(deadline=None, max_examples=150)
@given(
    label=arrays(
        np.int32,
        array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.sampled_from([0, 0, 2, 2, 2, 7]),
    ),
    size=st.integers(1, 4),
)
def test_equals_scikit_image(label, size):
    """Also where a nucleus has holes, pieces, or touches another one or the edge."""
    label = np.kron(label, np.ones((size, size), np.int32))
    image = np.random.default_rng(0).integers(0, 256, (*label.shape, 3), dtype=np.uint8)
    names = {name.split("-")[0] for name in THEIRS.values()}
    table = regionprops_table(label, image, properties=("centroid", *names))
    columns = measure(label, image, corner=(100, 10))
    for name, theirs in THEIRS.items():
        np.testing.assert_allclose(columns[name], table[theirs], atol=1e-7, err_msg=name)
    np.testing.assert_allclose(columns["centroid_y"], table["centroid-0"] + 100.5)
    np.testing.assert_allclose(columns["centroid_x"], table["centroid-1"] + 10.5)


def test_stains_are_those_that_were_mixed():
    """A nucleus of much haematoxylin, one of eosin, one of glass."""
    label = np.repeat([[1, 2, 3]], 4, axis=0)
    mixed = np.array([[1.0, 0.1, 0], [0.1, 0.8, 0], [0, 0, 0]])
    image = np.rint(255 * 10 ** -(mixed @ rgb_from_hed)).astype(np.uint8)[label - 1]
    columns = measure(label, image)
    assert columns["haematoxylin_od"] == pytest.approx([1.0, 0.1, 0], abs=0.02)
    assert columns["eosin_od"] == pytest.approx([0.1, 0.8, 0], abs=0.02)


def test_confidence_goes_by_the_id():
    label = np.array([[0, 1, 3]])
    columns = measure(label, np.zeros((1, 3, 3), np.uint8), confidence=np.array([0.7, 0.8, 0.9]))
    assert columns["confidence"].tolist() == [0.7, 0.9]
