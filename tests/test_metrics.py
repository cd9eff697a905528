"""Metrics against hand-computed shapes, a slow oracle in exact fractions, invariances and public peers."""

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

from nucsam import metrics
from nucsam.metrics import METRICS, PROTOCOLS, Protocol, dice, pool, score

PLAIN = PROTOCOLS["plain"]


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


def oracle(truth, pred, protocol=PLAIN):
    pixels = list(zip(truth.ravel().tolist(), pred.ravel().tolist()))
    small = {p for p, n in Counter(p for _, p in pixels).items() if n < protocol.min_area}
    pixels = [(t, 0 if p in small else p) for t, p in pixels]
    truths, preds = Counter(t for t, _ in pixels if t), Counter(p for _, p in pixels if p)
    inter = Counter((t, p) for t, p in pixels if t and p)
    pairs = sorted(inter)
    union = {(t, p): truths[t] + preds[p] - inter[t, p] for t, p in pairs}
    iou = {pair: Fraction(inter[pair], union[pair]) for pair in pairs}

    def matched(threshold, strict):
        allowed = [pair for pair in pairs if (iou[pair] > threshold if strict else iou[pair] >= threshold)]
        return max(matchings(allowed), key=lambda m: (len(m), sum(iou[pair] for pair in m)))

    def ratio(numerator, denominator):
        return Fraction(numerator) / denominator if denominator else Fraction(0)

    best = {}
    for t in truths:
        own = [pair for pair in pairs if pair[0] == t]
        if own:
            best[t] = max(own, key=lambda pair: (iou[pair], union[pair], -pair[1]))
    used = {p for _, p in best.values()}
    aji_union = sum(union[pair] for pair in best.values())
    aji_union += sum(n for t, n in truths.items() if t not in best) + sum(n for p, n in preds.items() if p not in used)
    plus = max(matchings(pairs), key=lambda m: (sum(iou[x] for x in m), sum(inter[x] for x in m)))
    plus_inter = sum(inter[pair] for pair in plus)
    foreground = sum(truths.values()) + sum(preds.values())

    found = matched(Fraction(protocol.iou).limit_denominator(1000), protocol.strict)
    iou_sum, tp, fp, fn = sum(iou[x] for x in found), len(found), len(preds) - len(found), len(truths) - len(found)
    counts = [len(matched(Fraction(k, 20), strict=False)) for k in range(10, 20)]
    ap = [ratio(n, len(truths) + len(preds) - n) for n in counts]
    mostly_in_truth = Counter(t for t, p in pairs if 2 * inter[t, p] > preds[p])
    mostly_in_pred = Counter(p for t, p in pairs if 2 * inter[t, p] > truths[t])
    return {
        "dice": ratio(2 * sum(inter.values()), foreground),
        "dice2": ratio(2 * sum(inter.values()), sum(truths[t] + preds[p] for t, p in pairs)),
        "aji": ratio(sum(inter[pair] for pair in best.values()), aji_union),
        "aji_plus": ratio(plus_inter, foreground - plus_inter),
        "dq": ratio(2 * tp, 2 * tp + fp + fn),
        "sq": ratio(iou_sum, tp),
        "pq": ratio(2 * iou_sum, 2 * tp + fp + fn),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "map": sum(ap) / 10,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "ap_tp": tuple(counts),
        "splits": sum(n > 1 for n in mostly_in_truth.values()),
        "merges": sum(n > 1 for n in mostly_in_pred.values()),
    }


def agrees(truth, pred, protocol=PLAIN):
    found, expected = score(truth, pred, protocol=protocol), oracle(truth, pred, protocol)
    for name, value in expected.items():
        got = getattr(found, name)
        if name in METRICS and not found.both_empty:
            assert abs(got - float(value)) <= 1e-9, (name, got, value, truth, pred)
        elif name not in METRICS:
            assert got == value, (name, got, value, truth, pred)


