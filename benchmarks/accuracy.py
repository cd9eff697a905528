"""How accurate is nucsam beside the U-Nets, the report it started from, and itself with one thing changed?

    python benchmarks/accuracy.py [CONFIG.toml] [table.key=value ...] --out RUNS [--models musts] [--folds 0,1]
        [--seeds 0] [--pretrain DATA ...] [--pretrain-set table.key=value ...]
    accelerate launch --multi_gpu --num_processes 4 benchmarks/accuracy.py ...              one job on each GPU
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 benchmarks/accuracy.py ...   two on the CPU

Every model of `MODELS` is a table of differences from CONFIG.toml (configs/nuinsseg.toml) and the overrides, which hold
for all: the same images, folds, epochs, batch and loop. `--models` takes names and the names of `SETS`. A job is one
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
import socket
import statistics
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
from nucsam import cli, evaluate, folds
from nucsam import config as configuration
from nucsam.atomic import write_text
from nucsam.config import Config, changed

HERE = Path(__file__).resolve().parent
METRICS = ("dice", "aji", "pq")
TIMED = 16  # test images whose inference is timed, after one to warm up
LINKED = "tissue images"  # what makes a folder of NuInsSeg's layout an organ
MEASURED = "benchmark.json"  # of a run: its memory and its time of inference, the last file that is written
UNET = {"data.scale": 1.0, "model.weights": "none", "train.lr_adapter": 1e-3}
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


MODELS = {
    **{
        name: Model(UNET, net=name)
        for name in ("shallow", "deep", "attention", "residual-attention", "two-stage", "dual-decoder")
    },
    "report": Model(file="report.toml"),
    "lora": Model(),
    "head": Model({"model.train": "head"}),
    "full": Model({"model.train": "full", "train.lr_adapter": 2e-4}),  # what LoRA needs is too much for all weights
    **{f"rank-{rank}": Model({"model.rank": rank, "model.alpha": float(rank)}) for rank in (2, 4, 8, 16)},
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
MUSTS = (*UNETS, "report", "sam", "lora", "head", "full")
SETS = {
    "unets": UNETS,
    "musts": MUSTS,
    "ablations": ("lora", *(name for name, model in MODELS.items() if name not in MUSTS and not model.pretrains)),
    "all": tuple(MODELS),
}
LARGEST = 2.1  # millions of parameters that `lora` may train
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

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"--models: found {', '.join(unknown)}, expected {', '.join([*SETS, *MODELS])}")
        if wrong := [fold for fold in self.folds if not 0 <= fold < self.common.data.folds]:
            raise ValueError(f"--folds: found {wrong}, expected 0 to {self.common.data.folds - 1}")
        if missing := {MODELS[name].tta for name in self.models} - {"", *self.models}:
            raise ValueError(f"--models: found one that scores the runs of {', '.join(missing)}, expected these too")
        if alone := [name for name in self.models if MODELS[name].pretrains and not self.pretrain]:
            raise ValueError(f"--models: found {', '.join(alone)}, expected --pretrain DATA with it")
        for key, value, option in (
            ("data.fold", self.common.data.fold, "--folds"),
            ("train.seed", self.common.train.seed, "--seeds"),
        ):
            if value:
                raise ValueError(f"{key}: found {value!r}, expected none beside {option}")
        root, tested = Path(self.common.data.root), _organs(Path(self.common.data.root))
        for path in self.pretrain:
            if path.resolve() == root.resolve() or not tested.isdisjoint(_organs(path)):
                raise ValueError(f"--pretrain: found {path}, with images that are tested on; expected others")

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
            longer = self.common.train.epochs / own["train"]["epochs"]
            tables = {t: {k: (v if k in SHARED.get(t, ()) else own[t][k]) for k, v in tables[t].items()} for t in own}
            tables["train"]["step_epochs"] = max(1, round(own["train"]["step_epochs"] * longer))  # its rate's shape
        return changed(tables, model.differences, f"model {name}")

    def asks(self, name: str) -> tuple[bool, Config]:
        """What tells a model's runs from another's of its net."""
        return self.pretrains(name), self.settings(name)

    def base(self, name: str) -> tuple[str, Config]:
        """Name and configuration of the pretraining that a model starts from."""
        model, own = MODELS[name], self.settings(name)
        recipe = tomllib.loads((HERE.parent / "configs" / "standin.toml").read_text(encoding="utf-8"))
        differences = {f"{table}.{key}": value for table, values in recipe.items() for key, value in values.items()}
        root = str(self.out / "pretrain" / "data")
        differences |= {"data.root": root, "data.layout": "nuinsseg", "data.select": "inner"}
        differences["train.validate_every"] = min(self.common.train.validate_every, recipe["train"]["epochs"])
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
            jobs[key] = folds.Job(f"pretraining {key}", settings.data.fold, settings, run, lock, command, MEASURED)
        return [*jobs.values()]

    def training(self, again: bool) -> list[folds.Job]:
        """The jobs of all rows, seeds and folds, fold after fold; `again`: those that score runs of others."""
        rows = [(name, start) for name, start in self.rows() if bool(MODELS[name].tta) == again]
        jobs = [self.job(*row, seed, fold) for seed in self.seeds for fold in self.folds for row in rows]
        return list(dict.fromkeys(jobs))

    def job(self, name: str, start: bool, seed: int, fold: int) -> folds.Job:
        """A row's run; a row that asks for what an earlier model of `MODELS` does has that model's."""
        kind = [n for n in MODELS if (MODELS[n].net, MODELS[n].tta) == (MODELS[name].net, MODELS[name].tta)]
        name = next(n for n in kind if self.asks(n) == self.asks(name))
        model, settings, label = MODELS[name], self.settings(name), row_name(name, start)
        settings = changed(settings.to_dict(), {"data.fold": fold, "train.seed": seed}, f"model {name}")
        run, place = self.out / label / f"seed{seed}" / f"fold{fold}", f"{label},seed{seed},fold{fold}"
        command = ["--net", model.net]
        if start:
            base = self.out / "pretrain" / self.base(MODELS[name].tta or name)[0]
            if model.net:
                command += ["--start", str(base / "adapter.safetensors")]
            else:
                weights = base / "merged.safetensors"
                settings = changed(settings.to_dict(), {"model.weights": str(weights)}, f"model {name}")
                command += ["--export", str(base)]
        if model.tta:
            command = ["--tta-of", str(self.job(model.tta, start, seed, fold).run)]
        label = f"{label}, seed {seed}"
        return folds.Job(label, fold, settings, run, self.out / ".locks" / place, trainer(*command), MEASURED)


def _organs(root: Path) -> set[Path]:
    """The organs of a folder in NuInsSeg's layout, wherever they lie."""
    return {path.parent.resolve() for path in root.glob(f"*/{LINKED}")}


