"""Label maps to GeoJSON (RFC 7946) and back, as QuPath 0.4 and later use it: a Feature a nucleus.

Coordinates are (x, y) in image px, as in QuPath: pixels have their corners at whole numbers, so the
centre of the first one is (0.5, 0.5). Outlines run along the edges of pixels: no pixel is lost.
"""

import json
import math
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.errors import UserError
from nucsam.files import atomic

CLASS = {"name": "Nucleus", "color": [0, 200, 80]}  # RGB
DETECTION = {"objectType": "detection", "classification": CLASS, "isLocked": False}
FARTHEST = 1e9  # px: no image reaches this far

Polygon = list[list[list[float]]]  # closed rings of [x, y]: the outer one, then the holes


def features(
    label: np.ndarray,
    *,
    offset: tuple[float, float] = (0, 0),
    measurements: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Make one GeoJSON Feature per nucleus, in ascending order of the ids.

    A nucleus is a Polygon, or a MultiPolygon where its pieces share no pixel edge. Rings are closed
    and simple: outer ones counterclockwise in (x, y), holes clockwise. The object type is
    "detection", of which QuPath shows many. The id is a UUID of the outline, the same in every run.

    Args:
        label: integer (H, W), 0 = background.
        offset: (x, y) of the label map in the image, px.
        measurements: columns of numbers, one row per nucleus; a value that is not finite is left
            out.

    Returns:
        The Features.
    """
    columns = {name: np.asarray(column).tolist() for name, column in (measurements or {}).items()}
    return [
        _feature(polygons, {name: column[row] for name, column in columns.items()})
        for row, polygons in enumerate(_outlines(label, offset))
    ]


def write_geojson(path: str | Path, features: Iterable[dict[str, Any]]) -> int:
    """Write Features as they come to a FeatureCollection, or leave the old file.

    Args:
        path: the GeoJSON file.
        features: as of `features`; each becomes a line.

    Returns:
        The number of Features.
    """
    count = 0
    with atomic(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for count, feature in enumerate(features, 1):
            file.write((",\n" if count > 1 else "\n") + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")
    return count


def read(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Draw the polygons of a GeoJSON file as a label map.

    A polygon has the pixels whose centre is inside by the even-odd rule. Later nuclei cover earlier
    ones. A MultiPolygon is one nucleus. Of a QuPath cell, the nucleus counts. Points, lines, empty
    geometries and annotated regions give a warning; a region holds two or more detections or cells.

    Args:
        path: a FeatureCollection, a list of Features, or one Feature.
        shape: (H, W) of the image, px; what lies outside is cut off.

    Returns:
        int32 (H, W): 0 = background, ids 1, 2, ... in the order of the file.

    Raises:
        UserError: names the file and the number of the Feature that cannot be used, from 1; or no
            polygon meets the image.
    """
    nuclei, unused = _read_nuclei(path)
    label = np.zeros(shape, np.int32)
    for value, polygons in enumerate(nuclei, 1):
        for rings in polygons:
            _fill(label, rings, value)
    if nuclei and not label.any():
        found = f"found no pixel of {shape[1]}x{shape[0]} px in any of {len(nuclei)} nuclei"
        raise UserError(f"{path}: {found}, expected coordinates in px")
    if unused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in unused.items())
        warnings.warn(f"{path}: found {kinds}, not used; expected polygons of nuclei", stacklevel=2)
    return label


# Label map to outlines


def _feature(polygons: list[Polygon], measurements: dict[str, float]) -> dict[str, Any]:
    geometry = {"type": "MultiPolygon", "coordinates": polygons}
    if len(polygons) == 1:
        geometry = {"type": "Polygon", "coordinates": polygons[0]}
    finite = {name: value for name, value in measurements.items() if math.isfinite(value)}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, str(polygons))),
        "geometry": geometry,
        "properties": DETECTION | {"measurements": finite},
    }


