"""How fast and how large is a training step?

    pip install peft
    python benchmarks/train_step.py [--device cpu] [--batch 4] [--image-size 512]
        [--dtype fp32|bf16|fp16] [--repeat 7] [--steps 4] [--workers 0 2]
        [--ways nucsam plain tuned report full] [--config CONFIG.toml] [--compile]
        [--memory-cap 15] [--snapshot FILE] [--threads N] [--json FILE]

Three stages are timed:

- encoder: forward and backward of the encoder with LoRA, to its multi-scale features.
- step: encoder, head, losses, backward, clipping, AdamW and, in nucsam, the running average of the
  weights, on an augmented batch. The loss of nucsam includes making the targets.
- pipeline: the step with loader, augmentation and targets, on images of 512 px, or of a crop's
  window where that is larger.

`--image-size` is the side in model px: a crop has image-size / data.scale image px. The ways:

- nucsam: the step of nucsam/train/loop.py, with the library's defaults or those of `--config`.
- plain: stock `mobile_sam` with forward hooks and Hugging Face `peft` on the same layers. The
  loader's workers augment and make targets with numpy, scipy and scikit-image, nucleus by nucleus.
  It gets the same decoded images, crops, head, losses, dtype and optimizer. Nothing is timed unless
  both compute the same features, gradients, targets and losses.
- tuned: plain in channels-last memory, images and weights: two more lines of code.
- report: the student report's loop with a working gradient: stock `mobile_sam`, `peft` of rank 4 on
  all 40 live linear layers of the encoder, the frozen mask decoder without prompts, cross-entropy
  and Dice on one foreground map, no augmentation.
- full: nucsam with the whole encoder training.

The ways take turns, after one turn to warm up. Times are wall times. CPU s/image adds up all
threads and loader workers, so it holds on a shared machine. A turn of the pipeline counts `--steps`
steps of a running loader. Each worker delivers a batch before them, and the batches after them are
drained uncounted, so no way loads in another's time. The number of `--workers` is the fastest for
each way.

"of matmul" is the share of a large matrix product's FLOP/s that a way's matrix products,
convolutions and attention reach. Each way counts its own operations, the padding of stock windows
included. `saved` is what autograd keeps for the backward pass. `peak` is what one call, measured
once, takes above the memory before it. `reserved` is all that the allocator took in the turns, on a
GPU with a single way. With `--compile`, operations, `saved` and the profile are those of eager
mode. A way that runs out of device memory is skipped. The script prints tables, the goals for the
device, size, dtype and batch, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy works in the loader's workers

import argparse
import copy
import gc
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from skimage.color import hed2rgb, rgb2hed
from skimage.segmentation import find_boundaries
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
from stock import embed, stock_sam

from nucsam.config import Config
from nucsam.data.augment import augment, window
from nucsam.data.folders import find_records
from nucsam.data.samples import Crops, EpochBatches, Samples
from nucsam.data.synthetic import write_dataset
from nucsam.model import losses, network, targets
from nucsam.model.heads import NUCLEUS_WEIGHT, SamHead
from nucsam.model.lora import LoRALinear
from nucsam.model.pixels import Features
from nucsam.model.weights import Base, load_base

try:
    import peft
except ImportError:
    peft = None

SIDE = 512  # px of a synthetic image, as in NuInsSeg, or more for a large window
IMAGES = 16  # synthetic images, or a batch if that is more
LIVE = r"layers\..*\.(attn\.(qkv|proj)|mlp\.fc[12])"  # the encoder's 40 linear layers in use
STAGES = ("encoder", "step", "pipeline")
WAYS = ("nucsam", "plain", "tuned", "report", "full")
PEERS = ("plain", "tuned", "report")  # need peft
PIPELINE = {  # goals of its speed on a CPU at 512 model px, in multiples of a peer's
    "fp32": {"plain": 1.6, "tuned": 1.3},
    "bf16": {"plain": 2.0, "tuned": 1.4},
}
Truth = dict[str, Any]  # arguments of a way's loss beside the maps


@dataclass
class Way:
    """One way to build a training step."""

    encoder: nn.Module  # images (B, 3, H, W), 0..255 -> tuple of maps
    head: nn.Module  # maps, size -> dense maps (B, C, *size)
    data: Crops
    move: Callable[[dict[str, Tensor]], dict[str, Any]]  # a loader's batch -> to the device
    prepare: Callable[[dict[str, Any]], tuple[Tensor, Truth]]  # of `move` -> images, truth
    loss: Callable[..., dict[str, Tensor]]  # dense maps, **truth -> terms of (B,)
    targets: Callable[[Tensor], tuple[Tensor, ...]]  # labels (B, H, W) -> target maps
    averaged: Sequence[Tensor] = ()  # detached tensors with a running average

    def __post_init__(self) -> None:
        self.average = [tensor.clone() for tensor in self.averaged]
        self.weights = [
            p for part in (self.encoder, self.head) for p in part.parameters() if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)


def mover(device: torch.device, *names: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda batch: {name: batch[name].to(device, non_blocking=True) for name in names}


# ---- nucsam ----


def ours(base: Base, samples: Samples, config: Config, device: torch.device) -> Way:
    d, t = config.data, config.train
    net = network.build_model(config.model, base, seed=0, checkpoint=t.checkpoint)
    net = net.to(device).train()

    def move(batch: dict[str, Tensor]) -> dict[str, Any]:
        maps = mover(device, "image", "label", "counted")(batch)
        return maps | {"draws": batch["draws"], "n": int(batch["label"].max())}

    def prepare(batch: dict[str, Any]) -> tuple[Tensor, Truth]:
        maps = batch["image"], batch["label"], batch["counted"], batch["draws"]
        images, labels, counted = augment(*maps, crop=d.crop, scale=d.scale, config=config.augment)
        return images, {"labels": labels, "counted": counted, "n": batch["n"]}

    def loss(maps: Tensor, labels: Tensor, counted: Tensor, n: int) -> dict[str, Tensor]:
        return net.loss(maps, labels, counted, n, config.loss)

    def make_targets(labels: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        labels = labels.to(device).long()
        classes = targets.classes(labels)
        return classes, targets.depth(labels, classes, int(labels.max()), counted)

    data = Crops(samples, window=window(d.crop, config.augment), seed=0)
    averaged = [tensor.detach() for tensor in net.trainable().values()] if t.ema else ()
    return Way(net.image_encoder, net.head, data, move, prepare, loss, make_targets, averaged)


# ---- the plain way ----


def plain(
    base: Base,
    samples: Samples,
    config: Config,
    device: torch.device,
    nucsam: Way,
    layout: torch.memory_format,
) -> Way:
    """The plain way with nucsam's adapted layers and a copy of its head."""
    side, m, w = round(config.data.crop * config.data.scale), config.model, config.loss
    layers = [n for n, part in nucsam.encoder.named_modules() if isinstance(part, LoRALinear)]
    settings = peft.LoraConfig(r=m.rank, lora_alpha=m.alpha, target_modules=layers)
    encoder = PlainEncoder(base, side, settings, layout).to(device, memory_format=layout)
    head = copy.deepcopy(nucsam.head).to(memory_format=layout)

    def loss(maps: Tensor, classes: Tensor, depth: Tensor, counted: Tensor) -> dict[str, Tensor]:
        classes, nucleus, logits = classes.long(), classes > 0, maps[:, :3]
        class_weights = torch.where(classes == targets.BOUNDARY, w.boundary, 1.0)
        pixel_weights = counted * torch.where(nucleus, NUCLEUS_WEIGHT, 1.0)
        probability = 1 - logits.softmax(1)[:, targets.BACKGROUND]
        cross_entropy = losses.cross_entropy(logits, classes, counted * class_weights)
        misses, power = w.tversky_misses, w.tversky_power
        tversky = losses.focal_tversky(
            probability, nucleus, counted, alpha=misses, beta=1 - misses, gamma=power
        )
        distance = losses.absolute(maps[:, 3].sigmoid(), depth, pixel_weights)
        return {
            "cross_entropy": w.cross_entropy * cross_entropy,
            "tversky": w.tversky * tversky,
            "distance": w.distance * distance,
        }

    def loop_targets(labels: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        counted = torch.ones_like(labels) if counted is None else counted.cpu()
        classes, depths = zip(*map(plain_targets, labels.numpy(), counted.numpy() > 0))
        return torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(depths))

    data, move = PlainCrops(samples, config), mover(device, "image", "counted", "classes", "depth")
    return Way(encoder, head, data, move, as_loaded, loss, loop_targets)


