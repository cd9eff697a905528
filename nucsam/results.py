"""Results of training as read from a run's folder or a cross-validation's, and sentences made from their numbers."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nucsam.config import MAY_CHANGE, Config, load, read_json

SHOWN = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
NO_ORGAN = "all images"


@dataclass(frozen=True)
class Trained:
    """A run directory as read; `scores` is None where it has none yet. `variant` names it in a grid."""

    folder: Path
    config: Config
    lines: list[dict[str, Any]]  # of metrics.jsonl
    environment: dict[str, Any]
    scores: dict[str, Any] | None
    variant: str = ""

    @property
    def name(self) -> str:
        return f"fold {self.config.data.fold}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """scores.json's images by its first protocol; `fold` and `run` say whence."""
        images = self.scores["scores"][0]["images"] if self.scores else []
        return [{**row, "organ": plain(row["organ"]), "fold": self.config.data.fold, "run": self} for row in images]


def read(folder: Path) -> list[Trained]:
    """The run in `folder`, or the runs of a cross-validation, by variant and fold. ValueError where there is none."""
    depths = ("config.toml",) if (folder / "config.toml").is_file() else ("*/config.toml", "*/*/config.toml")
    found = [path.parent for depth in depths for path in folder.glob(depth)]
    if not found:
        raise ValueError(
            f"{folder}: found no config.toml in it or in its sub-folders, expected a run of nucsam train or the folder "
            "of nucsam folds"
        )
    runs = [_read(path) for path in found]
    values = [run.config.flat() for run in runs]
    free = ("data.fold:", *MAY_CHANGE)
    vary = [k for k in values[0] if f"{k}:" not in free and len({repr(own[k]) for own in values}) > 1]
    keyed = [tuple(own[key] for key in vary) for own in values]
    order = sorted(range(len(runs)), key=lambda k: (keyed[k], f"{runs[k].config.data.fold:>9}"))
    named = [", ".join(f"{key}={value}" for key, value in zip(vary, own)) for own in keyed]
    return [replace(runs[k], variant=named[k]) for k in order]


def _read(folder: Path) -> Trained:
    return Trained(
        folder,
        load(folder / "config.toml"),
        _json(folder / "metrics.jsonl", lines=True) or [],
        _json(folder / "environment.json") or {},
        _json(folder / "scores.json"),
    )


def _json(path: Path, lines: bool = False) -> Any:
    """A JSON document that is a dict, or a list of one a line; None where there is no such file."""
    if not path.is_file():
        return None
    text = path.read_bytes()
    return [read_json(line, str(path)) for line in text.splitlines()] if lines else read_json(text, str(path))


def plain(name: str) -> str:
    """A file's name as what can be written: it may be of any bytes."""
    return name.encode("utf-8", "replace").decode()


def by_organ(rows: Iterable[dict[str, Any]], metric: str) -> dict[str, list[float]]:
    """Organ (NO_ORGAN where a data set names none) -> values of its images, 0 to 1."""
    found = defaultdict(list)
    for row in rows:
        if row[metric] is not None:
            found[row["organ"] or NO_ORGAN].append(row[metric])
    return dict(found)


