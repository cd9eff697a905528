"""How fast can a training step be on a GPU at most? A bound, computed without one.

    pip install peft
    python benchmarks/roofline.py [--batch 4] [--image-size 1024] [--dtype fp16] [--json FILE]
        [--steps nucsam plain before "nuinsseg, DDP"]

The steps run on the fake GPU of cuda_audit.py. An operation takes the longer of two times: its
floating-point operations at the peak of the GPU, and its input and output bytes at the bandwidth.
Views are free. So the bound is that of a GPU that is always busy and caches nothing between two
operations. These are fixed:

- H100: 600 TFLOP/s, 2.9 TB/s. T4: 40 TFLOP/s, 0.26 TB/s. In fp16 or bf16; products in fp32 reach an
  eighth on the H100, a fifth on the T4.

The steps: nucsam, the defaults of this tree; plain, as in train_step.py; before, commit 6bdc1a4 in
a git worktree; and configs/nuinsseg.toml as one of eight processes. `peak` is the most that is
allocated at once, without what cuDNN takes to work in. Each step runs in a child process. The
script needs what cuda_audit.py needs.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
import cuda_audit
from cuda_audit import GPU, ROOT, Audit, FakeGpu, aten

from nucsam.config import Config, load_config
from nucsam.model import heads
from nucsam.model.network import build_model

PEAKS = {  # FLOP/s in 16 bits, share of them in fp32, byte/s
    "H100": (600e12, 1 / 8, 2.9e12),
    "T4": (40e12, 1 / 5, 0.26e12),
}
BARS = {"H100": 310, "T4": 27}  # images/s of nucsam in fp16 at batch 4, 1024 px
GIB = 6.0  # bar of nuinsseg.toml there
BEFORE = "6bdc1a4"
PROCESSES = 8  # of which nuinsseg.toml is one


class Roofline(FakeGpu):
    """A fake GPU that adds up the time of its operations and the memory that they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.restart()

    def restart(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.peak = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.batch_norm_update_stats.default:  # PyTorch has no fake version of it
            x = args[0]
            result = tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
            self._count(func, args, [x], list(result))
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _count(self, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._hold(outputs)
        launches = self.counts.launches
        super()._count(func, args, inputs, outputs)
        if self.counts.launches == launches:
            return
        self.launches += 1
        moved = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        operations = flops(func, args, outputs)
        is_fp32 = any(x.dtype == torch.float32 for x in inputs)
        for name, (peak, share, bandwidth) in PEAKS.items():
            speed = peak * share if is_fp32 else peak
            self.seconds[name] += max(operations / speed, moved / bandwidth)

    def _hold(self, outputs: list[Tensor]) -> None:
        for x in outputs:
            if x.device.type == "cuda":
                storage = x.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.held.values()))


def flops(func: Any, args: Any, outputs: list[Tensor]) -> int:
    """Floating-point operations of matrix products, convolutions and attention; else 0."""
    packet = func.overloadpacket
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
    if packet is aten.convolution_backward:
        return bench._convolution_backward(*shapes)
    if packet is aten.addmm_:
        return bench._addmm_(*shapes)
    if packet not in flop_registry:
        return 0
    result = outputs if len(outputs) > 1 else outputs[0]
    return flop_registry[packet](*args, out_val=result)


# ---- steps: functions of the GPU, the accelerator and the configuration ----


def nucsam(gpu: Roofline, accelerator: Accelerator, config: Config) -> Callable[[], Any]:
    return Audit(gpu, accelerator, config, backward=True).step


def one_of_many(gpu: Roofline, accelerator: Accelerator, config: Config) -> Callable[[], Any]:
    """A process of several: norms ask the others, and gradients lie in the buckets of DDP."""
    heads.dist = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: PROCESSES,
        get_rank=lambda: 0,
        all_reduce=lambda _: None,
    )
    return nucsam(gpu, accelerator, config)


def plain(gpu: Roofline, accelerator: Accelerator, config: Config) -> Callable[[], Any]:
    import train_step

    if not train_step.peft:
        raise SystemExit("plain: peft is not installed; pip install peft")
    net = build_model(config.model, cuda_audit.base(), seed=0).train()
    ours = SimpleNamespace(encoder=net.image_encoder, head=net.head)
    with patch.object(train_step.PlainCrops, "__init__", lambda *_: None):  # it has no images
        parts = cuda_audit.base(), None, config, torch.device("cpu"), ours
        way = train_step.plain(*parts, torch.contiguous_format)
    b, crop = config.train.batch, config.data.crop
    side = round(crop * config.data.scale)
    whole = nn.ModuleList([gpu.moved(way.encoder), gpu.moved(way.head)])
    weights = [p for p in whole.parameters() if p.requires_grad]

    def batch() -> tuple[Tensor, dict[str, Any]]:
        """Images and targets that the loader has made."""
        truth = {
            "classes": torch.zeros(b, crop, crop, dtype=torch.uint8, device=GPU),
            "depth": torch.zeros(b, crop, crop, device=GPU),
            "counted": torch.ones(b, crop, crop, dtype=torch.bool, device=GPU),
        }
        return torch.zeros(b, 3, side, side, device=GPU), truth

    def forward() -> Tensor:
        images, truth = batch()
        with accelerator.autocast():
            maps = way.head(way.encoder(images), (crop, crop))
        return sum(way.loss(maps.float(), **truth).values()).mean()

    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    return partial(take_step, accelerator, forward, weights, optimizer, lambda: None)