def _outlines(label: np.ndarray, offset: tuple[float, float]) -> Iterator[list[Polygon]]:
    """Yield the polygons of each nucleus, in ascending order of the ids."""
    owner, starts, centres, following, turns = _edges(label)
    starts, centres = starts + np.asarray(offset), centres + offset
    order = np.argsort(owner, kind="stable")
    walks = _walks(order.tolist(), following.tolist(), turns.tolist())
    for _, nucleus_walks in groupby(walks, key=lambda corners: owner[corners[0]]):
        rings = [ring for corners in nucleus_walks for ring in _simple_rings(corners, starts)]
        yield _polygons([(starts[[*ring, ring[0]]], centres[ring[0]]) for ring in rings])


def _edges(label: np.ndarray) -> tuple[np.ndarray, ...]:
    """Find the n sides of pixels that bound a nucleus, as directed edges.

    A walk along them keeps the nucleus on its right, as seen on a screen. Where two pixels of one
    nucleus share only a corner, the walk stays with the pixel that it came along.

    Returns:
        The id of the nucleus (n,); the start (x, y) of the edge and the centre (x, y) of its pixel
        (n, 2), px; the edge that follows (n,); whether the walk turns at the start (n,).
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
    turns = np.empty(len(pixel), bool)
    turns[following] = right | left
    places = np.stack([pixel % width, pixel // width], 1) - 1
    starts = places + np.array([[0, 0], [1, 0], [1, 1], [0, 1]])[side]
    return flat[pixel], starts, places + 0.5, following, turns


def _walks(order: list[int], following: list[int], turns: list[bool]) -> Iterator[list[int]]:
    """Yield every closed walk over the edges: the edges at which it turns."""
    seen = bytearray(len(order))
    for edge in order:
        corners = []
        while not seen[edge]:
            seen[edge] = 1
            if turns[edge]:
                corners.append(edge)
            edge = following[edge]
        if corners:
            yield corners


def _simple_rings(corners: list[int], starts: np.ndarray) -> Iterator[list[int]]:
    """Cut a closed walk into simple rings, where it comes to a point again."""
    path = {}  # the edge at each point since the last cut, in order
    for edge, point in zip(corners, map(tuple, starts[corners].tolist())):
        ring = []
        while point in path:
            ring.append(path.popitem()[1])
        if ring:
            yield ring[::-1]
        path[point] = edge
    yield list(path.values())


def _polygons(rings: list[tuple[np.ndarray, np.ndarray]]) -> list[Polygon]:
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
    return polygons


# GeoJSON to label map


def _read_nuclei(path: str | Path) -> tuple[list[list[list[np.ndarray]]], Counter]:
    """Read the polygons of each nucleus, as rings (n, 2), and count what is not used by kind."""
    objects, unused = [], Counter()
    for number, feature in enumerate(_read_features(path), 1):
        try:
            geometry = _geometry(feature)
            polygons = _parse_polygons(geometry)
        except UserError as error:
            raise UserError(f"{path}: feature {number}: {error}") from None
        if polygons:
            objects.append((_object_type(feature), polygons))
        else:
            unused[geometry["type"] if geometry else "empty geometry"] += 1
    regions = _regions(objects)
    if any(regions):
        unused["annotation of a region"] = sum(regions)
    nuclei = [polygons for (_, polygons), region in zip(objects, regions) if not region]
    return nuclei, unused


def _read_features(path: str | Path) -> list[Any]:
    try:
        document = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected GeoJSON") from None
    if isinstance(document, dict):
        document = document.get("features", [document])
    if not isinstance(document, list):
        raise UserError(f"{path}: expected a FeatureCollection, a list of Features or a Feature")
    return document


def _object_type(feature: dict[str, Any]) -> str | None:
    """QuPath's name for the object of a Feature: annotation, detection, cell, ..."""
    match feature:
        case {"properties": {"objectType": str() as kind}}:
            return kind
    return None


