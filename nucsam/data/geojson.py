"""Label maps to GeoJSON (RFC 7946), as QuPath 0.4 and later use it, and annotations from it.

Coordinates are (x, y) in image px, as in QuPath: pixels have their corners at whole numbers, so the
centre of the first one is (0.5, 0.5). Outlines run along the edges of pixels: no pixel is lost.
"""

import gzip
import io
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.data.rois import (
    MOST_BYTES,
    Outlines,
    Polygon,
    Shape,
    check_bytes,
    closed_ring,
    read_bytes,
)
from nucsam.errors import UserError, reading
from nucsam.files import atomic

CLASS = {"name": "Nucleus", "color": [0, 200, 80]}  # RGB
DETECTION = {"objectType": "detection", "classification": CLASS, "isLocked": False}
KINDS = ("annotation", "detection", "cell", "tile", "tmacore", "root")  # QuPath's objects
NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString", "GeometryCollection")
GZIP = b"\x1f\x8b"
HEAD, TAIL = '{"type": "FeatureCollection", "features": [\n', "\n]}\n"  # around `to_json`
_JSON = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def geometries(label: np.ndarray, offset: tuple[float, float] = (0, 0)) -> Iterator[dict[str, Any]]:
    """Yield the outline of each nucleus as a GeoJSON geometry, in ascending order of the ids.

    A nucleus is a Polygon, or a MultiPolygon where its pieces share no pixel edge. Rings are closed
    and simple: outer ones counterclockwise in (x, y), holes clockwise.

    Args:
        label: integer (H, W), 0 = background.
        offset: (x, y) of the label map in the image, px.
    """
    owner, starts, centres, following, turns, pinches = _edges(label)
    if not len(owner):
        return
    starts, centres = starts + np.asarray(offset), centres + offset
    order, walk = _walks(owner, following)
    order, walk = order[turns[order]], walk[turns[order]]
    begins = np.flatnonzero(np.diff(owner[order], prepend=0))  # of each nucleus
    ends = np.append(begins[1:], len(order))
    plain = ~np.logical_or.reduceat(pinches[order], begins) & (walk[begins] == walk[ends - 1])
    points = starts[order].tolist()
    for begin, end, is_plain in zip(begins.tolist(), ends.tolist(), plain.tolist()):
        if is_plain:  # one simple ring
            ring = [*points[begin:end], points[begin]]
            yield {"type": "Polygon", "coordinates": [ring]}
            continue
        walks = np.split(order[begin:end], np.flatnonzero(np.diff(walk[begin:end])) + 1)
        rings = [ring for corners in walks for ring in _simple_rings(corners, starts)]
        yield _geometry([(starts[[*ring, ring[0]]], centres[ring[0]]) for ring in rings])


