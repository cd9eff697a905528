"""benchmarks/accuracy.py: which model trains on what, what counts as done, and the table.

A short script replaces the training, but in the test of the child.
"""

import json
import math
import sys
from pathlib import Path

import pytest
from conftest import whole_scores

from nucsam import config
from nucsam.folds import runner
from nucsam.run.directory import RunDirectory

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import accuracy

TRAINER = """
import json, os, sys, tomllib
from pathlib import Path
from nucsam.run.directory import RunDirectory

*options, settings, _, out, _ = sys.argv[1:]
text, run = Path(settings).read_text(), RunDirectory(Path(out))
tables = tomllib.loads(text)
with open("started", "a") as file:
    file.write(out + "\\n")
run.path.mkdir(exist_ok=True)
run.config_file.write_text(text)
name, fold = run.path.parts[-3].removesuffix("-scratch"), tables["data"]["fold"]
aji = {"deep": 0.5, "lora": 0.6}.get(name, 0.55)
aji += 0.0 if fold == "all" else 0.02 * fold + 0.01 * tables["train"]["seed"]
headline = {"dice": 0.8, "aji": aji, "pq": 0.5}
chosen = "aji on the " + tables["data"]["select"] + " split"
run.write_metrics([{"epoch": e, "seconds": 30.0, **headline} for e in (1, 2)])
sizes = {"parameters_trainable": 1000, "parameters": 5000, "images": {"train": 30}}
run.write_environment(sizes)
base = {"source": tables["model"]["weights"]}
scores = json.loads(os.environ["SCORES"]) | {"epoch_chosen_by": chosen, "base": base}
run.write_scores(scores | {"headline": headline})
measured = {"peak_gib": 1.5, "inference_seconds": 0.25}
(run.path / "benchmark.json").write_text(json.dumps(measured))
"""
SHORT = ["train.epochs=2", "train.validate_every=1", "model.weights=none", "data.crop=64"]


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the benchmark with the short trainer: exit status, output, runs that were started."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setenv("SCORES", json.dumps(whole_scores()))
    monkeypatch.setenv("PYTHONPATH", str(accuracy.HERE.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "POLL", 0.02)
    command = (sys.executable, str(tmp_path / "trainer.py"))
    monkeypatch.setattr(accuracy, "trainer", lambda *arguments: (*command, *arguments))

    def run(*arguments):
        status = accuracy.main([*SHORT, "data.scale=1", "--out", "runs", *arguments])
        path = tmp_path / "started"
        started = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return status, capsys.readouterr().out, [run.removeprefix("runs/") for run in started]

    return run


def plan(*arguments):
    return accuracy.parse([*SHORT, "data.scale=1", "--out", "runs", *arguments])


def test_the_report_keeps_its_recipe_but_not_its_budget():
    settings = plan("train.epochs=45", "train.batch=8", "model.width=64").settings("report")
    recipe = config.load_config(accuracy.CONFIGS / "report.toml").flat()
    changes = {key: value for key, value in settings.flat().items() if value != recipe[key]}
    budget = {"train.epochs": 45, "train.batch": 8, "train.step_epochs": 15}  # was 10 of 30 epochs
    common = {"train.precision": "auto", "data.crop": 64, "model.weights": "none"}
    assert changes == budget | common


def test_each_model_starts_from_its_pretraining():
    options = ["--folds", "2", "--pretrain", "a", "--pretrain-set", "train.epochs=7"]
    asked = plan("--models", "deep,report,lora,rank-8,tta", *options)
    bases = {job.run.name: job.config for job in asked.pretraining()}
    nets = ["nucsam-sam-scale-2", "nucsam-instance-scale-1"]
    assert list(bases) == ["deep", *nets]
    for name, c in bases.items():
        assert (c.data.fold, c.data.select, c.data.crop, c.train.epochs) == ("all", "inner", 256, 7)
        assert c.model.train == ("lora" if name == "deep" else "full")
    jobs = {job.run.parts[1]: job for job in asked.training(again=False)}
    assert list(jobs) == ["deep", "deep-scratch", "report", "lora"]  # rank-8 is lora
    assert jobs["deep"].trainer[-2:] == ("--start", "runs/pretrain/deep/adapter.safetensors")
    assert jobs["deep-scratch"].trainer[-2:] == ("--net", "deep")
    assert jobs["deep"].config == jobs["deep-scratch"].config
    for name, base in zip(("report", "lora"), nets):
        assert jobs[name].config.model.weights == f"runs/pretrain/{base}/merged.safetensors"
        assert jobs[name].trainer[-2:] == ("--export", f"runs/pretrain/{base}")
    (again,) = asked.training(again=True)
    assert again.trainer[-2:] == ("runs/lora/seed0/fold2", "--tta")


def test_table_of_a_finished_benchmark(bench, tmp_path):
    arguments = ["--models", "deep,report,lora,rank-8", "--folds", "0,1", "--seeds", "0,1"]
    status, output, started = bench(*arguments)
    assert (status, len(started)) == (0, 3 * 2 * 2)  # rank-8 shares the runs of lora
    document = json.loads((tmp_path / "runs" / "accuracy.json").read_text())
    assert document == json.loads(output.splitlines()[-1])
    rows = {row["model"]: row for row in document["rows"]}
    assert list(rows) == ["deep-scratch", "report", "lora", "rank-8"]
    # AJI is 60 + 2 fold + seed.
    aji = {"mean": 61.5, "folds": math.sqrt(2), "seeds": math.sqrt(0.5)}
    assert rows["lora"]["aji"] == pytest.approx(aji)
    assert {row["presentations"] for row in rows.values()} == {64}  # 8 batches of 4, 2 epochs
    assert [goal["met"] for goal in document["goals"]] == [True, False, None, None, True]
    assert document["goals"][0]["difference"] == pytest.approx(10.0)
    assert "`report`; EPOCH CHOSEN ON THE TEST IMAGES" in output
    assert "| `lora`; base weights: random | 80.00 ± 0.00 (0.00) | 61.50 ± 1.41 (0.71) |" in output
    assert (tmp_path / "runs" / "accuracy.png").stat().st_size > 1000
    assert bench(*arguments)[2] == []


def test_a_child_trains_scores_and_measures(tiny, tmp_path):
    """A stand-in; LoRA on it, scored twice; a U-Net, and one that starts from it."""
    merged = tmp_path / "base" / accuracy.MERGED
    standin = tiny("train.epochs=1", "model.train=full")
    lora = config.override(standin.to_dict(), ["model.train=lora", f"model.weights={merged}"])
    adapts = config.override(lora.to_dict(), ["model.adapt=0.5"])
    unet = tiny("train.epochs=1", "train.lr_adapter=1e-3")
    runs = {name: RunDirectory(tmp_path / name) for name in ("base", "run", "tta", "unet", "next")}
    children = {
        "base": (standin, []),
        "run": (lora, ["--export", str(merged.parent)]),
        "tta": (adapts, ["--again", str(tmp_path / "run"), "--tta"]),
        "unet": (unet, ["--net", "shallow"]),
        "next": (unet, ["--net", "shallow", "--start", str(runs["unet"].adapter_file)]),
    }
    for name, (settings, options) in children.items():
        toml = tmp_path / f"{name}.toml"
        toml.write_text(config.to_toml(settings))
        accuracy.child([*options, str(toml), "--out", str(tmp_path / name)])
        measured = json.loads((tmp_path / name / "benchmark.json").read_text())
        assert measured["peak_gib"] > 0.1 and measured["inference_seconds"] > 0
        source = runs[name].read_scores(settings)["base"]["source"]
        assert (source == str(merged)) == (name in ("run", "tta"))
    first, second = (runs[name].read_metrics()[0]["loss"] for name in ("unet", "next"))
    assert second < first
