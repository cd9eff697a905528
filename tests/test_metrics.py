"""Metrics against shapes computed by hand, a slow exact oracle, invariances and public peers."""

import math
import warnings
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment

from nucsam.errors import UserError
from nucsam.score import overlaps
from nucsam.score.assignment import assign
from nucsam.score.metrics import METRICS, PROTOCOLS, Protocol, Score, pool, score_maps

PLAIN = PROTOCOLS["plain"]
RING = PROTOCOLS["nuceval"]
pytestmark = pytest.mark.filterwarnings("ignore:.*separate components")  # some maps are masks


# ---- the oracle: exact fractions, one pixel and one matching at a time ----


def matchings(pairs):
    """Every set of pairs in which no truth and no prediction comes twice."""
    if not pairs:
        yield []
        return
    (t, p), rest = pairs[0], pairs[1:]
    yield from matchings(rest)
    for others in matchings([(a, b) for a, b in rest if a != t and b != p]):
        yield [(t, p), *others]


def ratio(numerator, denominator):
    return Fraction(numerator) / denominator if denominator else Fraction(0)


def oracle(truth, pred, protocol):
    pixels = list(zip(truth.ravel().tolist(), pred.ravel().tolist()))
    small = {p for p, n in Counter(p for _, p in pixels).items() if n < protocol.min_area}
    pixels = [(t, 0 if p in small else p) for t, p in pixels]
    truths, preds = Counter(t for t, _ in pixels if t), Counter(p for _, p in pixels if p)
    inter = Counter((t, p) for t, p in pixels if t and p)
    pairs = sorted(inter)
    union = {(t, p): truths[t] + preds[p] - inter[t, p] for t, p in pairs}
    iou = {pair: Fraction(inter[pair], union[pair]) for pair in pairs}
    foreground = sum(truths.values()) + sum(preds.values())

    def matched(threshold, strict):
        allowed = [x for x in pairs if iou[x] > threshold or (iou[x] == threshold and not strict)]
        return max(matchings(allowed), key=lambda m: (len(m), sum(iou[x] for x in m)))

    best = {}
    for t, p in sorted(pairs, key=lambda x: (iou[x], union[x], -x[1])):
        best[t] = (t, p)
    taken = {p for _, p in best.values()}
    aji_union = sum(union[pair] for pair in best.values())
    aji_union += sum(n for t, n in truths.items() if t not in best)
    aji_union += sum(n for p, n in preds.items() if p not in taken)
    plus = max(matchings(pairs), key=lambda m: (sum(iou[x] for x in m), sum(inter[x] for x in m)))
    plus_inter = sum(inter[pair] for pair in plus)

    found = matched(Fraction(protocol.iou).limit_denominator(1000), protocol.strict)
    iou_sum, tp = sum(iou[x] for x in found), len(found)
    fp, fn = len(preds) - tp, len(truths) - tp
    counts = [len(matched(Fraction(k, 20), strict=False)) for k in range(10, 20)]
    in_truth = Counter(t for t, p in pairs if 2 * inter[t, p] > preds[p])
    in_pred = Counter(p for t, p in pairs if 2 * inter[t, p] > truths[t])
    values = {
        "dice": ratio(2 * sum(inter.values()), foreground),
        "dice2": ratio(2 * sum(inter.values()), sum(truths[t] + preds[p] for t, p in pairs)),
        "aji": ratio(sum(inter[pair] for pair in best.values()), aji_union),
        "aji_plus": ratio(plus_inter, foreground - plus_inter),
        "dq": ratio(2 * tp, 2 * tp + fp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "sq": ratio(iou_sum, tp),
        "pq": ratio(2 * iou_sum, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "map": sum(ratio(n, len(truths) + len(preds) - n) for n in counts) / 10,
    }
    splits, merges = (sum(n > 1 for n in side.values()) for side in (in_truth, in_pred))
    return values, (tp, fp, fn, tuple(counts), splits, merges)


def agrees(truth, pred, protocol=PLAIN):
    found = score_maps(truth, pred, protocol=protocol)
    values, counts = oracle(truth, pred, protocol)
    message = f"{truth}\n{pred}"
    assert (found.tp, found.fp, found.fn, found.ap_tp, found.splits, found.merges) == counts, (
        message
    )
    if not found.both_empty:
        for name, value in values.items():
            assert getattr(found, name) == pytest.approx(float(value), abs=1e-9), (name, message)


def rectangles(rng, shape, n):
    labels = np.zeros(shape, np.int64)
    for name in rng.permutation(3 * n)[:n] + 1:
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        labels[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = name
    return labels


@pytest.mark.parametrize("max_id", [1 << 20, 2])  # ids as they are, and ids that are numbered
def test_agrees_with_the_oracle_on_random_maps(monkeypatch, max_id):
    monkeypatch.setattr(overlaps, "MAX_ID", max_id)
    rng = np.random.default_rng(max_id)
    dtypes = (np.uint8, np.uint16, np.int32, np.int64, np.uint64, ">i4")
    rules = [(0.5, True, 0), (0.5, False, 0), (0.3, True, 3), (0.25, False, 0), (0.7, False, 2)]
    rules = [replace(PLAIN, iou=iou, strict=strict, min_area=n) for iou, strict, n in rules]
    for k in range(1200):
        shape = tuple(rng.integers(1, 9, 2))
        if k % 2:
            maps = [rng.integers(0, rng.integers(1, 5), shape) for _ in range(2)]
        else:
            maps = [rectangles(rng, shape, rng.integers(0, 5)) for _ in range(2)]
        types = rng.choice(len(dtypes), 2)
        agrees(*(m.astype(dtypes[t]) for m, t in zip(maps, types)), rules[k % 5])


# ---- shapes computed by hand ----


def square(shape, *places):
    """Label map with rectangle (top, bottom, left, right) number k as id k + 1."""
    labels = np.zeros(shape, np.int32)
    for name, (top, bottom, left, right) in enumerate(places, 1):
        labels[top:bottom, left:right] = name
    return labels


def plain(truth, pred, **rules):
    return score_maps(truth, pred, protocol=replace(PLAIN, **rules))


def test_one_shifted_square():
    # 16 px each, 12 shared, union 20
    truth, pred = square((10, 10), (2, 6, 2, 6)), square((10, 10), (2, 6, 3, 7))
    found = plain(truth, pred)
    assert found.dice == found.dice2 == 0.75
    assert found.aji == found.aji_plus == found.sq == found.pq == 0.6
    assert (found.tp, found.fp, found.fn, found.dq) == (1, 0, 0, 1)
    assert found.ap_tp == (1, 1, 1, 0, 0, 0, 0, 0, 0, 0)  # 0.5, 0.55 and, with >=, 0.6
    assert found.map == pytest.approx(0.3, abs=1e-15)
    assert plain(truth, pred, iou=0.6).tp == 0
    assert plain(truth, pred, iou=0.6, strict=False).tp == 1


def test_matched_missed_and_false():
    # the first is exact; the second has 4 of 16 px; 15 px are false
    truth = square((8, 20), (0, 4, 0, 4), (0, 4, 6, 10))
    pred = square((8, 20), (0, 4, 0, 4), (5, 8, 15, 20), (0, 1, 6, 10)) * 10
    found = plain(truth, pred)
    assert (found.tp, found.fp, found.fn) == (1, 2, 1)
    assert found.dice == 40 / (32 + 35)
    assert found.dice2 == 40 / (32 + 20)
    assert found.aji == found.aji_plus == 20 / (32 + 15)
    assert (found.precision, found.recall, found.f1, found.pq) == (1 / 3, 1 / 2, 0.4, 0.4)
    assert found.outcomes() == (
        {1: "matched", 2: "missed"},
        {10: "matched", 20: "false", 30: "false"},
    )


def test_aji_tie_goes_to_the_larger_union_then_the_lower_id():
    truth, pred = np.zeros((2, 6, 8), int)
    truth[1, 0:4] = 1
    pred[1, 0] = 1
    pred[1, 2:4] = 2
    pred[2, 2:6] = 2
    for names in ([0, 1, 2], [0, 2, 1]):  # both IoUs are 1/4; the other gives 1 / (4 + 6)
        assert plain(truth, np.array(names)[pred]).aji == 2 / 9
    both = square((1, 9), (0, 1, 2, 4), (0, 1, 4, 6))  # each shares 1 px of 3
    assert plain(square((1, 9), (0, 1, 3, 5)), both).aji == 1 / (3 + 2)


def test_aji_reuses_a_prediction_and_aji_plus_does_not():
    truth = square((4, 8), (0, 4, 0, 4), (0, 4, 4, 8))
    pred = (truth > 0).astype(np.int32)
    found = plain(truth, pred)
    assert found.aji == (16 + 16) / (32 + 32)
    assert found.aji_plus == 16 / (32 + 32 - 16)
    assert (found.merges, found.splits, found.tp) == (1, 0, 0)  # IoU is 0.5, not above
    at_least = plain(truth, pred, strict=False)
    assert (at_least.tp, at_least.fp, at_least.fn) == (1, 0, 1)  # one of the two, by matching
    swapped = plain(pred, truth)
    assert (swapped.merges, swapped.splits) == (0, 1)


@pytest.mark.filterwarnings("error")  # one component: nothing to warn of
def test_a_blob_over_all_nuclei_scores_like_one():
    truth = np.kron(np.arange(1, 301).reshape(15, 20), np.ones((12, 12), int))
    found = score_maps(truth, (truth > 0).astype(np.uint8))
    assert found.dice == 1
    assert found.aji == pytest.approx(1 / 300)
    assert found.aji_plus == 144 / (2 * 300 * 144 - 144)
    assert (found.pq, found.tp, found.fp, found.fn, found.merges) == (0, 0, 1, 300, 1)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 90])
@pytest.mark.parametrize("density", [0.03, 0.2, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_has_the_optimal_sum(n, density, ties):
    rng = np.random.default_rng(n)
    dense = rng.integers(1, 4, (n, n + 3)) / 4 if ties else rng.random((n, n + 3))
    dense[rng.random(dense.shape) >= density] = 0
    t, p = np.nonzero(dense)
    chosen = assign(t, p, dense[t, p])
    assert len(set(t[chosen])) == len(set(p[chosen])) == len(chosen)
    best = dense[linear_sum_assignment(dense, maximize=True)].sum()
    assert dense[t, p][chosen].sum() == pytest.approx(best, abs=1e-9)


# ---- ids, dtypes, masks, errors ----


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.int64, 10**15), (np.uint64, 2**40), (np.uint32, 2**30)]
)
def test_huge_ids_are_kept(dtype, factor):
    truth = square((5, 9), (0, 4, 0, 4), (0, 4, 5, 9))
    pred = square((5, 9), (0, 4, 0, 4), (0, 2, 5, 9))
    found = plain(truth.astype(dtype) * dtype(factor), pred.astype(dtype) * dtype(factor))
    assert found == plain(truth, pred)
    kinds = {factor: "matched", 2 * factor: "missed"}
    assert found.outcomes() == (kinds, kinds | {2 * factor: "false"})
    full = np.full((3, 3), factor, dtype)  # no background at all
    assert plain(full, full).pq == 1


