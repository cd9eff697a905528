"""How accurate is nucsam beside six U-Nets, the report's recipe, and itself with one change?

    python benchmarks/accuracy.py [CONFIG.toml] [table.key=value ...] --out RUNS [--models musts]
        [--folds 0,1] [--seeds 0] [--pretrain DATA ...] [--pretrain-set table.key=value ...]

One job on each GPU, and two jobs on the CPU:

    accelerate launch --multi_gpu --num_processes 4 benchmarks/accuracy.py ...
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 benchmarks/accuracy.py ...

Every model of `MODELS` is a table of differences from CONFIG.toml (configs/nuinsseg.toml) and the
overrides. These hold for all models: the same images, folds, epochs, batch and loop. `--models`
takes names of `MODELS` and of `SETS`. A job trains one fold of one model with one seed, in a run
directory under RUNS. As in `nucsam folds`, the processes share the jobs, skip finished ones and
resume the others. A metric is the mean over a fold's images, then over folds.

`--pretrain` first trains on other images, folders in NuInsSeg's layout. It takes images,
augmentation and epochs from configs/standin.toml, then `--pretrain-set`. It trains on all images
but the inner split, which chooses the epoch. Each U-Net is pretrained so, and has a row from
scratch beside it. Of nucsam, `lora-pretrained` starts from the merged LoRA and head of such a run;
the other models start from `model.weights`. Where these are none, a pretrained stand-in for
MobileSAM replaces them in all of nucsam's models, one for each head and scale.

The script writes RUNS/accuracy.md, .json, .csv (a line a run) and .png. It prints the table, then
one JSON line.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import unets

import nucsam
from nucsam import UserError, cli, config, processes
from nucsam.config import Config, changed
from nucsam.data import splits
from nucsam.data.samples import Samples
from nucsam.export.merged import export_run
from nucsam.files import shortened, without_nan, write_text
from nucsam.folds import runner
from nucsam.folds.jobs import Job
from nucsam.model import network
from nucsam.predict.devices import uses_gpu
from nucsam.run import checkpoint
from nucsam.run.directory import RunDirectory
from nucsam.run.metadata import known_certainty
from nucsam.score.runs import describe_scores, score_images, scoring_accelerator, scoring_predictor
from nucsam.score.tables import HEADLINE, over_folds

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
TIMED = 16  # test images whose inference is timed, after one to warm up
IMAGES = "tissue images"  # a folder with this folder inside is an organ in NuInsSeg's layout
MEASURED = "benchmark.json"  # the last file of a run: its memory and its time of inference
MERGED = "merged.safetensors"  # of a pretraining: the base that other runs start from
UNET = {"data.scale": 1.0, "model.weights": "none", "train.lr_adapter": 1e-3}
ATTENTION = r"image_encoder\..*\.attn\."
# Settings of the benchmark; a model with a file takes all others from the file.
SHARED = {
    "data": set(Config().to_dict()["data"]) - {"select", "scale"},
    "model": {"weights"},
    "train": {
        "epochs",
        "presentations",
        "batch",
        "accumulate",
        "precision",
        "checkpoint",
        "validate_every",
        "save_minutes",
    },
}
FACTS = (  # of a run, beside its scores
    "trainable",
    "parameters",
    "presentations",
    "train_seconds",
    "inference_seconds",
    "peak_gib",
)


@dataclass(frozen=True)
class Model:
    """A row: changes to the common configuration, or another model's runs scored again."""

    differences: Mapping[str, Any] = field(default_factory=dict)
    net: str = ""  # of unets.NETS; "" = nucsam
    file: str = ""  # in configs/: its values in place of the common ones
    again: str = ""  # model whose runs are scored again, with the differences
    tta: bool = False  # scored again with test-time augmentation
    pretrains: bool = False  # on other images, also from MobileSAM's weights; U-Nets always do


