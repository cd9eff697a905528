"""Sizes, shapes and intensities of the nuclei of a label map."""

import numpy as np

GREY = np.array([0.299, 0.587, 0.114])  # of R, G, B: ITU-R BT.601
NAMES = {  # scikit-image's: ours
    "label": "id",
    "centroid-1": "centroid_x",
    "centroid-0": "centroid_y",
    "area": "area_px",
    "perimeter": "perimeter_px",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
}


def measure(label: np.ndarray, image: np.ndarray, mpp: float | None = None) -> dict[str, np.ndarray]:
    """Columns with a row per nucleus of an integer label map (H, W), in ascending order of the ids, 0 = background.

    id; centroid_x, centroid_y (px, a pixel's corners at whole numbers as in `nucsam.geojson`: half a pixel more than
    scikit-image's); area_px (px²), perimeter_px, eccentricity (0 to 1) and solidity (over 0, at most 1) as
    scikit-image's `regionprops` defines them; mean_grey, mean_red, mean_green, mean_blue of the image uint8 (H, W, 3).
    With `mpp`, microns per px, also centroid_x_um, centroid_y_um, area_um2, perimeter_um.
    Memory grows with the largest id.
    """
    from skimage.measure import regionprops_table

    names = ("label", "centroid", "area", "perimeter", "eccentricity", "solidity", "intensity_mean")
    found = regionprops_table(label, image, properties=names)
    columns = {name: found[theirs] for theirs, name in NAMES.items()}
    colours = [found[f"intensity_mean-{k}"] for k in range(3)]
    columns |= {f"centroid_{axis}": columns[f"centroid_{axis}"] + 0.5 for axis in "xy"}
    columns["mean_grey"] = np.stack(colours, 1) @ GREY
    columns |= zip(("mean_red", "mean_green", "mean_blue"), colours)
    if mpp:
        columns |= {f"{name}_um": columns[name] * mpp for name in ("centroid_x", "centroid_y")}
        columns |= {"area_um2": columns["area_px"] * mpp**2, "perimeter_um": columns["perimeter_px"] * mpp}
    return columns