@pytest.mark.parametrize("dtype", [">i4", ">u2", ">i8"])
def test_the_order_of_bytes_changes_nothing(dtype):
    labels = np.arange(1, 301).reshape(15, 20)  # read the other way round, 128 is negative
    assert plain(labels.astype(dtype), labels).pq == 1


@pytest.mark.parametrize("labels", [np.zeros((4, 4, 3), int), np.full((4, 4), 2**63, np.uint64)])
def test_colours_and_ids_over_int64_are_refused(labels):
    with pytest.raises(UserError, match="prediction"):
        score_maps(np.zeros((4, 4), int), labels)


def test_bad_vague_areas_and_rules_are_refused():
    empty = np.zeros((2, 2), int)
    with pytest.raises(UserError, match="vague areas"):
        score_maps(empty, empty, vague=np.zeros((3, 3)), protocol="nuceval")
    for rules in ({"iou": 1.1}, {"iou": -0.1}, {"min_area": -1}, {"zone_width": -1}):
        with pytest.raises(UserError, match=next(iter(rules))):
            Protocol("p", **rules)
    assert Protocol("p", iou=0).iou == 0 and Protocol("p", iou=1).iou == 1


@pytest.mark.parametrize(("dtype", "value"), [(bool, True), (np.uint8, 255), (int, 1)])
def test_masks_warn_and_can_be_labelled(dtype, value):
    truth = square((6, 12), (0, 4, 0, 4), (0, 4, 6, 10))
    mask = (truth > 0).astype(dtype) * dtype(value)
    kind = f"prediction: .*2 separate components share the value {int(value)}"
    with pytest.warns(UserWarning, match=kind) as warned:
        assert plain(truth, mask).fp == 1
    assert warned[0].filename == __file__  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score_maps(truth, mask, protocol="plain", connected=True).pq == 1
        twice = np.hstack([truth * 9, truth * 3])  # no mask: four components of four values
        found = score_maps(twice, twice, protocol="plain", connected=True)
        assert (found.n_truth, found.pq) == (4, 1)


