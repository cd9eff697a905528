"""The cross-validation table: statistics over folds, marks, Markdown."""

import json
import math

import pytest
from conftest import whole_scores

from nucsam.folds.jobs import plan, variants
from nucsam.folds.table import (
    CAVEATS,
    PUBLISHED,
    cross_validation,
    markdown_section,
    table_sections,
)


def metrics(dice):
    """AJI is half of Dice, PQ a quarter."""
    factors = {"dice": 1, "aji": 1 / 2, "pq": 1 / 4}
    return {name: dice and dice * factor for name, factor in factors.items()}


def finish(job, dice, *, organs=(), no_vague=None, epoch=1):
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
    assert len(table["published"]) == len(PUBLISHED) and table["caveats"] == list(CAVEATS)


def test_table_in_markdown(table):
    scores, how, *organs = table_sections(table)
    mark = "`model.rank=4`; **EPOCH CHOSEN ON THE TEST IMAGES**; nuinsseg"
    assert f"| {mark} | 70.00 ± 10.00 | 35.00 ± 5.00 | 17.50 ± 2.50 | 1,234,567 |" in scores
    assert f"| {mark}-no-vague | 71.67 ± 10.41 |" in scores
    assert "**INCOMPLETE: fold 0, 2 of 3 missing**; nuinsseg | 50.00 | 25.00 | 12.50 |" in scores
    assert "| published: CellViT (ViT-256) | 81.92 | 60.03 | 56.44 |" in scores
    assert "RANDOM BASE" not in scores
    assert all(f"- {note}\n" in scores for note in ("nuinsseg: r", *CAVEATS))
    best = "1 in fold 0, 2 in fold 1, 2 in fold 2, chosen by dice on the test split"
    assert f"| `model.rank=4` | 2; kept {best} | mobile_sam.pt | 5,826,993 |" in how
    assert "| 3 official folds, seed 19, group none | 0 |" in how
    assert [section.splitlines()[0] for section in organs] == [
        f"## Per organ: {mark}",
        f"## Per organ: {mark}-no-vague",
    ]
    assert "| liver | 6 | 3 | – | – | – |\n" in organs[0]
    assert "| brain | 1 | 1 | 80.00 | 40.00 | 20.00 |\n" in organs[0]


def test_a_table_without_any_fold_says_so(tmp_path, tiny):
    table = cross_validation(plan(variants(tiny(), []), tmp_path), "tiny")
    scores, how = table_sections(table)
    marks = "**RANDOM BASE WEIGHTS**; **INCOMPLETE: fold 0, 1, 2 of 3 missing**"
    assert f"| `tiny`; {marks}; no fold done | – | – | – | – |" in scores
    assert "| `tiny` | 2; kept none, " in how and "| – | – |" in how


def test_markdown_section():
    text = markdown_section("Title", "a|b", [["1", "x|y"]], ["note"])
    assert text == "## Title\n\n| a | b |\n| --- | --- |\n| 1 | x\\|y |\n\n- note\n"
