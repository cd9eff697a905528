"""Heads: from the encoder's features to dense maps, with the loss and the instances of those maps.

Every head has `loss(maps, labels, counted, n, weights)`, `probabilities(maps)` and
`instances(probabilities, config)`. Maps are (B, C, H, W) logits at the resolution of the image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nucsam.config import Instances, Loss
from nucsam.model import instances, losses, targets
from nucsam.model.encoder import MAPS
from nucsam.model.pixels import Features

NUCLEUS_WEIGHT = 3.0  # of a nucleus pixel in the distance loss; a background pixel has 1

STRIDES = (16, 8, 4, 2, 1)  # of the levels of the instance head, down to `finest`
EIGHTHS = (8, 6, 4, 2, 1)  # of the width, at those strides
SURE = 0.9  # probability from which `loss.unlabelled` takes a pixel for a nucleus
NEAR = 8  # px; what is sure this close to a label is a tight outline, not a missed nucleus


class Norm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, so that N processes train as one does.

    Unlike `nn.SyncBatchNorm` it runs on CPUs too, and no process waits for its GPU. Every process
    must hold equally many pixels.

    In eval mode `adapt` is the share, 0..1, that each image's own statistics have in those that it
    is normalized with. Stains that training has not seen shift them (Schneider et al., 2020,
    arXiv 2006.16971).
    """

    adapt = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.num_batches_tracked = None  # only a cumulative average would need the count

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.adapt and not self.training:
            return self._adapted(x)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        y, mean, variance = _SharedNorm.apply(x, self.weight, self.bias, self.eps)
        count = dist.get_world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return y

    def _adapted(self, x: Tensor) -> Tensor:
        wide = x.float()
        variances, means = torch.var_mean(wide, dim=(2, 3), correction=0)  # (B, C)
        variances = torch.lerp(self.running_var, variances, self.adapt)
        means = torch.lerp(self.running_mean, means, self.adapt)
        slopes = self.weight * (variances + self.eps).rsqrt()
        shifts = self.bias - means * slopes
        y = torch.addcmul(shifts[:, :, None, None], wide, slopes[:, :, None, None])
        return y.to(x.dtype)


class _SharedNorm(torch.autograd.Function):
    """BatchNorm with the statistics of all processes, by PyTorch's fused kernels.

    Each process computes the gradients of weight and bias over its own pixels, as for every other
    layer. The gradient of x needs their sums over all processes.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs_P2C = weight.new_zeros(dist.get_world_size(), 2, x.shape[1])  # of each of P processes
        pairs_P2C[dist.get_rank()] = torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))
        dist.all_reduce(pairs_P2C)
        means_PC, variances_PC = pairs_P2C.unbind(1)
        mean = means_PC.mean(0)
        variance = variances_PC.mean(0) + (means_PC - mean).square().mean(0)
        y, _, _ = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)
        context.save_for_backward(x, weight, mean, variance)
        context.eps = eps
        context.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(context: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = context.saved_tensors
        # As if mean and variance were constants.
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, context.eps, [True, True, True]
        )
        # What x changes through them: dx -= weight / (deviation · count) · (d_bias + z · d_weight).
        sums_2C = torch.stack([d_bias, d_weight])
        dist.all_reduce(sums_2C)
        deviation = (variance + context.eps).sqrt()
        count = dist.get_world_size() * x.numel() // x.shape[1]
        shift, slope = sums_2C * (weight / (deviation * count))
        slope = slope / deviation
        shift = shift - slope * mean
        shift, slope = (vector.view(-1, 1, 1).to(x.dtype) for vector in (shift, slope))
        return dx.sub_(torch.addcmul(shift, x, slope)), d_weight, d_bias, None


class Block(nn.Sequential):
    """3 x 3 convolution, BatchNorm, ReLU.

    GroupNorm in place of BatchNorm lost 4 AJI on slides from other laboratories.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, Norm(outputs), nn.ReLU(inplace=True))

    def fold(self) -> None:
        """Put the norm into the convolution, in eval mode: equal to rounding, one pass less.

        A norm that adapts to each image stays.
        """
        if self[1].adapt:
            return
        self[0] = fuse_conv_bn_eval(self[0], self[1])
        self[1] = nn.Identity()