def _geometry(feature: Any) -> Any:
    """The geometry of a Feature; of a QuPath cell, that of its nucleus."""
    match feature:
        case {"type": "Feature", "nucleusGeometry": dict() as geometry} | {
            "type": "Feature",
            "geometry": geometry,
        }:
            return geometry
    raise UserError("expected a Feature with a geometry")


def _parse_polygons(geometry: Any) -> list[list[np.ndarray]]:
    """The polygons of a geometry, each a list of rings; none for one that has no area."""
    match geometry:
        case None | {"type": "Point" | "MultiPoint" | "LineString" | "MultiLineString"}:
            return []
        case {"type": "Polygon", "coordinates": [_, *_] as rings}:
            return [[_parse_ring(ring) for ring in rings]]
        case {"type": "MultiPolygon", "coordinates": [_, *_] as polygons}:
            parts = [{"type": "Polygon", "coordinates": rings} for rings in polygons]
            return [_parse_polygons(part)[0] for part in parts]
    raise UserError(f"found the geometry {str(geometry)[:60]}, expected a Polygon or MultiPolygon")


def _parse_ring(ring: Any) -> np.ndarray:
    """(x, y) of the points of a closed ring, float (n, 2)."""
    try:
        points = np.array([(float(x), float(y)) for x, y, *_ in ring])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"found a ring that is no list of points [x, y] ({error})") from None
    if len(points) < 4 or (points[0] != points[-1]).any():
        raise UserError(f"found a ring of {len(points)} points, expected a closed one of 4 or more")
    if not (np.abs(points) < FARTHEST).all():
        raise UserError(f"found a coordinate that is not finite or over {FARTHEST:g} px")
    return points


def _regions(objects: list[tuple[str | None, list[list[np.ndarray]]]]) -> list[bool]:
    """Which objects are annotations whose box holds those of two or more detections or cells."""
    points = [np.concatenate([*chain(*polygons)]) for _, polygons in objects]
    low = np.array([xy.min(0) for xy in points]).reshape(-1, 2)
    high = np.array([xy.max(0) for xy in points]).reshape(-1, 2)
    nuclei = [k for k, (kind, _) in enumerate(objects) if kind in ("detection", "cell")]

    def nuclei_within(k: int) -> int:
        return ((low[nuclei] >= low[k]) & (high[nuclei] <= high[k])).all(1).sum()

    kinds = [kind for kind, _ in objects]
    return [kind == "annotation" and nuclei_within(k) > 1 for k, kind in enumerate(kinds)]


def _fill(label: np.ndarray, rings: list[np.ndarray], value: int) -> None:
    """Give `value` to the pixels that have an odd number of crossings left of their centre."""
    edges = np.concatenate([np.hstack([ring[:-1], ring[1:]]) for ring in rings])
    upward = edges[:, 1:2] > edges[:, 3:4]
    # all edges run downward, so that neighbours compute the same crossings with a shared edge
    x, y, x_end, y_end = np.where(upward, edges[:, [2, 3, 0, 1]], edges).T
    first, last = (np.clip(np.ceil(end - 0.5), 0, label.shape[0]).astype(int) for end in (y, y_end))
    counts = last - first  # rows of pixel centres that each edge crosses
    if not counts.any():
        return
    edge = np.repeat(np.arange(len(edges)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    crossing = x[edge] + (row + 0.5 - y[edge]) / (y_end - y)[edge] * (x_end - x)[edge]
    column = np.clip(np.ceil(crossing - 0.5), 0, label.shape[1]).astype(int)
    top, left, height, width = row.min(), column.min(), np.ptp(row) + 1, np.ptp(column) + 1
    cells = np.bincount((row - top) * width + column - left, minlength=height * width)
    inside = np.cumsum(cells.reshape(height, width), axis=1) % 2 == 1
    # a crossing right of the image adds a last column, in which every row is even
    window = label[top : top + height, left : left + width]
    window[inside[:, : window.shape[1]]] = value
