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
    seed_boundary: float = 0.5,
    area: int = 30,
) -> np.ndarray:
    """Watershed of the boundary distance from seeds (micro-sam's automatic instance segmentation).

    Args: probability of being nucleus, and the two maps of `targets.distances`, float (H, W), 0..1. Seeds are the
        components of foreground pixels with both distances below their bounds; nuclei under `area` px are dropped.
    Returns: label map int32 (H, W), ids 1.. in raster order, 0 = background.
    """
    nucleus = foreground_HW > threshold
    seeds, _ = ndimage.label(nucleus & (centre_HW < seed_centre) & (boundary_HW < seed_boundary))
    places, labels = np.flatnonzero(nucleus), np.zeros(nucleus.shape, np.int32)
    labels.ravel()[places] = _named(_flooded(boundary_HW, seeds, nucleus, places), area)
    return labels


def _flooded(height_HW: np.ndarray, seeds_HW: np.ndarray, mask_HW: np.ndarray, places_P: np.ndarray) -> np.ndarray:
    """`watershed(height, seeds, mask=mask)` at the flat places P of the mask, without the seeds under SEED_AREA.

    A component of the mask with one seed is all that seed's: the slow queue of pixels is for those where seeds meet.
    """
    seeds_P, parts_P = (labels.ravel()[places_P] for labels in (seeds_HW, ndimage.label(mask_HW)[0]))
    seeds_P[np.bincount(seeds_P)[seeds_P] < SEED_AREA] = 0
    seeded = np.flatnonzero(seeds_P)
    ids, parts = seeds_P[seeded], parts_P[seeded]
    owner = np.zeros(len(places_P) + 1, np.int32)
    owner[parts] = ids
    shared = np.zeros(len(owner), bool)
    shared[parts[ids != owner[parts]]] = True
    labels_P, meet = owner[parts_P], shared[parts_P]
    if meet.any():
        markers, mask = np.zeros_like(seeds_HW), np.zeros_like(mask_HW)
        markers.ravel()[places_P[meet]], mask.ravel()[places_P[meet]] = seeds_P[meet], True
        labels_P[meet] = watershed(height_HW, markers, mask=mask).ravel()[places_P[meet]]
    return labels_P


def _named(ids_P: np.ndarray, area: int) -> np.ndarray:
    """Ids 1.. in the order of their first pixels, int32; 0 stays, and what has under `area` px becomes it."""
    size = np.bincount(ids_P, minlength=1)
    first = np.zeros(len(size), np.int64)
    first[ids_P[::-1]] = np.arange(len(ids_P))[::-1]  # the last value assigned stays
    kept = np.flatnonzero(size >= max(area, 1))
    kept = kept[kept > 0]
    names = np.zeros(len(size), np.int32)
    names[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return names[ids_P]


def from_foreground(
    foreground_HW: np.ndarray, *, threshold: float = 0.5, sigma: float = 2.0, reach: int = 5, area: int = 30
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
