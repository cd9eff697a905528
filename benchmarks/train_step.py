"""How fast and how large is a training step, beside four other ways to build one?

    pip install peft
    python benchmarks/train_step.py [--device cpu] [--batch 4] [--image-size 512] [--dtype fp32|bf16|fp16]
        [--repeat 7] [--steps 4] [--workers 0 2] [--ways nucsam plain tuned report full] [--config CONFIG.toml]
        [--compile] [--memory-cap 15] [--snapshot FILE] [--threads N] [--json FILE]

encoder: forward and backward of the encoder with LoRA, to its multi-scale features.
step: encoder, head, losses, backward, clipping, AdamW and, in ours, the running average of the weights, on a batch that
    is augmented already. The targets of ours are part of its loss.
pipeline: the step with loader, augmentation and targets, on images of 512 px, or of a crop's window where that is more.
`--image-size` is the side in model px, as the encoder sees it: a crop has image-size / data.scale image px.

nucsam: as nucsam/train.py puts it together, with the library's defaults or those of `--config`.
plain: stock `mobile_sam` with forward hooks, Hugging Face `peft` on the same layers, and augmentation and targets by
    numpy, scipy and scikit-image, nucleus by nucleus, in the loader's workers. It gets the same decoded images,
    crops, head, losses, dtype and optimizer. Both compute the same features, gradients, targets and losses, or nothing
    is timed.
tuned: plain in channels-last memory, images and weights: two lines more, for who knows that they help.
report: the loop of the student report made honest: stock `mobile_sam`, `peft` of rank 4 on all 40 live linear layers
    of the encoder with the gradient through it, the frozen mask decoder without prompts, cross-entropy and Dice on one
    foreground map, no augmentation.
full: nucsam with all of the encoder training.

They take turns, after one to warm up. Times are wall times; CPU s/image adds up all threads and loader workers, which
holds where a machine is shared. A turn of the pipeline counts `--steps` steps of a loader under way: before them each
worker has handed out a batch, after them all are as far ahead as before, and the rest is drained uncounted, so that
nothing is loaded in another's time. By this rule each way also gets the number of `--workers` that is fastest for it.
"of matmul" is the part of a large matrix product's FLOP/s, measured beside it, that the matrix products, convolutions
and attention of a way reach, each with its own operations, the padding of stock windows included: it is the hardware's
utilisation. `saved` is what autograd keeps for the backward pass, `peak` what one call, measured once, takes above what
was there before, `reserved` all that the allocator took in the turns, on a GPU with a single way. With `--compile`,
operations, `saved` and the profile are eager mode's. A way that runs out of device memory is left out.
Prints tables, the bars that are for the device, size, dtype and batch, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy runs in the loader's workers, one a core

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
from typing import Any, NamedTuple

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

from nucsam import losses, model, targets
from nucsam.augment import augment, window
from nucsam.base import Base, load_base
from nucsam.config import Config
from nucsam.data import Crops, EpochBatches, Samples, find_records
from nucsam.encoder import Features
from nucsam.head import NUCLEUS_WEIGHT, TVERSKY, SamHead
from nucsam.lora import LoRALinear
from nucsam.synthetic import write_dataset

try:
    import peft
except ImportError:
    peft = None

SIDE = 512  # px of a synthetic image, as in NuInsSeg, or more for a large window
IMAGES = 16  # that are made, if a batch has no more
LIVE = r"layers\..*\.(attn\.(qkv|proj)|mlp\.fc[12])"  # the 40 linear layers of the encoder that are used
STAGES = ("encoder", "step", "pipeline")
WAYS = ("nucsam", "plain", "tuned", "report", "full")
Truth = dict[str, Any]  # what a way's loss takes beside the maps


@dataclass
class Way:
    """One way to build a training step."""

    encoder: nn.Module  # images (B, 3, H, W), 0..255 -> named tuple of maps
    head: nn.Module  # maps, size -> dense maps (B, C, *size)
    data: Crops
    move: Callable[[dict[str, Tensor]], dict[str, Any]]  # a loader's batch, to the device
    prepare: Callable[[dict[str, Any]], tuple[Tensor, Truth]]  # what was moved -> images, truth
    loss: Callable[..., dict[str, Tensor]]  # dense maps, **truth -> terms of (B,)
    targets: Callable[[Tensor], tuple[Tensor, ...]]  # labels (B, H, W) -> what is learned from them
    averaged: Sequence[Tensor] = ()  # what it keeps a running average of, detached

    def __post_init__(self) -> None:
        self.average = [tensor.clone() for tensor in self.averaged]
        self.weights = [p for part in (self.encoder, self.head) for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4)


def mover(device: torch.device, *names: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda batch: {name: batch[name].to(device, non_blocking=True) for name in names}


# ---- ours, as nucsam/train.py puts it together ----


def ours(base: Base, samples: Samples, config: Config, device: torch.device) -> Way:
    d, t = config.data, config.train
    net = model.build(config.model, base, seed=0, checkpoint=t.checkpoint).to(device).train()

    def move(batch: dict[str, Tensor]) -> dict[str, Any]:
        maps = mover(device, "image", "label", "counted")(batch)
        return maps | {"draws": batch["draws"], "n": int(batch["label"].max())}

    def prepare(batch: dict[str, Any]) -> tuple[Tensor, Truth]:
        maps = batch["image"], batch["label"], batch["counted"], batch["draws"]
        images, labels, counted = augment(*maps, crop=d.crop, scale=d.scale, config=config.augment)
        return images, {"labels": labels, "counted": counted, "n": batch["n"]}

    def loss(maps: Tensor, labels: Tensor, counted: Tensor, n: int) -> dict[str, Tensor]:
        return net.loss(maps, labels, counted, n, config.loss)

    def own_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels.to(device).long()
        classes = targets.classes(labels)
        return classes, targets.depth(labels, classes, int(labels.max()))

    data = Crops(samples, window=window(d.crop, config.augment), seed=0)
    averaged = [tensor.detach() for tensor in net.trainable().values()] if t.ema else ()
    return Way(net.image_encoder, net.head, data, move, prepare, loss, own_targets, averaged)


# ---- the plain way ----


def plain(
    base: Base, samples: Samples, config: Config, device: torch.device, own: Way, layout: torch.memory_format
) -> Way:
    side, m, w = round(config.data.crop * config.data.scale), config.model, config.loss
    adapted = [name for name, part in own.encoder.named_modules() if isinstance(part, LoRALinear)]
    settings = peft.LoraConfig(r=m.rank, lora_alpha=m.alpha, target_modules=adapted)
    encoder = PlainEncoder(base, side, settings, layout).to(device, memory_format=layout)
    head = copy.deepcopy(own.head).to(memory_format=layout)

    def loss(maps: Tensor, classes: Tensor, depth: Tensor, counted: Tensor) -> dict[str, Tensor]:
        classes, nucleus, logits = classes.long(), classes > 0, maps[:, :3]
        class_weights = logits.new_tensor([1.0, 1.0, w.boundary])
        pixel_weights = counted * torch.where(nucleus, NUCLEUS_WEIGHT, 1.0)
        probability = 1 - logits.softmax(1)[:, targets.BACKGROUND]
        return {
            "cross_entropy": w.cross_entropy * losses.cross_entropy(logits, classes, counted, class_weights),
            "tversky": w.tversky * losses.focal_tversky(probability, nucleus, counted, **TVERSKY),
            "distance": w.distance * losses.absolute(maps[:, 3].sigmoid(), depth, pixel_weights),
        }

    def loop_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
        classes, depths = zip(*map(plain_targets, labels.numpy()))
        return torch.from_numpy(np.stack(classes)), torch.from_numpy(np.stack(depths))

    data, move = PlainCrops(samples, config), mover(device, "image", "counted", "classes", "depth")
    return Way(encoder, head, data, move, as_loaded, loss, loop_targets)


def as_loaded(batch: dict[str, Tensor]) -> tuple[Tensor, Truth]:
    """All was done in the loader."""
    return batch.pop("image").float(), batch


class PlainEncoder(nn.Module):
    """Stock TinyViT at one image size, BatchNorms in eval mode; hooks take what goes into each down-sampling."""

    def __init__(self, base: Base, side: int, settings: Any, layout: torch.memory_format) -> None:
        super().__init__()
        sam = stock_sam(base, side)
        self.vit, self.maps, self.layout = sam.image_encoder, [], layout
        self.register_buffer("mean", sam.pixel_mean)
        self.register_buffer("std", sam.pixel_std)
        for stage, scale in zip((self.vit.patch_embed.seq[1], *self.vit.layers), (2, 4, 8, 16, 16)):
            last = stage if scale == 2 else stage.blocks[-1]
            last.register_forward_hook(lambda _, __, x, s=side // scale: self._keep(x, s))
        peft.inject_adapter_in_model(settings, self.vit)
        train_pinned(self)

    def _keep(self, x: Tensor, side: int) -> None:
        self.maps.append(x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (side, side)))

    def forward(self, images: Tensor) -> Features:
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        x = self.vit.patch_embed(images)
        for layer in self.vit.layers:  # the neck, with its view(B, 64, 64, C), is for SAM's decoder, not for this head
            x = layer(x)
        features = Features(images, *self.maps)
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
        classes, depth = plain_targets(label)
        image = np.asarray(image).transpose(2, 0, 1)
        arrays = {"image": image, "counted": counted > 0, "classes": classes, "depth": depth}
        return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def plain_targets(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `nucsam.targets` says of one label map, nucleus by nucleus."""
    classes = (label > 0).astype(np.uint8)
    classes[find_boundaries(label, connectivity=2, mode="inner")] = targets.BOUNDARY
    depth = np.zeros(label.shape, np.float32)
    for number, box in enumerate(find_objects(label), 1):
        if box is None:
            continue
        mask = label[box] == number
        deep = distance_transform_edt(mask & (classes[box] == targets.INSIDE))[mask]
        deep = 1 + np.minimum(deep, targets.REACH)
        depth[box][mask] = deep / deep.max()
    return classes, depth


