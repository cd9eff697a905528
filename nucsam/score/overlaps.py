"""Which nuclei of two label maps overlap, and by how many pixels, without a loop over nuclei.

A map in raster order is a sequence of runs over which both labels are constant. There are far fewer
runs than pixels. SciPy sums their lengths into a sparse table of the pairs that share pixels.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_ID = 2**21  # larger ids are numbered: the table has a row for each id up to the largest


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
    begins = np.ones(truth.size, bool)
    begins[1:] = (truth[1:] != truth[:-1]) | (pred[1:] != pred[:-1])
    start = np.flatnonzero(begins)
    truth_ids, t = _rows(truth[start])
    pred_ids, p = _rows(pred[start])
    length = np.diff(start, append=truth.size)
    # the conversion sums the runs of each pair, and sorts the pairs
    table = coo_array((length, (t, p)), shape=(len(truth_ids), len(pred_ids))).tocsr()
    truth_ids, truth_area, t_of_row = _objects(truth_ids, table.sum(axis=1), 1)
    pred_ids, pred_area, p_of_column = _objects(pred_ids, table.sum(axis=0), max(1, min_area))
    pairs = table.tocoo()
    t, p = t_of_row[pairs.row], p_of_column[pairs.col]
    both = (t >= 0) & (p >= 0)
    return Overlaps(truth_ids, truth_area, pred_ids, pred_area, t[both], p[both], pairs.data[both])


def _rows(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The id of each row of the table, 0 first, and the row of each of the given ids."""
    highest = int(ids.max(initial=0))
    if highest <= MAX_ID:
        return np.arange(highest + 1), ids
    known, row = np.unique(np.append(ids.dtype.type(0), ids), return_inverse=True)
    return known.astype(np.int64), row[1:]


def _objects(
    ids: np.ndarray, area: np.ndarray, min_area: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and areas of the objects among the rows, and each row's object or -1.

    Background, which is row 0, is no object, nor is what has under `min_area` px.
    """
    real = area >= min_area
    real[0] = False
    return ids[real], area[real], np.where(real, np.cumsum(real) - 1, -1)


def _repeated(group: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Indices of the chosen pairs whose group has another chosen pair."""
    pairs = np.flatnonzero(chosen)
    return pairs[np.bincount(group[pairs])[group[pairs]] > 1]
