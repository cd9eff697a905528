"""Losses on dense maps. Each returns one value per image, (B,), over that image's counted pixels.

The training loss is their mean over images, so that N processes equal one process with the N-fold batch. An image
without counted pixels has loss 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BCHW: Tensor, classes_BHW: Tensor, counted_BHW: Tensor, weights_C: Tensor) -> Tensor:
    """Class-weighted cross-entropy; a pixel's weight is its true class's."""
    pixel = F.cross_entropy(logits_BCHW, classes_BHW, reduction="none")
    return _mean(pixel, weights_C[classes_BHW] * counted_BHW)


def binary_cross_entropy(logits_BHW: Tensor, foreground_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Cross-entropy of one foreground logit."""
    pixel = F.binary_cross_entropy_with_logits(logits_BHW, foreground_BHW.float(), reduction="none")
    return _mean(pixel, counted_BHW.float())


def dice(probability_BHW: Tensor, foreground_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """1 - soft Dice with one pixel of smoothing (Milletari 2016)."""
    p, t = probability_BHW * counted_BHW, (foreground_BHW & counted_BHW).float()
    return 1 - (2 * _sum(p * t) + 1) / (_sum(p) + _sum(t) + 1)


def focal_tversky(
    probability_BHW: Tensor,
    foreground_BHW: Tensor,
    counted_BHW: Tensor,
    alpha: float = 0.7,
    beta: float = 0.3,
    gamma: float = 0.75,
) -> Tensor:
    """(1 - Tversky)^gamma, misses weighted by alpha, false pixels by beta (Abraham and Khan 2019, CellViT's values)."""
    p, t = probability_BHW * counted_BHW, (foreground_BHW & counted_BHW).float()
    hit = _sum(p * t)
    tversky = (hit + 1) / (hit + alpha * _sum(t - p * t) + beta * _sum(p - p * t) + 1)
    return (1 - tversky).clamp(min=1e-6) ** gamma  # the power has no gradient at 0


def absolute(maps_BHW: Tensor, targets_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    """Absolute error, mean over pixels by their weights; a weight of 0 does not count."""
    return _mean((maps_BHW - targets_BHW).abs(), weights_BHW)


def _mean(pixel_BHW: Tensor, weight_BHW: Tensor) -> Tensor:
    return _sum(pixel_BHW * weight_BHW) / _sum(weight_BHW).clamp(min=1e-6)


def _sum(pixel_BHW: Tensor) -> Tensor:
    return pixel_BHW.flatten(1).sum(1, dtype=torch.float32)
