import json
import math
import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.segmentation import relabel_sequential

from nucsam.data.geojson import features, read, write_geojson
from nucsam.errors import UserError

LABELS = arrays(
    np.int32,
    array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0, 0, 2, 2, 2, 7]),
)


def drawn(*rows: str) -> np.ndarray:
    """A label map of digits, 0 as a dot."""
    return np.array([[int(pixel) for pixel in row.replace(".", "0")] for row in rows], np.int32)


def collection(*geometries: object) -> dict:
    parts = [{"type": "Feature", "geometry": g, "properties": {}} for g in geometries]
    return {"type": "FeatureCollection", "features": parts}


def polygon(*rings: list) -> dict:
    return {"type": "Polygon", "coordinates": [[list(point) for point in ring] for ring in rings]}


def square(left: float, top: float, side: float) -> list[tuple[float, float]]:
    right, bottom = left + side, top + side
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def put(folder: Path, document: object) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "a.geojson").write_text(text, encoding="utf-8")
    return folder / "a.geojson"


def from_corner(ring: list) -> list:
    """The points of a closed ring from its smallest on: where a ring begins means nothing."""
    assert ring[0] == ring[-1]
    start = ring.index(min(ring))
    return [tuple(point) for point in [*ring[start:-1], *ring[:start]]]


# Label map to GeoJSON


def test_feature_of_one_pixel():
    columns = {"area": np.array([1]), "score": np.array([np.nan])}
    (feature,) = features(drawn("...", ".4.", "..."), measurements=columns)
    (ring,) = feature["geometry"]["coordinates"]
    assert from_corner(ring) == [(1, 1), (2, 1), (2, 2), (1, 2)]
    assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
    assert feature["properties"] == {
        "objectType": "detection",
        "classification": {"name": "Nucleus", "color": [0, 200, 80]},
        "isLocked": False,
        "measurements": {"area": 1},  # JSON has no NaN
    }
    assert str(uuid.UUID(feature["id"])) == feature["id"]


BOX = [(0, 0), (3, 0), (3, 3), (0, 3)]
NOTCHED = [(0, 1), (1, 1), (1, 0), (3, 0), (3, 3), (0, 3)]
HOLE = [(1, 1), (1, 2), (2, 2), (2, 1)]  # runs the other way
L_SHAPE = [(1, 0), (4, 0), (4, 3), (2, 3), (2, 2), (1, 2)]
ITS_PLACE = [(0, 0), (1, 0), (1, 2), (2, 2), (2, 3), (0, 3)]
FIRST, SECOND = [(0, 0), (1, 0), (1, 1), (0, 1)], [(1, 1), (2, 1), (2, 2), (1, 2)]
INNER, INNER_HOLE = [(2, 2), (5, 2), (5, 5), (2, 5)], [(3, 3), (3, 4), (4, 4), (4, 3)]
OUTER, OUTER_HOLE = [(0, 0), (7, 0), (7, 7), (0, 7)], [(1, 1), (1, 6), (6, 6), (6, 1)]


@pytest.mark.parametrize(
    ("rows", "expected"),  # of each nucleus its polygons, of each polygon its rings
    [
        ("9111 9111 9911", [[[L_SHAPE]], [[ITS_PLACE]]]),  # by id, without collinear points
        ("111 1.1 111", [[[BOX, HOLE]]]),
        ("1. .1", [[[FIRST], [SECOND]]]),
        (".11 1.1 111", [[[NOTCHED, HOLE]]]),  # not one ring that meets (1, 1) twice
        (
            "1111111 1.....1 1.111.1 1.1.1.1 1.111.1 1.....1 1111111",
            [[[INNER, INNER_HOLE], [OUTER, OUTER_HOLE]]],
        ),
        ("... ...", []),
    ],
)
def test_outlines_by_hand(rows, expected):
    outlines = []
    for feature in features(drawn(*rows.split())):
        geometry = feature["geometry"]
        single = geometry["type"] == "Polygon"
        polygons = [geometry["coordinates"]] if single else geometry["coordinates"]
        outlines.append([[from_corner(ring) for ring in rings] for rings in polygons])
    assert outlines == expected


def test_offset_moves_outlines_and_changes_their_ids():
    (here,), (there,) = (features(drawn("1.", "11"), offset=xy) for xy in ((0, 0), (100, 0.5)))
    moved = [[x + 100, y + 0.5] for x, y in here["geometry"]["coordinates"][0]]
    assert there["geometry"]["coordinates"] == [moved]
    assert here["id"] != there["id"]
    assert [here] == features(drawn("1.", "11"))


