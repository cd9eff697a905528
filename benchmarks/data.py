"""Does the device wait for data in a whole epoch?

    pip install peft
    python benchmarks/data.py [--config CONFIG.toml] [--device cpu] [--batch 4] [--image-size 512]
        [--dtype fp32|bf16|fp16] [--images 665] [--workers 0 1 2] [--repeat 2] [--steps 0] [--ways nucsam plain files]
        [--threads N] [--json FILE]

Synthetic images of 512 px, as many as NuInsSeg has. `--image-size` is the side of a crop in model px.
nucsam: decoded once, at the start, into memory that loader workers share; augmentation and targets on the device.
plain: the same memory, but augmentation and targets by numpy, scipy and scikit-image in the workers.
files: plain, and each image and label file is read whenever it is asked for.

loader: epochs of the loader alone, whole ones of nucsam's. training: epochs with the training step of train_step.py, of
`--steps` batches (0 = all), the first one with the start of the workers, then `--repeat` more; "first epoch, s" has the
decoding too, where all is decoded at the start. "waits" is the part of an epoch in which the training process waits for
the loader with nothing queued on the device (it is idle before each question, so this is the most that it can wait). On
a GPU one more epoch runs without that, as training does: "busy" is its rate beside that of as many steps on one batch,
loaded before. "of a copy" is the loader's bytes a second beside a copy's in the host's memory. Prints tables, and one
JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy runs in the loader's workers, one a core

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
import train_step
from train_step import SIDE, Bench, Way

from nucsam.data import EpochBatches, Record, Samples, find_records
from nucsam.synthetic import write_dataset

DISTINCT = 30  # images that are made; the others are links to them
WAYS = ("nucsam", "plain", "files")
BAR = 0.05  # of an epoch that the device may wait


def make_records(folder: Path, images: int) -> list[Record]:
    """The records of a data set of so many image files, made in `folder`."""
    write_dataset(folder, images=min(images, DISTINCT), size=SIDE, seed=0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(1, -(-images // DISTINCT)):
        for path in files:
            path.with_stem(f"{path.stem}_{number}").hardlink_to(path)
    return find_records(folder)[:images]


class Watched:
    """A way's loader and its steps, with the seconds that it was waited for."""

    def __init__(self, run: Bench, way: Way, workers: int, steps: int) -> None:
        self.run, self.way = run, way
        self.batches = EpochBatches(range(len(way.data)), batch=run.batch)
        self.skip = max(0, self.batches.steps - steps) if steps else 0
        how = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": run.cuda}
        self.loader = DataLoader(way.data, batch_sampler=self.batches, **how)

    def epoch(self, number: int, *, train: bool, wait: bool = True) -> dict[str, float]:
        """Seconds, images a second and the share of waiting of an epoch; `wait`: for the device after each step."""
        self.batches.set_epoch(number, skip=self.skip)
        began, waited, images = time.perf_counter(), 0.0, 0
        stream, start = iter(self.loader), began
        while (batch := next(stream, None)) is not None:
            waited += time.perf_counter() - start
            images += len(batch["image"])
            if train:
                self.run.step(self.way, batch)
            if wait:
                self.run.synchronize()
            start = time.perf_counter()
        self.run.synchronize()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "images_per_second": images / seconds, "waits": waited / seconds, "images": images}

    def busy(self, number: int) -> float:
        """The rate of an epoch, without waiting for the device, beside that of as many steps on one batch."""
        batch = self.run.loaded(self.way)
        self.run.synchronize()
        began = time.perf_counter()
        for _ in range(steps := self.batches.steps - self.skip):
            self.run.step(self.way, batch)
        self.run.synchronize()
        alone = steps * self.run.batch / (time.perf_counter() - began)
        return self.epoch(number, train=True, wait=False)["images_per_second"] / alone


