"""Dense maps -> label map: numpy, scipy and scikit-image; no loop over nuclei."""

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import label as label_pieces
from skimage.segmentation import watershed

_EIGHT = np.ones((3, 3), bool)


def from_depth(
    foreground_HW: np.ndarray,
    depth_HW: np.ndarray,
    *,
    threshold: float = 0.5,
    rise: float = 0.15,
    confidence: float = 0.0,
    area: int = 30,
) -> np.ndarray:
    """Watershed of the depth from its h-maxima (Soille 2003, Morphological Image Analysis, 6.3 and 9.2).

    Args: probability of being nucleus, and the map of `targets.depth`, float (H, W), 0..1. A seed is a maximum of the
        depth that lies at least `rise` above the highest pass to a higher one. Nuclei under `area` px, or whose mean
        foreground is under `confidence`, are dropped.
    Returns: label map int32 (H, W), ids 1.. in raster order, 0 = background.
    """
    H, W = foreground_HW.shape
    nucleus = foreground_HW > threshold
    height = np.full((H, W + 1), -np.inf, np.float32)  # a column more parts a row's end from the next one's start
    np.copyto(height[:, :W], depth_HW, where=nucleus)
    basins, peak = _basins(height.ravel(), (1, W + 1))
    names = _joined(peak, *_passes(basins, height.ravel(), (1, W + 1)), rise)
    places, labels = np.flatnonzero(nucleus), np.zeros((H, W), np.int32)
    ids = names[basins.reshape(H, W + 1)[:, :W].ravel()[places]]
    labels.ravel()[places] = _named(ids, foreground_HW.ravel()[places], area=area, confidence=confidence)
    return labels


def _basins(height: np.ndarray, steps: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel comes to that climbs from neighbour to neighbour, without a queue of pixels.

    Of a flat image, -inf where there is none, and the steps to the next column and row. Returns the basins 1.. of all
    maxima, 0 elsewhere, int32 like the image, and the maxima's heights, -inf first.
    """
    beside = [(here, there) for k in steps for here, there in ((np.s_[:-k], np.s_[k:]), (np.s_[k:], np.s_[:-k]))]
    best, way = height.copy(), np.zeros(len(height), np.int8)
    for here, there in beside:
        np.maximum(best[here], height[there], out=best[here])
    for direction, (here, there) in enumerate(beside, 1):
        np.maximum(way[here], (height[there] == best[here]).view(np.int8) * np.int8(direction), out=way[here])
    way *= best > height
    places = np.flatnonzero(height > -np.inf)
    own, numbers = np.arange(len(places)), np.zeros(len(height), np.intp)
    numbers[places] = own
    away = np.array([0, *(sign * step for step in steps for sign in (1, -1))])
    up = numbers.take(places + away.take(way.take(places)))
    further = np.empty_like(up)
    while not np.array_equal(up, up.take(up, out=further, mode="clip")):  # none is out of range: no look at each
        up, further = further, up
    top = up == own
    basins = np.zeros(len(height), np.int32)
    basins[places] = np.cumsum(top)[up]
    return basins, np.append(np.float32(-np.inf), height[places[top]])


def _passes(basins: np.ndarray, height: np.ndarray, steps: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Where basins touch, (T,) each: one basin, the other, the height there; each place both ways."""
    found = []
    for step in steps:
        a, b = basins[:-step], basins[step:]
        one = np.flatnonzero((a != b) & (a > 0) & (b > 0))
        a, b, low = a[one], b[one], np.minimum(height[one], height[one + step])
        found += [(a, b, low), (b, a, low)]
    return tuple(np.concatenate(values) for values in zip(*found))


def _joined(peak: np.ndarray, here: np.ndarray, beyond: np.ndarray, height: np.ndarray, rise: float) -> np.ndarray:
    """For each basin, from its maximum's height and the passes, the id of the h-maximum's basin, 0 for 0.

    In each round every basin whose maximum is less than `rise` above its highest pass joins the basin beyond: the flood
    from the h-maxima, without the slow reconstruction that finds them.
    """
    names = np.arange(len(peak))
    while True:
        highest = np.full(len(peak), -np.inf, peak.dtype)
        np.maximum.at(highest, here, height)
        over = np.arange(len(peak))
        (through,) = np.nonzero((height == highest[here]) & (peak[here] - height < rise))
        if not through.size:
            return names
        over[here[through]] = beyond[through]  # of passes of one height the last
        joins = coo_array((np.ones(len(over)), (np.arange(len(over)), over)), shape=(len(over), len(over)))
        n, joined = connected_components(joins, directed=False)
        before, peak = peak, np.full(n, -np.inf, peak.dtype)
        np.maximum.at(peak, joined, before)
        names, here, beyond = joined[names], joined[here], joined[beyond]
        here, beyond, height = (values[here != beyond] for values in (here, beyond, height))


def _named(ids_P: np.ndarray, foreground_P: np.ndarray, *, area: int, confidence: float) -> np.ndarray:
    """Ids 1.. in the order of their first pixels, int32; 0 stays, and what is too small or too unsure becomes it."""
    size, total = np.bincount(ids_P, minlength=1), np.bincount(ids_P, foreground_P, minlength=1)
    first = np.zeros(len(size), np.int64)
    first[ids_P[::-1]] = np.arange(len(ids_P))[::-1]  # the last value assigned stays
    kept = np.flatnonzero((size >= max(area, 1)) & (total >= confidence * size))
    kept = kept[kept > 0]
    names = np.zeros(len(size), np.int32)
    names[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return names[ids_P]


def from_foreground(
    foreground_HW: np.ndarray,
    depth_HW: np.ndarray | None = None,
    *,
    threshold: float = 0.5,
    sigma: float = 2.0,
    reach: int = 5,
    confidence: float = 0.0,
    area: int = 30,
) -> np.ndarray:
    """Watershed of any map of depth; without one of the nuclei's own distance transform, px.

    Seeds are the maxima of the depth, smoothed by `sigma` px, within `reach` px. Else as `from_depth`.
    """
    nucleus = foreground_HW > threshold
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(nucleus) if depth_HW is None else depth_HW, sigma)
    peaks = (depth == ndimage.maximum_filter(depth, 2 * reach + 1)) & nucleus
    seeds, _ = ndimage.label(peaks, _EIGHT)
    return whole(watershed(-depth, seeds, mask=nucleus), foreground_HW, area=area, confidence=confidence)


def whole(labels_HW: np.ndarray, foreground_HW: np.ndarray, *, area: int, confidence: float) -> np.ndarray:
    """Each nucleus's largest 4-connected piece, if it has `area` px and a mean foreground of `confidence`: label map
    int32 (H, W), ids 1.. in raster order."""
    pieces, n = label_pieces(labels_HW, connectivity=1, return_num=True)
    size = np.bincount(pieces.ravel(), minlength=n + 1)
    owner = np.zeros(n + 1, np.int64)
    owner[pieces] = labels_HW
    largest = np.zeros(owner.max() + 1, np.int64)
    order = np.argsort(size, kind="stable")
    largest[owner[order]] = order  # of pieces of one nucleus the last, largest, stays
    total = np.bincount(pieces.ravel(), foreground_HW.ravel(), minlength=n + 1)
    kept = (largest[owner] == np.arange(n + 1)) & (owner > 0) & (size >= area) & (total >= confidence * size)
    return (np.cumsum(kept) * kept).astype(np.int32)[pieces]
