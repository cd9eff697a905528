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


def distances(labels_BHW: Tensor, classes_BHW: Tensor, n: int) -> Tensor:
    """micro-sam's two distance maps, each scaled per nucleus, float32 (B, 2, H, W), 1 in the background.

    Channel 0: distance to the nucleus's centroid, 0 there to 1 at the farthest pixel. Channel 1: inverted distance to
    its boundary, from 0 at the deepest pixel to below 1 at the boundary. `classes_BHW` are those of `classes`.
    """
    index = labels_BHW + (n + 1) * torch.arange(len(labels_BHW), device=labels_BHW.device).view(-1, 1, 1)
    centre = _scaled(_centre_distance(labels_BHW, index, n), index, n)
    depth = _scaled(_depth(classes_BHW == INSIDE), index, n)
    return torch.where((labels_BHW > 0)[:, None], torch.stack([centre, 1 - depth], dim=1), 1.0)


def _centre_distance(labels_BHW: Tensor, index: Tensor, n: int) -> Tensor:
    """Distance to the centroid of the pixel's nucleus, px."""
    _, H, W = labels_BHW.shape
    y = torch.arange(H, device=index.device, dtype=torch.float32).view(1, H, 1).expand(index.shape)
    x = torch.arange(W, device=index.device, dtype=torch.float32).view(1, 1, W).expand(index.shape)
    area, sum_y, sum_x = (_per_nucleus(v, index, n).clamp(min=least) for v, least in ((y * 0 + 1, 1), (y, 0), (x, 0)))
    return torch.hypot((sum_y / area)[index] - y, (sum_x / area)[index] - x)


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


def _scaled(values_BHW: Tensor, index: Tensor, n: int) -> Tensor:
    """Values divided by the largest of their nucleus."""
    largest = torch.zeros(len(index) * (n + 1), device=index.device)
    largest.scatter_reduce_(0, index.flatten(), values_BHW.flatten(), "amax")
    return values_BHW / largest.clamp(min=1.0)[index]


def _per_nucleus(values_BHW: Tensor, index: Tensor, n: int) -> Tensor:
    sums = torch.zeros(len(index) * (n + 1), device=index.device)
    return sums.index_add_(0, index.flatten(), values_BHW.flatten())
