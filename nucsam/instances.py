"""Dense maps -> label map: numpy, scipy and scikit-image; no loop over nuclei."""

import numpy as np
from scipy import ndimage
from skimage.measure import label as connected_components
from skimage.segmentation import watershed

SEED_AREA = 5  # px; smaller seeds are noise
_EIGHT = np.ones((3, 3), bool)


def from_distances(
    foreground_HW: np.ndarray,
    centre_HW: np.ndarray,
    boundary_HW: np.ndarray,
    *,
    threshold: float = 0.5,
    seed_centre: float = 0.5,
    seed_boundary: float = 0.6,
    area: int = 30,
) -> np.ndarray:
    """Watershed of the boundary distance from seeds (micro-sam's automatic instance segmentation).

    Args: probability of being nucleus, and the two maps of `targets.distances`, float (H, W), 0..1. Seeds are the
        components of foreground pixels with both distances below their bounds; nuclei under `area` px are dropped.
    Returns: label map int32 (H, W), ids 1.., 0 = background.
    """
    nucleus = foreground_HW > threshold
    seeds, n = ndimage.label(nucleus & (centre_HW < seed_centre) & (boundary_HW < seed_boundary))
    small = np.bincount(seeds.ravel(), minlength=n + 1) < SEED_AREA
    small[0] = False
    seeds[small[seeds]] = 0
    return whole(watershed(boundary_HW, seeds, mask=nucleus), area)


def from_foreground(
    foreground_HW: np.ndarray, *, threshold: float = 0.5, sigma: float = 1.0, reach: int = 3, area: int = 30
) -> np.ndarray:
    """Watershed of a foreground map's own distance transform: what can be had without any map of instances.

    Seeds are the maxima of the depth, smoothed by `sigma` px, within `reach` px. Else as `from_distances`.
    """
    nucleus = foreground_HW > threshold
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(nucleus), sigma)
    peaks = (depth == ndimage.maximum_filter(depth, 2 * reach + 1)) & nucleus
    seeds, _ = ndimage.label(peaks, _EIGHT)
    return whole(watershed(-depth, seeds, mask=nucleus), area)


def whole(labels_HW: np.ndarray, area: int) -> np.ndarray:
    """Each nucleus's largest 4-connected piece if it has `area` px, ids 1.. in raster order, int32."""
    pieces, n = connected_components(labels_HW, connectivity=1, return_num=True)
    size = np.bincount(pieces.ravel(), minlength=n + 1)
    owner = np.zeros(n + 1, np.int64)
    owner[pieces] = labels_HW
    largest = np.zeros(owner.max() + 1, np.int64)
    order = np.argsort(size, kind="stable")
    largest[owner[order]] = order  # of pieces of one nucleus the last, largest, stays
    kept = (largest[owner] == np.arange(n + 1)) & (owner > 0) & (size >= area)
    return (np.cumsum(kept) * kept).astype(np.int32)[pieces]