def as_loaded(batch: dict[str, Tensor]) -> tuple[Tensor, Truth]:
    """The loader has done all the work."""
    return batch.pop("image").float(), batch


class PlainEncoder(nn.Module):
    """Stock TinyViT at one image size, BatchNorms in eval mode.

    Hooks take the input of each down-sampling.
    """

    def __init__(self, base: Base, side: int, settings: Any, layout: torch.memory_format) -> None:
        super().__init__()
        sam = stock_sam(base, side)
        self.vit, self.maps, self.layout = sam.image_encoder, [], layout
        self.register_buffer("mean", sam.pixel_mean)
        self.register_buffer("std", sam.pixel_std)
        for stage, stride in zip(
            (self.vit.patch_embed.seq[1], *self.vit.layers), (2, 4, 8, 16, 16)
        ):
            last = stage if stride == 2 else stage.blocks[-1]
            last.register_forward_hook(lambda _, __, x, s=side // stride: self._keep(x, s))
        peft.inject_adapter_in_model(settings, self.vit)
        train_pinned(self)

    def _keep(self, x: Tensor, side: int) -> None:
        self.maps.append(x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (side, side)))

    def forward(self, images: Tensor) -> Features:
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        x = self.vit.patch_embed(images)
        for layer in self.vit.layers:  # without the neck, which is for SAM's own decoder
            x = layer(x)
        features = (images, *self.maps)
        self.maps.clear()
        return features