def percent(value: float | None) -> str:
    """0 to 1 in percent, a dash where it is not defined."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _part(count: int, of: int) -> str:
    return f"{100 * count / of:.0f} %" if of else "–"


# ---- what to look at first ----


def findings(runs: Sequence[Trained], at: dict[str, str]) -> list[dict[str, str]]:
    """Sentences made from the numbers, each with the place to look; `at` gives the place of an image, if it has one."""
    rows = [row for run in runs for row in run.rows if row["aji"] is not None]
    said = []

    def say(text: str, place: str) -> None:
        said.append({"text": text, "place": place})

    if rows:
        for tell in (_of_organs, _of_errors, _of_quality):
            for text, place in tell(rows):
                say(text, place)
        worst, middle = min(rows, key=lambda row: row["aji"]), np.median([row["aji"] for row in rows])
        say(
            f"The worst image is {worst['name']} with AJI {percent(worst['aji'])}; the median is {percent(middle)}.",
            at.get(worst["name"], "images"),
        )
    for run in runs:
        for text in _of_training(run):
            say(text if len(runs) == 1 else f"{run.name.capitalize()}: {text[0].lower()}{text[1:]}", "curves")
    return said


def _of_organs(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    means = {organ: fmean(values) for organ, values in by_organ(rows, "aji").items()}
    if len(means) > 1:
        organ = min(means, key=means.get)
        own, others = ([r["aji"] for r in rows if ((r["organ"] or NO_ORGAN) == organ) == is_] for is_ in (True, False))
        images = f"{len(own)} image" + ("s" if len(own) > 1 else ": too few to tell")
        yield (
            f"The worst organ is {organ}: mean AJI {percent(means[organ])} ({images}), "
            f"{percent(fmean(others))} over the images of the others.",
            "organs",
        )


def _of_errors(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    fn, fp, merges, splits = (sum(row["counts"][key] for row in rows) for key in ("fn", "fp", "merges", "splits"))
    truths, preds = sum(row["n_truth"] for row in rows), sum(row["n_pred"] for row in rows)
    heavier = "misses outweigh false nuclei" if fn > fp else "false nuclei outweigh misses"
    if min(fn, fp) >= 0.8 * max(fn, fp):
        heavier = "misses and false nuclei weigh about the same"
    yield (
        f"{fn:,} of {truths:,} true nuclei ({_part(fn, truths)}) have no match, nor have {fp:,} of {preds:,} predicted "
        f"ones ({_part(fp, preds)}): {heavier}.",
        "gallery",
    )
    if merges or splits:
        most = "merges" if merges >= splits else "splits"
        image, organs = max(rows, key=lambda row: row["counts"][most]), Counter()
        for row in rows:
            organs[row["organ"]] += row["counts"][most]
        organ, count = organs.most_common(1)[0]
        where = f"{count:,} in {organ}, " if len(organs) > 1 else ""
        verdict = "This is under-segmentation, where nuclei touch" if most == "merges" else "This is over-segmentation"
        clear = max(merges, splits) > 2 * min(merges, splits)
        yield (
            f"Predictions that merge two or more nuclei: {merges:,}; nuclei that are split: {splits:,}. "
            f"{verdict if clear else 'Both happen'}. Most {most}: {where}{image['counts'][most]:,} in {image['name']}.",
            "gallery",
        )
    if truths:
        change = preds / truths - 1
        kind = "about as many" if abs(change) < 0.05 else f"{_part(abs(preds - truths), truths)} too "
        kind += "" if abs(change) < 0.05 else "few" if change < 0 else "many"
        yield f"{preds:,} nuclei are predicted for {truths:,} true ones: {kind}.", "images"


def _of_quality(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    dq, sq = (fmean(row[name] for row in rows) for name in ("dq", "sq"))
    low = "finding nuclei (DQ) costs more than drawing" if dq < sq else "drawing nuclei (SQ) costs more than finding"
    yield f"Mean DQ is {percent(dq)} and SQ {percent(sq)}: {low} them.", "images"


def _of_training(run: Trained) -> Iterable[str]:
    measure = run.config.train.best
    tried = [line for line in run.lines if measure in line]
    if len(tried) < 2:
        return
    best, last, first = max(tried, key=lambda line: line[measure]), tried[-1], tried[0]
    value = f"{SHOWN[measure]} {percent(best[measure])} on the {run.config.data.select} split"
    if best is last:
        yield f"The last epoch, {last['epoch']}, is the best ({value}): longer training may help."
    elif best["epoch"] <= 0.6 * last["epoch"]:
        yield f"The best epoch is {best['epoch']} of {last['epoch']} ({value}): what came later did not help."
    if first["epoch"] == 0 and last[measure] < first[measure]:
        yield f"Training made it worse: {percent(first[measure])} at epoch 0, {percent(last[measure])} at the end."
