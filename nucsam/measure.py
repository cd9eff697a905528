"""Sizes, shapes and intensities of the nuclei of a label map."""

import numpy as np

GREY = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601
CODES = np.zeros(50)  # length of a boundary at a pixel of it: Benkrid and Crookes, 2000, as in scikit-image
CODES[[5, 7, 15, 17, 25, 27]], CODES[[21, 33]], CODES[[13, 23]] = 1, np.sqrt(2), (1 + np.sqrt(2)) / 2


def measure(label: np.ndarray, image: np.ndarray, mpp: float | None = None) -> dict[str, np.ndarray]:
    """Columns with a row per nucleus of an integer label map (H, W), in ascending order of the ids, 0 = background.

    id; centroid_x, centroid_y (px, a pixel's corners at whole numbers as in `nucsam.geojson`: half a pixel more than
    scikit-image's); area_px (px²), perimeter_px, eccentricity (0 to 1) and solidity (over 0, at most 1) as
    scikit-image's `regionprops` defines them; mean_grey, mean_red, mean_green, mean_blue of the image uint8 (H, W, 3).
    With `mpp`, microns per px, also centroid_x_um, centroid_y_um, area_um2, perimeter_um.
    Memory grows with the largest id.
    """
    from skimage.measure import regionprops

    flat, width = label.ravel(), label.shape[1]
    pixel = np.flatnonzero(flat)
    index = flat[pixel]
    area = np.bincount(index)
    ids = np.flatnonzero(area)
    index = (np.cumsum(area > 0) - 1)[index]
    area = area[ids]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, values, len(ids)) / area

    y, x = np.divmod(pixel, width)
    centre_y, centre_x = mean(y), mean(x)
    dy, dx = y - centre_y[index], x - centre_x[index]
    yy, xx, xy = mean(dy * dy), mean(dx * dx), mean(dx * dy)
    spread = np.hypot((xx - yy) / 2, xy)  # half the difference of the two variances along the axes of the ellipse
    largest = (xx + yy) / 2 + spread
    red, green, blue = (mean(channel) for channel in image.reshape(-1, 3)[pixel].T)
    columns = {
        "id": ids,
        "centroid_x": centre_x + 0.5,
        "centroid_y": centre_y + 0.5,
        "area_px": area,
        "perimeter_px": _perimeter(label)[ids],
        "eccentricity": np.sqrt(np.divide(2 * spread, largest, out=np.zeros(len(ids)), where=largest > 0).clip(0, 1)),
        "solidity": np.array([region.solidity for region in regionprops(label)]),
        "mean_grey": np.stack([red, green, blue], 1) @ GREY,
        "mean_red": red,
        "mean_green": green,
        "mean_blue": blue,
    }
    if mpp:
        columns |= {f"{name}_um": columns[name] * mpp for name in ("centroid_x", "centroid_y")}
        columns |= {"area_um2": area * mpp**2, "perimeter_um": columns["perimeter_px"] * mpp}
    return columns


def _perimeter(label: np.ndarray) -> np.ndarray:
    """Perimeter by id, px: the boundary pixels are those with a neighbour of another id above, below or beside."""
    padded = np.pad(label, 1)
    width, flat = padded.shape[1], padded.ravel()
    straight, diagonal = (-width, -1, 1, width), (-width - 1, -width + 1, width - 1, width + 1)
    pixel = np.flatnonzero(flat)
    edge = np.zeros(len(flat), bool)
    for step in straight:
        edge[pixel] |= flat[pixel + step] != flat[pixel]
    pixel = np.flatnonzero(edge)
    code = np.ones(len(pixel), np.int64)
    for steps, weight in ((straight, 2), (diagonal, 10)):
        for step in steps:
            code += weight * (edge[pixel + step] & (flat[pixel + step] == flat[pixel]))
    return np.bincount(flat[pixel], CODES[code])
