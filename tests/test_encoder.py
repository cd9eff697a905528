"""The encoder against stock `mobile_sam`, on weights whose biases and statistics are not zeros and ones."""

import copy

import pytest
import torch
from torch import nn

from nucsam import lora
from nucsam.base import Base, build_sam, state_sha256
from nucsam.encoder import Encoder
from nucsam.model import calibrated

ATTENTION = r"attn\.(qkv|proj)$"


def scrambled_sam(seed: int = 0) -> nn.Module:
    """Stock MobileSAM, with affine weights, biases, attention biases and running statistics drawn at random."""
    sam = build_sam(seed)
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in sam.image_encoder.state_dict().items():
            if name.endswith(("running_var", "bn.weight", "norm.weight")):
                uniform(tensor, 0.5, 1.5)
            elif name.endswith(("running_mean", "attention_biases", "bias")):
                uniform(tensor, -0.5, 0.5)
    return sam.eval()  # after the change, since stock attention gathers its biases here


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return scrambled_sam()


def fresh(sam: nn.Module, **options) -> Encoder:
    return Encoder(copy.deepcopy(sam.image_encoder), **options)


def stock_maps(tiny_vit: nn.Module, sam: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Normalised images, s2, s4, s8, s16, s16b, embedding; sizes in the stock modules are set to those of `images`."""
    B, _, H, W = images.shape
    images = (images - sam.pixel_mean) / sam.pixel_std
    x = tiny_vit.patch_embed.seq[:2](images)
    maps = [images, x]
    x = tiny_vit.patch_embed.seq[2](x)
    for layer, stride in zip(tiny_vit.layers, (4, 8, 16, 16), strict=True):
        size = H // stride, W // stride
        for block in layer.blocks:
            block.input_resolution = size
            x = block(x)
        maps.append(x if x.ndim == 4 else x.transpose(1, 2).reshape(B, -1, *size))
        if layer.downsample is not None:
            layer.downsample.input_resolution = size
            x = layer.downsample(x)
    return [*maps, tiny_vit.neck(maps[-1])]


def some_images(B: int, H: int, W: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 255


def backward(encoder: Encoder, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The embedding and the gradient of every trained parameter, for a fixed gradient of the embedding."""
    embedding = encoder.embed(encoder(images))
    embedding.backward(torch.linspace(-1, 1, embedding.numel()).view_as(embedding))
    return embedding.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}


def assert_same_gradients(found: dict, expected: dict, relative: float = 1e-4):
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error <= relative, (name, error)


def test_equals_stock_at_1024(sam):
    images = some_images(1, 1024, 1024)
    with torch.no_grad():
        expected = sam.image_encoder(sam.preprocess(images))
        encoder = fresh(sam)
        found = encoder.embed(encoder(images))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("H", "W"), [(64, 64), (96, 160), (256, 256), (512, 512)])
def test_equals_stock_at_every_scale_and_size(sam, H, W):
    images = some_images(2 if H < 512 else 1, H, W)
    encoder = fresh(sam)
    with torch.no_grad():
        expected = stock_maps(copy.deepcopy(sam.image_encoder), sam, images)
        features = encoder(images)
        found = [*features, encoder.embed(features)]
    strides, channels = (1, 2, 4, 8, 16, 16, 16), (3, 32, 64, 128, 160, 320, 256)
    for ours, stock, stride, C in zip(found, expected, strides, channels, strict=True):
        assert ours.shape == (len(images), C, H // stride, W // stride)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-5)


def test_other_sizes_are_refused(sam):
    with pytest.raises(ValueError, match="96 x 100 px, expected multiples of 32"):
        fresh(sam)(torch.zeros(1, 3, 96, 100))


def test_state_keys_are_stock_ones_without_the_dead_head(sam):
    encoder = fresh(sam)
    stock = {k: v for k, v in sam.image_encoder.state_dict().items() if not k.startswith(("head.", "norm_head."))}
    assert encoder.state_dict().keys() == stock.keys()
    encoder(some_images(1, 64, 64))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, stock[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_everything_equal_stock(sam, training):
    """Folded BatchNorms, fused attention and its biases, all trained, against the stock modules unfolded."""
    images = some_images(2, 64, 96)
    encoder = fresh(sam).train(training)
    embedding, found = backward(encoder, images)

    tiny_vit = copy.deepcopy(sam.image_encoder).train()  # stock gathers its biases with a gradient only there
    for module in tiny_vit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = stock_maps(tiny_vit, sam, images)[-1]
    expected.backward(torch.linspace(-1, 1, expected.numel()).view_as(expected))
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)
    dead = ("head.", "norm_head.")
    gradients = {name: p.grad for name, p in tiny_vit.named_parameters() if not name.startswith(dead)}
    assert_same_gradients(found, gradients)


def adapted(sam: nn.Module, pattern: str = ATTENTION, **options) -> Encoder:
    """An encoder with LoRA, B drawn at random, and all else frozen, in training mode."""
    encoder = fresh(sam, **options).requires_grad_(False)
    torch.manual_seed(0)
    lora.inject(encoder, pattern, rank=4, alpha=4)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return encoder.train()


def test_adapter_gradients_equal_those_of_stock_modules(sam):
    images = some_images(2, 64, 96)
    embedding, found = backward(adapted(sam), images)

    tiny_vit = copy.deepcopy(sam.image_encoder)
    encoder = adapted(sam)
    tiny_vit.layers = encoder.layers
    tiny_vit.eval()
    expected = stock_maps(tiny_vit, sam, images)[-1]
    expected.backward(torch.linspace(-1, 1, expected.numel()).view_as(expected))
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)
    assert_same_gradients(found, {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad})


def saved_bytes(forward, module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in storages.values())


