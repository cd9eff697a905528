"""Scores of nuclei against the truth: Dice, Dice2, AJI, AJI+, DQ, SQ, PQ, precision, recall and AP.

    truth, pred (H, W) int --overlaps--> areas and overlapping pairs --one step a metric--> Score

Each step (`_matches`, `_aji`, ...) is arithmetic on the k overlapping pairs of one sparse table. A
`Score` keeps counts, not ratios, so pooling images is a sum (`pool`).

Public code calls three quantities AJI. `aji` is Kumar's, in which a prediction may serve several
nuclei. `aji_plus` is HoVer-Net's one-to-one form. Cellpose's is neither and is not computed here.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from nucsam.data.labels import components, not_instances
from nucsam.errors import UserError
from nucsam.score.assignment import assign
from nucsam.score.overlaps import Overlaps, overlaps

METRICS = ("dice", "dice2", "aji", "aji_plus", "dq", "sq", "pq", "precision", "recall", "f1", "map")

OUTCOMES = ("matched", "missed", "false", "split", "merged")


@dataclass(frozen=True)
class Protocol:
    """Every rule of one way to score; `dataclasses.replace` makes variants.

    Args:
        name: for captions.
        iou: threshold of DQ, SQ, PQ, precision, recall and F1, 0..1.
        strict: True matches at IoU > iou (Kirillov, HoVer-Net), False at IoU >= iou (StarDist, elf,
            cellpose).
        min_area: px; smaller predictions are removed before anything else.
        vague: "ignore" takes no notice of vague areas. "background" sets their pixels to background
            in both maps. "drop" first removes objects that lie in them (NucEval's rule).
        vague_overlap: "drop" removes objects with over this fraction of their area vague, 0..1.
        zone_width: px; pixels this close to a truth's boundary become background in both maps.
        empty: the metrics where both maps are empty; "zero" makes Dice 1 and the others 0.
        without_vague: name of the protocol to show as well where vague areas are known.

    Raises:
        UserError: a number is out of range.
    """

    name: str
    iou: float = 0.5
    strict: bool = True
    min_area: int = 0
    vague: Literal["ignore", "background", "drop"] = "ignore"
    vague_overlap: float = 0.25
    zone_width: int = 0
    empty: Literal["nan", "zero", "one"] = "nan"
    without_vague: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.iou <= 1:
            raise UserError(f"iou: found {self.iou:g}, expected 0 to 1")
        for name in ("min_area", "zone_width", "vague_overlap"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: found {getattr(self, name):g}, expected at least 0")

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
    # Mahbod et al. 2024, the paper and code of NuInsSeg: the numbers that everyone compares
    Protocol("nuinsseg", min_area=50, empty="zero", without_vague="nuinsseg-no-vague"),
    Protocol("nuinsseg-no-vague", min_area=50, empty="zero", vague="background"),
    Protocol("nuceval", vague="drop", zone_width=2, empty="one"),  # NucEval, arXiv 2605.03144
    Protocol("plain"),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _PROTOCOLS}


def protocol_named(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
        UserError: there is none; names those that there are.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol: found {name!r}, expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Score:
    """Raw counts of one pair of maps, or of many pooled; the metrics are properties, 0..1.

    Where both maps are empty each metric is what `protocol.empty` says; elsewhere 0 / 0 is 0.
    """

    protocol: Protocol
    tp: int = 0  # matched pairs at protocol.iou
    fp: int = 0  # predictions without a match
    fn: int = 0  # truths without a match
    iou_sum: float = 0.0  # over the matched pairs
    inter: int = 0  # px that are foreground in both maps, which is the sum over overlapping pairs
    total: int = 0  # px, foreground of the truth plus foreground of the prediction
    dice2_total: int = 0  # px, areas of both objects, over overlapping pairs
    aji_inter: int = 0  # px
    aji_union: int = 0  # px
    aji_plus_inter: int = 0  # px
    splits: int = 0  # truths that hold most (over half) of each of two or more predictions
    merges: int = 0  # predictions that hold most of each of two or more truths
    ap_tp: tuple[int, ...] = (0,) * 10  # matches at IoU >= 0.5, 0.55, ... 0.95
    # of one image, for `outcomes`
    table: Overlaps | None = field(default=None, compare=False, repr=False)

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
        """Aggregated Jaccard index (Kumar et al. 2017; HoVer-Net's `get_fast_aji`)."""
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
        """tp / (tp + fp + fn) at IoU >= 0.5, 0.55, ... 0.95 (Data Science Bowl 2018)."""
        return tuple(self._ratio(tp, self.n_truth + self.n_pred - tp) for tp in self.ap_tp)

    @property
    def map(self) -> float:
        """Mean of `ap` (micro-sam's mSA)."""
        return sum(self.ap) / len(self.ap)

    def outcomes(self) -> tuple[dict[int, str], dict[int, str]]:
        """What became of each true and each predicted object of one image.

        A truth that holds most of each of two or more predictions is "split", and so are they.
        A prediction that holds most of each of two or more truths is "merged", and so are they.
        Where both hold, a truth counts as split and a prediction as merged. Of the others, a pair
        is "matched", a truth without a pair "missed" and a prediction without one "false".

        Returns:
            Truth id -> one of OUTCOMES, and prediction id -> one of OUTCOMES.
        """
        table = self.table
        matched = _matches(table, self.protocol)
        pairs = {"matched": matched, "merged": table.merges, "split": table.splits}
        truth = dict.fromkeys(table.truth_ids.tolist(), "missed")
        for name in ("matched", "merged", "split"):  # the later one wins
            truth |= dict.fromkeys(table.truth_ids[table.t[pairs[name]]].tolist(), name)
        pred = dict.fromkeys(table.pred_ids.tolist(), "false")
        for name in ("matched", "split", "merged"):
            pred |= dict.fromkeys(table.pred_ids[table.p[pairs[name]]].tolist(), name)
        return truth, pred

    def as_dict(self) -> dict[str, Any]:
        """Metrics (NaN where undefined), `ap`, numbers of objects, and raw counts as `counts`."""
        names = (*METRICS, "ap", "n_truth", "n_pred", "both_empty")
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {name: getattr(self, name) for name in names} | {"counts": counts}


_COUNTS = tuple(f.name for f in fields(Score) if f.compare and f.name != "protocol")


def pool(counts: Sequence[Mapping[str, Any]], protocol: Protocol) -> Score:
    """The summed `counts` of all images as one Score: its PQ is CoNIC's mPQ+ and Kirillov's."""
    total = {name: sum(row[name] for row in counts) for name in _COUNTS if name != "ap_tp"}
    ap_tp = tuple(sum(row["ap_tp"][k] for row in counts) for k in range(10))
    return Score(protocol, **total, ap_tp=ap_tp)


def score_maps(
    truth: np.ndarray,
    pred: np.ndarray,
    *,
    vague: np.ndarray | None = None,
    protocol: str | Protocol = "nuinsseg",
    connected: bool = False,
) -> Score:
    """Score one label map against another.

    Args:
        truth: (H, W), any integer dtype, 0 = background, any ids, gaps allowed.
        pred: the same.
        vague: (H, W), nonzero where annotators were unsure. "nuinsseg" and "plain" ignore it.
        protocol: the rules, or their name in PROTOCOLS.
        connected: each 4-connected component of one value is an object, in both maps. Otherwise a
            UserWarning says where a map seems to be a mask or a map of classes.

    Raises:
        UserError: a map is not 2-D integer, has negative ids, or differs in shape.
    """
    rules = protocol_named(protocol) if isinstance(protocol, str) else protocol
    truth = _label_map(truth, "truth", connected)
    pred = _label_map(pred, "prediction", connected)
    shapes = {"truth": truth.shape, "prediction": pred.shape}
    if rules.vague == "ignore":
        vague = None
    if vague is not None:
        vague = np.asarray(vague) != 0
        shapes["vague areas"] = vague.shape
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"found different shapes: {found}")
    min_area = rules.min_area
    if truth.size and (vague is not None or rules.zone_width):
        truth, pred = _cleaned(truth, pred, vague, rules)
        min_area = 0  # what remains of a large enough object stays
    return _score(overlaps(truth, pred, min_area), rules)


def _label_map(labels: np.ndarray, name: str, connected: bool) -> np.ndarray:
    """The map as an array of ids; with a warning where its values seem to be no ids."""
    labels = np.asarray(labels)
    if labels.ndim != 2:
        raise UserError(f"{name}: found shape {labels.shape}, expected a 2-D label map (H, W)")
    if labels.dtype.kind not in "biu":
        raise UserError(f"{name}: found dtype {labels.dtype}, expected integer ids")
    # As unsigned numbers, negative ids are larger than all others: one pass finds both.
    high = int(labels.view(labels.dtype.str.replace("i", "u")).max(initial=0))
    if high > np.iinfo(labels.dtype if labels.dtype.kind == "i" else np.int64).max:
        found = f"found ids from {labels.min()} to {labels.max(initial=0)}"
        raise UserError(f"{name}: {found}, expected 0 to 2**63 - 1")
    if connected:
        return components(labels)
    if found := not_instances(labels, high):
        how = "each value scored as ONE object; connected=True makes each component an object"
        warnings.warn(f"{name}: found {found}, {how}", stacklevel=3)
    return labels


def _cleaned(
    truth: np.ndarray, pred: np.ndarray, vague: np.ndarray | None, rules: Protocol
) -> tuple[np.ndarray, np.ndarray]:
    """Both maps without small predictions, vague objects, vague pixels and the boundary zone."""
    if vague is None:
        vague = np.zeros(truth.shape, bool)
    limit = rules.vague_overlap if rules.vague == "drop" else math.inf
    truth = _without_vague(truth, vague, limit, 0)
    pred = _without_vague(pred, vague, limit, rules.min_area)
    zone = _boundary_zone(truth, rules.zone_width)
    return np.where(zone, 0, truth), np.where(zone, 0, pred)


def _without_vague(
    labels: np.ndarray, vague: np.ndarray, limit: float, min_area: int
) -> np.ndarray:
    """Remove objects under `min_area` px or over `limit` vague, 0..1; then all vague pixels."""
    table = overlaps(labels, vague)
    in_vague = np.bincount(table.t, table.inter, len(table.truth_ids))
    gone = (table.truth_area < min_area) | (in_vague > limit * table.truth_area)
    return np.where(vague | np.isin(labels, table.truth_ids[gone]), 0, labels)


def _boundary_zone(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels with another label within OpenCV's elliptic kernel of 2 `width` + 1 px.

    That is NucEval's union over nuclei of dilated minus eroded masks, without a loop over nuclei.
    """
    H, W = labels.shape
    zone = np.zeros((H, W), bool)
    padded = np.pad(labels, width, mode="edge")  # the image border is no boundary
    for y in range(2 * width + 1):
        reach = round(math.sqrt(width**2 - (y - width) ** 2))
        for x in range(width - reach, width + reach + 1):
            zone |= padded[y : y + H, x : x + W] != labels
    return zone


def _score(table: Overlaps, rules: Protocol) -> Score:
    """Every count from one table of overlaps."""
    matched = _matches(table, rules)
    aji_inter, aji_union = _aji(table)
    return Score(
        rules,
        tp=len(matched),
        fp=len(table.pred_ids) - len(matched),
        fn=len(table.truth_ids) - len(matched),
        iou_sum=float(table.iou[matched].sum()),
        inter=int(table.inter.sum()),
        total=int(table.truth_area.sum() + table.pred_area.sum()),
        dice2_total=int((table.union + table.inter).sum()),
        aji_inter=aji_inter,
        aji_union=aji_union,
        aji_plus_inter=_aji_plus_inter(table),
        splits=len(np.unique(table.t[table.splits])),
        merges=len(np.unique(table.p[table.merges])),
        ap_tp=_ap_matches(table),
        table=table,
    )


def _matches(table: Overlaps, rules: Protocol) -> np.ndarray:
    """The pairs that PQ, precision and recall match."""
    threshold = Fraction(rules.iou).limit_denominator(1_000_000)
    # exact, unlike iou - threshold
    above = table.inter * threshold.denominator - table.union * threshold.numerator
    return _one_to_one(table, np.flatnonzero(above > 0 if rules.strict else above >= 0))


def _one_to_one(table: Overlaps, pairs: np.ndarray) -> np.ndarray:
    """As many matches as `pairs` allow and, of those, the largest summed IoU (StarDist's rule)."""
    # above an IoU of 0.5 no two pairs compete for an object (Kirillov et al. 2019)
    if (2 * table.inter[pairs] > table.union[pairs]).all():
        return pairs
    weight = 1 + table.iou[pairs] / (len(pairs) + 1)
    return pairs[assign(table.t[pairs], table.p[pairs], weight)]


def _ap_matches(table: Overlaps) -> tuple[int, ...]:
    """Numbers of matches at IoU >= 0.5, 0.55, ... 0.95."""
    half = np.flatnonzero(2 * table.inter >= table.union)
    twentieths = 20 * table.inter[half] // table.union[half]
    above = (int((twentieths >= k).sum()) for k in range(11, 20))
    return len(_one_to_one(table, half)), *above


def _aji(table: Overlaps) -> tuple[int, int]:
    """Intersection and union of AJI, px.

    Each truth takes its prediction of highest IoU. A tie goes to the larger union, then to the
    lower id. Truths without overlap and predictions not taken add their areas to the union.
    """
    order = np.lexsort((-table.union, -table.iou, table.t))  # stable: the lower id comes first
    best = order[np.unique(table.t, return_index=True)[1]]  # the first pair of each truth
    unpaired = np.delete(table.truth_area, table.t).sum()
    not_taken = np.delete(table.pred_area, table.p[best]).sum()
    return int(table.inter[best].sum()), int(table.union[best].sum() + unpaired + not_taken)


def _aji_plus_inter(table: Overlaps) -> int:
    """Intersection of AJI+, px: of the one-to-one pairs with the largest summed IoU."""
    # a tie goes to the larger intersection, as by HoVer-Net's epsilon
    nudge = table.inter * (1e-11 / table.inter.max(initial=1))
    pairs = assign(table.t, table.p, table.iou + nudge)
    return int(table.inter[pairs].sum())