# ---- protocols ----


@pytest.mark.parametrize(
    ("protocol", "dice_value", "value"),
    [("plain", math.nan, math.nan), ("nuinsseg", 1, 0), ("nuceval", 1, 1)],
)
def test_empty_maps(protocol, dice_value, value):
    empty, full = np.zeros((20, 20), int), square((20, 20), (0, 10, 0, 10))
    found = score_maps(empty, empty, protocol=protocol)
    assert found.both_empty
    np.testing.assert_equal(found.dice, dice_value)
    np.testing.assert_equal([getattr(found, m) for m in METRICS[1:]], [value] * 10)
    np.testing.assert_equal(found.ap, (value,) * 10)
    for maps in ((full, empty), (empty, full)):
        one_side = score_maps(*maps, protocol=protocol)
        assert not one_side.both_empty
        assert [getattr(one_side, m) for m in METRICS] == [0] * 11
    for shape in ((0, 0), (0, 7)):
        nothing = np.zeros(shape, int)
        np.testing.assert_equal(score_maps(nothing, nothing, protocol=protocol).pq, value)


def test_nuinsseg_removes_small_predictions_only():
    truth = square((20, 40), (0, 7, 0, 7), (0, 10, 20, 30))
    found = score_maps(truth, truth)  # 49 px goes, in the prediction only
    assert (found.tp, found.fp, found.fn) == (1, 0, 1)
    larger = square((20, 40), (0, 5, 0, 10), (0, 10, 20, 30))
    assert score_maps(larger, larger).pq == 1  # 50 px stays
    # without its only prediction the map is empty
    assert score_maps(np.zeros((20, 40), int), square((20, 40), (0, 7, 0, 7))).dice == 1


