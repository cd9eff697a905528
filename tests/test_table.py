"""The cross-validation table: statistics over folds, marks, Markdown."""

import csv
import json
import math

import pytest
from conftest import whole_scores

from nucsam.folds.jobs import plan, variants
from nucsam.folds.published import CAVEATS, PUBLISHED, is_nuinsseg
from nucsam.folds.table import (
    cross_validation,
    table_csv,
    table_latex,
    table_rows,
    table_sections,
)


def metrics(dice):
    """AJI is half of Dice, PQ a quarter."""
    factors = {"dice": 1, "aji": 1 / 2, "pq": 1 / 4}
    return {name: dice and dice * factor for name, factor in factors.items()}


def finish(job, dice, *, organs=(), no_vague=None, epoch=1, images_in_all=12):
    """Write the files of a finished run; `organs` are (name, images, Dice)."""
    groups = {name: {"images": n, "mean": metrics(value)} for name, n, value in organs}
    images = sum(n for _, n, _ in organs)
    scores = []
    for name, value in (("nuinsseg", dice), ("nuinsseg-no-vague", no_vague)):
        whole = whole_scores()["scores"][0]
        changes = {"images": images, "mean": metrics(value), "organs": groups}
        rules = {"protocol": {"name": name}, "rules": f"{name}: r"}
        scores.append(whole | rules | {"summary": whole["summary"] | changes})
    if no_vague is None:
        scores.pop()
    document = whole_scores(epoch=epoch, base={"source": "mobile_sam.pt"}, scores=scores)
    job.run.mkdir(parents=True)
    job.directory.write_metrics([{"epoch": job.config.train.epochs}])
    (job.run / "scores.json").write_text(json.dumps(document))
    environment = {"parameters_trainable": 1234567, "parameters": 5826993}
    environment["images"] = {"train": images_in_all - 5, "inner": 2, "test": 3}
    (job.run / "environment.json").write_text(json.dumps(environment))


@pytest.fixture
def table(tmp_path, tiny):
    """Rank 4 has three folds, rank 8 only one of them."""
    base = tiny("data.select=test", "model.weights=auto", "train.best=dice")
    jobs = plan(variants(base, ["model.rank=[4, 8]"]), tmp_path)
    finish(jobs[0], 0.6, organs=[("liver", 2, 0.5), ("brain", 1, 0.8)], epoch=1)
    finish(jobs[1], 0.7, organs=[("liver", 1, 0.7)], no_vague=0.75, epoch=2)
    finish(jobs[2], 0.8, organs=[("liver", 3, None)], epoch=2)  # undefined there
    finish(jobs[4], 0.5)
    return cross_validation(jobs, "tiny")


def test_numbers_of_the_table(table):
    row, other = table["variants"]
    plain, no_vague = row["protocols"]
    assert plain["mean"] == pytest.approx({"dice": 0.7, "aji": 0.35, "pq": 0.175})
    assert plain["std"] == pytest.approx({"dice": 0.1, "aji": 0.05, "pq": 0.025})  # of n - 1
    # a fold without vague areas counts with the score that it has
    assert no_vague["mean"]["dice"] == pytest.approx((0.6 + 0.75 + 0.8) / 3)
    brain, liver = plain["organs"]["brain"], plain["organs"]["liver"]
    assert (plain["images"], liver["images"], liver["folds"]) == (7, 6, 3)
    assert brain["mean"]["dice"] == 0.8 and math.isnan(liver["mean"]["dice"])
    assert row["best_epochs"] == {0: 1, 1: 2, 2: 2}
    assert (row["missing"], other["missing"]) == ([], [0, 2])
    assert row["epoch_chosen_on_test"] and not row["random_base"]
    assert row["base"] == ["mobile_sam.pt"] and row["epochs"] == 2
    assert [(fold["fold"], fold["images"]) for fold in plain["folds"]] == [(0, 3), (1, 1), (2, 3)]
    assert [fold["mean"]["dice"] for fold in no_vague["folds"]] == [0.6, 0.75, 0.8]
    assert table["published"] == table["caveats"] == []


def test_table_in_markdown(table):
    scores, folds, how, *organs = table_sections(table)
    mark = "`model.rank=4`; **EPOCH CHOSEN ON THE TEST IMAGES**; nuinsseg"
    assert f"| {mark} | 70.00 ± 10.00 | 35.00 ± 5.00 | 17.50 ± 2.50 | 1,234,567 |" in scores
    assert f"| {mark}-no-vague | 71.67 ± 10.41 |" in scores
    assert "**INCOMPLETE: fold 0, 2 of 3 missing**; nuinsseg | 50.00 | 25.00 | 12.50 |" in scores
    assert "RANDOM BASE" not in scores and "published" not in scores
    assert scores.endswith("- nuinsseg: r\n- nuinsseg-no-vague: r\n")
    assert f"| {mark} | 1 | 1 | 70.00 | 35.00 | 17.50 |\n" in folds
    assert f"| {mark}-no-vague | 1 | 1 | 75.00 | 37.50 | 18.75 |\n" in folds
    best = "1 in fold 0, 2 in fold 1, 2 in fold 2, chosen by dice on the test split"
    assert f"| `model.rank=4` | 2; kept {best} | mobile_sam.pt | 5,826,993 |" in how
    assert "| 3 folds of KFold, seed 19, group none | 0 |" in how
    assert [section.splitlines()[0] for section in organs] == [
        f"## Per organ: {mark}",
        f"## Per organ: {mark}-no-vague",
    ]
    assert "| liver | 6 | 3 | – | – | – |\n" in organs[0]
    assert "| brain | 1 | 1 | 80.00 | 40.00 | 20.00 |\n" in organs[0]


