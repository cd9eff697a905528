"""Heads: encoder features -> dense maps, with the loss and the instance step that belong to the maps.

A head has `loss(maps, labels, counted, n, weights) -> {name: (B,)}` and `instances(maps, config) -> label map`.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nucsam import instances, losses, targets
from nucsam.config import Instances, Loss

NUCLEUS_WEIGHT = 3.0  # of a nucleus pixel in the distance loss, 1 for background
TVERSKY = {"alpha": 0.5, "beta": 0.5}  # misses as bad as false pixels: at CellViT's 0.7 and 0.3 crowded nuclei swell


class Norm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes together, so that several train as one does.

    Without the count of batches, which only a cumulative average would need.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        y, count = x.float(), dist.get_world_size() * x.numel() // x.shape[1]
        own = torch.stack(torch.var_mean(y, (0, 2, 3), correction=0))
        before, after = dist.get_rank(), dist.get_world_size() - 1 - dist.get_rank()
        parts = torch.cat([own.new_zeros(before, *own.shape), own[None], own.new_zeros(after, *own.shape)])
        variances, means = _Sum.apply(parts).unbind(1)  # of all processes, of as many pixels each, in one exchange
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((y - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over processes, of the values forward and of the gradients backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(_, gradient.contiguous())


class Block(nn.Sequential):
    """3 x 3 convolution, BatchNorm, ReLU. A norm of each image's own (GroupNorm) lost 4 AJI on slides never seen."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, Norm(outputs), nn.ReLU(inplace=True))

    def fold(self) -> None:
        """Put the norm into the convolution, in eval mode: the same to rounding, without a pass over the maps."""
        self[0], self[1] = fuse_conv_bn_eval(self[0], self[1]), nn.Identity()


class InstanceHead(nn.Module):
    """A small U-Net whose way down meets the encoder's maps, to maps of three classes and of depth.

    The way down is a convolution branch of the head's own that sees the image, at strides 1, 2, 4 and 8: what the
    encoder keeps there was not made for nuclei and mostly does not train.

    Maps (B, 4, H, W) at image resolution, all logits: background, inside, boundary; depth (`targets.depth`).
    """

    channels = 4

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        widths = (width, width * 3 // 4, width // 2, width // 4, width // 8)  # at strides 16, 8, 4, 2, 1
        self.stem = Block(3, widths[4])
        self.branch = nn.ModuleList(
            nn.Sequential(Block(a, b, stride=2), Block(b, b)) for a, b in pairwise(widths[:0:-1])
        )
        inputs = (160 + 320, 128 + widths[1], 64 + widths[2], 32 + widths[3], widths[4])
        self.lateral = nn.ModuleList(nn.Conv2d(i, w, 1, bias=False) for i, w in zip(inputs, widths))
        self.top_down = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(nn.Sequential(Block(w, w), Block(w, w)) for w in widths[:4])
        self.blocks.append(Block(widths[4], widths[4]))
        self.out = nn.Conv2d(widths[4], self.channels, 1)

    def forward(self, features, size: tuple[int, int]) -> Tensor:
        """Features of B x 3 x h x w model px -> maps (B, 4, *size)."""
        own = [self.stem(features.image)]
        for stage in self.branch:
            own.append(stage(own[-1]))
        maps = (
            (features.s16, features.s16b),
            (features.s8, own[3]),
            (features.s4, own[2]),
            (features.s2, own[1]),
            (own[0],),
        )
        first, *skips = (layer(torch.cat(pair, dim=1)) for layer, pair in zip(self.lateral, maps, strict=True))
        x = self.blocks[0](first)
        for down, skip, block in zip(self.top_down, skips, self.blocks[1:], strict=True):
            x = block(skip + F.interpolate(down(x), scale_factor=2.0, mode="bilinear"))
        x = self.out(x)
        return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear")

    def loss(self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss) -> dict[str, Tensor]:
        """Weighted loss terms, each (B,), of maps (B, 4, H, W) on label maps (B, H, W) with ids up to n."""
        logits = maps[:, :3]
        classes, nucleus = targets.classes(labels), labels > 0
        probability = 1 - logits.softmax(1)[:, targets.BACKGROUND]
        pixel_weights = torch.where(nucleus, NUCLEUS_WEIGHT, 1.0)
        class_weights = logits.new_tensor([1.0, 1.0, weights.boundary])
        depth = targets.depth(labels, classes, n)
        return {
            "cross_entropy": weights.cross_entropy * losses.cross_entropy(logits, classes, counted, class_weights),
            "tversky": weights.tversky * losses.focal_tversky(probability, nucleus, counted, **TVERSKY),
            "distance": weights.distance * losses.absolute(maps[:, 3].sigmoid(), depth, counted * pixel_weights),
        }

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Maps (4, H, W) of one image -> label map int32 (H, W), 0 = background."""
        foreground = expit(np.logaddexp(maps[1], maps[2]) - maps[0])
        return instances.from_depth(
            foreground,
            expit(maps[3]),
            threshold=config.foreground,
            rise=config.seed_rise,
            confidence=config.confidence,
            area=config.area,
        )


class SamHead:
    """MobileSAM's own mask decoder without prompts: one foreground logit (B, 1, H, W), split by watershed.

    No module of its own: the model that owns the two stock modules keeps them under their stock names.
    """

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder

    def __call__(self, embedding: Tensor, size: tuple[int, int]) -> Tensor:
        """Embedding (B, 256, h / 16, w / 16) -> maps (B, 1, *size)."""
        side = tuple(embedding.shape[-2:])
        position = self.prompt_encoder.pe_layer(side)[None].to(embedding.dtype)
        sparse = embedding.new_zeros(1, 0, embedding.shape[1])
        dense = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        logits, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return F.interpolate(logits, size=size, mode="bilinear")

    def loss(self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss) -> dict[str, Tensor]:
        """Weighted loss terms, each (B,): Dice and cross-entropy on the foreground."""
        logits, nucleus = maps[:, 0], labels > 0
        return {
            "cross_entropy": weights.cross_entropy * losses.binary_cross_entropy(logits, nucleus, counted),
            "dice": weights.dice * losses.dice(logits.sigmoid(), nucleus, counted),
        }

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Maps (1, H, W) of one image -> label map int32 (H, W), 0 = background."""
        return instances.from_foreground(
            expit(maps[0]), threshold=config.foreground, confidence=config.confidence, area=config.area
        )
