"""What annotators draw: outlines of nuclei, of regions and of unsure areas, and how to draw them.

ImageJ's ROI sets and Aperio's XML are read here; `nucsam.data.geojson` reads QuPath's GeoJSON.
Coordinates are (x, y) in image px: pixels have their corners at whole numbers, so the centre of the
first one is (0.5, 0.5).
"""

import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from nucsam.errors import UserError, reading
from nucsam.files import check_regular_file

SUFFIXES = (".geojson", ".json", ".geojson.gz", ".zip", ".roi", ".xml")
FARTHEST = 1e9  # px: no image reaches this far
CROSSINGS = 2**20  # of edges with rows of pixels that are computed at a time
MOST_BYTES = 2**31  # of a file, and of what a compressed one holds
ROI_BYTES = 2**26  # most of one ROI in a zip file
NUCLEUS = 64  # px: a detection in pieces is one nucleus up to this side
NEAR = 2  # px: farthest that the pieces of one nucleus lie apart
PIECES = 8  # most pieces that are one nucleus where no other rule says so
GRID = 16  # points a side of a grid that tests whether a shape lies in another
CORE = 0.1  # least share of a cell's area that its nucleus has
CONTEXT = 64  # px around a region that are read with it

Polygon = list[np.ndarray]  # closed rings (n, 2) of (x, y), px; a point in an odd number is inside
Place = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Shape:
    """One object that was drawn."""

    polygons: list[Polygon]
    kind: str = ""  # QuPath's, in small letters: annotation, detection, cell, tile, tmacore; or roi
    name: str = ""  # of its class
    whole: bool = False  # whether the file says that all polygons are one nucleus

    @cached_property
    def box(self) -> np.ndarray:
        """Least x and y, largest x and y, px."""
        points = np.concatenate([*chain(*self.polygons)])
        return np.concatenate([points.min(0), points.max(0)])

    @cached_property
    def area(self) -> float:
        """Area without holes, px²."""
        return sum(2 * _area(rings[0]) - sum(map(_area, rings)) for rings in self.polygons)

    def is_of(self, *beginnings: str) -> bool:
        """Whether the name of the class begins with one of these, in any case of letters."""
        return self.name.casefold().startswith(beginnings)

    def nuclei(self) -> list[list[Polygon]]:
        """The polygons of each nucleus: of one, or of all nuclei of a class."""
        low, high = self.box[:2], self.box[2:]
        detected = self.kind in ("detection", "cell") and (high - low).max() <= NUCLEUS
        if self.whole or detected or _are_pieces(self.polygons):
            return [self.polygons]
        return [[rings] for rings in self.polygons]