MODELS = {
    **{
        name: Model(UNET, net=name)
        for name in (
            "shallow",
            "deep",
            "attention",
            "residual-attention",
            "two-stage",
            "dual-decoder",
        )
    },
    "report": Model(file="report.toml"),
    "lora": Model(),
    "lite-medsam": Model({"model.encoder": "lite_medsam"}),
    "head": Model({"model.train": "head"}),
    # LoRA's rate is too high for all weights
    "full": Model({"model.train": "full", "train.lr_adapter": 2e-4}),
    **{
        f"rank-{rank}": Model({"model.rank": rank, "model.alpha": float(rank)})
        for rank in (2, 4, 8, 16)
    },
    "lora-qkv": Model({"model.pattern": ATTENTION + "qkv"}),
    "lora-attention": Model({"model.pattern": ATTENTION + "(qkv|proj)"}),
    "lora-attention-mlp": Model(
        {"model.pattern": r"image_encoder\..*\.(attn\.(qkv|proj)|mlp\.fc[12])"}
    ),
    "lora-pretrained": Model(pretrains=True),
    "sam": Model({"model.head": "sam"}),
    "sam-attention": Model({"model.head": "sam", "model.pattern": ATTENTION + "(qkv|proj)"}),
    "sam-attention-decoder": Model(
        {
            "model.head": "sam",
            "model.pattern": rf"{ATTENTION}(qkv|proj)|mask_decoder\..*attn.*\.([qkv]|out)_proj",
        }
    ),
    "no-cross-entropy": Model({"loss.cross_entropy": 0.0}),
    "no-tversky": Model({"loss.tversky": 0.0}),
    "no-distance": Model({"loss.distance": 0.0}),
    "distance-1": Model({"loss.distance": 1.0}),
    "boundary-2": Model({"loss.boundary": 2.0}),
    "finest-1": Model({"model.finest": 1}),
    "scale-1": Model({"data.scale": 1.0}),
    "scale-2": Model({"data.scale": 2.0}),
    "tta": Model(again="lora", tta=True),
    "adapt": Model({"model.adapt": 0.06}, again="lora"),
    "not-lenient": Model({"instances.lenient": False}, again="lora"),
    "no-ema": Model({"train.ema": 0.0}),
    "zoom": Model({"augment.scale_min": 0.5, "augment.scale_max": 2.0}),
    "stain-half": Model({"augment.stain_scale": 0.15, "augment.stain_bias": 0.05}),
    "stain-double": Model({"augment.stain_scale": 0.6, "augment.stain_bias": 0.2}),
    "stain-mix": Model({"augment.stain_mix": 0.1}),
    "stain-mix-more": Model({"augment.stain_mix": 0.2}),
    "one-size": Model({"data.nucleus_area": 430.0}),
    "one-size-once": Model({"data.nucleus_area": 0.0}, again="one-size"),
}
UNETS = tuple(name for name, model in MODELS.items() if model.net)
MUSTS = (*UNETS, "report", "sam", "lora", "head", "full")
SETS = {
    "unets": UNETS,
    "musts": MUSTS,
    "ablations": (
        "lora",
        *(name for name, model in MODELS.items() if name not in MUSTS and not model.pretrains),
    ),
    "all": tuple(MODELS),
}
MOST_TRAINED = 1.4  # millions of parameters that `lora` may train
GOALS = (  # text, row, peers of which the best counts, metric, least difference in points
    ("lora at least 4 AJI over the best U-Net", "lora", UNETS, "aji", 4.0),
    ("lora at least 4 PQ over the best U-Net", "lora", UNETS, "pq", 4.0),
    ("lora within 2 AJI of full", "lora", ("full",), "aji", -2.0),
    ("instance head at least 5 AJI over the sam head", "lora", ("sam",), "aji", 5.0),
)


# ---- the plan ----