class PlainCrops(Crops):
    """nucsam's crops; numpy, scipy, scikit-image and Pillow augment and make targets."""

    def __init__(self, samples: Samples, config: Config) -> None:
        super().__init__(samples, window=window(config.data.crop, config.augment), seed=0)
        self.config = config

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        item = super().__getitem__(key)
        rng, a = np.random.default_rng(key), self.config.augment
        crop, side = self.config.data.crop, round(self.config.data.crop * self.config.data.scale)
        size = crop / math.exp(rng.uniform(math.log(a.scale_min), math.log(a.scale_max)))
        corner = rng.uniform(0, self.window - size, 2)
        turns, flip = int(rng.integers(4)), int(rng.choice([-1, 1]))

        def geometry(pixels: np.ndarray, method: Image.Resampling) -> np.ndarray:
            box = (*corner, *(corner + size))
            resized = Image.fromarray(pixels).resize((crop, crop), method, box=box)
            return np.rot90(np.asarray(resized), turns)[:, ::flip]

        image = np.ascontiguousarray(item["image"].permute(1, 2, 0))
        image = geometry(image, Image.Resampling.BILINEAR)
        label = geometry(item["label"].numpy(), Image.Resampling.NEAREST)
        counted = geometry(item["counted"].numpy().astype(np.uint8), Image.Resampling.NEAREST)
        if rng.random() < a.stain:
            factor = 1 + a.stain_scale * rng.uniform(-1, 1, 3)
            bias = a.stain_bias * rng.uniform(-1, 1, 3)
            image = 255 * hed2rgb(rgb2hed(image) * factor + bias)
        if rng.random() < a.blur:
            sigma = a.blur_sigma * rng.random()
            image = gaussian_filter(image, (sigma, sigma, 0))
        if rng.random() < a.noise:
            image = image + rng.normal(0, a.noise_sigma * rng.random(), image.shape)
        image = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        image = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
        classes, depth = plain_targets(label, counted > 0)
        arrays = {
            "image": image.transpose(2, 0, 1),
            "counted": counted > 0,
            "classes": classes,
            "depth": depth,
        }
        return {n: torch.from_numpy(np.array(array, order="C")) for n, array in arrays.items()}


def plain_targets(label: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The maps of `nucsam.model.targets` for one label map, nucleus by nucleus."""
    classes = (label > 0).astype(np.uint8)
    classes[find_boundaries(label, connectivity=2, mode="inner")] = targets.BOUNDARY
    depth = np.zeros(label.shape, np.float32)
    for number, box in enumerate(find_objects(label), 1):
        if box is None:
            continue
        mask = label[box] == number
        deep = distance_transform_edt(mask & (classes[box] == targets.INSIDE))[mask]
        deep = 1 + np.minimum(deep, targets.REACH)
        depth[box][mask] = deep / deep[counted[box][mask]].max(initial=1)
    return classes, depth


def train_pinned(net: nn.Module) -> None:
    """Training mode, with BatchNorms as in the base."""
    net.train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


# ---- the report's way ----


class ReportEncoder(nn.Module):
    """Stock TinyViT with its neck, LoRA on every linear layer in use."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam = sam
        settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=LIVE)
        peft.inject_adapter_in_model(settings, self.sam.image_encoder)
        train_pinned(self)

    def forward(self, images: Tensor) -> Features:
        return (embed(self.sam, images),)


