"""Losses on dense maps. Each returns one value per image, (B,), over that image's counted pixels.

The training loss is the mean over images, so N processes equal one process with the N-fold batch.
An image without counted pixels has loss 0.

Shape suffixes: B images, C classes, H W rows and columns, N pixels of an image in some order.
Probabilities are 0..1; foreground and counted maps are bool, unless it says otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits_BCHW: Tensor, classes_BHW: Tensor, weights_BHW: Tensor, *, focal: float = 0.0
) -> Tensor:
    """Cross entropy, mean over pixels by weight; a pixel of weight 0 does not count.

    Args:
        logits_BCHW, classes_BHW: of each class, and the true one.
        weights_BHW: of each pixel, at least 0.
        focal: power of 1 - probability of the true class that each pixel's loss is multiplied by
            (focal loss; Lin et al., 2017); 0 is plain cross entropy.
    """
    loss_BHW = F.cross_entropy(logits_BCHW, classes_BHW, reduction="none")
    if focal:
        # A power below 1 has no gradient at 0.
        loss_BHW = loss_BHW * (-torch.expm1(-loss_BHW)).clamp(min=1e-6) ** focal
    return _mean(loss_BHW, weights_BHW)


def binary_cross_entropy(logits_BHW: Tensor, foreground_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Cross entropy of one foreground logit, mean over pixels."""
    loss_BHW = F.binary_cross_entropy_with_logits(
        logits_BHW, foreground_BHW.float(), reduction="none"
    )
    return _mean(loss_BHW, counted_BHW.float())


def dice(probability_BHW: Tensor, foreground_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """1 - soft Dice (Milletari et al., 2016), smoothed by one pixel."""
    p_BHW = probability_BHW * counted_BHW
    t_BHW = (foreground_BHW & counted_BHW).float()
    return 1 - (2 * _sum(p_BHW * t_BHW) + 1) / (_sum(p_BHW) + _sum(t_BHW) + 1)


def focal_tversky(
    probability_BHW: Tensor,
    foreground_BHW: Tensor,
    counted_BHW: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float = 0.75,
) -> Tensor:
    """(1 - Tversky index) to the power of gamma (Abraham and Khan, 2019), smoothed by one pixel.

    Args:
        probability_BHW, foreground_BHW: as in `dice`.
        counted_BHW: bool, or a weight from 0 to 1 for each pixel.
        alpha: weight of missed pixels.
        beta: weight of false pixels.
        gamma: focal power.
    """
    p_BHW = probability_BHW * counted_BHW
    t_BHW = (foreground_BHW * counted_BHW).float()
    hit = _sum(p_BHW * t_BHW)
    missed = _sum(t_BHW - p_BHW * t_BHW)
    false = _sum(p_BHW - p_BHW * t_BHW)
    tversky = (hit + 1) / (hit + alpha * missed + beta * false + 1)
    return (1 - tversky).clamp(min=1e-6) ** gamma  # the power has no gradient at 0


def lovasz(probability_BHW: Tensor, foreground_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Lovász-softmax of the foreground (Berman et al., 2018): a surrogate of 1 - Jaccard index.

    Of an image without nuclei it is the largest probability. `counted_BHW` is bool, or a weight of
    each pixel's error, 0..1; pixels of weight 0 do not count.
    """
    error_BN = ((foreground_BHW.float() - probability_BHW).abs() * counted_BHW).flatten(1)
    error_BN, order_BN = error_BN.sort(dim=1, descending=True)
    true_BN = (foreground_BHW & (counted_BHW > 0)).flatten(1).gather(1, order_BN)
    # Jaccard loss where the pixels of the n largest errors are wrong and all others right.
    missed_BN = true_BN.cumsum(1)
    false_BN = (~true_BN).cumsum(1)
    true_B1 = missed_BN[:, -1:]
    jaccard_BN = 1 - (true_B1 - missed_BN) / (true_B1 + false_BN)
    return _sum(error_BN * jaccard_BN.diff(dim=1, prepend=jaccard_BN.new_zeros(len(true_B1), 1)))


def absolute(maps_BHW: Tensor, targets_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    """Absolute error, mean over pixels by weight; a pixel of weight 0 does not count."""
    return _mean((maps_BHW - targets_BHW).abs(), weights_BHW)


def _mean(values_BHW: Tensor, weights_BHW: Tensor) -> Tensor:
    return _sum(values_BHW * weights_BHW) / _sum(weights_BHW).clamp(min=1e-6)


def _sum(values_BHW: Tensor) -> Tensor:
    return values_BHW.flatten(1).sum(1, dtype=torch.float32)
