"""What a report says of runs: scores of folds, findings, notices, cost."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist, fmean, median, stdev
from typing import Any, NamedTuple

from nucsam.files import without_nan
from nucsam.run.directory import RunRecord
from nucsam.run.learning import advice, learnt_nothing
from nucsam.score.tables import COLUMNS, FEWEST, HEADLINE, over_folds, percent

SHOWN = {name: COLUMNS[name] for name in HEADLINE}
POINT = 0.01  # of AJI: scores without error bars must differ by more to be spoken of

Row = dict[str, Any]  # one scored image of `RunRecord.rows`


# ---- groups ----


def grouped(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Key -> its items, keys and items in the order of `items`."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def by_organ(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Organ, or "all images" where a data set names none, -> its images."""
    return grouped(rows, lambda row: row["organ"] or "all images")


def by_variant(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    return grouped(runs, lambda run: run.variant)


# ---- facts ----


def summary(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Test scores of the folds of one variant.

    Returns:
        `variant`; `folds`, how many are scored; `kept`, the epochs whose weights are kept. By
        metric: `mean` over a fold's images, then over folds, 0..1, None without scores; `std`, the
        sample standard deviation over folds, None of fewer than two; `interval` of a single run,
        the 95 % bootstrap interval over images, {} of fewer than FEWEST.
    """
    scored = [run for run in runs if run.scores]
    interval = {}
    if len(runs) == len(scored) == 1 and len(scored[0].rows) >= FEWEST:
        whole = scored[0].scores["scores"][0]["summary"]
        limits = {metric: (whole["low"][metric], whole["high"][metric]) for metric in SHOWN}
        interval = {metric: pair for metric, pair in limits.items() if None not in pair}
    return {
        "variant": runs[0].variant,
        "folds": f"{len(scored)} of {runs[0].config.data.folds}",
        "kept": ", ".join(str(run.scores["epoch"]) for run in scored),
        **without_nan(over_folds([run.scores["headline"] for run in scored])),
        "interval": interval,
    }


def notices(folder: Path, runs: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before any number: what is missing, and what the scores hide.

    Args:
        folder: of the run, or of the cross-validation.
        runs: the folds of every variant.
    """
    cross = runs[0].folder != folder
    scored = [run for run in runs if run.scores]
    texts = [_unfinished(run, cross) for run in runs if not run.scores]
    if cross:
        for variant, folds in by_variant(runs).items():
            total = folds[0].config.data.folds
            if len(folds) < total:
                name = variant or "The cross-validation"
                texts.append(f"{name} has {len(folds)} of {total} folds so far.")
    if any(run.config.data.select == "test" for run in scored):
        texts.append("The test images chose the epoch to keep, so their scores flatter the model.")
    if any(run.scores["images_of"] == "inner" for run in scored):
        texts.append(
            "There are no test images. The scores are those of the inner split, which chose the "
            "epoch to keep, so they flatter the model."
        )
    for run in scored:
        if sentence := learnt_nothing(run.scores):
            name = f"{_name(run)}: " if cross else ""
            last = run.epochs[-1] if run.epochs else run.scores
            texts.append(
                f"{name}{sentence} {advice(run.config, last['epoch'], last.get('step', 0))}."
            )
    if any(run.config.model.weights == "none" for run in runs):
        texts.append("The base weights are random: the scores say nothing about published weights.")
    return texts


def _name(run: RunRecord) -> str:
    return f"{run.variant}, {run.name}".removeprefix(", ")


def _unfinished(run: RunRecord, cross: bool) -> str:
    name = _name(run) if cross else "This run"
    done = run.epochs[-1]["epoch"] if run.epochs else 0
    return (
        f"{name} is unfinished: {done} of {run.config.train.epochs} epochs are done, and the test "
        "images are not scored. The same command with --resume continues it; nucsam evaluate "
        "scores its best epoch so far."
    )


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


def other_protocols(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Scores by each protocol after the first: its `name`, its `rules`, and the `mean` over folds.

    A fold without vague areas has scores by the first protocol only: others change nothing.
    """
    folds = [run.scores["scores"] for run in runs if run.scores]
    results = []
    for k, scored in enumerate(max(folds, key=len, default=[])[1:], 1):
        means = [(scores[k:] or scores)[0]["summary"]["mean"] for scores in folds]
        result = {"name": scored["protocol"]["name"], "rules": scored["rules"]}
        results.append(result | {"mean": over_folds(means)["mean"]})
    return results


def organ_table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A row per organ: its name, number of images, and mean of each metric, 0..1."""
    return [
        {"organ": organ, "images": len(images)}
        | {metric: fmean(image[metric] for image in images) for metric in SHOWN}
        for organ, images in sorted(by_organ(rows).items())
    ]


# ---- findings: sentences made from the scores and the training curves ----


class Finding(NamedTuple):
    text: str
    place: str  # id of the part of the page that shows it


def findings(runs: Sequence[RunRecord], places: dict[str, str]) -> list[Finding]:
    """Sentences about results: of the images first, then of each run's training.

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
        worst = min(rows, key=lambda row: row["aji"])
        middle = median(row["aji"] for row in rows)
        if worst["aji"] < middle - POINT:
            text = (
                f"The worst image is {worst['name']} with AJI {percent(worst['aji'])}; "
                f"the median over images is {percent(middle)}."
            )
            sentences.append(Finding(text, places.get(worst["name"], "images")))
    for run in runs:
        start = f"{run.name.capitalize()}: " if len(runs) > 1 else ""
        sentences += [Finding(start + text, "curves") for text in _training(run)]
    return sentences


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %" if total else "–"


def differs(differences: Sequence[float]) -> bool:
    """Whether the mean over images is more than two standard errors from 0; of few images, no."""
    n = len(differences)
    return n >= FEWEST and abs(fmean(differences)) > 2 * stdev(differences) / math.sqrt(n)


def _worst_organ(rows: list[Row]) -> Iterator[Finding]:
    """The organ of the lowest mean, where chance seldom makes any of the organs differ as much.

    The deviation of an image is that within organs, pooled. The worst of k organs must lie beyond
    the 1 - 0.025 / k quantile of the normal distribution (Bonferroni), in standard errors.
    """
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
        f"and {sum(false):,} of {predicted:,} predicted ones ({_share(sum(false), predicted)}) "
        f"are false{verdict}.",
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


def _training(run: RunRecord) -> Iterator[str]:
    metric = run.config.train.best
    epochs = [epoch for epoch in run.epochs if metric in epoch]
    if len(epochs) < 2:
        return
    first, last = epochs[0], epochs[-1]
    best = max(epochs, key=lambda epoch: epoch[metric])
    score = f"{SHOWN[metric]} {percent(best[metric])} on the {run.config.data.select} split"
    others = max(epoch[metric] for epoch in epochs if epoch is not best)
    if best is last and best[metric] > others + POINT:
        yield f"The last epoch, {last['epoch']}, is the best ({score}): longer training may help."
    elif best["epoch"] <= 0.6 * last["epoch"] and best[metric] > last[metric] + POINT:
        yield (
            f"The best epoch is {best['epoch']} of {last['epoch']} ({score}): "
            "later epochs did not help."
        )
    if first["epoch"] == 0 and last[metric] < first[metric] - POINT:
        yield (
            f"Training made the model worse: {SHOWN[metric]} {percent(first[metric])} at epoch 0, "
            f"{percent(last[metric])} at the end."
        )
