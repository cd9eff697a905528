"""Checks that a label map holds instances; areas of nuclei, and the components of a mask."""

from collections.abc import Sequence

import numpy as np

FEWEST = 10  # least nuclei for a median area, or for a certainty
CLASSES = 32  # a map of more values is no map of classes
LARGEST = (255, 65535)  # values at which a map of 8 or 16 bits is clipped
SAMPLE = np.s_[::8, ::8]  # pixels that show the many values of most maps of instances


def areas(label: np.ndarray) -> np.ndarray:
    """Areas of the nuclei of a label map (H, W), px, in the order of their ids without gaps."""
    counts = np.bincount(label.ravel())[1:]
    return counts[counts > 0]


def median_area(labels: Sequence[np.ndarray]) -> float:
    """Median area of the nuclei of some label maps (H, W), px; 0 where they are too few to tell."""
    every = np.concatenate([np.zeros(0), *map(areas, labels)])
    return float(np.median(every)) if len(every) >= FEWEST else 0.0


def not_instances(label: np.ndarray, high: int | None = None) -> str:
    """What a label map seems to be instead of a map of instances; "" where it looks like one.

    Many separate (8-connected) components that share few values make a binary mask, a map of
    classes, or a map that was clipped at the largest value of its type. A nucleus may be in pieces,
    so a map of a few nuclei passes if it has about two components for each.

    Args:
        label: (H, W) integers from 0 or bool, 0 = background.
        high: its largest value, where it is known.
    """
    high = int(label.max(initial=0)) if high is None else high
    if high == 0 or high > max(LARGEST):
        return ""
    values = _values(label[SAMPLE])
    if values <= CLASSES:
        values = _values(label)
    if values <= CLASSES:
        count = _count(label > 0)
        if values == 1 and count > 1:
            return f"a binary mask: {count} separate components share the value {high}"
        if count > 2 * values and count >= values + 4:
            return f"a map of classes: {count} separate components share {values} values"
    if high in LARGEST and values > CLASSES:
        count = _count(label == high)
        if count > 2:
            return f"a clipped map: {count} separate components share its largest value, {high}"
    return ""


def _values(label: np.ndarray) -> int:
    """How many values a map has beside 0."""
    return np.count_nonzero(np.bincount(label.ravel().astype(np.int64))[1:])


def components(label: np.ndarray) -> np.ndarray:
    """Ids 1..n of the 4-connected components of each value of a label map (H, W); 0 stays 0."""
    from skimage import measure

    return measure.label(label, background=0, connectivity=1)


def _count(mask: np.ndarray) -> int:
    from scipy import ndimage  # 0.3 s, and few maps need it

    return ndimage.label(mask, np.ones((3, 3)))[1]