def rectangles(rng, shape, n):
    labels = np.zeros(shape, np.int64)
    for name in rng.permutation(3 * n)[:n] + 1:
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        labels[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = name
    return labels


@pytest.mark.parametrize("block", [1 << 20, 11])  # whole maps at once, and runs cut by blocks
def test_oracle_on_random_maps(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    rng = np.random.default_rng(block)
    dtypes = (np.uint8, np.uint16, np.int32, np.int64, np.uint64, ">i4")
    rules = [
        replace(PLAIN, iou=iou, strict=strict, min_area=area)
        for iou, strict, area in [(0.5, True, 0), (0.5, False, 0), (0.3, True, 3), (0.25, False, 0), (0.7, False, 2)]
    ]
    for k in range(3000):
        shape = tuple(rng.integers(1, 9, 2))
        if k % 2:
            truth, pred = (rng.integers(0, rng.integers(1, 5), shape) for _ in range(2))
        else:
            truth, pred = (rectangles(rng, shape, rng.integers(0, 5)) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these maps are masks
            types = rng.choice(len(dtypes), 2)
            agrees(truth.astype(dtypes[types[0]]), pred.astype(dtypes[types[1]]), rules[k % 5])


# ---- shapes computed by hand ----


def square(shape, *places):
    """Label map with rectangle (top, bottom, left, right) number k as id k + 1."""
    labels = np.zeros(shape, np.int32)
    for name, (top, bottom, left, right) in enumerate(places, 1):
        labels[top:bottom, left:right] = name
    return labels


def test_one_shifted_square():
    truth, pred = square((10, 10), (2, 6, 2, 6)), square((10, 10), (2, 6, 3, 7))  # 16 px each, 12 shared, union 20
    found = score(truth, pred, protocol="plain")
    assert found.dice == found.dice2 == 0.75
    assert found.aji == found.aji_plus == found.sq == found.pq == 0.6
    assert (found.tp, found.fp, found.fn, found.dq) == (1, 0, 0, 1)
    assert found.ap_tp == (1, 1, 1, 0, 0, 0, 0, 0, 0, 0)  # 0.5, 0.55 and, with >=, 0.6
    assert found.map == pytest.approx(0.3, abs=1e-15)
    assert score(truth, pred, protocol=replace(PLAIN, iou=0.6)).tp == 0
    assert score(truth, pred, protocol=replace(PLAIN, iou=0.6, strict=False)).tp == 1


def test_found_missed_and_spurious():
    truth = square((8, 20), (0, 4, 0, 4), (0, 4, 6, 10))
    pred = square((8, 20), (0, 4, 0, 4), (5, 8, 15, 20), (0, 1, 6, 10)) * 10
    found = score(truth, pred, protocol="plain")
    # the first is exact; the second has 4 of 16 px; 15 px are spurious
    assert (found.tp, found.fp, found.fn) == (1, 2, 1)
    assert found.dice == 40 / (32 + 35)
    assert found.dice2 == 40 / (32 + 20)
    assert found.aji == found.aji_plus == 20 / (32 + 15)
    assert (found.precision, found.recall, found.f1, found.pq) == (1 / 3, 1 / 2, 0.4, 0.4)
    assert found.pairs.tolist() == [[1, 10]]
    assert found.pair_iou.tolist() == [1]
    assert found.missed.tolist() == [2]
    assert found.spurious.tolist() == [20, 30]


def test_tie_goes_to_the_larger_union():
    truth = np.zeros((6, 8), int)
    truth[1, 0:4] = 1
    pred = np.zeros((6, 8), int)
    pred[1, 0] = 1
    pred[1, 2:4] = 2
    pred[2, 2:6] = 2
    assert score(truth, pred, protocol="plain").aji == 2 / 9
    # both IoUs are 1/4: taking the lowest id instead would give 1 / (4 + 6)
    assert score(truth, np.where(pred, 3 - pred, 0), protocol="plain").aji == 2 / 9


def test_full_tie_goes_to_the_lowest_id():
    truth = square((1, 9), (0, 1, 3, 5))
    pred = square((1, 9), (0, 1, 2, 4), (0, 1, 4, 6))  # both share 1 px of 3
    assert score(truth, pred, protocol="plain").aji == 1 / (3 + 2)


def test_aji_reuses_a_prediction_and_aji_plus_does_not():
    truth = square((4, 8), (0, 4, 0, 4), (0, 4, 4, 8))
    pred = (truth > 0).astype(np.int32)
    found = score(truth, pred, protocol="plain")
    assert found.aji == (16 + 16) / (32 + 32)
    assert found.aji_plus == 16 / (32 + 32 - 16)
    assert (found.merges, found.splits, found.tp) == (1, 0, 0)  # IoU is 0.5, not above
    at_least = score(truth, pred, protocol=replace(PLAIN, strict=False))
    assert (at_least.tp, at_least.fp, at_least.fn) == (1, 0, 1)  # one of the two, by matching
    swapped = score(pred, truth, protocol="plain")
    assert (swapped.merges, swapped.splits) == (0, 1)


def test_aji_plus_can_be_below_aji():
    truth, pred = square((1, 12), (0, 1, 0, 12)), square((1, 12), (0, 1, 0, 5), (0, 1, 5, 12))
    found = score(truth, pred, protocol="plain")
    assert found.aji == found.aji_plus == 7 / (12 + 5 + 0)
    # Kumar's AJI may use a prediction twice, so neither bounds the other
    twice = score(pred, truth, protocol="plain")
    assert twice.aji == (5 + 7) / (12 + 12)
    assert twice.aji_plus == 7 / (12 + 12 - 7)


def test_merged_blob_scores_like_one():
    truth = np.kron(np.arange(1, 301).reshape(15, 20), np.ones((12, 12), int))
    blob = (truth > 0).astype(np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one component: nothing to warn of
        found = score(truth, blob)
    assert found.dice == 1
    assert found.aji == pytest.approx(1 / 300)
    assert found.aji_plus == 144 / (2 * 300 * 144 - 144)
    assert (found.pq, found.tp, found.fp, found.fn, found.merges) == (0, 0, 1, 300, 1)


def test_one_heavy_rival_does_not_break_the_assignment():
    # a chain in which greedy matching is not optimal: 1-1 is best alone, 1-2 with 2-1 is best together
    truth, pred = square((1, 30), (0, 1, 0, 10), (0, 1, 10, 19)), square((1, 30), (0, 1, 4, 15), (0, 1, 0, 4))
    agrees(truth, pred)
    agrees(truth, pred, replace(PLAIN, iou=0.1))


def test_assignment_has_the_optimal_sum():
    rng = np.random.default_rng(5)
    for n in (1, 2, 7, 40, 90):
        for density in (0.03, 0.2, 1.0):
            dense = rng.choice([rng.random((n, n + 3)), rng.integers(1, 4, (n, n + 3)) / 4])  # ties too
            dense = np.where(rng.random(dense.shape) < density, dense, 0)
            t, p = np.nonzero(dense)
            chosen = metrics._assign(t, p, dense[t, p])
            assert len(set(t[chosen])) == len(set(p[chosen])) == len(chosen)
            best = dense[linear_sum_assignment(dense, maximize=True)].sum()
            assert dense[t, p][chosen].sum() == pytest.approx(best, abs=1e-9)


# ---- ids, dtypes, masks, errors ----


def test_huge_ids_are_kept():
    truth, pred = square((5, 9), (0, 4, 0, 4), (0, 4, 5, 9)), square((5, 9), (0, 4, 0, 4), (0, 2, 5, 9))
    small = score(truth, pred, protocol="plain")
    for dtype, factor in ((np.int64, 10**15), (np.uint64, 2**40), (np.uint32, 2**30)):
        found = score(truth.astype(dtype) * dtype(factor), pred.astype(dtype) * dtype(factor), protocol="plain")
        assert found == small
        assert found.pairs.tolist() == [[factor, factor]]
        assert found.missed.tolist() == [2 * factor]
    full = np.full((3, 3), 2**40)  # no background at all
    assert score(full, full, protocol="plain").pq == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"prediction: found shape \(4, 4, 3\), expected a 2-D label map"),
        (np.zeros(16, int), r"prediction: found shape \(16,\)"),
        (np.zeros((4, 4)), "prediction: found dtype float64, expected integer ids"),
        (np.full((4, 4), -2), "prediction: found ids from -2 to -2"),
        (np.full((4, 4), 2**63, np.uint64), "prediction: found ids from 9223372036854775808"),
        (np.zeros((4, 5), int), r"truth \(4, 4\), prediction \(4, 5\)"),
    ],
)
def test_what_is_no_label_map_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        score(np.zeros((4, 4), int), labels)


def test_unknown_protocol_and_bad_rules_are_refused():
    with pytest.raises(
        ValueError, match="found 'nuinseg', expected one of nuinsseg, nuinsseg-no-vague, nuceval, plain"
    ):
        score(np.zeros((2, 2), int), np.zeros((2, 2), int), protocol="nuinseg")
    with pytest.raises(ValueError, match="iou from 0 to 1"):
        Protocol("p", iou=50)
    with pytest.raises(ValueError, match=r"vague areas \(3, 3\)"):
        score(np.zeros((2, 2), int), np.zeros((2, 2), int), vague=np.zeros((3, 3)), protocol="nuceval")


@pytest.mark.parametrize(("dtype", "value", "kind"), [(bool, True, "0/1"), (np.uint8, 255, "0/255"), (int, 1, "0/1")])
def test_masks_warn_and_can_be_labelled(dtype, value, kind):
    truth = square((6, 12), (0, 4, 0, 4), (0, 4, 6, 10))
    mask = (truth > 0).astype(dtype) * dtype(value)
    with pytest.warns(UserWarning, match=f"prediction is a {kind} mask with 2 connected components.*--connected"):
        assert score(truth, mask, protocol="plain").fp == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(truth, mask, protocol="plain", connected=True).pq == 1
        assert score(truth, truth, protocol="plain", connected=True).pq == 1  # label maps stay as they are


# ---- protocols ----


def test_empty_maps():
    empty, full = np.zeros((20, 20), int), square((20, 20), (0, 10, 0, 10))
    for name, dice_value, value in (("plain", math.nan, math.nan), ("nuinsseg", 1, 0), ("nuceval", 1, 1)):
        found = score(empty, empty, protocol=name)
        assert found.both_empty
        np.testing.assert_equal(found.dice, dice_value)
        np.testing.assert_equal([getattr(found, m) for m in METRICS[1:]], [value] * 10)
        np.testing.assert_equal(found.ap, (value,) * 10)
        for one_side in (score(full, empty, protocol=name), score(empty, full, protocol=name)):
            assert [getattr(one_side, m) for m in METRICS] == [0] * 11
    for shape in ((0, 0), (0, 7)):
        assert score(np.zeros(shape, int), np.zeros(shape, int), protocol="nuceval").pq == 1
    # a prediction that the protocol removes leaves an empty map
    assert score(empty, square((20, 20), (0, 7, 0, 7))).dice == 1


def test_nuinsseg_removes_small_predictions_only():
    truth = square((20, 40), (0, 7, 0, 7), (0, 10, 20, 30))
    found = score(truth, truth)  # 49 px goes, in the prediction only
    assert (found.tp, found.fp, found.fn) == (1, 0, 1)
    larger = square((20, 40), (0, 5, 0, 10), (0, 10, 20, 30))
    assert score(larger, larger).pq == 1  # 50 px stays


def test_nuinsseg_with_and_without_vague_areas():
    truth = square((20, 40), (0, 10, 0, 10), (0, 10, 20, 30))
    pred = square((20, 40), (0, 10, 0, 10), (10, 20, 30, 40), (0, 10, 20, 26))
    vague = np.zeros((20, 40), np.uint8)
    vague[10:, 30:] = 255  # all of the spurious object
    vague[:, 24:30] = 255  # all but 40 px of the second nucleus, and all but 40 px of its prediction
    with_vague = score(truth, pred, vague=vague)
    assert with_vague == score(truth, pred)
    assert (with_vague.tp, with_vague.fp, with_vague.fn) == (2, 1, 0)
    assert with_vague.iou_sum == pytest.approx(1.6)
    without = score(truth, pred, vague=vague, protocol=PROTOCOLS["nuinsseg"].without_vague)
    assert (without.tp, without.fp, without.fn, without.pq) == (2, 0, 0, 1)  # 40 px of a larger object stays


def nuceval(truth, pred, vague, width, overlap=Fraction(1, 4)):
    """NucEval's cleaning as its authors describe it, one mask at a time."""
    reach = {1: (0, 1, 0), 2: (0, 2, 2, 2, 0), 3: (0, 2, 3, 3, 3, 2, 0)}[width]  # OpenCV's ellipse, half width by row
    kernel = [(dy - width, dx) for dy, half in enumerate(reach) for dx in range(-half, half + 1)]

    def drop(labels):
        kept = labels.copy()
        for name in set(labels[labels > 0].tolist()):
            mask = labels == name
            if Fraction(int((mask & vague).sum()), int(mask.sum())) > overlap:
                kept[mask] = 0
        kept[vague] = 0
        return kept

    truth, pred = drop(truth), drop(pred)
    H, W = truth.shape
    ring = np.zeros((H, W), bool)
    for name in set(truth[truth > 0].tolist()):
        for y, x in product(range(H), range(W)):
            near = [truth[y + a, x + b] == name for a, b in kernel if 0 <= y + a < H and 0 <= x + b < W]
            ring[y, x] |= any(near) and not all(near)
    truth[ring], pred[ring] = 0, 0
    return truth, pred


def test_nuceval_drops_and_rings():
    rng = np.random.default_rng(3)
    for k in range(60):
        shape = tuple(rng.integers(1, 20, 2))
        truth, pred = rectangles(rng, shape, 4), rectangles(rng, shape, 4)
        truth, pred = (np.kron(m, np.ones((2, 2), int))[: shape[0], : shape[1]] for m in (truth, pred))
        vague = rng.random(shape) < 0.12
        width = 1 + k % 3
        protocol = replace(PROTOCOLS["nuceval"], zone_width=width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = score(truth, pred, vague=vague, protocol=protocol)
            expected = score(*nuceval(truth, pred, vague, width), protocol=replace(PLAIN, empty="one"))
        assert found == replace(expected, protocol=protocol)


def test_ring_of_a_square_by_hand():
    truth = square((9, 9), (2, 7, 2, 7))
    found = score(truth, truth, protocol=replace(PROTOCOLS["nuceval"], zone_width=1))
    assert found.total == 2 * 9  # the 3 x 3 core
    edge = square((9, 9), (0, 5, 0, 5))  # the image border is no boundary
    assert score(edge, edge, protocol=replace(PROTOCOLS["nuceval"], zone_width=1)).total == 2 * 16


def test_rules_name_everything():
    for name, protocol in PROTOCOLS.items():
        assert protocol.rules.startswith(f"{name}: match at IoU > 0.5")
    assert "predictions under 50 px removed" in PROTOCOLS["nuinsseg"].rules
    assert "25%" in PROTOCOLS["nuceval"].rules and "2 px" in PROTOCOLS["nuceval"].rules


# ---- aggregation and invariances ----


def test_pool_sums_counts():
    rng = np.random.default_rng(0)
    maps = [(rectangles(rng, (30, 30), 12), rectangles(rng, (30, 30), 12)) for _ in range(4)]
    scores = [score(t, p, protocol="plain") for t, p in maps]
    # side by side in one map, under ids of their own: the same objects
    side = [np.hstack([np.where(m[k], m[k] + 100 * n, 0) for n, m in enumerate(maps)]) for k in (0, 1)]
    whole, total = score(*side, protocol="plain"), pool(scores, PLAIN)
    for m in METRICS:
        assert getattr(total, m) == pytest.approx(getattr(whole, m), abs=1e-12)
    empty = score(np.zeros((3, 3), int), np.zeros((3, 3), int), protocol="plain")
    assert pool([*scores, empty], PLAIN) == total
    assert math.isnan(pool([], PLAIN).pq)


def test_as_dict_is_plain():
    found = score(square((9, 9), (0, 5, 0, 5)), square((9, 9), (0, 5, 0, 4)), protocol="plain")
    row = found.as_dict()
    assert row["counts"]["tp"] == 1 and row["aji"] == 0.8 and row["n_truth"] == 1 and len(row["ap"]) == 10
    values = [v for k, v in row.items() if k not in ("ap", "counts")] + [*row["ap"], *row["counts"]["ap_tp"]]
    values += [v for k, v in row["counts"].items() if k != "ap_tp"]
    assert {type(v) for v in values} <= {int, float, bool}


def test_dice_alone():
    truth, pred = square((9, 9), (0, 4, 0, 4)), square((9, 9), (0, 4, 1, 5))
    assert dice(truth, pred) == dice(truth > 0, pred * 255.0) == 0.75
    assert math.isnan(dice(truth * 0, pred * 0))


label_maps = array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(
    lambda shape: st.tuples(*[arrays(np.int16, shape, elements=st.integers(0, 6))] * 2)
)


@settings(max_examples=150, deadline=None)
@given(label_maps, st.integers(0, 5), st.integers(0, 5))
@pytest.mark.filterwarnings("ignore:.*connected components")
def test_transpose_and_padding_change_nothing(maps, before, after):
    truth, pred = maps
    found = score(truth, pred, protocol="plain")
    assert score(truth.T, pred.T, protocol="plain") == found
    pad = ((before, after), (after, before))
    assert score(np.pad(truth, pad), np.pad(pred, pad), protocol="plain") == found
    mirrored = score(pred, truth, protocol="plain")
    assert (mirrored.tp, mirrored.fp, mirrored.fn) == (found.tp, found.fn, found.fp)
    assert (mirrored.splits, mirrored.merges) == (found.merges, found.splits)
    for symmetric in ("dice", "dice2", "aji_plus", "pq", "map"):
        np.testing.assert_allclose(getattr(mirrored, symmetric), getattr(found, symmetric), rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(label_maps, st.permutations(range(1, 7)), st.permutations(range(1, 7)))
@pytest.mark.filterwarnings("ignore:.*connected components")
def test_permuted_ids_change_nothing(maps, truth_names, pred_names):
    truth, pred = maps
    overlaps = Counter(zip(truth.ravel().tolist(), pred.ravel().tolist()))
    for t in range(1, 7):  # a full tie goes to the lowest id, which a permutation changes
        own = [(n, int((pred == p).sum())) for (a, p), n in overlaps.items() if a == t and p]
        assume(len(set(own)) == len(own))
    found = score(truth, pred, protocol="plain")
    renamed = score(np.array([0, *truth_names])[truth], np.array([0, *pred_names])[pred] * 1000, protocol="plain")
    assert replace(renamed, iou_sum=found.iou_sum) == found
    assert renamed.iou_sum == pytest.approx(found.iou_sum, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(label_maps)
@pytest.mark.filterwarnings("ignore:.*connected components")
def test_ranges_and_the_perfect_prediction(maps):
    truth, pred = maps
    found = score(truth, pred, protocol=replace(PLAIN, empty="one"))
    assert all(0 <= getattr(found, m) <= 1 for m in METRICS)
    perfect = score(truth, truth, protocol=replace(PLAIN, empty="one"))
    assert all(getattr(perfect, m) == 1 for m in METRICS)


# ---- public peers, where they are installed and define the same thing ----


def scene(seed, side=160, n=60):
    """A map of discs, and one with some moved, lost, merged and added."""
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros((2, side, side), np.int32)
    Y, X = np.mgrid[:side, :side]
    for name, (y, x, r) in enumerate(zip(*rng.uniform(0, side, (2, n)), rng.uniform(4, 10, n)), 1):
        truth[(Y - y) ** 2 + (X - x) ** 2 <= r**2] = name
        if rng.random() < 0.9:
            y, x, r = np.array((y, x, r)) + rng.normal(0, 1, 3)
            pred[(Y - y) ** 2 + (X - x) ** 2 <= r**2] = name + (rng.random() < 0.1)
    return truth, pred


def test_agrees_with_stardist():  # which computes IoU in float32
    matching = pytest.importorskip("stardist.matching").matching
    for seed in range(5):
        truth, pred = scene(seed)
        for threshold in (0.1, 0.3, 0.5, 0.55, 0.75, 0.9):
            theirs = matching(truth, pred, thresh=threshold)
            ours = score(truth, pred, protocol=replace(PLAIN, iou=threshold, strict=False))
            assert (ours.tp, ours.fp, ours.fn) == (theirs.tp, theirs.fp, theirs.fn)
            assert ours.pq == pytest.approx(theirs.panoptic_quality, abs=1e-6)
            assert ours.f1 == pytest.approx(theirs.f1, abs=1e-6)
        thresholds = [k / 20 for k in range(10, 20)]
        accuracies = [matching(truth, pred, thresh=t).accuracy for t in thresholds]
        assert ours.map == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_agrees_with_torchmetrics():
    torch = pytest.importorskip("torch")
    panoptic = pytest.importorskip("torchmetrics.functional.detection").panoptic_quality
    for seed in range(3):
        truth, pred = scene(seed)
        as_panoptic = [torch.tensor(np.stack([m > 0, m], -1).astype(np.int64))[None] for m in (pred, truth)]
        # nucleus is a thing, background is stuff
        qualities = panoptic(*as_panoptic, things={1}, stuffs={0}, return_sq_and_rq=True, return_per_class=True)
        pq, sq, rq = qualities[0].tolist()
        ours = score(truth, pred, protocol="plain")
        assert (ours.pq, ours.sq, ours.dq) == pytest.approx((pq, sq, rq), abs=1e-6)


def test_agrees_with_panoptica():
    panoptica = pytest.importorskip("panoptica")
    for seed in range(3):
        truth, pred = scene(seed)
        evaluator = panoptica.Panoptica_Evaluator(
            expected_input=panoptica.InputType.UNMATCHED_INSTANCE,
            instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5 + 1e-9),
        )
        result = evaluator.evaluate(pred, truth, verbose=False)
        theirs = next(iter(result.values())) if isinstance(result, dict) else result
        ours = score(truth, pred, protocol="plain")
        assert (ours.tp, ours.fp, ours.fn) == (theirs.tp, theirs.fp, theirs.fn)
        assert (ours.pq, ours.sq, ours.dq) == pytest.approx((theirs.pq, theirs.sq, theirs.rq), abs=1e-9)
