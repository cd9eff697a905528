"""The cross-validation table: statistics over folds, and Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nucsam.folds.jobs import Job
from nucsam.folds.published import CAVEATS, PUBLISHED
from nucsam.score.tables import HEADLINE, over_folds, percent


def cross_validation(jobs: Sequence[Job], name: str) -> dict[str, Any]:
    """The document of table.json.

    Means are over the images of a fold, then over finished folds. The deviation is the sample
    standard deviation over folds, NaN of one. An organ's mean is over the folds that have it.

    Args:
        jobs: all folds of all variants.
        name: of the variant where there is no grid.

    Returns:
        For each variant its scores, 0..1, and what must be known to read them.
    """
    by_variant: dict[str, list[Job]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant or name, []).append(job)
    return {
        "name": name,
        "variants": [_variant(label, folds) for label, folds in by_variant.items()],
        "published": [list(row) for row in PUBLISHED],
        "caveats": list(CAVEATS),
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
        "parameters_trainable": environment.get("parameters_trainable"),
        "parameters": environment.get("parameters"),
        "epochs": c.train.epochs,
        "best_epochs": {fold: document["epoch"] for fold, document in done.items()},
        "epoch_chosen_by": f"{c.train.best} on the {c.data.select} split",
        "epoch_chosen_on_test": c.data.select == "test",
        "base": list(dict.fromkeys(document["base"]["source"] for document in done.values())),
        "random_base": c.model.weights == "none",
        "split": {"scheme": c.data.split, "group": c.data.group, "seed": c.data.seed},
        "seed": c.train.seed,
        "protocols": _protocols([document["scores"] for document in done.values()]),
    }


def _protocols(folds: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The folds' scores by each protocol.

    A fold without vague areas has one protocol: it scores the same with and without them.
    """
    rows = []
    for k, rules in enumerate(max(folds, key=len, default=[])):
        summaries = [(scored[k:] or scored)[0]["summary"] for scored in folds]
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
        rows.append(row | over_folds([s["mean"] for s in summaries]) | {"organs": organs})
    return rows


def table_sections(table: dict[str, Any]) -> list[str]:
    """table.md in sections: the scores, how the models were made, and each variant's organs."""
    nothing = {"protocol": "no fold done", "rules": "", "organs": {}, **over_folds([])}
    scores, organs, rules = [], [], {}
    for row in table["variants"]:
        label, trained = _label(row), _count(row["parameters_trainable"])
        for scored in row["protocols"] or [nothing]:
            title = f"{label}; {scored['protocol']}"
            scores.append([title, *_cells(scored), trained])
            rules[scored["rules"]] = None
            rows = [
                [organ, str(group["images"]), str(group["folds"]), *_cells(group)]
                for organ, group in scored["organs"].items()
            ]
            if rows:
                columns = "organ|images|folds|Dice|AJI|PQ"
                organs.append(markdown_section(f"Per organ: {title}", columns, rows))
    for model, parameters, *cells, _ in table["published"]:
        scores.append([f"published: {model}", *cells, parameters])
    average = "Percent: mean over a fold's images, then over folds ± standard deviation over folds."
    notes = [average, *filter(None, rules), *table["caveats"]]
    title, columns = f"Cross-validation: {table['name']}", "model|Dice|AJI|PQ|trained"
    how = "model|epochs|base weights|parameters in all|split|seed"
    return [
        markdown_section(title, columns, scores, notes),
        markdown_section("How", how, [_how(row) for row in table["variants"]]),
        *organs,
    ]


def _label(row: dict[str, Any]) -> str:
    """A variant's name and what makes its numbers flatter or say little."""
    marks = []
    if row["epoch_chosen_on_test"]:
        marks.append("EPOCH CHOSEN ON THE TEST IMAGES")
    if row["random_base"]:
        marks.append("RANDOM BASE WEIGHTS")
    if row["missing"]:
        folds = ", ".join(map(str, row["missing"]))
        marks.append(f"INCOMPLETE: fold {folds} of {row['folds']} missing")
    return "; ".join([f"`{row['variant']}`", *(f"**{mark}**" for mark in marks)])


def _how(row: dict[str, Any]) -> list[str]:
    split = row["split"]
    best = ", ".join(f"{epoch} in fold {fold}" for fold, epoch in row["best_epochs"].items())
    return [
        f"`{row['variant']}`",
        f"{row['epochs']}; kept {best or 'none'}, chosen by {row['epoch_chosen_by']}",
        "; ".join(row["base"]) or "–",
        _count(row["parameters"]),
        f"{row['folds']} {split['scheme']} folds, seed {split['seed']}, "
        f"group {split['group'] or 'none'}",
        str(row["seed"]),
    ]


def _count(number: int | None) -> str:
    return f"{number:,}" if number else "–"


def _cells(scored: Mapping[str, Any]) -> list[str]:
    """Dice, AJI and PQ in percent, each with its deviation where there is one."""
    cells = []
    for name in HEADLINE:
        mean, std = scored["mean"][name], scored["std"][name]
        defined = not math.isnan(mean + std)
        cells.append(percent(mean, 2) + (f" ± {percent(std, 2)}" if defined else ""))
    return cells


def markdown_section(
    title: str, columns: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A heading, a table and remarks in Markdown.

    Args:
        title: of the heading.
        columns: their titles, separated by |.
        rows: cells of each row.
        notes: remarks below the table.
    """
    titles = columns.split("|")
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]
    return "\n".join([f"## {title}", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"