class ReportHead(nn.Module):
    """The stock mask decoder, frozen, without prompts: one foreground map."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        return SamHead(self.prompt_encoder, self.mask_decoder)(features[0], size)


class ReportCrops(Crops):
    """Crops resized by Pillow, and a mask of the nuclei."""

    def __init__(self, samples: Samples, config: Config) -> None:
        super().__init__(samples, window=config.data.crop, seed=0)
        self.side = round(config.data.crop * config.data.scale)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        item = super().__getitem__(key)
        image = Image.fromarray(np.ascontiguousarray(item["image"].permute(1, 2, 0)))
        image = np.array(image.resize((self.side, self.side), Image.Resampling.BILINEAR))
        mask = (item["label"] > 0).to(torch.uint8)
        return {"image": torch.from_numpy(image).permute(2, 0, 1), "mask": mask}


def report(base: Base, samples: Samples, config: Config, device: torch.device) -> Way:
    sam = stock_sam(base, round(config.data.crop * config.data.scale))
    head = ReportHead(sam)
    del sam.prompt_encoder, sam.mask_decoder  # they belong to the head

    def loss(maps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits, nucleus, counted = maps[:, 0], mask > 0, torch.ones_like(mask, dtype=torch.bool)
        return {
            "cross_entropy": losses.binary_cross_entropy(logits, nucleus, counted),
            "dice": losses.dice(logits.sigmoid(), nucleus, counted),
        }

    data, move = ReportCrops(samples, config), mover(device, "image", "mask")
    encoder = ReportEncoder(sam).to(device)
    return Way(
        encoder, head.to(device), data, move, as_loaded, loss, lambda labels, _=None: (labels > 0,)
    )


# ---- steps and their cost ----


class Bench(bench.Machine):
    """Runs steps of any way, and measures their cost."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        super().__init__(args)
        self.crop = config.data.crop
        self.batch, self.steps, self.repeat = args.batch, args.steps, args.repeat
        # A small scale: no gradient overflows, which would skip an optimizer step.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=256.0, enabled=args.dtype == "fp16"
        )

    def encode(self, way: Way, images: Tensor) -> Any:
        way.optimizer.zero_grad()
        with self.cast():
            features = way.encoder(images)
        reached = [f for f in features if f.requires_grad]
        # the gradient of half the sum of squares
        torch.autograd.backward(reached, [f.detach() for f in reached])
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
        if way.average:
            torch._foreach_lerp_(way.average, way.averaged, 0.01)

    def train(self, way: Way, images: Tensor, truth: Truth) -> None:
        self.scaler.scale(self.forward(way, images, truth)).backward()
        self.update(way)

    def step(self, way: Way, batch: dict[str, Tensor]) -> None:
        self.train(way, *way.prepare(way.move(batch)))

    def prepared_step(self, way: Way, batch: dict[str, Tensor]) -> None:
        """A turn that counts from the augmented batch on."""
        inputs = way.prepare(way.move(batch))
        self.start()
        self.train(way, *inputs)

    def epoch(self, way: Way, loader: DataLoader, number: int) -> None:
        """A turn that counts `steps` steps of a running loader, and drains it."""
        loader.batch_sampler.set_epoch(number)
        stream = iter(loader)
        for batch in islice(stream, loader.num_workers):
            self.step(way, batch)
        self.start()
        for batch in islice(stream, self.steps):
            self.step(way, batch)
        self.stop()
        for _ in stream:
            pass

    def loader(self, way: Way, workers: int) -> DataLoader:
        count = self.batch * (self.steps + 3 * workers)  # a worker is up to two batches ahead
        batches = EpochBatches([i % len(way.data) for i in range(count)], batch=self.batch)
        return DataLoader(
            way.data,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.cuda,
        )

    def loaded(self, way: Way, epoch: int = 0) -> dict[str, Tensor]:
        """A batch; for a GPU in pinned memory, as the loader gives it."""
        batch = default_collate([way.data[epoch, i] for i in range(self.batch)])
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.cuda else batch

    def rows(
        self, calls: dict[str, Callable[[int], Any]], steps: int, repeat: int
    ) -> dict[str, dict[str, float]]:
        """The cost of a step in calls of `steps` steps, timed in turns."""
        rows = self.turns(calls, repeat, steps=steps)
        for row in rows.values():
            row["images_per_second"] = 1e3 * self.batch / row["ms"]
            row["cpu_s_per_image"] = 1e-3 * row.pop("cpu_ms") / self.batch
        return rows

    def saved_mib(self, way: Way, run: Callable[[], Any]) -> float:
        """Tensors that a forward pass saves for the backward pass, without the weights, MiB."""
        parts = (way.encoder, way.head)
        weights = {p.untyped_storage().data_ptr() for part in parts for p in part.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), self.cast():
            result = run()  # lives until all is counted, so that no address serves twice
        del result
        return sum(saved.values()) / 2**20

    def profile(self, way: Way, labels: Tensor, number: int) -> dict[str, float]:
        """Milliseconds an image of each part of a step, without loader workers.

        CPU time on a CPU, wall time on a GPU.
        """
        moments = {}

        def mark(name: str) -> None:
            moments[name] = self.now()

        def at_first_trained(*_: Any) -> None:
            hook.remove()
            mark("encoder, frozen part")

        mark("start")
        batch = self.loaded(way, number)
        mark("loader")
        moved = way.move(batch)
        mark("transfer")
        images, truth = way.prepare(moved)
        mark("augmentation")
        way.targets(truth.get("labels", labels))
        mark("targets")
        # Remains so where nothing is frozen: nucsam reads the weights of its stem without calling
        # the modules.
        moments["encoder, frozen part"] = moments["targets"]
        hook = first_trained(way.encoder).register_forward_pre_hook(at_first_trained)
        with self.cast():
            features = way.encoder(images)
        hook.remove()
        mark("encoder, adapted part")
        leaves = tuple(f.detach().requires_grad_(f.requires_grad) for f in features)
        with self.cast():
            maps = way.head(leaves, (self.crop, self.crop))
        mark("head")
        loss = self.scaler.scale(sum(way.loss(maps.float(), **truth).values()).mean())
        mark("loss")
        loss.backward()
        mark("loss and head, backward")
        reached = [(f, leaf.grad) for f, leaf in zip(features, leaves) if f.requires_grad]
        torch.autograd.backward(*map(list, zip(*reached)))
        mark("encoder, backward")
        self.update(way)
        mark("optimizer")
        return {name: 1e3 * (b - a) / self.batch for (_, a), (name, b) in pairwise(moments.items())}


