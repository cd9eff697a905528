"""How do time and memory grow with the image, its nuclei, the data set and the processes?

    python benchmarks/scaling.py [--config CONFIG.toml] [--device cpu] [--batch 1]
        [--dtype fp32|bf16|fp16] [--repeat 3] [--only image-size nuclei data processes]
        [--sides 128 256 512 1024] [--nuclei 10 30 100 300 600] [--counts 8 32 128 512]
        [--processes 1 2 4] [--epochs 3] [--image-size 128] [--threads N] [--json FILE]
        [--plot [FOLDER]]

- image-size: a training step and a forward pass at `--sides` model px.
- nuclei: targets, instances and scoring of one 512 px image.
- data: images of 512 px decoded into memory, and a whole epoch of the loader in the training
  process.
- processes: four folds by `nucsam.folds`, one after another in each of N processes; one fold by
  `nucsam.train` with DDP over N; and on a CPU one process of N threads with N times the batch. Each
  run has `--epochs` of about 160 images, batches of `--batch` a process, and crops of
  `--image-size` px at scale 1. The processes of folds and of DDP have one thread each. Folds count
  the whole run, from the start of Python to its report. The others count the images per second
  after the first epoch. Efficiency is the rate of N over N times that of one. At most as many
  processes run as there are GPUs.

Milliseconds are wall time, but CPU time on a CPU with one thread of torch. The script fits the
exponent of each curve: time ~ size^exponent. `--plot` draws scaling-*.png, log-log, into this
folder or another. The script prints tables, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
import data as epochs
import instances
import train_step

from nucsam.data.augment import window
from nucsam.data.folders import find_records
from nucsam.data.samples import Crops, EpochBatches, Samples
from nucsam.data.synthetic import write_dataset
from nucsam.model import targets
from nucsam.run.directory import RunDirectory
from nucsam.score.metrics import PROTOCOLS, score_maps

HERE = Path(__file__).resolve().parent
FOLDS, IMAGES = 4, 240  # of the runs of processes
Curves = dict[str, dict[int, float]]  # name with its unit -> {size: value}


def image_size(args: argparse.Namespace, folder: Path) -> Curves:
    write_dataset(folder, images=args.batch, size=train_step.SIDE, seed=0)
    samples = Samples(find_records(folder))
    curves: Curves = {}
    for side in args.sides:
        config = bench.cropped(args.config, side)
        run = train_step.Bench(argparse.Namespace(**vars(args), steps=1), config)
        images = torch.rand(args.batch, 3, side, side) * 255
        way = train_step.ours(train_step.random_base(images), samples, config, run.device)
        batch, images = run.loaded(way), images.to(run.device)

        def forward(_: int = 0, run=run, way=way, images=images) -> None:
            with torch.no_grad(), run.cast():
                way.head(way.encoder(images), (run.crop, run.crop))

        def step(_: int = 0, run=run, way=way, batch=batch) -> None:
            run.step(way, batch)

        rows = run.turns({"training step": step, "forward": forward}, args.repeat)
        for name, call in (("training step", step), ("forward", forward)):
            add(curves, f"{name}, ms", side, rows[name][run.clock])
            add(curves, f"{name}, MiB", side, run.peak_mib(call))
    return curves


def nuclei(args: argparse.Namespace, _: Path) -> Curves:
    machine, host = bench.Machine(args), bench.host(args)
    curves: Curves = {}
    for n in args.nuclei:
        labels = instances.scene(train_step.SIDE, n)
        maps = instances.maps_of(labels)
        pred = instances.ours(maps)
        batch = torch.from_numpy(labels)[None].to(machine.device).long()

        def make_targets(labels: torch.Tensor, n: int) -> None:
            targets.depth(labels, targets.classes(labels), n)

        calls: dict[str, Callable[[], object]] = {
            "targets": partial(make_targets, batch, n),
            "instances": partial(instances.ours, maps),
            "score": partial(score_maps, labels, pred, protocol=PROTOCOLS["plain"]),
        }
        for name, call in calls.items():
            place = machine if name == "targets" else host
            row = place.turns({name: lambda _, call=call: call()}, args.repeat)[name]
            add(curves, f"{name}, ms", n, row[place.clock])
            add(curves, f"{name}, MiB", n, place.peak_mib(call))
    return curves


def data_set(args: argparse.Namespace, folder: Path) -> Curves:
    config = args.config
    curves: Curves = {}
    for count in args.counts:
        records = epochs.make_records(folder / str(count), count)
        start = time.perf_counter()
        samples = Samples(records)
        add(curves, "decoding, s", count, time.perf_counter() - start)
        add(curves, "decoded, MiB", count, samples.kept_bytes / 2**20)
        crops = Crops(samples, window=window(config.data.crop, config.augment), seed=0)
        batches = EpochBatches(range(count), batch=args.batch)
        loader, seconds = DataLoader(crops, batch_sampler=batches), []
        for number in range(args.repeat + 1):
            batches.set_epoch(number)
            start = time.perf_counter()
            for _ in loader:
                pass
            seconds.append(time.perf_counter() - start)
        add(curves, "epoch of the loader, s", count, statistics.median(seconds[1:]))
    return curves


def processes(args: argparse.Namespace, folder: Path) -> Curves:
    write_dataset(folder / "data", images=IMAGES, size=max(args.image_size, 96), seed=0)
    settings = [
        f"data.root={folder / 'data'}",
        f"data.folds={FOLDS}",
        f"data.crop={args.image_size}",
        "data.scale=1",
        "data.inner=0.1",
        "data.workers=0",
        "model.weights=none",
        f"train.batch={args.batch}",
        f"train.epochs={args.epochs}",
        f"train.precision={args.dtype}",
        f"train.validate_every={args.epochs}",
    ]
    (folder / "empty.toml").touch()
    curves: Curves = {}
    for count in args.processes:
        seconds = launch(args, count, "nucsam.folds", settings, folder / f"folds{count}")
        add(curves, "folds, folds/minute", count, 60 * FOLDS / seconds)
        run = RunDirectory(folder / f"ddp{count}")
        launch(args, count, "nucsam.train", settings, run.path)
        add(curves, "DDP, images/s", count, median_rate(run))
        if args.device == "cpu":
            run = RunDirectory(folder / f"threads{count}")
            batch = f"train.batch={count * args.batch}"
            launch(args, 1, "nucsam.train", [*settings, batch], run.path, threads=count)
            add(curves, "threads of one process, images/s", count, median_rate(run))
    return curves


def median_rate(run: RunDirectory) -> float:
    """Images per second after the first epoch."""
    lines = run.read_metrics()
    return statistics.median(line["images_per_second"] for line in lines[1:] or lines)


def launch(
    args: argparse.Namespace,
    count: int,
    module: str,
    settings: Sequence[str],
    out: Path,
    threads: int = 1,
) -> float:
    """Run a module of nucsam in `count` processes, and return the seconds it took.

    Raises:
        SystemExit: a process has failed.
    """
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["-m", module, str(out.parent / "empty.toml"), *settings, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)}
    if args.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(
            f"{module} in {count} processes ended with status {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return time.perf_counter() - start


def add(curves: Curves, name: str, size: int, value: float) -> None:
    curves.setdefault(name, {})[size] = value


MEASURES = {"image-size": image_size, "nuclei": nuclei, "data": data_set, "processes": processes}
SIZES = {
    "image-size": "model px a side",
    "nuclei": "nuclei",
    "data": "images",
    "processes": "processes",
}


def exponent(curve: Mapping[int, float]) -> float:
    """The slope of a line fitted to the logarithms; NaN of fewer than two points."""
    points = [(size, value) for size, value in curve.items() if value > 0]
    return float(np.polyfit(*np.log(points).T, 1)[0]) if len(points) > 1 else float("nan")


def plot(name: str, curves: Curves, exponents: Mapping[str, float], path: Path) -> None:
    """Draw the curves log-log, a panel for each unit."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    units = list(dict.fromkeys(label.rpartition(", ")[2] for label in curves))
    figure = Figure((4.5 * len(units), 3.6), layout="constrained")
    for axes, unit in zip(np.atleast_1d(figure.subplots(1, len(units))), units):
        for label, curve in curves.items():
            if label.endswith(f", {unit}"):
                title = label.rpartition(", ")[0]
                if name != "processes":
                    title += f", slope {exponents[label]:.2f}"
                (line,) = axes.loglog(list(curve), list(curve.values()), "o-", label=title)
                if name == "processes":  # dotted: N times the rate of one process
                    first, rate = next(iter(curve.items()))
                    ideal = [rate * size / first for size in curve]
                    axes.loglog(list(curve), ideal, ":", color=line.get_color())
        sizes = list(next(iter(curves.values())))
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axes.set(xlabel=SIZES[name], ylabel=unit)
        axes.grid(alpha=0.3)
        # above the axes, where it hides no curve
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    figure.savefig(path, dpi=90)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = bench.parser(__doc__, batch=1, image_size=128, repeat=3)
    bench.add_config(parser)
    add = parser.add_argument
    side = bench.integer(64, multiple_of=32)
    add("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    add("--sides", type=side, nargs="+", default=[128, 256, 512, 1024])
    add("--nuclei", type=bench.integer(), nargs="+", default=[10, 30, 100, 300, 600])
    add("--counts", type=bench.integer(), nargs="+", default=[8, 32, 128, 512])
    add("--processes", type=bench.integer(), nargs="+", default=[1, 2, 4])
    add("--epochs", type=bench.integer(2), default=3, help="of the runs of processes")
    add("--plot", type=Path, nargs="?", const=HERE, metavar="FOLDER", help="draw scaling-*.png")
    args = bench.parse(parser, arguments)
    if args.plot and not args.plot.is_dir():
        parser.error(f"--plot: found no folder {args.plot}, expected an existing one")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot: matplotlib is not installed; pip install matplotlib")
    gpus = math.inf if args.device == "cpu" else torch.cuda.device_count()
    if skipped := [n for n in args.processes if n > gpus]:
        print(f"processes: {', '.join(map(str, skipped))} skipped, there are {gpus} GPUs")
        args.processes = [n for n in args.processes if n <= gpus]
    return args


def show(
    console: Console,
    args: argparse.Namespace,
    name: str,
    curves: Curves,
    exponents: Mapping[str, float],
) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for label, curve in curves.items():
        rows[label] = {str(size): value for size, value in curve.items()}
        rows[label]["exponent"] = f"{exponents[label]:.2f}"
        if name == "processes":
            first = min(curve)
            parts = [
                f"{first * value / (size * curve[first]):.0%}" for size, value in curve.items()
            ]
            rows[label]["efficiency"] = ", ".join(parts)
    title = f"{args.device}, {args.dtype}, batch {args.batch}"
    console.print(bench.table(title, rows, first=SIZES[name]))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    console, results, exponents = Console(width=120), {}, {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            curves = results[name] = MEASURES[name](args, Path(folder) / "data")
        exponents[name] = {label: exponent(curve) for label, curve in curves.items()}
        show(console, args, name, curves, exponents[name])
        if args.plot:
            plot(name, curves, exponents[name], args.plot / f"scaling-{name}.png")
    machine = bench.Machine(args)
    document = {
        "benchmark": "scaling",
        **bench.options(args),
        **machine.about(),
        "ceiling": machine.ceiling(),
        "results": results,
        "exponents": exponents,
    }
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