class Outlines:
    """The shapes of a file, sorted.

    A shape of a class `Ignore*` or `Ambiguous*` is an unsure area. One of a class `Region*`, or of
    `region_class`, is a region: it is what was annotated. A tile, a TMA core and a shape around
    others are neither region nor nucleus.

    Attributes:
        nuclei: the polygons of each nucleus, in the order of the file.
        regions: polygons; empty where the whole image was annotated.
        unsure: polygons.
        areas: polygons to predict in: the regions, or else all shapes that no method detected.

    Args:
        path: the file, for messages.
        shapes: what was drawn.
        unused: numbers of objects without an area, by kind.
        region_class: a class of regions beside `Region*`; "" = none.
    """

    def __init__(
        self, path: str | Path, shapes: Sequence[Shape], unused: Counter, region_class: str = ""
    ) -> None:
        self.path = path
        self.unused = Counter(unused)
        self.nuclei: list[list[Polygon]] = []
        self.regions: list[Polygon] = []
        self.unsure: list[Polygon] = []
        for shape, holds in zip(shapes, _hold_others(shapes)):
            if shape.is_of("ignore", "ambiguous"):
                self.unsure += shape.polygons
            elif shape.is_of("region") or shape.name == region_class != "":
                self.regions += shape.polygons
            elif shape.kind in ("tile", "tmacore", "root"):
                self.unused[shape.kind] += 1
            elif holds:
                self.unused[f"{shape.kind or 'outline'} around others"] += 1
            else:
                self.nuclei += shape.nuclei()
        drawn = [s for s in shapes if s.kind not in ("detection", "cell") and not s.is_of("ignore")]
        self.areas = self.regions or [*chain.from_iterable(shape.polygons for shape in drawn)]

    def label(self, size: tuple[int, int], place: Place | None = None) -> np.ndarray:
        """Draw the nuclei; later ones cover earlier ones.

        Warns of what the file holds besides.

        Args:
            size: (H, W) of the image, px; what lies outside is cut off.
            place: draw this place alone.

        Returns:
            int32 (h, w): 0 = background, ids 1, 2, ... in the order of the file.

        Raises:
            UserError: no nucleus meets the image.
        """
        label = _draw(self.nuclei, place or _whole(size), np.int32)
        if self.nuclei and place is None and not label.any():
            raise self._missed(size, f"{len(self.nuclei)} nuclei")
        if self.unused:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.unused.items())
            found = f"{self.path}: found {kinds}, not used; expected outlines of nuclei"
            warnings.warn(found, stacklevel=3)
        return label

    def uncounted(
        self, size: tuple[int, int], place: Place | None = None, region: int | None = None
    ) -> np.ndarray | None:
        """Draw what was not annotated: the outside of the regions, and unsure areas.

        Args:
            size, place: as in `label`.
            region: count this region alone, from 0.

        Returns:
            bool (h, w), or None where the file says that all was annotated.

        Raises:
            UserError: no region meets the image.
        """
        if not self.regions and not self.unsure:
            return None
        place = place or _whole(size)
        unsure = _draw([self.unsure], place, bool)
        if not self.regions:
            return unsure
        regions = self.regions if region is None else [self.regions[region]]
        inside = _draw([regions], place, bool)
        if not inside.any():
            raise self._missed(size, f"{len(regions)} regions")
        return unsure | ~inside

    def window(self, region: int, size: tuple[int, int]) -> Place:
        """The place of a region in an image of `size`, with CONTEXT px around it."""
        rows_and_columns = self.regions[region][0][:, ::-1].astype(int)
        low = np.maximum(rows_and_columns.min(0) - CONTEXT, 0)
        high = np.maximum(np.minimum(rows_and_columns.max(0) + CONTEXT, size), low)
        return tuple(map(slice, low.tolist(), high.tolist()))

    def inside(self, place: Place) -> np.ndarray:
        """Draw the areas to predict in, without the unsure ones: bool (h, w) of a place."""
        inside = _draw([self.areas], place, bool)
        return inside & ~_draw([self.unsure], place, bool)

    def _missed(self, size: tuple[int, int], what: str) -> UserError:
        found = f"found no pixel of {size[1]}x{size[0]} px in any of {what}"
        return UserError(f"{self.path}: {found}, expected coordinates in px")


