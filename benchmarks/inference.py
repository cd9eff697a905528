"""How many images and megapixels a second go from file to label map, and what takes the time?

    python benchmarks/inference.py [--device cpu] [--batch 1] [--image-size 1024] [--dtype fp32|bf16|fp16]
        [--size 5000] [--images 8] [--scale 2] [--sample 4] [--repeat 1] [--threads N] [--json FILE]

tiled: one deflated TIFF of `--size` px a side. images: `--images` PNG files of 512 px. Both go through what `nucsam
predict` runs: opened, cut into tiles of up to `--image-size` model px (image-size / scale image px, one 32nd of
it shared), encoder with LoRA merged, head, stitching, nuclei, a label TIFF written. Loading the model is not counted.

With random weights the maps would hold no nuclei. So the image is a picture of the maps: its channels are foreground
and, twice, depth of synthetic nuclei, with noise. The network computes what it computes on any image, and
its maps are then replaced by those that the image shows.

Beside it runs the bare stock encoder, `mobile_sam`'s TinyViT as the package has it, on `--sample` batches of tiles of
the same image and dtype: of the side of an image, of `--image-size`, and of the most below it that its windows fit
without padding, multiples of 224 px. An image counts beside stock at its own side, what is tiled beside the fastest:
its time is scaled to the pixels of the image ("times stock", the bar's), and to all pixels that the model sees, where
tiles share some ("of the tiles").

Times and parts are of wall time; on a CPU with one thread of torch of CPU time, of all threads, to which others on the
machine do not add. Nuclei, reading and writing run in threads beside the encoder, and are always CPU seconds of these.
On a GPU the parts are from a run of their own that waits for the device after each, and another run that extracts no
nuclei says what they add to the whole. "of matmul" is the part of a large matrix product's FLOP/s that encoder and
head reach over the whole run. Prints tables, and one JSON line last.
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
from dataclasses import replace
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

from nucsam import batch, model, outputs
from nucsam.config import Config
from nucsam.predict import SHARE, Predictor
from nucsam.synthetic import make_image
from nucsam.tiles import grid

SIDE, PERIOD = 512, 1024  # px of an image, and of the picture that a larger one repeats
FITS = 224  # px; windows of 7 and 14 at strides 8 and 16 part any multiple of it
BAR = 1.3  # times the bare stock encoder, on a CPU
LOGIT = 6.0  # most that a map's logit is


def picture(side: int) -> np.ndarray:
    """uint8 (side, side, 3): foreground and twice depth of synthetic nuclei, in 0..255."""
    _, label, _ = make_image(min(side, PERIOD), 1, organ="human kidney")
    maps = maps_of(label)
    tile = np.stack([maps[name] for name in ("foreground", "depth", "depth")], axis=-1)
    times = -(-side // len(tile))
    return np.tile((255 * tile).round().astype(np.uint8), (times, times, 1))[:side, :side]


def shown(_: nn.Module, inputs: tuple[Tensor, tuple[int, int]], made: Tensor) -> Tensor:
    """The maps (B, 4, *size) that images (B, 3, H, W) are pictures of, as logits, in place of those made of them."""
    images, size = inputs
    part = F.interpolate(images, size=size, mode="bilinear") / 255
    foreground, depth, _ = torch.logit(part, eps=1e-3).clamp(-LOGIT, LOGIT).unbind(1)
    return torch.stack([-foreground, 0 * foreground, 0 * foreground - 50, depth], dim=1).to(made.dtype)


def write(folder: Path, args: argparse.Namespace) -> dict[str, list[Path]]:
    """{"tiled" or "images": files}."""
    files: dict[str, list[Path]] = {"tiled": [], "images": []}
    if args.size:
        files["tiled"] = [folder / "tiled.tif"]
        how = {"photometric": "rgb", "tile": (SIDE, SIDE), "compression": "zlib"}
        tifffile.imwrite(files["tiled"][0], picture(args.size), **how)
    whole = picture(PERIOD)
    for number in range(args.images):
        files["images"].append(folder / f"image{number}.png")
        Image.fromarray(np.roll(whole, 37 * number, axis=(0, 1))[:SIDE, :SIDE]).save(files["images"][-1])
    return {name: of for name, of in files.items() if of}


def predict(predictor: Predictor, files: Sequence[Path], out: Path) -> tuple[int, int]:
    """Predict all files into `out`; tiles that went through the model, and nuclei found."""
    before, wanted = predictor.tiles_done, {path: outputs.files(out, path.stem, ["labels"]) for path in files}
    job = batch.Batch(predictor, wanted, None, None)
    job.console = Console(quiet=True)
    failed = job.run({}, out / "predict.json", force=True)
    assert not failed, job.failed
    return predictor.tiles_done - before, job.nuclei


@contextmanager
def seconds_in(machine: bench.Machine, net: nn.Module) -> Iterator[Counter]:
    """Seconds within each part while the context lasts: of the device's parts once it is idle, of others in threads."""
    spent: Counter = Counter()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        wall = part in ("encoder", "head") and machine.clock == "ms"
        now, wait = (time.perf_counter, machine.synchronize) if wall else (time.thread_time, lambda: None)

        def run(*args: Any, **options: Any) -> Any:
            wait()
            start = now()
            result = call(*args, **options)
            wait()
            spent[part] += now() - start
            return result

        return run

    places = {
        "encoder": [(net.image_encoder, "forward")],
        "head": [(net.head, "forward")],
        "nuclei": [(net, "instances")],
        "reading": [(batch.images, "open_image"), (batch.images.TiffWindows, "__getitem__")],
        "writing": [(outputs.LabelBlocks, "add"), (outputs.LabelBlocks, "write")],
    }
    with ExitStack() as stack:
        for part, names in places.items():
            for owner, name in names:
                stack.enter_context(patch.object(owner, name, timed(part, getattr(owner, name))))
        yield spent