def row_name(name: str, start: bool) -> str:
    """A row's name, and its folder's: a model's, and what tells a U-Net from scratch."""
    return f"{name}-scratch" if MODELS[name].net and not start else name


def trainer(*arguments: str) -> tuple[str, ...]:
    """The command of a job's child, before its configuration."""
    return (sys.executable, str(HERE / "accuracy.py"), "--child", *arguments)


def link(roots: Iterable[Path], folder: Path) -> None:
    """One data set of several in NuInsSeg's layout: `folder` holds a link for each organ of each.

    ValueError where a root has none, two have one name, or `folder` holds other links.
    """
    wanted: dict[str, Path] = {}
    for root in roots:
        links = {f"{root.resolve().name}, {organ.name}": organ for organ in _organs(root)}
        if not links:
            raise ValueError(f"--pretrain: {root} holds no ORGAN/{LINKED}, expected a folder in NuInsSeg's layout")
        if twice := wanted.keys() & links.keys():
            raise ValueError(f"--pretrain: found {root} beside another folder of that name, with {min(twice)} twice")
        wanted |= links
    if not folder.exists():
        made = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
        made.mkdir(parents=True)
        for name, organ in wanted.items():
            (made / name).symlink_to(organ, target_is_directory=True)
        try:
            made.rename(folder)  # whole, for a process beside
        except OSError:  # that was faster
            shutil.rmtree(made)
    found = {path.name: path.resolve() for path in folder.iterdir()}
    if other := sorted({name for name, _ in found.items() ^ wanted.items()}):
        raise ValueError(
            f"--pretrain: {folder} links to other data ({other[0]}), expected the same folders or another --out"
        )