def read_bytes(path: str | Path, expected: str) -> bytes:
    """The content of a regular file of at most MOST_BYTES.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    with reading(path, expected, (OSError, ValueError)):  # ValueError: a null byte in the name
        check_regular_file(Path(path))
        check_bytes(Path(path).stat().st_size)
        return Path(path).read_bytes()


def check_bytes(count: int) -> None:
    if count > MOST_BYTES:
        raise UserError(f"found over {MOST_BYTES} bytes, expected a smaller file")


def read_imagej(path: str | Path) -> tuple[list[Shape], Counter]:
    """Read an ImageJ ROI or a zip file of them, as NuInsSeg was drawn.

    Returns:
        The shapes, and the numbers of ROIs without an area by their type.

    Raises:
        UserError: the file cannot be read; names it.
    """
    from roifile import ROI_SUBTYPE, ROI_TYPE, ImagejRoi  # 0.2 s

    expected = "an ImageJ ROI or a zip file of them"
    data = read_bytes(path, expected)
    flat = (ROI_TYPE.POLYGON, ROI_TYPE.RECT, ROI_TYPE.OVAL, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
    marks = (ROI_SUBTYPE.TEXT, ROI_SUBTYPE.ARROW, ROI_SUBTYPE.IMAGE)
    shapes, unused = [], Counter()
    with reading(path, expected):
        for member in _zip_members(data) if zipfile.is_zipfile(io.BytesIO(data)) else [data]:
            roi = ImagejRoi.frombytes(member)
            if roi.roitype not in flat or roi.subtype in marks:
                unused[f"{roi.roitype.name.lower()} ROI"] += 1
                continue
            rings = map(closed_ring, roi.coordinates(multi=True))
            if rings := [ring for ring in rings if ring is not None]:
                shapes.append(Shape([rings], "roi", roi.name or ""))
            else:
                unused["empty ROI"] += 1
    return shapes, unused


def read_aperio(path: str | Path) -> tuple[list[Shape], Counter]:
    """Read the annotation layers of Aperio's ImageScope, as MoNuSeg was drawn.

    A vertex means the centre of the pixel it names: drawn this way, MoNuSeg's files agree best with
    the label maps in use. The class is the name of the layer, or its description, or the name of
    its attribute (MoNuSAC), or the region's text. A negative region is an unsure area. An ellipse
    is given by the corners of its box, and a rectangle may be.

    Returns:
        The shapes, and the numbers of regions without an area.

    Raises:
        UserError: the file is no XML of Aperio; names it.
    """
    expected = "Aperio's XML: Annotations, Annotation, Regions, Region, Vertices, Vertex"
    data = read_bytes(path, expected)
    with reading(path, expected, (ElementTree.ParseError, TypeError, ValueError)):
        root = ElementTree.fromstring(data)
        if root.tag != "Annotations":
            raise UserError(f"found the element {root.tag}, expected {expected}")
        shapes, unused = [], Counter()
        for layer in root.iter("Annotation"):
            attributes = [element.attrib for element in layer.iterfind("Attributes/Attribute")]
            names = [layer.get("Name"), *(a.get("Value") for a in attributes)]
            names += [a.get("Name") for a in attributes if a.get("Name") != "Description"]
            for region in layer.iterfind("Regions/Region"):
                name = next(filter(None, [*names, region.get("Text")]), "")
                name = "Ignore*" if region.get("NegativeROA") == "1" else name
                if (ring := _aperio_ring(region)) is not None:
                    shapes.append(Shape([[ring]], "roi", name))
                else:
                    unused["region without an area"] += 1
    return shapes, unused


def closed_ring(points: Iterable[Sequence[float]]) -> np.ndarray | None:
    """A closed ring, float (n, 2), of its points; None where they lie on one line.

    Raises:
        UserError: a coordinate is not finite or over FARTHEST px.
    """
    ring = np.asarray(points, float).reshape(-1, 2)
    if not (np.abs(ring) < FARTHEST).all():
        raise UserError(f"found a coordinate that is not finite or over {FARTHEST:g} px")
    ring = np.concatenate([ring, ring[:1]])
    x, y = (ring - ring[:1]).T
    if (x @ x) * (y @ y) - (x @ y) ** 2 <= 1e-9 * (x @ x) * (y @ y):
        return None
    return ring


def _zip_members(data: bytes) -> Iterable[bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if not info.filename.lower().endswith(".roi") or info.filename.startswith("__MACOSX"):
                continue
            if info.file_size > ROI_BYTES:
                raise UserError(f"found {info.file_size} bytes in {info.filename}")
            yield archive.read(info)


def _aperio_ring(region: ElementTree.Element) -> np.ndarray | None:
    vertices = [(float(v.get("X")), float(v.get("Y"))) for v in region.iter("Vertex")]
    kind = region.get("Type")  # 0: freehand, 1: rectangle, 2: ellipse, 3: arrow, 4: ruler
    if not vertices or kind not in ("0", "1", "2", None):
        return None
    points = np.array(vertices)
    low, high = points.min(0), points.max(0)
    if kind == "2":
        turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        points = (low + high + (high - low) * np.stack([np.cos(turn), np.sin(turn)], 1)) / 2
    elif kind == "1" and len(points) == 2:
        points = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
    return closed_ring(points + 0.5)


# What contains what


def _area(ring: np.ndarray) -> float:
    return abs((ring[:-1, 0] + ring[1:, 0]) @ np.diff(ring[:, 1])) / 2


def _are_pieces(polygons: Sequence[Polygon]) -> bool:
    """Whether the boxes of some polygons are one chain without a gap over NEAR px."""
    from scipy.sparse.csgraph import connected_components

    if not 1 < len(polygons) <= PIECES:
        return len(polygons) == 1
    boxes = np.array([[*rings[0].min(0), *rings[0].max(0)] for rings in polygons])
    low, high = boxes[:, :2], boxes[:, 2:]
    gaps = (np.maximum(low[:, None], low) - np.minimum(high[:, None], high)).max(2)
    return connected_components(gaps <= NEAR)[0] == 1


def _hold_others(shapes: Sequence[Shape]) -> list[bool]:
    """Which shapes were drawn around others.

    Such a shape is an annotation around any other, a cell around its one nucleus, or a shape around
    two or more. ImageJ's and Aperio's nuclei may overlap.
    """
    from scipy.spatial import cKDTree

    holding = [False] * len(shapes)
    if len(shapes) < 2:
        return holding
    boxes = np.array([shape.box for shape in shapes])
    centres, reaches = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1) / 2
    tree = cKDTree(centres)
    near = tree.query_ball_point(centres, reaches, p=np.inf, return_length=True)
    for k in np.flatnonzero(near > 1):
        others = np.array(tree.query_ball_point(centres[k], reaches[k], p=np.inf))
        within = (boxes[others, :2] >= boxes[k, :2]) & (boxes[others, 2:] <= boxes[k, 2:])
        inner = [shapes[j] for j in others[within.all(1)] if shapes[j].area < shapes[k].area]
        holding[k] = _holds(shapes[k], inner)
    return holding


def _holds(shape: Shape, others: Iterable[Shape]) -> bool:
    inner = [*islice((other for other in others if _contains(shape, other)), 2)]
    if len(inner) != 1:
        return bool(inner)
    nucleus = shape.kind != "roi" and inner[0].area >= CORE * shape.area
    return nucleus or shape.kind == "annotation"


def _contains(shape: Shape, other: Shape) -> bool:
    """Whether nearly all points of a grid over the other shape that are in it are in the shape."""
    low, size = other.box[:2], other.box[2:] - other.box[:2]
    outer, inner = grids = np.zeros((2, GRID, GRID), bool)
    for grid, polygons in zip(grids, (shape.polygons, other.polygons)):
        for rings in polygons:
            _fill(grid, [(ring - low) / size * GRID for ring in rings], True)
    return inner.any() and outer[inner].mean() > 0.95


# Outlines to pixels


def _whole(size: tuple[int, int]) -> Place:
    return slice(0, size[0]), slice(0, size[1])


def _draw(groups: Iterable[Sequence[Polygon]], place: Place, dtype: type) -> np.ndarray:
    """The number of the last group of polygons that has the pixel, from 1, or 0; (h, w)."""
    rows, columns = place
    corner = np.array([columns.start, rows.start])
    drawn = np.zeros((rows.stop - rows.start, columns.stop - columns.start), dtype)
    for value, polygons in enumerate(groups, 1):
        for rings in polygons:
            _fill(drawn, [ring - corner for ring in rings], value)
    return drawn


def _fill(label: np.ndarray, rings: Polygon, value: int) -> None:
    """Give `value` to the pixels that have an odd number of crossings left of their centre."""
    starts = np.concatenate([ring[:-1] for ring in rings])
    ends = np.concatenate([ring[1:] for ring in rings])
    upward = starts[:, 1:] > ends[:, 1:]
    # all edges run downward, so that neighbours compute the same crossings with a shared edge
    (x, y), (x_end, y_end) = np.where(upward, ends, starts).T, np.where(upward, starts, ends).T
    rows = np.clip(np.ceil(np.stack([y, y_end]) - 0.5), 0, label.shape[0]).astype(int)
    width = label.shape[1]
    extremes = np.array([starts[:, 0].min(), starts[:, 0].max()])
    left, right = np.clip(np.ceil(extremes - 0.5), 0, width).astype(int)
    counts = rows[1] - rows[0]  # rows of pixel centres that each edge crosses
    crossed = np.flatnonzero(counts)
    if not len(crossed) or left == right:
        return
    counts, first = counts[crossed], rows[0, crossed]
    x, y, height = x[crossed], y[crossed], (y_end - y)[crossed]
    slope = (x_end[crossed] - x) / height
    top, bottom, across = first.min(), rows[1].max(), right - left + 1
    # a byte a pixel may overflow: only odd or even matters
    cells = np.zeros((bottom - top) * across, np.uint8)
    batches = np.cumsum(counts) // CROSSINGS
    for part in np.split(np.arange(len(crossed)), np.flatnonzero(np.diff(batches)) + 1):
        edge = np.repeat(part, counts[part])
        before = np.cumsum(counts[part]) - counts[part]
        row = np.arange(len(edge)) - np.repeat(before - first[part], counts[part])
        crossing = x[edge] + (row + 0.5 - y[edge]) * slope[edge]
        column = np.clip(np.ceil(crossing - 0.5).astype(int), left, right)
        # 40 times slower with an int
        np.add.at(cells, (row - top) * across + column - left, np.uint8(1))
    inside = np.cumsum(cells.reshape(-1, across), axis=1, dtype=np.uint8)[:, :-1] % 2 == 1
    label[top:bottom, left:right][inside] = value