def measure(machine: bench.Machine, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """{"stock SIDE", "tiled", "images": numbers}."""
    files, config, picked = write(folder, args), Config(), torch.from_numpy(picture(PERIOD).transpose(2, 0, 1).copy())
    base = random_base(picked[None, :, : args.image_size, : args.image_size].float())
    net = model.build(replace(config.model, train="head"), base, seed=0).eval().fold().to(machine.device)
    net.register_forward_hook(shown)
    seen = [0]  # model px
    net.register_forward_pre_hook(lambda _, inputs: seen.append(seen.pop() + inputs[0].numel() // 3))
    px = round(args.image_size / args.scale)
    how = {"tile": px, "overlap": px // SHARE, "batch": args.batch, "instances": config.instances}
    autocast = None if args.dtype == "fp32" else machine.dtype
    predictor, done = Predictor(net, scale=args.scale, autocast=autocast, **how), {}

    def part(side: int) -> Tensor:
        """A batch of tiles of the picture."""
        tile = F.interpolate(picked[None, :, :side, :side].float(), size=(side, side), mode="bilinear")
        return tile.repeat(args.batch, 1, 1, 1).to(machine.device)

    def stock(name: str, side: int) -> Callable[[int], None]:
        sam, tiles = stock_sam(base, side).to(machine.device), part(side)

        def call() -> None:
            with torch.no_grad(), machine.cast():
                for _ in range(args.sample):
                    embed(sam, tiles)

        def turn(_: int) -> None:
            number = args.sample * args.batch
            done[name] = {"peak_mib": machine.peak_mib(call), "tiles": number, "model_px": number * side**2}

        return turn

    def whole(name: str, watched: bool, _: int) -> None:
        def call() -> None:
            before = seen[0]
            done[name]["tiles"], done[name]["nuclei"] = predict(predictor, files[name], folder / "out")
            done[name]["model_px"] = seen[0] - before

        done.setdefault(name, {})
        with seconds_in(machine, net) if watched else nullcontext() as spent:
            done[name]["peak_mib"] = machine.peak_mib(call)
        done[name] |= {"seconds_in": dict(spent)} if watched else {}

    def without_nuclei(name: str, _: int) -> None:
        with patch.object(net, "instances", lambda maps, _: np.zeros(maps.shape[-2:], np.int32)):
            predict(predictor, files[name], folder / "out")

    sizes = {"tiled": args.size, "images": SIDE}
    image_side = grid(SIDE, px, px // SHARE, args.scale)[2]
    sides = {args.image_size, args.image_size // FITS * FITS or args.image_size, image_side}
    bare = {f"stock {side}": stock(f"stock {side}", side) for side in sorted(sides)}
    for warm in (*bare.values(), lambda _: predict(predictor, next(reversed(files.values()))[:1], folder / "out")):
        warm(0)
    rows = machine.turns(bare | {name: partial(whole, name, not machine.cuda) for name in files}, args.repeat, warm=0)
    if machine.cuda:
        alone = machine.turns({name: partial(without_nuclei, name) for name in files}, args.repeat, warm=0)
        watched = machine.turns({name: partial(whole, name, True) for name in files}, 1, warm=0)
        for name in files:
            done[name] |= {"without_nuclei_ms": alone[name]["ms"], "watched_ms": watched[name]["ms"]}
    tiles = part(args.image_size)
    sam = stock_sam(base, args.image_size).to(machine.device)
    with torch.no_grad(), machine.cast():
        work = bench.flops(partial(net, tiles, (px, px))), bench.flops(partial(embed, sam, tiles))
    for name, row in rows.items():
        row |= done[name]
        row["tflops_per_s"] = 1e-9 * work[name in bare] / tiles[:, 0].numel() * row["model_px"] / row["ms"]
    rates = {name: rows[name][machine.clock] / rows[name]["model_px"] for name in bare}
    beside = {"tiled": min(rates.values()), "images": rates[f"stock {image_side}"]}
    for name in files:
        row, pixels = rows[name], sizes[name] ** 2 * len(files[name])
        row |= {"images_per_second": 1e3 * len(files[name]) / row["ms"], "mp_per_second": 1e-3 * pixels / row["ms"]}
        row["times_stock"] = row[machine.clock] / (beside[name] * pixels * args.scale**2)
        row["times_stock_of_tiles"] = row[machine.clock] / (beside[name] * row["model_px"])
    return rows


def show(console: Console, document: dict[str, Any]) -> None:
    title = "{device}, {dtype}, batch {batch}, tiles of {image_size} model px, scale {scale:g}".format(**document)
    rows, parts, ceiling = {}, {}, document["ceiling"]["tflops"]
    for name, r in document["results"].items():
        rows[name] = {
            "s": 1e-3 * r["ms"],
            "min - max, ms": bench.spread(r),
            "images/s": r.get("images_per_second", ""),
            "MP/s": r.get("mp_per_second", ""),
            "tiles": str(r["tiles"]),
            "ms a tile": r["ms"] / r["tiles"],
            "times stock": r.get("times_stock", ""),
            "of the tiles": r.get("times_stock_of_tiles", ""),
            "nuclei": str(r.get("nuclei", "")),
            "peak MiB": r["peak_mib"],
            "of matmul": f"{r['tflops_per_s'] / ceiling:.0%}",
        }
        if "seconds_in" in r:
            spent, total = r["seconds_in"], 1e-3 * r.get("watched_ms", r[document["clock"]])
            cells = {part: f"{seconds:.3g} s, {seconds / total:.1%}" for part, seconds in spent.items()}
            parts[name] = cells | {"all": f"{total:.3g} s"}
            if "without_nuclei_ms" in r:
                parts[name]["nuclei add"] = f"{r['ms'] / r['without_nuclei_ms'] - 1:.1%}"
    console.print(bench.table(title, rows, f"a large matrix product: {ceiling:.3g} TFLOP/s"))
    console.print(
        bench.table(f"{'CPU' if document['clock'] == 'cpu_ms' else 'wall'} seconds in each part, their share", parts)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=1, image_size=1024, repeat=1)
    parser.add_argument("--size", type=bench.integer(0), default=5000, help="px, side of the TIFF; 0 = none")
    parser.add_argument("--images", type=bench.integer(0), default=8, help="how many images of 512 px; 0 = none")
    parser.add_argument("--scale", type=float, default=2.0, help="model px per image px")
    parser.add_argument("--sample", type=bench.integer(), default=4, help="batches of tiles for the stock encoder")
    args = bench.parse(parser, arguments)
    if not args.scale > 0:
        parser.error(f"--scale: found {args.scale:g}, expected more than 0")
    if not (args.size or args.images):
        parser.error("--size, --images: found 0 and 0, expected at least one of them")
    machine, console = bench.Machine(args), Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(machine, args, Path(folder))
    document = {"benchmark": "inference", **bench.asked(args), **machine.about(), "ceiling": machine.ceiling()}
    document |= {
        "clock": machine.clock,
        "results": results,
        "ratios": {n: r["times_stock"] for n, r in results.items() if "times_stock" in r},
    }
    show(console, document)
    if not machine.cuda:
        met = all(times <= BAR for times in document["ratios"].values())
        console.print(f"bar: at most {BAR:g} times the bare stock encoder: {'met' if met else 'MISSED'}")
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
