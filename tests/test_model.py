import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nucsam.base import Base, build_sam, load_base, state_sha256
from nucsam.checkpoint import merged
from nucsam.config import Loss, Model, load
from nucsam.lora import LoRALinear
from nucsam.model import Nucsam, build, calibrated

CONFIGS = Path(__file__).parents[1] / "configs"
SIX = [(train, head) for train in ("lora", "full", "head") for head in ("instance", "sam")]
# Never reached by features or by a foreground map without prompts, so they never train.
UNREACHED = re.compile(
    r"prompt_encoder\.|mask_decoder\.iou_prediction_head|mask_decoder\.output_hypernetworks_mlps\.[123]"
)


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("none", seed=3)


@pytest.fixture(scope="module")
def stock() -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in build_sam().state_dict().items()}


def parts(net: Nucsam) -> dict[str, int]:
    """Trainable values by part of the model."""
    counts = {"lora": 0, "head": 0, "decoder": 0, "encoder": 0, "neck": 0, "prompt": 0}
    starts = {
        "head.": "head",
        "mask_decoder.": "decoder",
        "image_encoder.neck.": "neck",
        "image_encoder.": "encoder",
        "prompt_encoder.": "prompt",
    }
    for name, p in net.named_parameters():
        if p.requires_grad:
            part = "lora" if ".lora_" in name else next(v for k, v in starts.items() if name.startswith(k))
            counts[part] += p.numel()
    return {part: count for part, count in counts.items() if count}


