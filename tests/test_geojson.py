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

from nucsam.geojson import features, read, write

LABELS = arrays(
    np.int32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 0, 2, 2, 2, 7])
)


def drawn(*rows: str) -> np.ndarray:
    """A label map of digits, 0 as a dot."""
    return np.array([[int(pixel) for pixel in row.replace(".", "0")] for row in rows], np.int32)


def collection(*geometries: object, **members) -> str:
    parts = [{"type": "Feature", "geometry": geometry, "properties": {}, **members} for geometry in geometries]
    return json.dumps({"type": "FeatureCollection", "features": parts})


def polygon(*rings: list) -> dict:
    return {"type": "Polygon", "coordinates": [[list(point) for point in ring] for ring in rings]}


def square(left: float, top: float, side: float) -> list[tuple[float, float]]:
    right, bottom = left + side, top + side
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def put(folder: Path, text: str) -> Path:
    (folder / "a.geojson").write_text(text, encoding="utf-8")
    return folder / "a.geojson"


def outlines(label: np.ndarray, **options) -> list:
    return [feature["geometry"] for feature in features(label, **options)]


def from_corner(ring: list) -> list:
    """A closed ring from its smallest point on: where a ring begins means nothing."""
    assert ring[0] == ring[-1]
    start = ring.index(min(ring[:-1]))
    return [tuple(point) for point in [*ring[start:-1], *ring[: start + 1]]]


# ---- label map -> GeoJSON ----


def test_outline_of_one_pixel_and_its_feature():
    (feature,) = features(drawn("...", ".4.", "..."), measurements={"area": np.array([1]), "score": np.array([np.nan])})
    assert from_corner(feature["geometry"]["coordinates"][0]) == [(1, 1), (2, 1), (2, 2), (1, 2), (1, 1)]
    assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
    assert feature["properties"] == {
        "objectType": "detection",
        "classification": {"name": "Nucleus", "color": [0, 200, 80]},
        "isLocked": False,
        "measurements": {"area": 1},  # JSON has no NaN
    }
    assert str(uuid.UUID(feature["id"])) == feature["id"]


def test_collinear_points_are_dropped_and_nuclei_come_by_id():
    large, small = outlines(drawn("9111", "9111", "9911"))
    assert from_corner(large["coordinates"][0]) == [(1, 0), (4, 0), (4, 3), (2, 3), (2, 2), (1, 2), (1, 0)]
    assert from_corner(small["coordinates"][0]) == [(0, 0), (1, 0), (1, 2), (2, 2), (2, 3), (0, 3), (0, 0)]


def test_holes_run_the_other_way():
    (geometry,) = outlines(drawn("111", "1.1", "111"))
    outer, hole = geometry["coordinates"]
    assert from_corner(outer) == [(0, 0), (3, 0), (3, 3), (0, 3), (0, 0)]
    assert from_corner(hole) == [(1, 1), (1, 2), (2, 2), (2, 1), (1, 1)]


def test_pieces_that_touch_at_a_corner_are_two_polygons():
    (geometry,) = outlines(drawn("1.", ".1"))
    assert geometry["type"] == "MultiPolygon"
    assert [from_corner(polygon[0])[0] for polygon in geometry["coordinates"]] == [(0, 0), (1, 1)]


def test_a_piece_that_touches_itself_at_a_corner_has_a_hole_there():
    (geometry,) = outlines(drawn(".11", "1.1", "111"))  # else its outer ring would meet (1, 1) twice
    outer, hole = geometry["coordinates"]
    assert from_corner(outer) == [(0, 1), (1, 1), (1, 0), (3, 0), (3, 3), (0, 3), (0, 1)]
    assert from_corner(hole) == [(1, 1), (1, 2), (2, 2), (2, 1), (1, 1)]


def test_each_hole_is_in_its_own_piece():
    rings = ("1111111", "1.....1", "1.111.1", "1.1.1.1", "1.111.1", "1.....1", "1111111")
    (geometry,) = outlines(drawn(*rings))
    inner, outer = geometry["coordinates"]
    assert [from_corner(ring)[0] for ring in inner] == [(2, 2), (3, 3)]
    assert [from_corner(ring)[0] for ring in outer] == [(0, 0), (1, 1)]


def test_offset_moves_outlines_and_their_ids():
    label = drawn("1.", "11")
    (here,), (there,) = features(label), features(label, offset=(100, 0.5))
    moved = [[x + 100, y + 0.5] for x, y in here["geometry"]["coordinates"][0]]
    assert there["geometry"]["coordinates"] == [moved]
    assert here["id"] != there["id"]
    assert here == features(label)[0]


def test_nothing_in_nothing():
    assert features(np.zeros((3, 4), np.uint16)) == []


