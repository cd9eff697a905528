import gzip
import json
import math
import tracemalloc
import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.segmentation import relabel_sequential

from nucsam.data.geojson import features, geometries, read, write_geojson
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
    (feature,) = features(geometries(drawn("...", ".4.", "...")), columns)
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
    for geometry in geometries(drawn(*rows.split())):
        single = geometry["type"] == "Polygon"
        polygons = [geometry["coordinates"]] if single else geometry["coordinates"]
        outlines.append([[from_corner(ring) for ring in rings] for rings in polygons])
    assert outlines == expected


def test_offset_moves_outlines_and_changes_their_ids():
    (here,), (there,) = (
        features(geometries(drawn("1.", "11"), offset)) for offset in ((0, 0), (100, 0.5))
    )
    moved = [[x + 100, y + 0.5] for x, y in here["geometry"]["coordinates"][0]]
    assert there["geometry"]["coordinates"] == [moved]
    assert here["id"] != there["id"]
    assert [here] == list(features(geometries(drawn("1.", "11"))))


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
    found, ids = list(features(geometries(label))), np.unique(label[label > 0])
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
    write_geojson(path, features(geometries(label)))
    assert np.array_equal(read(path, label.shape), relabel_sequential(label)[0])


def test_a_file_is_one_collection_and_whole_or_not_there(tmp_path):
    path = tmp_path / "a.geojson"
    nuclei = list(features(geometries(drawn("1.2", "1.2"))))
    write_geojson(path, iter(nuclei))
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": nuclei}
    before = path.read_bytes()

    def broken():
        yield nuclei[0]
        raise RuntimeError("the next window")

    with pytest.raises(RuntimeError, match="the next window"):
        write_geojson(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_geojson(path, [])
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
    with_hole = polygon(square(1, 1, 2.5), square(2, 2, 1))
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


def drawing(geometry: dict, kind: str = "annotation", name: str = "", **more: object) -> dict:
    """A Feature as QuPath 0.4 and later write it."""
    properties = {"objectType": kind} | ({"classification": {"name": name}} if name else {})
    return {"type": "Feature", "geometry": geometry, "properties": properties, **more}


def areas(folder: Path, *parts: object, side: int = 60) -> list[int]:
    """Pixels of each nucleus that is drawn, in the order of ids."""
    label = read(put(folder, list(parts)), (side, side))
    return np.bincount(label.ravel())[1:].tolist()


CIRCLE = [
    (30 + 28 * np.cos(t), 30 + 28 * np.sin(t))
    for t in np.linspace(0, 2 * np.pi, 90, endpoint=False)
]
PAIR = [polygon(square(20, 20, 5)), polygon(square(35, 30, 6))]


@pytest.mark.parametrize("kind", ["annotation", "detection", "cell", ""])
@pytest.mark.parametrize("ring", [square(0, 0, 60), CIRCLE], ids=["square", "round"])
def test_an_annotation_around_others_is_no_nucleus(tmp_path, kind, ring):
    """First or last in the file, around one or two; QuPath issue 540 tells of such hierarchies."""
    region, inner = drawing(polygon(ring)), [drawing(shape, kind) for shape in PAIR]
    for parts in ([region, *inner], [*inner, region], [region, inner[0]]):
        with pytest.warns(UserWarning, match="1 annotation around others"):
            assert areas(tmp_path, *parts) == [25, 36][: len(parts) - 1]
    assert areas(tmp_path, region) == [pytest.approx(3600 if len(ring) == 5 else 2463, abs=15)]


@pytest.mark.parametrize(
    "region",
    [
        drawing(polygon(square(0, 0, 60)), name="Region*"),
        drawing(polygon(square(0, 0, 60)), name="region 2"),
        drawing(polygon(square(0, 0, 60)), "tile"),
        drawing(polygon(square(0, 0, 60)), "tma_core"),
        {"type": "Feature", "id": "TMACoreObject", "geometry": polygon(square(0, 0, 60))},
        drawing(polygon(square(0, 0, 60)), name="Ignore*"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not used")
def test_regions_cores_tiles_and_ignored_areas_are_no_nuclei(tmp_path, region):
    assert areas(tmp_path, region, drawing(PAIR[0])) == [25]
    assert areas(tmp_path, region) == []


def test_a_cell_gives_its_nucleus(tmp_path):
    """A cell of QuPath 0.2 (qupath pull 698), and two detections, one around the other."""
    cell = {
        "type": "Feature",
        "id": "PathCellObject",
        "geometry": polygon(square(0, 0, 12)),
        "nucleusGeometry": polygon(square(3, 3, 4)),
        "properties": {"measurements": [{"name": "Nucleus: Area", "value": 16}]},
    }
    pair = [drawing(polygon(square(30, 30, side)), "detection") for side in (12, 6)]
    with pytest.warns(UserWarning, match="1 detection around others"):
        assert areas(tmp_path, cell, *pair) == [16, 36]
    speck = drawing(polygon(square(31, 31, 2)), "detection")  # on a nucleus, not a nucleus in it
    assert areas(tmp_path, pair[0], speck) == [140, 4]


def test_neighbours_and_nuclei_in_holes_hold_nothing(tmp_path):
    ring = drawing(polygon(square(0, 0, 30), square(5, 5, 20)))
    inner, beside = drawing(polygon(square(5, 5, 20))), drawing(polygon(square(30, 0, 30)))
    assert areas(tmp_path, ring, inner, beside) == [500, 400, 900]
    crossing = drawing(polygon(square(25, 25, 10)))
    assert areas(tmp_path, beside, crossing) == [900 - 25, 100]


def multi(*places: tuple[int, int, int]) -> dict:
    parts = [polygon(square(*place))["coordinates"] for place in places]
    return {"type": "MultiPolygon", "coordinates": parts}


def test_a_multipolygon_of_parts_far_apart_is_many_nuclei(tmp_path):
    """CellViT's cells.geojson, and QuPath's Merge selected: a class is a MultiPolygon."""
    grid = [(10 * x, 10 * y, 5) for x in range(6) for y in range(6)]
    assert areas(tmp_path, drawing(multi(*grid))) == [25] * 36
    assert areas(tmp_path, drawing(multi(*grid), "detection")) == [900]  # 55 px: one object
    assert areas(tmp_path, drawing(multi(*grid), "detection"), side=56) == [900]
    far = [(x, y, 5) for x in (0, 80) for y in (0, 90)]
    assert areas(tmp_path, drawing(multi(*far), "detection"), side=100) == [25] * 4
    dense = [(6 * x, 6 * y, 5) for x in range(9) for y in range(9)]  # 1 px apart
    assert areas(tmp_path, drawing(multi(*dense))) == [25] * 81
    assert areas(tmp_path, drawing(multi((0, 0, 5), (6, 0, 5)))) == [50]  # a nucleus in pieces
    assert areas(tmp_path, drawing(multi((0, 0, 5)))) == [25]  # TissUUmaps issue 49
    (pieces,) = features(geometries(np.eye(100, dtype=np.int32)[::30].repeat(3, 0)))
    assert areas(tmp_path, pieces, side=100) == [12]  # what nucsam writes is one nucleus


def test_child_objects_and_classes_in_all_their_forms(tmp_path):
    """QuPath pull 1099: child objects, `names`; ENACT issue 45: GDAL's JSON in a string; 0.3."""
    children = [drawing(shape, "detection") for shape in PAIR]
    parent = drawing(polygon(square(0, 0, 60)), name="Region*")
    for place in (parent, parent["properties"]):
        nested = json.loads(json.dumps(parent))
        (nested if place is parent else nested["properties"])["childObjects"] = children
        assert areas(tmp_path, nested) == [25, 36]
    for properties in (
        {"objectType": "annotation", "classification": {"names": ["Region*", "Tumor"]}},
        {"object_type": "annotation", "classification": {"name": "Region*", "colorRGB": -1}},
        {"classification": '{ "name": "Region*", "color": [ 0, 0, 180 ] }'},
        {"classification": "Region*", "measurements": {"Area": 3600}},
    ):
        region = {"type": "Feature", "geometry": polygon(CIRCLE), "properties": properties}
        assert areas(tmp_path, region) == []


def test_what_has_no_area_is_left_out_and_counted(tmp_path):
    """Of jackson-datatype-jts issue 63 ([[]]) and terraformer pull 19 (too few points)."""
    nothing = [
        None,
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[]]},
        {"type": "MultiPolygon", "coordinates": []},
        polygon([(0, 0), (1, 1), (0, 0)]),
        polygon([(0, 0), (1, 1), (2, 2), (0, 0)]),
    ]
    parts = [{"type": "GeometryCollection", "geometries": [PAIR[0]]}, *nothing]
    with pytest.warns(UserWarning, match="1 GeometryCollection, 6 empty geometry"):
        assert areas(tmp_path, *map(drawing, parts), drawing(PAIR[1])) == [36]
    with pytest.warns(UserWarning, match="1 empty geometry"):
        half = {"type": "MultiPolygon", "coordinates": [[[]], PAIR[1]["coordinates"]]}
        assert areas(tmp_path, drawing(half)) == [36]
    hole = {"type": "Polygon", "coordinates": [*PAIR[1]["coordinates"], []]}
    assert areas(tmp_path, drawing(hole), drawing(polygon(square(0, 0, 3)[:-1]))) == [36, 9]


def test_a_bowtie_has_both_its_halves(tmp_path):
    """hover_next_inference issue 26, tiatoolbox issue 1080: polygons that cross themselves."""
    bowtie = polygon([(0, 0), (20, 20), (20, 0), (0, 20), (0, 0)])
    assert areas(tmp_path, drawing(bowtie, "detection")) == [200]


def test_gzip_is_unpacked(tmp_path):
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(json.dumps([drawing(PAIR[0])]).encode()))
    assert read(path, (60, 60)).sum() == 25
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.geojson\.gz"):
        read(path, (60, 60))


def test_pixels_are_those_of_shapely(tmp_path):
    shapely = pytest.importorskip("shapely")
    y, x = np.mgrid[:60, :60] + 0.5
    rng = np.random.default_rng(1)
    for _ in range(20):
        turn = np.sort(rng.uniform(0, 2 * np.pi, 40))
        radius = rng.uniform(5, 40, 40)
        star = np.stack([30 + radius * np.cos(turn), 30 + radius * np.sin(turn)], 1)
        expected = shapely.contains_xy(shapely.Polygon(star), x, y)
        label = read(
            put(tmp_path, collection(polygon([*star.tolist(), star[0].tolist()]))), (60, 60)
        )
        assert expected.sum() > 100 and np.array_equal(label > 0, expected)


def test_memory_is_bounded_where_a_polygon_zigzags(tmp_path):
    """15 million crossings of edges and rows would take 120 MB for one column of numbers."""
    side, edges = 1000, 15_333
    ring = [(k * side / edges, (k % 2) * side) for k in range(edges)]
    read(put(tmp_path, collection(*PAIR)), (side, side))  # imports
    path = put(tmp_path, collection(polygon([*ring, (side, -1), ring[0]])))
    tracemalloc.start()
    read(path, (side, side))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


BAD_POINTS = [(math.nan, 1), (1e9, 1), (1, -1e300), (10**400, 1), ("a", 1), (1,)]


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "Circle"},
        {"type": "Polygon"},
        {"type": "Polygon", "coordinates": [7]},
        {"type": "MultiPolygon", "coordinates": [7]},
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
