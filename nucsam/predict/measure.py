"""Sizes, shapes and intensities of the nuclei of a label map."""

import numpy as np

GREY = np.array([0.299, 0.587, 0.114])  # weights of R, G, B: ITU-R BT.601
NAMES = {  # of scikit-image -> of the table
    "label": "id",
    "centroid-1": "centroid_x",
    "centroid-0": "centroid_y",
    "area": "area_px",
    "perimeter": "perimeter_px",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
}


def measure(
    label: np.ndarray,
    image: np.ndarray,
    mpp: float | None = None,
    corner: tuple[int, int] = (0, 0),
) -> dict[str, np.ndarray]:
    """Measure every nucleus, as `regionprops` of scikit-image does.

    Memory grows with the largest id.

    Args:
        label: integers (H, W), 0 = background.
        image: uint8 (H, W, 3).
        mpp: microns per px; None = not known.
        corner: (y, x) of the label map in the image whose coordinates the table has, px.

    Returns:
        Columns with one row per nucleus, in ascending order of the ids: id; centroid_x and
        centroid_y, px; area_px, px²; perimeter_px; eccentricity, 0..1; solidity, over 0 to 1;
        mean_grey, mean_red, mean_green and mean_blue, 0..255. With `mpp` also centroid_x_um,
        centroid_y_um, area_um2 and perimeter_um. Pixels have their corners at whole numbers, as in
        `data.geojson`, so centroids lie half a pixel above scikit-image's.
    """
    from skimage.measure import regionprops_table

    names = ("label", "centroid", "area", "perimeter", "eccentricity", "solidity", "intensity_mean")
    table = regionprops_table(label, image, properties=names)
    columns = {name: table[theirs] for theirs, name in NAMES.items()}
    columns["centroid_x"] = columns["centroid_x"] + 0.5 + corner[1]
    columns["centroid_y"] = columns["centroid_y"] + 0.5 + corner[0]
    colours = [table[f"intensity_mean-{k}"] for k in range(3)]
    columns["mean_grey"] = np.stack(colours, 1) @ GREY
    columns |= zip(("mean_red", "mean_green", "mean_blue"), colours)
    if mpp:
        columns["centroid_x_um"] = columns["centroid_x"] * mpp
        columns["centroid_y_um"] = columns["centroid_y"] * mpp
        columns["area_um2"] = columns["area_px"] * mpp**2
        columns["perimeter_um"] = columns["perimeter_px"] * mpp
    return columns
