"""benchmarks/accuracy.py: what is trained with what, who starts from whom, what is done twice (nothing), the table.

A tiny script stands for the training, but once.
"""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nucsam import config, folds, scoring
from nucsam.base import build_sam
from nucsam.synthetic import write_dataset

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import accuracy
import unets

TRAINER = """
import json, sys, tomllib
from pathlib import Path

*options, settings, _, out, _ = sys.argv[1:]
text, out = Path(settings).read_text(), Path(out)
tables = tomllib.loads(text)
with open("started", "a") as file:
    file.write(json.dumps([str(out), options]) + "\\n")
out.mkdir(exist_ok=True)
(out / "config.toml").write_text(text)
name, fold = out.parts[-3].removesuffix("-scratch"), tables["data"]["fold"]
if name == "head" and fold == 1 and Path("fails").exists():
    sys.exit(3)
aji = {"deep": 0.5, "lora": 0.6, "head": 0.55, "report": 0.3}.get(name, 0.4)
aji += 0.0 if fold == "all" else 0.02 * fold + 0.01 * tables["train"]["seed"]
headline = {"dice": 0.8, "aji": aji, "pq": 0.5}
chosen = tables["train"]["best"] + " on the " + tables["data"]["select"] + " split"
lines = [{"epoch": e, "seconds": 30.0, "images_per_second": 1.0, **headline} for e in (1, 2)]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
facts = {"parameters_trainable": 1000, "parameters": 5000000, "images": {"train": 30}}  # 8 batches of 4
(out / "environment.json").write_text(json.dumps(facts))
base = {"source": tables["model"]["weights"]}
scores = {"epoch": 2, "epoch_chosen_by": chosen, "base": base, "headline": headline}
(out / "scores.json").write_text(json.dumps(scores))
if not Path("killed").exists():
    (out / "benchmark.json").write_text(json.dumps({"peak_gib": 1.5, "inference_seconds": 0.25}))
"""
GROUP = config.load(accuracy.HERE.parent / "configs" / "standin.toml").data.group
SHORT = ["train.epochs=2", "train.validate_every=1", "model.weights=none", "data.crop=64", "data.scale=1"]


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the benchmark in `tmp_path` with the fake trainer; gives exit status, output, and what was started."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folds, "POLL", 0.02)
    fake = (sys.executable, str(tmp_path / "trainer.py"))
    monkeypatch.setattr(accuracy, "trainer", lambda *arguments: (*fake, *arguments))

    def run(*arguments):
        status = accuracy.main([*SHORT, "--out", "runs", *arguments])
        path = tmp_path / "started"
        started = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return status, capsys.readouterr().out, started

    return run


def plan(*arguments):
    return accuracy.parse([*SHORT, "--out", "runs", *arguments])


def test_every_model_has_a_configuration():
    assert tuple(unets.NETS) == accuracy.UNETS
    assert (*unets.NETS, "report", "sam", "lora", "head", "full") == accuracy.MUSTS
    assert {n for _, own, peers, *_ in accuracy.BARS for n in (own, *peers)} <= {*accuracy.MUSTS}
    assert {*accuracy.MUSTS, *accuracy.SETS["ablations"]} == {*accuracy.MODELS} - {"lora-pretrained"}
    asked = plan("--models", "all", "--pretrain", "a", "model.rank=4", "model.alpha=4")
    assert len(asked.models) == 30 and asked.models == tuple(accuracy.MODELS)
    changes = {name: config.differences(asked.common, asked.settings(name)) for name in asked.models}
    same = {name for name, lines in changes.items() if not lines}
    assert same == {"lora", "lora-pretrained", "rank-4", "lora-attention-mlp", "scale-1", "tta"}
    assert changes["rank-16"] == ["model.rank: 4 -> 16", "model.alpha: 4.0 -> 16.0"]
    assert changes["no-ema"] == ["train.ema: 0.99 -> 0.0"]
    assert all(asked.settings(name).data.scale == 1.0 for name in unets.NETS)


