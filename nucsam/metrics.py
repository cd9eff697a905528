"""Nuclei metrics: Dice, Dice2, AJI, AJI+, DQ, SQ, PQ, F1 and AP, all from one sparse table of overlaps.

    truth, pred (H, W) int --_overlap--> areas, and the pairs that share pixels --_counts--> Score, raw counts

`Score` keeps counts, not ratios, so pooling over images is a sum (`pool`). Nothing here loops over nuclei or
pixels, and no matrix of truths x predictions is ever built.

Three different quantities are called AJI in public code. `aji` is Kumar's (a prediction may serve several
nuclei), `aji_plus` HoVer-Net's one-to-one form; cellpose's is neither and is not computed here.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

OUTCOMES = ("matched", "missed", "false", "split", "merged")
METRICS = ("dice", "dice2", "aji", "aji_plus", "dq", "sq", "pq", "precision", "recall", "f1", "map")

_BITS = 21  # truth id, prediction id and run length share the 63 bits of a non-negative int64
_BLOCK = 1 << 20  # pixels, so that no run is longer than 21 bits can say


@dataclass(frozen=True)
class Protocol:
    """Every rule of one way to score; `dataclasses.replace` makes variants."""

    name: str
    iou: float = 0.5  # threshold of DQ, SQ, PQ, precision, recall and F1, 0 to 1
    strict: bool = True  # IoU > iou (Kirillov, HoVer-Net); False: IoU >= iou (StarDist, elf, cellpose)
    min_area: int = 0  # px; smaller predicted objects are removed before anything else
    vague: Literal["ignore", "background", "drop"] = "ignore"  # drop: NucEval's rule, then background
    vague_overlap: float = 0.25  # "drop" removes objects with more than this part of their area vague
    zone_width: int = 0  # px; pixels this near to a truth boundary become background in both maps
    empty: Literal["nan", "zero", "one"] = "nan"  # metrics where both maps are empty; "zero": but Dice 1
    without_vague: str = ""  # the protocol to show beside this one where vague areas are known

    def __post_init__(self) -> None:
        if not 0 <= self.iou <= 1 or min(self.min_area, self.zone_width, self.vague_overlap) < 0:
            raise ValueError(f"{self}: expected iou from 0 to 1, and no negative area, width or overlap")

    @property
    def rules(self) -> str:
        """Name and rules in one line, for captions."""
        empty = {"nan": "left out", "zero": "Dice 1, the others 0", "one": "1"}[self.empty]
        rules = {
            f"match at IoU {'>' if self.strict else '>='} {self.iou:g}": True,
            f"predictions under {self.min_area} px removed": self.min_area,
            f"objects over {self.vague_overlap:.0%} in vague areas dropped": self.vague == "drop",
            "vague pixels to background": self.vague != "ignore",
            f"{self.zone_width} px on both sides of truth boundaries ignored": self.zone_width,
            f"both maps empty: {empty}": True,
        }
        return f"{self.name}: " + ", ".join(rule for rule, holds in rules.items() if holds)


_PROTOCOLS = (
    # Mahbod et al. 2024, NuInsSeg's paper and code: the numbers that everyone compares
    Protocol("nuinsseg", min_area=50, empty="zero", without_vague="nuinsseg-no-vague"),
    Protocol("nuinsseg-no-vague", min_area=50, empty="zero", vague="background"),
    Protocol("nuceval", vague="drop", zone_width=2, empty="one"),  # NucEval, arXiv 2605.03144
    Protocol("plain"),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}


def protocol_named(name: str) -> Protocol:
    """The protocol called `name`; ValueError with the known names for any other."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: found {name!r}, expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


_ARRAY = {"default_factory": lambda: np.zeros(0, np.int64), "compare": False, "repr": False}


