"""Geometric and stain augmentation of a batch, on its device.

Everything random comes from `draws`, uniform numbers in [0, 1) that the data set draws per image from (seed, epoch,
image index): batch size, process count and device change nothing. One interpolation does crop, flip, turn,
magnification and the step from image to model pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nucsam.config import Augment

DRAWS = 32  # numbers per image; the ones used are named here, so that adding one leaves the others as they were
_FLIP_Y, _FLIP_X, _TURN, _ZOOM, _SHIFT_Y, _SHIFT_X = range(6)
_STAIN, _BLUR, _BLUR_SIGMA, _NOISE, _NOISE_SIGMA, _NOISE_PLACE = range(6, 12)
_STAIN_SCALE, _STAIN_BIAS = slice(12, 15), slice(15, 18)

# Optical density of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001).
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def window(crop: int, config: Augment) -> int:
    """Side in image px of the source window that a crop of `crop` px may need at the smallest magnification."""
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
    """Augmented crops of source windows.

    Args: uint8 images, int label maps and bool counted maps of one window side S; draws (B, 32) in [0, 1), on the CPU,
        so that choosing the images to blur never waits for the device.
    Returns: images float32 0..255 (B, 3, crop * scale, crop * scale); labels int64 and counted bool (B, crop, crop).
    """
    device = images_B3SS.device
    theta = _affine(draws_BK, images_B3SS.shape[-1], crop, config).to(device)
    B, side = len(images_B3SS), round(crop * scale)
    grid = F.affine_grid(theta, [B, 1, side, side], align_corners=False)
    images = F.grid_sample(images_B3SS.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    if side != crop:
        grid = F.affine_grid(theta, [B, 1, crop, crop], align_corners=False)
    maps = torch.stack([labels_BSS.float(), counted_BSS.float()], dim=1)  # ids below 2^24 are exact in float32
    maps = F.grid_sample(maps, grid, mode="nearest", padding_mode="border", align_corners=False)
    images = _stain(images, draws_BK, config)
    images = _blur(images, draws_BK, config)
    images = _noise(images, draws_BK, config)
    return images.clamp(0, 255), maps[:, 0].long(), maps[:, 1] > 0.5


def _affine(draws: Tensor, source: int, crop: int, config: Augment) -> Tensor:
    """(B, 2, 3) map from crop to window coordinates, both -1..1 from edge to edge."""
    low, high = math.log(config.scale_min), math.log(config.scale_max)
    size = crop / torch.exp(low + (high - low) * draws[:, _ZOOM]) / source  # part of the window that the crop shows
    identity = torch.eye(2, device=draws.device).expand(len(draws), 2, 2)
    if config.d4:
        flip = torch.sign(draws[:, [_FLIP_X, _FLIP_Y]] - 0.5 + 1e-9)
        turned = torch.where(draws[:, _TURN, None, None] < 0.5, identity, identity.flip(-1))
        matrix = flip[:, :, None] * turned
    else:
        matrix = identity
    shift = (2 * draws[:, [_SHIFT_X, _SHIFT_Y]] - 1) * (1 - size).clamp(min=0)[:, None]
    return torch.cat([matrix * size[:, None, None], shift[:, :, None]], dim=2)


def _stain(images: Tensor, draws: Tensor, config: Augment) -> Tensor:
    """Scale and shift each stain's density: one 3 x 3 matrix and an offset per image in optical density."""
    if not config.stain:
        return images
    stains = _STAINS
    on = (draws[:, _STAIN] < config.stain).float()[:, None]
    factor = 1 + on * config.stain_scale * (2 * draws[:, _STAIN_SCALE] - 1)
    bias = on * config.stain_bias * (2 * draws[:, _STAIN_BIAS] - 1)
    matrix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)
    density = -torch.log((images.permute(0, 2, 3, 1) + 1) / 256)
    offset = (bias @ stains)[:, None].to(images.device)
    density = torch.baddbmm(offset, density.flatten(1, 2), matrix.to(images.device))
    return (256 * torch.exp(-density) - 1).transpose(1, 2).view_as(images)


def _blur(images: Tensor, draws: Tensor, config: Augment) -> Tensor:
    chosen = (draws[:, _BLUR] < config.blur).nonzero()[:, 0]
    if not len(chosen):
        return images
    sigma = (config.blur_sigma * draws[chosen, _BLUR_SIGMA]).clamp(min=0.1)
    reach = max(1, math.ceil(3 * config.blur_sigma))
    x = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None].to(images.device)
    chosen = chosen.to(images.device)
    blurred = images[chosen].flatten(0, 1)[None]
    blurred = F.conv2d(F.pad(blurred, (reach, reach, 0, 0), mode="reflect"), kernel, groups=3 * len(chosen))
    blurred = F.conv2d(F.pad(blurred, (0, 0, reach, reach), mode="reflect"), kernel.mT, groups=3 * len(chosen))
    return images.index_copy(0, chosen, blurred.view(-1, *images.shape[1:]))


def _noise(images: Tensor, draws: Tensor, config: Augment) -> Tensor:
    """Gaussian noise read from one fixed table at a drawn place: the same on every device."""
    chosen = (draws[:, _NOISE] < config.noise).nonzero()[:, 0]
    if not len(chosen):
        return images
    table = _table(str(images.device))
    start = (draws[chosen, _NOISE_PLACE] * len(table)).long().to(images.device)
    place = torch.arange(images[0].numel(), device=images.device)
    noise = table[(start[:, None] + place) % len(table)].view(-1, *images.shape[1:])
    sigma = (config.noise_sigma * draws[chosen, _NOISE_SIGMA]).to(images.device)
    return images.index_add(0, chosen.to(images.device), noise * sigma[:, None, None, None])


_TABLES: dict[str, Tensor] = {}


def _table(device: str) -> Tensor:
    if device not in _TABLES:
        _TABLES[device] = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device)
    return _TABLES[device]
