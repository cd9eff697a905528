"""Scores of images, summed up over images, organs and folds, as tables and files."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE, SIMPLE_HEAD
from rich.table import Table

from nucsam.files import to_csv, to_json, without_nan, write_text
from nucsam.score.metrics import METRICS, OUTCOMES, Protocol, Score, pool

HEADLINE = ("dice", "aji", "pq")  # what a run is judged by

MAIN = ("dice", "aji", "aji_plus", "dq", "sq", "pq")  # as many as fit a terminal of 80 columns

COLUMNS = {  # F1 is DQ
    "dice": "Dice",
    "dice2": "Dice2",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "dq": "DQ=F1",
    "sq": "SQ",
    "pq": "PQ",
    "precision": "Prec.",
    "recall": "Rec.",
    "map": "mSA",
}

DRAWS = 2000  # bootstrap samples
FEWEST = 6  # images: with fewer, resampling shows little beyond the least and the largest score

AGGREGATES = {  # each answers another question; they differ by points
    "mean": "image mean",
    "std": "image std",
    "low": "95 % from",
    "high": "95 % to",
    "pooled": "pooled",
    "weighted": "by nuclei",
}


def image_row(name: str, organ: str, score: Score, warned: Sequence[str] = ()) -> dict[str, Any]:
    """One image as a plain dict.

    `outcomes` counts true nuclei by their outcome of `Score.outcomes`, and the false predictions.
    """
    truth, pred = score.outcomes()
    names = Counter([*truth.values(), *(name for name in pred.values() if name == "false")])
    outcomes = {name: names[name] for name in OUTCOMES}
    row = {"name": name, "organ": organ, "warnings": list(warned), **score.as_dict()}
    return row | {"outcomes": outcomes}


def _matrix(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Of the images in which the metrics are defined: values (n, metrics), true nuclei (n,)."""
    values = np.array([[row[metric] for metric in METRICS] for row in rows], float)  # None is NaN
    values = values.reshape(-1, len(METRICS))
    defined = ~np.isnan(values).any(axis=1)
    return values[defined], np.array([row["n_truth"] for row in rows], float)[defined]


def _by_metric(values: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, values.tolist()))


_UNDEFINED = np.full(len(METRICS), math.nan)