@settings(deadline=None, max_examples=150)
@given(LABELS)
def test_geojson_rules_hold_and_areas_are_those_of_the_pixels(label):
    found = features(label)
    ids = np.unique(label[label > 0])
    assert len(found) == len(ids) == len({feature["id"] for feature in found})
    for value, feature in zip(ids, found):
        geometry = feature["geometry"]
        polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        assert (geometry["type"] == "MultiPolygon") == (len(polygons) > 1)
        total = 0
        for rings in polygons:
            for number, ring in enumerate(rings):
                assert len(ring) >= 4
                assert ring[0] == ring[-1]
                assert len({tuple(point) for point in ring}) == len(ring) - 1  # simple: no point twice
                assert all(type(value) in (int, float) and math.isfinite(value) for point in ring for value in point)
                steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(ring)]
                assert all((dx == 0) != (dy == 0) for dx, dy in steps)
                assert all((a == 0) != (c == 0) for (a, _), (c, _) in zip(steps, steps[1:] + steps[:1]))  # turns
                area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(ring)) / 2
                assert (area > 0) == (number == 0)  # RFC 7946: outer rings counterclockwise, holes clockwise
                total += area
        assert total == (label == value).sum()


@settings(deadline=None, max_examples=150)
@given(LABELS)
def test_there_and_back_is_the_same_label_map(tmp_path_factory, label):
    path = tmp_path_factory.mktemp("round") / "a.geojson"
    assert write(path, features(label)) == len(np.unique(label[label > 0]))
    assert np.array_equal(read(path, label.shape), relabel_sequential(label)[0])


def test_streamed_file_is_one_collection_and_whole_or_not_there(tmp_path):
    path = tmp_path / "a.geojson"
    found = features(drawn("1.2", "1.2"))
    assert write(path, iter(found)) == 2
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": found}
    before = path.read_bytes()

    def broken():
        yield found[0]
        raise RuntimeError("the next window")

    with pytest.raises(RuntimeError, match="the next window"):
        write(path, broken())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.geojson"]
    assert write(path, []) == 0
    assert json.loads(path.read_text())["features"] == []


# ---- GeoJSON -> label map ----


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
        rings = [rng.uniform(-4, 14, (rng.integers(3, 8), 2)).tolist() for _ in range(rng.integers(1, 3))]
        rings = [[*ring, ring[0]] for ring in rings]
        expected = slow_fill(rings, (9, 11))
        if expected.any():
            meeting += 1
            label = read(put(tmp_path, collection(polygon(*rings))), (9, 11))
            assert np.array_equal(label, expected)
    assert meeting > 40


def test_drawn_by_hand(tmp_path):
    triangle = [(0.2, 0.2), (4.9, 0.2), (0.2, 4.9), (0.2, 0.2)]
    label = read(put(tmp_path, collection(polygon(triangle))), (5, 5))
    assert np.array_equal(label, drawn("11111", "1111.", "111..", "11...", "1...."))  # x + y < 5.1


def test_neighbours_share_an_edge_and_no_pixel(tmp_path):
    a, b, c, d = (0.3, 0.1), (9.7, 0.4), (9.2, 9.8), (0.6, 9.1)
    path = put(tmp_path, collection(polygon([a, b, c, a]), polygon([a, c, d, a])))
    later = put(tmp_path / "..", collection(polygon([a, c, d, a]), polygon([a, b, c, a])))
    one, other = read(path, (10, 10)), read(later, (10, 10))
    assert set(np.unique(one)) == {0, 1, 2}
    assert np.array_equal(one, np.array([0, 2, 1])[other])  # the order changes nothing: none covers the other
    both = read(put(tmp_path, collection(polygon([a, b, c, d, a]))), (10, 10))
    assert np.array_equal(one > 0, both > 0)


def test_later_polygons_cover_earlier_ones_and_what_is_outside_is_cut_off(tmp_path):
    geometries = polygon(square(-2, -2, 5)), polygon(square(1, 1, 2), square(2, 2, 1)), polygon(square(90, 90, 5))
    label = read(put(tmp_path, collection(*geometries, polygon(square(3, 3, 9)))), (4, 5))
    assert np.array_equal(label, drawn("111..", "122..", "121..", "...44"))


def test_several_polygons_of_one_nucleus(tmp_path):
    parts = {"type": "MultiPolygon", "coordinates": [polygon(square(k, 0, 2))["coordinates"] for k in (0, 1, 4)]}
    assert np.array_equal(read(put(tmp_path, collection(parts)), (2, 6)), drawn("111.11", "111.11"))


