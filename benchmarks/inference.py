"""How many images and megapixels a second go from file to label map, and what takes the time?

    python benchmarks/inference.py [--device cpu] [--batch 1] [--image-size 1024] [--dtype fp32|bf16|fp16]
        [--size 5000] [--images 8] [--scale 2] [--sample 4] [--repeat 1] [--threads N] [--json FILE]

tiled: one deflated TIFF of `--size` px a side. images: `--images` PNG files of 512 px. Both go through what `nucsam
predict` runs: opened, cut into tiles of up to `--image-size` model px (image-size / scale image px, an eighth shared),
encoder with LoRA merged, head, stitching, nuclei, a label TIFF written. Loading the model is not counted.

With random weights the maps would hold no nuclei. So the image is a picture of the maps: its channels are foreground
and, twice, depth of synthetic nuclei, with noise. The network computes what it computes on any image, and
its maps are then replaced by those that the image shows.

Beside it runs the bare stock encoder, `mobile_sam`'s TinyViT as the package has it, on `--sample` batches of tiles of
the same image, dtype and batch; its time is scaled to the pixels of the image ("times stock", the bar's), and to all
pixels that the model sees, where tiles share some ("of the tiles"). These, and the parts, are of wall time; on a CPU
with one thread of torch of CPU time, of all threads, to which others on the machine do not add. What runs in threads
beside the encoder (nuclei, writing, reading ahead) may be hidden by it. "of matmul" is the part of a large matrix
product's FLOP/s that encoder and head reach over the whole run. Prints tables, and one JSON line last.
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
from nucsam.predict import Predictor
from nucsam.synthetic import make_image

SIDE, PERIOD = 512, 1024  # px of an image, and of the picture that a larger one repeats
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
    """Seconds within each part while the context lasts, in whatever thread, once the device is idle."""
    spent: Counter = Counter()
    now = time.thread_time if machine.clock == "cpu_ms" else time.perf_counter

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            machine.synchronize()
            start = now()
            result = call(*args, **options)
            machine.synchronize()
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
    """{"stock", "tiled", "images": numbers}."""
    files, side, config = write(folder, args), args.image_size, Config()
    tile = torch.from_numpy(np.ascontiguousarray(picture(PERIOD)[:side, :side])).permute(2, 0, 1)[None].float()
    tile = F.interpolate(tile, size=(side, side), mode="bilinear")
    base = random_base(tile)
    tiles = tile.repeat(args.batch, 1, 1, 1).to(machine.device)
    net = model.build(replace(config.model, train="head"), base, seed=0).eval().to(machine.device)
    net.register_forward_hook(shown)
    seen = [0]  # model px
    net.register_forward_pre_hook(lambda _, inputs: seen.append(seen.pop() + inputs[0].numel() // 3))
    px = round(side / args.scale)
    how = {"tile": px, "overlap": px // 16, "batch": args.batch, "instances": config.instances}
    autocast = None if args.dtype == "fp32" else machine.dtype
    predictor = Predictor(net, scale=args.scale, autocast=autocast, **how)
    sam, done = stock_sam(base, side).to(machine.device), {}

    def stock(_: int) -> None:
        def call() -> None:
            with torch.no_grad(), machine.cast():
                for _ in range(args.sample):
                    embed(sam, tiles)

        number = args.sample * args.batch
        done["stock"] = {"peak_mib": machine.peak_mib(call), "tiles": number, "model_px": number * side**2}

    def whole(name: str, watched: bool, _: int) -> None:
        def call() -> None:
            before = seen[0]
            done[name]["tiles"], done[name]["nuclei"] = predict(predictor, files[name], folder / "out")
            done[name]["model_px"] = seen[0] - before

        done[name] = {**done.get(name, {})}
        with seconds_in(machine, net) if watched else nullcontext() as spent:
            done[name]["peak_mib"] = machine.peak_mib(call)
        done[name] |= {"seconds_in": dict(spent)} if watched else {}

    predict(predictor, next(reversed(files.values()))[:1], folder / "out")
    stock(0)
    calls = {"stock": stock} | {name: partial(whole, name, not machine.cuda) for name in files}
    rows = machine.turns(calls, args.repeat, warm=0)
    for name in files if machine.cuda else ():
        whole(name, True, 0)
    with torch.no_grad(), machine.cast():
        work = bench.flops(partial(net, tiles, (px, px))), bench.flops(partial(embed, sam, tiles))
    for name, row in rows.items():
        row |= done[name]
        row["tflops_per_s"] = 1e-9 * work[name == "stock"] / tiles[:, 0].numel() * row["model_px"] / row["ms"]
        if name != "stock":
            pixels = args.size**2 if name == "tiled" else args.images * SIDE**2
            row |= {"images_per_second": 1e3 * len(files[name]) / row["ms"], "mp_per_second": 1e-3 * pixels / row["ms"]}
            spent, bare = row[machine.clock], rows["stock"][machine.clock] / rows["stock"]["model_px"]
            row["times_stock"] = spent / (bare * pixels * args.scale**2)
            row["times_stock_of_tiles"] = spent / (bare * row["model_px"])
    return rows


def show(console: Console, document: dict[str, Any]) -> None:
    title = "{device}, {dtype}, batch {batch}, tiles of {image_size} model px, scale {scale:g}".format(**document)
    rows, parts, ceiling = {}, {}, document["ceiling"]["tflops"]
    for name, r in document["results"].items():
        rows[name] = {
            "s": 1e-3 * r["ms"],
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
            spent, total = r["seconds_in"], 1e-3 * r[document["clock"]]
            cells = {part: f"{seconds:.3g} s, {seconds / total:.1%}" for part, seconds in spent.items()}
            parts[name] = cells | {"all": f"{total:.3g} s"}
    console.print(bench.table(title, rows, f"a large matrix product: {ceiling:.3g} TFLOP/s"))
    console.print(
        bench.table(f"{'CPU' if document['clock'] == 'cpu_ms' else 'wall'} seconds in each part, their share", parts)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=1, image_size=1024, repeat=1)
    parser.add_argument("--size", type=int, default=5000, help="px, side of the TIFF; 0 = none")
    parser.add_argument("--images", type=int, default=8, help="how many images of 512 px; 0 = none")
    parser.add_argument("--scale", type=float, default=2.0, help="model px per image px")
    parser.add_argument("--sample", type=int, default=4, help="batches of tiles that the stock encoder runs on")
    args = bench.parse(parser, arguments)
    if not (args.size or args.images):
        parser.error("--size, --images: found 0 and 0, expected at least one of them")
    machine, console = bench.Machine(args), Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(machine, args, Path(folder))
    document = {"benchmark": "inference", **bench.asked(args), **machine.about(), "ceiling": machine.ceiling()}
    document |= {
        "clock": machine.clock,
        "results": results,
        "ratios": {n: r["times_stock"] for n, r in results.items() if n != "stock"},
    }
    show(console, document)
    if not machine.cuda:
        met = all(times <= BAR for times in document["ratios"].values())
        console.print(f"bar: at most {BAR:g} times the bare stock encoder: {'met' if met else 'MISSED'}")
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
