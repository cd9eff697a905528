"""The bases: each encoder that `model.encoder` names, and its published weights.

An encoder is an `nn.Module` whose parameters have the names of the published file. It has

- `maps`: (stride, channels) of each map that it gives, strides in model px;
- `forward(images)`: RGB float (B, 3, H, W), 0..255 -> the normalised images and those maps;
- `embed(features)`: SAM's image embedding of what `forward` returns, for SAM's mask decoder;
- `moving`: whether its BatchNorms learn.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

PATTERNS = {  # family -> linear layers that get LoRA by default
    "tiny_vit": r"image_encoder\..*\.attn\.(qkv|proj)",
    "vit": r"image_encoder\..*\.(attn\.(qkv|proj)|mlp\.(fc|lin)[12])",
}


@dataclass(frozen=True)
class Published:
    """An encoder and the file of its published weights."""

    name: str  # of the model, in texts
    stock: Callable[[], Any]  # an `nn.Module` with the tensors of the file, drawn at random
    family: str  # of `network.FAMILIES`: what runs the stock `image_encoder`
    file: str
    licence: str
    size: int = 0  # bytes
    sha256: str = ""  # "" = no address is known to serve the file: it must be given as a path
    urls: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # of the family
    part: str = ""  # entry of the file that holds the tensors; "" = the file holds nothing else

    @property
    def pattern(self) -> str:
        return PATTERNS[self.family]


def _sam(size: str) -> Any:
    from mobile_sam.build_sam import sam_model_registry

    return sam_model_registry[size]()


def _lite_medsam() -> Any:
    """MobileSAM with 1 x 1 convolutions in the stem and without a classifier."""
    from torch import nn

    sam = _sam("vit_t")
    vit = sam.image_encoder
    vit.patch_embed.seq[0].c = nn.Conv2d(3, 32, 1, bias=False)
    vit.patch_embed.seq[2].c = nn.Conv2d(32, 64, 1, bias=False)
    del vit.head, vit.norm_head
    return sam


def _efficient_sam(width: int) -> Any:
    """EfficientSAM's encoder alone: no package that nucsam needs has its decoder.

    Source: github.com/yformer/EfficientSAM, efficient_sam/efficient_sam_encoder.py.
    """
    import torch
    from mobile_sam.modeling import ImageEncoderViT
    from torch import nn

    norm = partial(nn.LayerNorm, eps=1e-6)
    vit = ImageEncoderViT(embed_dim=width, num_heads=width // 64, norm_layer=norm)
    vit.pos_embed = nn.Parameter(torch.zeros(1, 1 + 14 * 14, width))  # class token, 224 px
    nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    for block in vit.blocks:
        wide, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        block.mlp = nn.Sequential(OrderedDict(fc1=wide, act=nn.GELU(), fc2=narrow))
    sam = nn.Module()
    sam.image_encoder = vit
    return sam.eval()


_GITHUB = "https://github.com"
_HUB = "https://huggingface.co"

BASES = {  # `model.encoder` -> what it is
    "mobile_sam": Published(
        name="MobileSAM",
        stock=partial(_sam, "vit_t"),
        family="tiny_vit",
        file="mobile_sam.pt",
        licence="Apache-2.0",
        size=40_728_226,
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        urls=(
            f"{_GITHUB}/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            f"{_HUB}/ChaoningZhang/MobileSAM/resolve/main/mobile_sam.pt",
        ),
    ),
    "tiny_sam": Published(
        name="TinySAM",
        stock=partial(_sam, "vit_t"),
        family="tiny_vit",
        file="tinysam.pth",
        licence="Apache-2.0",
        sha256="4b8edcf93af46e2a658ae455574de62873778a5cc3fd8e8adf094dcdfa957cf2",
        urls=(
            f"{_GITHUB}/xinghaochen/TinySAM/releases/download/1.0/tinysam.pth",
            f"{_HUB}/xinghaochen/tinysam/resolve/main/tinysam.pth",
        ),
    ),
    "lite_medsam": Published(
        name="LiteMedSAM",
        stock=_lite_medsam,
        family="tiny_vit",
        options={"quarter": True},
        file="lite_medsam.pth",
        licence="Apache-2.0",
        size=39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        urls=(f"{_HUB}/GleghornLab/medsam-vit-b/resolve/main/lite_medsam.pth",),
    ),
    "sam_vit_b": Published(
        name="SAM ViT-B",
        stock=partial(_sam, "vit_b"),
        family="vit",
        file="sam_vit_b_01ec64.pth",
        licence="Apache-2.0",
        size=375_042_383,
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        urls=("https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",),
    ),
    "efficient_sam_ti": Published(
        name="EfficientSAM-Ti",
        stock=partial(_efficient_sam, 192),
        family="vit",
        file="efficient_sam_vitt.pt",
        licence="Apache-2.0",
        size=40_982_470,
        sha256="dff858b19600a46461cbb7de98f796b23a7a888d9f5e34c0b033f7d6eb9e4e6a",
        urls=(
            f"{_GITHUB}/yformer/EfficientSAM/raw/main/weights/efficient_sam_vitt.pt",
            f"{_HUB}/merve/EfficientSAM/resolve/main/efficient_sam_vitt.pt",
        ),
        part="model",
    ),
    "efficient_sam_s": Published(
        name="EfficientSAM-S",
        stock=partial(_efficient_sam, 384),
        family="vit",
        file="efficient_sam_vits.pt",
        licence="Apache-2.0",
        part="model",
    ),
}
