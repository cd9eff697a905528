"""How accurate is nucsam beside the U-Nets, the report it started from, and itself with one thing changed?

    python benchmarks/accuracy.py [CONFIG.toml] [table.key=value ...] --out RUNS [--models musts] [--folds 0,1]
        [--seeds 0] [--pretrain DATA ...] [--pretrain-set table.key=value ...]
        [--unets-set table.key=value ...]
    accelerate launch --multi_gpu --num_processes 4 benchmarks/accuracy.py ...              one job on each GPU
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 benchmarks/accuracy.py ...   two on the CPU

Every model of `MODELS` is a table of differences from CONFIG.toml (configs/nuinsseg.toml) and the overrides, which hold
for all: the same images, folds, epochs, batch and loop (`--unets-set` holds for the U-Nets alone: more epochs, where
the budget is time). `--models` takes names and the names of `SETS`. A job is one
model, seed and fold, a run directory of `nucsam train` under RUNS; jobs are shared, skipped where finished and resumed
where killed as those of `nucsam folds` are. One metric is the mean over a fold's images, then over folds.

`--pretrain` first trains on other images (folders in NuInsSeg's layout), on all but the inner split that chooses the
epoch, by the images, augmentation and epochs of configs/standin.toml, then `--pretrain-set`: each U-Net, which has a
row from scratch beside it, and of nucsam `lora-pretrained`, the LoRA and head of a base that `lora` then starts from.
All others of nucsam start from `model.weights` themselves. Where these are none, all of nucsam's weights are
pretrained, once for each head and scale, as a stand-in for MobileSAM's that each starts from.

Writes RUNS/accuracy.md, .json, .csv (a line a run) and .png; prints the table, then one JSON line.
"""

import argparse
import csv
import io
import json
import math
import os
import resource
import shutil
import statistics
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
from nucsam import config as configuration
from nucsam import folds
from nucsam.cli import default_configuration
from nucsam.config import Config

HERE = Path(__file__).resolve().parent
METRICS = ("dice", "aji", "pq")
TIMED = 16  # test images whose inference is timed, after one to warm up
LINKED = "tissue images"  # what makes a folder of NuInsSeg's layout an organ
GROUP = r"^(.*?)(_\d+)?$"  # images to pretrain on that are cut from one image differ in a last number
UNET = {"data.scale": 1.0, "model.weights": "none", "train.lr_adapter": 1e-3, "train.lr_head": 1e-3}
ATTENTION = r"image_encoder\..*\.attn\."
# A model from a file of its own takes all of that file but these, which are the benchmark's.
SHARED = {
    "data": set(Config().to_dict()["data"]) - {"select", "scale"},
    "model": {"weights"},
    "train": {"epochs", "batch", "accumulate", "precision", "checkpoint", "validate_every", "save_minutes"},
}


@dataclass(frozen=True)
class Model:
    """A row: what it changes in the common configuration, or a finished one's runs scored in another way."""

    differences: Mapping[str, Any] = field(default_factory=dict)
    net: str = ""  # of unets.NETS; "" = nucsam
    file: str = ""  # in configs/: its values in place of the common ones
    tta: str = ""  # the model whose runs are scored again, with test-time augmentation
    pretrains: bool = False  # on other images, also from MobileSAM's weights; U-Nets do


def _rank(rank: int) -> Model:
    return Model({"model.rank": rank, "model.alpha": float(rank)})


