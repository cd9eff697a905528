"""Which nuclei of two label maps overlap, and by how many pixels, without a loop over nuclei.

A map in raster order is a sequence of runs over which both labels are constant. There are far fewer
runs than pixels. SciPy sums their lengths into a sparse table of the pairs that share pixels.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_ID = 2**21  # larger ids are numbered: areas are counted for each id up to the largest


@dataclass(frozen=True)
class Overlaps:
    """Areas of n truths and m predictions, and the k pairs of them that share pixels.

    Objects come in ascending order of their ids, pairs in ascending order of (t, p).
    """

    truth_ids: np.ndarray  # (n,)
    truth_area: np.ndarray  # (n,) px
    pred_ids: np.ndarray  # (m,)
    pred_area: np.ndarray  # (m,) px
    t: np.ndarray  # (k,) index into truths
    p: np.ndarray  # (k,) index into predictions
    inter: np.ndarray  # (k,) px

    @cached_property
    def union(self) -> np.ndarray:
        """(k,) px."""
        return self.truth_area[self.t] + self.pred_area[self.p] - self.inter

    @cached_property
    def iou(self) -> np.ndarray:
        """(k,) above 0, at most 1."""
        return self.inter / self.union

    @cached_property
    def splits(self) -> np.ndarray:
        """The pairs in which a truth holds most of each of two or more predictions."""
        return _repeated(self.t, 2 * self.inter > self.pred_area[self.p])

    @cached_property
    def merges(self) -> np.ndarray:
        """The pairs in which a prediction holds most of each of two or more truths."""
        return _repeated(self.p, 2 * self.inter > self.truth_area[self.t])


def overlaps(truth: np.ndarray, pred: np.ndarray, min_area: int = 0) -> Overlaps:
    """The overlaps of two maps of one shape.

    Args:
        truth: (H, W) bool or ids >= 0, 0 = background.
        pred: the same.
        min_area: px; smaller predictions count as background.
    """
    from scipy.sparse import coo_array  # takes a moment to load

    truth, pred = truth.ravel(), pred.ravel()
    start = _starts_of_runs(truth, pred)
    length = np.diff(start, append=truth.size)
    truth_ids, truth_area, t = _objects(truth[start], length, 1)
    pred_ids, pred_area, p = _objects(pred[start], length, max(1, min_area))
    both = np.flatnonzero((t >= 0) & (p >= 0))
    # the conversion sums the runs of each pair, and sorts the pairs
    shape = len(truth_ids), len(pred_ids)
    pairs = coo_array((length[both], (t[both], p[both])), shape).tocsr().tocoo()
    return Overlaps(truth_ids, truth_area, pred_ids, pred_area, *pairs.coords, pairs.data)


def _starts_of_runs(truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Indices at which one of two arrays changes; the first index is one."""
    words = np.zeros(-(-len(truth) // 8), np.uint64)
    changes = words.view(bool)[: len(truth)]
    changes[:1] = True
    np.not_equal(truth[1:], truth[:-1], out=changes[1:])
    changes[1:] |= pred[1:] != pred[:-1]
    # Eight bytes at a time first: NumPy is slow for each true value of a sparse mask.
    found = np.flatnonzero(words != 0)
    bits = np.flatnonzero(words[found].view(bool))
    return (found[bits >> 3] << 3) + (bits & 7)


def _objects(
    ids: np.ndarray, length: np.ndarray, min_area: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and areas of the objects of one map, and the object of each run or -1.

    Background is no object, nor is what has under `min_area` px.
    """
    if ids.max(initial=0) > MAX_ID:
        known, row = np.unique(np.append(ids.dtype.type(0), ids), return_inverse=True)
        known, row = known.astype(np.int64), row[1:]
    else:
        row = ids.astype(np.intp)
        known = np.arange(row.max(initial=0) + 1)
    area = np.zeros(len(known), np.int64)
    np.add.at(area, row, length)
    real = area >= min_area
    real[0] = False
    return known[real], area[real], np.where(real, np.cumsum(real) - 1, -1)[row]


def _repeated(group: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Indices of the chosen pairs whose group has another chosen pair."""
    pairs = np.flatnonzero(chosen)
    return pairs[np.bincount(group[pairs])[group[pairs]] > 1]
