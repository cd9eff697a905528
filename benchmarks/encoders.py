"""What does each encoder cost: parameters, memory and speed of a training step?

    python benchmarks/encoders.py [--encoders mobile_sam sam_vit_b ...] [--device cpu] [--batch 2]
        [--image-size 512] [--dtype fp32|bf16|fp16] [--repeat 3] [--threads N] [--json FILE]

A row is an encoder of `model.encoder` on random weights, with the instance head and LoRA of rank 4
on its default layers; the row "full" trains all of SAM ViT-B instead. A step is forward, losses,
backward and AdamW on `--batch` images of `--image-size` model px. Memory is what a whole step takes
at most, weights, gradients and moments included. The rows run one after another. Speed counts wall
time, but CPU time on a CPU with one thread of torch. The script prints a table, then one JSON line.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench

from nucsam.config import Loss, Model
from nucsam.data.synthetic import ORGANS, make_image
from nucsam.model.bases import BASES
from nucsam.model.network import build_model
from nucsam.model.weights import random_base

ENCODERS = get_args(get_type_hints(Model)["encoder"])
FULL = "sam_vit_b"  # also trained whole: the 87 M parameters that LoRA is compared with


def trained(config: Model) -> int:
    """The number of parameters that train."""
    net = build_model(config, random_base(0, config.encoder), seed=0)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def row(args: argparse.Namespace, config: Model) -> dict[str, Any]:
    """The numbers of one model."""
    machine = bench.Machine(args)
    net = build_model(config, random_base(0, config.encoder), seed=0).to(machine.device).train()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    side = args.image_size
    organ = next(iter(ORGANS))
    samples = [make_image(side, seed, organ=organ)[:2] for seed in range(args.batch)]
    images, labels = (torch.stack([torch.from_numpy(x) for x in xs]) for xs in zip(*samples))
    images = images.permute(0, 3, 1, 2).float().to(machine.device)
    labels = labels.long().to(machine.device)
    counted, most = labels >= 0, int(labels.max())

    def step(_: int = 0) -> None:
        with torch.autocast(machine.device.type, machine.dtype, machine.dtype != torch.float32):
            maps = net(images, (side, side))
        terms = net.loss(maps.float(), labels, counted, most, Loss())
        sum(terms.values()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = machine.peak_mib(step)
    parameters = sum(p.numel() for p in net.parameters())
    held = 4 * (parameters + 2 * sum(p.numel() for p in weights)) / 2**20
    times = machine.turns({"step": step}, args.repeat, warm=0)["step"]
    return {
        "parameters": parameters,
        "trained": sum(p.numel() for p in weights),
        "GiB": (peak + held) / 2**10,
        "images/s": 1e3 * args.batch / times[machine.clock],
        **times,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=2, repeat=3)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=ENCODERS)
    args = bench.parse(parser, arguments)
    rows = {}
    for name in args.encoders:
        rows[name] = row(args, Model(encoder=name))
        rows[name]["trained, rank 8"] = trained(Model(encoder=name, rank=8))
        rows[name]["licence"] = BASES[name].licence
    if FULL in args.encoders:
        rows[f"{FULL}, full"] = row(args, Model(encoder=FULL, train="full"))
    title = f"a step on {args.batch} images of {args.image_size} model px, {args.dtype}"
    shown = {
        name: {k: v for k, v in numbers.items() if "ms" not in k} for name, numbers in rows.items()
    }
    Console(width=160).print(bench.table(title, shown, first="encoder"))
    about = bench.Machine(args).about()
    document = {"benchmark": "encoders", **bench.options(args), **about, "rows": rows}
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