def head_size(width: int) -> int:
    """Values of the instance head, counted from its plan: 3 x 3 + BatchNorm (branch, blocks), 1 x 1, out."""
    widths = [width, width * 3 // 4, width // 2, width // 4, width // 8]
    inputs = [480, 128 + widths[1], 64 + widths[2], 32 + widths[3], widths[4]]
    blocks = [(w, w) for w in widths[:4] for _ in range(2)] + [(widths[4], widths[4])]
    blocks += [(a, b) for a, b in pairwise([3, *widths[:0:-1]])] + [(w, w) for w in widths[1:4]]
    lateral = sum(i * w for i, w in zip(inputs, widths))
    down = sum(a * b for a, b in pairwise(widths))
    return lateral + down + sum(9 * a * b + 2 * b for a, b in blocks) + 4 * widths[-1] + 4


# Folding


def test_a_folded_model_makes_the_same_maps(base):
    net = build(Model(), base, seed=0)
    x = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        net.train()(x, (96, 64))  # moves the statistics
        for part in net.head.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
        for name, parameter in net.named_parameters():
            if name.endswith("lora_B"):
                nn.init.uniform_(parameter, -0.05, 0.05)
        expected = net.eval()(x, (96, 64))
        assert net.fold() is net
        assert not any("lora_" in name for name in net.state_dict())
        assert not any(isinstance(part, nn.BatchNorm2d) for part in net.head.modules())
        assert torch.allclose(net(x, (96, 64)), expected, atol=1e-5)


# The trainable set


def test_trainable_set_of_the_reports_recipe(base):
    net = build(load(CONFIGS / "report.toml").model, base, seed=0)
    assert parts(net) == {"lora": 44_544}
    names = list(net.trainable())
    assert len(names) == 40  # A and B of qkv and proj of ten blocks
    assert all(re.fullmatch(r"image_encoder\.layers\.[123]\.blocks\.\d\.attn\.(qkv|proj)\.lora_[AB]", n) for n in names)


def test_moving_statistics_are_part_of_what_is_trained(base):
    pinned = build(Model(train="full", width=32), base, seed=0).trainable()
    net = build(Model(train="full", norms="moving", width=32), base, seed=0)
    extra = net.trainable().keys() - pinned.keys()
    assert len(extra) == 2 * 27 and all(name.endswith(("running_mean", "running_var")) for name in extra)
    before = {name: net.trainable()[name].clone() for name in extra}
    net.train()(torch.rand(2, 3, 64, 64) * 255, (64, 64))
    assert not any(torch.equal(before[name], net.trainable()[name]) for name in extra)
    assert {name for name in merged(net, base) if not name.startswith("head.")} == base.state.keys()
    assert all(torch.equal(merged(net, base)[name], net.trainable()[name]) for name in extra)


def test_trainable_set_of_our_best_is_in_the_budget(base):
    config = load(CONFIGS / "nuinsseg.toml").model
    net = build(config, base, seed=0)
    assert parts(net) == {"lora": 118_784 * config.rank // 4, "head": head_size(config.width)}
    assert sum(p.numel() for p in net.trainable().values()) <= 2_100_000


@pytest.mark.parametrize(
    ("train", "head", "expected"),
    [
        ("lora", "instance", {"lora": 44_544, "head": head_size(64)}),
        ("lora", "sam", {"lora": 44_544}),
        ("head", "instance", {"head": head_size(64)}),
        ("head", "sam", {"decoder": "reached"}),
        ("full", "instance", {"encoder": "all", "head": head_size(64)}),
        ("full", "sam", {"encoder": "all", "neck": "all", "decoder": "reached"}),
    ],
)
def test_trainable_set(base, train, head, expected):
    net = build(Model(train=train, head=head, width=64), base, seed=0)
    sam = build_sam()
    sizes = {
        ("encoder", "all"): [*sam.image_encoder.patch_embed.parameters(), *sam.image_encoder.layers.parameters()],
        ("neck", "all"): [*sam.image_encoder.neck.parameters()],
        ("decoder", "reached"): [
            p for name, p in sam.mask_decoder.named_parameters() if not UNREACHED.match(f"mask_decoder.{name}")
        ],
    }
    counted = {key: sum(p.numel() for p in some) for key, some in sizes.items()}
    assert parts(net) == {part: counted.get((part, size), size) for part, size in expected.items()}
    assert all(not UNREACHED.match(name) for name in net.trainable())
    statistics = {name for name, _ in net.named_buffers() if name.startswith("head.")}
    assert len(statistics) == (2 * 16 if head == "instance" else 0)
    assert net.trainable().keys() == {name for name, p in net.named_parameters() if p.requires_grad} | statistics


def test_trainable_counts_of_the_field(base):
    """qkv alone, all forty linears, and the mask decoder's 28 attention linears."""
    for pattern, head, count in (
        (r"image_encoder\..*\.attn\.qkv", "sam", 29_696),
        (r"image_encoder\..*\.(attn\.(qkv|proj)|mlp\.fc[12])", "sam", 118_784),
        (r"mask_decoder\.transformer\..*attn.*\.(q|k|v|out)_proj", "sam", 47_104),
    ):
        net = build(Model(head=head, pattern=pattern), base, seed=0)
        assert parts(net) == {"lora": count}


def test_pattern_that_matches_nothing_is_refused(base):
    with pytest.raises(ValueError, match="matches none of the linear layers"):
        build(Model(pattern="attention"), base, seed=0)


def test_pattern_that_is_no_regular_expression_is_refused(base):
    """A user's mistake is a ValueError, and `re.error` is none."""
    with pytest.raises(ValueError, match=re.escape("image_encoder.(attn")):
        build(Model(pattern="image_encoder.(attn"), base, seed=0)


# Gradients


def steps(net: Nucsam, count: int) -> dict[str, list[bool]]:
    """Whether each parameter had a gradient that is not 0 (or any at all, if it does not train) in each step."""
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(2, 3, 64, 64, generator=generator)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, 5:25, 5:30], labels[0, 25:45, 9:29], labels[1, 30:60, 8:40] = 1, 2, 2
    counted = torch.rand(2, 64, 64, generator=generator) < 0.9
    optimizer = torch.optim.SGD(net.trainable().values(), lr=1e-2)
    net.train()
    found = {name: [] for name, _ in net.named_parameters()}
    for _ in range(count):
        optimizer.zero_grad()
        terms = net.loss(net(images, (64, 64)), labels, counted, 2, Loss())
        assert all(term.shape == (2,) for term in terms.values())
        sum(terms.values()).mean().backward()
        for name, p in net.named_parameters():
            has = p.grad is not None and (not p.requires_grad or bool(p.grad.ne(0).any()))
            assert p.grad is None or p.grad.isfinite().all()
            found[name].append(has)
        optimizer.step()
    return found


@pytest.fixture(scope="module")
def warm(base) -> Base:
    """A base whose every path carries signal: a fresh MobileSAM has BatchNorms and biases of 0."""
    generator = torch.Generator().manual_seed(5)
    state = {
        name: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() and t.ndim < 3 else t
        for name, t in base.state.items()
    }
    state = {name: t.abs() + 0.1 if name.endswith("running_var") else t for name, t in state.items()}
    return replace(base, state=state, sha256=state_sha256(state))


@pytest.mark.parametrize(("train", "head"), SIX)
def test_every_trainable_parameter_has_a_gradient_by_step_2(warm, train, head):
    net = build(Model(train=train, head=head, width=32), warm, seed=0)
    found = steps(net, 2)
    trainable = net.trainable().keys() & found.keys()
    assert [name for name in trainable if not found[name][1]] == []
    assert [name for name in found if name not in trainable and any(found[name])] == []
    first = {name for name in trainable if not found[name][0]}
    assert first == {name for name in trainable if name.endswith(".lora_A")}  # B is 0, so A waits for step 2
    assert (len(first) == 20) == (train == "lora")


@pytest.mark.parametrize("head", ["instance", "sam"])
def test_vague_pixels_have_no_part_in_a_heads_loss(base, head):
    """In no term, by value or gradient; and each other pixel has one."""
    net, generator = build(Model(head=head, width=32), base, seed=0), torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4 if head == "instance" else 1, 32, 32, generator=generator).requires_grad_()
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[0, 5:25, 5:30], labels[1, 8:20, 9:29] = 1, 2
    counted = torch.rand(2, 32, 32, generator=generator) < 0.7
    other = torch.where(counted[:, None], maps, 9.0).detach()
    terms, same = (net.loss(m, labels, counted, 2, Loss()) for m in (maps, other))
    assert (
        terms.keys()
        == {
            "instance": {"cross_entropy", "tversky", "distance"},
            "sam": {"cross_entropy", "dice"},
        }[head]
    )
    for name, term in terms.items():
        assert torch.equal(term, same[name])
        (grad,) = torch.autograd.grad(term.sum(), maps, retain_graph=True)
        assert torch.equal(grad.ne(0).any(1), counted)
    everywhere = torch.ones_like(counted)
    terms, same = (net.loss(m, labels, everywhere, 2, Loss()) for m in (maps, other))
    assert all((term != same[name]).all() for name, term in terms.items())  # negative control
    scaled = net.loss(maps, labels, everywhere, 2, Loss(cross_entropy=3.0, tversky=3.0, distance=12.0, dice=3.0))
    for name, term in terms.items():
        torch.testing.assert_close(scaled[name], 3 * term)