def train_pinned(net: nn.Module) -> None:
    """Training mode, with BatchNorms as in the base."""
    net.train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


# ---- the report's way ----


class Embedding(NamedTuple):
    neck: Tensor  # (B, 256, H/16, W/16)


class ReportEncoder(nn.Module):
    """Stock TinyViT with its neck, LoRA on every linear layer that is used."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam = sam
        settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=LIVE)
        peft.inject_adapter_in_model(settings, self.sam.image_encoder)
        train_pinned(self)

    def forward(self, images: Tensor) -> Embedding:
        return Embedding(embed(self.sam, images))


class ReportHead(nn.Module):
    """The stock mask decoder, frozen, without prompts: one foreground map."""

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(self, embedding: Embedding, size: tuple[int, int]) -> Tensor:
        return SamHead(self.prompt_encoder, self.mask_decoder)(embedding.neck, size)


class ReportCrops(Crops):
    """Crops as they are, resized by Pillow, and a mask of the nuclei."""

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
    del sam.prompt_encoder, sam.mask_decoder  # the head's now

    def loss(maps: Tensor, mask: Tensor) -> dict[str, Tensor]:
        logits, nucleus, counted = maps[:, 0], mask > 0, torch.ones_like(mask, dtype=torch.bool)
        return {
            "cross_entropy": losses.binary_cross_entropy(logits, nucleus, counted),
            "dice": losses.dice(logits.sigmoid(), nucleus, counted),
        }

    data, move = ReportCrops(samples, config), mover(device, "image", "mask")
    encoder = ReportEncoder(sam).to(device)
    return Way(encoder, head.to(device), data, move, as_loaded, loss, lambda labels: (labels > 0,))


# ---- steps, and what they cost ----


class Bench(bench.Machine):
    """Where and how steps run, and what they cost."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        super().__init__(args)
        self.crop, self.batch, self.steps, self.repeat = config.data.crop, args.batch, args.steps, args.repeat
        # So small that no gradient overflows, which would skip an optimizer step.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=256.0, enabled=args.dtype == "fp16")

    def encode(self, way: Way, images: Tensor) -> Any:
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
        if way.average:
            torch._foreach_lerp_(way.average, way.averaged, 0.01)

    def train(self, way: Way, images: Tensor, truth: Truth) -> None:
        self.scaler.scale(self.forward(way, images, truth)).backward()
        self.update(way)

    def step(self, way: Way, batch: dict[str, Tensor]) -> None:
        self.train(way, *way.prepare(way.move(batch)))

    def prepared_step(self, way: Way, batch: dict[str, Tensor]) -> None:
        """A turn that counts what follows the augmentation."""
        inputs = way.prepare(way.move(batch))
        self.start()
        self.train(way, *inputs)

    def epoch(self, way: Way, loader: DataLoader, number: int) -> None:
        """A turn that counts `steps` steps of a loader that is under way, and drains it."""
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
        how = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": self.cuda}
        return DataLoader(way.data, batch_sampler=batches, **how)

    def loaded(self, way: Way, epoch: int = 0) -> dict[str, Tensor]:
        """A batch, on a GPU pinned as the loader's are."""
        batch = default_collate([way.data[epoch, i] for i in range(self.batch)])
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.cuda else batch

    def rows(self, calls: dict[str, Callable[[int], Any]], steps: int, repeat: int) -> dict[str, dict[str, float]]:
        """What a step takes in calls of `steps` steps, in turns."""
        rows = self.turns(calls, repeat, steps=steps)
        for row in rows.values():
            row["images_per_second"] = 1e3 * self.batch / row["ms"]
            row["cpu_s_per_image"] = 1e-3 * row.pop("cpu_ms") / self.batch
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

    def profile(self, way: Way, labels: Tensor, number: int) -> dict[str, float]:
        """Milliseconds an image of each part of one step, without loader workers: CPU time, on a GPU wall time."""
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
        # Stays so where nothing is frozen: nucsam reads the weights of its stem without calling the modules.
        moments["encoder, frozen part"] = moments["targets"]
        hook = first_trained(way.encoder).register_forward_pre_hook(at_first_trained)
        with self.cast():
            features = way.encoder(images)
        hook.remove()
        mark("encoder, adapted part")
        leaves = type(features)(*(f.detach().requires_grad_(f.requires_grad) for f in features))
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
    """The first module, in the order of an encoder's forward pass, with a weight of its own that trains."""
    return next(part for part in net.modules() if any(p.requires_grad for p in part.parameters(recurse=False)))


