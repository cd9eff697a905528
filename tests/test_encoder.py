"""The encoder against stock `mobile_sam`, on weights whose biases and statistics are random."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nucsam.errors import UserError
from nucsam.model import lora
from nucsam.model.encoder import Encoder, Features
from nucsam.model.network import calibrated
from nucsam.model.weights import Base, build_sam, state_sha256

ATTENTION = r"attn\.(qkv|proj)$"


def scrambled_sam(seed: int = 0) -> nn.Module:
    """Stock MobileSAM, with affine weights, biases and running statistics drawn at random."""
    sam = build_sam(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sam.image_encoder.state_dict().items():
        if name.endswith(("running_var", "bn.weight", "norm.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "attention_biases", "bias")):
            tensor.uniform_(-0.5, 0.5, generator=generator)
    return sam.eval()  # after the change, since stock attention gathers its biases here


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return scrambled_sam()


def fresh(sam: nn.Module, **options) -> Encoder:
    return Encoder(copy.deepcopy(sam.image_encoder), **options)


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


def stock_maps(tiny_vit: nn.Module, sam: nn.Module, images: Tensor) -> list[Tensor]:
    """The fields of `Features` and the embedding; sets the sizes in the stock modules."""
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


def some_images(B: int, H: int, W: int, seed: int = 0) -> Tensor:
    return torch.rand(B, 3, H, W, generator=torch.Generator().manual_seed(seed)) * 255


def gradients(embedding: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The gradient of every trained parameter, for a fixed gradient of the embedding."""
    embedding.float().backward(torch.linspace(-1, 1, embedding.numel()).view_as(embedding))
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def embed_and_grade(encoder: Encoder, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    embedding = encoder.embed(encoder(images))
    return embedding.detach(), gradients(embedding, encoder)


def assert_same_gradients(ours: dict, expected: dict, relative: float = 1e-4):
    assert ours.keys() == expected.keys()
    assert ours
    for name, gradient in expected.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error <= relative, (name, error)


def norms(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: part for n, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)}


def test_equals_stock_at_1024(sam):
    images = some_images(1, 1024, 1024)
    with torch.no_grad():
        expected = sam.image_encoder(sam.preprocess(images))
        encoder = fresh(sam)
        embedding = encoder.embed(encoder(images))
    assert expected.std() > 0.5
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(2, 64, 64), (2, 96, 160), (2, 256, 256), (1, 512, 512)])
def test_equals_stock_at_every_scale_and_size(sam, size):
    B, H, W = size
    images = some_images(B, H, W)
    encoder = fresh(sam)
    with torch.no_grad():
        expected = stock_maps(copy.deepcopy(sam.image_encoder), sam, images)
        features = encoder(images)
        maps = [*features, encoder.embed(features)]
    strides, channels = (1, 2, 4, 8, 16, 16, 16), (3, 32, 64, 128, 160, 320, 256)
    for ours, stock, stride, C in zip(maps, expected, strides, channels, strict=True):
        assert ours.shape == (B, C, H // stride, W // stride)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [(96, 100), (100, 96)])
def test_other_sizes_are_refused(sam, size):
    with pytest.raises(UserError, match="images"):
        fresh(sam)(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_everything_equal_stock(sam, training):
    """Folded BatchNorms, fused attention and its biases, all trained."""
    images = some_images(2, 64, 96)
    embedding, ours = embed_and_grade(fresh(sam).train(training), images)

    tiny_vit = copy.deepcopy(sam.image_encoder).train()  # else its biases have no gradient
    for norm in norms(tiny_vit).values():
        norm.eval()
    expected = stock_maps(tiny_vit, sam, images)[-1]
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)
    stock = gradients(expected, tiny_vit)
    dead = {name for name in stock if name.startswith(("head.", "norm_head."))}
    assert_same_gradients(ours, {name: stock[name] for name in stock.keys() - dead})


def test_adapter_gradients_equal_those_of_stock_modules(sam):
    images = some_images(2, 64, 96)
    embedding, ours = embed_and_grade(adapted(sam), images)
    encoder, tiny_vit = adapted(sam), copy.deepcopy(sam.image_encoder)
    tiny_vit.layers = encoder.layers
    tiny_vit.eval()
    expected = stock_maps(tiny_vit, sam, images)[-1]
    torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)
    assert_same_gradients(ours, gradients(expected, encoder))