def test_nuinsseg_with_and_without_vague_areas():
    truth = square((20, 40), (0, 10, 0, 10), (0, 10, 20, 30))
    pred = square((20, 40), (0, 10, 0, 10), (10, 20, 30, 40), (0, 10, 20, 26))
    vague = np.zeros((20, 40), np.uint8)
    vague[10:, 30:] = 255  # all of the spurious object
    vague[:, 24:30] = 255  # all but 40 px of the second nucleus and of its prediction
    with_vague = score_maps(truth, pred, vague=vague)
    assert with_vague == score_maps(truth, pred)
    assert (with_vague.tp, with_vague.fp, with_vague.fn) == (2, 1, 0)
    assert with_vague.iou_sum == pytest.approx(1.6)
    without = score_maps(truth, pred, vague=vague, protocol=PROTOCOLS["nuinsseg"].without_vague)
    assert (without.tp, without.fp, without.fn, without.pq) == (2, 0, 0, 1)  # 40 px stay


def cleaned_by_nuceval(truth, pred, vague, width):
    """NucEval's cleaning as its authors describe it, one mask at a time."""
    ellipses = {1: (0, 1, 0), 2: (0, 2, 2, 2, 0), 3: (0, 2, 3, 3, 3, 2, 0)}  # OpenCV, half widths
    rows = enumerate(ellipses[width], -width)
    kernel = [(dy, dx) for dy, half in rows for dx in range(-half, half + 1)]

    def drop(labels):
        kept = labels.copy()
        for name in set(labels[labels > 0].tolist()):
            mask = labels == name
            if Fraction(int((mask & vague).sum()), int(mask.sum())) > Fraction(1, 4):
                kept[mask] = 0
        kept[vague] = 0
        return kept

    truth, pred = drop(truth), drop(pred)
    H, W = truth.shape
    ring = np.zeros((H, W), bool)
    for y, x in product(range(H), range(W)):
        near = [(y + dy, x + dx) for dy, dx in kernel if 0 <= y + dy < H and 0 <= x + dx < W]
        ring[y, x] = len({truth[place] for place in near}) > 1
    truth[ring], pred[ring] = 0, 0
    return truth, pred