def random_base(images: Tensor) -> Base:
    """A random base whose BatchNorms and attention biases are not the zeros and ones that would hide mistakes."""
    base, generator = load_base("none"), torch.Generator().manual_seed(0)
    state = dict(base.state)
    for name, tensor in state.items():
        if name.startswith("image_encoder.") and name.endswith((".bn.weight", ".bn.bias", ".attention_biases")):
            state[name] = torch.rand(tensor.shape, generator=generator) + (0.5 if name.endswith("weight") else -0.5)
    return model.calibrated(replace(base, state=state), images)


def check(run: Bench, own: Way, peer: Way, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Largest differences between the two where there must be none, in fp32; one over its bound ends the program."""
    adapters = [[p for p in way.encoder.parameters() if p.requires_grad] for way in (own, peer)]
    with torch.no_grad():
        for a, b in zip(*adapters, strict=True):
            b.copy_(a.normal_(std=0.02))  # B begins at zero
    dtype, tf32 = run.dtype, torch.backends.cudnn.allow_tf32
    run.dtype, torch.backends.cudnn.allow_tf32 = torch.float32, False
    features = [run.encode(way, images) for way in (own, peer)]
    run.dtype, torch.backends.cudnn.allow_tf32 = dtype, tf32
    made, looped = (way.targets(labels) for way in (own, peer))
    maps, counted = torch.randn(len(labels), own.head.channels, run.crop, run.crop), torch.rand(labels.shape) < 0.9
    maps, counted, labels, *truth = (t.to(run.device) for t in (maps, counted, labels.long(), *looped))
    terms = own.loss(maps, labels, counted, int(labels.max())), peer.loss(maps, *truth, counted)

    def apart(a: Tensor, b: Tensor) -> float:
        return (a.detach().cpu().float() - b.detach().cpu().float()).abs().max().item()

    found = {
        "features": (max(map(apart, *features)), 1e-3),
        "gradients": (max(apart(a.grad, b.grad) / b.grad.abs().max().item() for a, b in zip(*adapters)), 1e-2),
        "classes": (apart(made[0], looped[0]), 0.0),
        "depth": (apart(made[1], looped[1]), 1e-4),
        "loss": (max(apart(terms[0][name], terms[1][name]) for name in terms[0]), 1e-4),
    }
    for way in (own, peer):
        way.optimizer.zero_grad()
    if wrong := [f"{name} {d:.2g}, expected at most {most:g}" for name, (d, most) in found.items() if not d <= most]:
        raise SystemExit("the two do not compute the same, so nothing is timed: " + "; ".join(wrong))
    return {name: d for name, (d, _) in found.items()}


def trial(run: Bench, way: Way, images: Tensor, labels: Tensor, compiled: bool) -> dict[str, dict[str, float]]:
    """{stage, "profile" or "memory": numbers} of a way: all that takes no turns, and so all that it allocates."""
    batch = run.loaded(way)
    inputs = way.prepare(way.move(batch))
    calls = {
        "encoder": partial(run.encode, way, images),
        "step": partial(run.train, way, *inputs),
        "pipeline": partial(run.step, way, batch),
    }
    saved = {"encoder": run.saved_mib(way, partial(way.encoder, images))}
    saved["step"] = saved["pipeline"] = run.saved_mib(way, partial(run.forward, way, *inputs))
    found = {stage: {"saved_mib": saved[stage], "flops": bench.flops(call)} for stage, call in calls.items()}
    _, *parts = (run.profile(way, labels, number) for number in range(run.repeat + 1))
    found["profile"] = {part: statistics.median(p[part] for p in parts) for part in parts[0]}
    if compiled:
        way.encoder, way.head = torch.compile(way.encoder), torch.compile(way.head)
    for stage, call in calls.items():
        call()  # which compiles
        found[stage]["peak_mib"] = run.peak_mib(call)
    found["memory"] = split(way, saved["step"], found["pipeline"]["peak_mib"])
    return found


def those_that_fit(ways: dict[str, Way], trial: Callable[[Way], Any]) -> dict[str, Any]:
    """What a trial of each way finds. One that runs out of device memory leaves `ways`, and frees what it holds."""
    found = {}
    for name in list(ways):
        try:
            found[name] = trial(ways[name])
        except torch.OutOfMemoryError:
            del ways[name]
        if name not in ways:  # not above, where the error's traceback still holds the activations
            gc.collect()
            torch.cuda.empty_cache()
    return found


def measure(run: Bench, ways: dict[str, Way], alone: dict[str, Any], images: Tensor, workers: list[int]) -> dict:
    """{stage: {way: numbers}}: what a step takes, in turns, with what is known of each alone."""
    batches = {name: run.loaded(way) for name, way in ways.items()}
    encode = {name: lambda _, w=way: run.encode(w, images) for name, way in ways.items()}
    step = {name: lambda _, w=way, b=batches[name]: run.prepared_step(w, b) for name, way in ways.items()}
    found = {"encoder": run.rows(encode, 1, run.repeat), "step": run.rows(step, 1, run.repeat)}
    found["pipeline"] = pipeline(run, ways, workers)
    for stage, rows in found.items():
        for name, row in rows.items():
            row |= alone[name][stage]
            row["tflops_per_s"] = 1e-9 * row["flops"] / row["ms"]
    return found


def pipeline(run: Bench, ways: dict[str, Way], workers: list[int]) -> dict[str, dict]:
    """Each way's pipeline, with the number of loader workers that is fastest for it."""
    calls, chosen = {}, {}
    for name, way in ways.items():
        loaders = {n: run.loader(way, n) for n in workers}
        tried = {n: (lambda i, w=way, x=loader: run.epoch(w, x, i)) for n, loader in loaders.items()}
        taken = run.rows(tried, run.steps, 1) if len(tried) > 1 else {n: {"ms": 0.0} for n in tried}
        chosen[name] = min(taken, key=lambda n: taken[n]["ms"])
        calls[name] = tried.pop(chosen[name])
        del loaders, tried  # ends their workers
    rows = run.rows(calls, run.steps, run.repeat)
    return {name: row | {"workers": chosen[name]} for name, row in rows.items()}


def split(way: Way, activations: float, peak: float) -> dict[str, float]:
    """What a way's memory is for, MiB; what it holds at most is all but the gradients, and the peak, which has them."""
    tensors = {
        "weights": [t for part in (way.encoder, way.head) for t in (*part.parameters(), *part.buffers())],
        "gradients": way.weights,  # of their size
        "optimizer": [t for state in way.optimizer.state.values() for t in state.values()],
        "average": way.average,
    }
    found = {name: sum(t.nbytes for t in of) / 2**20 for name, of in tensors.items()}
    held = sum(found.values()) - found["gradients"] + peak
    return found | {"activations": activations, "peak_of_a_step": peak, "held": held}


def snapshot(path: Path, call: Callable[[], Any]) -> None:
    """Each allocation of a call with the Python lines that made it, to open at pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
    call()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def ratios(own: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """How many times another way's speed, how much of its memory."""
    speed = {"speed": peer["ms"] / own["ms"], "speed by CPU time": peer["cpu_s_per_image"] / own["cpu_s_per_image"]}
    return speed | {name: own[f"{name}_mib"] / (peer[f"{name}_mib"] or math.nan) for name in ("saved", "peak")}


def bars(d: dict[str, Any]) -> dict[str, bool]:
    """Those that are for a document's device, size, dtype and batch, and whether they are met."""
    cpu, own, met = d["device"] == "cpu", d["memory_mib"].get("nucsam"), {}
    large = not cpu and d["batch"] == 4 and d["image_size"] == 1024
    least = 1.5 if cpu and d["image_size"] == 512 else 3.0 if large and d["dtype"] == "fp16" else None
    for peer in (name for name in ("plain", "tuned") if name in d["ratios"]["encoder"]):
        encoder, whole = (d["ratios"][stage][peer] for stage in ("encoder", "pipeline"))
        if cpu and not d["compile"]:
            good = encoder["speed"] >= 1.2 and encoder["saved"] <= 0.75
            met[f"encoder, speed >= 1.2, saved <= 0.75 of {peer}"] = good
        if least:
            met[f"pipeline, speed >= {least:g} of {peer}"] = whole["speed"] >= least
    if large and own:
        met["nucsam within 6 GiB"] = own.get("reserved", own["held"]) <= 6 * 1024
    return met


def show(console: Console, document: dict[str, Any]) -> None:
    title = "{device}, {dtype}, batch {batch}, {image_size} model px (crops of {crop} image px)".format(**document)
    title, eager = (f"{title}, torch.compile", " (eager)") if document["compile"] else (title, "")
    if document["memory_cap"]:
        title += f", allocator capped at {document['memory_cap']} GiB"
        title += ", standing in for a T4" if document["memory_cap"] == 15 else ""
    ceiling, rows = document["ceiling"]["tflops"], {}
    for stage in STAGES:
        for name, r in document[stage].items():
            rows[f"{stage} {name}"] = {
                "images/s": r["images_per_second"],
                "ms a step": r["ms"],
                "min - max": bench.spread(r),
                "CPU s/image": r["cpu_s_per_image"],
                f"saved MiB{eager}": r["saved_mib"],
                "peak MiB": r["peak_mib"],
                "of matmul": f"{r['tflops_per_s'] / ceiling:.0%}",
                "workers": str(r.get("workers", "")),
            }
    checks = ", ".join(f"{name} {difference:.1e}" for name, difference in document["checks"].items())
    caption = f"a large matrix product: {ceiling:.3g} TFLOP/s"
    caption += f"; nucsam and plain differ by at most: {checks}" if checks else ""
    console.print(bench.table(title, rows, caption))
    for name in document["out_of_memory"]:
        console.print(f"{name}: out of memory")
    for stage, found in document["ratios"].items():
        for name, of in found.items():
            said = ", ".join(f"{key}{eager if key == 'saved' else ''} {value:.2f}" for key, value in of.items())
            console.print(f"{stage}, against {name}: {said}")
    for bar, met in document["bars"].items():
        console.print(f"bar: {bar}: {'met' if met else 'MISSED'}")
    about = f"activations: what autograd saves{eager}; held: weights, optimizer, average and the peak, gradients in it"
    console.print(bench.table("memory of a training step, MiB", document["memory_mib"], about))
    profile = document["profile_ms_per_image"]
    parts = {part: {name: of[part] for name, of in profile.items()} for part in next(iter(profile.values()))}
    clock = "wall" if document["device"] != "cpu" else "CPU"
    about = f"{clock} ms an image{eager}, no loader workers; the peers' loader makes augmentation and targets"
    console.print(bench.table(f"where a step's time goes: {about}; targets are part of the loss too", parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--steps", type=bench.integer(), default=4, help="that a turn of the pipeline counts")
    parser.add_argument("--workers", type=bench.integer(0), nargs="+", default=[0, 2], help="of the loader, to try")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    bench.add_config(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile encoder and head of every way")
    parser.add_argument("--memory-cap", type=bench.integer(0), default=0, metavar="GIB", help="15 = a T4; 0 = none")
    about = "write the allocations of a step of the first way here, with Python stacks, for pytorch.org/memory_viz"
    parser.add_argument("--snapshot", type=bench.new_file, help=about)
    args = bench.parse(parser, arguments)
    config = bench.cropped(args.config, args.image_size)
    if (found := (config.model.train, config.model.head)) != (expected := ("lora", "instance")):
        parser.error(f"--config: found model.train, model.head = {found}, expected {expected}")
    run, console = Bench(args, config), Console(width=120)
    if not run.cuda and (args.memory_cap or args.snapshot):
        parser.error("--memory-cap, --snapshot: found --device cpu, but these are of a GPU's allocator; expected cuda")
    if args.memory_cap:
        part = args.memory_cap * 2**30 / torch.cuda.get_device_properties(run.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(part, 1.0))
        args.memory_cap *= part < 1  # a GPU that has no more, such as a T4, is as it is
    with tempfile.TemporaryDirectory() as folder:
        size = max(SIDE, window(run.crop, config.augment))
        write_dataset(Path(folder) / "data", images=max(args.batch, IMAGES), size=size, seed=0)
        samples = Samples(find_records(Path(folder) / "data"), progress=False)
    crops = Crops(samples, window=run.crop, seed=0)
    batch = default_collate([crops[0, i] for i in range(args.batch)])
    images, labels = batch["image"].float(), batch["label"]
    images = nn.functional.interpolate(images, (args.image_size, args.image_size), mode="bilinear")
    base = random_base(images)
    images = images.to(run.device).contiguous()  # NCHW, as loaders give it

    ways = build(base, samples, config, run.device, args.ways)
    if not peft and {"plain", "tuned", "report"} & set(args.ways):
        console.print("plain, tuned, report: skipped, peft is not installed")
    built, both = list(ways), {"nucsam", "plain"} <= ways.keys()
    checks = check(run, ways["nucsam"], ways["plain"], images[:1], labels[:1]) if both else {}
    alone = those_that_fit(ways, lambda way: trial(run, way, images, labels, args.compile))
    if not ways:
        raise SystemExit(f"found none of {', '.join(args.ways)} that is installed and fits in the memory of the device")
    if run.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = measure(run, ways, alone, images, args.workers)
    if run.cuda and len(built) == 1:
        alone[built[0]]["memory"]["reserved"] = torch.cuda.max_memory_reserved() / 2**20
    if args.snapshot:
        way = next(iter(ways.values()))
        snapshot(args.snapshot, partial(run.step, way, run.loaded(way)))
    peers = [name for name in ways if name != "nucsam"] if "nucsam" in ways else []
    document = {"benchmark": "train_step", **bench.asked(args), "crop": run.crop}
    document |= {**run.about(["peft"] if peft else []), "ceiling": run.ceiling(), **found, "checks": checks}
    document |= {
        "profile_ms_per_image": {name: of["profile"] for name, of in alone.items()},
        "memory_mib": {name: of["memory"] for name, of in alone.items()},
        "out_of_memory": [name for name in built if name not in ways],
        "trained": {name: sum(p.numel() for p in way.weights) for name, way in ways.items()},
        "ratios": {s: {name: ratios(found[s]["nucsam"], found[s][name]) for name in peers} for s in STAGES},
    }
    document["bars"] = bars(document)
    show(console, document)
    bench.finish(document, args.json)


def build(base: Base, samples: Samples, config: Config, device: torch.device, wanted: Sequence[str]) -> dict[str, Way]:
    """The ways wanted that can be built; the plain one has a copy of nucsam's head."""
    own, full = ours(base, samples, config, device), replace(config, model=replace(config.model, train="full"))
    makers: dict[str, Callable[[], Way]] = {"nucsam": lambda: own}
    if peft:
        for name, layout in (("plain", torch.contiguous_format), ("tuned", torch.channels_last)):
            makers[name] = partial(plain, base, samples, config, device, own, layout)
        makers["report"] = lambda: report(base, samples, config, device)
    makers["full"] = lambda: ours(base, samples, full, device)
    return {name: make() for name, make in makers.items() if name in wanted}


if __name__ == "__main__":
    main()