def saved_bytes(forward, module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # With the tensor, so that no address is used twice.
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
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
    embedding, expected = embed_and_grade(adapted(sam, pattern), images)
    recomputed, ours = embed_and_grade(adapted(sam, pattern, checkpoint=True), images)
    assert torch.equal(recomputed, embedding)
    assert_same_gradients(ours, expected, relative=1e-6)


def test_moving_batchnorms_are_stock_ones(sam):
    """Two training steps' features and running statistics."""
    tiny_vit = copy.deepcopy(sam.image_encoder).train()
    encoder = fresh(sam, moving=True).train()
    for seed in range(2):
        images = some_images(2, 64, 96, seed=seed)
        for ours, stock in zip(encoder(images), stock_maps(tiny_vit, sam, images)):
            torch.testing.assert_close(ours, stock, atol=1e-3, rtol=1e-3)
    stock = norms(tiny_vit)
    assert stock.keys() == norms(encoder).keys()
    for name, norm in norms(encoder).items():
        for statistic, tolerance in (("running_mean", 1e-4), ("running_var", 1e-3)):
            ours, expected = (getattr(part, statistic) for part in (norm, stock[name]))
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=tolerance)
    before = {name: norm.running_var.clone() for name, norm in norms(encoder).items()}
    encoder.eval()(images)
    assert all(torch.equal(before[n], norm.running_var) for n, norm in norms(encoder).items())


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


class Calls(TorchDispatchMode):
    """Counts calls of operations by name."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.counts[function._overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def test_frozen_weights_are_folded_and_cast_once(sam):
    """Of 27 convolutions, 40 linear layers and their biases; trained ones are cast each time."""
    encoder, images = adapted(sam), some_images(1, 64, 64)
    counts = []
    for trained in (False, False, True):
        encoder.patch_embed.requires_grad_(trained)
        with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
            encoder(images)
        counts.append(calls.counts)
    assert [c["rsqrt"] for c in counts] == [27, 0, 2]
    assert counts[0]["_to_copy"] - counts[1]["_to_copy"] == 2 * (27 + 40)


def every(features: Features) -> Tensor:
    return torch.cat([map.flatten() for map in features])


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.seq.0.c.weight",
        "layers.0.blocks.1.conv2.bn.weight",
        "layers.1.downsample.conv2.bn.running_mean",
        "layers.2.blocks.3.local_conv.bn.running_var",
        "layers.2.blocks.5.attn.qkv.weight",
        "layers.3.blocks.0.attn.attention_biases",
        "layers.3.blocks.1.mlp.fc1.bias",
    ],
)
def test_a_changed_weight_is_folded_again(sam, name):
    """After a change in place and after a replacement, in the model and in its copy."""
    encoder, images = fresh(sam).requires_grad_(False), some_images(1, 64, 64)
    before = every(encoder(images))
    copied = copy.deepcopy(encoder)
    encoder.state_dict()[name].mul_(1.5)
    changed = every(encoder(images))
    assert not torch.equal(changed, before)
    another = fresh(sam).requires_grad_(False)
    another.load_state_dict(encoder.state_dict())
    assert torch.equal(changed, every(another(images)))
    assert torch.equal(before, every(copied(images)))
    copied.load_state_dict(encoder.state_dict(), assign=True)
    assert torch.equal(changed, every(copied(images)))


def test_statistics_that_training_moved_are_folded_again(sam):
    encoder, images = fresh(sam, moving=True).requires_grad_(False).eval(), some_images(2, 64, 64)
    before = every(encoder(images))
    encoder.train()(images)
    after = every(encoder.eval()(images))
    another = fresh(sam).requires_grad_(False).eval()
    another.load_state_dict(encoder.state_dict())
    assert torch.equal(after, every(another(images)))
    assert not torch.equal(after, before)


def test_bfloat16_autocast_is_near(sam):
    encoder, images = adapted(sam), some_images(1, 64, 64)
    expected, exact = embed_and_grade(encoder, images)
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images)
        embedding = encoder.embed(features)
    assert features[-1].dtype == torch.bfloat16
    error = (embedding.float() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.1
    for name, gradient in gradients(embedding, encoder).items():
        assert gradient.dtype == torch.float32
        likeness = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert likeness > 0.9, name


def test_memory_layout_of_the_images_does_not_matter(sam):
    encoder, images = fresh(sam), some_images(2, 64, 96)
    with torch.no_grad():
        expected = encoder(images)[-1]
        for layout in (images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
            torch.testing.assert_close(encoder(layout)[-1], expected, atol=1e-4, rtol=0)


def test_a_calibrated_base_has_the_statistics_of_one_stock_step_in_training_mode():
    """What stock BatchNorms of random weights, with momentum 1, take from the same batch."""
    sam, images = build_sam(5), some_images(2, 64, 96)
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}
    base = calibrated(Base(before, "", "none", {}), images)
    assert base.sha256 == state_sha256(base.state)
    assert base.source == "none"
    assert base.state.keys() == before.keys()
    tiny_vit = copy.deepcopy(sam.image_encoder).train()
    for norm in norms(tiny_vit).values():
        norm.momentum = 1.0
    with torch.no_grad():
        stock_maps(tiny_vit, sam, images)
    expected = {f"image_encoder.{name}": tensor for name, tensor in tiny_vit.state_dict().items()}
    for name, tensor in base.state.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]), atol=1e-4, rtol=1e-3)
    moved = base.state["image_encoder.layers.3.blocks.1.local_conv.bn.running_mean"]
    assert (moved.abs() > 0).all()