def test_the_report_keeps_its_recipe_but_not_its_budget():
    found = plan("train.batch=8", "data.root=elsewhere", "train.precision=bf16", "model.width=64").settings("report")
    own = config.load(Path(accuracy.HERE).parent / "configs" / "report.toml")
    assert (found.train.epochs, found.train.batch, found.train.precision) == (2, 8, "bf16")
    assert (found.data.root, found.data.crop, found.data.select, found.model.weights) == (
        "elsewhere",
        64,
        "test",
        "none",
    )
    assert (found.augment, found.loss, found.instances) == (own.augment, own.loss, own.instances)
    assert (found.model.rank, found.model.alpha, found.model.head, found.model.pattern) == (
        *(4, 16.0, "sam"),
        own.model.pattern,
    )
    assert (found.train.lr_adapter, found.train.schedule, found.train.best) == (1e-4, "step", "dice")
    drops = {epochs: plan(f"train.epochs={epochs}").settings("report").train.step_epochs for epochs in (2, 30, 45)}
    assert drops == {2: 1, 30: 10, 45: 15} and own.train.step_epochs == 10


@pytest.mark.parametrize(
    "name, of_encoder, of_decoder",
    [("lora-qkv", 10, 0), ("lora-attention", 20, 0), ("lora-attention-mlp", 40, 0), ("sam-attention-decoder", 20, 28)],
)
def test_patterns_match_the_layers_they_are_named_after(name, of_encoder, of_decoder):
    pattern = re.compile(plan().settings(name).model.pattern)
    linears = {name for name, module in build_sam().named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name for name in linears if pattern.search(name)}  # as `lora.inject` looks
    of = [sum(layer.startswith(part) for layer in layers) for part in ("image_encoder.", "mask_decoder.")]
    assert of == [of_encoder, of_decoder] and sum(of) == len(layers)


def test_jobs_fold_after_fold_and_nothing_twice():
    asked = plan("--models", "shallow,lora,rank-8,tta", "--folds", "1,0", "--seeds", "0,3")
    found = [(job.run.relative_to("runs").as_posix(), job.config.data.fold) for job in asked.training(again=False)]
    expected = [(s, f, name) for s in (0, 3) for f in (1, 0) for name in ("shallow-scratch", "lora")]
    assert found == [(f"{name}/seed{s}/fold{f}", f) for s, f, name in expected]
    assert [job.config.train.seed for job in asked.training(again=False)] == [0] * 4 + [3] * 4
    again = asked.training(again=True)
    assert [job.run.as_posix() for job in again] == [f"runs/tta/seed{s}/fold{f}" for s in (0, 3) for f in (1, 0)]
    assert again[0].trainer[-2:] == ("--tta-of", "runs/lora/seed0/fold1")
    assert len({job.lock for job in [*asked.training(again=False), *again]}) == 12
    assert asked.pretraining() == []


def test_each_starts_from_its_own_pretraining():
    options = ["--pretrain", "a", "--pretrain", "b", "--pretrain-set", "train.epochs=7"]
    asked = plan("--models", "deep,report,lora,head,sam,scale-2,tta", "--folds", "2", *options)
    bases = {job.run.name: job for job in asked.pretraining()}
    parts = ("sam-scale-2", "instance-scale-1", "sam-scale-1", "instance-scale-2")
    names = ("deep", *(f"nucsam-{part}" for part in parts))
    assert tuple(bases) == names
    for name, job in bases.items():
        c = job.config
        assert (c.data.root, c.data.fold, c.data.select, c.train.epochs) == ("runs/pretrain/data", "all", "inner", 7)
        assert (c.model.train, c.model.norms) == (("lora", "pinned") if name == "deep" else ("full", "moving"))
        assert (c.data.crop, c.train.lr_adapter, c.augment.d4) == (256, 1e-3, True)  # configs/standin.toml's for all
    jobs = {job.run.parts[1]: job for job in asked.training(again=False)}
    assert list(jobs) == ["deep", "deep-scratch", "report", "lora", "head", "sam", "scale-2"]
    assert jobs["deep"].trainer[-2:] == ("--start", "runs/pretrain/deep/adapter.safetensors")
    assert jobs["deep-scratch"].trainer[-2:] == ("--net", "deep")
    assert jobs["deep"].config == jobs["deep-scratch"].config
    for name, base in {
        "report": names[1],
        "lora": names[2],
        "head": names[2],
        "sam": names[3],
        "scale-2": names[4],
    }.items():
        assert jobs[name].config.model.weights == f"runs/pretrain/{base}/merged.safetensors"
        assert jobs[name].trainer[-2:] == ("--export", f"runs/pretrain/{base}")