MODELS = {
    **{
        name: Model(UNET, net=name)
        for name in ("shallow", "deep", "attention", "residual-attention", "two-stage", "dual-decoder")
    },
    "report": Model(file="report.toml"),
    "lora": Model(),
    "head": Model({"model.train": "head"}),
    "full": Model({"model.train": "full", "train.lr_adapter": 2e-4}),  # what LoRA needs is too much for all weights
    **{f"rank-{rank}": _rank(rank) for rank in (2, 4, 8, 16)},
    "lora-qkv": Model({"model.pattern": ATTENTION + "qkv"}),
    "lora-attention": Model({"model.pattern": ATTENTION + "(qkv|proj)"}),
    "lora-attention-mlp": Model({"model.pattern": r"image_encoder\..*\.(attn\.(qkv|proj)|mlp\.fc[12])"}),
    "lora-pretrained": Model(pretrains=True),
    "sam": Model({"model.head": "sam"}),
    "sam-attention": Model({"model.head": "sam", "model.pattern": ATTENTION + "(qkv|proj)"}),
    "sam-attention-decoder": Model(
        {"model.head": "sam", "model.pattern": rf"{ATTENTION}(qkv|proj)|mask_decoder\..*attn.*\.([qkv]|out)_proj"}
    ),
    "no-cross-entropy": Model({"loss.cross_entropy": 0.0}),
    "no-tversky": Model({"loss.tversky": 0.0}),
    "no-distance": Model({"loss.distance": 0.0}),
    "distance-1": Model({"loss.distance": 1.0}),
    "boundary-1": Model({"loss.boundary": 1.0}),
    "scale-1": Model({"data.scale": 1.0}),
    "scale-2": Model({"data.scale": 2.0}),
    "tta": Model(tta="lora"),
    "no-ema": Model({"train.ema": 0.0}),
}
UNETS = tuple(name for name, model in MODELS.items() if model.net)
MUSTS = (*UNETS, "report", "lora", "head", "full")
SETS = {"unets": UNETS, "musts": MUSTS, "ablations": tuple(name for name in MODELS if name not in MUSTS), "all": MODELS}
BARS = (  # what is asked, row, the rows whose best it is compared with, metric, least difference in points
    ("lora at least 4 AJI over the best U-Net", "lora", UNETS, "aji", 4.0),
    ("lora at least 4 PQ over the best U-Net", "lora", UNETS, "pq", 4.0),
    ("lora within 2 AJI of full", "lora", ("full",), "aji", -2.0),
    ("instance head at least 5 AJI over the sam head", "lora", ("sam",), "aji", 5.0),
)


# ---- what is to be done ----


