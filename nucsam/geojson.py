"""Label maps <-> GeoJSON (RFC 7946) as QuPath 0.4 and later exports and opens it: one Feature a nucleus.

Coordinates are (x, y) in image px as in QuPath: pixels have their corners at whole numbers, and the centre of the first
one is (0.5, 0.5). Outlines run along the edges of pixels, so that no pixel is lost on the way there and back.
"""

import json
import math
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.atomic import atomic

CLASS = {"name": "Nucleus", "color": [0, 200, 80]}  # RGB
FARTHEST = 1e9  # px: beyond it is no image


def features(
    label: np.ndarray,
    *,
    offset: tuple[float, float] = (0, 0),
    measurements: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """One GeoJSON Feature a nucleus of an integer label map (H, W), 0 = background, in ascending order of the ids.

    A Polygon, or a MultiPolygon where a nucleus is in pieces that share no pixel edge. Rings are closed and simple,
    outer ones counterclockwise in (x, y), holes clockwise. They are "detection" objects, of which QuPath shows many;
    the id is a UUID made of the outline, the same in every run.
    offset: (x, y) of the label map in the image, px. measurements: columns of numbers, a row per nucleus; what is not
    finite is left out.
    """
    columns = {name: np.asarray(column).tolist() for name, column in (measurements or {}).items()}
    found = []
    for row, polygons in enumerate(_outlines(label, offset)):
        values = {name: column[row] for name, column in columns.items() if math.isfinite(column[row])}
        single = len(polygons) == 1
        geometry = {"type": "Polygon" if single else "MultiPolygon", "coordinates": polygons[0] if single else polygons}
        properties = {"objectType": "detection", "classification": CLASS, "isLocked": False, "measurements": values}
        identity = str(uuid.uuid5(uuid.NAMESPACE_OID, str(polygons)))
        found.append({"type": "Feature", "id": identity, "geometry": geometry, "properties": properties})
    assert all(len(column) == len(found) for column in columns.values())
    return found


def write(path: str | Path, features: Iterable[dict[str, Any]]) -> int:
    """Writes a FeatureCollection, a line a Feature, as the Features come, and returns how many came. Atomic."""
    count = 0
    with atomic(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for count, feature in enumerate(features, 1):
            file.write((",\n" if count > 1 else "\n") + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")
    return count


def read(path: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """A GeoJSON file's polygons as a label map int32 of `shape` (H, W): ids 1, 2, ... in the order of the file.

    Takes a FeatureCollection, a list of Features, or one Feature. A pixel is in a polygon if its centre is, by the
    even-odd rule over the polygon's rings; later nuclei cover earlier ones, and what lies outside of the image is cut
    off. A MultiPolygon is one nucleus. Of a QuPath cell the nucleus is taken. Warns of what is not used: points, lines,
    empty geometries, and annotations round two or more detections or cells, which are regions. Raises a ValueError that
    names the file and the feature (the first is 1) on anything else, and where no polygon meets the image.
    """
    drawn, ignored = [], Counter()
    for number, feature in enumerate(_read_features(path), 1):
        try:
            kind, polygons = _geometry(feature)
            if polygons is None:
                ignored[kind] += 1
            else:
                drawn.append((_object_type(feature), [_rings(rings) for rings in polygons]))
        except ValueError as error:
            raise ValueError(f"{path}: feature {number}: {error}") from None
    label, regions = np.zeros(shape, np.int32), _regions(drawn)
    nuclei = [polygons for k, (_, polygons) in enumerate(drawn) if k not in regions]
    for value, polygons in enumerate(nuclei, 1):
        for rings in polygons:
            _fill(label, rings, value)
    if nuclei and not label.any():
        size = f"{shape[1]}x{shape[0]}"
        found = f"found no pixel of {size} px in any of {len(nuclei)} polygons"
        raise ValueError(f"{path}: {found}, expected coordinates in px")
    ignored |= Counter({"annotation of a region": len(regions)} if regions else {})
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.items())
        warnings.warn(f"{path}: found {kinds}, not used; expected polygons of nuclei", stacklevel=2)
    return label


# ---- label map -> rings ----


def _outlines(label: np.ndarray, offset: tuple[float, float]) -> Iterator[list[list[list[list[float]]]]]:
    """The polygons of each nucleus, each its outer ring and its holes."""
    owner, points, pixels, following, turns, pinched = _edges(label)
    points = points + np.asarray(offset)
    order = np.argsort(owner, kind="stable")
    bounds = [0, *(np.flatnonzero(np.diff(owner[order])) + 1).tolist(), len(order)]
    order, following, turns, pinched = order.tolist(), following.tolist(), turns.tolist(), set(pinched.tolist())
    seen = bytearray(len(order))
    for start, end in pairwise(bounds if order else ()):
        outer, holes = [], []
        for first in order[start:end]:
            if seen[first]:
                continue
            walk, edge = [], first
            while not seen[edge]:
                seen[edge] = 1
                if turns[edge]:
                    walk.append(edge)
                edge = following[edge]
            for ring in [walk] if pinched.isdisjoint(walk) else _simple(walk, points):
                closed = points[[*ring, ring[0]]]
                area = closed[:-1, 0] @ np.diff(closed[:, 1])  # the outlines' edges are upright or level
                (outer if area > 0 else holes).append((abs(area), pixels[ring[0]] + offset, closed))
        outer.sort(key=itemgetter(0))  # of those around a hole's pixel the smallest is its own
        polygons = [[closed.tolist()] for *_, closed in outer]
        for _, pixel, closed in holes:
            around = (k for k, (*_, ring) in enumerate(outer) if len(outer) == 1 or _inside(pixel, ring))
            polygons[next(around)].append(closed.tolist())
        yield polygons


def _edges(label: np.ndarray) -> tuple[np.ndarray, ...]:
    """Every side of a pixel that is an edge of its nucleus, on a walk that keeps the nucleus on its right on a screen.

    Of each edge: nucleus; (x, y) where it starts; (x, y) of its pixel's centre; index of the edge that follows; whether
    the walk turns where it starts. And the edges that start where two pixels of one nucleus share only a corner: there
    the walk stays with the pixel that it came along.
    """
    padded = np.pad(label, 1)
    width, flat = padded.shape[1], padded.ravel()
    core = flat[width:-width]
    beyond = np.array([-width, 1, width, -1])  # the top side, walked to the right, then the others in turn
    keys = [
        4 * (np.flatnonzero((core != flat[width + step : flat.size - width + step]) & (core > 0)) + width) + side
        for side, step in enumerate(beyond)
    ]
    keys = np.sort(np.concatenate(keys))
    pixel, side = keys >> 2, keys & 3
    ahead = pixel + beyond[side + 1 & 3]
    across = ahead + beyond[side]
    right, joined = flat[ahead] != flat[pixel], flat[across] == flat[pixel]
    left = joined & ~right
    target = np.where(right, pixel, np.where(left, across, ahead))
    following = np.searchsorted(keys, 4 * target + (side + right - left & 3))
    turns = np.empty(len(keys), bool)
    turns[following] = right | left
    pixels = np.stack([pixel % width, pixel // width], 1) - 1
    starts = pixels + np.array([[0, 0], [1, 0], [1, 1], [0, 1]])[side]
    return flat[pixel], starts, pixels + 0.5, following, turns, following[right & joined]


def _simple(walk: list[int], points: np.ndarray) -> list[list[int]]:
    """A closed walk over edges, cut into rings where it meets a point twice."""
    rings, path = [], {}
    for edge, place in zip(walk, map(tuple, points[walk].tolist())):
        if place in path:
            since = list(path)[list(path).index(place) :]
            rings.append([path.pop(earlier) for earlier in since])
        path[place] = edge
    return [*rings, list(path.values())]


def _inside(point: np.ndarray, closed: np.ndarray) -> bool:
    """Whether the centre of a pixel lies within a closed ring (n, 2) of edges of pixels."""
    below = closed[:, 1] > point[1]
    return bool(((below[1:] != below[:-1]) & (closed[1:, 0] > point[0])).sum() % 2)


# ---- rings -> label map ----


def _read_features(path: str | Path) -> list[Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected GeoJSON") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not a readable GeoJSON file ({error})") from None
    if isinstance(found, dict):
        found = found.get("features") if found.get("type") == "FeatureCollection" else [found]
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a FeatureCollection, a list of Features or a Feature")
    return found


def _object_type(feature: Any) -> Any:
    """QuPath's word for what a Feature is: annotation, detection, cell, ...; None if it has none."""
    match feature:
        case {"properties": {"objectType": str() as kind}}:
            return kind
    return None


def _regions(drawn: list[tuple[Any, list[list[np.ndarray]]]]) -> set[int]:
    """Indices of the annotations whose box holds those of two or more detections or cells."""
    points = [np.concatenate([ring for rings in polygons for ring in rings]) for _, polygons in drawn]
    boxes = np.array([[*xy.min(0), *xy.max(0)] for xy in points]).reshape(-1, 4)
    within = boxes[[kind in ("detection", "cell") for kind, _ in drawn]]

    def holds(box: np.ndarray) -> bool:
        return ((within[:, :2] >= box[:2]).all(1) & (within[:, 2:] <= box[2:]).all(1)).sum() > 1

    return {k for k, (kind, _) in enumerate(drawn) if kind == "annotation" and holds(boxes[k])}


def _geometry(feature: Any) -> tuple[str, list | None]:
    """Type of a Feature's geometry, and its polygons, each a list of rings; None where it has no area."""
    match feature:
        case {"type": "Feature", "nucleusGeometry": dict() as geometry}:
            pass
        case {"type": "Feature", "geometry": geometry}:
            pass
        case _:
            raise ValueError("expected a Feature with a geometry")
    match geometry:
        case {"type": "Polygon", "coordinates": [*rings]}:
            return "Polygon", [rings]
        case {"type": "MultiPolygon", "coordinates": [*polygons]} if all(isinstance(p, list) for p in polygons):
            return "MultiPolygon", polygons
        case {"type": "Point" | "MultiPoint" | "LineString" | "MultiLineString" as kind}:
            return kind, None
        case None:
            return "empty geometry", None
    found = geometry.get("type") if isinstance(geometry, dict) else geometry
    raise ValueError(f"found a geometry {str(found)[:40]!r}, expected a Polygon or MultiPolygon with coordinates")


def _rings(rings: Any) -> list[np.ndarray]:
    """The rings of a polygon."""
    if not isinstance(rings, list) or not rings:
        raise ValueError(f"found a polygon of {str(rings)[:40]}, expected a list of rings")
    return [_ring(ring) for ring in rings]


def _ring(ring: Any) -> np.ndarray:
    """(x, y) of a closed ring's points, float (n, 2)."""
    if not isinstance(ring, list) or len(ring) < 4:
        found = f"{len(ring)} points" if isinstance(ring, list) else type(ring).__name__
        raise ValueError(f"found a ring of {found}, expected at least 4, of which the last is the first")
    try:
        points = np.array([(float(x), float(y)) for x, y, *_ in ring])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"found a ring with other than numbers ({error}), expected points [x, y]") from None
    if not (np.abs(points) < FARTHEST).all():
        raise ValueError(f"found a coordinate that is not finite or not within {FARTHEST:g} px of the image")
    if (points[0] != points[-1]).any():
        raise ValueError(f"found a ring from {points[0].tolist()} to {points[-1].tolist()}, expected a closed one")
    return points


def _fill(label: np.ndarray, rings: list[np.ndarray], value: int) -> None:
    """Gives `value` to the pixels with an odd number of crossings between their centre and the left."""
    edges = np.concatenate([np.hstack([ring[:-1], ring[1:]]) for ring in rings])
    edges = np.where(edges[:, 1:2] > edges[:, 3:4], edges[:, [2, 3, 0, 1]], edges)  # downwards: neighbours share theirs
    x, y, x_end, y_end = edges.T
    first, last = (np.clip(np.ceil(side - 0.5), 0, label.shape[0]).astype(int) for side in (y, y_end))
    counts = last - first
    if not counts.any():
        return
    edge = np.repeat(np.arange(len(edges)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    crossing = x[edge] + (row + 0.5 - y[edge]) / (y_end - y)[edge] * (x_end - x)[edge]
    column = np.clip(np.ceil(crossing - 0.5), 0, label.shape[1]).astype(int)
    top, left, height, width = row.min(), column.min(), np.ptp(row) + 1, np.ptp(column) + 1
    crossings = np.bincount((row - top) * width + column - left, minlength=height * width).reshape(height, width)
    inside = np.cumsum(crossings, axis=1) % 2 == 1
    window = label[top : top + height, left : left + width]  # a last column outside of the image is even
    window[inside[:, : window.shape[1]]] = value
