"""Sizes, shapes and intensities of the nuclei of a label map, without a loop over nuclei."""

import numpy as np

GREY = np.array([0.299, 0.587, 0.114])  # weights of R, G, B: ITU-R BT.601
OD = -np.log10(np.maximum(np.arange(256), 1) / 255)  # optical density of a byte; 255 is glass
# Length of the perimeter at a pixel of the border, by how many pixels of the border are beside it,
# times 2, and across a corner, times 10: Benkrid and Crookes 2000, as in scikit-image.
LENGTHS = np.zeros(49)
LENGTHS[[4, 6, 14, 16, 24, 26]] = 1
LENGTHS[[20, 32]] = np.sqrt(2)
LENGTHS[[12, 22]] = (1 + np.sqrt(2)) / 2


def measure(
    label: np.ndarray,
    image: np.ndarray,
    mpp: float | None = None,
    corner: tuple[int, int] = (0, 0),
    confidence: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Measure every nucleus.

    Sizes, shapes and colours are those of `regionprops` of scikit-image. Memory grows with the
    largest id.

    Args:
        label: integers (H, W), 0 = background.
        image: uint8 (H, W, 3).
        mpp: microns per px; None = not known.
        corner: (y, x) of the label map in the image whose coordinates the table has, px.
        confidence: of the ids 1, 2, ...; a column of its own.

    Returns:
        Columns with one row per nucleus, in ascending order of the ids: id; centroid_x and
        centroid_y, px; area_px, px²; perimeter_px; eccentricity, 0..1; solidity, over 0 to 1;
        mean_grey, mean_red, mean_green and mean_blue, 0..255. With `mpp` also centroid_x_um,
        centroid_y_um, area_um2 and perimeter_um. Then haematoxylin_od and eosin_od, mean optical
        densities by the stain matrix of scikit-image (Ruifrok and Johnston 2001); where the other
        stain prevails, one may be under 0. Pixels have their corners at whole numbers, as in
        `data.geojson`, so centroids lie half a pixel above scikit-image's.
    """
    from skimage.color import hed_from_rgb

    pixels = np.flatnonzero(label)
    owner = label.ravel()[pixels]
    sizes = np.bincount(owner, minlength=1)
    ids = np.flatnonzero(sizes)
    area = sizes[ids]
    row = (np.cumsum(sizes > 0) - 1)[owner]  # of the table

    def means(values: np.ndarray) -> np.ndarray:
        return np.bincount(row, values, len(ids)) / area

    y, x = np.divmod(pixels, label.shape[1])
    centre_y, centre_x = means(y), means(x)
    dy, dx = y - centre_y[row], x - centre_x[row]
    colours = [image[..., k].ravel()[pixels] for k in range(3)]
    red, green, blue = (means(colour) for colour in colours)
    stains = np.stack([means(OD[colour]) for colour in colours], 1) @ hed_from_rgb
    columns = {
        "id": ids,
        "centroid_x": centre_x + 0.5 + corner[1],
        "centroid_y": centre_y + 0.5 + corner[0],
        "area_px": area,
        "perimeter_px": _perimeters(label, row, len(ids)),
        "eccentricity": _eccentricities(means(dy * dy), means(dx * dx), means(dy * dx)),
        "solidity": area / _hull_areas(row, y, x, len(ids)),
        "mean_grey": np.stack([red, green, blue], 1) @ GREY,
        "mean_red": red,
        "mean_green": green,
        "mean_blue": blue,
    }
    if mpp:
        columns["centroid_x_um"] = columns["centroid_x"] * mpp
        columns["centroid_y_um"] = columns["centroid_y"] * mpp
        columns["area_um2"] = columns["area_px"] * mpp**2
        columns["perimeter_um"] = columns["perimeter_px"] * mpp
    columns |= {"haematoxylin_od": stains[:, 0], "eosin_od": stains[:, 1]}
    if confidence is not None:
        columns["confidence"] = confidence[ids - 1]
    return columns


def _eccentricities(yy: np.ndarray, xx: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Of the ellipses with these central moments, 0..1."""
    spread = np.hypot(yy - xx, 2 * xy)
    longest, shortest = yy + xx + spread, yy + xx - spread  # squares of the axes, but for a factor
    flatness = shortest / np.where(longest > 0, longest, 1)
    return np.where(longest > 0, np.sqrt(np.clip(1 - flatness, 0, 1)), 0)


def _perimeters(label: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    """The perimeter of each nucleus float64 (n,), px.

    Args:
        label: integers (H, W), 0 = background.
        row: of the nucleus of each pixel that is not 0, in raster order, 0 to n - 1.
        n: number of nuclei.
    """
    padded = np.pad(label, 1)
    down = padded.shape[1]
    sides, corners = (1, -1, down, -down), (down + 1, down - 1, 1 - down, -1 - down)
    flat = padded.ravel()
    pixels = np.flatnonzero(flat)
    owner = flat[pixels]
    at_border = ~np.all([flat[pixels + step] == owner for step in sides], axis=0)
    pixels, owner = pixels[at_border], owner[at_border]
    border = np.zeros_like(flat)
    border[pixels] = owner
    beside, across = (
        np.sum([border[pixels + step] == owner for step in steps], axis=0)
        for steps in (sides, corners)
    )
    lengths = LENGTHS[2 * beside + 10 * across]
    return np.bincount(row[at_border], lengths, n).astype(float)  # of no pixels it counts in int


def _hull_areas(row: np.ndarray, y: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """The number of pixels whose centre is in the convex hull of a nucleus, (n,).

    The hull is that of scikit-image: around the middles of the four sides of every pixel. So all
    its points are whole numbers in units of half a pixel, and nothing is rounded.

    Args:
        row: of the nucleus of each pixel, 0 to n - 1.
        y, x: of each pixel, in raster order.
        n: number of nuclei.
    """
    if not n:
        return np.zeros(0)
    # The first and the last pixel of each nucleus in each row of the image
    height = int(y.max()) + 1
    line = row * height + y
    order = np.argsort(line, kind="stable")
    starts = np.flatnonzero(np.diff(line[order], prepend=-1))
    first, last = order[starts], order[np.append(starts[1:], len(order)) - 1]
    # The left side of each hull, and the right side mirrored, are chains: a chain's points (place,
    # left) have ascending places, which are its number times span plus their height
    span = 2 * height + 1
    place = np.concatenate([2 * row[first] * span, (2 * row[first] + 1) * span])
    place += np.tile(2 * y[first] + 1, 2)
    left = np.concatenate([2 * x[first], -2 * x[last]])
    points = np.concatenate([(place, left - 1), (place - 1, left), (place + 1, left)], axis=1)
    points = points[:, np.lexsort(points[::-1])]
    points = points[:, np.diff(points[0], prepend=-1) > 0]
    chain = points[0] // span
    inside = np.ones(1, bool)
    while inside.any():  # a point on or right of the line between its neighbours is no corner
        rise, run = np.diff(points)
        inside = (chain[:-2] == chain[2:]) & (run[:-1] * rise[1:] >= run[1:] * rise[:-1])
        is_corner = np.concatenate([[True], ~inside, [True]])
        points, chain = points[:, is_corner], chain[is_corner]
    # The first pixel inside of each chain, in each row of the image
    ends = np.flatnonzero(np.diff(chain, append=-1))
    begins = np.append(0, ends[:-1] + 1)
    rows = (points[0, ends] - points[0, begins]) // 2
    before = np.cumsum(rows) - rows
    place = np.repeat(points[0, begins] + 1 - 2 * before, rows) + 2 * np.arange(rows.sum())
    below = np.searchsorted(points[0], place, "right")
    above = points[:, below - 1]
    rise, run = points[:, below] - above
    minus_column = (above[1] * rise + run * (place - above[0])) // (-2 * rise)
    total = np.add.reduceat(minus_column, before)
    return rows[::2] + total[::2] + total[1::2]