def test_nuceval_drops_vague_objects_and_rings():
    rng = np.random.default_rng(3)
    for k in range(60):
        H, W = rng.integers(1, 20, 2)
        maps = [rectangles(rng, (H, W), 4).repeat(2, 0).repeat(2, 1)[:H, :W] for _ in range(2)]
        vague, width = rng.random((H, W)) < 0.12, 1 + k % 3
        protocol = replace(RING, zone_width=width)
        cleaned = cleaned_by_nuceval(*maps, vague, width)
        expected = replace(plain(*cleaned, empty="one"), protocol=protocol)
        assert score_maps(*maps, vague=vague, protocol=protocol) == expected


def test_rules_are_named_for_captions():
    assert PROTOCOLS["nuinsseg"].rules == (
        "nuinsseg: match at IoU > 0.5, predictions under 50 px removed, "
        "both maps empty: Dice 1, the others 0"
    )
    assert replace(RING, strict=False).rules == (
        "nuceval: match at IoU >= 0.5, objects over 25% in vague areas dropped, "
        "vague pixels to background, 2 px on both sides of truth boundaries ignored, "
        "both maps empty: 1"
    )
    assert PLAIN.rules == "plain: match at IoU > 0.5, both maps empty: left out"


# ---- aggregation and invariances ----


def pooled(scores):
    return pool([score.as_dict()["counts"] for score in scores], PLAIN)


def test_pool_is_all_images_side_by_side():
    rng = np.random.default_rng(0)
    maps = [(rectangles(rng, (30, 30), 12), rectangles(rng, (30, 30), 12)) for _ in range(4)]
    scores = [plain(*pair) for pair in maps]
    # under ids of their own they are the same objects
    own = [[np.where(m, m + 100 * n, 0) for m in pair] for n, pair in enumerate(maps)]
    whole, total = plain(*map(np.hstack, zip(*own))), pooled(scores)
    for m in METRICS:
        assert getattr(total, m) == pytest.approx(getattr(whole, m), abs=1e-12)
    empty = plain(np.zeros((3, 3), int), np.zeros((3, 3), int))
    assert pooled([*scores, empty]) == total
    assert math.isnan(pooled([]).pq) and pooled([]) == Score(PLAIN)


