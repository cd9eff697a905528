"""Dense maps -> label map, without a loop over pixels or nuclei and without torch.

`from_depth` floods the depth map from its h-maxima (Soille 2003, Morphological Image Analysis, 6.3
and 9.2). An h-maximum is a maximum that rises at least h above its saddle, the lowest pixel on the
highest path to a higher maximum. Here h is `instances.seed_rise`.

1. `_basins`: from every pixel the steepest ascent leads to a maximum. The pixels that reach one
   maximum are its basin.
2. `_saddles`: the places where two basins touch.
3. `_seeds`: a basin whose maximum is no h-maximum joins its neighbour beyond the saddle, until the
   maximum of every basin is one.
4. `_numbered`: nuclei that are too small or too unsure go, the others get their ids.

`lenient` lowers the thresholds for an image that the model is less certain of than usual.

Shape suffixes: H W rows and columns, N pixels of a flat image, P nucleus pixels in raster order,
K basins, S saddles. A flat image has an empty row above and below and W + 1 columns. The last one
is empty, so that the end of a row does not touch the start of the next one.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy  # its parts, and those of skimage, load when they are first used
import skimage

from nucsam.config import Instances
from nucsam.data.labels import FEWEST

FOREGROUND_POWER, CONFIDENCE_POWER = 8, 3  # of certainty / usual certainty, in `lenient`


class Nuclei(NamedTuple):
    """The nuclei of an image or of a part of it."""

    label: np.ndarray  # int32 (H, W), 0 = background, ids 1, 2, ...
    confidence: np.ndarray  # (n,), mean foreground of each, 0..1

    @property
    def certainty(self) -> float | None:
        """Mean foreground probability over the pixels of all nuclei; None of under `FEWEST`."""
        if len(self.confidence) < FEWEST:
            return None
        size = np.bincount(self.label.ravel())[1:]
        return float(np.average(self.confidence, weights=size))


def with_confidence(label_HW: np.ndarray, foreground_HW: np.ndarray) -> Nuclei:
    """The nuclei of a label map and the mean probability of nucleus over the pixels of each."""
    pixels_P = np.flatnonzero(label_HW)
    ids_P = label_HW.ravel()[pixels_P]
    size = np.bincount(ids_P, minlength=1)[1:]
    total = np.bincount(ids_P, foreground_HW.ravel()[pixels_P], minlength=1)[1:]
    return Nuclei(label_HW, total / np.maximum(size, 1))


def lenient(config: Instances, certainty: float, usual: float) -> Instances:
    """Thresholds for an image of less than the usual certainty.

    In a stain that training has not seen, all probabilities shrink: nuclei are missed, and drawn
    too small. The powers were chosen by AJI and PQ away from home (benchmarks/accuracy.md).

    Args:
        config: the thresholds at the usual certainty.
        certainty: of the image, 0..1.
        usual: certainty from which they stay as they are, above 0.
    """
    share = min(1.0, certainty / usual)
    return replace(
        config,
        foreground=config.foreground * share**FOREGROUND_POWER,
        confidence=config.confidence * share**CONFIDENCE_POWER,
    )


def from_depth(foreground_HW: np.ndarray, depth_HW: np.ndarray, config: Instances) -> np.ndarray:
    """Nuclei by watershed of the depth from its h-maxima.

    Args:
        foreground_HW: probability of nucleus, float, 0..1.
        depth_HW: map of `targets.depth`, float, 0..1.
        config: the section `instances` of the configuration.

    Returns:
        Label map int32 (H, W), ids 1.. in raster order, 0 = background.
    """
    H, W = foreground_HW.shape
    places_P = np.flatnonzero(foreground_HW > config.foreground)
    row = W + 1
    pixels_P = places_P + places_P // W + row  # the same pixels of the flat image
    height_N = np.full((H + 2) * row, -np.inf, np.float32)
    height_N[pixels_P] = depth_HW.ravel()[places_P]
    basin_P, peak_K = _basins(height_N, pixels_P, row)
    saddles = _saddles(basin_P, height_N, pixels_P, row)
    seed_K = _seeds(peak_K, *saddles, config.seed_rise)
    labels = np.zeros(H * W, np.int32)
    labels[places_P] = _numbered(seed_K[basin_P], foreground_HW.ravel()[places_P], config)
    return labels.reshape(H, W)


def _basins(height_N: np.ndarray, pixels_P: np.ndarray, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The basin of each pixel, by steepest ascent to one of its four neighbours.

    A pixel without a higher neighbour is a maximum. So every pixel of a plateau is one; `_seeds`
    joins them.

    Args:
        height_N: float32, -inf outside of the nuclei.
        pixels_P: places of the nucleus pixels.
        row: step to the next row.

    Returns:
        Basin of each pixel int (P,), 1..; height of each basin's maximum (K,), -inf for basin 0,
        which has no pixel.
    """
    height_P = height_N.take(pixels_P)
    steps = np.array([0, 1, -1, row, -row])
    around = [height_N.take(pixels_P + step) for step in steps[1:]]
    highest_P = np.maximum.reduce(around)
    # Number of the step to the highest neighbour, the last one of a tie; 0 stays.
    ascent_P = np.zeros(len(pixels_P), np.int8)
    for number, there_P in enumerate(around, 1):
        leads = (there_P == highest_P).view(np.int8)
        np.maximum(ascent_P, leads * np.int8(number), out=ascent_P)
    ascent_P *= highest_P > height_P
    step_P = steps.take(ascent_P)
    numbers_P = np.arange(len(pixels_P))
    number_N = np.zeros(len(height_N), np.int32)
    number_N[pixels_P] = numbers_P
    top_P = _roots(number_N.take(pixels_P + step_P).astype(np.intp))
    is_maximum = top_P == numbers_P
    basin_P = np.cumsum(is_maximum)[top_P]
    return basin_P, np.append(np.float32(-np.inf), height_P[is_maximum])