@dataclass(frozen=True)
class Plan:
    """The command line, checked."""

    common: Config
    out: Path
    models: tuple[str, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    pretrain: tuple[Path, ...] = ()
    pretrain_set: tuple[str, ...] = ()
    unets_set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"--models: found {', '.join(unknown)}, expected {', '.join([*SETS, *MODELS])}")
        if wrong := [fold for fold in self.folds if not 0 <= fold < self.common.data.folds]:
            raise ValueError(f"--folds: found {wrong}, expected 0 to {self.common.data.folds - 1}")
        if missing := {MODELS[name].tta for name in self.models} - {"", *self.models}:
            raise ValueError(f"--models: found one that scores the runs of {', '.join(missing)}, expected these too")
        if any(path.resolve() == Path(self.common.data.root).resolve() for path in self.pretrain):
            raise ValueError(f"--pretrain: found {self.common.data.root}, which is tested on; expected other images")

    def rows(self) -> list[tuple[str, bool]]:
        """(model, whether it is pretrained) in the order of the table."""
        found = [(name, self.pretrains(name)) for name in self.models]
        return [(n, p) for n, first in found for p in ((True, False) if first and MODELS[n].net else (first,))]

    def pretrains(self, name: str) -> bool:
        """Whether a model has a pretrained row."""
        model = MODELS[name]
        return bool(self.pretrain) and bool(model.net or model.pretrains or self.common.model.weights == "none")

    def settings(self, name: str) -> Config:
        """A model's configuration; fold and seed are the common ones."""
        model, tables = MODELS[MODELS[name].tta or name], self.common.to_dict()
        if model.file:
            own = configuration.load(HERE.parent / "configs" / model.file).to_dict()
            tables = {t: {k: (v if k in SHARED.get(t, ()) else own[t][k]) for k, v in tables[t].items()} for t in own}
        own = changed(tables, model.differences, f"model {name}")
        return configuration.override(own.to_dict(), self.unets_set, "--unets-set") if model.net else own

    def asks(self, name: str) -> tuple[str, str, bool, Config]:
        """What tells a model's runs from another's."""
        return MODELS[name].net, MODELS[name].tta, self.pretrains(name), self.settings(name)

    def base(self, name: str) -> tuple[str, Config]:
        """Name and configuration of the pretraining that a model starts from."""
        model, own = MODELS[name], self.settings(name)
        recipe = tomllib.loads((HERE.parent / "configs" / "standin.toml").read_text(encoding="utf-8"))
        differences = {f"{table}.{key}": value for table, values in recipe.items() for key, value in values.items()}
        images = {"data.root": str(self.out / "pretrain" / "data"), "data.layout": "nuinsseg", "data.group": GROUP}
        differences |= images | {"data.select": "inner"}
        if model.net or self.common.model.weights != "none":
            whole = {n for n in differences if n.startswith("model.")} | {"train.lr_adapter"}
            differences = {n: v for n, v in differences.items() if n not in whole}
        if model.net:
            key = model.net
            differences |= model.differences
        else:
            key = f"nucsam-{own.model.head}-scale-{own.data.scale:g}"
            differences |= {"model.head": own.model.head, "data.scale": own.data.scale}
        made = changed(self.common.to_dict(), differences, f"pretraining {key}")
        return key, configuration.override(made.to_dict(), self.pretrain_set, "--pretrain-set")

    def pretraining(self) -> list[folds.Job]:
        """A job for each pretraining."""
        jobs = {}
        for name in dict.fromkeys(MODELS[name].tta or name for name in self.models if self.pretrains(name)):
            key, settings = self.base(name)
            run, lock = self.out / "pretrain" / key, self.out / ".locks" / f"pretrain,{key}"
            command = trainer("--net", MODELS[name].net)
            jobs[key] = folds.Job(f"pretraining {key}", settings.data.fold, settings, run, lock, command)
        return [*jobs.values()]

    def training(self, again: bool) -> list[folds.Job]:
        """The jobs of all rows, seeds and folds, fold after fold; `again`: those that score runs of others."""
        rows = [(name, start) for name, start in self.rows() if bool(MODELS[name].tta) == again]
        jobs = [self.job(*row, seed, fold) for seed in self.seeds for fold in self.folds for row in rows]
        return list(dict.fromkeys(jobs))

    def job(self, name: str, start: bool, seed: int, fold: int) -> folds.Job:
        """A row's run; a row that asks for what an earlier model of `MODELS` does has that model's."""
        name = next(n for n in MODELS if self.asks(n) == self.asks(name))
        model, settings, label = MODELS[name], self.settings(name), row_name(self, name, start)
        settings = changed(settings.to_dict(), {"data.fold": fold, "train.seed": seed}, f"model {name}")
        run, place = self.out / label / f"seed{seed}" / f"fold{fold}", f"{label},seed{seed},fold{fold}"
        command = ["--net", model.net]
        if start:
            base = self.out / "pretrain" / self.base(MODELS[name].tta or name)[0]
            if model.net:
                command += ["--start", str(base / "adapter.safetensors")]
            else:
                weights = base.with_name(f"{base.name}.safetensors")
                settings = changed(settings.to_dict(), {"model.weights": str(weights)}, f"model {name}")
                command += ["--export", str(base)]
        if model.tta:
            command = ["--tta-of", str(self.job(model.tta, start, seed, fold).run)]
        label = f"{label}, seed {seed}"
        return folds.Job(label, fold, settings, run, self.out / ".locks" / place, trainer(*command))


def row_name(plan: Plan, name: str, start: bool) -> str:
    """A row's name, and its folder's: a model's, but of a U-Net from scratch where there is a pretrained one too."""
    return f"{name}-scratch" if plan.pretrains(name) and not start else name


def changed(tables: dict[str, dict[str, Any]], differences: Mapping[str, Any], source: str) -> Config:
    """The configuration of `tables` with {"table.key": value} on top."""
    tables = {table: dict(values) for table, values in tables.items()}
    for name, value in differences.items():
        table, key = name.split(".")
        tables[table][key] = value
    return Config.from_dict(tables, source)


def trainer(*arguments: str) -> tuple[str, ...]:
    """The command of a job's child, before its configuration."""
    return (sys.executable, str(HERE / "accuracy.py"), "--child", *arguments)