def check_images(plan: Plan) -> None:
    """ValueError where a run that is there was of other images than `data.root` holds."""
    paths = [job.run / "adapter.safetensors" for job in plan.training(again=False)]
    if not (paths := [path for path in paths if path.is_file()]):
        return
    from nucsam import checkpoint, data, scoring

    wanted = data.identity(scoring.find_images(plan.common.data)[0])
    if other := [path for path in paths if checkpoint.read_tensors(path)[1]["images"] != wanted]:
        raise ValueError(
            f"{other[0].parent}: a run of other images than {plan.common.data.root}, expected another --out"
        )


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

    if args.start and not args.start.with_name("scores.json").is_file():
        raise ValueError(f"{args.start.parent}: found no scores.json, expected a finished pretraining")
    if args.tta_of:
        score_again(args.tta_of, args.out, settings)
        return
    if args.export and not Path(settings.model.weights).is_file():
        export(args.export, Path(settings.model.weights), force=True)  # atomic, and another child's has the same bytes
    build = partial(unets.build, args.net, start=args.start) if args.net else model.build
    train(settings, args.out, resume=args.resume, build=build)
    before = [line["memory_gib"] for line in history(args.out) if "memory_gib" in line]  # of a process that was killed
    found = {"peak_gib": max(peak_gib(), *before), "inference_seconds": inference_seconds(args.out, settings, build)}
    write_text(args.out / MEASURED, json.dumps(found) + "\n")