def before(gpu: Roofline, accelerator: Accelerator, config: Config) -> Callable[[], Any]:
    """The step of commit 6bdc1a4, whose modules lay flat in the package."""
    settings, augment, model, train = map(
        importlib.import_module,
        ("nucsam.config", "nucsam.augment", "nucsam.model", "nucsam.train"),
    )
    old = settings.Config()
    old = replace(old, train=replace(old.train, batch=config.train.batch))
    crop, scale = config.data.crop, config.data.scale
    base = importlib.import_module("nucsam.base").load_base("none")
    net = gpu.moved(model.build(old.model, base, seed=0).train())
    augment._table(str(GPU))  # goes to the GPU once
    side = augment.window(crop, old.augment)
    shape = config.train.batch, side, side
    weights = net.trainable()
    average = {name: p.detach().clone() for name, p in weights.items()}

    def forward() -> Tensor:
        pixels = torch.zeros(shape[0], 3, side, side, dtype=torch.uint8)
        tensors = pixels, torch.zeros(shape, dtype=torch.int32), torch.ones(shape, dtype=torch.bool)
        moved = [gpu.pin(x).to(GPU, non_blocking=True) for x in tensors]
        options = {"crop": crop, "scale": scale, "config": old.augment}
        draws = torch.full((shape[0], 32), 1e-3)
        images, labels, counted = augment.augment(*moved, draws, **options)
        with accelerator.autocast():
            maps = net(images, (crop, crop))
        terms = net.loss(maps.float(), labels, counted, cuda_audit.NUCLEI, old.loss)
        return sum(terms.values()).mean()

    optimizer = torch.optim.AdamW(train._groups(weights, old.train), betas=(0.9, 0.99))
    trained = [p for p in weights.values() if p.requires_grad]
    update = partial(train._update, average, weights, 0.99)
    return partial(take_step, accelerator, forward, trained, optimizer, update)


def take_step(
    accelerator: Accelerator,
    forward: Callable[[], Tensor],
    weights: list[Tensor],
    optimizer: torch.optim.Optimizer,
    update: Callable[[], None],
) -> None:
    loss, scaler = forward(), accelerator.scaler
    backward = SimpleNamespace(_backward=lambda loss: loss.backward())
    Audit._with_driver(backward, loss if scaler is None else scaler.scale(loss))
    if scaler is not None:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(weights, 1.0)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
    update()


STEPS = {"nucsam": nucsam, "plain": plain, "before": before, "nuinsseg, DDP": one_of_many}


# ---- the script ----


def child(args: argparse.Namespace) -> dict[str, float]:
    """The bound of one step, its peak memory and its launches."""
    config = Config()
    if args.step == "nuinsseg, DDP":
        config = load_config(ROOT / "configs" / "nuinsseg.toml")
    config = bench.cropped(config, args.image_size)
    config = replace(
        config,
        model=replace(config.model, weights="none"),
        train=replace(config.train, batch=args.batch, accumulate=1),
    )
    if args.tree:
        # The counting is that of this tree, the step that of the other.
        for name in [name for name in sys.modules if name.partition(".")[0] == "nucsam"]:
            del sys.modules[name]
        sys.path.insert(0, args.tree)
    with Roofline() as gpu, cuda_audit.fake_accelerator(args.dtype) as accelerator:
        step = STEPS[args.step](gpu, accelerator, config)
        step()
        gpu.restart()
        step()
    bounds = {f"{name}, images/s": args.batch / gpu.seconds[name] for name in PEAKS}
    return bounds | {"peak, GiB": gpu.peak / 2**30, "launches": gpu.launches}


def run_child(args: argparse.Namespace, step: str, tree: str = "") -> dict[str, float]:
    command = [__file__, "--step", step, "--tree", tree, "--dtype", args.dtype]
    command += ["--batch", str(args.batch), "--image-size", str(args.image_size)]
    done = cuda_audit.run_with_driver(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{step}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=bench.integer(), default=4)
    add("--image-size", type=bench.integer(64, multiple_of=32), default=1024, help="model px")
    add("--dtype", choices=cuda_audit.PRECISIONS, default="fp16")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    add("--json", type=bench.new_file)
    add("--step", choices=STEPS, help=argparse.SUPPRESS)  # of a child process
    add("--tree", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.step:
        print(json.dumps(child(args)), flush=True)
        os._exit(0)  # threads of the autograd engine may abort at exit
    if reason := cuda_audit.missing():
        raise SystemExit(f"the backward pass {reason}")
    rows = {}
    for step in args.steps:
        if step == "before":
            with worktree(BEFORE) as tree:
                rows[f"nucsam at {BEFORE}"] = run_child(args, step, tree)
        else:
            rows[step] = run_child(args, step)
    title = f"Bound of a training step: {args.dtype}, batch {args.batch}, {args.image_size} px"
    Console().print(bench.table(title, rows))
    print(f"bars in 16 bits at batch 4, 1024 px: {BARS}; nuinsseg, DDP: at most {GIB} GiB")
    document = {"benchmark": "roofline", "options": bench.options(args), "results": rows}
    constants = {"peaks": PEAKS, "bars": BARS, "bar_gib": GIB, "torch": torch.__version__}
    bench.finish(document | constants, args.json)


@contextmanager
def worktree(commit: str) -> Iterator[str]:
    """A folder with the files of a commit of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        add = [*git, "add", "--quiet", "--detach", folder, commit]
        subprocess.run(add, check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


if __name__ == "__main__":
    main()
