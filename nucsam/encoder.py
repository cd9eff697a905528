"""MobileSAM's image encoder (TinyViT; Zhang et al., 2023, arXiv 2306.14289): several scales, any input size.

The weights live in the stock modules of the `mobile_sam` package, under their stock key names; this file only
says in which order they run. Maps are NHWC inside, so that tokens are a view of them.

Shape suffixes: B images, H W rows and columns of the map at hand, C channels, N windows of all images,
L tokens of a window, A attention heads, D channels of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Features(NamedTuple):
    """The last map of each scale, for images (B, 3, H, W). NCHW, in channels-last memory."""

    s2: Tensor  # (B, 32, H/2, W/2)
    s4: Tensor  # (B, 64, H/4, W/4)
    s8: Tensor  # (B, 128, H/8, W/8)
    s16: Tensor  # (B, 160, H/16, W/16)
    s16b: Tensor  # (B, 320, H/16, W/16), the last stage, which MobileSAM keeps at 1/16


class Encoder(nn.Module):
    """Takes over `patch_embed`, `layers` and `neck` of a `mobile_sam` TinyViT, and leaves its unused head behind.

    Equal to the stock encoder in eval mode within float error. BatchNorms are pinned: they stay in eval mode
    whatever `train()` says. They are affine maps then, and folded into the convolutions before them in each
    forward, with gradients where those train; the state dict keeps the stock keys and values.
    `checkpoint` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, tiny_vit: nn.Module, *, checkpoint: bool = False):
        super().__init__()
        self.patch_embed = tiny_vit.patch_embed
        self.layers = tiny_vit.layers
        self.neck = tiny_vit.neck
        self.checkpoint = checkpoint
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
        first, act, second = self.patch_embed.seq
        maps = [act(_conv_bn(first, x))]
        x = _conv_bn(second, maps[0])
        for stage in self.layers:
            run = _attention_block if stage is not self.layers[0] else _mbconv
            for block in stage.blocks:
                if self.checkpoint:
                    x = checkpoint(run, block, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = run(block, x)
            maps.append(x)
            if stage.downsample is not None:
                x = _patch_merging(stage.downsample, x)
        return Features(*(x.permute(0, 3, 1, 2) for x in maps))

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
                module.eval()
            # The biases that the stock attention gathers in train() and eval(): stale after a later load.
            if hasattr(module, "ab"):
                del module.ab
        return self

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Sets the running statistics of every BatchNorm to those of one batch of images, as for `forward`.

        For a random base, whose means of 0 and variances of 1 are not those of its activations.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        self(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _conv_bn(module: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `Conv2d_BN`, as one convolution with the BatchNorm's scale and shift in its weight and bias."""
    conv, norm = module.c, module.bn
    if norm.training:  # only in `calibrate`
        return module(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    bias = norm.bias - norm.running_mean * scale
    if conv.kernel_size == (1, 1):  # as a linear layer, which keeps no input when its weight is frozen
        return F.linear(x_BHWC, weight.flatten(1), bias)
    x = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return x.permute(0, 2, 3, 1)


def _mbconv(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    x = block.act1(_conv_bn(block.conv1, x_BHWC))
    x = block.act2(_conv_bn(block.conv2, x))
    return block.act3(_conv_bn(block.conv3, x) + x_BHWC)


def _patch_merging(merge: nn.Module, x_BHWC: Tensor) -> Tensor:
    x = merge.act(_conv_bn(merge.conv1, x_BHWC))
    x = merge.act(_conv_bn(merge.conv2, x))
    return _conv_bn(merge.conv3, x)


def _attention_block(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `TinyViTBlock`: window attention, depthwise convolution, MLP. MobileSAM builds it without dropout."""
    x = x_BHWC + _window_attention(block.attn, x_BHWC, block.window_size)
    x = _conv_bn(block.local_conv, x)
    return x + block.mlp(x)


def _window_attention(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    B, H, W, C = x_BHWC.shape
    rows, columns = -(-H // window), -(-W // window)
    # Zeros before the norm, which take part in the attention, as in the stock encoder.
    x = F.pad(x_BHWC, (0, 0, 0, columns * window - W, 0, rows * window - H))
    x = x.view(B, rows, window, columns, window, C).transpose(2, 3)
    x_NLC = _attention(attn, x.reshape(B * rows * columns, window * window, C))
    x = x_NLC.view(B, rows, columns, window, window, C).transpose(2, 3)
    return x.reshape(B, rows * window, columns * window, C)[:, :H, :W]


def _attention(attn: nn.Module, x_NLC: Tensor) -> Tensor:
    N, L, _ = x_NLC.shape
    qkv_NALD = attn.qkv(attn.norm(x_NLC)).view(N, L, attn.num_heads, -1).transpose(1, 2)
    q, k, v = qkv_NALD.split([attn.key_dim, attn.key_dim, attn.d], dim=3)
    bias_1ALL = attn.attention_biases[:, attn.attention_bias_idxs].to(q.dtype)[None]
    if q.device.type == "cpu" and q.dtype.itemsize == 2:
        # There the fused kernel's backward pass takes 3 to 6 times as long as the plain one (torch 2.15).
        x_NALD = torch.softmax((q * attn.scale) @ k.transpose(2, 3) + bias_1ALL, dim=3).to(v.dtype) @ v
    else:
        x_NALD = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1ALL, scale=attn.scale)
    return attn.proj(x_NALD.transpose(1, 2).reshape(N, L, attn.dh))


def _layer_norm(norm: nn.Module, x_BHWC: Tensor) -> Tensor:
    """The neck's `LayerNorm2d`, over the last dimension."""
    return F.layer_norm(x_BHWC, norm.weight.shape, norm.weight, norm.bias, norm.eps)