def test_recomputed_blocks_have_the_same_gradients(warm):
    images = torch.linspace(0, 255, 3 * 64 * 64).view(1, 3, 64, 64)
    found = []
    for checkpoint in (False, True):
        net = build(Model(width=32), warm, seed=0, checkpoint=checkpoint)
        with torch.no_grad():
            for name, p in net.trainable().items():
                if name.endswith("lora_B"):
                    p.fill_(0.01)
        net(images, (64, 64)).square().mean().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    kept, recomputed = found
    assert len(kept) == 40 + 5 + 4 + (4 * 2 + 1 + 1 + 3 * 2) * 3 + 2  # LoRA, lateral, down, blocks, out
    for name in kept:
        torch.testing.assert_close(kept[name], recomputed[name], rtol=1e-4, atol=1e-7)


def test_lora_on_layers_of_the_decoder_that_no_gradient_reaches(warm):
    """Default DDP stops at a trainable parameter without a gradient (trap 2 of the encoder's dead head)."""
    net = build(Model(head="sam", pattern=r"mask_decoder\..*"), warm, seed=0)
    found = steps(net, 2)
    assert [name for name in net.trainable() if not found[name][1]] == []


# Weights


def test_same_seed_same_weights_and_another_seed_another_head(base):
    config = Model(width=32)
    one, same, other = (build(config, base, seed=s).state_dict() for s in (0, 0, 1))
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert {n for n in differing if not n.startswith("head.")} == {n for n in one if n.endswith("lora_A")}
    drawn = {n for n in one if n.startswith("head.") and n.endswith("weight") and one[n].ndim == 4}
    assert drawn <= differing