@dataclass(frozen=True)
class Plan:
    """The checked command line.

    Raises:
        UserError: an argument is wrong, or two do not go together.
    """

    common: Config
    out: Path
    models: tuple[str, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    pretrain: tuple[Path, ...] = ()
    pretrain_set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            expected = ", ".join([*SETS, *MODELS])
            raise UserError(f"--models: found {', '.join(unknown)}, expected {expected}")
        folds = self.common.data.folds
        wrong = [fold for fold in self.folds if not 0 <= fold < folds]
        if wrong:
            raise UserError(f"--folds: found {wrong}, expected 0 to {folds - 1}")
        scored_again = {MODELS[name].again for name in self.models} - {""}
        missing = scored_again - {*self.models}
        if missing:
            raise UserError(
                f"--models: found a model that scores the runs of {', '.join(missing)}, "
                "expected these too"
            )
        pretrained = [name for name in self.models if MODELS[name].pretrains]
        if pretrained and not self.pretrain:
            raise UserError(
                f"--models: found {', '.join(pretrained)}, expected --pretrain DATA with it"
            )
        for key, value, option in (
            ("data.fold", self.common.data.fold, "--folds"),
            ("train.seed", self.common.train.seed, "--seeds"),
        ):
            if value:
                raise UserError(f"{key}: found {value!r}, expected it from {option} only")
        root = Path(self.common.data.root)
        for path in self.pretrain:
            if path.resolve() == root.resolve() or _organs(root) & _organs(path):
                raise UserError(
                    f"--pretrain: found {path}, which holds images of {root}; expected others"
                )

    def rows(self) -> list[tuple[str, bool]]:
        """(model, whether it is pretrained) in the order of the table."""
        rows = []
        for name in self.models:
            pretrained = self.pretrains(name)
            rows.append((name, pretrained))
            if pretrained and MODELS[name].net:
                rows.append((name, False))
        return rows

    def pretrains(self, name: str) -> bool:
        """Whether a model has a pretrained row."""
        model = MODELS[name]
        random = self.common.model.weights == "none"
        return bool(self.pretrain) and bool(model.net or model.pretrains or random)

    @cached_property
    def epochs(self) -> int:
        """Of the common fold. Kept, for `train.presentations` asks the folder of images."""
        return splits.with_epochs(self.common).train.epochs

    def settings(self, name: str) -> Config:
        """A model's configuration, with the common fold and seed."""
        model = MODELS[MODELS[name].again or name]
        tables = self.common.to_dict()
        if model.file:
            recipe = config.load_config(CONFIGS / model.file).to_dict()
            longer = self.epochs / recipe["train"]["epochs"]
            steps = recipe["train"]["step_epochs"] * longer  # the rate keeps its shape
            recipe["train"]["step_epochs"] = max(1, round(steps))
            for table, keys in SHARED.items():
                recipe[table] |= {key: tables[table][key] for key in keys}
            tables = recipe
        differences = {**model.differences, **MODELS[name].differences}
        return changed(tables, differences, f"model {name}")

    def base(self, name: str) -> tuple[str, Config]:
        """Name and configuration of the pretraining from which a model starts."""
        model, settings = MODELS[name], self.settings(name)
        recipe = tomllib.loads((CONFIGS / "standin.toml").read_text(encoding="utf-8"))
        epochs = recipe["train"]["epochs"]
        values = {
            f"{table}.{key}": value
            for table, section in recipe.items()
            for key, value in section.items()
        }
        values["data.root"] = str(self.out / "pretrain" / "data")
        values["data.layout"] = "nuinsseg"
        values["data.select"] = "inner"
        values["train.presentations"] = 0
        values["train.validate_every"] = min(self.common.train.validate_every, epochs)
        if model.net or self.common.model.weights != "none":
            whole = {key for key in values if key.startswith("model.")} | {"train.lr_adapter"}
            values = {key: value for key, value in values.items() if key not in whole}
        if model.net:
            base = model.net
            values |= model.differences
        else:
            base = f"nucsam-{settings.model.head}-scale-{settings.data.scale:g}"
            values["model.head"] = settings.model.head
            values["data.scale"] = settings.data.scale
        pretraining = changed(self.common.to_dict(), values, f"pretraining {base}")
        return base, config.override(pretraining.to_dict(), self.pretrain_set, "--pretrain-set")

    def pretraining(self) -> list[Job]:
        """A job for each pretraining."""
        jobs = {}
        for name in self.models:
            trained = MODELS[name].again or name
            if not self.pretrains(name):
                continue
            base, settings = self.base(trained)
            jobs[base] = Job(
                f"pretraining {base}",
                settings.data.fold,
                settings,
                self.out / "pretrain" / base,
                self.out / ".locks" / f"pretrain,{base}",
                trainer("--net", MODELS[trained].net),
                MEASURED,
            )
        return list(jobs.values())

    def training(self, again: bool) -> list[Job]:
        """The jobs of all rows, seeds and folds, fold after fold.

        Args:
            again: those that score runs of others again, or all the rest.
        """
        rows = [row for row in self.rows() if bool(MODELS[row[0]].again) == again]
        jobs = [
            self.job(*row, seed, fold) for seed in self.seeds for fold in self.folds for row in rows
        ]
        return list(dict.fromkeys(jobs))

    def job(self, name: str, start: bool, seed: int, fold: int) -> Job:
        """A row's run; `start`: it starts from a pretraining.

        Models with the same net, start and settings share the runs of the first of them.
        """
        name = next(other for other in MODELS if self._alike(other, name))
        model, label = MODELS[name], row_name(name, start)
        values = {"data.fold": fold, "train.seed": seed}
        command = ["--net", model.net]
        if start:
            base = RunDirectory(self.out / "pretrain" / self.base(model.again or name)[0])
            if model.net:
                command += ["--start", str(base.adapter_file)]
            else:
                values["model.weights"] = str(base.path / MERGED)
                command += ["--export", str(base.path)]
        if model.again:
            command = ["--again", str(self.job(model.again, start, seed, fold).run)]
            command += ["--tta"] * model.tta
        return Job(
            f"{label}, seed {seed}",
            fold,
            splits.with_epochs(changed(self.settings(name).to_dict(), values, f"model {name}")),
            self.out / label / f"seed{seed}" / f"fold{fold}",
            self.out / ".locks" / f"{label},seed{seed},fold{fold}",
            trainer(*command),
            MEASURED,
        )

    def _alike(self, a: str, b: str) -> bool:
        kind = attrgetter("net", "again", "tta")
        same_kind = kind(MODELS[a]) == kind(MODELS[b])
        same_start = self.pretrains(a) == self.pretrains(b)
        return same_kind and same_start and self.settings(a) == self.settings(b)


def _organs(root: Path) -> set[Path]:
    """The organs of a folder in NuInsSeg's layout, with links resolved."""
    return {path.parent.resolve() for path in root.glob(f"*/{IMAGES}")}


def row_name(name: str, start: bool) -> str:
    """Name of a row and of its folder: the model's; a U-Net from scratch is marked."""
    return f"{name}-scratch" if MODELS[name].net and not start else name


def trainer(*arguments: str) -> tuple[str, ...]:
    """The command of a job's child, before its configuration."""
    return (sys.executable, str(HERE / "accuracy.py"), "--child", *arguments)


def link(roots: Iterable[Path], folder: Path) -> None:
    """Join data sets in NuInsSeg's layout: `folder` gets a link for each organ of each.

    Raises:
        UserError: a root has no organ, two roots have one name, or `folder` holds other links.
    """
    wanted: dict[str, Path] = {}
    for root in roots:
        links = {f"{root.resolve().name}, {organ.name}": organ for organ in _organs(root)}
        if not links:
            raise UserError(
                f"--pretrain: {root} holds no ORGAN/{IMAGES}, expected a folder in NuInsSeg's "
                "layout"
            )
        twice = wanted.keys() & links.keys()
        if twice:
            raise UserError(
                f"--pretrain: found {root} beside another folder of that name, with {min(twice)} "
                "twice"
            )
        wanted |= links
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
        partial.mkdir(parents=True)
        for name, organ in wanted.items():
            (partial / name).symlink_to(organ, target_is_directory=True)
        try:
            partial.rename(folder)  # other processes see all links or none
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    present = {path.name: path.resolve() for path in folder.iterdir()}
    others = sorted({name for name, _ in present.items() ^ wanted.items()})
    if others:
        raise UserError(
            f"--pretrain: {folder} links to other data ({shortened(others)}), expected the same "
            "folders or another --out"
        )


# ---- the child: one run ----


def child(arguments: Sequence[str]) -> None:
    """Train and score one run, or score a finished one again; then measure it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    parser.add_argument("--net", default="", help="of unets.NETS; none = nucsam")
    parser.add_argument("--start", type=Path, help="adapter file that the U-Net starts from")
    parser.add_argument("--export", type=Path, help="run whose merged weights are model.weights")
    parser.add_argument("--again", type=Path, help="finished run to score with these settings")
    parser.add_argument("--tta", action="store_true", help="score it with test-time augmentation")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)
    settings = config.load_config(args.settings)
    if args.again:
        score_again(RunDirectory(args.again), RunDirectory(args.out), settings, tta=args.tta)
        return
    if args.start:
        pretraining = RunDirectory(args.start.parent)
        if not pretraining.scores_file.is_file():
            raise UserError(
                f"{pretraining.path}: found no {pretraining.scores_file.name}, expected a finished "
                "pretraining"
            )
    merged = Path(settings.model.weights)
    if args.export and not merged.is_file():
        # Atomic: another child that exports at the same time writes the same bytes.
        export_run(args.export, merged, force=True)
    build = partial(unets.build, args.net, start=args.start) if args.net else network.build_model
    nucsam.fit(settings, args.out, resume=args.resume, build=build)
    run = RunDirectory(args.out)
    # The log knows the memory of the processes before an interruption.
    peaks = [line["memory_gib"] for line in run.read_metrics() if "memory_gib" in line]
    measured = {
        "peak_gib": max(peak_gib(), *peaks),
        "inference_seconds": inference_seconds(run, settings, build),
    }
    write_text(run.path / MEASURED, json.dumps(measured) + "\n")


def peak_gib() -> float:
    """Peak memory of this process: allocated on its GPU, or resident on a CPU."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def open_finished(
    run: RunDirectory, settings: Config, build: Callable[..., nn.Module]
) -> tuple[nn.Module, Samples, Accelerator, dict[str, Any]]:
    """A finished run.

    Returns:
        Its net with the best weights, its test images, the accelerator that scores it, and the
        metadata of its adapter.
    """
    base = checkpoint.run_base(run, settings)
    net = build(settings.model, base, seed=settings.train.seed)
    metadata = checkpoint.load_adapter(run.adapter_file, net, base)
    accelerator = scoring_accelerator(metadata)
    net.to(accelerator.device)
    records, split = splits.find_split(settings.data)
    test = [records[i] for i in split.test or split.inner]
    samples = Samples(test, memory_gib=settings.data.memory)
    return net, samples, accelerator, metadata


