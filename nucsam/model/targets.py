"""Dense training targets from a batch of label maps: tensor operations on the labels' device.

A label map holds ids 0..n, 0 = background. Ids may have gaps; n is an upper bound over the batch.

Shape suffixes: B images, H W rows and columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND, INSIDE, BOUNDARY = 0, 1, 2

REACH = 32  # px; depths are exact up to here, and no pixel counts as deeper

_FAR = 1e6  # px: beyond the size of any image


def classes(labels_BHW: Tensor) -> Tensor:
    """HoVer-NeXt's three classes of each pixel: BACKGROUND, INSIDE or BOUNDARY.

    A nucleus pixel is boundary if one of its eight neighbours has another id or is background.
    The border of the image is no boundary.

    Args:
        labels_BHW: nucleus ids, int.

    Returns:
        Classes int64 (B, H, W).
    """
    ids = F.pad(labels_BHW[:, None].float(), (1, 1, 1, 1), mode="replicate")
    highest = F.max_pool2d(ids, 3, stride=1)[:, 0]
    lowest = -F.max_pool2d(-ids, 3, stride=1)[:, 0]
    nucleus = labels_BHW > 0
    return nucleus.long() + (nucleus & (lowest != highest)).long()


def depth(
    labels_BHW: Tensor, classes_BHW: Tensor, n: int, counted_BHW: Tensor | None = None
) -> Tensor:
    """Distance of each nucleus pixel to the boundary, scaled by the nucleus's deepest pixel.

    micro-sam's boundary distance is the same map inverted, 0 at the deepest pixel.

    Args:
        labels_BHW: nucleus ids, int.
        classes_BHW: `classes(labels_BHW)`.
        n: at least the largest id.
        counted_BHW: bool, pixels that may be the deepest; None = all. Beside a small image lie
            reflections of its nuclei, which the edge of the crop may cut.

    Returns:
        Depth float32 (B, H, W): 1 at the deepest pixel of each nucleus, 0 in the background.
    """
    B = len(labels_BHW)
    offset = (n + 1) * torch.arange(B, device=labels_BHW.device)
    nucleus_BHW = labels_BHW + offset.view(-1, 1, 1)  # one number for each id of each image
    px_BHW = _distance(classes_BHW == INSIDE)
    deepest = torch.zeros(B * (n + 1), device=labels_BHW.device)
    seen_BHW = px_BHW if counted_BHW is None else px_BHW * counted_BHW
    deepest.scatter_reduce_(0, nucleus_BHW.flatten(), seen_BHW.flatten(), "amax")
    return torch.where(labels_BHW > 0, px_BHW / deepest.clamp_(min=1.0)[nucleus_BHW], 0.0)


def _distance(inside_BHW: Tensor) -> Tensor:
    """1 + Euclidean distance to the nearest pixel that is not inside, px, exact up to REACH.

    In two passes: the distance within each row, then the nearest of the rows up to REACH away.
    The second pass moves most of the bytes, so its squares are of 16 bits.
    """
    H, W = inside_BHW.shape[1:]
    column = torch.arange(W, device=inside_BHW.device, dtype=torch.float32).expand(inside_BHW.shape)
    left = torch.where(inside_BHW, -_FAR, column).cummax(2).values
    right = torch.where(inside_BHW, _FAR, column).flip(2).cummin(2).values.flip(2)
    beyond = 2 * REACH**2
    squared = torch.minimum(column - left, right - column).square().clamp_(max=beyond).short()
    squared = F.pad(squared, (0, 0, REACH, REACH), value=beyond)
    nearest = squared[:, REACH : REACH + H].clone()
    for shift in range(1, REACH + 1):
        above = squared[:, REACH - shift :][:, :H]
        below = squared[:, REACH + shift :][:, :H]
        either = torch.minimum(above, below).add_(shift * shift)
        torch.minimum(nearest, either, out=nearest)
    return 1 + nearest.float().sqrt_().clamp_(max=REACH)
