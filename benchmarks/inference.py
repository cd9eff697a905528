"""How many images and megapixels per second go from file to label map?

    python benchmarks/inference.py [--device cpu] [--batch 1] [--image-size 1024]
        [--dtype fp32|bf16|fp16] [--size 5000] [--images 8] [--scale 2] [--sample 4] [--repeat 1]
        [--threads N] [--json FILE]

- tiled: one deflated TIFF of `--size` px a side.
- images: `--images` PNG files of 512 px.
- stock SIDE: the peer, `mobile_sam`'s bare TinyViT, on `--sample` batches of tiles of the same
  image in the same dtype.

Files go through the steps of `nucsam predict`: reading, tiles of up to `--image-size` model px
(image-size / scale image px, of which neighbours share a 16th), the encoder with LoRA merged, the
head, stitching, nuclei, and writing a label TIFF. Loading the model does not count.

With random weights the maps would hold no nuclei. So each image is a picture of maps: its channels
are foreground and, twice, depth of synthetic nuclei with noise. The network computes what it
computes on any image; then the maps of the picture replace its own.

The stock encoder runs at the side of an image, at `--image-size`, and at the largest multiple of
224 px below it, which its windows fit without padding. "times stock" is the goal's number: the time
beside the stock encoder's, scaled to the pixels of the image. An image is compared with stock at
its own side, the tiled TIFF with the fastest. "of the tiles" scales to all pixels that the model
sees, including those that tiles share.

Times are wall time, but CPU time of all threads on a CPU with one thread of torch, to which other
programs do not add. Nuclei, reading and writing run in threads beside the encoder; their parts are
CPU seconds of these threads. On a GPU the other parts come from a separate run that waits for the
device after each, and another run without nuclei shows what they add. "of matmul" is the share of a
large matrix product's FLOP/s that encoder and head reach over the whole run. The script prints
tables, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tifffile
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
from instances import maps_of
from stock import embed, stock_sam
from train_step import random_base

from nucsam.config import Config
from nucsam.console import PlainConsole
from nucsam.data.slides import TiffWindows
from nucsam.data.synthetic import make_image
from nucsam.model import network
from nucsam.model.weights import Base
from nucsam.predict import images as predict_images
from nucsam.predict import writers
from nucsam.predict.predictor import Predictor
from nucsam.predict.pytorch import TorchPredictor
from nucsam.predict.tiles import SHARE, grid

SIDE, PERIOD = 512, 1024  # px of an image, and of the picture that a larger one repeats
FITS = 224  # px; windows of 7 and 14 at strides 8 and 16 divide any multiple of it
GOAL = 1.3  # most times the bare stock encoder, on a CPU
LOGIT = 6.0  # largest logit of a map


def picture(side: int) -> np.ndarray:
    """uint8 (side, side, 3): foreground and twice depth of synthetic nuclei, 0..255."""
    _, label, _ = make_image(min(side, PERIOD), 1, organ="human kidney")
    maps = maps_of(label)
    tile = np.stack([maps[name] for name in ("foreground", "depth", "depth")], axis=-1)
    times = -(-side // len(tile))
    return np.tile((255 * tile).round().astype(np.uint8), (times, times, 1))[:side, :side]


def shown(_: nn.Module, inputs: tuple[Tensor, tuple[int, int]], maps: Tensor) -> Tensor:
    """A forward hook: the maps that images show replace the network's.

    Args:
        inputs: images (B, 3, H, W), 0..255, and the size of the maps.
        maps: of the network; only their dtype is used.

    Returns:
        Logits (B, 4, *size).
    """
    images, size = inputs
    values = F.interpolate(images, size=size, mode="bilinear") / 255
    foreground, depth, _ = torch.logit(values, eps=1e-3).clamp(-LOGIT, LOGIT).unbind(1)
    zero = 0 * foreground
    return torch.stack([-foreground, zero, zero - 50, depth], dim=1).to(maps.dtype)


def write_images(folder: Path, args: argparse.Namespace) -> dict[str, list[Path]]:
    """Write the image files: {"tiled": files, "images": files}, without empty lists."""
    files: dict[str, list[Path]] = {}
    if args.size:
        files["tiled"] = [folder / "tiled.tif"]
        layout = {"photometric": "rgb", "tile": (SIDE, SIDE), "compression": "zlib"}
        tifffile.imwrite(files["tiled"][0], picture(args.size), **layout)
    if args.images:
        files["images"] = [folder / f"image{number}.png" for number in range(args.images)]
    whole = picture(PERIOD)
    for number, path in enumerate(files.get("images", [])):
        pixels = np.roll(whole, 37 * number, axis=(0, 1))[:SIDE, :SIDE]
        Image.fromarray(pixels).save(path)
    return files


def predict(predictor: Predictor, files: Sequence[Path], out: Path) -> tuple[int, int]:
    """Predict all files into `out`. Returns the numbers of tiles and of nuclei."""
    before = predictor.tiles_done
    results = {path: writers.output_files(out, path.stem, ["labels"]) for path in files}
    batch = predict_images.Batch(predictor, results, out, force=True)
    batch.console = PlainConsole(quiet=True)
    status = batch.run()
    assert status == 0, batch.outcomes
    return predictor.tiles_done - before, sum(o["nuclei"] for o in batch.outcomes.values())


@contextmanager
def seconds_in(machine: bench.Machine, net: nn.Module) -> Iterator[Counter]:
    """Seconds within each part of prediction while the context lasts.

    The device's parts, encoder and head, are timed from idle to idle.
    """
    spent: Counter = Counter()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        wall = part in ("encoder", "head") and machine.clock == "ms"
        now = time.perf_counter if wall else time.thread_time

        def run(*args: Any, **options: Any) -> Any:
            if wall:
                machine.synchronize()
            start = now()
            result = call(*args, **options)
            if wall:
                machine.synchronize()
            spent[part] += now() - start
            return result

        return run

    places = {
        "encoder": [(net.image_encoder, "forward")],
        "head": [(net.head, "forward")],
        "nuclei": [(net, "instances")],
        "reading": [(predict_images, "open_image"), (TiffWindows, "__getitem__")],
        "writing": [(writers.LabelBlocks, "add"), (writers.LabelBlocks, "write")],
    }
    with ExitStack() as stack:
        for part, names in places.items():
            for owner, name in names:
                stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


@dataclass
class Rivals:
    """nucsam on image files and the stock encoder on tiles, with what each call has done.

    Args:
        machine: where they run.
        args: the options.
        folder: for the files.
    """

    machine: bench.Machine
    args: argparse.Namespace
    folder: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> numbers of a call
    model_px: int = 0  # pixels that the model has seen

    def __post_init__(self) -> None:
        args, config = self.args, Config()
        self.files = write_images(self.folder, args)
        self.picture = torch.from_numpy(picture(PERIOD).transpose(2, 0, 1).copy())[None]
        self.base: Base = random_base(
            self.picture[..., : args.image_size, : args.image_size].float()
        )
        model = replace(config.model, train="head")
        net = network.build_model(model, self.base, seed=0).eval().fold()
        self.net = net.to(self.machine.device)
        self.net.register_forward_hook(shown)
        self.net.register_forward_pre_hook(self._count)
        self.tile = round(args.image_size / args.scale)
        self.predictor = TorchPredictor(
            self.net,
            scale=args.scale,
            instances=config.instances,
            tile=self.tile,
            overlap=self.tile // SHARE,
            batch=args.batch,
            autocast=None if args.dtype == "fp32" else self.machine.dtype,
        )

    def _count(self, _: nn.Module, inputs: tuple[Tensor, tuple[int, int]]) -> None:
        self.model_px += inputs[0].numel() // 3

    def tiles(self, side: int) -> Tensor:
        """A batch of tiles (B, 3, side, side) of the picture."""
        tile = self.picture[..., :side, :side].float()
        tile = F.interpolate(tile, size=(side, side), mode="bilinear")
        return tile.repeat(self.args.batch, 1, 1, 1).to(self.machine.device)

    def stock(self, name: str, side: int) -> Callable[[int], None]:
        """A turn of the stock encoder."""
        sam, tiles = stock_sam(self.base, side).to(self.machine.device), self.tiles(side)

        def call() -> None:
            with torch.no_grad(), self.machine.cast():
                for _ in range(self.args.sample):
                    embed(sam, tiles)

        def turn(_: int) -> None:
            number = self.args.sample * self.args.batch
            peak = self.machine.peak_mib(call)
            self.done[name] = {"peak_mib": peak, "tiles": number, "model_px": number * side**2}

        return turn

    def whole(self, name: str, watched: bool, _: int) -> None:
        """A turn of nucsam on files; `watched`: with the seconds in each part."""
        row = self.done.setdefault(name, {})

        def call() -> None:
            before = self.model_px
            row["tiles"], row["nuclei"] = self.predict(name)
            row["model_px"] = self.model_px - before

        with seconds_in(self.machine, self.net) if watched else nullcontext() as spent:
            row["peak_mib"] = self.machine.peak_mib(call)
        if watched:
            row["seconds_in"] = dict(spent)

    def without_nuclei(self, name: str, _: int) -> None:
        def nothing(maps: np.ndarray, _: Any) -> np.ndarray:
            return np.zeros(maps.shape[-2:], np.int32)

        with patch.object(self.net, "instances", nothing):
            self.predict(name)

    def predict(self, name: str) -> tuple[int, int]:
        return predict(self.predictor, self.files[name], self.folder / "out")

    def work_per_px(self) -> tuple[float, float]:
        """Floating-point operations of a model pixel: nucsam's, the stock encoder's."""
        tiles = self.tiles(self.args.image_size)
        sam = stock_sam(self.base, self.args.image_size).to(self.machine.device)
        pixels = tiles[:, 0].numel()
        with torch.no_grad(), self.machine.cast():
            net = bench.flops(partial(self.net, tiles, (self.tile, self.tile)))
            return net / pixels, bench.flops(partial(embed, sam, tiles)) / pixels


def measure(
    machine: bench.Machine, args: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Any]]:
    """{"stock SIDE", "tiled", "images": numbers}."""
    rivals = Rivals(machine, args, folder)
    files = rivals.files
    image_side = grid(SIDE, rivals.tile, rivals.tile // SHARE, args.scale)[2]
    sides = {args.image_size, args.image_size // FITS * FITS or args.image_size, image_side}
    bare = {f"stock {side}": rivals.stock(f"stock {side}", side) for side in sorted(sides)}
    for turn in bare.values():
        turn(0)
    predict(rivals.predictor, next(reversed(files.values()))[:1], folder / "out")  # warms up
    calls = bare | {name: partial(rivals.whole, name, not machine.cuda) for name in files}
    rows = machine.turns(calls, args.repeat, warm=0)
    if machine.cuda:
        calls = {name: partial(rivals.without_nuclei, name) for name in files}
        alone = machine.turns(calls, args.repeat, warm=0)
        calls = {name: partial(rivals.whole, name, True) for name in files}
        watched = machine.turns(calls, 1, warm=0)
        for name in files:
            rivals.done[name]["without_nuclei_ms"] = alone[name]["ms"]
            rivals.done[name]["watched_ms"] = watched[name]["ms"]
    work = rivals.work_per_px()
    for name, row in rows.items():
        row |= rivals.done[name]
        row["tflops_per_s"] = 1e-9 * work[name in bare] * row["model_px"] / row["ms"]
    rates = {name: rows[name][machine.clock] / rows[name]["model_px"] for name in bare}
    peer = {"tiled": min(rates.values()), "images": rates[f"stock {image_side}"]}
    image_px = {"tiled": args.size, "images": SIDE}
    for name, paths in files.items():
        row, pixels = rows[name], image_px[name] ** 2 * len(paths)
        row["images_per_second"] = 1e3 * len(paths) / row["ms"]
        row["mp_per_second"] = 1e-3 * pixels / row["ms"]
        row["times_stock"] = row[machine.clock] / (peer[name] * pixels * args.scale**2)
        row["times_stock_of_tiles"] = row[machine.clock] / (peer[name] * row["model_px"])
    return rows


def show(console: Console, document: dict[str, Any]) -> None:
    about = "{device}, {dtype}, batch {batch}, tiles of {image_size} model px, scale {scale:g}"
    rows, parts, ceiling = {}, {}, document["ceiling"]["tflops"]
    for name, row in document["results"].items():
        rows[name] = {
            "s": 1e-3 * row["ms"],
            "min - max, ms": bench.spread(row),
            "images/s": row.get("images_per_second", ""),
            "MP/s": row.get("mp_per_second", ""),
            "tiles": str(row["tiles"]),
            "ms a tile": row["ms"] / row["tiles"],
            "times stock": row.get("times_stock", ""),
            "of the tiles": row.get("times_stock_of_tiles", ""),
            "nuclei": str(row.get("nuclei", "")),
            "peak MiB": row["peak_mib"],
            "of matmul": f"{row['tflops_per_s'] / ceiling:.0%}",
        }
        if "seconds_in" in row:
            total = 1e-3 * row.get("watched_ms", row[document["clock"]])
            parts[name] = {
                part: f"{seconds:.3g} s, {seconds / total:.1%}"
                for part, seconds in row["seconds_in"].items()
            }
            parts[name]["all"] = f"{total:.3g} s"
            if "without_nuclei_ms" in row:
                parts[name]["nuclei add"] = f"{row['ms'] / row['without_nuclei_ms'] - 1:.1%}"
    caption = f"a large matrix product: {ceiling:.3g} TFLOP/s"
    console.print(bench.table(about.format(**document), rows, caption))
    clock = "CPU" if document["clock"] == "cpu_ms" else "wall"
    console.print(bench.table(f"{clock} seconds in each part, their share", parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=1, image_size=1024, repeat=1)
    add = parser.add_argument
    add("--size", type=bench.integer(0), default=5000, help="px, side of the TIFF; 0 = none")
    add("--images", type=bench.integer(0), default=8, help="images of 512 px; 0 = none")
    add("--scale", type=float, default=2.0, help="model px per image px")
    add("--sample", type=bench.integer(), default=4, help="batches of the stock encoder")
    args = bench.parse(parser, arguments)
    if not args.scale > 0:
        parser.error(f"--scale: found {args.scale:g}, expected more than 0")
    if not (args.size or args.images):
        parser.error("--size, --images: found 0 and 0, expected at least one of them")
    machine, console = bench.Machine(args), Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(machine, args, Path(folder))
    ratios = {n: row["times_stock"] for n, row in results.items() if "times_stock" in row}
    document = {
        "benchmark": "inference",
        **bench.options(args),
        **machine.about(),
        "ceiling": machine.ceiling(),
        "clock": machine.clock,
        "results": results,
        "ratios": ratios,
    }
    show(console, document)
    if not machine.cuda:
        verdict = "met" if all(times <= GOAL for times in ratios.values()) else "MISSED"
        console.print(f"goal: at most {GOAL:g} times the bare stock encoder: {verdict}")
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
