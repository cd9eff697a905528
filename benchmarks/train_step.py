"""How fast and how large is a training step, beside the plain way to build the same one?

    pip install peft
    python benchmarks/train_step.py [--device cpu] [--batch 4] [--image-size 512] [--dtype fp32|bf16|fp16]
        [--repeat 7] [--steps 4] [--workers 0 2] [--threads N] [--json FILE]

encoder: forward and backward of the encoder with LoRA (rank 4 on attn.qkv and attn.proj), to its multi-scale features.
pipeline: loader, augmentation, targets, encoder, instance head, losses, backward, clipping, AdamW, on synthetic images
of 512 px. `--image-size` is the side in model px, as the encoder sees it: a crop has image-size / data.scale image px.

The plain way is stock `mobile_sam` with forward hooks, Hugging Face `peft`, and augmentation and targets by numpy,
scipy and scikit-image, nucleus by nucleus, in the loader's workers. It gets the same decoded images, crops, head,
losses, dtype and optimizer. Both compute the same features, gradients, targets and losses, or nothing is timed.

The two take turns, after one to warm up. Times are wall times; CPU s/image adds up all threads and loader workers,
which holds where a machine is shared. A turn of the pipeline drains its loader, so that nothing is loaded in another's
time, and each way gets the number of `--workers` that is fastest for it. Prints tables, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy runs in the loader's workers, one a core

import argparse
import copy
import ctypes
import gc
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from skimage.color import hed2rgb, rgb2hed
from skimage.segmentation import find_boundaries
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
from nucsam import losses, model, targets
from nucsam.augment import augment, window
from nucsam.base import Base, build_sam, load_base
from nucsam.config import Config
from nucsam.data import Crops, EpochBatches, Samples, find_records
from nucsam.encoder import Features
from nucsam.head import NUCLEUS_WEIGHT
from nucsam.synthetic import write_dataset

try:
    import peft
except ImportError:
    peft = None

SIDE = 512  # px of a synthetic image, as in NuInsSeg
ADAPTED = r"layers\..*\.attn\.(qkv|proj)"  # peft matches whole names, here within the encoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BARS = {
    "encoder": "on a CPU speed >= 1.2, saved <= 0.75",
    "pipeline": "speed >= 1.5 on a CPU at 512 px, >= 3 on a GPU at 1024 px in fp16",
}
Truth = dict[str, Any]  # what a way's loss takes beside the maps


@dataclass
class Way:
    """One way to build a training step."""

    encoder: nn.Module  # images (B, 3, H, W), 0..255 -> Features
    head: nn.Module
    data: Crops
    prepare: Callable[[dict[str, Tensor]], tuple[Tensor, Truth]]  # a loader's batch -> images, truth; on the device
    loss: Callable[..., dict[str, Tensor]]  # maps, **truth -> terms of (B,)
    targets: Callable[[Tensor], tuple[Tensor, Tensor]]  # labels (B, H, W) -> classes, distances

    def __post_init__(self) -> None:
        self.weights = [p for part in (self.encoder, self.head) for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4)


# ---- ours, as nucsam/train.py puts it together ----


def ours(base: Base, samples: Samples, config: Config, device: torch.device) -> Way:
    net, d = model.build(config.model, base, seed=0).to(device).train(), config.data

    def prepare(batch: dict[str, Tensor]) -> tuple[Tensor, Truth]:
        maps = (batch[key].to(device, non_blocking=True) for key in ("image", "label", "counted"))
        images, labels, counted = augment(*maps, batch["draws"], crop=d.crop, scale=d.scale, config=config.augment)
        return images, {"labels": labels, "counted": counted, "n": int(batch["label"].max())}

    def loss(maps: Tensor, labels: Tensor, counted: Tensor, n: int) -> dict[str, Tensor]:
        return net.loss(maps, labels, counted, n, config.loss)

    def own_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.to(device).long()
        classes = targets.classes(labels)
        return classes, targets.distances(labels, classes, int(labels.max()))

    data = Crops(samples, window=window(d.crop, config.augment), seed=0)
    return Way(net.image_encoder, net.head, data, prepare, loss, own_targets)


# ---- the plain way ----


def plain(base: Base, samples: Samples, config: Config, device: torch.device, head: nn.Module) -> Way:
    encoder = PlainEncoder(base, round(config.data.crop * config.data.scale), config.model.rank, config.model.alpha)
    w = config.loss

    def prepare(batch: dict[str, Tensor]) -> tuple[Tensor, Truth]:
        batch = {key: batch[key].to(device, non_blocking=True) for key in batch if key != "label"}
        return batch.pop("image").float(), batch

    def loss(maps: Tensor, classes: Tensor, distances: Tensor, counted: Tensor) -> dict[str, Tensor]:
        classes, nucleus, logits = classes.long(), classes > 0, maps[:, :3]
        class_weights = logits.new_tensor([1.0, 1.0, w.boundary])
        pixel_weights = counted * torch.where(nucleus, NUCLEUS_WEIGHT, 1.0)
        probability = 1 - logits.softmax(1)[:, targets.BACKGROUND]
        return {
            "cross_entropy": w.cross_entropy * losses.cross_entropy(logits, classes, counted, class_weights),
            "tversky": w.tversky * losses.focal_tversky(probability, nucleus, counted),
            "distance": w.distance * losses.absolute(maps[:, 3:].sigmoid(), distances, pixel_weights),
        }

    def loop_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
        classes, distances = zip(*map(plain_targets, labels.numpy()))
        return torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(distances))

    return Way(encoder.to(device), copy.deepcopy(head), PlainCrops(samples, config), prepare, loss, loop_targets)


class PlainEncoder(nn.Module):
    """Stock TinyViT at one image size, BatchNorms in eval mode; hooks take what goes into each down-sampling."""

    def __init__(self, base: Base, side: int, rank: int, alpha: float) -> None:
        super().__init__()
        sam = build_sam()
        sam.load_state_dict(base.state)
        self.vit, self.maps = sam.image_encoder, []
        self.register_buffer("mean", sam.pixel_mean)
        self.register_buffer("std", sam.pixel_std)
        for stage, scale in zip((self.vit.patch_embed.seq[1], *self.vit.layers), (2, 4, 8, 16, 16)):
            for part in stage.modules():
                if hasattr(part, "input_resolution"):
                    part.input_resolution = (side // scale, side // scale)
            last = stage if scale == 2 else stage.blocks[-1]
            last.register_forward_hook(lambda _, __, x, s=side // scale: self._keep(x, s))
        self.requires_grad_(False)
        settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTED)
        peft.inject_adapter_in_model(settings, self.vit)
        self.train()
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()

    def _keep(self, x: Tensor, side: int) -> None:
        self.maps.append(x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (side, side)))

    def forward(self, images: Tensor) -> Features:
        x = self.vit.patch_embed((images - self.mean) / self.std)
        for layer in self.vit.layers:  # the neck, with its view(B, 64, 64, C), is for SAM's decoder, not for this head
            x = layer(x)
        features = Features(*self.maps)
        self.maps.clear()
        return features


class PlainCrops(Crops):
    """The same crops, augmented and with their targets, by numpy, scipy, scikit-image and Pillow."""

    def __init__(self, samples: Samples, config: Config) -> None:
        super().__init__(samples, window=window(config.data.crop, config.augment), seed=0)
        self.config = config

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        item, rng, a = super().__getitem__(key), np.random.default_rng(key), self.config.augment
        crop, side = self.config.data.crop, round(self.config.data.crop * self.config.data.scale)
        shown = crop / math.exp(rng.uniform(math.log(a.scale_min), math.log(a.scale_max)))
        corner = rng.uniform(0, self.window - shown, 2)
        turns, flip = int(rng.integers(4)), int(rng.choice([-1, 1]))

        def geometry(pixels: np.ndarray, how: Image.Resampling) -> np.ndarray:
            picture = Image.fromarray(pixels).resize((crop, crop), how, box=(*corner, *(corner + shown)))
            return np.rot90(np.asarray(picture), turns)[:, ::flip]

        image = geometry(np.ascontiguousarray(item["image"].permute(1, 2, 0)), Image.Resampling.BILINEAR)
        label = geometry(item["label"].numpy(), Image.Resampling.NEAREST)
        counted = geometry(item["counted"].numpy().astype(np.uint8), Image.Resampling.NEAREST)
        if rng.random() < a.stain:
            factor, bias = 1 + a.stain_scale * rng.uniform(-1, 1, 3), a.stain_bias * rng.uniform(-1, 1, 3)
            image = 255 * hed2rgb(rgb2hed(image) * factor + bias)
        if rng.random() < a.blur:
            sigma = a.blur_sigma * rng.random()
            image = gaussian_filter(image, (sigma, sigma, 0))
        if rng.random() < a.noise:
            image = image + rng.normal(0, a.noise_sigma * rng.random(), image.shape)
        image = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
        classes, distances = plain_targets(label)
        arrays = {"image": np.asarray(image).transpose(2, 0, 1), "label": label, "counted": counted > 0}
        arrays |= {"classes": classes, "distances": distances}
        return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def plain_targets(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `nucsam.targets` says of one label map, nucleus by nucleus."""
    classes = (label > 0).astype(np.uint8)
    classes[find_boundaries(label, connectivity=2, mode="inner")] = targets.BOUNDARY
    distances = np.ones((2, *label.shape), np.float32)
    for number, box in enumerate(find_objects(label), 1):
        if box is None:
            continue
        mask = label[box] == number
        y, x = np.nonzero(mask)
        away = np.hypot(y - y.mean(), x - x.mean())
        deep = distance_transform_edt(mask & (classes[box] == targets.INSIDE))[mask]
        deep = 1 + np.minimum(deep, targets.REACH)
        distances[0][box][mask] = away / max(away.max(), 1)
        distances[1][box][mask] = 1 - deep / deep.max()
    return classes, distances