@pytest.mark.parametrize(("train", "head"), SIX)
def test_global_random_state_is_left_alone(base, train, head):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build(Model(train=train, head=head, width=32), base, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_the_base_alone(base):
    before = state_sha256(base.state)
    net = build(Model(train="full", width=32), base, seed=0)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert state_sha256(base.state) == before == base.sha256


@pytest.mark.parametrize(("train", "head"), SIX)
def test_keys_of_the_mobilesam_part_are_stock(base, stock, train, head):
    net = build(Model(train=train, head=head, width=32), base, seed=0)
    state = {name: t for name, t in net.state_dict().items() if ".lora_" not in name}
    own = {name for name in state if name.startswith("head.")}
    dead = ("image_encoder.head.", "image_encoder.norm_head.")
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.") if head == "sam" else ("image_encoder.",)
    assert state.keys() - own == {n for n in stock if n.startswith(parts) and not n.startswith(dead)}
    assert bool(own) == (head == "instance")
    for name in state.keys() - own:
        assert torch.equal(state[name], base.state[name])
    assert any(isinstance(m, LoRALinear) for m in net.modules()) == (train == "lora")


@pytest.mark.parametrize("head", ["instance", "sam"])
def test_a_new_adapter_changes_nothing(warm, head):
    images = 255 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    nets = [build(Model(train=train, head=head, width=32), warm, seed=0).eval() for train in ("lora", "head")]
    with torch.no_grad():
        found = [net(images, (64, 96)) for net in nets]
        assert torch.equal(*found)
        assert found[0].shape == (1, 4 if head == "instance" else 1, 64, 96)
        assert found[0].std() > 1e-4
        for p in nets[0].trainable().values():
            p += 0.05
        assert not torch.allclose(nets[0](images, (64, 96)), found[1], atol=1e-3)


# A nucsam export as base


def test_an_export_brings_its_head(base):
    config = Model(width=32)
    trained = build(config, base, seed=0).state_dict()
    extra = {name: torch.full_like(t, 0.25) for name, t in trained.items() if name.startswith("head.")}
    assert len(extra) > 10
    export = replace(base, extra=extra)
    state = build(config, export, seed=9).state_dict()
    assert all(torch.equal(state[name], extra[name]) for name in extra)
    sam = build(Model(head="sam"), export, seed=9)  # which has no place for it
    assert not any(name.startswith("head.") for name in sam.state_dict())


def test_an_export_of_another_width_is_refused_with_both_shapes(base):
    extra = {n: t for n, t in build(Model(width=32), base, seed=0).state_dict().items() if n.startswith("head.")}
    export = replace(base, extra=extra, source="nuclei.safetensors")
    with pytest.raises(ValueError, match=r"^nuclei\.safetensors: .*model\.width = 64.*found \(32, .*expected \(64, "):
        build(Model(width=64), export, seed=0)


# Calibration


def standardised(net: Nucsam, images: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each BatchNorm makes of its input before weight and bias, and the variances that this should have."""
    found = {}

    def record(name: str, norm: nn.BatchNorm2d):
        def forward(x: torch.Tensor) -> torch.Tensor:
            plain = F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
            found[name] = plain, norm.running_var / (norm.running_var + norm.eps)
            return plain * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

        return forward

    for name, norm in net.eval().image_encoder.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.training, norm.forward = True, record(name, norm)  # the encoder folds a BatchNorm unless it trains
    with torch.no_grad():
        net(images, tuple(images.shape[2:]))
    return found


def test_calibrated_batchnorms_standardise_the_calibration_images(base):
    generator = torch.Generator().manual_seed(1)
    images = 255 * F.interpolate(torch.rand(6, 3, 12, 12, generator=generator), size=(160, 160), mode="bilinear")
    found = calibrated(base, images)
    standard, fresh = (standardised(build(Model(train="head", width=32), b, seed=0), images) for b in (found, base))
    assert standard.keys() == fresh.keys()
    assert len(standard) == 27
    # Batches are normalised by n pixels and statistics kept over n - 1: with 600 px at the last of 27, a few percent
    for output, spread in standard.values():
        torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(output.shape[1]), atol=0.06, rtol=0)
        torch.testing.assert_close(output.var((0, 2, 3)), spread, atol=0.06, rtol=0)
    # eps damps channels that hardly vary: most do
    assert torch.cat([spread for _, spread in standard.values()]).median() > 0.99
    assert torch.cat([output.var((0, 2, 3)) for output, _ in fresh.values()]).median() < 0.5


def test_calibration_changes_the_statistics_the_identity_and_nothing_else(base):
    images = 255 * torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    before = {name: t.clone() for name, t in base.state.items()}
    found = calibrated(base, images)
    assert all(torch.equal(t, base.state[name]) for name, t in before.items())
    assert found.sha256 == state_sha256(found.state) != base.sha256
    assert found.state.keys() == base.state.keys()
    changed = {name for name in before if not torch.equal(before[name], found.state[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert found.source == base.source
    again = calibrated(base, images)
    assert again.sha256 == found.sha256
    assert calibrated(base, images / 2).sha256 != found.sha256


def test_batchnorms_of_the_encoder_stay_pinned_in_training_and_the_heads_move(warm):
    net = build(Model(train="full", width=32), warm, seed=0).train()
    before = {n: b.clone() for n, b in net.named_buffers()}
    with torch.no_grad():
        net(255 * torch.rand(2, 3, 64, 64), (64, 64))
    assert len(before) > 27
    moved = {n for n, b in net.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {n for n in before if n.startswith("head.")} == net.trainable().keys() & before.keys()
    assert not any(m.training for m in net.image_encoder.modules() if isinstance(m, nn.BatchNorm2d))
    net.eval()
    assert math.prod(net(torch.zeros(1, 3, 64, 64), (50, 70)).shape) == 4 * 50 * 70