def _roots(parent: np.ndarray) -> np.ndarray:
    """The root above each element, by pointer jumping: each round doubles the length of a jump."""
    further = np.empty_like(parent)
    while True:
        # "clip" spares the check of the bounds: no parent lies outside.
        np.take(parent, parent, out=further, mode="clip")
        if np.array_equal(parent, further):
            return parent
        parent, further = further, parent


def _saddles(
    basin_P: np.ndarray, height_N: np.ndarray, pixels_P: np.ndarray, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where basins touch: basin, neighbour and height there, (S,) each; every place both ways."""
    basin_N = np.zeros(len(height_N), np.int32)
    basin_N[pixels_P] = basin_P
    places = []
    for step in (1, row):
        neighbour_P = basin_N.take(pixels_P + step)
        touch = np.flatnonzero((neighbour_P != basin_P) & (neighbour_P > 0))
        basin, neighbour = basin_P[touch], neighbour_P[touch]
        pixels = pixels_P[touch]
        height = np.minimum(height_N[pixels], height_N[pixels + step])
        places += [(basin, neighbour, height), (neighbour, basin, height)]
    return tuple(np.concatenate(values) for values in zip(*places))


def _seeds(
    peak_K: np.ndarray,
    basin_S: np.ndarray,
    neighbour_S: np.ndarray,
    height_S: np.ndarray,
    rise: float,
) -> np.ndarray:
    """The seed of each basin (K,): basins of one seed are one nucleus, and seed 0 is background.

    In each round, every basin whose maximum rises less than `rise` above its highest saddle joins
    the basin beyond it. The joined basins have the highest of their maxima, and other saddles.
    Two basins may join each other, so that a round needs connected components.
    """
    seed_K = np.arange(len(peak_K))
    while True:
        numbers = np.arange(len(peak_K))
        highest = np.full(len(peak_K), -np.inf, peak_K.dtype)
        np.maximum.at(highest, basin_S, height_S)
        is_highest = height_S == highest[basin_S]
        shallow = np.flatnonzero(is_highest & (peak_K[basin_S] - height_S < rise))
        if not shallow.size:
            return seed_K
        joins = numbers.copy()
        joins[basin_S[shallow]] = neighbour_S[shallow]  # the last of a tie
        graph = scipy.sparse.coo_array(
            (np.ones(len(joins)), (numbers, joins)), shape=(len(joins), len(joins))
        )
        # Basin 0 has no saddles: it stays alone, and its component is the first, 0.
        count, joined = scipy.sparse.csgraph.connected_components(graph, directed=False)
        peaks = np.full(count, -np.inf, peak_K.dtype)
        np.maximum.at(peaks, joined, peak_K)
        peak_K, seed_K = peaks, joined[seed_K]
        basin_S, neighbour_S = joined[basin_S], joined[neighbour_S]
        apart = basin_S != neighbour_S
        basin_S, neighbour_S, height_S = basin_S[apart], neighbour_S[apart], height_S[apart]


def _numbered(ids_P: np.ndarray, foreground_P: np.ndarray, config: Instances) -> np.ndarray:
    """Ids 1.. in the order of their first pixels, int32 (P,); 0 for background.

    Nuclei under `config.area` px, or of a lower mean foreground than `config.confidence`, become 0.
    """
    size = np.bincount(ids_P, minlength=1)
    total = np.bincount(ids_P, foreground_P, minlength=1)
    first = np.zeros(len(size), np.int64)
    first[ids_P[::-1]] = np.arange(len(ids_P))[::-1]  # of several values the last one stays
    keep = (size >= max(config.area, 1)) & (total >= config.confidence * size)
    keep[0] = False
    kept = np.flatnonzero(keep)
    number = np.zeros(len(size), np.int32)
    number[kept[np.argsort(first[kept])]] = np.arange(1, len(kept) + 1)
    return number[ids_P]


def from_foreground(
    foreground_HW: np.ndarray,
    config: Instances,
    depth_HW: np.ndarray | None = None,
    *,
    sigma: float = 2.0,
    reach: int = 5,
) -> np.ndarray:
    """Nuclei by watershed from the local maxima of a smoothed depth.

    Args:
        foreground_HW: probability of nucleus, float, 0..1.
        config: the section `instances` of the configuration.
        depth_HW: any map of depth, float; None takes the distance to the background, px.
        sigma: of the Gaussian that smooths the depth, px.
        reach: a seed is the highest pixel this far in rows and columns, px.

    Returns:
        As `from_depth`.
    """
    nucleus = foreground_HW > config.foreground
    depth = scipy.ndimage.distance_transform_edt(nucleus) if depth_HW is None else depth_HW
    depth = scipy.ndimage.gaussian_filter(depth, sigma)
    is_peak = (depth == scipy.ndimage.maximum_filter(depth, 2 * reach + 1)) & nucleus
    seeds, _ = scipy.ndimage.label(is_peak, np.ones((3, 3), bool))
    labels = skimage.segmentation.watershed(-depth, seeds, mask=nucleus)
    return whole(labels, foreground_HW, config)


def whole(labels_HW: np.ndarray, foreground_HW: np.ndarray, config: Instances) -> np.ndarray:
    """The largest 4-connected piece of each nucleus, the last one of a tie.

    Args:
        labels_HW: nucleus ids, int, 0 = background.
        foreground_HW: probability of nucleus, float, 0..1.
        config: the section `instances` of the configuration; its limits hold for the piece.

    Returns:
        As `from_depth`.
    """
    pieces, count = skimage.measure.label(labels_HW, connectivity=1, return_num=True)
    size = np.bincount(pieces.ravel(), minlength=count + 1)
    owner = np.zeros(count + 1, np.int64)
    owner[pieces] = labels_HW
    largest = np.zeros(owner.max() + 1, np.int64)
    by_size = np.argsort(size, kind="stable")
    largest[owner[by_size]] = by_size  # of several values the last one stays, the largest piece
    numbers = np.arange(count + 1)
    ids = np.where(largest[owner] == numbers, numbers, 0)[pieces]
    labels = _numbered(ids.ravel(), foreground_HW.ravel(), config)
    return labels.reshape(labels_HW.shape)
