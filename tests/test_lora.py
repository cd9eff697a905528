"""LoRA: exact at the start, exact when merged, and training what it should and nothing else."""

import copy

import pytest
import torch
from conftest import same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nucsam.model import lora
from nucsam.model.encoder import Encoder
from nucsam.model.weights import build_sam

ALL = r"\.(qkv|proj|fc1|fc2)$"
DECODER = r"(q|k|v|out)_proj$"


def layers(test):
    """Random linear layers, adapters and inputs."""
    side = st.integers(1, 24)
    cases = given(
        base=st.builds(nn.Linear, side, side, bias=st.booleans()),
        rank=st.integers(1, 5),
        alpha=st.sampled_from([0.5, 1, 4, 16]),
        batch=st.lists(st.integers(0, 4), max_size=3),
    )
    return settings(max_examples=40, deadline=None)(cases(test))


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return build_sam(1)


def encoder_of(sam: nn.Module) -> Encoder:
    return Encoder(copy.deepcopy(sam.image_encoder)).requires_grad_(False)


def train_adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    module.requires_grad_(False)
    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    for parameter in adapters.values():
        parameter.requires_grad_(True)
    return adapters


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=generator)


@layers
def test_a_new_layer_is_its_base_bit_for_bit(base, rank, alpha, batch):
    layer = lora.LoRALinear(base, rank=rank, alpha=alpha)
    x = torch.randn(*batch, base.in_features)
    expected = base(x.reshape(-1, base.in_features)).view(*batch, base.out_features)
    assert torch.equal(layer(x), expected)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert layer.lora_A.abs().sum() > 0


@layers
def test_output_and_gradients_follow_the_definition(base, rank, alpha, batch):
    layer = lora.LoRALinear(base, rank=rank, alpha=alpha).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(*batch, base.in_features, dtype=torch.double, requires_grad=True)
    W = layer.weight + alpha / rank * layer.lora_B @ layer.lora_A
    expected = x @ W.T + (0 if layer.bias is None else layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    inputs = (x, layer.lora_A, layer.lora_B, layer.weight)
    ours = torch.autograd.grad((y * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.merged_weight(), W)


def test_a_strided_input_is_read_rightly_and_left_alone():
    layer = lora.LoRALinear(nn.Linear(6, 5), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, 4)
    before = x.clone()
    torch.testing.assert_close(layer(x.transpose(1, 2)), layer(x.transpose(1, 2).contiguous()))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("part", "pattern", "linears", "parameters"),
    [
        ("encoder", r"attn\.qkv$", 10, 29_696),
        ("encoder", r"attn\.(qkv|proj)$", 20, 44_544),
        ("encoder", ALL, 40, 118_784),
        ("decoder", DECODER, 28, 47_104),
    ],
)
def test_the_pattern_chooses_what_is_adapted(sam, part, pattern, linears, parameters):
    module = encoder_of(sam) if part == "encoder" else copy.deepcopy(sam.mask_decoder)
    before = module.state_dict()
    names = lora.inject(module, pattern, rank=4, alpha=4)
    adapters = train_adapters(module)
    assert len(names) == linears
    assert set(adapters) == {
        f"{name}.{matrix}" for name in names for matrix in ("lora_A", "lora_B")
    }
    assert sum(p.numel() for p in adapters.values()) == parameters
    assert module.state_dict().keys() == before.keys() | set(adapters)


def test_merged_equals_unmerged_and_differs_from_base(sam):
    images = torch.rand(2, 3, 64, 96) * 255
    base, encoder, merged = encoder_of(sam), encoder_of(sam), encoder_of(sam)
    expected = base(images)
    names = lora.inject(encoder, ALL, rank=4, alpha=16)
    assert all(torch.equal(a, b) for a, b in zip(encoder(images), expected, strict=True))
    randomise(encoder)
    adapted_maps = encoder(images)

    lora.merge(encoder)
    assert not any(isinstance(module, lora.LoRALinear) for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    lora.merge(encoder)  # merging again changes nothing
    assert same_tensors(encoder.state_dict(), state)
    stock = base.state_dict()
    assert state.keys() == stock.keys()
    changed = {name for name in stock if not torch.equal(stock[name], state[name])}
    assert changed == {f"{name}.weight" for name in names}

    merged.load_state_dict(state)
    for adapted, plain, original in zip(adapted_maps[3:], merged(images)[3:], expected[3:]):
        torch.testing.assert_close(plain, adapted, atol=1e-4, rtol=1e-4)
        assert (plain - original).abs().max() > 0.05
    assert all(torch.equal(a, b) for a, b in zip(encoder(images), merged(images), strict=True))


def test_an_adapter_moves_to_another_model(sam):
    images = torch.rand(1, 3, 64, 64) * 255
    first, second = encoder_of(sam), encoder_of(sam)
    for encoder in (first, second):
        lora.inject(encoder, r"attn\.(qkv|proj)$", rank=4, alpha=4)
        # A second call adapts other layers, and leaves the adapted ones alone.
        assert all(
            name.endswith("fc1") for name in lora.inject(encoder, "qkv|fc1", rank=2, alpha=4)
        )
    randomise(first)
    adapters = {name: t for name, t in first.state_dict().items() if ".lora_" in name}
    missing, unexpected = second.load_state_dict(adapters, strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    assert torch.equal(first(images)[-1], second(images)[-1])
