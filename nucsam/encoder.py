"""MobileSAM's image encoder (TinyViT; Zhang et al., 2023, arXiv 2306.14289): several scales, any input size.

The weights live in the stock modules of the `mobile_sam` package, under their stock key names; this file only
says in which order they run. Maps are NHWC inside, so that tokens are a view of them.

Shape suffixes: B images, H W rows and columns of the map at hand, C channels, N windows of all images,
L tokens of a window, A attention heads, D channels of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Features(NamedTuple):
    """The normalised images (B, 3, H, W) and the last map of each scale. NCHW, in channels-last memory."""

    image: Tensor  # (B, 3, H, W)
    s2: Tensor  # (B, 32, H/2, W/2)
    s4: Tensor  # (B, 64, H/4, W/4)
    s8: Tensor  # (B, 128, H/8, W/8)
    s16: Tensor  # (B, 160, H/16, W/16)
    s16b: Tensor  # (B, 320, H/16, W/16), the last stage, which MobileSAM keeps at 1/16


class Encoder(nn.Module):
    """Takes over `patch_embed`, `layers` and `neck` of a `mobile_sam` TinyViT, and leaves its unused head behind.

    Equal to the stock encoder in eval mode within float error. BatchNorms are pinned: they stay in eval mode
    whatever `train()` says. They are affine maps then, and folded into the convolutions before them in each
    forward, with gradients where those train; the state dict keeps the stock keys and values. With `moving` they
    are as stock ones: in training mode they use, and keep a running average of, their batch's statistics.
    `checkpoint` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, tiny_vit: nn.Module, *, checkpoint: bool = False, moving: bool = False):
        super().__init__()
        assert not (checkpoint and moving), "a block computed twice would count its statistics twice"
        self.patch_embed = tiny_vit.patch_embed
        self.layers = tiny_vit.layers
        self.neck = tiny_vit.neck
        self.checkpoint, self.moving = checkpoint, moving
        # Of the RGB values 0..255, as `mobile_sam.build_sam` gives them.
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        self.register_buffer("pixel_mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(3, 1, 1), persistent=False)
        self.train(tiny_vit.training)

    def forward(self, images: Tensor) -> Features:
        """images (B, 3, H, W) float, RGB in 0..255, H and W multiples of 32 (else ValueError), from 64 up."""
        height, width = images.shape[2:]
        if height % 32 or width % 32:
            raise ValueError(f"an image is {height} x {width} px, expected multiples of 32 for the encoder")
        x = (images - self.pixel_mean) / self.pixel_std
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        maps = [x]
        if _eager_cpu(x) and self._stem_is_fixed():  # image by image, its large maps stay in the cache
            *stem, x = map(torch.cat, zip(*map(self._stem, x.split(1))))
        else:
            *stem, x = self._stem(x)
        maps += stem
        for stage in self.layers[1:]:
            for block in stage.blocks:
                x = self._run(_attention_block, block, x)
            maps.append(x)
            if stage.downsample is not None:
                x = _patch_merging(stage.downsample, x)
        return Features(*(x.permute(0, 3, 1, 2) for x in maps))

    def _stem(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the attention: maps at 1/2 and 1/4, and the input of the next stage."""
        first, _, second = self.patch_embed.seq
        s2 = _gelu(_conv_bn(first, x_BHWC))
        x = _conv_bn(second, s2)
        for block in self.layers[0].blocks:
            x = self._run(_mbconv, block, x)
        return s2, x, _patch_merging(self.layers[0].downsample, x)

    def _stem_is_fixed(self) -> bool:
        """Not where BatchNorms take the statistics of the whole batch."""
        parts = self.patch_embed, self.layers[0]
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        return not (trains or self.patch_embed.seq[0].bn.training)

    def _run(self, function: Callable[[nn.Module, Tensor], Tensor], block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpoint:
            return checkpoint(function, block, x, use_reentrant=False, preserve_rng_state=False)
        return function(block, x)

    def embed(self, features: Features) -> Tensor:
        """SAM's image embedding, (B, 256, H/16, W/16): what the mask decoder takes."""
        project, norm1, conv, norm2 = self.neck
        x = F.linear(features.s16b.permute(0, 2, 3, 1), project.weight.flatten(1))
        x = conv(_layer_norm(norm1, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _layer_norm(norm2, x).permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and self.moving)
            # The biases that the stock attention gathers in train() and eval(): stale after a later load.
            if hasattr(module, "ab"):
                del module.ab
        return self


def _conv_bn(module: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `Conv2d_BN`, as one convolution with the BatchNorm's scale and shift in its weight and bias."""
    conv, norm = module.c, module.bn
    if norm.training:
        return module(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = norm.bias - norm.running_mean * scale
    if conv.kernel_size == (1, 1):  # as a linear layer, which keeps no input when its weight is frozen
        return F.linear(x_BHWC, weight.flatten(1), bias)
    x = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return x.permute(0, 2, 3, 1)


def _eager_cpu(x: Tensor) -> bool:
    """Where more and smaller operations cost nothing, and a graph need not hold for every size."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _gelu(x: Tensor) -> Tensor:
    """In place where no gradient needs x: a new map costs more than the function."""
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


def _mbconv(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    x = _gelu(_conv_bn(block.conv1, x_BHWC))
    x = _gelu(_conv_bn(block.conv2, x))
    return _gelu(_conv_bn(block.conv3, x) + x_BHWC)


def _patch_merging(merge: nn.Module, x_BHWC: Tensor) -> Tensor:
    x = _gelu(_conv_bn(merge.conv1, x_BHWC))
    x = _gelu(_conv_bn(merge.conv2, x))
    return _conv_bn(merge.conv3, x)


def _attention_block(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `TinyViTBlock`: window attention, depthwise convolution, MLP. MobileSAM builds it without dropout."""
    attention = _tiled_attention if _eager_cpu(x_BHWC) else _window_attention
    x = x_BHWC + attention(block.attn, x_BHWC, block.window_size)
    x = _conv_bn(block.local_conv, x)
    return x + block.mlp(x)


def _window_attention(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    H, W = x_BHWC.shape[1:3]
    rows, columns = (H + window - 1) // window, (W + window - 1) // window  # ONNX divides towards 0
    # Zeros before the norm, which take part in the attention, as in the stock encoder.
    x = F.pad(x_BHWC, (0, 0, 0, columns * window - W, 0, rows * window - H))
    qkv_BHWC = attn.qkv(attn.norm(x))
    return attn.proj(_attention(attn, qkv_BHWC, window, window, _bias(attn))[:, :H, :W])


def _tiled_attention(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    """The same, without computing anything for the zeros outside of the map, at 512 px a fifth to two fifths of it.

    They all have one and the same key and value, each with its own bias: to the pixels of a window they are one key
    whose bias is the logarithm of the sum of their exponentials.
    """
    qkv_BHWC, bias_ALL = attn.qkv(attn.norm(x_BHWC)), _bias(attn)
    bias_Ayxyx = bias_ALL.view(-1, *4 * (window,))
    rows = []
    for row_BHWC in _split(qkv_BHWC, 1, window):
        parts = []
        for part_BHWC in _split(row_BHWC, 2, window):
            height, width = (min(side, window) for side in part_BHWC.shape[1:3])
            bias_ALyx, outside_C = bias_Ayxyx[:, :height, :width].flatten(1, 2), None
            bias = bias_ALyx[:, :, :height, :width].flatten(2)
            if height * width < window * window:
                outside_C = attn.qkv(attn.norm.bias)
                outside = [bias_ALyx[:, :, height:].flatten(2), bias_ALyx[:, :, :height, width:].flatten(2)]
                bias = torch.cat([bias, torch.cat(outside, dim=2).logsumexp(2, keepdim=True)], dim=2)
            parts.append(_attention(attn, part_BHWC, height, width, bias, outside_C))
        rows.append(torch.cat(parts, dim=2))
    return attn.proj(torch.cat(rows, dim=1))


def _split(x: Tensor, dim: int, window: int) -> list[Tensor]:
    """Whole windows, and what is left over."""
    rest = x.shape[dim] % window
    return [part for part in x.split([x.shape[dim] - rest, rest], dim) if part.shape[dim]]


def _bias(attn: nn.Module) -> Tensor:
    return attn.attention_biases[:, attn.attention_bias_idxs]


def _attention(
    attn: nn.Module, qkv_BHWC: Tensor, height: int, width: int, bias_ALK: Tensor, outside_C: Tensor | None = None
) -> Tensor:
    """Attention within each tile of height x width, and to one more key and value where there is an `outside_C`."""
    B, H, W, _ = qkv_BHWC.shape
    rows, columns, sizes = H // height, W // width, [attn.key_dim, attn.key_dim, attn.d]
    tiles = qkv_BHWC.view(B, rows, height, columns, width, -1).transpose(2, 3)
    qkv_NALD = tiles.reshape(B * rows * columns, height * width, attn.num_heads, -1).transpose(1, 2)
    q, k, v = qkv_NALD.split(sizes, dim=3)
    if outside_C is not None:
        _, key_A1D, value_A1D = outside_C.view(attn.num_heads, 1, -1).split(sizes, dim=2)
        k = torch.cat([k, key_A1D.expand(len(k), -1, -1, -1)], dim=2)
        v = torch.cat([v, value_A1D.expand(len(v), -1, -1, -1)], dim=2)
    bias_1ALK = bias_ALK.to(q.dtype)[None]
    if q.device.type == "cpu" and q.dtype.itemsize == 2:
        # There the fused kernel's backward pass takes 3 to 6 times as long as the plain one (torch 2.15).
        x_NALD = torch.softmax((q * attn.scale) @ k.transpose(2, 3) + bias_1ALK, dim=3).to(v.dtype) @ v
    else:
        x_NALD = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1ALK, scale=attn.scale)
    x = x_NALD.transpose(1, 2).reshape(B, rows, columns, height, width, attn.dh).transpose(2, 3)
    return x.reshape(B, H, W, attn.dh)


def _layer_norm(norm: nn.Module, x_BHWC: Tensor) -> Tensor:
    """The neck's `LayerNorm2d`, over the last dimension."""
    return F.layer_norm(x_BHWC, norm.weight.shape, norm.weight, norm.bias, norm.eps)