def test_from_mobilesams_weights_only_one_row_of_nucsam_is_pretrained():
    models = "deep,report,lora,lora-pretrained,tta"
    asked = plan("--models", models, "--pretrain", "a", "model.weights=auto")
    deep, base = asked.pretraining()
    assert (deep.run.name, base.run.name) == ("deep", "nucsam-instance-scale-1")
    assert (base.config.model, base.config.train.lr_adapter) == (asked.common.model, asked.common.train.lr_adapter)
    assert (base.config.augment, base.config.train.epochs) == (deep.config.augment, deep.config.train.epochs)
    jobs = {job.run.parts[1]: job for job in [*asked.training(again=False), *asked.training(again=True)]}
    assert list(jobs) == ["deep", "deep-scratch", "report", "lora", "lora-pretrained", "tta"]
    for name in ("report", "lora"):
        assert jobs[name].config.model.weights == "auto" and "--export" not in jobs[name].trainer
    assert jobs["lora-pretrained"].config.model.weights == "runs/pretrain/nucsam-instance-scale-1/merged.safetensors"
    assert jobs["tta"].trainer[-2:] == ("--tta-of", "runs/lora/seed0/fold4")


def test_mistakes_are_named():
    for arguments, message in (
        (["--models", "lora,unet"], "--models: found unet, expected unets, musts"),
        (["--models", "tta"], "--models: found one that scores the runs of lora"),
        (["--folds", "0,5"], r"--folds: found \[5\], expected 0 to 4"),
        (["data.root=a", "--pretrain", "./a"], "--pretrain: found a, with images that are tested on"),
        (["--models", "lora,lora-pretrained"], "--models: found lora-pretrained, expected --pretrain"),
        (["train.seed=3"], r"train\.seed: found 3, expected none beside --seeds"),
        (["data.fold=2"], r"data\.fold: found 2, expected none beside --folds"),
        (["a.toml", "b.toml"], r"found 2 configurations \(a.toml, b.toml\)"),
        (["train.epoch=3"], "did you mean train.epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(*arguments)


def test_images_to_pretrain_on_are_links(tmp_path):
    from nucsam.data import find_records

    a, b = tmp_path / "a", tmp_path / "b"
    for root, seed in ((a, 1), (b, 2)):
        write_dataset(root, images=3, size=64, seed=seed)
    for _ in range(2):
        accuracy.link([a, b], tmp_path / "both")
    organs = {path.name for path in a.iterdir() if path.is_dir()}, {path.name for path in b.iterdir() if path.is_dir()}
    wanted = {f"a, {name}" for name in organs[0]} | {f"b, {name}" for name in organs[1]}
    assert {path.name for path in (tmp_path / "both").iterdir()} == wanted
    records = find_records(tmp_path / "both", group=GROUP)
    assert len(records) == 6 and {record.organ for record in records} == wanted
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for others in ([a], [a, b, tmp_path / "c"]):
        if len(others) == 3:
            write_dataset(others[-1], images=2, size=64, seed=3)
        with pytest.raises(ValueError, match="links to other data"):
            accuracy.link(others, tmp_path / "both")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "c", tmp_path / "elsewhere" / "a")
    with pytest.raises(ValueError, match="elsewhere/a beside another folder of that name"):
        accuracy.link([a, tmp_path / "elsewhere" / "a"], tmp_path / "new")
    with pytest.raises(ValueError, match="links to other data"):
        accuracy.link([tmp_path / "elsewhere" / "a", b], tmp_path / "both")
    organ = next(path for path in a.iterdir() if path.is_dir())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "renamed").symlink_to(organ, target_is_directory=True)
    with pytest.raises(ValueError, match="d, with images that are tested on"):
        plan(f"data.root={a}", "--pretrain", str(tmp_path / "d"))
    with pytest.raises(ValueError, match="holds no ORGAN/tissue images"):
        accuracy.link([tmp_path / "both" / "nothing"], tmp_path / "new")


def test_groups_of_images_to_pretrain_on():
    matches = {name: re.search(GROUP, name)[1] for name in ("image07_1", "image07_2", "00ae65c1c6631ae6", "a_b")}
    assert matches == {
        "image07_1": "image07",
        "image07_2": "image07",
        "00ae65c1c6631ae6": "00ae65c1c6631ae6",
        "a_b": "a_b",
    }