def inference_seconds(
    run: RunDirectory, settings: Config, build: Callable[..., nn.Module], *, tta: bool = False
) -> float:
    """Median wall time from an image in memory to its label map, one image at a time."""
    net, samples, accelerator, _ = open_finished(run, settings, build)
    predictor = scoring_predictor(net, settings, accelerator.mixed_precision, tta=tta)
    predictor.predict(samples[0].image)  # warms up
    seconds = []
    for k in range(min(TIMED, len(samples))):
        image = samples[k].image
        began = time.perf_counter()
        predictor.predict(image)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def score_again(run: RunDirectory, out: RunDirectory, settings: Config, *, tta: bool) -> None:
    """Score a finished nucsam run with other settings of prediction, as the run directory `out`."""
    net, samples, accelerator, metadata = open_finished(run, settings, network.build_model)
    certainty = known_certainty(settings, metadata)
    options = {"tta": tta, "certainty": certainty}
    results = score_images(net, settings, samples, range(len(samples)), accelerator, **options)
    out.path.mkdir(parents=True, exist_ok=True)
    for source, target in (
        (run.images_file, out.images_file),
        (run.environment_file, out.environment_file),
        (run.metrics_file, out.metrics_file),
    ):
        shutil.copyfile(source, target)
    write_text(out.config_file, config.to_toml(settings))
    out.write_scores(describe_scores(results, metadata, of="test", certainty=certainty))
    measured = json.loads((run.path / MEASURED).read_text())
    measured["inference_seconds"] = inference_seconds(run, settings, network.build_model, tta=tta)
    write_text(out.path / MEASURED, json.dumps(measured) + "\n")