def check_ring(ring: list) -> float:
    """Signed area of a ring that must be closed, simple, and turn at every point."""
    assert ring[0] == ring[-1]
    assert len({tuple(point) for point in ring}) == len(ring) - 1 >= 4
    assert all(type(value) in (int, float) for point in ring for value in point)
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(ring)]
    assert all((dx == 0) != (dy == 0) for dx, dy in steps)
    assert all((a == 0) != (b == 0) for (a, _), (b, _) in pairwise([*steps, steps[0]]))
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2


@settings(deadline=None, max_examples=150)
@given(LABELS)
def test_geojson_rules_hold_and_areas_are_those_of_the_pixels(label):
    found, ids = features(label), np.unique(label[label > 0])
    assert len(found) == len(ids) == len({feature["id"] for feature in found})
    for value, feature in zip(ids, found):
        geometry = feature["geometry"]
        polygons = geometry["coordinates"]
        if geometry["type"] == "Polygon":
            polygons = [polygons]
        else:
            assert len(polygons) > 1
        total = 0
        for rings in polygons:
            areas = [check_ring(ring) for ring in rings]
            assert areas[0] > 0  # RFC 7946: outer rings counterclockwise, holes clockwise
            assert all(area < 0 for area in areas[1:])
            total += sum(areas)
        assert total == (label == value).sum()


@settings(deadline=None, max_examples=150)
@given(LABELS)
def test_there_and_back_is_the_same_label_map(tmp_path_factory, label):
    path = tmp_path_factory.mktemp("round") / "a.geojson"
    assert write_geojson(path, features(label)) == len(np.unique(label[label > 0]))
    assert np.array_equal(read(path, label.shape), relabel_sequential(label)[0])


def test_streamed_file_is_one_collection_and_whole_or_not_there(tmp_path):
    path = tmp_path / "a.geojson"
    nuclei = features(drawn("1.2", "1.2"))
    assert write_geojson(path, iter(nuclei)) == 2
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": nuclei}
    before = path.read_bytes()

    def broken():
        yield nuclei[0]
        raise RuntimeError("the next window")

    with pytest.raises(RuntimeError, match="the next window"):
        write_geojson(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert write_geojson(path, []) == 0
    assert json.loads(path.read_text())["features"] == []


# GeoJSON to label map


def slow_fill(rings: list, shape: tuple[int, int]) -> np.ndarray:
    """Even-odd rule, a pixel and an edge at a time."""
    inside = np.zeros(shape, bool)
    for row, column in np.ndindex(*shape):
        x, y = column + 0.5, row + 0.5
        for ring in rings:
            for (x0, y0), (x1, y1) in pairwise(ring):
                if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                    inside[row, column] ^= True
    return inside


def test_pixels_are_those_with_their_centre_inside_by_the_even_odd_rule(tmp_path):
    rng = np.random.default_rng(0)
    meeting = 0
    for _ in range(60):
        rings = [rng.uniform(-4, 14, (rng.integers(3, 8), 2)).tolist() for _ in range(2)]
        rings = [[*ring, ring[0]] for ring in rings[: rng.integers(1, 3)]]
        expected = slow_fill(rings, (9, 11))
        if expected.any():
            meeting += 1
            label = read(put(tmp_path, collection(polygon(*rings))), (9, 11))
            assert np.array_equal(label, expected)
    assert meeting > 40


def test_neighbours_share_an_edge_and_no_pixel(tmp_path):
    a, b, c, d = (0.3, 0.1), (9.7, 0.4), (9.2, 9.8), (0.6, 9.1)
    first, second, both = polygon([a, b, c, a]), polygon([a, c, d, a]), polygon([a, b, c, d, a])
    label = read(put(tmp_path, collection(first, second)), (10, 10))
    swapped = read(put(tmp_path, collection(second, first)), (10, 10))
    whole = read(put(tmp_path, collection(both)), (10, 10))
    assert set(np.unique(label)) == {0, 1, 2}
    assert np.array_equal(label, np.array([0, 2, 1])[swapped])  # neither covers the other
    assert np.array_equal(label > 0, whole > 0)


def test_later_polygons_cover_earlier_ones_and_what_is_outside_is_cut_off(tmp_path):
    with_hole = polygon(square(1, 1, 2), square(2, 2, 1))
    squares = [polygon(square(*place)) for place in ((-2, -2, 5), (90, 90, 5), (3, 3, 9))]
    document = collection(squares[0], with_hole, *squares[1:])
    label = read(put(tmp_path, document), (4, 5))
    assert np.array_equal(label, drawn("111..", "122..", "121..", "...44"))


def test_several_polygons_of_one_nucleus(tmp_path):
    parts = [polygon(square(left, 0, 2))["coordinates"] for left in (0, 1, 4)]
    path = put(tmp_path, collection({"type": "MultiPolygon", "coordinates": parts}))
    assert np.array_equal(read(path, (2, 6)), drawn("111.11", "111.11"))


def test_what_qupath_writes(tmp_path):
    """An annotation and a cell of QuPath 0.5: the cell's nucleus counts, not its outline."""
    annotation = {
        "type": "Feature",
        "id": "a4b8e3f0-8bd8-4d02-9d2c-4b8c6a1d5c55",
        "geometry": polygon(square(0, 0, 2)) | {"isEllipse": True, "plane": {"c": -1, "z": 0}},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
    }
    cell = {
        "type": "Feature",
        "geometry": polygon(square(2, 0, 4)),
        "nucleusGeometry": polygon(square(3, 1, 2)),
        "properties": {"objectType": "cell", "measurements": {"Nucleus: Area": 4.0}},
    }
    both = drawn("11....", "11.22.", "...22.", "......")
    for document, expected in (
        ({"type": "FeatureCollection", "features": [annotation, cell]}, both),
        ([annotation, cell], both),
        (annotation, np.where(both == 1, 1, 0)),
    ):
        assert np.array_equal(read(put(tmp_path, document), (4, 6)), expected)


def test_points_and_lines_give_a_warning_and_take_no_id(tmp_path):
    point, line = ({"type": kind, "coordinates": [1, 1]} for kind in ("Point", "LineString"))
    path = put(tmp_path, collection(point, None, line, polygon(square(0, 0, 1)), line))
    with pytest.warns(UserWarning, match="1 Point, 1 empty geometry, 2 LineString") as warned:
        label = read(path, (2, 2))
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"{path}: ")
    assert warned[0].filename == __file__
    assert np.array_equal(label, drawn("1.", ".."))


