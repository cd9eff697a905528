"""What a report says of runs: scores of folds, findings, cost."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist, fmean, median, stdev
from typing import Any, NamedTuple

from nucsam.files import without_nan
from nucsam.run.directory import RunRecord
from nucsam.score.tables import COLUMNS, FEWEST, HEADLINE, over_folds, percent

SHOWN = {name: COLUMNS[name] for name in HEADLINE}
POINT = 0.01  # of AJI: scores without error bars must differ by more to be mentioned

Row = dict[str, Any]  # one scored image of `RunRecord.rows`


def by_organ(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Organ, or "all images" where a data set names none, -> its images."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["organ"] or "all images"].append(row)
    return dict(groups)


# ---- facts ----


def summary(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Test scores of the folds of one variant.

    Returns:
        `variant`; `folds`, how many are scored, "" where `data.fold` is "all"; `kept`, the epochs
        whose weights are kept. By metric: `mean` over a fold's images, then over folds, 0..1, None
        without scores; `std`, the sample standard deviation over folds, None of fewer than two;
        `interval` of a single run, the 95 % bootstrap interval over images, {} of fewer than
        FEWEST.
    """
    data = runs[0].config.data
    scored = [run for run in runs if run.scores]
    interval = {}
    if len(runs) == len(scored) == 1 and len(scored[0].rows) >= FEWEST:
        whole = scored[0].scores["scores"][0]["summary"]
        limits = {metric: (whole["low"][metric], whole["high"][metric]) for metric in SHOWN}
        interval = {metric: pair for metric, pair in limits.items() if None not in pair}
    return {
        "variant": runs[0].variant,
        "folds": "" if data.fold == "all" else f"{len(scored)} of {data.folds}",
        "kept": ", ".join(str(run.scores["epoch"]) for run in scored),
        **without_nan(over_folds([run.scores["headline"] for run in scored])),
        "interval": interval,
    }


def training_cost(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Of all epochs of runs: `minutes` in all, median `images_per_second`, peak `memory_gib`."""
    epochs = [epoch for run in runs for epoch in run.epochs if "seconds" in epoch]
    if not epochs:
        return {}
    return {
        "minutes": sum(epoch["seconds"] for epoch in epochs) / 60,
        "images_per_second": median(epoch["images_per_second"] for epoch in epochs),
        "memory_gib": max(epoch["memory_gib"] for epoch in epochs),
    }


def organ_table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A row per organ: its name, number of images, and mean of each metric, 0..1."""
    return [
        {"organ": organ, "images": len(images)}
        | {metric: fmean(image[metric] for image in images) for metric in SHOWN}
        for organ, images in sorted(by_organ(rows).items())
    ]


# ---- findings: sentences made from the scores ----


class Finding(NamedTuple):
    text: str
    place: str  # id of the part of the page that shows it


def findings(runs: Sequence[RunRecord], places: dict[str, str]) -> list[Finding]:
    """Sentences about the scores of images.

    A sentence says that one thing is more than another only where `differs` or `_worst_organ` says
    that chance seldom makes such a difference.

    Args:
        runs: the folds of one variant.
        places: image name -> id of its picture on the page.
    """
    rows = [row for run in runs for row in run.rows]
    sentences = []
    if rows:
        for describe in (_worst_organ, _matches, _touching):
            sentences += describe(rows)
        rows = told_apart(rows)
        worst = min(rows, key=lambda row: row["aji"])
        middle = median(row["aji"] for row in rows)
        if worst["aji"] < middle - POINT:
            text = (
                f"The worst image is {worst['name']} with AJI {percent(worst['aji'])}; "
                f"the median over images is {percent(middle)}."
            )
            sentences.append(Finding(text, places.get(worst["name"], "images")))
    return sentences


def is_blank(row: Row) -> bool:
    """Whether neither map of an image has a nucleus: then its scores are those of the protocol."""
    return not row["n_truth"] and not row["n_pred"]


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The images that scores can tell apart, which are not blank; all, if all are blank."""
    return [row for row in rows if not is_blank(row)] or list(rows)


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %" if total else "–"


def differs(differences: Sequence[float]) -> bool:
    """Whether the mean over images is more than two standard errors from 0; False of few images."""
    n = len(differences)
    return n >= FEWEST and abs(fmean(differences)) > 2 * stdev(differences) / math.sqrt(n)


def _worst_organ(rows: list[Row]) -> Iterator[Finding]:
    """The organ with the lowest mean, if chance would seldom put any organ that far off.

    The deviation of an image is that within organs, pooled. The worst of k organs must lie beyond
    the 1 - 0.025 / k quantile of the normal distribution (Bonferroni), in standard errors.
    """
    rows = told_apart(rows)
    values = {organ: [row["aji"] for row in group] for organ, group in by_organ(rows).items()}
    freedom = len(rows) - len(values)
    if len(values) == 1 or freedom < FEWEST:
        return
    means = {organ: fmean(scores) for organ, scores in values.items()}
    squares = ((score - means[organ]) ** 2 for organ in values for score in values[organ])
    variance = sum(squares) / freedom
    limit = NormalDist().inv_cdf(1 - 0.025 / len(values))
    worst = min(means, key=means.get)
    scores = values.pop(worst)
    others = [score for group in values.values() for score in group]
    error = math.sqrt(variance * (1 / len(scores) + 1 / len(others)))
    if fmean(others) - means[worst] <= limit * error:
        return
    yield Finding(
        f"The worst organ is {worst} with a mean AJI of {percent(means[worst])} "
        f"({len(scores)} images); the images of all other organs have {percent(fmean(others))}.",
        "organs",
    )


def _matches(rows: list[Row]) -> Iterator[Finding]:
    missed, false = (_outcomes(rows, name) for name in ("missed", "false"))
    nuclei = sum(row["n_truth"] for row in rows)
    predicted = sum(row["n_pred"] for row in rows)
    verdict = ""
    if differs([a - b for a, b in zip(missed, false)]):
        more, less = ("missed", "false") if sum(missed) > sum(false) else ("false", "missed")
        verdict = f": more nuclei are {more} than are {less}"
    yield Finding(
        f"{sum(missed):,} of {nuclei:,} true nuclei ({_share(sum(missed), nuclei)}) are missed, "
        + (
            f"and {sum(false):,} of {predicted:,} predicted ones ({_share(sum(false), predicted)}) "
            f"are false{verdict}."
            if predicted
            else "and none is predicted."
        ),
        "gallery",
    )


def _touching(rows: list[Row]) -> Iterator[Finding]:
    merged, split = (_outcomes(rows, name) for name in ("merged", "split"))
    if not any(merged) and not any(split):
        return
    verdict = ""
    kind, counts = ("split", split) if sum(split) > sum(merged) else ("merged", merged)
    if differs([a - b for a, b in zip(merged, split)]):
        segmentation = {"merged": "under-segmentation, where nuclei touch"}
        verdict = f" This is {segmentation.get(kind, 'over-segmentation')}."
    most = max(zip(counts, rows), key=lambda pair: pair[0])
    yield Finding(
        f"True nuclei that are merged with others: {sum(merged):,}; split: {sum(split):,}."
        f"{verdict} Most are {kind} in {most[1]['name']}: {most[0]:,}.",
        "gallery",
    )


def _outcomes(rows: list[Row], name: str) -> list[int]:
    """How many nuclei of each image have an outcome."""
    return [row["outcomes"][name] for row in rows]