# ---- the table ----


def results(job: Job) -> dict[str, Any] | None:
    """The numbers of a finished run, scores 0..1; None of an unfinished run."""
    scores = job.scores()
    if scores is None:
        return None
    environment = job.directory.read_environment()
    t = job.config.train
    batches = math.ceil(environment["images"]["train"] / t.batch)  # the last one is filled up
    return {
        **scores["headline"],
        "epoch": scores["epoch"],
        "on_test": scores["epoch_chosen_by"].endswith("test split"),
        "base": scores["base"]["source"],
        **{key: environment.get(key) for key in ("device", "threads")},
        "trainable": environment["parameters_trainable"],
        "parameters": environment["parameters"],
        "presentations": batches * t.batch * t.epochs,
        "train_seconds": sum(line.get("seconds", 0.0) for line in job.directory.read_metrics()),
        **json.loads((job.run / MEASURED).read_text()),
    }


def table_row(plan: Plan, name: str, start: bool) -> dict[str, Any]:
    """A row of the table: means over seeds and folds, and spreads."""
    runs, missing = {}, []
    for seed in plan.seeds:
        for fold in plan.folds:
            run = results(plan.job(name, start, seed, fold))
            if run is None:
                missing.append(f"seed {seed}, fold {fold}")
                continue
            if MODELS[name].net:  # the base of its run is MobileSAM, which it does not use
                run["base"] = "pretrained" if start else "none"
            runs[seed, fold] = run
    row = {
        "model": row_name(name, start),
        "kind": name,
        "pretrained": start,
        "missing": missing,
        "runs": [{"seed": seed, "fold": fold, **run} for (seed, fold), run in runs.items()],
        "on_test": any(run["on_test"] for run in runs.values()),
        **spreads(plan.seeds, plan.folds, runs),
    }
    for fact in FACTS:
        row[fact] = statistics.fmean(run[fact] for run in runs.values()) if runs else math.nan
    return row