def first_trained(net: nn.Module) -> nn.Module:
    """The first module in the order of the forward pass that has a trained weight itself."""

    def trains(part: nn.Module) -> bool:
        return any(p.requires_grad for p in part.parameters(recurse=False))

    return next(filter(trains, net.modules()))


def random_base(images: Tensor) -> Base:
    """A random base without the zeros and ones of fresh BatchNorms, which would hide mistakes."""
    base, generator = load_base("none"), torch.Generator().manual_seed(0)
    state = dict(base.state)
    for name, tensor in state.items():
        random = name.endswith((".bn.weight", ".bn.bias", ".attention_biases"))
        if name.startswith("image_encoder.") and random:
            lowest = 0.5 if name.endswith("weight") else -0.5
            state[name] = torch.rand(tensor.shape, generator=generator) + lowest
    return network.calibrated(replace(base, state=state), images)


def check(run: Bench, nucsam: Way, peer: Way, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The largest differences in fp32 between two ways that must compute the same.

    Raises:
        SystemExit: a difference is over its bound.
    """
    adapters = [[p for p in way.encoder.parameters() if p.requires_grad] for way in (nucsam, peer)]
    with torch.no_grad():
        for a, b in zip(*adapters, strict=True):
            b.copy_(a.normal_(std=0.02))  # B begins at zero
    dtype, tf32 = run.dtype, torch.backends.cudnn.allow_tf32
    run.dtype, torch.backends.cudnn.allow_tf32 = torch.float32, False
    features = [run.encode(way, images) for way in (nucsam, peer)]
    run.dtype, torch.backends.cudnn.allow_tf32 = dtype, tf32
    maps = torch.randn(len(labels), nucsam.head.channels, run.crop, run.crop).to(run.device)
    counted = (torch.rand(labels.shape) < 0.9).to(run.device)
    vectorised, looped = (way.targets(labels, counted) for way in (nucsam, peer))
    labels, *truth = (t.to(run.device) for t in (labels.long(), *looped))
    terms = nucsam.loss(maps, labels, counted, int(labels.max())), peer.loss(maps, *truth, counted)

    def apart(a: Tensor, b: Tensor) -> float:
        return (a.detach().cpu().float() - b.detach().cpu().float()).abs().max().item()

    gradients = [apart(a.grad, b.grad) / b.grad.abs().max().item() for a, b in zip(*adapters)]
    differences = {  # and their bounds
        "features": (max(map(apart, *features)), 1e-3),
        "gradients": (max(gradients), 1e-2),
        "classes": (apart(vectorised[0], looped[0]), 0.0),
        "depth": (apart(vectorised[1], looped[1]), 1e-4),
        "loss": (max(apart(terms[0][name], terms[1][name]) for name in terms[0]), 1e-4),
    }
    for way in (nucsam, peer):
        way.optimizer.zero_grad()
    wrong = [
        f"{name} {difference:.2g}, expected at most {bound:g}"
        for name, (difference, bound) in differences.items()
        if not difference <= bound
    ]
    if wrong:
        raise SystemExit(f"the ways differ, so nothing is timed: {'; '.join(wrong)}")
    return {name: difference for name, (difference, _) in differences.items()}


def trial(
    run: Bench, way: Way, images: Tensor, labels: Tensor, compiled: bool
) -> dict[str, dict[str, float]]:
    """All numbers of a way that need no turns, by stage, and its "profile" and "memory"."""
    batch = run.loaded(way)
    inputs = way.prepare(way.move(batch))
    calls = {
        "encoder": partial(run.encode, way, images),
        "step": partial(run.train, way, *inputs),
        "pipeline": partial(run.step, way, batch),
    }
    saved = {"encoder": run.saved_mib(way, partial(way.encoder, images))}
    saved["step"] = saved["pipeline"] = run.saved_mib(way, partial(run.forward, way, *inputs))
    numbers = {
        stage: {"saved_mib": saved[stage], "flops": bench.flops(call)}
        for stage, call in calls.items()
    }
    _, *profiles = (run.profile(way, labels, number) for number in range(run.repeat + 1))
    numbers["profile"] = {
        part: statistics.median(profile[part] for profile in profiles) for part in profiles[0]
    }
    if compiled:
        way.encoder, way.head = torch.compile(way.encoder), torch.compile(way.head)
    for stage, call in calls.items():
        call()  # compiles
        numbers[stage]["peak_mib"] = run.peak_mib(call)
    numbers["memory"] = split(way, saved["step"], numbers["pipeline"]["peak_mib"])
    return numbers


def those_that_fit(ways: dict[str, Way], trial: Callable[[Way], Any]) -> dict[str, Any]:
    """The result of a trial of each way. A way that runs out of device memory leaves `ways`."""
    results = {}
    for name in list(ways):
        try:
            results[name] = trial(ways[name])
        except torch.OutOfMemoryError:
            del ways[name]
        if name not in ways:  # outside the handler, whose traceback still holds the activations
            gc.collect()
            torch.cuda.empty_cache()
    return results


def measure(
    run: Bench, ways: dict[str, Way], alone: dict[str, Any], images: Tensor, workers: list[int]
) -> dict:
    """{stage: {way: numbers}}: the cost of a step, timed in turns, with the numbers of `alone`."""
    batches = {name: run.loaded(way) for name, way in ways.items()}
    encode = {name: lambda _, w=way: run.encode(w, images) for name, way in ways.items()}
    step = {
        name: lambda _, w=way, b=batches[name]: run.prepared_step(w, b)
        for name, way in ways.items()
    }
    stages = {
        "encoder": run.rows(encode, 1, run.repeat),
        "step": run.rows(step, 1, run.repeat),
        "pipeline": pipeline(run, ways, workers),
    }
    for stage, rows in stages.items():
        for name, row in rows.items():
            row |= alone[name][stage]
            row["tflops_per_s"] = 1e-9 * row["flops"] / row["ms"]
    return stages


def pipeline(run: Bench, ways: dict[str, Way], workers: list[int]) -> dict[str, dict]:
    """Each way's pipeline, with its fastest number of loader workers."""
    calls, fastest = {}, {}
    for name, way in ways.items():
        loaders = {n: run.loader(way, n) for n in workers}
        trials = {
            n: (lambda i, w=way, x=loader: run.epoch(w, x, i)) for n, loader in loaders.items()
        }
        fastest[name] = workers[0]
        if len(trials) > 1:
            rows = run.rows(trials, run.steps, 1)
            fastest[name] = min(rows, key=lambda n: rows[n]["ms"])
        calls[name] = trials.pop(fastest[name])
        del loaders, trials  # ends their workers
    rows = run.rows(calls, run.steps, run.repeat)
    return {name: row | {"workers": fastest[name]} for name, row in rows.items()}


def split(way: Way, activations: float, peak: float) -> dict[str, float]:
    """The uses of a way's memory, MiB.

    `held`, the most that it holds, is weights, optimizer, average and the peak of a step, which
    includes the gradients.
    """
    parts = (way.encoder, way.head)
    tensors = {
        "weights": [t for part in parts for t in (*part.parameters(), *part.buffers())],
        "gradients": way.weights,  # of their size
        "optimizer": [t for state in way.optimizer.state.values() for t in state.values()],
        "average": way.average,
    }
    sizes = {name: sum(t.nbytes for t in group) / 2**20 for name, group in tensors.items()}
    held = sum(sizes.values()) - sizes["gradients"] + peak
    return sizes | {"activations": activations, "peak_of_a_step": peak, "held": held}


def snapshot(path: Path, call: Callable[[], Any]) -> None:
    """Write each allocation of a call with its Python stack, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
    call()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def ratios(nucsam: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """Speed of nucsam in multiples of a peer's, and memory as a share of the peer's."""
    return {
        "speed": peer["ms"] / nucsam["ms"],
        "speed by CPU time": peer["cpu_s_per_image"] / nucsam["cpu_s_per_image"],
        "saved": nucsam["saved_mib"] / (peer["saved_mib"] or math.nan),
        "peak": nucsam["peak_mib"] / (peer["peak_mib"] or math.nan),
    }


def goals(document: dict[str, Any]) -> dict[str, bool]:
    """The goals for a document's device, size, dtype and batch, and whether they are met."""
    side, on_cpu = document["image_size"], document["device"] == "cpu"
    eager_cpu = on_cpu and not document["compile"]
    least = PIPELINE.get(document["dtype"], {}) if eager_cpu and side == 512 else {}
    met = {}
    for peer in ("plain", "tuned"):
        if peer not in document["ratios"]["encoder"]:
            continue
        encoder, pipeline = (document["ratios"][s][peer] for s in ("encoder", "pipeline"))
        if eager_cpu:
            good = encoder["speed"] >= 1.2 and encoder["saved"] <= 0.75
            met[f"encoder, speed >= 1.2, saved <= 0.75 of {peer}"] = good
        if peer in least:
            good = pipeline["speed"] >= least[peer]
            met[f"pipeline, speed >= {least[peer]:g} of {peer}"] = good
    large = not on_cpu and document["batch"] == 4 and side == 1024
    memory = document["memory_mib"].get("nucsam")
    if large and memory:
        met["nucsam within 6 GiB"] = memory.get("reserved", memory["held"]) <= 6 * 1024
    return met


# ---- the command ----


def show(console: Console, document: dict[str, Any]) -> None:
    about = "{device}, {dtype}, batch {batch}, {image_size} model px (crops of {crop} image px)"
    title, eager = about.format(**document), ""
    if document["compile"]:
        title, eager = f"{title}, torch.compile", " (eager)"
    if document["memory_cap"]:
        title += f", allocator capped at {document['memory_cap']} GiB"
        title += ", standing in for a T4" if document["memory_cap"] == 15 else ""
    ceiling, rows = document["ceiling"]["tflops"], {}
    for stage in STAGES:
        for name, row in document[stage].items():
            rows[f"{stage} {name}"] = {
                "images/s": row["images_per_second"],
                "ms a step": row["ms"],
                "min - max": bench.spread(row),
                "CPU s/image": row["cpu_s_per_image"],
                f"saved MiB{eager}": row["saved_mib"],
                "peak MiB": row["peak_mib"],
                "of matmul": f"{row['tflops_per_s'] / ceiling:.0%}",
                "workers": str(row.get("workers", "")),
            }
    checks = [f"{name} {difference:.1e}" for name, difference in document["checks"].items()]
    caption = f"a large matrix product: {ceiling:.3g} TFLOP/s"
    if checks:
        caption += f"; nucsam and plain differ by at most: {', '.join(checks)}"
    console.print(bench.table(title, rows, caption))
    for name in document["out_of_memory"]:
        console.print(f"{name}: out of memory")
    for stage, peers in document["ratios"].items():
        for name, values in peers.items():
            named = {f"{key}{eager}" if key == "saved" else key: v for key, v in values.items()}
            text = ", ".join(f"{key} {value:.2f}" for key, value in named.items())
            console.print(f"{stage}, against {name}: {text}")
    for goal, met in document["goals"].items():
        console.print(f"goal: {goal}: {'met' if met else 'MISSED'}")
    show_memory_and_time(console, document, eager)


def show_memory_and_time(console: Console, document: dict[str, Any], eager: str) -> None:
    about = f"activations: saved by autograd{eager}; held: weights, optimizer, average and the peak"
    title = "memory of a training step, MiB"
    console.print(bench.table(title, document["memory_mib"], f"{about}, which has the gradients"))
    profile = document["profile_ms_per_image"]
    rows = {
        part: {name: times[part] for name, times in profile.items()}
        for part in next(iter(profile.values()))
    }
    clock = "wall" if document["device"] != "cpu" else "CPU"
    title = f"profile of a step, {clock} ms an image{eager}, no loader workers"
    about = "the peers' loader augments and makes targets; in nucsam the loss includes the targets"
    console.print(bench.table(title, rows, about))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """The options, and the configuration with their crop."""
    parser = bench.parser(__doc__)
    bench.add_config(parser)
    add = parser.add_argument
    add("--steps", type=bench.integer(), default=4, help="counted in a turn of the pipeline")
    loader = "numbers of loader workers to try"
    add("--workers", type=bench.integer(0), nargs="+", default=[0, 2], help=loader)
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    add("--compile", action="store_true", help="torch.compile encoder and head of every way")
    cap = "15 = a T4; 0 = none"
    add("--memory-cap", type=bench.integer(0), default=0, metavar="GIB", help=cap)
    about = "write the allocations of a step of the first way, for pytorch.org/memory_viz"
    add("--snapshot", type=bench.new_file, help=about)
    args = bench.parse(parser, arguments)
    trained, expected = (args.config.model.train, args.config.model.head), ("lora", "instance")
    if trained != expected:
        parser.error(f"--config: found model.train, model.head = {trained}, expected {expected}")
    if args.device == "cpu" and (args.memory_cap or args.snapshot):
        parser.error("--memory-cap, --snapshot: found --device cpu, expected cuda")
    return args, bench.cropped(args.config, args.image_size)


def cap_memory(run: Bench, args: argparse.Namespace) -> None:
    """Cap the allocator at --memory-cap GiB. A GPU with no more has no cap."""
    share = args.memory_cap * 2**30 / torch.cuda.get_device_properties(run.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    if share >= 1:
        args.memory_cap = 0


def load_samples(run: Bench, config: Config) -> Samples:
    """Synthetic images in memory."""
    size = max(SIDE, window(run.crop, config.augment))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "data", images=max(run.batch, IMAGES), size=size, seed=0)
        return Samples(find_records(Path(folder) / "data"))


def main(arguments: Sequence[str] | None = None) -> None:
    args, config = parse(arguments)
    run, console = Bench(args, config), Console(width=120)
    if args.memory_cap:
        cap_memory(run, args)
    samples = load_samples(run, config)
    crops = Crops(samples, window=run.crop, seed=0)
    batch = default_collate([crops[0, i] for i in range(args.batch)])
    images, labels = batch["image"].float(), batch["label"]
    images = nn.functional.interpolate(images, (args.image_size, args.image_size), mode="bilinear")
    base = random_base(images)
    images = images.to(run.device).contiguous()  # NCHW, as loaders give it

    ways = build(base, samples, config, run.device, args.ways)
    if not peft and set(PEERS) & set(args.ways):
        console.print(f"{', '.join(PEERS)}: skipped, peft is not installed")
    built = list(ways)
    checks = {}
    if {"nucsam", "plain"} <= ways.keys():
        checks = check(run, ways["nucsam"], ways["plain"], images[:1], labels[:1])
    alone = those_that_fit(ways, lambda way: trial(run, way, images, labels, args.compile))
    if not ways:
        raise SystemExit(f"none of {', '.join(args.ways)} is installed and fits the device memory")
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stages = measure(run, ways, alone, images, args.workers)
    if run.cuda and len(built) == 1:
        alone[built[0]]["memory"]["reserved"] = torch.cuda.max_memory_reserved() / 2**20
    if args.snapshot:
        way = next(iter(ways.values()))
        snapshot(args.snapshot, partial(run.step, way, run.loaded(way)))
    peers = [name for name in ways if name != "nucsam"] if "nucsam" in ways else []
    document = {
        "benchmark": "train_step",
        **bench.options(args),
        "crop": run.crop,
        **run.about(["peft"] if peft else []),
        "ceiling": run.ceiling(),
        **stages,
        "checks": checks,
        "profile_ms_per_image": {name: numbers["profile"] for name, numbers in alone.items()},
        "memory_mib": {name: numbers["memory"] for name, numbers in alone.items()},
        "out_of_memory": [name for name in built if name not in ways],
        "trained": {name: sum(p.numel() for p in way.weights) for name, way in ways.items()},
        "ratios": {
            stage: {name: ratios(rows["nucsam"], rows[name]) for name in peers}
            for stage, rows in stages.items()
        },
    }
    document["goals"] = goals(document)
    show(console, document)
    bench.finish(document, args.json)


def build(
    base: Base, samples: Samples, config: Config, device: torch.device, names: Sequence[str]
) -> dict[str, Way]:
    """The ways `names`; those that need peft only where it is installed."""
    nucsam = ours(base, samples, config, device)
    full = replace(config, model=replace(config.model, train="full"))
    makers: dict[str, Callable[[], Way]] = {"nucsam": lambda: nucsam}
    if peft:
        for name, layout in (("plain", torch.contiguous_format), ("tuned", torch.channels_last)):
            makers[name] = partial(plain, base, samples, config, device, nucsam, layout)
        makers["report"] = lambda: report(base, samples, config, device)
    makers["full"] = lambda: ours(base, samples, full, device)
    return {name: make() for name, make in makers.items() if name in names}


if __name__ == "__main__":
    main()