# ---- steps, and what they cost ----


class Bench:
    """Where and how steps run, and the clocks."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.device, self.crop, self.dtype = torch.device(args.device), config.data.crop, DTYPES[args.dtype]
        self.batch, self.steps, self.repeat = args.batch, args.steps, args.repeat
        self.cuda = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.dtype == "fp16")

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, way: Way, images: Tensor) -> Features:
        way.optimizer.zero_grad()
        with self.cast():
            features = way.encoder(images)
        reached = [f for f in features if f.requires_grad]
        torch.autograd.backward(reached, [f.detach() for f in reached])  # of half the sum of their squares
        return features

    def forward(self, way: Way, images: Tensor, truth: Truth) -> Tensor:
        with self.cast():
            maps = way.head(way.encoder(images), (self.crop, self.crop))
        return sum(way.loss(maps.float(), **truth).values()).mean()

    def update(self, way: Way) -> None:
        self.scaler.unscale_(way.optimizer)
        nn.utils.clip_grad_norm_(way.weights, 1.0)
        self.scaler.step(way.optimizer)
        self.scaler.update()
        way.optimizer.zero_grad()

    def step(self, way: Way, batch: dict[str, Tensor]) -> None:
        self.scaler.scale(self.forward(way, *way.prepare(batch))).backward()
        self.update(way)

    def epoch(self, way: Way, loader: DataLoader, number: int) -> None:
        loader.batch_sampler.set_epoch(number)
        for batch in loader:
            self.step(way, batch)

    def loader(self, way: Way, workers: int) -> DataLoader:
        batches, keep = EpochBatches(range(self.batch * self.steps), batch=self.batch), workers > 0
        how = {"num_workers": workers, "persistent_workers": keep, "pin_memory": self.cuda}
        return DataLoader(way.data, batch_sampler=batches, **how)

    def clocks(self) -> np.ndarray:
        """Wall and CPU seconds, the latter of the loader's workers too, once the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()
        cpu = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))
        return np.array([time.perf_counter(), cpu + time.process_time()])

    def times(self, calls: dict[str, Callable[[int], Any]], steps: int, repeat: int) -> dict[str, dict[str, float]]:
        """What a step takes in calls of `steps` steps, in turns."""
        spent: dict[str, list[np.ndarray]] = {name: [] for name in calls}
        for number in range(repeat + 1):
            for name, call in calls.items():
                start = self.clocks()
                call(number)
                spent[name].append((self.clocks() - start) / steps)
        rows = {}
        for name, (_, *turns) in spent.items():
            wall, cpu = np.array(turns).T
            ms = {"ms": np.median(wall), "ms_min": wall.min(), "ms_max": wall.max()}
            rows[name] = {"images_per_second": self.batch / ms["ms"], **{k: 1e3 * v for k, v in ms.items()}}
            rows[name]["cpu_s_per_image"] = np.median(cpu) / self.batch
        return rows

    def saved_mib(self, way: Way, run: Callable[[], Any]) -> float:
        """Tensors that a forward pass keeps for the backward one: each storage once, without the weights."""
        own = {p.untyped_storage().data_ptr() for part in (way.encoder, way.head) for p in part.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self.cast():
            kept = run()  # alive until all is counted, so that no address serves twice
        del kept
        return sum(found.values()) / 2**20

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Peak memory in one call above that before it: allocated on a GPU, resident on a CPU (Linux)."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if not Path("/proc/self/clear_refs").exists():
            return math.nan
        ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier call left in the heap would hide this one's
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
        call()
        most = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        return int(most) / 2**10 - before / 2**20

    def profile(self, way: Way, number: int) -> dict[str, float]:
        """Milliseconds an image of each part of one step, without loader workers: CPU time, on a GPU wall time."""
        names, moments = [], []

        def mark(name: str) -> None:
            names.append(name)
            moments.append(self.clocks()[0 if self.cuda else 1])

        mark("start")
        batch = default_collate([way.data[number, i] for i in range(self.batch)])
        mark("loader")
        images, truth = way.prepare(batch)
        mark("transfer (ours: augmentation too)")
        way.targets(truth.get("labels", batch["label"]))
        mark("targets, once more")
        with self.cast():
            features = way.encoder(images)
        mark("encoder forward")
        leaves = Features(*(f.detach().requires_grad_(f.requires_grad) for f in features))
        with self.cast():
            maps = way.head(leaves, (self.crop, self.crop))
        mark("head forward")
        loss = self.scaler.scale(sum(way.loss(maps.float(), **truth).values()).mean())
        mark("loss (ours: targets too)")
        loss.backward()
        mark("loss and head backward")
        reached = [(f, leaf.grad) for f, leaf in zip(features, leaves) if f.requires_grad]
        torch.autograd.backward(*map(list, zip(*reached)))
        mark("encoder backward")
        self.update(way)
        mark("clipping and AdamW")
        return dict(zip(names[1:], 1e3 * np.diff(moments) / self.batch))


def random_base(images: Tensor) -> Base:
    """A random base whose BatchNorms and attention biases are not the zeros and ones that would hide mistakes."""
    base, generator = load_base("none"), torch.Generator().manual_seed(0)
    state = dict(base.state)
    for name, tensor in state.items():
        if name.startswith("image_encoder.") and name.endswith((".bn.weight", ".bn.bias", ".attention_biases")):
            state[name] = torch.rand(tensor.shape, generator=generator) + (0.5 if name.endswith("weight") else -0.5)
    return model.calibrated(replace(base, state=state), images)


def check(bench: Bench, own: Way, peer: Way, images: Tensor) -> dict[str, float]:
    """Largest differences between the two where there must be none, in fp32; one over its bound ends the program."""
    adapters = [[p for p in way.encoder.parameters() if p.requires_grad] for way in (own, peer)]
    with torch.no_grad():
        for a, b in zip(*adapters, strict=True):
            b.copy_(a.normal_(std=0.02))  # B begins at zero
    dtype, tf32 = bench.dtype, torch.backends.cudnn.allow_tf32
    bench.dtype, torch.backends.cudnn.allow_tf32 = torch.float32, False
    features = [bench.encode(way, images) for way in (own, peer)]
    bench.dtype, torch.backends.cudnn.allow_tf32 = dtype, tf32
    batch = default_collate([peer.data[0, i] for i in range(bench.batch)])
    made, looped = (way.targets(batch["label"]) for way in (own, peer))
    maps, labels = torch.randn(bench.batch, 5, bench.crop, bench.crop), batch["label"]
    maps, labels, truth = maps.to(bench.device), labels.to(bench.device).long(), peer.prepare(batch)[1]
    terms = own.loss(maps, labels, truth["counted"], int(labels.max())), peer.loss(maps, **truth)

    def apart(a: Tensor, b: Tensor) -> float:
        return (a.detach().cpu().float() - b.detach().cpu().float()).abs().max().item()

    found = {
        "features": (max(map(apart, *features)), 1e-3),
        "gradients": (max(apart(a.grad, b.grad) / b.grad.abs().max().item() for a, b in zip(*adapters)), 1e-2),
        "classes": (apart(made[0], looped[0]), 0.0),
        "distances": (apart(made[1], looped[1]), 1e-4),
        "loss": (max(apart(terms[0][name], terms[1][name]) for name in terms[0]), 1e-4),
    }
    if wrong := [f"{name} {d:.2g}, expected at most {most:g}" for name, (d, most) in found.items() if not d <= most]:
        raise SystemExit("the two do not compute the same, so nothing is timed: " + "; ".join(wrong))
    return {name: d for name, (d, _) in found.items()}


def ratios(own: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """How many times the plain way's speed, how much of its memory."""
    speed = {"speed": peer["ms"] / own["ms"], "speed by CPU time": peer["cpu_s_per_image"] / own["cpu_s_per_image"]}
    return speed | {name: own[f"{name}_mib"] / peer[f"{name}_mib"] for name in ("saved", "peak")}


def measure(bench: Bench, ways: dict[str, Way], images: Tensor, workers: list[int]) -> dict[str, dict[str, dict]]:
    """{"encoder" or "pipeline": {way: numbers}}."""
    encoder = bench.times({k: lambda _, w=w: bench.encode(w, images) for k, w in ways.items()}, 1, bench.repeat)
    calls, chosen = {}, {}
    for name, way in ways.items():
        loaders = {n: bench.loader(way, n) for n in workers}
        tried = {n: (lambda i, w=way, x=loader: bench.epoch(w, x, i)) for n, loader in loaders.items()}
        taken = bench.times(tried, bench.steps, 1) if len(tried) > 1 else {n: {"ms": 0.0} for n in tried}
        chosen[name] = min(taken, key=lambda n: taken[n]["ms"])
        calls[name] = tried.pop(chosen[name])
        del loaders, tried  # ends their workers
    pipeline = bench.times(calls, bench.steps, bench.repeat)
    for name, way in ways.items():
        batch = next(iter(bench.loader(way, 0)))
        inputs = way.prepare(batch)
        encoder[name]["saved_mib"] = bench.saved_mib(way, lambda w=way: w.encoder(images))
        encoder[name]["peak_mib"] = bench.peak_mib(lambda w=way: bench.encode(w, images))
        pipeline[name]["saved_mib"] = bench.saved_mib(way, lambda w=way, x=inputs: bench.forward(w, *x))
        pipeline[name]["peak_mib"] = bench.peak_mib(lambda w=way, b=batch: bench.step(w, b))
        pipeline[name]["workers"] = chosen[name]
    return {"encoder": encoder, "pipeline": pipeline}


def show(console: Console, document: dict[str, Any]) -> None:
    title = "{device}, {dtype}, batch {batch}, {image_size} model px (crops of {crop} image px)".format(**document)
    checks = ", ".join(f"{name} {difference:.1e}" for name, difference in document["checks"].items())
    table = Table(title=title, caption=f"largest differences: {checks}" if checks else None)
    columns = ("images/s", "ms a step", "min - max", "CPU s/image", "saved MiB", "peak MiB", "workers")
    for column in ("", "", *columns):
        table.add_column(column, justify="right" if column else "left")
    for stage, rows in document["results"].items():
        for name, r in rows.items():
            cells = [f"{r['images_per_second']:.2f}", f"{r['ms']:.0f}", f"{r['ms_min']:.0f} - {r['ms_max']:.0f}"]
            cells += [f"{r['cpu_s_per_image']:.3f}", f"{r['saved_mib']:.0f}", f"{r['peak_mib']:.0f}"]
            table.add_row(stage, name, *cells, str(r.get("workers", "")))
    console.print(table)
    for stage, found in document["ratios"].items():
        console.print(f"{stage}: " + ", ".join(f"{name} {v:.2f}" for name, v in found.items()), f"  bar: {BARS[stage]}")
    profile = document["profile_ms_per_image"]
    table = Table("ms an image", *profile, title="where a step's time goes, without loader workers")
    for part in profile["nucsam"]:
        table.add_row(part, *(f"{parts[part]:.1f}" for parts in profile.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=512, help="model px, a multiple of 32")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeat", type=int, default=7, help="turns of each, after one to warm up")
    parser.add_argument("--steps", type=int, default=4, help="batches in a turn of the pipeline")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader workers to choose from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch in the main process")
    parser.add_argument("--json", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    if args.dtype == "fp16" and args.device == "cpu":
        parser.error("--dtype fp16: a CPU would compute in fp32, expected fp32 or bf16 there")
    torch.set_num_threads(args.threads)
    config = Config()
    config = replace(config, data=replace(config.data, crop=round(args.image_size / config.data.scale)))
    bench, console = Bench(args, config), Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "data", images=args.batch * args.steps, size=SIDE, seed=0)
        samples = Samples(find_records(Path(folder) / "data"), progress=False)
    images = torch.stack([torch.from_numpy(samples[i].image) for i in range(args.batch)]).permute(0, 3, 1, 2)
    images = nn.functional.interpolate(images.float(), (args.image_size, args.image_size), mode="bilinear")
    base = random_base(images)
    images = images.to(bench.device).contiguous()  # NCHW, as loaders give it

    ways, checks = {"nucsam": ours(base, samples, config, bench.device)}, {}
    if peft:
        ways["plain"] = plain(base, samples, config, bench.device, ways["nucsam"].head)
        checks = check(bench, *ways.values(), images)
    else:
        console.print("plain: skipped, peft is not installed")
    results = measure(bench, ways, images, args.workers)
    profiles = {}
    for name, way in ways.items():
        _, *parts = (bench.profile(way, number) for number in range(args.repeat + 1))
        profiles[name] = {part: statistics.median(p[part] for p in parts) for part in parts[0]}
    packages = ("torch", "numpy", "scipy", "scikit-image", "mobilesam-mirror", *(["peft"] if peft else []))
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    document = {"benchmark": "train_step", **asked, "crop": bench.crop}
    document |= {
        "machine": torch.cuda.get_device_name() if bench.cuda else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "trained": sum(p.numel() for p in ways["nucsam"].weights),
        "results": results,
        "ratios": {stage: ratios(*rows.values()) for stage, rows in results.items() if "plain" in rows},
        "profile_ms_per_image": profiles,
        "checks": checks,
    }
    show(console, document)
    if args.json:
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