def history(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def peak_gib() -> float:
    """The most memory that this process has had: allocated on its GPU, else resident."""
    import torch

    from nucsam.scoring import uses_gpu

    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def finished(run: Path, settings: Config, build: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Of a finished run: net with its best weights, samples of its test images, accelerator, the adapter's metadata."""
    from nucsam import checkpoint, data, scoring

    base = checkpoint.run_base(run, settings)
    net = build(settings.model, base, seed=settings.train.seed)
    metadata = checkpoint.load_adapter(run / "adapter.safetensors", net, base)
    accelerator = scoring.scorer(metadata)
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
    from nucsam import model, scoring

    net, samples, accelerator, metadata = finished(run, settings, model.build)
    found = scoring.score_images(net, settings, samples, range(len(samples)), accelerator, tta=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.toml", "environment.json", "metrics.jsonl"):
        shutil.copyfile(run / name, out / name)
    evaluate.write_json(out / "scores.json", scoring.describe(found, metadata, of="test", untrained=False))
    measured = json.loads((run / MEASURED).read_text())
    measured["inference_seconds"] = inference_seconds(run, settings, model.build, tta=True)
    write_text(out / MEASURED, json.dumps(measured) + "\n")


# ---- the table ----


def results(job: folds.Job) -> dict[str, Any] | None:
    """What a finished run measured; None while it is not finished. Scores are 0 to 1."""
    if (scores := job.scores()) is None:
        return None
    environment = json.loads((job.run / "environment.json").read_text())
    train, images = job.config.train, environment["images"]["train"]
    return {
        **scores["headline"],
        "epoch": scores["epoch"],
        "on_test": scores["epoch_chosen_by"].endswith("test split"),
        "base": scores["base"]["source"],
        **{key: environment.get(key) for key in ("device", "threads")},
        "trainable": environment["parameters_trainable"],
        "parameters": environment["parameters"],
        "presentations": math.ceil(images / train.batch) * train.batch * train.epochs,  # a last batch is filled up
        "train_seconds": sum(line.get("seconds", 0.0) for line in history(job.run)),
        **json.loads((job.run / MEASURED).read_text()),
    }


def row(plan: Plan, name: str, start: bool) -> dict[str, Any]:
    """A row of the table: means over seeds and folds, and spreads."""
    runs = {(s, f): results(plan.job(name, start, s, f)) for s in plan.seeds for f in plan.folds}
    if MODELS[name].net:  # MobileSAM's, which its run names, does not touch it
        runs = {key: run and {**run, "base": "pretrained" if start else "none"} for key, run in runs.items()}
    done = [run for run in runs.values() if run]
    line = {
        "model": row_name(name, start),
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
    """How far over or under each bar: `met` is None where a side has no run, `complete` false where one lacks some."""
    found = []
    done = [line for line in rows if line["runs"]]
    for text, own, peers, metric, least in BARS:
        mine, others = ([line for line in done if line["kind"] in kinds] for kinds in ((own,), peers))
        bar = {"bar": text, "beside": "", "difference": math.nan, "met": None}
        if mine and others:
            best = max(others, key=lambda line: line[metric]["mean"])
            difference = mine[0][metric]["mean"] - best[metric]["mean"]
            bar |= {"beside": best["model"], "difference": difference, "met": difference >= least}
        found.append(bar | {"complete": not any(line["missing"] for line in (*mine, *others))})
    for line in done:
        if line["kind"] == "lora":
            over = line["trainable"] / 1e6 - LARGEST
            bar = {"bar": f"lora trains at most {LARGEST} M parameters", "beside": "", "difference": over}
            found.append(bar | {"met": over <= 0, "complete": True})
    return found


def markdown(plan: Plan, rows: Sequence[dict[str, Any]], met: Sequence[dict[str, Any]]) -> str:
    """The table, the bars, and all that was set."""
    head = "model|Dice|AJI|PQ|trained|parameters|training, min|inference, ms|peak, GiB"
    lines = []
    for line in rows:
        marks = ["EPOCH CHOSEN ON THE TEST IMAGES"] if line["on_test"] else []
        marks += [f"INCOMPLETE: {'; '.join(line['missing'])} missing"] if line["missing"] else []
        marks += _start(plan, line)
        facts = [f"{line[k]:,.0f}" if line["runs"] else "-" for k in ("trainable", "parameters")]
        facts += [
            _number(line["train_seconds"] / 60),
            _number(1000 * line["inference_seconds"], 0),
            _number(line["peak_gib"], 2),
        ]
        lines.append(["; ".join([f"`{line['model']}`", *marks]), *(_cell(line[metric]) for metric in METRICS), *facts])
    counts = [f"{count:,.0f}" for count in sorted({line["presentations"] for line in rows if line["runs"]})]
    notes = [
        f"Folds {_listed(plan.folds)} of {plan.common.data.folds}, seeds {_listed(plan.seeds)}. "
        "Percent: mean over a fold's images, then over folds; ± standard deviation over folds; in brackets over seeds.",
        f"Budget of every model: {plan.common.train.epochs} epochs, {' to '.join(counts) or 'no'} image "
        f"presentations a run, batch {plan.common.train.batch * plan.common.train.accumulate}. Where the epoch is "
        "chosen on the test images, the inner split is trained on too.",
        "Training: mean over runs, without validation. Inference: median of one image at a time, instances included. "
        "Peak: of the training process, validation included (resident on a CPU, allocated on a GPU).",
    ]
    cells = [[b["bar"], b["beside"] and f"`{b['beside']}`", _signed(b["difference"]), _verdict(b)] for b in met]
    parts = [folds.part("Accuracy", head, lines, notes), folds.part("Bars", "bar|best beside|difference|", cells)]
    return "\n".join([*parts, "## Settings", "", *(f"- {text}" for text in settings_lines(plan)), ""])


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


def _start(plan: Plan, line: dict[str, Any]) -> list[str]:
    """How a row says what it began with, where that is not MobileSAM's weights."""
    if line["pretrained"]:
        return ["pretrained"]
    if MODELS[line["kind"]].net:
        return ["from scratch"]
    return ["base weights: random"] if plan.settings(line["kind"]).model.weights == "none" else []


def _verdict(bar: dict[str, Any]) -> str:
    verdict = {None: "not measured", True: "met", False: "missed"}[bar["met"]]
    return verdict + ("" if bar["complete"] or bar["met"] is None else ", INCOMPLETE")


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _cell(value: dict[str, float]) -> str:
    if math.isnan(value["mean"]):
        return "-"
    text = f"{value['mean']:.2f}" + ("" if math.isnan(value["folds"]) else f" ± {value['folds']:.2f}")
    return text + ("" if math.isnan(value["seeds"]) else f" ({value['seeds']:.2f})")


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _number(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


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
    colours = ["#c8643c" if MODELS[line["kind"]].net else "#2b6ca3" for line in rows]
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
    names = [f"{line['model']}{', incomplete' if line['missing'] else ''}" for line in rows]
    axes[0].set_yticks(
        range(len(rows)), [f"{n}, {line['trainable'] / 1e6:.2f} M trained" for n, line in zip(names, rows)]
    )
    legend = "blue: nucsam; red: U-Nets; bars: means; dots: runs; hatched: epoch chosen on the test images"
    plot.suptitle(legend, fontsize=9)
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
    parser.add_argument(
        "--pretrain-set", action="append", default=[], metavar="table.key=value", help="may be repeated"
    )
    args = parser.parse_intermixed_args(arguments)
    common = configuration.load(*cli.configuration(args.settings))
    chosen = args.folds if args.folds is not None else tuple(range(common.data.folds))
    return Plan(common, args.out, args.models, chosen, args.seeds, tuple(args.pretrain), tuple(args.pretrain_set))


def main(arguments: Sequence[str]) -> int:
    """Do what is missing, then write the table. Returns 1 on the first process if a run is missing."""
    plan = parse(arguments)
    if not find_spec("matplotlib"):  # known before days of training, not after
        raise ValueError("matplotlib: not installed, expected it for the figure; pip install matplotlib")
    if plan.pretrain:
        link(plan.pretrain, plan.out / "pretrain" / "data")
    check_images(plan)
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
    document |= {"date": date.today().isoformat(), "cores": os.cpu_count(), "config": plan.common.to_dict()}
    line = json.dumps(json.loads(evaluate.to_json(document | {"rows": rows, "bars": met})))  # NaN is null
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
