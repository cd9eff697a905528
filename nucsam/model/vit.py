"""The plain vision transformers of SAM (ViT-B) and EfficientSAM, at any input size.

Sources: Kirillov et al., 2023, arXiv 2304.02643; Xiong et al., 2023, arXiv 2312.00863. The weights
stay in the modules of the `mobile_sam` package, under their published names. Embeddings of absolute
and relative positions are resized to the map at hand.

Shape suffixes: B images, H W rows and columns of tokens, C channels, N tiles of all images, L
tokens of a tile, A attention heads, D channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucsam.model.pixels import Features, Pixels, run_block

STRIDE = 16
DEPTHS = 4  # maps, evenly spaced over the blocks, as CellViT takes them (arXiv 2306.15350)


class ViT(nn.Module):
    """A vision transformer, equal to the stock encoder at its own size within float error.

    All of its maps lie at stride 16. The head makes the finer ones of the image.

    Args:
        vit: `mobile_sam`'s `ImageEncoderViT`, or one with EfficientSAM's position embedding, whose
            modules the encoder takes over.
        checkpoint: recompute each block in the backward pass instead of keeping its activations.
        moving: without effect, because it has no BatchNorm.
    """

    moving = False

    def __init__(self, vit: nn.Module, *, checkpoint: bool = False, moving: bool = False) -> None:
        super().__init__()
        self.pixels = Pixels()
        self.patch_embed = vit.patch_embed
        self.pos_embed = vit.pos_embed
        self.blocks = vit.blocks
        self.neck = vit.neck
        self.checkpoint = checkpoint
        self.maps = ((STRIDE, vit.pos_embed.shape[-1]),) * DEPTHS
        self.train(vit.training)

    def forward(self, images: Tensor) -> Features:
        """RGB float (B, 3, H, W), 0..255 -> as `Encoder.forward`."""
        image = self.pixels(images)
        x_BHWC = self.patch_embed(image)
        x_BHWC = x_BHWC + self._positions(*x_BHWC.shape[1:3])
        features = [image]
        for i, block in enumerate(self.blocks, 1):
            x_BHWC = run_block(_block, block, x_BHWC, self.checkpoint)
            if i % (len(self.blocks) // DEPTHS) == 0:
                features.append(x_BHWC.permute(0, 3, 1, 2))
        return tuple(features)

    def embed(self, features: Features) -> Tensor:
        """SAM's image embedding, (B, 256, H/16, W/16): the input of the mask decoder."""
        return self.neck(features[-1])

    def _positions(self, H: int, W: int) -> Tensor:
        """The position embedding of H x W tokens, (1, H, W, C); bicubic, as EfficientSAM resizes.

        EfficientSAM's, (1, 1 + L, C), begins with that of a class token, which it does not have.
        """
        x = self.pos_embed
        if x.ndim == 3:
            side = round((x.shape[1] - 1) ** 0.5)
            x = x[:, 1:].unflatten(1, (side, side))
        x = F.interpolate(x.permute(0, 3, 1, 2), size=(H, W), mode="bicubic")
        return x.permute(0, 2, 3, 1)


def _block(block: nn.Module, x_BHWC: Tensor) -> Tensor:
    """A stock `Block`: attention in windows or over the whole map, and MLP."""
    x = block.norm1(x_BHWC)
    window = block.window_size
    x = _windows(block.attn, x, window) if window else _attend(block.attn, x)
    x_BHWC = x_BHWC + x
    return x_BHWC + block.mlp(block.norm2(x_BHWC))


def _windows(attn: nn.Module, x_BHWC: Tensor, window: int) -> Tensor:
    """Attention in windows. The map is padded to whole ones with zeros, which take part in it."""
    B, H, W, C = x_BHWC.shape
    # Not -(-H // window): ONNX divides towards 0.
    rows, columns = (H + window - 1) // window, (W + window - 1) // window
    x = F.pad(x_BHWC, (0, 0, 0, columns * window - W, 0, rows * window - H))
    tiles = x.view(B, rows, window, columns, window, C).transpose(2, 3)
    x = _attend(attn, tiles.reshape(B * rows * columns, window, window, C))
    x = x.view(B, rows, columns, window, window, C).transpose(2, 3)
    return x.reshape(B, rows * window, columns * window, C)[:, :H, :W]


def _attend(attn: nn.Module, x_NHWC: Tensor) -> Tensor:
    """Attention over each map, (N, H, W, C)."""
    N, H, W, C = x_NHWC.shape
    qkv = attn.qkv(x_NHWC).view(N, H * W, 3, attn.num_heads, -1)
    q_NALD, k_NALD, v_NALD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q_NALD, D = q_NALD * attn.scale, v_NALD.shape[-1]
    if attn.use_rel_pos:
        q_NALD, k_NALD = _with_places(attn, q_NALD, k_NALD, H, W)
        v_NALD = F.pad(v_NALD, (0, q_NALD.shape[-1] - D))  # fused kernels need equal widths
    x_NALD = F.scaled_dot_product_attention(q_NALD, k_NALD, v_NALD, scale=1.0)[..., :D]
    return attn.proj(x_NALD.transpose(1, 2).reshape(N, H, W, C))


def _with_places(
    attn: nn.Module, q_NALD: Tensor, k_NALD: Tensor, H: int, W: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys with H + W more channels, whose products are the biases by distance.

    A query has its bias to each row and to each column, and a key a 1 at its own two. A bias of
    each pair of tokens, as stock adds, takes 1.4 times the memory in bf16 and 1.5 times the time.
    """
    q = q_NALD.unflatten(2, (H, W)) / attn.scale
    to_rows = torch.einsum("nahwd,hkd->nahwk", q, _distances(attn.rel_pos_h, H))
    to_columns = torch.einsum("nahwd,wkd->nahwk", q, _distances(attn.rel_pos_w, W))
    rows_H, columns_W = torch.arange(H, device=q.device), torch.arange(W, device=q.device)
    # Sums that broadcast, because ONNX can neither repeat nor divide by sizes that are not known.
    row_HW1 = (rows_H[:, None] + 0 * columns_W)[..., None]
    column_HW1 = (columns_W + 0 * rows_H[:, None])[..., None]
    places = torch.cat([row_HW1 == rows_H, column_HW1 == columns_W], dim=2).flatten(0, 1)
    places = places.to(k_NALD.dtype)
    queries = torch.cat([q_NALD, to_rows.flatten(2, 3), to_columns.flatten(2, 3)], dim=3)
    keys = F.pad(k_NALD, (0, H + W)) + F.pad(places, (k_NALD.shape[-1], 0))
    return queries, keys


def _distances(table: Tensor, side: int) -> Tensor:
    """Embeddings of the distances between `side` tokens in a row, (side, side, D)."""
    x = F.interpolate(table.t()[None], size=2 * side - 1, mode="linear")[0].t()
    place = torch.arange(side, device=table.device)
    return x[place[:, None] - place + side - 1]