@pytest.mark.parametrize("kind", ["detection", "cell"])
def test_regions_around_nuclei_are_not_nuclei(tmp_path, kind):
    """QuPath exports the annotation in which it has detected, before the detections."""
    shapes = [("annotation", square(0, 0, 12)), (kind, square(1, 1, 3)), (kind, square(6, 6, 4))]
    document = [
        {"type": "Feature", "geometry": polygon(ring), "properties": {"objectType": name}}
        for name, ring in shapes
    ]
    with pytest.warns(UserWarning, match="1 annotation of a region"):
        label = read(put(tmp_path, document), (12, 12))
    assert np.bincount(label.ravel()).tolist() == [144 - 9 - 16, 9, 16]
    for number, areas in ((1, [144]), (2, [144 - 9, 9])):  # drawn by hand, and corrected by hand
        label = read(put(tmp_path, document[:number]), (12, 12))
        assert np.bincount(label.ravel())[1:].tolist() == areas


BAD_POINTS = [(math.nan, 1), (1e9, 1), (1, -1e300), (10**400, 1), ("a", 1), (1,)]


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "Circle"},
        {"type": "Polygon"},
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [7]},
        {"type": "MultiPolygon", "coordinates": [7]},
        {"type": "MultiPolygon", "coordinates": []},
        polygon(square(0, 0, 1)[:-1]),
        polygon([(0, 0), (1, 1), (0, 0)]),
        *(polygon([(0, 0), point, (1, 1), (0, 0)]) for point in BAD_POINTS),
    ],
)
def test_a_bad_geometry_is_refused(tmp_path, geometry):
    with pytest.raises(UserError, match=r"a\.geojson: feature 2"):
        read(put(tmp_path, collection(polygon(square(0, 0, 1)), geometry)), (3, 4))


@pytest.mark.parametrize("feature", [1, {"type": "Feature"}, {"type": "Polygon"}])
def test_what_is_no_feature_is_refused(tmp_path, feature):
    with pytest.raises(UserError, match=r"a\.geojson: feature 1"):
        read(put(tmp_path, [feature]), (3, 4))