@dataclass(frozen=True)
class Score:
    """Raw counts of one pair of maps, or of many pooled; the metrics are properties, 0 to 1.

    Where both maps are empty each metric is what `protocol.empty` says; elsewhere 0 / 0 is 0.
    """

    protocol: Protocol
    tp: int = 0  # matched pairs, false positives and false negatives at protocol.iou
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0  # over the matched pairs
    inter: int = 0  # px, foreground in both maps: over all overlapping pairs too
    total: int = 0  # px, both foregrounds
    dice2_total: int = 0  # px, both objects of each overlapping pair
    aji_inter: int = 0  # px
    aji_union: int = 0
    aji_plus_inter: int = 0
    splits: int = 0  # truths that hold most (over half) of each of two or more predictions
    merges: int = 0  # predictions that hold most of each of two or more truths
    ap_tp: tuple[int, ...] = (0,) * 10  # matches at IoU >= 0.5, 0.55, ... 0.95
    pairs: np.ndarray = field(**_ARRAY)  # (tp, 2) matched ids, truth and prediction
    pair_iou: np.ndarray = field(**_ARRAY)  # (tp,)
    missed: np.ndarray = field(**_ARRAY)  # (fn,) truth ids
    spurious: np.ndarray = field(**_ARRAY)  # (fp,) prediction ids
    split_pairs: np.ndarray = field(**_ARRAY)  # (n, 2) ids: each split truth with the predictions it holds most of
    merged_pairs: np.ndarray = field(**_ARRAY)  # (n, 2) ids: each merging prediction with the truths it holds most of

    @property
    def n_truth(self) -> int:
        return self.tp + self.fn

    @property
    def n_pred(self) -> int:
        return self.tp + self.fp

    @property
    def both_empty(self) -> bool:
        return self.total == 0

    def _ratio(self, numerator: float, denominator: float, zero: float = 0.0) -> float:
        if self.both_empty:
            return {"nan": math.nan, "zero": zero, "one": 1.0}[self.protocol.empty]
        return numerator / denominator if denominator else 0.0

    @property
    def dice(self) -> float:
        """Dice of the foregrounds (HoVer-Net's Dice 1)."""
        return self._ratio(2 * self.inter, self.total, zero=1.0)

    @property
    def dice2(self) -> float:
        """Ensemble Dice over overlapping pairs (CPM challenges; HoVer-Net's Dice 2)."""
        return self._ratio(2 * self.inter, self.dice2_total)

    @property
    def aji(self) -> float:
        """Aggregated Jaccard index (Kumar et al. 2017, HoVer-Net's `get_fast_aji`): reuses predictions."""
        return self._ratio(self.aji_inter, self.aji_union)

    @property
    def aji_plus(self) -> float:
        """AJI+ (Graham et al. 2019): one-to-one pairing with the largest summed IoU."""
        return self._ratio(self.aji_plus_inter, self.total - self.aji_plus_inter)

    @property
    def dq(self) -> float:
        """Detection quality (Kirillov et al. 2019), which is F1."""
        return self._ratio(2 * self.tp, self.n_truth + self.n_pred)

    f1 = dq

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matched pairs, 0 without any."""
        return self._ratio(self.iou_sum, self.tp)

    @property
    def pq(self) -> float:
        """Panoptic quality, DQ x SQ."""
        return self._ratio(2 * self.iou_sum, self.n_truth + self.n_pred)

    @property
    def precision(self) -> float:
        return self._ratio(self.tp, self.n_pred)

    @property
    def recall(self) -> float:
        return self._ratio(self.tp, self.n_truth)

    @property
    def ap(self) -> tuple[float, ...]:
        """tp / (tp + fp + fn), matched at IoU >= 0.5, 0.55, ... 0.95 (Data Science Bowl 2018)."""
        return tuple(self._ratio(tp, self.n_truth + self.n_pred - tp) for tp in self.ap_tp)

    @property
    def map(self) -> float:
        """Mean of `ap` (micro-sam's mSA)."""
        return sum(self.ap) / len(self.ap)

    def outcomes(self) -> tuple[dict[int, str], dict[int, str]]:
        """What became of each true and each predicted object: id -> one of OUTCOMES.

        A truth is "split" where it holds most (over half of the pixels) of each of two or more predictions, which
        are "split" too. A prediction is "merged" where it holds most of each of two or more truths, which are
        "merged" too. Else those paired at the protocol's IoU are "matched", a truth without a pair is "missed", a
        prediction without one "false". A split or merged object may be paired as well; where an object is both,
        a truth counts as split and a prediction as merged: `splits` truths and `merges` predictions.
        """
        truth, pred = dict.fromkeys(self.missed.tolist(), "missed"), dict.fromkeys(self.spurious.tolist(), "false")
        for pairs, name in ((self.pairs, "matched"), (self.merged_pairs, "merged"), (self.split_pairs, "split")):
            truth |= dict.fromkeys(pairs.reshape(-1, 2)[:, 0].tolist(), name)
        for pairs, name in ((self.pairs, "matched"), (self.split_pairs, "split"), (self.merged_pairs, "merged")):
            pred |= dict.fromkeys(pairs.reshape(-1, 2)[:, 1].tolist(), name)
        return truth, pred

    def as_dict(self) -> dict:
        """Metrics (NaN where undefined), `ap`, numbers of objects, and the raw counts under `counts`."""
        names = (*METRICS, "ap", "n_truth", "n_pred", "both_empty")
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {name: getattr(self, name) for name in names} | {"counts": counts}


_COUNTS = tuple(f.name for f in fields(Score) if f.compare and f.name != "protocol")


def pool(scores: Iterable[Score], protocol: Protocol) -> Score:
    """One Score over all images, counts summed: its PQ is CoNIC's mPQ+ and Kirillov's. Pairs are not kept."""
    scores = list(scores)
    counts = {name: sum(getattr(s, name) for s in scores) for name in _COUNTS if name != "ap_tp"}
    return Score(protocol, **counts, ap_tp=tuple(sum(s.ap_tp[k] for s in scores) for k in range(10)))


def score(
    truth: np.ndarray,
    pred: np.ndarray,
    *,
    vague: np.ndarray | None = None,
    protocol: str | Protocol = "nuinsseg",
    connected: bool = False,
) -> Score:
    """Score one label map against another.

    truth, pred: (H, W), any integer dtype, 0 = background, any ids, gaps allowed.
    vague: (H, W), nonzero where annotators were unsure. "nuinsseg" and "plain" pay it no heed;
        "nuinsseg-no-vague" (`protocol.without_vague`) is NuInsSeg's second variant.
    connected: label the 4-connected components of a map that is a 0/1, 0/255 or bool mask. Without it a mask
        with several components is scored as the one object that it is, with a UserWarning.

    Raises ValueError for maps that are not 2-D integer, hold negative ids, or differ in shape.
    """
    rules = protocol_named(protocol) if isinstance(protocol, str) else protocol
    truth, truth_ids = _label_map(truth, "truth", connected)
    pred, pred_ids = _label_map(pred, "prediction", connected)
    known = vague is not None and rules.vague != "ignore"
    vague = np.asarray(vague) != 0 if known else np.zeros(truth.shape, bool)
    if not truth.shape == pred.shape == vague.shape:
        shapes = f"truth {truth.shape}, prediction {pred.shape}" + (f", vague areas {vague.shape}" if known else "")
        raise ValueError(f"found different shapes: {shapes}")
    min_area = rules.min_area
    if known or rules.zone_width:
        part = rules.vague_overlap if rules.vague == "drop" else math.inf
        truth = _without_vague(truth, vague, part, 0)
        pred = _without_vague(pred, vague, part, min_area)
        zone = _zone(truth, rules.zone_width)
        truth, pred = np.where(zone, 0, truth), np.where(zone, 0, pred)
        min_area = 0  # what is left of a large enough object stays
    return _counts(_overlap(truth, pred, min_area), rules, truth_ids, pred_ids)


def dice(truth: np.ndarray, pred: np.ndarray) -> float:
    """Dice of the foregrounds alone, of maps or masks of one shape, any dtype; NaN where both are empty."""
    truth, pred = np.asarray(truth) != 0, np.asarray(pred) != 0
    total = np.count_nonzero(truth) + np.count_nonzero(pred)
    truth &= pred  # a copy already: no third map of a large image
    return 2 * np.count_nonzero(truth) / total if total else math.nan


def _label_map(labels: np.ndarray, what: str, connected: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """A C-contiguous map with ids below 2**21, and the original ids, or None where they are the same."""
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise ValueError(f"{what}: found shape {labels.shape}, expected a 2-D label map (H, W)")
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{what}: found dtype {labels.dtype}, expected integer ids")
    labels = np.ascontiguousarray(labels.astype(np.uint8) if labels.dtype == bool else labels)
    # seen as unsigned, a negative id is a large one: one pass finds both
    top = int(labels.view(labels.dtype.str.replace("i", "u")).max(initial=0))
    if top > min(np.iinfo(labels.dtype).max, np.iinfo(np.int64).max):
        raise ValueError(f"{what}: found ids from {labels.min()} to {labels.max()}, expected 0 to 2**63 - 1")
    if top in (1, 255) and np.count_nonzero(labels) == np.count_nonzero(labels == top):
        from scipy import ndimage  # 0.3 s, and only masks need it

        components, n = ndimage.label(labels > 0)
        if connected:
            return components, None
        if n > 1:
            warnings.warn(
                f"{what} is a 0/{top} mask with {n} connected components, scored as ONE object: "
                "label its components first (connected=True, --connected)",
                stacklevel=3,
            )
    if top < 1 << _BITS:
        return labels, None
    # the 0 put in front makes background index 0, whether the map has any or not
    ids, index = np.unique(np.concatenate([np.zeros(1, labels.dtype), labels.ravel()]), return_inverse=True)
    if len(ids) > 1 << _BITS:
        raise ValueError(f"{what}: found {len(ids) - 1} ids, expected fewer than {1 << _BITS}")
    return index[1:].reshape(labels.shape), ids.astype(np.int64)


class _Table(NamedTuple):
    """Areas of n truths and m predictions, by ascending id, and the k pairs that share pixels, by (t, p)."""

    truth_ids: np.ndarray  # (n,)
    truth_area: np.ndarray  # (n,) px
    pred_ids: np.ndarray  # (m,)
    pred_area: np.ndarray  # (m,)
    t: np.ndarray  # (k,) index into truths
    p: np.ndarray  # (k,) index into predictions
    inter: np.ndarray  # (k,) px


def _starts(values: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Indices at which a run of equal values begins, or of any of several arrays."""
    n = len(values)
    changes = np.zeros(-(-n // 8) * 8, bool)
    changes[:1] = n > 0
    np.not_equal(values[1:], values[:-1], out=changes[1:n])
    for other in others:
        changes[1:n] |= other[1:] != other[:-1]
    # three times faster than np.flatnonzero(changes): first the eights that hold any, then the places in those
    eights = changes.view(np.uint64)
    some = np.flatnonzero(eights != 0)
    place = np.flatnonzero(eights[some].view(bool))
    return some[place >> 3] << 3 | place & 7


def _block_overlap(truth: np.ndarray, pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat parts of both maps -> keys (truth id << 21 | prediction id), ascending, and pixels of each.

    Works on raster runs over which both maps are constant: a few percent of the pixels. Key and length are
    sorted as one int64, which numpy does with SIMD; an argsort is ten times slower.
    """
    start = _starts(truth, pred)
    length = np.diff(start, append=len(truth))
    run, run_p = truth[start].astype(np.int64), pred[start].astype(np.int64)
    if 8 * len(start) > len(truth):  # noise rather than nuclei: where ids are few, counting beats sorting
        width = int(run_p.max()) + 1
        if (int(run.max()) + 1) * width <= len(start):
            count = np.bincount(run * width + run_p, weights=length).astype(np.int64)
            pair = np.flatnonzero(count)
            return pair // width << _BITS | pair % width, count[pair]
    for low in (run_p, length):
        run <<= _BITS
        run |= low
    run.sort()
    key = run >> _BITS
    first = _starts(key)
    return key[first], np.add.reduceat(run & ((1 << _BITS) - 1), first)


def _overlap(truth: np.ndarray, pred: np.ndarray, min_area: int = 0) -> _Table:
    """C-contiguous maps with ids below 2**21 -> their overlaps, without predictions under `min_area` px."""
    truth, pred = truth.ravel(), pred.ravel()
    blocks = [slice(at, at + _BLOCK) for at in range(0, max(truth.size, 1), _BLOCK)]
    parts = [_block_overlap(truth[block], pred[block]) for block in blocks]
    key, area = parts[0]
    if len(parts) > 1:
        key, area = map(np.concatenate, zip(*parts))
        order = np.argsort(key, kind="stable")  # a merge of sorted parts
        key, area = key[order], area[order]
        first = _starts(key)
        key, area = key[first], np.add.reduceat(area, first)
    t, p = key >> _BITS, key & ((1 << _BITS) - 1)
    first = _starts(t)
    truth_ids, truth_area = t[first], np.add.reduceat(area, first)
    real = truth_ids > 0
    pred_ids, p = np.unique(p, return_inverse=True)
    pred_area = np.bincount(p, area, len(pred_ids)).astype(np.int64)
    large = (pred_ids > 0) & (pred_area >= min_area)
    both = (t > 0) & large[p]
    t = np.searchsorted(truth_ids[real], t[both])
    p = (np.cumsum(large) - 1)[p[both]]
    return _Table(truth_ids[real], truth_area[real], pred_ids[large], pred_area[large], t, p, area[both])


def _without_vague(labels: np.ndarray, vague: np.ndarray, part: float, min_area: int) -> np.ndarray:
    """Objects under `min_area` px, or with over `part` of their area vague, go; then all vague pixels."""
    table = _overlap(labels, vague)
    in_vague = np.bincount(table.t, table.inter, len(table.truth_ids))
    gone = (table.truth_area < min_area) | (in_vague > part * table.truth_area)
    drop = np.zeros(int(labels.max(initial=0)) + 1, bool)
    drop[table.truth_ids[gone]] = True
    return np.where(vague | drop[labels], 0, labels)


def _zone(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels with another label within OpenCV's elliptic kernel of 2 `width` + 1 px.

    That is NucEval's union over nuclei of dilated minus eroded masks, without a loop over nuclei.
    """
    H, W = labels.shape
    zone = np.zeros((H, W), bool)
    for dy in range(min(width, H - 1) + 1):
        reach = min(round(math.sqrt(width**2 - dy**2)), W - 1)
        for dx in range(-reach if dy else 1, reach + 1):  # the other half of the kernel follows by symmetry
            here = np.s_[: H - dy, max(-dx, 0) : W - max(dx, 0)]
            there = np.s_[dy:, max(dx, 0) : W - max(-dx, 0)]
            differs = labels[here] != labels[there]
            zone[here] |= differs
            zone[there] |= differs
    return zone


def _counts(table: _Table, rules: Protocol, truth_ids: np.ndarray | None, pred_ids: np.ndarray | None) -> Score:
    """Every metric's counts from one table; truth_ids and pred_ids as `_label_map` gave them."""
    t, p, inter = table.t, table.p, table.inter
    total = table.truth_area[t] + table.pred_area[p]
    union = total - inter
    iou = inter / union

    contested = 2 * inter <= union  # above an IoU of 0.5 no two pairs compete for an object (Kirillov et al. 2019)
    threshold = Fraction(rules.iou).limit_denominator(1_000_000)
    above = inter * threshold.denominator - union * threshold.numerator  # exact, unlike iou - threshold
    matched = _match(t, p, iou, np.flatnonzero(above > 0 if rules.strict else above >= 0), contested)
    half = np.flatnonzero(2 * inter >= union)
    twentieths = 20 * inter[half] // union[half]
    missed = np.ones(len(table.truth_ids), bool)
    missed[t[matched]] = False
    spurious = np.ones(len(table.pred_ids), bool)
    spurious[p[matched]] = False

    best = _best_predictions(t, iou, union)
    single = [np.ones(len(ids), bool) for ids in (table.truth_ids, table.pred_ids)]
    single[0][t] = False
    single[1][p[best]] = False
    aji_union = union[best].sum() + table.truth_area[single[0]].sum() + table.pred_area[single[1]].sum()
    # equal sums of IoU are told apart by the larger intersection, as HoVer-Net's epsilon does
    one_to_one = _assign(t, p, iou + inter * (1e-11 / inter.max(initial=1)))

    truth_names = table.truth_ids if truth_ids is None else truth_ids[table.truth_ids]
    pred_names = table.pred_ids if pred_ids is None else pred_ids[table.pred_ids]

    def named(pairs: np.ndarray) -> np.ndarray:
        return np.stack([truth_names[t[pairs]], pred_names[p[pairs]]], 1)

    split = _repeated(t, np.flatnonzero(2 * inter > table.pred_area[p]))
    merged = _repeated(p, np.flatnonzero(2 * inter > table.truth_area[t]))
    return Score(
        rules,
        tp=len(matched),
        fp=int(spurious.sum()),
        fn=int(missed.sum()),
        iou_sum=float(iou[matched].sum()),
        inter=int(inter.sum()),
        total=int(table.truth_area.sum() + table.pred_area.sum()),
        dice2_total=int(total.sum()),
        aji_inter=int(inter[best].sum()),
        aji_union=int(aji_union),
        aji_plus_inter=int(inter[one_to_one].sum()),
        splits=len(np.unique(t[split])),
        merges=len(np.unique(p[merged])),
        ap_tp=(len(_match(t, p, iou, half, contested)), *(int((twentieths >= k).sum()) for k in range(11, 20))),
        pairs=named(matched),
        pair_iou=iou[matched],
        missed=truth_names[missed],
        spurious=pred_names[spurious],
        split_pairs=named(split),
        merged_pairs=named(merged),
    )


def _repeated(group: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Those of the pairs whose group has another of them."""
    return pairs[np.bincount(group[pairs])[group[pairs]] > 1]


def _best_predictions(t: np.ndarray, iou: np.ndarray, union: np.ndarray) -> np.ndarray:
    """For each truth its pair of highest IoU; of equals the larger union, then the lowest prediction id."""
    first = _starts(t)
    best = np.maximum.reduceat(iou, first)
    ties = np.flatnonzero(iou == np.repeat(best, np.diff(first, append=len(t))))
    if len(ties) > len(first):
        ties = ties[np.lexsort((ties, -union[ties], t[ties]))]
        ties = ties[_starts(t[ties])]
    return ties


def _match(t: np.ndarray, p: np.ndarray, iou: np.ndarray, pairs: np.ndarray, contested: np.ndarray) -> np.ndarray:
    """The most one-to-one matches among `pairs`, and of those the largest summed IoU (StarDist's rule)."""
    if not contested[pairs].any():
        return pairs
    return pairs[_assign(t[pairs], p[pairs], 1 + iou[pairs] / (len(pairs) + 1))]


def _best_rival(group: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each pair the highest weight of another pair of its group, 0 where it has none."""
    best, second = np.zeros((2, int(group.max()) + 1))
    np.maximum.at(best, group, weight)
    is_best = weight == best[group]
    np.maximum.at(second, group, np.where(is_best, 0, weight))
    unique = is_best & (np.bincount(group, is_best) == 1)[group]
    return np.where(unique, second[group], best[group])


def _assign(t: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Indices of one-to-one pairs with the largest summed weight (> 0); pairs are unique and in (t, p) order.

    A pair heavier than the best rival of its truth and the best rival of its prediction together is in every
    optimum: swapping it in never loses. What that leaves is solved as one sparse assignment problem.
    """
    chosen = []
    left = np.arange(len(t))
    while len(left):
        t_left, p_left, w_left = t[left], p[left], weight[left]
        sure = w_left > _best_rival(t_left, w_left) + _best_rival(p_left, w_left) + 1e-9  # exact ties stay
        if not sure.any():
            chosen.append(left[_solve(t_left, p_left, w_left)])
            break
        chosen.append(left[sure])
        free_t, free_p = np.ones(t_left.max() + 1, bool), np.ones(p_left.max() + 1, bool)
        free_t[t_left[sure]] = False
        free_p[p_left[sure]] = False
        left = left[free_t[t_left] & free_p[p_left]]
    return np.sort(np.concatenate(chosen)) if chosen else left


def _solve(t: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`_assign` by SciPy's sparse LAPJV; a private "no prediction" column for each truth makes all match."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, t = np.unique(t, return_inverse=True)
    columns, p = np.unique(p, return_inverse=True)
    n, m = len(rows), len(columns)
    own = np.arange(n)
    # SciPy 1.11 takes 32-bit indices only
    places = np.append(t, own).astype(np.intc), np.append(p, m + own).astype(np.intc)
    # 0 cannot be stored as an edge: 1 on every edge of n changes no optimum
    edges = np.append(1 + weight, np.ones(n)), places
    row, column = min_weight_full_bipartite_matching(csr_array(edges, shape=(n, m + n)), maximize=True)
    real = column < m
    return np.searchsorted(t * m + p, row[real] * m + column[real])
