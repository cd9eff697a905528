"""Geometric and stain augmentation of a batch, on its device.

The data set draws uniform numbers per image from (seed, epoch, image index), and everything random
here comes from them: batch size, processes and device change nothing. One interpolation crops,
flips, turns, magnifies and scales from image to model pixels.

Shapes: B images, S side of a source window in px, K uniform numbers.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nucsam.config import Augment

# Columns of the uniform numbers
_FLIP_Y, _FLIP_X, _TURN, _ZOOM, _SHIFT_Y, _SHIFT_X = range(6)
_STAIN, _BLUR, _BLUR_SIGMA, _NOISE, _NOISE_SIGMA, _NOISE_PLACE = range(6, 12)
_STAIN_SCALE, _STAIN_BIAS, _STAIN_MIX = slice(12, 15), slice(15, 18), slice(18, 27)

# Optical density of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001)
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

_TABLE = 2**20 + 7  # numbers of noise; a place among them is exact in float32


def window(crop: int, config: Augment) -> int:
    """Side in px of the source window that a crop needs at the smallest magnification.

    Args:
        crop: side of the crop, px.
        config: the section `augment` of the configuration.
    """
    return math.ceil(crop / min(config.scale_min, 1.0))


def augment(
    images_B3SS: Tensor,
    labels_BSS: Tensor,
    counted_BSS: Tensor,
    draws_BK: Tensor,
    *,
    crop: int,
    scale: float,
    config: Augment,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one augmented crop from each source window.

    Args:
        images_B3SS: uint8.
        labels_BSS: int, ids under 2^24, which float32 holds exactly.
        counted_BSS: bool, False where a pixel counts in no loss.
        draws_BK: uniform in [0, 1), on the CPU: choosing images then never waits for the device.
        crop: side of a crop, px.
        scale: model px per px.
        config: the section `augment` of the configuration.

    Returns:
        images float32 (B, 3, crop * scale, crop * scale), 0..255; labels int64 (B, crop, crop);
        counted bool (B, crop, crop).
    """
    parameters = {"theta": _affine(draws_BK, images_B3SS.shape[-1], crop, config)}
    parameters |= _draw_stain(draws_BK, config)
    parameters |= _draw_blur(draws_BK, config)
    parameters |= _draw_noise(draws_BK, config)
    parameters = _on_device(parameters, images_B3SS.device)
    theta = parameters["theta"]
    images = _sample(images_B3SS.float(), theta, round(crop * scale), "bilinear")
    maps = torch.stack([labels_BSS.float(), counted_BSS.float()], dim=1)
    maps = _sample(maps, theta, crop, "nearest")
    if "stain_matrix" in parameters:
        images = _stain(images, parameters["stain_matrix"], parameters["stain_offset"])
    if "blurred" in parameters:
        images = _blur(images, parameters["blurred"], parameters["kernels"])
    if "noisy" in parameters:
        images = _noise(images, *(parameters[name] for name in ("noisy", "place", "sigma")))
    return images.clamp(0, 255), maps[:, 0].long(), maps[:, 1] > 0.5


def _on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors float32 of the CPU, all in one copy for which the host does not wait."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts)}


def _sample(maps: Tensor, theta: Tensor, side: int, mode: str) -> Tensor:
    grid = F.affine_grid(theta, [len(maps), 1, side, side], align_corners=False)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="border", align_corners=False)


def _affine(draws: Tensor, source: int, crop: int, config: Augment) -> Tensor:
    """(B, 2, 3) map from crop to window coordinates, both -1..1 from edge to edge."""
    low, high = math.log(config.scale_min), math.log(config.scale_max)
    magnification = torch.exp(low + (high - low) * draws[:, _ZOOM])
    size = crop / magnification / source  # of the crop, as a share of the window's side
    matrix = torch.eye(2, device=draws.device).expand(len(draws), 2, 2)
    if config.d4:
        flip = torch.sign(draws[:, [_FLIP_X, _FLIP_Y]] - 0.5 + 1e-9)  # 1e-9: never 0
        turned = torch.where(draws[:, _TURN, None, None] < 0.5, matrix, matrix.flip(-1))
        matrix = flip[:, :, None] * turned
    shift = (2 * draws[:, [_SHIFT_X, _SHIFT_Y]] - 1) * (1 - size).clamp(min=0)[:, None]
    return torch.cat([matrix * size[:, None, None], shift[:, :, None]], dim=2)


