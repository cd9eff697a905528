"""Charts: what they show, in the colours of the page, and the sentences beside them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from nucsam.config import Config, override
from nucsam.report import charts
from nucsam.report.facts import findings
from nucsam.run.directory import RunRecord


def image(name, aji, organ="liver", **changes):
    """A row of a run's scores: 50 true and 50 predicted nuclei but for `changes`."""
    outcomes = {"missed": 0, "false": 0, "split": 0, "merged": 0}
    numbers = {"n_truth": 50, "n_pred": 50, "dice": 0.8, "pq": 0.4, "outcomes": outcomes}
    return {"name": name, "organ": organ, "aji": aji, **numbers, **changes}


def record(images=(), epochs=(), config=None, **changes):
    headline = {"dice": 0.8, "aji": 0.5, "pq": 0.4}
    scores = {"epoch": 2, "headline": headline, "scores": [{"images": list(images)}]}
    config = config or Config()
    return RunRecord(Path("run"), config, list(epochs), {}, scores if images else None, **changes)


def fold(number):
    return override({}, [f"data.fold={number}"])


def test_a_finding_points_to_its_place():
    runs = [record([image("a", 0.2)], [], fold(0)), record([image("b", 0.5)], [], fold(1))]
    assert findings(runs, {"a": "image-0"})[-1].place == "image-0"
    assert findings(runs, {})[-1].place == "images"


def test_charts_of_one_run():
    epochs = [
        {"epoch": 0, "dice": 0.1, "aji": 0.2, "pq": 0.3},
        {"epoch": 1, "loss": 3.0, "loss_b": 1.0, "loss_a_c": 2.0, "lr": 0.01},
        {"epoch": 2, "loss": 2.0, "loss_b": 0.5, "loss_a_c": 1.5, "lr": 0.0, "aji": 0.4},
    ]
    run = record([image("a", 0.25), image("b", 0.75), image("c", 0.1, "skin")], epochs)
    texts = {name: chart.text for name, chart in charts.run_charts([run]).items()}
    assert texts == {
        "loss": "Training loss by epoch: total 3 to 2; a c 2 to 1.5; b 1 to 0.5",
        "rate": "Learning rate by epoch: fold 0 0.01 to 0",
        "validation": "Validation: inner split by epoch: "
        "Dice 10.0 to 10.0; AJI 20.0 to 40.0; PQ 30.0 to 30.0",
        "organs-dice": "Mean Dice by organ: liver 80.0, skin 80.0",
        "organs-aji": "Mean AJI by organ: skin 10.0, liver 50.0",
        "organs-pq": "Mean PQ by organ: liver 40.0, skin 40.0",
    }
    drawn = charts.svg(charts.run_charts([run])["validation"], "v")
    assert ">kept<" in drawn
    run.scores["epoch"] = 0  # training has made the model worse
    assert ">kept<" in charts.svg(charts.run_charts([run])["validation"], "v")
    unscored = record([], epochs[:1])
    assert list(charts.run_charts([unscored])) == ["validation"]
    assert charts.run_charts([record()]) == {}


def test_charts_of_folds():
    epochs = [{"epoch": k, "loss": 3.0 - k, "lr": 0.1, "aji": k / 4} for k in (1, 2)]
    runs = [record([image("a", 0.5)], epochs, fold(k), variant="x") for k in (0, 1)]
    runs[1].scores["headline"] = {"dice": 0.6, "aji": 0.5, "pq": None}
    drawn = charts.run_charts(runs)
    spreads = "Dice 70.0 ± 14.1, AJI 50.0 ± 0.0, PQ nan ± nan"
    assert drawn["folds"].text == f"Test scores of 2 folds: {spreads}"
    assert drawn["loss"].text == "Training loss by epoch: fold 0 2 to 1; fold 1 2 to 1"
    assert drawn["validation"].text.startswith("Validation: AJI, inner split by epoch: fold 0 25.0")


def test_a_chart_takes_the_colours_of_the_page_and_its_own_ids():
    chart = charts.organs({"a $x$ <b>": [0.1, 0.3], 'c"': [0.5]}, "AJI")
    texts = [charts.svg(chart, name) for name in ("a", "b")]
    assert "a $x$ &lt;b&gt;" in texts[0] and ">20.0<" in texts[0] and ">50.0<" in texts[0]
    assert 'aria-label="Mean AJI by organ: a $x$ &lt;b&gt; 20.0, c&quot; 50.0"' in texts[0]
    assert not re.search("#[0-9a-f]{6}", texts[0]) and "var(--s1)" in texts[0]
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in texts]
    assert len(ids[0]) > 10 and not ids[0] & ids[1]


def test_a_grid_is_drawn_against_its_number():
    def variant(images, seed, aji, *more):
        config = override({}, [f"data.images={images}", f"train.seed={seed}", *more])
        used = {"train": images - 1 if images else 41, "inner": 1, "test": 9}
        run = record([image("a", aji)], [], config)
        run.scores["headline"] = {"dice": 0.8, "aji": aji, "pq": None}
        return replace(run, environment={"images": used})

    runs = [variant(4, 0, 0.4), variant(4, 1, 0.6), variant(0, 0, 0.7), record()]
    chart = charts.grid_chart(runs)
    assert chart.text == (
        "Test scores by data.images: Dice 4: 80.0 ± 0.0, 42: 80.0 ± 0.0; "
        "AJI 4: 50.0 ± 14.1, 42: 70.0 ± 0.0"
    )
    full = [variant(4, 0, 0.3, "model.train=full"), variant(8, 0, 0.2, "model.train=full")]
    assert charts.grid_chart(runs + full).text == (
        "Test AJI by data.images: model.train=lora 4: 50.0 ± 14.1, 42: 70.0 ± 0.0; "
        "model.train=full 4: 30.0 ± 0.0, 8: 20.0 ± 0.0"
    )
    more = [variant(64, 0, 0.9)]  # 41 + 1 were there, so that it used as many as 0, which is all
    more[0].environment["images"] |= {"train": 41}
    assert "42: 80.0 ± 14.1" in charts.grid_chart(runs + more).text
    assert charts.grid_chart([variant(4, 0, 0.4), variant(4, 1, 0.6)]) is None
    assert charts.grid_chart([record()]) is None