def features(
    outlines: Iterable[dict[str, Any]], measurements: Mapping[str, np.ndarray] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one GeoJSON Feature per nucleus.

    The object type is "detection", of which QuPath shows many. The id is a UUID of the outline, the
    same in every run.

    Args:
        outlines: as in `geometries`.
        measurements: columns of numbers, one row per nucleus; a value that is not finite is left
            out.
    """
    columns = {name: np.asarray(column).tolist() for name, column in (measurements or {}).items()}
    for row, geometry in enumerate(outlines):
        values = {name: column[row] for name, column in columns.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        properties = DETECTION | {"measurements": finite}
        if geometry["type"] == "MultiPolygon":
            properties["oneNucleus"] = True  # for `read_shapes`
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, str(geometry["coordinates"]))),
            "geometry": geometry,
            "properties": properties,
        }


def to_json(features: Iterable[dict[str, Any]]) -> str:
    """Features or geometries as JSON, one a line, with commas between."""
    return ",\n".join(map(_JSON.encode, features))


def write_geojson(path: str | Path, features: Iterable[dict[str, Any]]) -> None:
    """Write Features to a FeatureCollection, or leave the old file."""
    with atomic(Path(path)) as partial:
        partial.write_text(f"{HEAD}{to_json(features)}{TAIL}", encoding="utf-8")


def read(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Draw the nuclei of a GeoJSON file as a label map.

    A nucleus has the pixels whose centre is inside by the even-odd rule. `Outlines.label` says
    more.

    Args:
        path: as in `read_shapes`.
        shape: (H, W) of the image, px; what lies outside is cut off.

    Returns:
        int32 (H, W): 0 = background, ids 1, 2, ... in the order of the file.

    Raises:
        UserError: as in `read_shapes`; or no nucleus meets the image.
    """
    return Outlines(path, *read_shapes(path)).label(shape)


def read_shapes(path: str | Path) -> tuple[list[Shape], Counter]:
    """Read the polygons of a GeoJSON file of QuPath 0.2 to 0.6, or of another tool.

    Of a QuPath cell, the nucleus counts. Child objects follow their parent. Rings without an area,
    and other geometries than polygons, are counted.

    Args:
        path: a FeatureCollection, a list of Features, or one Feature; .gz is unpacked.

    Returns:
        The shapes, and the numbers of what is not used, by kind.

    Raises:
        UserError: names the file and the number of the Feature that cannot be used, from 1.
    """
    shapes, unused = [], Counter()
    for number, feature in _read_features(path):
        try:
            shape = _shape(feature, unused)
        except UserError as error:
            raise UserError(f"{path}: feature {number}: {error}") from None
        if shape.polygons:
            shapes.append(shape)
    return shapes, unused


# Label map to outlines


def _edges(label: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the n sides of pixels that bound a nucleus, as directed edges.

    A walk along them keeps the nucleus on its right, as seen on a screen. Where two pixels of one
    nucleus share only a corner, the walk stays with the pixel that it came along.

    Returns:
        The id of the nucleus (n,); the start (x, y) of the edge and the centre (x, y) of its pixel
        (n, 2), px; the edge that follows (n,); whether the walk turns at the start (n,), and
        whether the nucleus touches itself with a corner there (n,).
    """
    padded = np.pad(label, 1)
    width, flat = padded.shape[1], padded.ravel()
    beyond = np.array([-width, 1, width, -1])  # sides 0..3: top, right, bottom, left
    inside = np.flatnonzero(flat > 0)
    number, side = np.nonzero(flat[inside[:, None] + beyond] != flat[inside, None])
    pixel = inside[number]
    ahead = pixel + beyond[(side + 1) % 4]
    diagonal = ahead + beyond[side]
    right = flat[ahead] != flat[pixel]  # the walk turns right there, around its own pixel
    left = ~right & (flat[diagonal] == flat[pixel])
    target = np.where(right, pixel, np.where(left, diagonal, ahead))
    following = np.searchsorted(4 * pixel + side, 4 * target + (side + right - left) % 4)
    turns, pinches = np.empty((2, len(pixel)), bool)
    turns[following] = right | left
    pinches[following] = right & (flat[diagonal] == flat[pixel])
    places = np.stack([pixel % width, pixel // width], 1) - 1
    starts = places + np.array([[0, 0], [1, 0], [1, 1], [0, 1]])[side]
    return flat[pixel], starts, places + 0.5, following, turns, pinches


def _walks(owner: np.ndarray, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every closed walk over the edges, those of one nucleus after each other, by ascending id.

    Returns:
        The edges in the order of the walks (n,), and the number of the walk of each (n,).
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components, depth_first_order

    def graph(following: np.ndarray) -> csr_array:
        return csr_array((np.ones(n), following, np.arange(n + 1)), shape=(n, n))

    n = len(owner)
    _, walk = connected_components(graph(following), connection="weak")
    _, first = np.unique(walk, return_index=True)
    first = first[np.argsort(owner[first], kind="stable")]
    before = np.empty_like(following)
    before[following] = np.arange(n)
    chained = following.copy()
    chained[before[first]] = np.roll(first, -1)  # each walk leads to the next
    order = depth_first_order(graph(chained), first[0], return_predecessors=False)
    return order, walk[order]


def _simple_rings(corners: np.ndarray, starts: np.ndarray) -> Iterator[list[int]]:
    """Cut a closed walk into simple rings, where it comes to a point again."""
    path = {}  # the edge at each point since the last cut, in order
    for edge, point in zip(corners.tolist(), map(tuple, starts[corners].tolist())):
        ring = []
        while point in path:
            ring.append(path.popitem()[1])
        if ring:
            yield ring[::-1]
        path[point] = edge
    yield list(path.values())


def _geometry(rings: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Put the holes of one nucleus into its outer rings.

    Args:
        rings: closed points (n, 2) and the centre of a pixel of the nucleus beside them.
    """
    from skimage.measure import points_in_poly

    areas = [ring[:-1, 0] @ np.diff(ring[:, 1]) for ring, _ in rings]  # edges: upright or level
    outer = [rings[k][0] for k in np.argsort(areas, kind="stable") if areas[k] > 0]
    polygons = [[ring.tolist()] for ring in outer]
    for (ring, pixel), area in zip(rings, areas):
        if area < 0:  # a hole, in the smallest outer ring around its pixel
            piece = next(k for k, around in enumerate(outer) if points_in_poly([pixel], around))
            polygons[piece].append(ring.tolist())
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


# GeoJSON to shapes


def _read_features(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield each Feature with the number of its place in the file, then its child objects."""
    data = read_bytes(path, "GeoJSON")
    with reading(path, "GeoJSON"):
        if data.startswith(GZIP):
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MOST_BYTES + 1)
        check_bytes(len(data))
        document = json.loads(data)
    if isinstance(document, dict):
        document = document.get("features", [document])
    if not isinstance(document, list):
        raise UserError(f"{path}: expected a FeatureCollection, a list of Features or a Feature")
    for number, feature in enumerate(document, 1):
        family = [feature]
        while family:
            yield number, (member := family.pop())
            match member:
                case {"properties": {"childObjects": [*children]}} | {"childObjects": [*children]}:
                    family += reversed(children)


def _shape(feature: Any, unused: Counter) -> Shape:
    """The shape of a Feature; of a QuPath cell, that of its nucleus."""
    match feature:
        case {"type": "Feature", "nucleusGeometry": dict() as geometry} | {
            "type": "Feature",
            "geometry": geometry,
        }:
            polygons = _parse_polygons(geometry, unused)
        case _:
            raise UserError("expected a Feature with a geometry")
    properties = feature.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    kind = properties.get("objectType") or properties.get("object_type") or feature.get("id")
    kind = re.sub("[^a-z]", "", str(kind).lower()).removeprefix("path").removesuffix("object")
    name = _class_name(properties.get("classification"))
    kind = kind if kind in KINDS else ""
    return Shape(polygons, kind, name, properties.get("oneNucleus") is True)


def _class_name(classification: Any) -> str:
    """The name of a class, as QuPath writes it or as GDAL does: as JSON in a string."""
    match classification:
        case {"name": str() as name}:
            return name
        case {"names": [*names]}:
            return ": ".join(map(str, names))
        case str() as text if text.lstrip().startswith("{"):
            with suppress(ValueError, RecursionError):
                return _class_name(json.loads(text))
        case str() as name:
            return name
    return ""


def _parse_polygons(geometry: Any, unused: Counter) -> list[Polygon]:
    """The polygons of a geometry; counts those without an area, and what is no polygon."""
    match geometry:
        case None:
            unused["empty geometry"] += 1
            return []
        case {"type": str() as kind} if kind in NO_AREA:
            unused[kind] += 1
            return []
        case {"type": "Polygon", "coordinates": list() as rings}:
            polygons = [rings]
        case {"type": "MultiPolygon", "coordinates": list() as polygons} if all(
            isinstance(rings, list) for rings in polygons
        ):
            pass
        case _:
            found = f"found the geometry {str(geometry)[:60]}"
            raise UserError(f"{found}, expected a Polygon or MultiPolygon")
    parsed = [[_parse_ring(ring) for ring in rings] for rings in polygons]
    whole = [rings for rings in parsed if rings and rings[0] is not None]
    if empty := max(len(parsed), 1) - len(whole):
        unused["empty geometry"] += empty
    return [[ring for ring in rings if ring is not None] for rings in whole]


def _parse_ring(ring: Any) -> np.ndarray | None:
    """A ring as `closed_ring` returns it."""
    try:
        points = [(float(x), float(y)) for x, y, *_ in ring]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"found a ring that is no list of points [x, y] ({error})") from None
    return closed_ring(points)
