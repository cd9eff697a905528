"""Dense training targets from a batch of label maps: tensor operations only, on the labels' device.

A label map (B, H, W) holds ids 0..n, 0 = background; ids may have gaps, n is an upper bound over the batch. Every
reduction over a nucleus is one scatter over the index `image * (n + 1) + id`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND, INSIDE, BOUNDARY = 0, 1, 2
REACH = 32  # px; a pixel deeper in its nucleus than this counts as this deep
_FAR = 1e6


def classes(labels_BHW: Tensor) -> Tensor:
    """Background, inside or boundary per pixel, int64 (B, H, W): HoVer-NeXt's three classes.

    Boundary pixels are nucleus pixels with another id, or background, among their eight neighbours. The border of the
    image is no boundary.
    """
    ids = F.pad(labels_BHW[:, None].float(), (1, 1, 1, 1), mode="replicate")
    low, high = -F.max_pool2d(-ids, 3, stride=1)[:, 0], F.max_pool2d(ids, 3, stride=1)[:, 0]
    nucleus = labels_BHW > 0
    return nucleus.long() + (nucleus & (low != high)).long()


def depth(labels_BHW: Tensor, classes_BHW: Tensor, n: int) -> Tensor:
    """Distance to the boundary, scaled per nucleus: float32 (B, H, W), 1 at its deepest pixel, 0 in the background.

    micro-sam's boundary distance, the other way up. `classes_BHW` are those of `classes`.
    """
    index = labels_BHW + (n + 1) * torch.arange(len(labels_BHW), device=labels_BHW.device).view(-1, 1, 1)
    px = _depth(classes_BHW == INSIDE)
    deepest = torch.zeros(len(labels_BHW) * (n + 1), device=labels_BHW.device)
    deepest.scatter_reduce_(0, index.flatten(), px.flatten(), "amax")
    return torch.where(labels_BHW > 0, px / deepest.clamp_(min=1.0)[index], 0.0)


def _depth(inside_BHW: Tensor) -> Tensor:
    """1 + Euclidean distance to the nearest pixel that is not inside, px, exact up to REACH: rows, then columns."""
    H, W = inside_BHW.shape[1:]
    column = torch.arange(W, device=inside_BHW.device, dtype=torch.float32).expand(inside_BHW.shape)
    left = torch.where(inside_BHW, -_FAR, column).cummax(2).values
    right = torch.where(inside_BHW, _FAR, column).flip(2).cummin(2).values.flip(2)
    row = F.pad(torch.minimum(column - left, right - column).square(), (0, 0, REACH, REACH), value=_FAR)
    nearest = row[:, REACH : REACH + H].clone()
    for shift in range(1, REACH + 1):
        either = torch.minimum(row[:, REACH - shift :][:, :H], row[:, REACH + shift :][:, :H])
        torch.minimum(nearest, either.add_(shift * shift), out=nearest)
    return 1 + nearest.sqrt_().clamp_(max=REACH)