def test_what_qupath_writes(tmp_path):
    """An annotation and a cell as QuPath 0.5 exports them: the cell's nucleus counts, not its outline."""
    plane = {"plane": {"c": -1, "z": 0, "t": 0}}
    annotation = {
        "type": "Feature",
        "id": "a4b8e3f0-8bd8-4d02-9d2c-4b8c6a1d5c55",
        "geometry": {**polygon(square(0, 0, 2)), "isEllipse": True, **plane},
        "properties": {
            "objectType": "annotation",
            "name": "1",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
        },
    }
    cell = {
        "type": "Feature",
        "id": "0d2a1cbb-3f34-4b0a-8b67-1f0a3b9a2f11",
        "geometry": polygon(square(2, 0, 4)),
        "nucleusGeometry": polygon(square(3, 1, 2)),
        "properties": {"objectType": "cell", "measurements": {"Nucleus: Area": 4.0}},
    }
    expected = drawn("11....", "11.22.", "...22.", "......")
    for text in (
        json.dumps({"type": "FeatureCollection", "features": [annotation, cell]}),
        json.dumps([annotation, cell]),
    ):
        assert np.array_equal(read(put(tmp_path, text), (4, 6)), expected)
    assert np.array_equal(read(put(tmp_path, json.dumps(annotation)), (4, 6)), np.where(expected == 1, 1, 0))


def test_points_and_lines_are_told_and_take_no_id(tmp_path):
    line = {"type": "LineString", "coordinates": [[0, 0], [3, 3]]}
    geometries = {"type": "Point", "coordinates": [1, 1]}, None, line, polygon(square(0, 0, 1)), line
    path = put(tmp_path, collection(*geometries))
    with pytest.warns(UserWarning) as caught:
        label = read(path, (2, 2))
    assert [str(w.message) for w in caught] == [
        f"{path}: found 1 Point, 1 empty geometry, 2 LineString, not used; expected polygons of nuclei"
    ]
    assert np.array_equal(label, drawn("1.", ".."))


@pytest.mark.parametrize("text", ["[]", '{"type": "FeatureCollection", "features": []}'])
def test_an_image_without_nuclei(tmp_path, text):
    assert not read(put(tmp_path, text), (3, 4)).any()


GOOD = polygon(square(0, 0, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a readable GeoJSON file"),
        ("3", "expected a FeatureCollection, a list of Features or a Feature"),
        ('{"type": "FeatureCollection"}', "expected a FeatureCollection, a list of Features or a Feature"),
        ("[" * 100_000, "not a readable GeoJSON file"),
        ('[{"type": "Feature"}]', "feature 1: expected a Feature with a geometry"),
        ("[1]", "feature 1: expected a Feature with a geometry"),
        (collection(GOOD, {"type": "Circle"}), "feature 2: found a geometry 'Circle', expected a Polygon"),
        (
            collection({"type": "Polygon"}),
            "feature 1: found a geometry 'Polygon', expected a Polygon or MultiPolygon with",
        ),
        (collection(GOOD, polygon(square(0, 0, 1)[:-1])), r"feature 2: found a ring from \[0.0, 0.0\] to \[0.0, 1.0\]"),
        (collection(polygon(square(0, 0, 1)[:3])), "feature 1: found a ring of 3 points, expected at least 4"),
        (
            collection(polygon([(0, 0), (math.nan, 1), (1, 1), (0, 0)])),
            "feature 1: found a coordinate that is not finite",
        ),
        (collection(polygon([(0, 0), (1e300, 1), (1, 1), (0, 0)])), "feature 1: found a coordinate that is not finite"),
        (collection(polygon([(0, 0), ("a", 1), (1, 1), (0, 0)])), "feature 1: found a ring with other than numbers"),
        (collection(polygon([(0, 0), (1,), (1, 1), (0, 0)])), "feature 1: found a ring with other than numbers"),
        (collection({"type": "Polygon", "coordinates": [7]}), "feature 1: found a ring of int"),
        (
            collection(polygon(square(50, 50, 3))),
            "found no pixel of 4x3 px in any of 1 polygons, expected coordinates in px",
        ),
    ],
)
def test_errors_name_the_file_and_the_feature(tmp_path, text, words):
    path = put(tmp_path, text)
    with pytest.raises(ValueError, match=words) as caught:
        read(path, (3, 4))
    assert str(caught.value).startswith(f"{path}: ")


def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "a.geojson", (3, 4))


@pytest.mark.parametrize("kind", ["detection", "cell"])
def test_regions_round_nuclei_are_not_nuclei(tmp_path, kind):
    """QuPath exports the annotation in which it has detected, before the detections."""
    shapes = [("annotation", square(0, 0, 12)), (kind, square(1, 1, 3)), (kind, square(6, 6, 4))]
    features = [
        {"type": "Feature", "geometry": polygon(ring), "properties": {"objectType": name}} for name, ring in shapes
    ]
    path = put(tmp_path, json.dumps({"type": "FeatureCollection", "features": features}))
    with pytest.warns(UserWarning, match="found 1 annotation of a region, not used"):
        label = read(path, (12, 12))
    assert np.bincount(label.ravel()).tolist() == [144 - 9 - 16, 9, 16]
    for few, sizes in ((features[:1], [144]), (features[:2], [144 - 9, 9])):  # drawn by hand, and corrected by hand
        path = put(tmp_path, json.dumps({"type": "FeatureCollection", "features": few}))
        assert np.bincount(read(path, (12, 12)).ravel())[1:].tolist() == sizes