def test_keeps_less_for_backward_than_stock(sam):
    images = some_images(1, 256, 256)
    encoder, tiny_vit = adapted(sam), copy.deepcopy(sam.image_encoder)
    ours = saved_bytes(lambda: encoder.embed(encoder(images)), encoder)
    tiny_vit.layers, tiny_vit.neck = encoder.layers, encoder.neck
    tiny_vit.eval()
    stock = saved_bytes(lambda: stock_maps(tiny_vit, sam, images), tiny_vit)
    assert ours <= 0.75 * stock
    light = adapted(sam, checkpoint=True)
    assert saved_bytes(lambda: light.embed(light(images)), light) <= 0.3 * ours


@pytest.mark.parametrize("pattern", [ATTENTION, r"(qkv|proj|fc1|fc2)$"])
def test_checkpoint_changes_nothing(sam, pattern):
    images = some_images(2, 64, 96)
    embedding, expected = backward(adapted(sam, pattern), images)
    recomputed, found = backward(adapted(sam, pattern, checkpoint=True), images)
    assert torch.equal(recomputed, embedding)
    assert_same_gradients(found, expected, relative=1e-6)


def test_batchnorms_are_pinned(sam):
    encoder = fresh(sam).train()
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 27
    before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
    nn.Sequential(encoder).train()  # also from outside
    encoder(some_images(2, 64, 64))
    assert encoder.training
    assert not any(norm.training for norm in norms)
    for name, tensor in encoder.named_buffers():
        assert torch.equal(tensor, before[name]), name


def test_moving_batchnorms_are_stock_ones(sam):
    """Two training steps' features, gradients and running statistics are those of the stock modules."""
    tiny_vit = copy.deepcopy(sam.image_encoder).train()
    encoder = fresh(sam, moving=True).train()
    stock = {name: module for name, module in tiny_vit.named_modules() if isinstance(module, nn.BatchNorm2d)}
    own = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert stock.keys() == own.keys() and len(own) == 27
    for seed in range(2):
        images = some_images(2, 64, 96, seed=seed)
        expected = stock_maps(tiny_vit, sam, images)
        found = encoder(images)
        for one, other in zip(found, expected[: len(found)]):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    for name, norm in own.items():
        torch.testing.assert_close(norm.running_mean, stock[name].running_mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, stock[name].running_var, atol=1e-4, rtol=1e-3)
    before = {name: norm.running_var.clone() for name, norm in own.items()}
    encoder.eval()(images)
    assert all(torch.equal(before[name], norm.running_var) for name, norm in own.items())


def test_nothing_is_stale_after_a_load(sam):
    other, images = scrambled_sam(1), some_images(1, 64, 64)
    with torch.no_grad():
        expected = stock_maps(other.image_encoder, other, images)[-1]
        for mode in (True, False):
            encoder = fresh(sam).train(mode).train(mode)
            assert not any(name.endswith(".ab") for name, _ in encoder.named_buffers())
            before = encoder.embed(encoder(images))
            encoder.load_state_dict(fresh(other).state_dict())
            after = encoder.embed(encoder(images))
            torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
            assert (after - before).abs().max() > 0.1


def test_bfloat16_autocast_is_near(sam):
    encoder, images = adapted(sam), some_images(1, 64, 64)
    expected, gradients = backward(encoder, images)
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images)
        embedding = encoder.embed(features)
    assert features.s16b.dtype == torch.bfloat16
    error = (embedding.float() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1
    embedding.float().backward(torch.linspace(-1, 1, embedding.numel()).view_as(embedding))
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32
            assert torch.cosine_similarity(parameter.grad.flatten(), gradients[name].flatten(), dim=0) > 0.9, name


def test_half_precision_images_and_non_contiguous_ones(sam):
    encoder, images = fresh(sam), some_images(2, 64, 96)
    with torch.no_grad():
        expected = encoder(images).s16b
        strided = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(encoder(strided).s16b, expected, atol=1e-4, rtol=0)
        flipped = encoder(images.transpose(2, 3)).s16b
    assert flipped.shape == expected.transpose(2, 3).shape


def test_a_calibrated_base_has_the_statistics_of_one_stock_step_in_training_mode():
    """Random base weights: what stock BatchNorms, with momentum 1, take from the same batch."""
    sam, images = build_sam(5), some_images(2, 64, 96)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    base = calibrated(Base(before, "", "none", {}), images)
    assert base.sha256 == state_sha256(base.state) and base.state.keys() == before.keys()
    tiny_vit = copy.deepcopy(sam.image_encoder).train()
    for module in tiny_vit.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        stock_maps(tiny_vit, sam, images)
    expected = {f"image_encoder.{name}": tensor for name, tensor in tiny_vit.state_dict().items()}
    for name, tensor in base.state.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]), atol=1e-4, rtol=1e-3)
    moved = base.state["image_encoder.layers.3.blocks.1.local_conv.bn.running_mean"]
    assert (moved.abs() > 0).all()


def test_is_one_graph_for_the_compiler(sam):
    encoder, images = adapted(sam), some_images(1, 64, 96)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).s16b, encoder(images).s16b, atol=1e-4, rtol=0)


def test_exports_with_any_batch_and_size(sam):
    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = fresh(sam).requires_grad_(False)

        def forward(self, images):
            return self.encoder.embed(self.encoder(images))

    model = Embedding().eval()
    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    shape = {"images": {0: torch.export.Dim("batch"), 2: 32 * rows, 3: 32 * columns}}
    program = torch.export.export(model, (some_images(2, 256, 320),), dynamic_shapes=shape).module()
    for B, H, W in ((1, 320, 256), (3, 288, 384)):
        images = some_images(B, H, W)
        torch.testing.assert_close(program(images), model(images), atol=1e-4, rtol=0)
