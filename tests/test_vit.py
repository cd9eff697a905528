"""The plain transformers: SAM's against stock `mobile_sam`, EfficientSAM's against timm."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_encoder import assert_same_gradients, embed_and_grade, gradients, some_images
from torch import Tensor, nn

from nucsam.config import Model
from nucsam.errors import UserError
from nucsam.export.graph import Graph, write_graph
from nucsam.model.heads import InstanceHead
from nucsam.model.network import build_model
from nucsam.model.vit import ViT
from nucsam.model.weights import build_sam, random_base


def scrambled(vit: nn.Module) -> nn.Module:
    """The module with biases, norms and positions drawn at random, which begin as 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vit.named_parameters():
        if parameter.ndim < 2 or "pos" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vit.eval()


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """SAM's stock encoder with four blocks of 64 channels: two with windows, two without."""
    build_sam()  # imports mobile_sam without its warnings
    from mobile_sam.modeling import ImageEncoderViT

    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    options = {"use_rel_pos": True, "window_size": 14, "global_attn_indexes": (1, 3)}
    return scrambled(
        ImageEncoderViT(embed_dim=64, depth=4, num_heads=2, norm_layer=norm, **options)
    )


def fresh(stock: nn.Module, **options) -> ViT:
    return ViT(copy.deepcopy(stock), **options)


def stock_maps(vit: nn.Module, images: Tensor) -> list[Tensor]:
    """The images as stock SAM normalises them, the maps of each block, and the embedding."""
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    size = [side // 16 for side in images.shape[2:]]
    positions = F.interpolate(vit.pos_embed.permute(0, 3, 1, 2), size=size, mode="bicubic")
    x, maps = vit.patch_embed(images) + positions.permute(0, 2, 3, 1), [images]
    for block in vit.blocks:
        x = block(x)
        maps.append(x.permute(0, 3, 1, 2))
    return [*maps, vit.neck(maps[-1])]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1024, 1024), (2, 64, 64), (2, 96, 320)])
def test_equals_stock_at_its_own_size_and_at_others(stock, size):
    images, vit = some_images(*size), fresh(stock)
    features = vit(images)
    expected = stock_maps(stock, images)
    for ours, theirs in zip([*features, vit.embed(features)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert [(16, 64)] * 4 == list(vit.maps) == [(16, x.shape[1]) for x in features[1:]]
    if size[1] == 1024:  # nothing is resized
        theirs = stock(expected[0])
        torch.testing.assert_close(vit.embed(features), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_equal_stock(stock, checkpoint):
    images = some_images(1, 64, 256)
    embedding, ours = embed_and_grade(fresh(stock, checkpoint=checkpoint).train(), images)
    theirs = copy.deepcopy(stock)
    expected = stock_maps(theirs, images)[-1]
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=1e-4)
    assert_same_gradients(ours, gradients(expected, theirs))


def test_onnxruntime_gives_the_maps_of_windows_and_resized_positions(stock, tmp_path):
    """At two sizes, of which the graph has seen one; a larger difference raises."""
    net = build_model(Model(width=32), random_base(0), seed=0).eval()
    net.image_encoder = fresh(stock)
    net.head = InstanceHead(32, net.image_encoder.maps).eval()
    assert write_graph(tmp_path / "vit.onnx", Graph(net, 2.0), {}) < 1e-4


def test_other_sizes_are_refused(stock):
    with pytest.raises(UserError, match="images"):
        fresh(stock)(torch.zeros(1, 3, 96, 100))


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_efficient_sam_equals_an_independent_vision_transformer(size):
    """timm's, which has the same blocks and, at 224 px, the same positions."""
    from timm.models.vision_transformer import VisionTransformer

    sam = build_sam(1, "efficient_sam_ti")
    state = scrambled(sam.image_encoder).state_dict()
    shape = {"img_size": size, "embed_dim": 192, "num_heads": 3}
    theirs = VisionTransformer(class_token=False, global_pool="avg", num_classes=0, **shape)
    positions = state["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    grid = [side // 16 for side in size]
    positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
    wanted = {name: t for name, t in state.items() if not name.startswith("neck.")}
    wanted["pos_embed"] = positions.flatten(2).transpose(1, 2)
    missing, unexpected = theirs.load_state_dict(wanted, strict=False)
    assert set(missing) <= {"fc_norm.weight", "fc_norm.bias"} and not unexpected
    vit = ViT(sam.image_encoder)
    image, *maps = vit(some_images(2, *size))
    expected = theirs.eval().forward_intermediates(
        image, indices=[2, 5, 8, 11], intermediates_only=True
    )
    for ours, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
