"""MobileSAM as the `mobile_sam` package has it, at any image size: what nucsam is compared with."""

from torch import Tensor, nn

from nucsam.base import Base, build_sam


def stock_sam(base: Base, side: int) -> nn.Module:
    """The package's Sam with the base's weights, its image and prompt encoders set to images of `side` px; frozen."""
    sam = build_sam()
    sam.load_state_dict(base.state)
    vit, prompts = sam.image_encoder, sam.prompt_encoder
    for stage, scale in zip((vit.patch_embed.seq[1], *vit.layers), (2, 4, 8, 16, 16)):
        for part in stage.modules():
            if hasattr(part, "input_resolution"):
                part.input_resolution = (side // scale, side // scale)
    prompts.image_embedding_size, prompts.input_image_size = (side // 16, side // 16), (side, side)
    return sam.requires_grad_(False).eval()


def embed(sam: nn.Module, images: Tensor) -> Tensor:
    """RGB float images (B, 3, side, side), 0..255 -> (B, 256, side / 16, side / 16): TinyViT's forward, whose neck is
    written for 1024 px, at any side."""
    vit, x = sam.image_encoder, (images - sam.pixel_mean) / sam.pixel_std
    x = vit.patch_embed(x)
    for layer in vit.layers:
        x = layer(x)
    side = images.shape[-1] // 16
    return vit.neck(x.transpose(1, 2).unflatten(2, (side, side)))