def test_folds_that_training_did_not_better_are_marked(tmp_path, tiny):
    jobs = plan(variants(tiny("model.weights=auto"), []), tmp_path)
    for job, epoch in zip(jobs, (0, 2, 0)):
        finish(job, 0.5, epoch=epoch)
    (row, *_) = table_rows(cross_validation(jobs, "tiny"))
    assert row.marks == ("WEIGHTS BEFORE TRAINING KEPT: fold 0, 2",)


def test_published_results_stand_beside_those_on_nuinsseg_alone(tmp_path, tiny):
    def published(place, organs, images):
        jobs = plan(variants(tiny(), []), tmp_path / place)
        finish(jobs[0], 0.8, organs=[(name, 5, 0.8) for name in organs], images_in_all=images)
        return cross_validation(jobs, "tiny")

    organs = [f"human {k}" for k in range(20)] + [f"mouse {k}" for k in range(6)]
    table = published("whole", organs, 665)
    assert len(table["published"]) == len(PUBLISHED)
    scores, *_ = table_sections(table)
    assert "| published: CellViT (ViT-256) | 81.92 | 60.03 | 56.44 |" in scores
    assert all(f"- {note}\n" in scores for note in CAVEATS)
    rows = table_rows(table)
    assert rows[-1].cells == ["67.4", "42.3", "39.8"]
    assert table_latex(rows).count(r"\midrule") == 2  # below the titles, and below the mean
    assert published("fewer", organs, 664)["published"] == []
    assert not is_nuinsseg({665}, organs[:8])  # synthetic images are of eight such organs
    assert not is_nuinsseg({665}, [*organs, "colon"]) and not is_nuinsseg(set(), [])


def test_csv_and_latex_hold_the_rows_of_the_table(table):
    rows = table_rows(table)
    means = ["70.00 ± 10.00", "35.00 ± 5.00", "17.50 ± 2.50"]
    assert [row.fold for row in rows] == ["0", "1", "2", "mean"] * 2 + ["1", "mean"]
    assert rows[3].cells == means and rows[3].images == "7"
    header, first, *others = csv.reader(table_csv(rows).splitlines())
    mark, incomplete = "EPOCH CHOSEN ON THE TEST IMAGES", "INCOMPLETE: fold 0, 2 of 3 missing"
    scores = [f"{name}{kind} (%)" for name in ("Dice", "AJI", "PQ") for kind in ("", " std")]
    assert header == ["model", "protocol", "fold", "images", *scores, "trained", "marks"]
    numbers = ["60.00", "", "30.00", "", "15.00", ""]
    assert first == ["model.rank=4", "nuinsseg", "0", "3", *numbers, "1234567", mark]
    assert others[2][4:10] == ["70.00", "10.00", "35.00", "5.00", "17.50", "2.50"]
    assert others[-1][-1] == f"{mark}; {incomplete}" and len(others) + 1 == len(rows)
    lines = table_latex([row._replace(model="a_b & 5 %") for row in rows]).splitlines()
    assert lines[1:3] == [r"\begin{tabular}{lllrrrrr}", r"\toprule"]
    assert lines[3] == r"model & protocol & fold & images & Dice & AJI & PQ & trained \\"
    name = rf"a\_b \& 5 \%; {mark} & nuinsseg & mean & 7"
    cells = r"70.00 $\pm$ 10.00 & 35.00 $\pm$ 5.00 & 17.50 $\pm$ 2.50 & 1,234,567 \\"
    assert lines[8:10] == [f"{name} & {cells}", r"\midrule"]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"] and r"\midrule" not in lines[-3]


def test_folds_and_variants_scored_in_other_tiles_are_marked(tmp_path, tiny):
    """A version that did not say its tile scored whole images."""
    jobs = plan(
        variants(tiny("data.folds=2", "model.weights=auto"), ["model.rank=[4, 8]"]), tmp_path
    )

    def marked(*tiles):
        for job, tile in zip(jobs, tiles):
            document = whole_scores() | ({"tile": tile} if tile else {})
            job.run.mkdir(parents=True, exist_ok=True)
            job.directory.write_metrics([{"epoch": job.config.train.epochs}])
            (job.run / "scores.json").write_text(json.dumps(document))
        rows = table_rows(cross_validation(jobs, "tiny"))
        marks = {row.model: " ".join(row.marks) for row in rows}
        return ["SCORED IN DIFFERENT TILES" in text for text in marks.values()]

    assert marked(256, 256, 256, 256) == marked(0, 0, 0, 0) == [False, False]
    assert marked(256, 256, 512, 512) == [False, False]  # as a grid over crops
    assert marked(0, 256, 256, 256) == [True, False]
    assert marked(256, 256, 0, 0) == [False, True]


def test_a_table_without_any_fold_says_so(tmp_path, tiny):
    table = cross_validation(plan(variants(tiny(), []), tmp_path), "tiny")
    scores, how = table_sections(table)
    marks = "**RANDOM BASE WEIGHTS**; **INCOMPLETE: fold 0, 1, 2 of 3 missing**"
    assert f"| `tiny`; {marks}; no fold done | – | – | – | – |" in scores
    assert "| `tiny` | 2; kept none, " in how and "| – | – |" in how
