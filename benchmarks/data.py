"""Does training wait for its data?

    pip install peft
    python benchmarks/data.py [--config CONFIG.toml] [--device cpu] [--batch 4] [--image-size 512]
        [--dtype fp32|bf16|fp16] [--images 665] [--workers 0 1 2] [--repeat 2] [--steps 0]
        [--ways nucsam plain files] [--threads N] [--json FILE]

The images are synthetic, 512 px, as many as NuInsSeg has. `--image-size` is the side of a crop in
model px.

- nucsam: decodes all images once, into memory that the loader's workers share. The device augments
  and makes the targets.
- plain: has the same memory. The workers augment and make targets with numpy, scipy and
  scikit-image.
- files: like plain, but reads each image and label file whenever it is asked for.

The script times epochs of the loader alone, whole ones for nucsam. Then it times epochs with the
training step of train_step.py: the first, in which the workers start, and `--repeat` more, each of
`--steps` batches (0 = all). "first epoch, s" includes the decoding where all is decoded at the
start.

"waits" is the share of an epoch in which the training process waits for the loader with an idle
device. It is an upper bound, because the process also waits for the device after each step. On a
GPU one more epoch runs without that wait: "busy" is its speed beside that of as many steps on one
loaded batch. "of a copy" is the loader's bytes per second beside those of a copy in memory. The
script prints tables, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy works in the loader's workers

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

from nucsam.config import Config
from nucsam.data.folders import Record, find_records
from nucsam.data.samples import EpochBatches, Samples
from nucsam.data.synthetic import write_dataset

DISTINCT = 30  # images that are drawn; the others are links to them
WAYS = ("nucsam", "plain", "files")
GOAL = 0.05  # most of an epoch that the device may wait


def make_records(folder: Path, images: int) -> list[Record]:
    """Write a data set of `images` files into `folder`, and return its records."""
    write_dataset(folder, images=min(images, DISTINCT), size=SIDE, seed=0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(1, -(-images // DISTINCT)):
        for path in files:
            path.with_stem(f"{path.stem}_{number}").hardlink_to(path)
    return find_records(folder)[:images]


class Watched:
    """A way's loader and steps, and the seconds that training waits for the loader."""

    def __init__(self, run: Bench, way: Way, workers: int, steps: int) -> None:
        self.run, self.way = run, way
        self.batches = EpochBatches(range(len(way.data)), batch=run.batch)
        self.skip = max(0, self.batches.steps - steps) if steps else 0
        self.loader = DataLoader(
            way.data,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=run.cuda,
        )

    def epoch(self, number: int, *, train: bool, wait: bool = True) -> dict[str, float]:
        """Run an epoch.

        Args:
            number: of the epoch.
            train: run a training step on each batch.
            wait: wait for the device after each step.

        Returns:
            Seconds, images, images per second, and the share of waiting.
        """
        self.batches.set_epoch(number, skip=self.skip)
        waited = 0.0
        images = 0
        began = start = time.perf_counter()
        stream = iter(self.loader)
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
        return {
            "seconds": seconds,
            "images_per_second": images / seconds,
            "waits": waited / seconds,
            "images": images,
        }

    def busy(self, number: int) -> float:
        """Speed of an epoch that never waits for the device, beside steps on one batch."""
        batch = self.run.loaded(self.way)
        steps = self.batches.steps - self.skip
        self.run.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.run.step(self.way, batch)
        self.run.synchronize()
        alone = steps * self.run.batch / (time.perf_counter() - began)
        return self.epoch(number, train=True, wait=False)["images_per_second"] / alone