def measure(run: Bench, ways: dict[str, Way], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{"WAY WORKERS": numbers}: the loader alone, the first training epoch, the later ones (medians)."""
    found = {}
    for name, way in ways.items():
        run.step(way, run.loaded(way))  # warms up
        for workers in args.workers:
            alone = Watched(run, way, workers, 0 if name == "nucsam" else args.steps)
            alone.epoch(0, train=False)
            row = {"loader": middle([alone.epoch(n, train=False) for n in range(1, args.repeat + 1)])}
            del alone  # ends its workers
            training = Watched(run, way, workers, args.steps)
            row["first"], *later = (training.epoch(number, train=True) for number in range(args.repeat + 1))
            row["later"] = middle(later)
            if run.cuda:
                row["later"]["busy"] = training.busy(args.repeat + 1)
            found[f"{name} {workers}"] = row
            del training
    return found


def middle(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The medians, and the spread of seconds."""
    row = {key: statistics.median(of[key] for of in rows) for key in rows[0]}
    seconds = [of["seconds"] for of in rows]
    return row | {"seconds_min": min(seconds), "seconds_max": max(seconds)}


def show(console: Console, document: dict[str, Any]) -> None:
    title = "{device}, {dtype}, batch {batch}, {image_size} model px, {images} images of 512 px".format(**document)
    copy, item, rows = document["ceiling"]["gb_per_s"], document["item_bytes"], {}
    for name, of in document["results"].items():
        loader, first, later = of["loader"], of["first"], of["later"]
        rows[name] = {
            "loader images/s": loader["images_per_second"],
            "of a copy": f"{1e-9 * item * loader['images_per_second'] / copy:.1%}",
            "training images/s": later["images_per_second"],
            "first epoch, s": first["seconds"] + document["decode_s"] * (not name.startswith("files")),
            "later ones, s": f"{later['seconds_min']:.3g} - {later['seconds_max']:.3g}",
            "first waits": f"{first['waits']:.1%}",
            "later wait": f"{later['waits']:.1%}",
        }
        if "busy" in later:
            rows[name]["busy"] = f"{later['busy']:.1%}"
    about = "{decode_s:.3g} s to decode all once, {decode_mib:.0f} MiB".format(**document)
    console.print(bench.table(title, rows, f"{about}; a memory copy: {copy:.3g} GB/s", "workers"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, repeat=2)
    bench.add_config(parser)
    parser.add_argument("--images", type=bench.integer(), default=665)
    parser.add_argument("--workers", type=bench.integer(0), nargs="+", default=[0, 1, 2], help="loader workers")
    parser.add_argument("--steps", type=bench.integer(0), default=0, help="batches of a training epoch; 0 = all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = bench.parse(parser, arguments)
    if args.images < args.batch:
        parser.error(f"--images: found {args.images}, expected at least a batch, {args.batch}")
    config = bench.cropped(args.config, args.image_size)
    run, console = Bench(args, config), Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder) / "data", args.images)
        start = time.perf_counter()
        samples = Samples(records, progress=False)
        decoded = time.perf_counter() - start
        first = torch.stack([torch.from_numpy(samples[i].image) for i in range(args.batch)]).permute(0, 3, 1, 2)
        first = torch.nn.functional.interpolate(first.float(), (args.image_size, args.image_size), mode="bilinear")
        ways = train_step.build(train_step.random_base(first), samples, config, run.device, ["nucsam", "plain"])
        if "plain" in ways:
            files = Samples(records, memory_gib=0, progress=False)
            ways["files"] = replace(ways["plain"], data=train_step.PlainCrops(files, config))
        ways = {name: way for name, way in ways.items() if name in args.ways}
        if "plain" not in ways and len(args.ways) > len(ways):
            console.print("plain, files: skipped, peft is not installed")
        item = sum(tensor.nbytes for tensor in next(iter(ways.values())).data[0, 0].values())
        results = measure(run, ways, args)
    packages = ["peft"] if train_step.peft else []
    document = {"benchmark": "data", **bench.asked(args), **run.about(packages), "ceiling": bench.host(args).ceiling()}
    memory = sum(t.nbytes for t in (samples.image, samples.label, samples.vague)) / 2**20
    document |= {"decode_s": decoded, "decode_mib": memory, "item_bytes": item, "results": results}
    own = [of["later"] for name, of in results.items() if name.startswith("nucsam")]
    idle = [1 - later["busy"] if run.cuda else later["waits"] for later in own]
    document["met"] = min(idle) <= BAR if own else None
    show(console, document)
    if own:
        said = "met" if document["met"] else "MISSED"
        console.print(f"bar: the device waits at most {BAR:.0%} of a later epoch, with the best of --workers: {said}")
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
