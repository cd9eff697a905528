"""The cross-validation table: statistics over folds, as Markdown, CSV and LaTeX."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from nucsam.files import folder_name, to_csv
from nucsam.folds.jobs import Job
from nucsam.folds.methods import render
from nucsam.folds.published import CAVEATS, PUBLISHED, is_nuinsseg
from nucsam.names import portable_name
from nucsam.score.tables import COLUMNS, HEADLINE, over_folds, percent

TITLES = [COLUMNS[name] for name in HEADLINE]
MEAN, PUBLISHED_ROW = "mean", "published"  # in place of a fold, also in the templates
UNDEFINED = percent(None)


def cross_validation(jobs: Sequence[Job], name: str) -> dict[str, Any]:
    """The document of table.json.

    Means are over the images of a fold, then over finished folds. The deviation is the sample
    standard deviation over folds, NaN of one. An organ's mean is over the folds that have it.
    Published results and caveats are there only where the images are NuInsSeg's.

    Args:
        jobs: all folds of all variants, variant by variant.
        name: of the variant where there is no grid.

    Returns:
        For each variant its scores, 0..1, and what must be known to read them.
    """
    by_variant = groupby(jobs, lambda job: job.variant)
    variants = [_variant(label or name, list(folds)) for label, folds in by_variant]
    told = any(any(variant["tiles"]) for variant in variants)
    for variant in variants:  # 0: scored by a version that did not say
        variant["tiles_differ"] = len(variant["tiles"]) > 1 or (told and 0 in variant["tiles"])
    protocols = [rules for variant in variants for rules in variant["protocols"]]
    organs = {organ for rules in protocols for organ in rules["organs"]}
    images = {variant["images"] for variant in variants if variant["protocols"]}
    comparable = is_nuinsseg(images, organs)
    return {
        "name": name,
        "data": folder_name(jobs[0].config.data.root),
        "variants": variants,
        "published": [list(row) for row in PUBLISHED] if comparable else [],
        "caveats": list(CAVEATS) if comparable else [],
    }


def _variant(label: str, jobs: Sequence[Job]) -> dict[str, Any]:
    scores = {job.fold: job.scores() for job in jobs}
    done = {fold: document for fold, document in scores.items() if document is not None}
    environment = next((job.directory.read_environment() for job in jobs if job.fold in done), {})
    c = jobs[0].config
    return {
        "variant": label,
        "folds": len(jobs),
        "missing": [fold for fold in scores if fold not in done],
        "tiles": sorted({document.get("tile", 0) for document in done.values()}),
        "parameters_trainable": environment.get("parameters_trainable"),
        "parameters": environment.get("parameters"),
        "images": sum(environment.get("images", {}).values()),
        "epochs": c.train.epochs,
        "presentations": c.train.presentations,
        "best_epochs": {fold: document["epoch"] for fold, document in done.items()},
        "epoch_chosen_by": f"{c.train.best} on the {c.data.select} split",
        "epoch_chosen_on_test": c.data.select == "test",
        "base": sorted({portable_name(d["base"]["source"]) for d in done.values()}),
        "random_base": c.model.weights == "none",
        "split": {"scheme": c.data.split, "group": c.data.group, "seed": c.data.seed},
        "seed": c.train.seed,
        "protocols": _protocols({fold: document["scores"] for fold, document in done.items()}),
    }


def _protocols(scores: Mapping[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The scores of each fold by each protocol.

    A fold without vague areas has one protocol: it scores the same with and without them.
    """
    rows = []
    for k, rules in enumerate(max(scores.values(), key=len, default=[])):
        by_fold = {fold: (scored[k:] or scored)[0]["summary"] for fold, scored in scores.items()}
        summaries = list(by_fold.values())
        organs = {}
        for organ in sorted({organ for summary in summaries for organ in summary["organs"]}):
            groups = [s["organs"][organ] for s in summaries if organ in s["organs"]]
            organs[organ] = {
                "images": sum(group["images"] for group in groups),
                "folds": len(groups),
                **over_folds([group["mean"] for group in groups]),
            }
        row = {"protocol": rules["protocol"]["name"], "rules": rules["rules"]}
        row["images"] = sum(summary["images"] for summary in summaries)
        row["folds"] = [
            {"fold": fold, "images": summary["images"], "mean": summary["mean"]}
            for fold, summary in by_fold.items()
        ]
        rows.append(row | over_folds([s["mean"] for s in summaries]) | {"organs": organs})
    return rows