def means(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of each metric, 0..1, over the images in which it is defined; NaN without any."""
    values, _ = _matrix(rows)
    return _by_metric(values.mean(axis=0) if len(values) else _UNDEFINED)


def over_folds(fold_means: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over folds.

    Args:
        fold_means: for each fold the mean of each metric over its images, 0..1; None is NaN.

    Returns:
        {"mean": {metric: value}, "std": {metric: value}}: NaN where a fold is undefined, and
        without folds. The deviation of one fold is NaN.
    """
    names = list(fold_means[0]) if fold_means else METRICS
    mean, std = {}, {}
    for name in names:
        values = np.array([fold[name] for fold in fold_means], float)  # None is NaN
        mean[name] = float(np.mean(values)) if len(values) else math.nan
        std[name] = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": mean, "std": std}


def _group(rows: Sequence[dict], protocol: Protocol) -> dict[str, Any]:
    total = pool([row["counts"] for row in rows], protocol)
    return {
        "images": len(rows),
        "nuclei": sum(row["n_truth"] for row in rows),
        "predicted": sum(row["n_pred"] for row in rows),
        "both_empty": sum(row["both_empty"] for row in rows),
        "mean": means(rows),
        "pooled": {metric: getattr(total, metric) for metric in METRICS},
    }


def summarise(rows: Sequence[dict], protocol: Protocol) -> dict[str, Any]:
    """All of AGGREGATES over images, numbers of images and nuclei, and the same by organ.

    `std` is the sample standard deviation over images. `low` and `high` are the 2.5 and 97.5
    percentiles of the mean over DRAWS bootstrap samples of the images (Efron's interval), NaN of
    fewer than FEWEST images.
    Images in which the metrics are undefined count in `both_empty` and in the pooled numbers only.

    Args:
        rows: images, as `image_row` makes them.
        protocol: what they were scored by.

    Returns:
        Metrics 0..1, NaN where undefined.
    """
    values, nuclei = _matrix(rows)
    n = len(values)
    low = high = std = weighted = _UNDEFINED
    if n >= FEWEST:
        counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
        low, high = np.percentile(counts @ values / n, (2.5, 97.5), axis=0)
    if n > 1:
        std = values.std(axis=0, ddof=1)
    if nuclei.any():
        weighted = nuclei @ values / nuclei.sum()
    organs = {}
    for organ in sorted({row["organ"] for row in rows} - {""}):
        organs[organ] = _group([row for row in rows if row["organ"] == organ], protocol)
    return {
        **_group(rows, protocol),
        "std": _by_metric(std),
        "low": _by_metric(low),
        "high": _by_metric(high),
        "weighted": _by_metric(weighted),
        "organs": organs,
    }


def scored(rows: Sequence[dict], protocol: Protocol) -> dict[str, Any]:
    """Rows with their protocol and summary: what tables and files are made of."""
    return {
        "protocol": asdict(protocol),
        "rules": protocol.rules,
        "summary": summarise(rows, protocol),
        "images": list(rows),
    }


def percent(value: float | None, digits: int = 1) -> str:
    """A value 0..1 in percent; a dash where it is undefined."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def _table(result: dict, first: Sequence[str], metrics: Iterable[str], note: str = "") -> Table:
    """An empty table: its protocol above, columns of text, columns of metrics, remarks below."""
    summary = result["summary"]
    empty = f"percent; both maps empty in {summary['both_empty']} of {summary['images']} images"
    texts = {"title": result["rules"], "caption": empty + note}
    left = {"title_justify": "left", "caption_justify": "left"}
    table = Table(**texts, **left, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first[0], overflow="fold")
    for column in (*first[1:], *(COLUMNS[metric] for metric in metrics)):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def summary_table(result: dict) -> Table:
    """A rich Table of a `scored` dict, in percent: every aggregate over all images."""
    summary = result["summary"]
    numbers = f"; {summary['nuclei']} nuclei, {summary['predicted']} predicted"
    table = _table(result, ["all images"], COLUMNS, numbers)
    for name, title in AGGREGATES.items():
        table.add_row(title, *(percent(summary[name][metric]) for metric in COLUMNS))
    return table


def change_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """A rich Table of the contents of two scores.json, in percent: a model before and after."""
    rules = after["scores"][0]["protocol"]["name"]
    headings = f"image mean, % ({rules})", *(COLUMNS[metric] for metric in MAIN)
    table = Table(*headings, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for scores, name in ((before, "before training"), (after, f"after, epoch {after['epoch']}")):
        mean = scores["scores"][0]["summary"]["mean"]
        table.add_row(name, *(percent(mean[metric]) for metric in MAIN))
    return table


def organ_table(result: dict) -> Table:
    """A rich Table of a `scored` dict, in percent: the image means of each organ and of all."""
    summary = result["summary"]
    table = _table(result, ["image mean", "images", "nuclei"], MAIN)
    for name, group in {**summary["organs"], "all": summary}.items():
        cells = [percent(group["mean"][metric]) for metric in MAIN]
        table.add_row(name, str(group["images"]), str(group["nuclei"]), *cells)
    return table


def write_json(path: str | Path, results: dict) -> None:
    """Write `to_json` as a file, or leave what was there."""
    write_text(Path(path), to_json(results) + "\n")


def write_csv(path: str | Path, results: dict) -> None:
    """Write `image_csv` as a file, or leave what was there."""
    write_text(Path(path), image_csv(results))


def image_csv(results: dict) -> str:
    """A CSV document with a line for each image and protocol.

    Metrics are 0..1, empty where undefined; raw counts follow.
    """
    lines = []
    for result in results["scores"]:
        for row in result["images"]:
            protocol = result["protocol"]["name"]
            line = {"name": row["name"], "organ": row["organ"], "protocol": protocol}
            line |= {metric: row[metric] for metric in METRICS}
            line |= {f"ap{50 + 5 * k}": value for k, value in enumerate(row["ap"])}
            line |= {"n_truth": row["n_truth"], "n_pred": row["n_pred"]}
            line |= {name: value for name, value in row["counts"].items() if name != "ap_tp"}
            lines.append(without_nan(line))
    return to_csv([lines[0], *(line.values() for line in lines)])
