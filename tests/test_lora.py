"""LoRA: exact at the start, exact when merged, and training what it should and nothing else."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nucsam import lora
from nucsam.base import build_sam
from nucsam.encoder import Encoder

DECODER = r"(q|k|v|out)_proj$"
COUNTS = [  # pattern, linear layers, trainable parameters at rank 4
    (r"attn\.qkv$", 10, 29_696),
    (r"attn\.(qkv|proj)$", 20, 44_544),
    (r"\.(qkv|proj|fc1|fc2)$", 40, 118_784),
]
shapes = given(
    features=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    rank=st.integers(1, 5),
    alpha=st.sampled_from([0.5, 1, 4, 16]),
    batch=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def sam() -> nn.Module:
    return build_sam(1)


def encoder_of(sam: nn.Module) -> Encoder:
    return Encoder(copy.deepcopy(sam.image_encoder)).requires_grad_(False)


def train_adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    module.requires_grad_(False)
    chosen = {name: p for name, p in module.named_parameters() if "lora_" in name}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=generator)


@few
@shapes
def test_a_new_layer_is_its_base_bit_for_bit(features, rank, alpha, batch, bias, seed):
    torch.manual_seed(seed)
    base = nn.Linear(*features, bias=bias)
    layer = lora.LoRALinear(base, rank=rank, alpha=alpha)
    x = torch.randn(*batch, features[0])
    assert torch.equal(layer(x), base(x.reshape(-1, features[0])).view(*batch, features[1]))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.lora_A.abs().sum() > 0


@few
@shapes
def test_output_and_gradients_follow_the_definition(features, rank, alpha, batch, bias, seed):
    torch.manual_seed(seed)
    layer = lora.LoRALinear(nn.Linear(*features, bias=bias), rank=rank, alpha=alpha).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(*batch, features[0], dtype=torch.double, requires_grad=True)
    W = layer.weight + alpha / rank * layer.lora_B @ layer.lora_A
    expected = x @ W.T + (layer.bias if bias else 0)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    inputs = (x, layer.lora_A, layer.lora_B, layer.weight)
    ours = torch.autograd.grad((found * weights).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.merged_weight(), W)


def test_a_strided_input_is_read_rightly_and_left_alone():
    layer = lora.LoRALinear(nn.Linear(6, 5), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, 4)
    kept = x.clone()
    torch.testing.assert_close(layer(x.transpose(1, 2)), layer(x.transpose(1, 2).contiguous()))
    assert torch.equal(x, kept)


def test_the_seed_sets_A():
    def drawn():
        torch.manual_seed(7)
        return lora.LoRALinear(nn.Linear(8, 8), rank=2, alpha=2).lora_A

    assert torch.equal(drawn(), drawn())


def test_bfloat16_autocast():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(32, 16), rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.2, rtol=0.05)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize(("pattern", "layers", "parameters"), COUNTS)
def test_what_is_adapted_in_the_encoder(sam, pattern, layers, parameters):
    encoder = encoder_of(sam)
    linears = {name for name, child in encoder.named_modules() if isinstance(child, nn.Linear)}
    assert len(linears) == 40
    before = encoder.state_dict()
    names = lora.inject(encoder, pattern, rank=4, alpha=4)
    assert len(names) == layers
    trained = train_adapters(encoder)
    assert set(trained) == {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    assert sum(p.numel() for p in trained.values()) == parameters
    assert encoder.state_dict().keys() == before.keys() | set(trained)
    assert lora.adapter_state_dict(encoder).keys() == set(trained)


def test_what_is_adapted_in_the_mask_decoder(sam):
    decoder = copy.deepcopy(sam.mask_decoder)
    assert len(lora.inject(decoder, DECODER, rank=4, alpha=4)) == 28
    assert sum(p.numel() for p in train_adapters(decoder).values()) == 47_104


def test_a_pattern_that_matches_nothing_is_refused(sam):
    encoder = encoder_of(sam)
    with pytest.raises(ValueError, match=r"'q_proj' matches none.*layers\.1\.blocks\.0\.attn\.qkv.* more"):
        lora.inject(encoder, "q_proj", rank=4, alpha=4)
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        lora.inject(encoder, "qkv", rank=0, alpha=4)
    assert not lora.adapter_state_dict(encoder)


def test_zero_init_leaves_the_encoder_as_it_was(sam):
    images = torch.rand(1, 3, 64, 96) * 255
    encoder = encoder_of(sam)
    before = encoder(images)
    lora.inject(encoder, COUNTS[2][0], rank=4, alpha=16)
    for ours, base in zip(encoder(images), before, strict=True):
        assert torch.equal(ours, base)


def test_every_adapter_has_a_gradient_by_the_second_step(sam):
    """In the encoder and in the mask decoder without prompts, whose sparse tokens are its own five."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    model = nn.ModuleDict({"encoder": encoder_of(sam), "decoder": copy.deepcopy(sam.mask_decoder)})
    names = lora.inject(model, rf"{COUNTS[2][0]}|{DECODER}", rank=4, alpha=4)
    assert len(names) == 68
    trained = train_adapters(model)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        embedding = model["encoder"].embed(model["encoder"](images))
        masks, _ = model["decoder"](
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.pe_layer(embedding.shape[2:])[None],
            sparse_prompt_embeddings=embedding.new_zeros(1, 0, 256),
            dense_prompt_embeddings=sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1),
            multimask_output=False,
        )
        masks.square().sum().backward()
        optimizer.step()
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name


def test_merged_equals_unmerged_and_differs_from_base(sam):
    images = torch.rand(2, 3, 64, 96) * 255
    base, encoder, merged = encoder_of(sam), encoder_of(sam), encoder_of(sam)
    names = lora.inject(encoder, COUNTS[2][0], rank=4, alpha=16)
    randomise(encoder)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = lora.merged_state_dict(encoder)

    assert state.keys() == base.state_dict().keys()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {f"{name}.weight" for name in names}
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    merged.load_state_dict(state)
    for adapted, plain, original in zip(encoder(images)[3:], merged(images)[3:], base(images)[3:], strict=True):
        torch.testing.assert_close(plain, adapted, atol=1e-4, rtol=1e-4)
        assert (plain - original).abs().max() > 0.05

    for again in (lora.merged_state_dict(encoder), lora.merged_state_dict(merged)):
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], state[name]) for name in state)

    lora.merge(encoder)
    assert not any(isinstance(module, lora.LoRALinear) for module in encoder.modules())
    again = encoder.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(encoder(images), merged(images), strict=True))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_an_adapter_moves_to_another_model(sam):
    images = torch.rand(1, 3, 64, 64) * 255
    first, second = encoder_of(sam), encoder_of(sam)
    for encoder in (first, second):
        lora.inject(encoder, COUNTS[1][0], rank=4, alpha=4)
        assert lora.inject(encoder, r"fc1$", rank=2, alpha=4)
    randomise(first)
    missing, unexpected = second.load_state_dict(lora.adapter_state_dict(first), strict=False)
    assert not unexpected
    assert not any("lora_" in name for name in missing)
    assert torch.equal(first(images).s16b, second(images).s16b)
