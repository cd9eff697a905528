"""How do time and memory grow with the size of an image, its nuclei, the data set, and the number of processes?

    python benchmarks/scaling.py [--config CONFIG.toml] [--device cpu] [--batch 1] [--dtype fp32|bf16|fp16] [--repeat 3]
        [--only image-size nuclei data processes] [--sides 128 256 512 1024] [--nuclei 10 30 100 300 600]
        [--counts 8 32 128 512] [--processes 1 2 4] [--epochs 3] [--image-size 128] [--threads N] [--json FILE]
        [--plot [FOLDER]]

image-size: a training step and a forward pass at `--sides` model px.
nuclei: targets, instances and scoring of one 512 px image.
data: images of 512 px decoded into memory, and a whole epoch of the loader in the training process.
processes: four folds by `nucsam.folds`, one after another in each of N processes, and one fold by `nucsam.train` with
    DDP over N, `--epochs` of about 160 images in batches of `--batch` a process, with crops of `--image-size` px at
    scale 1, on one thread a process. Folds count all of a run, from starting Python to its report; DDP the images a
    second after the first epoch. Efficiency is the rate of N over N times that of one. On GPUs, as many as there are.

Milliseconds are of wall time, on a CPU with one thread of torch of CPU time. Of each curve the exponent is fitted:
time ~ size^exponent. `--plot` draws scaling-*.png, log-log, into this folder or another. Prints tables, and one JSON
line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
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

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
import data as epochs
import instances
import train_step

from nucsam import targets
from nucsam.augment import window
from nucsam.data import Crops, EpochBatches, Samples, find_records
from nucsam.metrics import PROTOCOLS, score
from nucsam.synthetic import write_dataset

HERE = Path(__file__).resolve().parent
FOLDS, IMAGES = 4, 240  # of the processes' runs
Curves = dict[str, dict[int, float]]  # name with its unit -> {size: value}


def image_size(args: argparse.Namespace, folder: Path) -> Curves:
    write_dataset(folder, images=args.batch, size=train_step.SIDE, seed=0)
    samples, found = Samples(find_records(folder), progress=False), {}
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
            add(found, f"{name}, ms", side, rows[name][run.clock])
            add(found, f"{name}, MiB", side, run.peak_mib(call))
    return found


def nuclei(args: argparse.Namespace, _: Path) -> Curves:
    machine, host, found = bench.Machine(args), bench.host(args), {}
    for n in args.nuclei:
        labels = instances.scene(train_step.SIDE, n)
        maps = instances.maps_of(labels)
        pred, batch = instances.ours(maps), torch.from_numpy(labels)[None].to(machine.device).long()

        def make_targets(labels: torch.Tensor, n: int) -> None:
            targets.depth(labels, targets.classes(labels), n)

        calls: dict[str, Callable[[], object]] = {
            "targets": partial(make_targets, batch, n),
            "instances": partial(instances.ours, maps),
            "score": partial(score, labels, pred, protocol=PROTOCOLS["plain"]),
        }
        for name, call in calls.items():
            where = machine if name == "targets" else host
            row = where.turns({name: lambda _, call=call: call()}, args.repeat)[name]
            add(found, f"{name}, ms", n, row[where.clock])
            add(found, f"{name}, MiB", n, where.peak_mib(call))
    return found


def data_set(args: argparse.Namespace, folder: Path) -> Curves:
    config, found = args.config, {}
    for count in args.counts:
        records = epochs.make_records(folder / str(count), count)
        start = time.perf_counter()
        samples = Samples(records, progress=False)
        add(found, "decoding, s", count, time.perf_counter() - start)
        kept = sum(pixels.nbytes for pixels in (samples.image, samples.label, samples.vague))
        add(found, "decoded, MiB", count, kept / 2**20)
        crops = Crops(samples, window=window(config.data.crop, config.augment), seed=0)
        batches = EpochBatches(range(count), batch=args.batch)
        loader, seconds = DataLoader(crops, batch_sampler=batches), []
        for number in range(args.repeat + 1):
            batches.set_epoch(number)
            start = time.perf_counter()
            for _ in loader:
                pass
            seconds.append(time.perf_counter() - start)
        add(found, "epoch of the loader, s", count, statistics.median(seconds[1:]))
    return found


def processes(args: argparse.Namespace, folder: Path) -> Curves:
    write_dataset(folder / "data", images=IMAGES, size=max(args.image_size, 96), seed=0)
    precision = args.dtype
    settings = [f"data.root={folder / 'data'}", f"data.folds={FOLDS}", f"data.crop={args.image_size}", "data.scale=1"]
    settings += ["data.inner=0.1", "model.weights=none", f"train.batch={args.batch}", f"train.epochs={args.epochs}"]
    settings += [f"train.precision={precision}", f"train.validate_every={args.epochs}", "data.workers=0"]
    (folder / "empty.toml").touch()
    found: Curves = {}
    for count in args.processes:
        seconds = launch(args, count, "nucsam.folds", settings, folder / f"folds{count}")
        add(found, "folds, folds/minute", count, 60 * FOLDS / seconds)
        launch(args, count, "nucsam.train", settings, folder / f"ddp{count}")
        lines = (folder / f"ddp{count}" / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["images_per_second"] for line in lines[1:] or lines]
        add(found, "DDP, images/s", count, statistics.median(rates))
    return found


def launch(args: argparse.Namespace, count: int, module: str, settings: Sequence[str], out: Path) -> float:
    """Run a module of nucsam by so many processes; seconds."""
    command = ["-m", module, str(out.parent / "empty.toml"), *settings, "--out", str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    environment |= {"ACCELERATE_USE_CPU": "true"} if args.device == "cpu" else {}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *torchrun, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{module} by {count} processes ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def add(found: Curves, name: str, size: int, value: float) -> None:
    found.setdefault(name, {})[size] = value


MEASURES = {"image-size": image_size, "nuclei": nuclei, "data": data_set, "processes": processes}
SIZES = {"image-size": "model px a side", "nuclei": "nuclei", "data": "images", "processes": "processes"}


def exponent(curve: Mapping[int, float]) -> float:
    """The slope of a straight line through the logarithms; NaN where there is none."""
    points = [(size, value) for size, value in curve.items() if value > 0]
    return float(np.polyfit(*np.log(points).T, 1)[0]) if len(points) > 1 else float("nan")


def plot(name: str, curves: Curves, exponents: Mapping[str, float], path: Path) -> None:
    """Log-log, a panel for each unit."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    units = list(dict.fromkeys(label.rpartition(", ")[2] for label in curves))
    figure = Figure((4.5 * len(units), 3.6), layout="constrained")
    for axes, unit in zip(np.atleast_1d(figure.subplots(1, len(units))), units):
        for label, curve in curves.items():
            if label.endswith(f", {unit}"):
                what = label.rpartition(", ")[0]
                what += f", slope {exponents[label]:.2f}" if name != "processes" else ""
                (line,) = axes.loglog(list(curve), list(curve.values()), "o-", label=what)
                if name == "processes":  # dotted: N times the rate of one
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
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)  # over no curve
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=1, image_size=128, repeat=3)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    bench.add_config(parser)
    parser.add_argument("--sides", type=bench.integer(64, of=32), nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--nuclei", type=bench.integer(), nargs="+", default=[10, 30, 100, 300, 600])
    parser.add_argument("--counts", type=bench.integer(), nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--processes", type=bench.integer(), nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=bench.integer(2), default=3, help="of the processes' runs")
    parser.add_argument("--plot", type=Path, nargs="?", const=HERE, metavar="FOLDER", help="draw scaling-*.png")
    args = bench.parse(parser, arguments)
    if args.plot and not args.plot.is_dir():
        parser.error(f"--plot: found no folder {args.plot}, expected one that is there")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot: matplotlib is not installed; pip install matplotlib")
    gpus = math.inf if args.device == "cpu" else torch.cuda.device_count()
    if left := [n for n in args.processes if n > gpus]:
        print(f"processes: {', '.join(map(str, left))} left out, there are {gpus} GPUs")
        args.processes = [n for n in args.processes if n <= gpus]
    console, results, exponents = Console(width=120), {}, {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            curves = results[name] = MEASURES[name](args, Path(folder) / "data")
        exponents[name] = {label: exponent(curve) for label, curve in curves.items()}
        rows = {label: {str(size): value for size, value in curve.items()} for label, curve in curves.items()}
        for label, row in rows.items():
            row["exponent"] = f"{exponents[name][label]:.2f}"
            if name == "processes":
                first = min(curves[label])
                parts = [f"{first * v / (size * curves[label][first]):.0%}" for size, v in curves[label].items()]
                row["efficiency"] = ", ".join(parts)
        console.print(bench.table(f"{args.device}, {args.dtype}, batch {args.batch}", rows, first=SIZES[name]))
        if args.plot:
            plot(name, curves, exponents[name], args.plot / f"scaling-{name}.png")
    about = bench.Machine(args)
    document = {"benchmark": "scaling", **bench.asked(args), **about.about(), "ceiling": about.ceiling()}
    bench.finish(document | {"results": results, "exponents": exponents}, args.json)


if __name__ == "__main__":
    main()
