"""TinyViT, the image encoder of MobileSAM, TinySAM and LiteMedSAM, at any input size.

Source: Zhang et al., 2023, arXiv 2306.14289.

The weights stay in the modules of the `mobile_sam` package, under their stock names. This file
says in which order they run, and returns the maps of all scales. Maps are channels-last, so that
the tokens of a map are a view of it.

Shape suffixes: B images, H W rows and columns of the map at hand, C channels, N tiles of all
images, L tokens of a tile, K keys that they see, A attention heads, D channels of a head, y x row
and column in a window.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nucsam.model.frozen import derived
from nucsam.model.pixels import Features, Pixels, run_block

# On a GPU: the fused kernel that takes a bias, and what PyTorch has where that cannot run.
_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# (stride, channels) of the last map of each scale. MobileSAM keeps its last stage at 1/16.
MAPS = ((2, 32), (4, 64), (8, 128), (16, 160), (16, 320))


class Encoder(nn.Module):
    """TinyViT without its classifier, equal to the stock encoder in eval mode within float error.

    A pinned BatchNorm stays in eval mode whatever `train()` says. It is then an affine map, folded
    into the convolution before it: once, if both are frozen. The state dict keeps the stock names
    and values.

    Args:
        tiny_vit: `mobile_sam`'s TinyViT, whose modules the encoder takes over.
        checkpoint: recompute each block in the backward pass instead of keeping its activations.
        moving: do not pin the BatchNorms; in training mode they use the statistics of their batch
            and keep a running average.
        quarter: LiteMedSAM's way: a stem without strides on the mean of each 4 x 4 px, which are
            divided by 255. So a model px has the size that it has in the other bases: TinyViT sees
            256 px of 1024, and its tokens lie 16 model px apart.
    """

    def __init__(
        self,
        tiny_vit: nn.Module,
        *,
        checkpoint: bool = False,
        moving: bool = False,
        quarter: bool = False,
    ) -> None:
        super().__init__()
        assert not (checkpoint and moving)  # a recomputed block would average its statistics twice
        self.patch_embed = tiny_vit.patch_embed
        self.layers = tiny_vit.layers
        self.neck = tiny_vit.neck
        self.checkpoint = checkpoint
        self.moving = moving
        self.quarter = quarter
        self.pixels = Pixels((0.0,) * 3, (255.0,) * 3) if quarter else Pixels()
        self.maps = ((4, 32), *MAPS[1:]) if quarter else MAPS
        self.train(tiny_vit.training)

    def forward(self, images: Tensor) -> Features:
        """The maps of all scales.

        Args:
            images: RGB float (B, 3, H, W), 0..255; H and W from 64, multiples of 32.

        Returns:
            The normalised images and a map for each of `maps`, in channels-last memory.

        Raises:
            UserError: H or W is no multiple of 32.
        """
        x = self.pixels(images)
        maps = [x.permute(0, 2, 3, 1)]
        if self.quarter:
            x = F.avg_pool2d(x, 4)
        x = x.permute(0, 2, 3, 1)
        if _eager_cpu(x) and self._stem_is_fixed():
            # One image at a time, whose large maps stay in the cache.
            by_image = [self._stem(image) for image in x.split(1)]
            s2, s4, x = (torch.cat(parts) for parts in zip(*by_image))
        else:
            s2, s4, x = self._stem(x)
        maps += [s2, s4]
        for stage in self.layers[1:]:
            for block in stage.blocks:
                x = run_block(_attention_block, block, x, self.checkpoint)
            maps.append(x)
            if stage.downsample is not None:
                x = _patch_merging(stage.downsample, x)
        return tuple(x.permute(0, 3, 1, 2) for x in maps)

    def embed(self, features: Features) -> Tensor:
        """SAM's image embedding, (B, 256, H/16, W/16): the input of the mask decoder."""
        project, norm1, conv, norm2 = self.neck
        x = F.linear(features[-1].permute(0, 2, 3, 1), project.weight.flatten(1))
        x = conv(_layer_norm(norm1, x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _layer_norm(norm2, x).permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(mode and self.moving)
            if hasattr(module, "ab"):
                # Biases that stock attention caches: they go stale when weights are loaded later.
                del module.ab
        return self

    def _stem(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layers before the attention: the two finest maps and the input of the next stage."""
        first, _, second = self.patch_embed.seq
        s2 = _gelu(_conv_bn(first, x_BHWC))
        x = _conv_bn(second, s2)
        for block in self.layers[0].blocks:
            x = run_block(_mbconv, block, x, self.checkpoint)
        return s2, x, _patch_merging(self.layers[0].downsample, x)

    def _stem_is_fixed(self) -> bool:
        """Whether nothing in the stem trains or takes the statistics of the whole batch."""
        parameters = [*self.patch_embed.parameters(), *self.layers[0].parameters()]
        trains = any(parameter.requires_grad for parameter in parameters)
        return not trains and not self.patch_embed.seq[0].bn.training


def _eager_cpu(x: Tensor) -> bool:
    """Whether many small operations are cheap, and no graph has to hold for every size."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _gelu(x: Tensor) -> Tensor:
    """In place where no gradient needs x: a new map costs more than the function."""
    return F.gelu(x) if x.requires_grad else torch.ops.aten.gelu_(x)


def _layer_norm(norm: nn.Module, x_BHWC: Tensor) -> Tensor:
    """The neck's `LayerNorm2d`, over the last dimension."""
    return F.layer_norm(x_BHWC, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _conv_bn(module: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `Conv2d_BN` as one convolution, with the BatchNorm in its weight and bias."""
    conv, norm = module.c, module.bn
    if norm.training:
        return module(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def fold() -> tuple[Tensor, Tensor]:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale

    # Training moves the statistics without raising their version, but it counts its batches.
    sources = [conv.weight, *norm.parameters(), *norm.buffers()]
    weight, bias = derived(module, sources, fold)
    if conv.kernel_size == (1, 1):
        # A linear layer, unlike a convolution, keeps no input when its weight is frozen.
        return F.linear(x_BHWC, weight.flatten(1), bias)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)
    x_BCHW = F.conv2d(x_BCHW, weight, bias, conv.stride, conv.padding, groups=conv.groups)
    return x_BCHW.permute(0, 2, 3, 1)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, whose frozen weight is cast once; an adapted one casts its own."""
    if type(layer) is not nn.Linear:
        return layer(x)
    return F.linear(x, *derived(layer, (layer.weight, layer.bias)))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the type of x: on a GPU autocast would make a float32 map. Sums are float32 anyway."""
    if x.device.type != "cuda" or norm.weight.requires_grad:
        return norm(x)
    weight, bias = derived(norm, (norm.weight, norm.bias))
    with torch.autocast("cuda", enabled=False):
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), norm.eps)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """A stock `Mlp` without dropout."""
    return _linear(mlp.fc2, _gelu(_linear(mlp.fc1, _norm(mlp.norm, x))))


def _mbconv(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `MBConv`: widen, depthwise convolution, narrow, and the shortcut."""
    x = _gelu(_conv_bn(block.conv1, x_BHWC))
    x = _gelu(_conv_bn(block.conv2, x))
    return _gelu(_conv_bn(block.conv3, x) + x_BHWC)


def _patch_merging(merging: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `PatchMerging`: to half the rows and columns."""
    x = _gelu(_conv_bn(merging.conv1, x_BHWC))
    x = _gelu(_conv_bn(merging.conv2, x))
    return _conv_bn(merging.conv3, x)


def _attention_block(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `TinyViTBlock`: window attention, depthwise convolution, MLP; without dropout."""
    attention = _tiled_attention if _eager_cpu(x_BHWC) else _padded_attention
    x = x_BHWC + attention(block.attn, x_BHWC, block.window_size)
    x = _conv_bn(block.local_conv, x)
    return x + _mlp(block.mlp, x)


def _padded_attention(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    """Attention in windows, the map padded to whole ones.

    The padding is zero before the norm and takes part in the attention, as in the stock encoder.
    """
    H, W = x_BHWC.shape[1:3]
    # Not -(-H // window): ONNX divides towards 0.
    rows, columns = (H + window - 1) // window, (W + window - 1) // window
    x = F.pad(x_BHWC, (0, 0, 0, columns * window - W, 0, rows * window - H))
    qkv_BHWC = _linear(attn.qkv, _norm(attn.norm, x))

    def gather() -> tuple[Tensor]:
        # CUDA's kernel reads a bias in lines of 8, and would make a padded copy at each call.
        bias_ALK = _bias(attn)
        return (F.pad(bias_ALK, (0, -(window**2) % 8)) if x.is_cuda else bias_ALK,)

    (bias_ALK,) = derived(attn, [attn.attention_biases, attn.attention_bias_idxs], gather)
    x = _attend(attn, qkv_BHWC, window, window, bias_ALK[..., : window**2])
    return _linear(attn.proj, x[:, :H, :W])


def _tiled_attention(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    """`_padded_attention` without the padding, which at 512 px is a fifth to two fifths of a map.

    All padded pixels have the same key and value. To the pixels of a window they act as one key,
    whose bias is the logarithm of the summed exponentials of their biases.
    """
    qkv_BHWC = _linear(attn.qkv, _norm(attn.norm, x_BHWC))
    bias_ALK = _bias(attn)
    strips = []
    for strip_BHWC in _whole_and_rest(qkv_BHWC, 1, window):
        parts = []
        for part_BHWC in _whole_and_rest(strip_BHWC, 2, window):
            height, width = (min(side, window) for side in part_BHWC.shape[1:3])
            if height == width == window:
                part_BHWC = _attend(attn, part_BHWC, window, window, bias_ALK)
            else:
                bias = _cut_bias(bias_ALK, window, height, width)
                padded_C = _linear(attn.qkv, attn.norm.bias)  # the norm of 0 is its bias
                part_BHWC = _attend(attn, part_BHWC, height, width, bias, padded_C)
            parts.append(part_BHWC)
        strips.append(torch.cat(parts, dim=2))
    return _linear(attn.proj, torch.cat(strips, dim=1))


def _whole_and_rest(x: Tensor, dim: int, window: int) -> list[Tensor]:
    """x cut along `dim` into its whole windows and the rest; without those that are empty."""
    rest = x.shape[dim] % window
    return [part for part in x.split([x.shape[dim] - rest, rest], dim) if part.shape[dim]]


def _bias(attn: nn.Module) -> Tensor:
    """The bias of each pair of pixels of a whole window, (A, L, K)."""
    return attn.attention_biases[:, attn.attention_bias_idxs]


def _cut_bias(bias_ALK: Tensor, window: int, height: int, width: int) -> Tensor:
    """The biases of a window cut to height x width pixels, (A, L, K + 1).

    The last one is that of all pixels outside of the cut together.
    """
    bias_Ayxyx = bias_ALK.view(-1, window, window, window, window)
    bias_ALyx = bias_Ayxyx[:, :height, :width].flatten(1, 2)
    inside_ALK = bias_ALyx[:, :, :height, :width].flatten(2)
    below_ALK = bias_ALyx[:, :, height:].flatten(2)
    beside_ALK = bias_ALyx[:, :, :height, width:].flatten(2)
    outside_ALK = torch.cat([below_ALK, beside_ALK], dim=2)
    return torch.cat([inside_ALK, outside_ALK.logsumexp(2, keepdim=True)], dim=2)


def _attend(
    attn: nn.Module,
    qkv_BHWC: Tensor,
    height: int,
    width: int,
    bias_ALK: Tensor,
    padded_C: Tensor | None = None,
) -> Tensor:
    """Attention within each tile of height x width pixels, (B, H, W, C).

    `padded_C` is the query, key and value of a padded pixel, one more key for each tile.
    """
    B, H, W, _ = qkv_BHWC.shape
    rows, columns = H // height, W // width
    sizes = [attn.key_dim, attn.key_dim, attn.d]
    tiles = qkv_BHWC.view(B, rows, height, columns, width, attn.num_heads, -1)
    tiles = tiles.permute(0, 1, 3, 5, 2, 4, 6)
    qkv_NALD = tiles.reshape(B * rows * columns, attn.num_heads, height * width, -1)
    q_NALD, k_NAKD, v_NAKD = qkv_NALD.split(sizes, dim=3)
    if padded_C is not None:
        _, k_A1D, v_A1D = padded_C.view(attn.num_heads, 1, -1).split(sizes, dim=2)
        k_NAKD = torch.cat([k_NAKD, k_A1D.expand(len(k_NAKD), -1, -1, -1)], dim=2)
        v_NAKD = torch.cat([v_NAKD, v_A1D.expand(len(v_NAKD), -1, -1, -1)], dim=2)
    bias_1ALK = bias_ALK.to(q_NALD.dtype)[None]
    if q_NALD.device.type == "cpu" and q_NALD.dtype.itemsize == 2:
        # There the fused kernel's backward pass takes 3 to 6 times as long (torch 2.15).
        scores_NALK = (q_NALD * attn.scale) @ k_NAKD.transpose(2, 3) + bias_1ALK
        x_NALD = torch.softmax(scores_NALK, dim=3).to(v_NAKD.dtype) @ v_NAKD
    else:
        with sdpa_kernel(_KERNELS) if q_NALD.is_cuda else nullcontext():
            x_NALD = F.scaled_dot_product_attention(
                q_NALD, k_NAKD, v_NAKD, attn_mask=bias_1ALK, scale=attn.scale
            )
    x = x_NALD.unflatten(2, (height, width)).unflatten(0, (B, rows, columns))
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, attn.dh)