class InstanceHead(nn.Module):
    """A small U-Net on the encoder's maps and on a convolution branch of its own.

    The branch sees the image at strides 2, 4 and 8. The encoder's maps at those strides were not
    made for nuclei, and most of the layers before them stay frozen. With `finest` = 1 the branch
    sees the image at stride 1 too; benchmarks/accuracy.md says what that gains and costs.

    Maps (B, 4, H, W): logits of background, inside and boundary (`targets.classes`), and of the
    depth (`targets.depth`).

    Args:
        width: channels at stride 16, a multiple of 32; fewer at the finer strides.
        maps: (stride, channels) of each map of the encoder; strides from 2 to 16.
        finest: stride of the finest level, 1 or 2.
    """

    channels = 4

    def __init__(
        self, width: int = 128, maps: Sequence[tuple[int, int]] = MAPS, finest: int = 2
    ) -> None:
        super().__init__()
        self.strides = [stride for stride, _ in maps]
        self.levels = STRIDES[: STRIDES.index(finest) + 1]
        widths = [width * share // 8 for share in EIGHTHS[: len(self.levels)]]
        self.branch = nn.ModuleList(
            nn.Sequential(Block(a, b, stride=2), Block(b, b))
            for a, b in pairwise((3, *widths[:0:-1]))
        )
        # Of the branch, which has no stage at stride 16, and of the encoder's maps there.
        inputs = [0, *widths[1:]]
        for stride, channels in maps:
            inputs[STRIDES.index(stride)] += channels
        self.lateral = nn.ModuleList(nn.Conv2d(i, w, 1, bias=False) for i, w in zip(inputs, widths))
        self.top_down = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(nn.Sequential(Block(w, w), Block(w, w)) for w in widths)
        if finest == 1:  # most of the pixels, for which one convolution is enough
            self.branch[0] = Block(3, widths[-1])
            self.blocks[-1] = Block(widths[-1], widths[-1])
        self.out = nn.Conv2d(widths[-1], self.channels, 1)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Features of images in model px -> maps (B, 4, *size), image px."""
        image, *maps = features
        x, branch = image, []
        for stage in self.branch:
            x = stage(x)
            branch.append(x)
        levels = {stride: [] for stride in self.levels}
        for stride, x in zip(self.strides, maps, strict=True):
            levels[stride].append(x)
        for stride, x in zip(self.levels[:0:-1], branch, strict=True):
            levels[stride].append(x)
        coarsest, *skips = (
            lateral(torch.cat(parts, dim=1))
            for lateral, parts in zip(self.lateral, levels.values(), strict=True)
        )
        x = self.blocks[0](coarsest)
        for top_down, skip, block in zip(self.top_down, skips, self.blocks[1:], strict=True):
            x = block(skip + F.interpolate(top_down(x), scale_factor=2.0, mode="bilinear"))
        x = self.out(x)
        return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear")

    def loss(
        self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss
    ) -> dict[str, Tensor]:
        """The weighted loss terms of each image.

        Args:
            maps: (B, 4, H, W) of `forward`.
            labels: nucleus ids int (B, H, W), 0 = background.
            counted: bool (B, H, W); the other pixels have no part in the loss.
            n: at least the largest id.
            weights: the section `loss` of the configuration.

        Returns:
            (B,) for each of cross_entropy, tversky and distance, and for lovasz if it has a weight.
        """
        logits = maps[:, :3]
        classes = targets.classes(labels)
        depth = targets.depth(labels, classes, n, counted)
        nucleus = labels > 0
        # The boundary is nucleus too.
        probability = 1 - logits.softmax(1)[:, targets.BACKGROUND]
        class_weights = torch.where(classes == targets.BOUNDARY, weights.boundary, 1.0)
        pixel_weights = torch.where(nucleus, NUCLEUS_WEIGHT, 1.0)
        share = counted
        if weights.unlabelled < 1:
            unlabelled = (probability.detach() > SURE) & ~_near(nucleus, NEAR)
            share = counted * torch.where(unlabelled, weights.unlabelled, 1.0)
        cross_entropy = losses.cross_entropy(
            logits, classes, share * class_weights, focal=weights.focal
        )
        misses, power = weights.tversky_misses, weights.tversky_power
        tversky = losses.focal_tversky(
            probability, nucleus, share, alpha=misses, beta=1 - misses, gamma=power
        )
        distance = losses.absolute(maps[:, 3].sigmoid(), depth, share * pixel_weights)
        terms = {
            "cross_entropy": weights.cross_entropy * cross_entropy,
            "tversky": weights.tversky * tversky,
            "distance": weights.distance * distance,
        }
        if weights.lovasz:
            terms["lovasz"] = weights.lovasz * losses.lovasz(probability, nucleus, share)
        return terms

    def probabilities(self, maps: Tensor) -> Tensor:
        """Maps (B, 4, H, W) of `forward` -> foreground and depth (B, 2, H, W), 0..1."""
        foreground = 1 - maps[:, :3].softmax(1)[:, :1]
        return torch.cat([foreground, maps[:, 3:].sigmoid()], dim=1)

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Probabilities (2, H, W) of one image -> label map int32 (H, W), 0 = background."""
        return instances.from_depth(*maps, config)


def _near(nucleus: Tensor, reach: int) -> Tensor:
    """Where a nucleus (B, H, W) is at most `reach` rows and columns away, bool (B, H, W)."""
    near = nucleus.float()[:, None]
    for across in ((1, 0), (0, 1)):  # two passes take a sixth of the time of a square
        window = [2 * reach * step + 1 for step in across]
        near = F.max_pool2d(near, window, stride=1, padding=[reach * step for step in across])
    return near[:, 0] > 0


class SamHead:
    """MobileSAM's own mask decoder without prompts, split by watershed.

    Maps (B, 1, H, W): one foreground logit. It is no module: the model that owns the two stock
    modules keeps them under their stock names.
    """

    def __init__(self, prompt_encoder: nn.Module, mask_decoder: nn.Module) -> None:
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder

    def __call__(self, embedding: Tensor, size: tuple[int, int]) -> Tensor:
        """Embedding (B, 256, h / 16, w / 16) of images in model px -> maps (B, 1, *size)."""
        position = self.prompt_encoder.pe_layer(tuple(embedding.shape[-2:]))
        logits, _ = self.mask_decoder(
            image_embeddings=embedding,
            image_pe=position[None].to(embedding.dtype),
            sparse_prompt_embeddings=embedding.new_zeros(1, 0, embedding.shape[1]),
            dense_prompt_embeddings=self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1),
            multimask_output=False,
        )
        return F.interpolate(logits, size=size, mode="bilinear")

    def loss(
        self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss
    ) -> dict[str, Tensor]:
        """As `InstanceHead.loss`, with maps (B, 1, H, W) and the terms cross_entropy and dice."""
        logits = maps[:, 0]
        nucleus = labels > 0
        cross_entropy = losses.binary_cross_entropy(logits, nucleus, counted)
        dice = losses.dice(logits.sigmoid(), nucleus, counted)
        return {"cross_entropy": weights.cross_entropy * cross_entropy, "dice": weights.dice * dice}

    def probabilities(self, maps: Tensor) -> Tensor:
        """Maps (B, 1, H, W) -> foreground (B, 1, H, W), 0..1."""
        return maps.sigmoid()

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Probabilities (1, H, W) of one image -> label map int32 (H, W), 0 = background."""
        return instances.from_foreground(*maps, config)