def spreads(
    seeds: Sequence[int],
    folds: Sequence[int],
    runs: Mapping[tuple[int, int], Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Means and sample standard deviations of Dice, AJI and PQ, in percent.

    Args:
        seeds: of the plan.
        folds: of the plan.
        runs: (seed, fold) -> scores 0..1 of a finished run.

    Returns:
        For each metric: `mean`; `folds`, the deviation over folds of the means over seeds; `seeds`,
        the deviation over seeds of the means over those folds that all seeds have. NaN where
        there is no value, and the deviation of one value.
    """
    by_fold = [[runs[seed, fold] for seed in seeds if (seed, fold) in runs] for fold in folds]
    whole = [fold for fold in folds if all((seed, fold) in runs for seed in seeds)]
    by_seed = [[runs[seed, fold] for fold in whole] for seed in seeds if whole]
    over = {
        "folds": over_folds([_means(group) for group in by_fold if group]),
        "seeds": over_folds([_means(group) for group in by_seed]),
    }
    return {
        metric: {
            "mean": 100 * over["folds"]["mean"][metric],
            "folds": 100 * over["folds"]["std"][metric],
            "seeds": 100 * over["seeds"]["std"][metric],
        }
        for metric in HEADLINE
    }


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return over_folds([{metric: run[metric] for metric in HEADLINE} for run in runs])["mean"]


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The difference from each goal.

    `met` is None where a side has no run; `complete` is false where a row lacks some of its runs.
    """
    measured = [row for row in rows if row["runs"]]
    results = []
    for text, name, peers, metric, least in GOALS:
        candidates = [row for row in measured if row["kind"] == name]
        others = [row for row in measured if row["kind"] in peers]
        goal = {"goal": text, "beside": "", "difference": math.nan, "met": None}
        if candidates and others:
            best = max(others, key=lambda row: row[metric]["mean"])
            difference = candidates[0][metric]["mean"] - best[metric]["mean"]
            goal |= {"beside": best["model"], "difference": difference, "met": difference >= least}
        complete = not any(row["missing"] for row in (*candidates, *others))
        results.append(goal | {"complete": complete})
    for row in measured:
        if row["kind"] == "lora":
            difference = row["trainable"] / 1e6 - MOST_TRAINED
            results.append(
                {
                    "goal": f"lora trains at most {MOST_TRAINED} M parameters",
                    "beside": "",
                    "difference": difference,
                    "met": difference <= 0,
                    "complete": True,
                }
            )
    return results


def markdown(plan: Plan, rows: Sequence[dict[str, Any]], verdicts: Sequence[dict[str, Any]]) -> str:
    """The table, the goals, and all settings."""
    head = "model|Dice|AJI|PQ|trained|parameters|training, min|inference, ms|peak, GiB"
    counts = sorted({row["presentations"] for row in rows if row["runs"]})
    presentations = " to ".join(f"{count:,.0f}" for count in counts) or "no"
    t = plan.common.train
    notes = [
        f"Folds {_listed(plan.folds)} of {plan.common.data.folds}, seeds {_listed(plan.seeds)}. "
        "Percent: mean over a fold's images, then over folds; ± standard deviation over folds; in "
        "brackets over seeds.",
        f"Budget of every model: {f'{t.epochs} epochs, ' * (not t.presentations)}{presentations} "
        "image presentations a run, "
        f"batch {t.batch * t.accumulate}. A model whose epoch is chosen on the test images trains "
        "on the inner split too.",
        "Training: mean over runs, without validation. Inference: median of one image at a time, "
        "instances included. Peak: of the training process, validation included (resident on a "
        "CPU, allocated on a GPU).",
    ]
    cells = []
    for goal in verdicts:
        peer = goal["beside"] and f"`{goal['beside']}`"
        cells.append([goal["goal"], peer, _signed(goal["difference"]), _verdict(goal)])
    return "\n".join(
        [
            _section("Accuracy", head, [_cells(plan, row) for row in rows], notes),
            _section("Goals", "goal|best beside|difference|", cells),
            "## Settings",
            "",
            *(f"- {text}" for text in settings_lines(plan)),
            "",
        ]
    )


def settings_lines(plan: Plan) -> list[str]:
    """Every setting that differs from nucsam's defaults, by model."""
    lines = [f"all: {_differences(Config(), plan.common)}"]
    images = ", ".join(f"`{path.name}`" for path in plan.pretrain)
    for job in plan.pretraining():
        differences = _differences(plan.common, job.config)
        lines.append(f"{job.name}, on {images}, beside all: {differences}")
    for name in sorted(plan.models, key=lambda name: bool(MODELS[name].again)):
        text = _differences(plan.common, plan.settings(name))
        if MODELS[name].again:
            text = f"runs of `{MODELS[name].again}`, {text}"
            text += ", test-time augmentation" * MODELS[name].tta
        lines.append(f"`{name}`: {text}")
    return lines


def _section(
    title: str, columns: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A heading, a table and remarks in Markdown; | separates the titles of the columns."""
    titles = columns.split("|")
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]
    return "\n".join([f"## {title}", "", *lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _differences(a: Config, b: Config) -> str:
    """`table.key = value` of b, without the path of the images."""
    lines = [text for name, text in config.differences(a, b).items() if name != "data.root"]
    return ", ".join(f"`{line.replace(': ', ' ', 1)}`" for line in lines) or "nothing"


def _cells(plan: Plan, row: dict[str, Any]) -> list[str]:
    marks = [f"`{row['model']}`"]
    if row["on_test"]:
        marks.append("EPOCH CHOSEN ON THE TEST IMAGES")
    if row["missing"]:
        marks.append(f"INCOMPLETE: {'; '.join(row['missing'])} missing")
    if row["pretrained"]:
        marks.append("pretrained")
    elif MODELS[row["kind"]].net:
        marks.append("from scratch")
    elif plan.settings(row["kind"]).model.weights == "none":
        marks.append("base weights: random")
    return [
        "; ".join(marks),
        *(_metric_cell(row[metric]) for metric in HEADLINE),
        _number(row["trainable"], ",.0f"),
        _number(row["parameters"], ",.0f"),
        _number(row["train_seconds"] / 60, ".1f"),
        _number(1000 * row["inference_seconds"], ".0f"),
        _number(row["peak_gib"], ".2f"),
    ]


def _metric_cell(value: dict[str, float]) -> str:
    if math.isnan(value["mean"]):
        return "-"
    text = f"{value['mean']:.2f}"
    if not math.isnan(value["folds"]):
        text += f" ± {value['folds']:.2f}"
    if not math.isnan(value["seeds"]):
        text += f" ({value['seeds']:.2f})"
    return text


def _verdict(goal: dict[str, Any]) -> str:
    if goal["met"] is None:
        return "not measured"
    return ("met" if goal["met"] else "missed") + ("" if goal["complete"] else ", INCOMPLETE")


def _signed(value: float) -> str:
    return _number(value, "+.2f")


def _number(value: float, digits: str) -> str:
    return "-" if math.isnan(value) else format(value, digits)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each finished run; scores are 0..1."""
    lines = [{"model": row["model"], **run} for row in rows for run in row["runs"]]
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw Dice, AJI and PQ of the rows that have runs.

    A bar is a mean, a dot is a run. Bars are hatched where the test images chose the epoch.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["runs"]][::-1]
    colours = ["#c8643c" if MODELS[row["kind"]].net else "#2b6ca3" for row in rows]
    figure = Figure((12, 1.2 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, metric, title in zip(panels, HEADLINE, ("Dice", "AJI", "PQ")):
        means = [row[metric]["mean"] for row in rows]
        bars = axes.barh(range(len(rows)), means, color=colours, height=0.7, alpha=0.55)
        for k, (row, bar) in enumerate(zip(rows, bars)):
            bar.set_hatch("///" if row["on_test"] else "")
            values = [100 * run[metric] for run in row["runs"]]
            axes.plot(values, [k] * len(values), "o", color="black", markersize=3)
            axes.text(110, k, f"{means[k]:.1f}", va="center", ha="right", fontsize=9)
        axes.set(title=f"{title}, %", xlim=(0, 110), xticks=range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
    labels = []
    for row in rows:
        mark = ", incomplete" if row["missing"] else ""
        labels.append(f"{row['model']}{mark}, {row['trainable'] / 1e6:.2f} M trained")
    panels[0].set_yticks(range(len(rows)), labels)
    legend = "blue: nucsam; red: U-Nets; bars: means; dots: runs; hatched: epoch chosen on the test"
    figure.suptitle(f"{legend} images", fontsize=9)
    figure.savefig(path, dpi=130)


# ---- the command ----


def model_names(text: str) -> tuple[str, ...]:
    """Names of models from a list with commas; names of `SETS` are written out."""
    names = [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(model for name in names for model in SETS.get(name, (name,))))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


def parse(arguments: Sequence[str]) -> Plan:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG.toml | table.key=value")
    add("--out", type=Path, required=True)
    expected = ", ".join([*SETS, *MODELS])
    add("--models", type=model_names, default=MUSTS, help=f"of {expected}")
    add("--folds", type=numbers, help="default: all")
    add("--seeds", type=numbers, default=(0,))
    repeated = {"action": "append", "default": [], "help": "may be repeated"}
    add("--pretrain", type=Path, metavar="DATA", **repeated)
    add("--pretrain-set", metavar="table.key=value", **repeated)
    args = parser.parse_intermixed_args(arguments)
    common = config.load_config(*cli.configuration(args.settings))
    return Plan(
        common,
        args.out,
        args.models,
        tuple(range(common.data.folds)) if args.folds is None else args.folds,
        args.seeds,
        tuple(args.pretrain),
        tuple(args.pretrain_set),
    )


def report(plan: Plan) -> list[dict[str, Any]]:
    """Write and print the table of all runs, and return its rows."""
    rows = [table_row(plan, name, start) for name, start in plan.rows()]
    verdicts = goals(rows)
    text = markdown(plan, rows, verdicts)
    options = asdict(plan)
    del options["common"], options["out"]
    options["pretrain"] = [path.name for path in plan.pretrain]
    document = {
        "benchmark": "accuracy",
        **options,
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "config": plan.common.to_dict(),
        "rows": rows,
        "goals": verdicts,
    }
    line = json.dumps(without_nan(document))
    write_text(plan.out / "accuracy.md", text)
    write_text(plan.out / "accuracy.json", line + "\n")
    write_text(plan.out / "accuracy.csv", csv_text(rows))
    draw(rows, plan.out / "accuracy.png")
    print(text)
    print(line)
    return rows


def main(arguments: Sequence[str]) -> int:
    """Do the missing jobs, then write the table.

    Returns:
        1 on the first process if a run is missing, else 0.
    """
    plan = parse(arguments)
    if not find_spec("matplotlib"):  # says so before days of training
        raise UserError("matplotlib: not installed, needed for the figure; pip install matplotlib")
    if plan.pretrain:
        link(plan.pretrain, plan.out / "pretrain" / "data")
    runner.check_images(plan.training(again=False))
    common = replace(plan.common, data=replace(plan.common.data, fold=0))
    for jobs in (plan.pretraining(), plan.training(again=False), plan.training(again=True)):
        if jobs:
            runner.run_jobs(jobs, common, plan.out)
    if not processes.is_first():
        return 0
    return 1 if any(row["missing"] for row in report(plan)) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        sys.exit()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        sys.exit(2)
