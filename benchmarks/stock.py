"""MobileSAM of the `mobile_sam` package at any image size: nucsam's peer."""

from torch import Tensor, nn

from nucsam.model.weights import Base, build_sam


def stock_sam(base: Base, side: int) -> nn.Module:
    """The package's Sam with the weights of `base`, frozen, for images of `side` px."""
    sam = build_sam()
    sam.load_state_dict(base.state)
    vit, prompts = sam.image_encoder, sam.prompt_encoder
    for stage, stride in zip((vit.patch_embed.seq[1], *vit.layers), (2, 4, 8, 16, 16)):
        for block in stage.modules():
            if hasattr(block, "input_resolution"):
                block.input_resolution = (side // stride, side // stride)
    prompts.image_embedding_size = (side // 16, side // 16)
    prompts.input_image_size = (side, side)
    return sam.requires_grad_(False).eval()


def embed(sam: nn.Module, images: Tensor) -> Tensor:
    """TinyViT's forward pass at any side; the package's own reshapes for 1024 px.

    Args:
        sam: of `stock_sam`.
        images: RGB float (B, 3, side, side), 0..255.

    Returns:
        (B, 256, side / 16, side / 16)
    """
    vit = sam.image_encoder
    x = vit.patch_embed((images - sam.pixel_mean) / sam.pixel_std)
    for layer in vit.layers:
        x = layer(x)
    side = images.shape[-1] // 16
    return vit.neck(x.transpose(1, 2).unflatten(2, (side, side)))