def test_spread_by_hand():
    found = accuracy.spread(
        np.array([[60.0, 64.0], [62.0, 70.0]])
    )  # 2 seeds x 2 folds: fold means 61, 67; seeds 62, 66
    assert found == pytest.approx({"mean": 64.0, "folds": math.sqrt(18), "seeds": math.sqrt(8)})
    nan = math.nan
    found = accuracy.spread(np.array([[60.0, nan], [62.0, 70.0]]))  # one fold that both seeds have
    assert found == pytest.approx({"mean": 65.5, "folds": math.sqrt(40.5), "seeds": math.sqrt(2)})
    assert accuracy.spread(np.array([[60.0]])) == pytest.approx({"mean": 60, "folds": nan, "seeds": nan}, nan_ok=True)
    nothing = {"mean": nan, "folds": nan, "seeds": nan}
    assert accuracy.spread(np.array([[nan]])) == pytest.approx(nothing, nan_ok=True)


def test_table_of_a_finished_benchmark(bench, tmp_path):
    arguments = ["--models", "deep,report,lora,rank-8,head", "--folds", "0,1", "--seeds", "0,1"]
    status, output, started = bench(*arguments)
    assert status == 0 and len(started) == 4 * 2 * 2  # rank-8 is what lora is
    document = json.loads(output.splitlines()[-1])
    assert document == json.loads((tmp_path / "runs" / "accuracy.json").read_text())
    rows = {row["model"]: row for row in document["rows"]}
    assert list(rows) == ["deep-scratch", "report", "lora", "rank-8", "head"]
    # AJI 60 + 2 fold + seed: mean 61.5; fold means 60.5 and 62.5, seed means 61 and 62
    assert rows["lora"]["aji"] == pytest.approx({"mean": 61.5, "folds": math.sqrt(2), "seeds": math.sqrt(0.5)})
    assert rows["rank-8"]["aji"] == rows["lora"]["aji"]
    facts = [rows["deep-scratch"][name] for name in ("presentations", "train_seconds", "peak_gib")]
    assert facts == [64, 60, 1.5]
    assert [(b["beside"], b["difference"] and round(b["difference"], 6), b["met"]) for b in document["bars"]] == [
        ("deep-scratch", 10.0, True),  # AJI
        ("deep-scratch", 0.0, False),  # PQ
        ("", None, None),  # full is not there
        ("", None, None),  # nor is sam
        ("", -2.099, True),  # 1000 parameters
    ]
    text = (tmp_path / "runs" / "accuracy.md").read_text()
    assert text in output and text.count("not measured") == 2 and "`deep-scratch`; from scratch" in text
    assert "| `head`; base weights: random | 80.00 ± 0.00 (0.00) | 56.50 ± 1.41 (0.71) |" in text
    assert text.count("EPOCH CHOSEN ON THE TEST IMAGES") == 1 and "INCOMPLETE" not in text
    assert "`report`; EPOCH CHOSEN ON THE TEST IMAGES" in text and "`train.epochs 100 -> 2`" in text
    assert "data.root" not in text
    lines = list(csv.DictReader((tmp_path / "runs" / "accuracy.csv").open()))
    assert len(lines) == 20
    assert [(x["seed"], x["fold"], float(x["aji"])) for x in lines[:2]] == [("0", "0", 0.5), ("0", "1", 0.52)]
    assert (tmp_path / "runs" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"

    assert bench(*arguments)[2] == []  # all is done
    with pytest.raises(ValueError, match=r"another configuration.*\n.*train\.epochs: 2 -> 3"):
        bench(*arguments, "train.epochs=3")


def test_a_failed_run_is_missing_and_done_by_a_rerun(bench, tmp_path):
    arguments = ["--models", "head,lora,full", "--folds", "0,1"]
    (tmp_path / "fails").touch()
    status, output, started = bench(*arguments)
    assert status == 1 and len(started) == 6
    assert "`head`; INCOMPLETE: seed 0, fold 1 missing" in output
    (tmp_path / "fails").unlink()
    status, output, started = bench(*arguments)
    assert status == 0 and [run for run, _ in started] == ["runs/head/seed0/fold1"]
    assert "INCOMPLETE" not in output


def test_a_run_that_is_not_measured_is_not_done(bench, tmp_path):
    (tmp_path / "killed").touch()
    assert bench("--models", "lora", "--folds", "0")[0] == 1
    (tmp_path / "killed").unlink()
    status, _, started = bench("--models", "lora", "--folds", "0")
    assert status == 0 and len(started) == 1


def test_with_pretraining_a_net_from_scratch_stays_one(bench, tmp_path):
    write_dataset(tmp_path / "other", images=2, size=64, seed=1)
    assert bench("--models", "deep", "--folds", "0")[2] == [["runs/deep-scratch/seed0/fold0", ["--net", "deep"]]]
    _, output, started = bench("--models", "deep", "--folds", "0", "--pretrain", "other")
    assert [run for run, _ in started] == ["runs/pretrain/deep", "runs/deep/seed0/fold0"]
    assert "| `deep`; pretrained |" in output and "| `deep-scratch`; from scratch |" in output


def test_pretraining_comes_first(bench, tmp_path):
    write_dataset(tmp_path / "other", images=2, size=64, seed=1)
    status, _, started = bench("--models", "deep,lora,tta", "--folds", "0", "--pretrain", "other")
    assert status == 0
    runs = [run.removeprefix("runs/") for run, _ in started]
    last = ["deep/seed0/fold0", "deep-scratch/seed0/fold0", "lora/seed0/fold0", "tta/seed0/fold0"]
    assert runs == ["pretrain/deep", "pretrain/nucsam-instance-scale-1", *last]
    rows = json.loads((tmp_path / "runs" / "accuracy.json").read_text())["rows"]
    assert [(row["model"], row["runs"][0]["base"]) for row in rows] == [
        ("deep", "pretrained"),
        ("deep-scratch", "none"),
        *((name, "runs/pretrain/nucsam-instance-scale-1/merged.safetensors") for name in ("lora", "tta")),
    ]


def test_a_child_trains_scores_and_measures(tiny, tmp_path):
    """The real one: a U-Net, then a second that starts from it, then a finished one again, which does nothing."""
    settings = tmp_path / "run.toml"
    settings.write_text(config.to_toml(tiny("train.epochs=1", "train.lr_adapter=1e-3")))
    first, second = tmp_path / "first", tmp_path / "second"
    accuracy.child(["--net", "shallow", str(settings), "--out", str(first), "--resume"])
    start = ["--start", str(first / "adapter.safetensors")]
    accuracy.child(["--net", "shallow", *start, str(settings), "--out", str(second), "--resume"])
    with pytest.raises(ValueError, match=r"unfinished: found no scores\.json, expected a finished pretraining"):
        start = ["--start", str(tmp_path / "unfinished" / "adapter.safetensors")]
        accuracy.child(["--net", "shallow", *start, str(settings), "--out", str(tmp_path / "third")])
    losses = [json.loads((run / "metrics.jsonl").read_text())["loss"] for run in (first, second)]
    assert losses[1] < losses[0]
    for run in (first, second):
        measured = json.loads((run / "benchmark.json").read_text())
        assert 0.1 < measured["peak_gib"] < 64 and 0 < measured["inference_seconds"] < 60
        assert set(json.loads((run / "scores.json").read_text())["headline"]) == {"dice", "aji", "pq"}


def test_a_child_starts_from_an_export_and_scores_again(tiny, tmp_path, monkeypatch):
    """The real one: a stand-in, LoRA on its merged weights, and the same run with test-time augmentation."""
    base, run, again = (tmp_path / name for name in ("base", "run", "again"))
    merged = base / "merged.safetensors"
    made = tiny("train.epochs=1", "model.train=full", "model.width=32", "instances.confidence=0")
    for name, text in (
        ("base", config.to_toml(made)),
        ("run", config.to_toml(config.override(made.to_dict(), ["model.train=lora", f"model.weights={merged}"]))),
    ):
        (tmp_path / f"{name}.toml").write_text(text)
    accuracy.child([str(tmp_path / "base.toml"), "--out", str(base), "--resume"])
    accuracy.child(["--export", str(base), str(tmp_path / "run.toml"), "--out", str(run), "--resume"])
    asked, score = [], scoring.score_images
    monkeypatch.setattr(scoring, "score_images", lambda *a, **how: asked.append(how) or score(*a, **how))
    accuracy.child(["--tta-of", str(run), str(tmp_path / "run.toml"), "--out", str(again)])
    assert asked == [{"tta": True}]
    scores = [json.loads((out / "scores.json").read_text()) for out in (run, again)]
    assert [s["base"]["source"] for s in scores] == [str(merged)] * 2
    assert scores[0]["headline"].keys() == scores[1]["headline"].keys()
    once, eight = (json.loads((out / "benchmark.json").read_text()) for out in (run, again))
    assert eight["peak_gib"] == once["peak_gib"] and eight["inference_seconds"] > 0
