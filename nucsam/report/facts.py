"""What a report says of runs: scores of folds, findings, notices, cost."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from nucsam.files import without_nan
from nucsam.run.directory import RunRecord
from nucsam.score.tables import COLUMNS, HEADLINE, over_folds, percent

SHOWN = {name: COLUMNS[name] for name in HEADLINE}
NO_ORGAN = "all images"  # stands for the organ where a data set names none

Row = dict[str, Any]  # one scored image of `RunRecord.rows`


# ---- groups ----


def grouped(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Key -> its items, keys and items in the order of `items`."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def by_organ(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Organ, or NO_ORGAN, -> its images."""
    return grouped(rows, lambda row: row["organ"] or NO_ORGAN)


def by_variant(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    return grouped(runs, lambda run: run.variant)


# ---- facts ----


def summary(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Test scores of the folds of one variant.

    Returns:
        `variant`; `folds`, how many are scored; `kept`, the epochs whose weights are kept. By
        metric: `mean` over a fold's images, then over folds, 0..1, None without scores; `std`, the
        sample standard deviation over folds, None of fewer than two; `interval` of a single run,
        the 95 % bootstrap interval over images.
    """
    scored = [run for run in runs if run.scores]
    interval = {}
    if len(runs) == len(scored) == 1:
        whole = scored[0].scores["scores"][0]["summary"]
        interval = {metric: (whole["low"][metric], whole["high"][metric]) for metric in SHOWN}
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
    if any(run.config.model.weights == "none" for run in runs):
        texts.append("The base weights are random: the scores say nothing about MobileSAM.")
    return texts


def _unfinished(run: RunRecord, cross: bool) -> str:
    name = f"{run.variant}, {run.name}".removeprefix(", ") if cross else "This run"
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


def _worst_organ(rows: list[Row]) -> Iterator[Finding]:
    values = {organ: [row["aji"] for row in group] for organ, group in by_organ(rows).items()}
    if len(values) == 1:
        return
    worst = min(values, key=lambda organ: fmean(values[organ]))
    scores = values.pop(worst)
    images = f"{len(scores)} images" if len(scores) > 1 else "1 image: too few to tell"
    rest = fmean(score for group in values.values() for score in group)
    yield Finding(
        f"The worst organ is {worst} with a mean AJI of {percent(fmean(scores))} ({images}); "
        f"the images of all other organs have {percent(rest)}.",
        "organs",
    )


def _matches(rows: list[Row]) -> Iterator[Finding]:
    missed = sum(row["counts"]["fn"] for row in rows)
    false = sum(row["counts"]["fp"] for row in rows)
    nuclei = sum(row["n_truth"] for row in rows)
    predicted = sum(row["n_pred"] for row in rows)
    if min(missed, false) >= 0.8 * max(missed, false):
        verdict = "about as many are missed as are false"
    elif missed > false:
        verdict = "more nuclei are missed than are false"
    else:
        verdict = "more nuclei are false than are missed"
    yield Finding(
        f"{missed:,} of {nuclei:,} true nuclei ({_share(missed, nuclei)}) and {false:,} of "
        f"{predicted:,} predicted ones ({_share(false, predicted)}) have no match: {verdict}.",
        "gallery",
    )


def _touching(rows: list[Row]) -> Iterator[Finding]:
    merges = sum(row["counts"]["merges"] for row in rows)
    splits = sum(row["counts"]["splits"] for row in rows)
    if not merges and not splits:
        return
    if merges > 2 * splits:
        verdict = "This is under-segmentation, where nuclei touch"
    elif splits > 2 * merges:
        verdict = "This is over-segmentation"
    else:
        verdict = "Both happen"
    kind = "merges" if merges >= splits else "splits"
    organs = Counter()
    for row in rows:
        organs[row["organ"]] += row["counts"][kind]
    organ, count = organs.most_common(1)[0]
    where = f"{count:,} in {organ}, " if len(organs) > 1 else ""
    image = max(rows, key=lambda row: row["counts"][kind])
    yield Finding(
        f"Predictions that merge nuclei: {merges:,}; nuclei that are split: {splits:,}. "
        f"{verdict}. Most {kind}: {where}{image['counts'][kind]:,} in {image['name']}.",
        "gallery",
    )


def _training(run: RunRecord) -> Iterator[str]:
    metric = run.config.train.best
    epochs = [epoch for epoch in run.epochs if metric in epoch]
    if len(epochs) < 2:
        return
    first, last = epochs[0], epochs[-1]
    best = max(epochs, key=lambda epoch: epoch[metric])
    score = f"{SHOWN[metric]} {percent(best[metric])} on the {run.config.data.select} split"
    if best is last:
        yield f"The last epoch, {last['epoch']}, is the best ({score}): longer training may help."
    elif best["epoch"] <= 0.6 * last["epoch"]:
        yield (
            f"The best epoch is {best['epoch']} of {last['epoch']} ({score}): "
            "later epochs did not help."
        )
    if first["epoch"] == 0 and last[metric] < first[metric]:
        yield (
            f"Training made the model worse: {SHOWN[metric]} {percent(first[metric])} at epoch 0, "
            f"{percent(last[metric])} at the end."
        )