def link(roots: Iterable[Path], folder: Path) -> None:
    """One data set of several in NuInsSeg's layout: `folder` gets a link for each organ of each.

    ValueError where a root has none, or `folder` has links to others.
    """
    wanted = {}
    for root in roots:
        organs = [path.parent.resolve() for path in sorted(root.glob(f"*/{LINKED}"))]
        if not organs:
            raise ValueError(f"--pretrain: {root} holds no ORGAN/{LINKED}, expected a folder in NuInsSeg's layout")
        wanted |= {f"{root.resolve().name}, {organ.name}": organ for organ in organs}
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted({path.name for path in folder.iterdir()} - wanted.keys()):
        raise ValueError(
            f"--pretrain: {folder} has links to other data ({others[0]}), expected the same or another --out"
        )
    for name, organ in wanted.items():
        with suppress(FileExistsError):  # of a run before, or of a process beside
            (folder / name).symlink_to(organ, target_is_directory=True)


# ---- the child: one run ----


def child(arguments: Sequence[str]) -> None:
    """Train and score one run, or score a finished one again, and measure it: `benchmark.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    parser.add_argument("--net", default="", help="of unets.NETS; none = nucsam")
    parser.add_argument("--start", type=Path, help="adapter file that the U-Net starts from")
    parser.add_argument("--export", type=Path, help="run whose merged weights are model.weights")
    parser.add_argument("--tta-of", type=Path, help="run to score again with test-time augmentation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)
    settings = configuration.load(args.settings)

    import unets

    from nucsam import model
    from nucsam.export import export
    from nucsam.train import train

    if args.tta_of:
        score_again(args.tta_of, args.out, settings)
        return
    if args.export and not Path(settings.model.weights).is_file():
        export(args.export, Path(settings.model.weights), force=True)  # atomic, and another child's has the same bytes
    build = partial(unets.build, args.net, start=args.start) if args.net else model.build
    train(settings, args.out, resume=args.resume, build=build)
    found = {"peak_gib": peak_gib(), "inference_seconds": inference_seconds(args.out, settings, build)}
    (args.out / "benchmark.json").write_text(json.dumps(found) + "\n")


def peak_gib() -> float:
    """The most memory that this process has had: allocated on its GPU, else resident."""
    import torch

    from nucsam.scoring import uses_gpu

    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def finished(run: Path, settings: Config, build: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Of a finished run: net with its best weights, samples of its test images, accelerator, the adapter's metadata."""
    from accelerate import Accelerator

    from nucsam import checkpoint, data, scoring

    base = checkpoint.run_base(run, settings)
    net = build(settings.model, base, seed=settings.train.seed)
    metadata = checkpoint.load_adapter(run / "adapter.safetensors", net, base)
    accelerator = Accelerator(cpu=not scoring.uses_gpu(), mixed_precision=metadata["precision"])
    net = accelerator.prepare_model(net.eval(), evaluation_mode=True)  # as training scores it
    records, split = scoring.find_images(settings.data)
    samples = data.Samples(
        [records[i] for i in split.test or split.inner], memory_gib=settings.data.memory, progress=False
    )
    return net, samples, accelerator, metadata