def measure(
    run: Bench, ways: dict[str, Way], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """{"WAY WORKERS": the loader alone, the first training epoch, medians of the later ones}."""
    results = {}
    for name, way in ways.items():
        run.step(way, run.loaded(way))  # warms up
        for workers in args.workers:
            alone = Watched(run, way, workers, 0 if name == "nucsam" else args.steps)
            alone.epoch(0, train=False)
            epochs = [alone.epoch(n, train=False) for n in range(1, args.repeat + 1)]
            del alone  # ends its workers
            training = Watched(run, way, workers, args.steps)
            first, *later = (training.epoch(n, train=True) for n in range(args.repeat + 1))
            row = {"loader": middle(epochs), "first": first, "later": middle(later)}
            if run.cuda:
                row["later"]["busy"] = training.busy(args.repeat + 1)
            results[f"{name} {workers}"] = row
            del training
    return results


def middle(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians of the rows, and the spread of their seconds."""
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    seconds = [row["seconds"] for row in rows]
    return medians | {"seconds_min": min(seconds), "seconds_max": max(seconds)}


def show(console: Console, document: dict[str, Any]) -> None:
    about = "{device}, {dtype}, batch {batch}, {image_size} model px, {images} images of 512 px"
    copy, item, rows = document["ceiling"]["gb_per_s"], document["item_bytes"], {}
    for name, result in document["results"].items():
        loader, first, later = result["loader"], result["first"], result["later"]
        decoding = 0.0 if name.startswith("files") else document["decode_s"]
        rows[name] = {
            "loader images/s": loader["images_per_second"],
            "of a copy": f"{1e-9 * item * loader['images_per_second'] / copy:.1%}",
            "training images/s": later["images_per_second"],
            "first epoch, s": first["seconds"] + decoding,
            "later ones, s": f"{later['seconds_min']:.3g} - {later['seconds_max']:.3g}",
            "first waits": f"{first['waits']:.1%}",
            "later wait": f"{later['waits']:.1%}",
        }
        if "busy" in later:
            rows[name]["busy"] = f"{later['busy']:.1%}"
    caption = "{decode_s:.3g} s to decode all once, {decode_mib:.0f} MiB".format(**document)
    caption += f"; a memory copy: {copy:.3g} GB/s"
    console.print(bench.table(about.format(**document), rows, caption, "workers"))


def build_ways(
    samples: Samples, records: list[Record], args: argparse.Namespace, run: Bench, config: Config
) -> dict[str, Way]:
    """The ways of --ways that can run: all but nucsam need peft."""
    pixels = [torch.from_numpy(samples[i].image) for i in range(args.batch)]
    images = torch.stack(pixels).permute(0, 3, 1, 2).float()
    side = args.image_size
    images = torch.nn.functional.interpolate(images, (side, side), mode="bilinear")
    base = train_step.random_base(images)
    ways = train_step.build(base, samples, config, run.device, ["nucsam", "plain"])
    if "plain" in ways:
        files = Samples(records, memory_gib=0)
        ways["files"] = replace(ways["plain"], data=train_step.PlainCrops(files, config))
    return {name: way for name, way in ways.items() if name in args.ways}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, repeat=2)
    bench.add_config(parser)
    add = parser.add_argument
    add("--images", type=bench.integer(), default=665)
    add("--workers", type=bench.integer(0), nargs="+", default=[0, 1, 2], help="of the loader")
    add("--steps", type=bench.integer(0), default=0, help="batches of a training epoch; 0 = all")
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    args = bench.parse(parser, arguments)
    if args.images < args.batch:
        parser.error(f"--images: found {args.images}, expected at least a batch, {args.batch}")
    config = bench.cropped(args.config, args.image_size)
    run, console = Bench(args, config), Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        records = make_records(Path(folder) / "data", args.images)
        start = time.perf_counter()
        samples = Samples(records)
        decoded = time.perf_counter() - start
        ways = build_ways(samples, records, args, run, config)
        if not ways:
            raise SystemExit("plain and files need peft, which is not installed; pip install peft")
        if "plain" not in ways and len(args.ways) > len(ways):
            console.print("plain, files: skipped, peft is not installed")
        item = sum(tensor.nbytes for tensor in next(iter(ways.values())).data[0, 0].values())
        results = measure(run, ways, args)
    waits = [
        1 - result["later"]["busy"] if run.cuda else result["later"]["waits"]
        for name, result in results.items()
        if name.startswith("nucsam")
    ]
    document = {
        "benchmark": "data",
        **bench.options(args),
        **run.about(["peft"] if train_step.peft else []),
        "ceiling": bench.host(args).ceiling(),
        "decode_s": decoded,
        "decode_mib": samples.kept_bytes / 2**20,
        "item_bytes": item,
        "results": results,
        "met": min(waits) <= GOAL if waits else None,
    }
    show(console, document)
    if waits:
        verdict = "met" if document["met"] else "MISSED"
        rule = f"the device waits at most {GOAL:.0%} of a later epoch, with the best of --workers"
        console.print(f"goal: {rule}: {verdict}")
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