def _draw_stain(draws: Tensor, config: Augment) -> dict[str, Tensor]:
    """Change each stain's density and colour: one 3x3 matrix and one offset per image."""
    if not config.stain:
        return {}
    chosen = (draws[:, _STAIN] < config.stain).float()[:, None]
    factor = 1 + chosen * config.stain_scale * (2 * draws[:, _STAIN_SCALE] - 1)
    bias = chosen * config.stain_bias * (2 * draws[:, _STAIN_BIAS] - 1)
    mix = chosen * config.stain_mix * (2 * draws[:, _STAIN_MIX] - 1)
    stains = _STAINS + mix.view(-1, 3, 3)
    change = torch.linalg.inv(_STAINS) @ (factor[:, :, None] * stains)
    # With log(1 + pixel) in place of the density log(256 / (1 + pixel)): fewer passes.
    offset = math.log(256) * (1 - change.sum(1)) - (bias[:, None] @ stains)[:, 0]
    return {"stain_matrix": change.mT, "stain_offset": offset[:, :, None]}


def _stain(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    logs = torch.baddbmm(offset, matrix, (images.flatten(2) + 1).log_())
    return logs.exp_().sub_(1).view_as(images)


def _draw_blur(draws: Tensor, config: Augment) -> dict[str, Tensor]:
    """The images to blur, and for each of their channels a Gaussian."""
    chosen = (draws[:, _BLUR] < config.blur).nonzero()[:, 0]
    if not len(chosen):
        return {}
    sigma = (config.blur_sigma * draws[chosen, _BLUR_SIGMA]).clamp(min=0.1)
    reach = max(1, math.ceil(3 * config.blur_sigma))
    x = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(3, 0)
    return {"blurred": chosen.float(), "kernels": weights}


def _blur(images: Tensor, chosen: Tensor, kernels: Tensor) -> Tensor:
    """Blur the chosen images, first along rows, then along columns."""
    chosen = chosen.long()
    reach = kernels.shape[1] // 2
    row = kernels[:, None, None]
    planes = images[chosen].flatten(0, 1)[None]  # every channel of every image is a group
    for kernel, padding in ((row, (reach, reach, 0, 0)), (row.mT, (0, 0, reach, reach))):
        planes = F.conv2d(F.pad(planes, padding, mode="reflect"), kernel, groups=len(kernel))
    return images.index_copy(0, chosen, planes.view(-1, *images.shape[1:]))


def _draw_noise(draws: Tensor, config: Augment) -> dict[str, Tensor]:
    """The images to which noise is added, its place in the table, and its size."""
    chosen = (draws[:, _NOISE] < config.noise).nonzero()[:, 0]
    if not len(chosen):
        return {}
    place = (draws[chosen, _NOISE_PLACE] * _TABLE).floor()
    sigma = config.noise_sigma * draws[chosen, _NOISE_SIGMA]
    return {"noisy": chosen.float(), "place": place, "sigma": sigma}


def _noise(images: Tensor, chosen: Tensor, place: Tensor, sigma: Tensor) -> Tensor:
    """Add Gaussian noise to the chosen images."""
    pixels = torch.arange(images[0].numel(), device=images.device)
    noise = _noise_table(images.device)[(place.long()[:, None] + pixels) % _TABLE]
    noise = noise.view(-1, *images.shape[1:])
    return images.index_add(0, chosen.long(), noise * sigma[:, None, None, None])


@cache
def _noise_table(device: torch.device) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(_TABLE, generator=torch.Generator().manual_seed(0)).to(device)