def inference_seconds(run: Path, settings: Config, build: Any, **how: Any) -> float:
    """Median wall time from an image in memory to its label map, one image at a time."""
    from nucsam import scoring

    net, samples, *_ = finished(run, settings, build)
    predictor, seconds = scoring.predictor(net, settings, **how), []
    for k in range(1 + min(TIMED, len(samples))):
        image = samples[max(0, k - 1)].image
        began = time.perf_counter()
        predictor.predict(image)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def score_again(run: Path, out: Path, settings: Config) -> None:
    """The test images of a finished nucsam run with test-time augmentation, as a run directory `out`."""
    from nucsam import evaluate, model, scoring

    net, samples, accelerator, metadata = finished(run, settings, model.build)
    found = scoring.score_images(net, settings, samples, range(len(samples)), accelerator, tta=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.toml", "environment.json", "metrics.jsonl", "benchmark.json"):
        shutil.copyfile(run / name, out / name)
    measured = json.loads((out / "benchmark.json").read_text())
    measured["inference_seconds"] = inference_seconds(run, settings, model.build, tta=True)
    (out / "benchmark.json").write_text(json.dumps(measured) + "\n")
    evaluate.write_json(out / "scores.json", scoring.describe(found, metadata, of="test", untrained=False))


# ---- the table ----


def results(job: folds.Job) -> dict[str, Any] | None:
    """What a finished run measured; None while it is not finished. Scores are 0 to 1."""
    if (scores := job.scores()) is None:
        return None
    environment = json.loads((job.run / "environment.json").read_text())
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    path = job.run / "benchmark.json"
    measured = json.loads(path.read_text()) if path.is_file() else {"peak_gib": math.nan, "inference_seconds": math.nan}
    return {
        **scores["headline"],
        "epoch": scores["epoch"],
        "on_test": scores["epoch_chosen_by"].endswith("test split"),
        "base": scores["base"]["source"],
        "trainable": environment["parameters_trainable"],
        "parameters": environment["parameters"],
        "presentations": environment["images"]["train"] * job.config.train.epochs,
        "train_seconds": sum(line.get("seconds", 0.0) for line in lines),
        **measured,
    }


def row(plan: Plan, name: str, start: bool) -> dict[str, Any]:
    """A row of the table: means over seeds and folds, and spreads."""
    runs = {(s, f): results(plan.job(name, start, s, f)) for s in plan.seeds for f in plan.folds}
    if MODELS[name].net:  # MobileSAM's, which its run names, does not touch it
        runs = {key: run and {**run, "base": "pretrained" if start else "none"} for key, run in runs.items()}
    done = [run for run in runs.values() if run]
    line = {
        "model": row_name(plan, name, start),
        "kind": name,
        "pretrained": start,
        "missing": [f"seed {s}, fold {f}" for (s, f), run in runs.items() if run is None],
        "runs": [{"seed": s, "fold": f, **run} for (s, f), run in runs.items() if run],
        "on_test": any(run["on_test"] for run in done),
    }
    for metric in METRICS:
        values = np.array([[(runs[s, f] or {}).get(metric, math.nan) for f in plan.folds] for s in plan.seeds])
        line[metric] = spread(100 * values)
    for fact in ("trainable", "parameters", "presentations", "train_seconds", "inference_seconds", "peak_gib"):
        line[fact] = statistics.fmean(run[fact] for run in done) if done else math.nan
    return line


def spread(values: np.ndarray) -> dict[str, float]:
    """Of values (seeds, folds), NaN where there is none: mean; sample standard deviation over folds (of the means over
    seeds), and over seeds (of the means over those folds that all seeds have). NaN where there are fewer than two."""
    present = ~np.isnan(values)
    fold_means = np.array([column[ok].mean() for column, ok in zip(values.T, present.T) if ok.any()])
    seed_means = values[:, present.all(0)].mean(1) if present.all(0).any() else np.array([])
    deviation = [float(m.std(ddof=1)) if len(m) > 1 else math.nan for m in (fold_means, seed_means)]
    return {
        "mean": float(fold_means.mean()) if len(fold_means) else math.nan,
        "folds": deviation[0],
        "seeds": deviation[1],
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far over or under each bar of `BARS`; only those whose rows are there, on the same folds."""
    found = []
    for text, own, peers, metric, least in BARS:
        mine = [line for line in rows if line["kind"] == own and line["runs"]]
        others = [line for line in rows if line["kind"] in peers and line["runs"]]
        if not mine or not others:
            continue
        best = max(others, key=lambda line: line[metric]["mean"])
        difference = mine[0][metric]["mean"] - best[metric]["mean"]
        found.append({"bar": text, "beside": best["model"], "difference": difference, "met": difference >= least})
        found[-1]["complete"] = not any(line["missing"] for line in (*mine, *others))
    return found


def markdown(plan: Plan, rows: Sequence[dict[str, Any]], met: Sequence[dict[str, Any]]) -> str:
    """The table, the bars, and all that was set."""
    head = ["model", *("Dice", "AJI", "PQ"), "trained", "parameters", "training, min", "inference, ms", "peak, GiB"]
    lines = []
    for line in rows:
        marks = ["EPOCH CHOSEN ON THE TEST IMAGES"] if line["on_test"] else []
        marks += [f"INCOMPLETE: {'; '.join(line['missing'])} missing"] if line["missing"] else []
        marks += ["base weights: random"] if not line["pretrained"] and _random(plan, line["kind"]) else []
        facts = [f"{line[k]:,.0f}" if line["runs"] else "-" for k in ("trainable", "parameters")]
        facts += [
            _number(line["train_seconds"] / 60),
            _number(1000 * line["inference_seconds"], 0),
            _number(line["peak_gib"], 2),
        ]
        lines.append(["; ".join([f"`{line['model']}`", *marks]), *(_cell(line[metric]) for metric in METRICS), *facts])
    notes = [
        f"Folds {_listed(plan.folds)} of {plan.common.data.folds}, seeds {_listed(plan.seeds)}. "
        "Percent: mean over a fold's images, then over folds; ± standard deviation over folds; in brackets over seeds.",
        f"Budget: {'; '.join(budgets(plan, rows)) or 'no run yet'}. Where the epoch is chosen on the test images, the "
        "inner split is trained on too.",
        "Training: mean over runs, without validation. Inference: median of one image at a time, instances included. "
        "Peak: of the training process, validation included (resident on a CPU, allocated on a GPU).",
    ]
    parts = ["## Accuracy", "", *_table(head, lines), "", *(f"- {note}" for note in notes), ""]
    if met:
        cells = [[b["bar"], f"`{b['beside']}`", f"{b['difference']:+.2f}", _verdict(b)] for b in met]
        parts += ["## Bars", "", *_table(["bar", "best beside", "difference", ""], cells), ""]
    return "\n".join([*parts, "## Settings", "", *(f"- {text}" for text in settings_lines(plan)), ""])


def budgets(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each budget, what a run of it had and which rows do."""
    found: dict[str, list[str]] = {}
    for line in rows:
        if line["runs"]:
            train = plan.settings(line["kind"]).train
            text = f"{train.epochs} epochs of batch {train.batch * train.accumulate}"
            found.setdefault(f"{text}, {line['presentations']:,.0f} image presentations", []).append(line["model"])
    return [f"{text} ({'all' if len(found) == 1 else ', '.join(names)})" for text, names in found.items()]


def settings_lines(plan: Plan) -> list[str]:
    """Everything that was set otherwise than nucsam's defaults, by whom."""
    found = [f"all: {_differences(Config(), plan.common)}"]
    if plan.pretrain:
        images = ", ".join(f"`{path.name}`" for path in plan.pretrain)
        found += [
            f"{job.name}, on {images}, beside all: {_differences(plan.common, job.config)}"
            for job in plan.pretraining()
        ]
    own = [(name, _differences(plan.common, plan.settings(name))) for name in plan.models if not MODELS[name].tta]
    found += [f"`{name}`: {text}" for name, text in own]
    return found + [f"`{n}`: runs of `{MODELS[n].tta}`, test-time augmentation" for n in plan.models if MODELS[n].tta]


def _differences(a: Config, b: Config) -> str:
    """`table.key = value` of b; without the data's path, which says nothing to others."""
    lines = [line for line in configuration.differences(a, b) if not line.startswith("data.root:")]
    return ", ".join(f"`{line.replace(': ', ' ', 1)}`" for line in lines) or "nothing"


def _random(plan: Plan, name: str) -> bool:
    return plan.settings(name).model.weights == "none"


def _verdict(bar: dict[str, Any]) -> str:
    return ("met" if bar["met"] else "missed") + ("" if bar["complete"] else ", INCOMPLETE")


def _cell(value: dict[str, float]) -> str:
    if math.isnan(value["mean"]):
        return "-"
    text = f"{value['mean']:.2f}" + ("" if math.isnan(value["folds"]) else f" ± {value['folds']:.2f}")
    return text + ("" if math.isnan(value["seeds"]) else f" ({value['seeds']:.2f})")


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _number(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in cells]
    return [f"| {' | '.join(line)} |" for line in cells]


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each finished run; scores are 0 to 1."""
    lines = [{"model": line["model"], **run} for line in rows for run in line["runs"]]
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Dice, AJI and PQ of the rows that have runs: a bar for the mean, a dot for each run, hatched where the epoch was
    chosen on the test images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [line for line in rows if line["runs"]][::-1]
    colours = ["#c8643c" if MODELS[line["kind"]].net else "#7a7a7a" if line["on_test"] else "#2b6ca3" for line in rows]
    plot, axes = plt.subplots(1, 3, figsize=(12, 1.2 + 0.32 * len(rows)), sharey=True, constrained_layout=True)
    for axis, metric, title in zip(axes, METRICS, ("Dice", "AJI", "PQ")):
        means = [line[metric]["mean"] for line in rows]
        drawn = axis.barh(range(len(rows)), means, color=colours, height=0.7, alpha=0.55)
        for k, (line, bar) in enumerate(zip(rows, drawn)):
            bar.set_hatch("///" if line["on_test"] else "")
            values = [100 * run[metric] for run in line["runs"]]
            axis.plot(values, [k] * len(values), "o", color="black", markersize=3)
            axis.text(110, k, f"{means[k]:.1f}", va="center", ha="right", fontsize=9)
        axis.set(title=f"{title}, %", xlim=(0, 110), xticks=range(0, 101, 20))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [f"{line['model']}, {line['trainable'] / 1e6:.2f} M trained" for line in rows])
    plot.suptitle("bars: means; dots: runs; hatched: epoch chosen on the test images", fontsize=9)
    plot.savefig(path, dpi=130)
    plt.close(plot)


# ---- the command ----


def names(texts: str) -> tuple[str, ...]:
    """Names of models, sets of `SETS` written out, each once."""
    return tuple(dict.fromkeys(n for text in texts.split(",") for n in SETS.get(text.strip(), (text.strip(),))))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def parse(arguments: Sequence[str]) -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.toml | table.key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=names, default=MUSTS, help=f"of {', '.join([*SETS, *MODELS])}")
    parser.add_argument("--folds", type=numbers, help="all if not given")
    parser.add_argument("--seeds", type=numbers, default=(0,))
    parser.add_argument("--pretrain", type=Path, action="append", default=[], metavar="DATA", help="may be repeated")
    for option in ("--pretrain-set", "--unets-set"):
        parser.add_argument(option, action="append", default=[], metavar="table.key=value", help="may be repeated")
    args = parser.parse_intermixed_args(arguments)
    files = [text for text in args.settings if text.endswith(".toml")]
    if len(files) > 1:
        raise ValueError(f"found {len(files)} configurations ({', '.join(files)}), expected one, and table.key=value")
    path = Path(files[0]) if files else default_configuration()
    common = configuration.load(path, [text for text in args.settings if not text.endswith(".toml")])
    chosen = args.folds if args.folds is not None else tuple(range(common.data.folds))
    overrides = {"pretrain_set": tuple(args.pretrain_set), "unets_set": tuple(args.unets_set)}
    return Plan(common, args.out, args.models, chosen, args.seeds, tuple(args.pretrain), **overrides)


def main(arguments: Sequence[str]) -> int:
    """Do what is missing, then write the table. Returns 1 on the first process if a run is missing."""
    plan = parse(arguments)
    if plan.pretrain:
        link(plan.pretrain, plan.out / "pretrain" / "data")
    common = replace(plan.common, data=replace(plan.common.data, fold=0))
    for jobs in (plan.pretraining(), plan.training(again=False), plan.training(again=True)):
        if jobs:
            folds.run(jobs, common, plan.out)
    if not folds.is_first():
        return 0
    rows = [row(plan, *which) for which in plan.rows()]
    met = bars(rows)
    text, out = markdown(plan, rows, met), plan.out
    asked = {key: value for key, value in asdict(plan).items() if key not in ("common", "out", "pretrain")}
    document = {"benchmark": "accuracy", **asked, "pretrain": [path.name for path in plan.pretrain]}
    document |= {"cores": os.cpu_count(), "config": plan.common.to_dict(), "rows": rows, "bars": met}
    line = json.dumps(document).replace("NaN", "null")
    for name, content in {"accuracy.md": text, "accuracy.json": line + "\n", "accuracy.csv": csv_text(rows)}.items():
        (out / name).write_text(content, encoding="utf-8")
    figure(rows, out / "accuracy.png")
    print(text)
    print(line)
    return 1 if any(line["missing"] for line in rows) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        sys.exit()
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        sys.exit(2)