def test_as_dict_is_plain():
    row = plain(square((9, 9), (0, 5, 0, 5)), square((9, 9), (0, 5, 0, 4))).as_dict()
    counts = row.pop("counts")
    assert (counts["tp"], row["aji"], row["n_truth"], row["n_pred"]) == (1, 0.8, 1, 1)
    assert set(METRICS) < row.keys() and len(row["ap"]) == len(counts["ap_tp"]) == 10
    values = [*row.pop("ap"), *counts.pop("ap_tp"), *row.values(), *counts.values()]
    assert {type(value) for value in values} == {int, float, bool}


def test_outcomes_of_every_object():
    truth = square((1, 60), (0, 1, 0, 4), (0, 1, 6, 10), (0, 1, 12, 16), (0, 1, 16, 20))
    pred = square((1, 60), (0, 1, 0, 4), (0, 1, 24, 28), (0, 1, 12, 20))
    # truth 5 holds prediction 5 and most of 6, which holds truth 6 and most of itself
    truth[0, 30:50], truth[0, 50:53] = 5, 6
    pred[0, 30:38], pred[0, 38:53] = 5, 6
    of_truth, of_pred = plain(truth, pred).outcomes()
    kinds = {1: "matched", 2: "missed", 3: "merged", 4: "merged", 5: "split", 6: "merged"}
    assert of_truth == kinds
    assert of_pred == {1: "matched", 2: "false", 3: "merged", 5: "split", 6: "merged"}


label_maps = array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(
    lambda shape: st.tuples(*[arrays(np.int16, shape, elements=st.integers(0, 6))] * 2)
)


@settings(max_examples=150, deadline=None)
@given(label_maps, st.integers(0, 5), st.integers(0, 5))
def test_transpose_and_padding_change_nothing(maps, before, after):
    truth, pred = maps
    found = plain(truth, pred)
    assert plain(truth.T, pred.T) == found
    pad = ((before, after), (after, before))
    assert plain(np.pad(truth, pad), np.pad(pred, pad)) == found
    mirrored = plain(pred, truth)
    assert (mirrored.tp, mirrored.fp, mirrored.fn) == (found.tp, found.fn, found.fp)
    assert (mirrored.splits, mirrored.merges) == (found.merges, found.splits)
    symmetric = ("dice", "dice2", "aji_plus", "pq", "map")
    both = [[getattr(score, name) for name in symmetric] for score in (mirrored, found)]
    np.testing.assert_allclose(*both, rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(label_maps, st.permutations(range(1, 7)), st.permutations(range(1, 7)))
def test_permuted_ids_change_nothing(maps, truth_names, pred_names):
    truth, pred = maps
    overlap = Counter(zip(truth.ravel().tolist(), pred.ravel().tolist()))
    for t in range(1, 7):  # a full tie goes to the lowest id, which a permutation changes
        ties = [(n, int((pred == p).sum())) for (a, p), n in overlap.items() if a == t and p]
        assume(len(set(ties)) == len(ties))
    found = plain(truth, pred)
    renamed = plain(np.array([0, *truth_names])[truth], np.array([0, *pred_names])[pred] * 1000)
    assert replace(renamed, iou_sum=found.iou_sum) == found
    assert renamed.iou_sum == pytest.approx(found.iou_sum, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(label_maps)
def test_ranges_and_the_perfect_prediction(maps):
    found, perfect = plain(*maps, empty="one"), plain(maps[0], maps[0], empty="one")
    assert all(0 <= getattr(found, m) <= 1 for m in METRICS)
    assert all(getattr(perfect, m) == 1 for m in METRICS)


def test_matched_missed_and_false_objects_are_named():
    truth, pred = np.zeros((2, 10, 10), int)
    truth[0:4, 0:4], truth[6:9, 0:3] = 70, 5
    pred[0:4, 1:4], pred[6:9, 6:9] = 3, 900
    score = score_maps(truth, pred, protocol="plain")
    assert score.outcomes() == (
        {70: "matched", 5: "missed"},
        {3: "matched", 900: "false"},
    )