class TableRow(NamedTuple):
    """One row of table.md, table.csv and table.tex: of a fold, over folds, or published."""

    model: str
    marks: tuple[str, ...]  # why its numbers may be optimistic or not comparable
    protocol: str
    fold: str  # its number, MEAN or PUBLISHED_ROW
    images: str
    cells: list[str]  # HEADLINE in percent: "70.00", or with a deviation over folds "70.00 ± 1.00"
    trained: str  # parameters


def table_rows(table: dict[str, Any]) -> list[TableRow]:
    """The document of `cross_validation` row by row: folds, then their mean, then published."""
    nothing = {"protocol": "no fold done", "images": 0, "folds": [], **over_folds([])}
    rows = []
    for variant in table["variants"]:
        name, marks = variant["variant"], _marks(variant)
        trained = _count(variant["parameters_trainable"])
        for scored in variant["protocols"] or [nothing]:
            for row in (*scored["folds"], {**scored, "fold": MEAN}):
                place = scored["protocol"], str(row["fold"]), str(row["images"])
                rows.append(TableRow(name, marks, *place, _cells(row), trained))
    for model, parameters, *cells, _ in table["published"]:
        rows.append(TableRow(model, (), "", PUBLISHED_ROW, "", cells, parameters))
    return rows


def table_sections(table: dict[str, Any]) -> list[str]:
    """table.md in sections: means, folds, how the models were made, and each variant's organs."""
    values = {"rows": table_rows(table), "count": _count, "marks": _marks, "cells": _cells}
    text = render("table.md", table=table, titles=TITLES, **values)
    return re.split(r"\n(?=## )", text.lstrip())


def table_csv(rows: Sequence[TableRow]) -> str:
    """table.csv: scores in percent, empty where undefined."""
    scores = [f"{title}{kind} (%)" for title in TITLES for kind in ("", " std")]
    lines = [["model", "protocol", "fold", "images", *scores, "trained", "marks"]]
    for row in rows:
        place = row.model, row.protocol, row.fold, row.images
        numbers = [number for cell in row.cells for number in cell.partition(" ± ")[::2]]
        cells = [*place, *numbers, row.trained.replace(",", ""), "; ".join(row.marks)]
        lines.append(["" if cell == UNDEFINED else cell for cell in cells])
    return to_csv(lines)


def table_latex(rows: Sequence[TableRow]) -> str:
    """table.tex: a tabular in percent; a document needs the package booktabs."""
    return render("table.tex", rows=rows, titles=TITLES)


def _marks(row: dict[str, Any]) -> tuple[str, ...]:
    """Why a variant's numbers may be optimistic or not comparable."""
    marks = []
    if row["epoch_chosen_on_test"]:
        marks.append("EPOCH CHOSEN ON THE TEST IMAGES")
    if row["random_base"]:
        marks.append("RANDOM BASE WEIGHTS")
    if kept := [str(fold) for fold, epoch in row["best_epochs"].items() if epoch == 0]:
        marks.append(f"WEIGHTS BEFORE TRAINING KEPT: fold {', '.join(kept)}")
    if row["tiles_differ"]:
        again = "nucsam evaluate RUN scores a fold again, then nucsam folds writes the table"
        marks.append(f"SCORED IN DIFFERENT TILES: {again}")
    if row["missing"]:
        folds = ", ".join(map(str, row["missing"]))
        marks.append(f"INCOMPLETE: fold {folds} of {row['folds']} missing")
    return tuple(marks)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Dice, AJI and PQ in percent, each with its deviation over folds where there is one."""
    cells = []
    for name in HEADLINE:
        std = row.get("std", {}).get(name, math.nan)
        deviation = "" if math.isnan(std) else f" ± {percent(std, 2)}"
        cells.append(percent(row["mean"][name], 2) + deviation)
    return cells


def _count(number: int | None) -> str:
    return f"{number:,}" if number else UNDEFINED
