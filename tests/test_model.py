"""The whole model: what trains, what reaches it, what its weights are called, and its heads."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same_tensors
from torch import nn

from nucsam.config import Instances, Loss, Model, load_config
from nucsam.errors import UserError
from nucsam.model import losses, targets
from nucsam.model.heads import Block, InstanceHead, Norm
from nucsam.model.lora import LoRALinear
from nucsam.model.network import Nucsam, build_model
from nucsam.model.targets import BACKGROUND, BOUNDARY, INSIDE
from nucsam.model.weights import state_sha256
from nucsam.run.checkpoint import merged_tensors

CONFIGS = Path(__file__).parents[1] / "configs"
SIX = [(train, head) for train in ("lora", "full", "head") for head in ("instance", "sam")]
# Never reached by features or by a foreground map without prompts, so they never train.
UNREACHED = re.compile(
    r"prompt_encoder\.|mask_decoder\.(iou_prediction_head|output_hypernetworks_mlps\.[123])"
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def count(net: Nucsam) -> int:
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


# What trains


def test_the_reports_recipe_trains_the_adapters_of_the_attention(base):
    net = build_model(load_config(CONFIGS / "report.toml").model, base, seed=0)
    assert count(net) == 44_544
    name = r"image_encoder\.layers\.[123]\.blocks\.\d\.attn\.(qkv|proj)\.lora_[AB]"
    assert all(re.fullmatch(name, trained) for trained in net.trainable())


def test_our_best_recipe_is_in_the_budget(base):
    net = build_model(load_config(CONFIGS / "nuinsseg.toml").model, base, seed=0)
    assert 0 < count(net) <= 2_100_000


def test_size_of_the_instance_head():
    sizes = {2: 238_580, 1: 240_284}  # counted by hand
    for finest, size in sizes.items():
        head = InstanceHead(64, finest=finest)
        assert sum(p.numel() for p in head.parameters()) == size


def test_a_finer_head_resolves_single_model_pixels(base):
    """The maps of the other one are those of half the side, interpolated."""
    x = 255 * noise(1, 3, 64, 64)
    for finest in (1, 2):
        net = build_model(Model(width=32, finest=finest), base, seed=0).eval()
        with torch.no_grad():
            maps, half = net(x, (64, 64)), net(x, (32, 32))
            assert maps.shape == (1, 4, 64, 64) and half.shape == (1, 4, 32, 32)
            coarse = F.interpolate(half, size=(64, 64), mode="bilinear")
            assert torch.allclose(maps, coarse, atol=1e-4) == (finest == 2)
            assert torch.allclose(net.fold()(x, (64, 64)), maps, atol=1e-4)


@pytest.mark.parametrize(
    ("train", "head", "pattern"),
    [
        ("lora", "instance", r"head\.|image_encoder\..*\.attn\.(qkv|proj)\.lora_"),
        ("lora", "sam", r"image_encoder\..*\.attn\.(qkv|proj)\.lora_"),
        ("head", "instance", r"head\."),
        ("head", "sam", r"mask_decoder\."),
        ("full", "instance", r"head\.|image_encoder\.(?!neck)"),
        ("full", "sam", r"image_encoder\.|mask_decoder\."),
    ],
)
def test_trainable_set(base, train, head, pattern):
    net = build_model(Model(train=train, head=head, width=64), base, seed=0)
    parameters = {name for name, p in net.named_parameters() if p.requires_grad}
    assert parameters == {
        name
        for name, _ in net.named_parameters()
        if re.match(pattern, name) and not UNREACHED.match(name)
    }
    statistics = {name for name, _ in net.named_buffers() if name.startswith("head.")}
    assert bool(statistics) == (head == "instance")
    assert net.trainable().keys() == parameters | statistics


def test_moving_statistics_are_part_of_what_is_trained(base):
    pinned = build_model(Model(train="full", width=32), base, seed=0).trainable()
    net = build_model(Model(train="full", norms="moving", width=32), base, seed=0)
    extra = net.trainable().keys() - pinned.keys()
    assert extra == {name for name in base.state if re.search(r"encoder.*\.running_", name)}
    before = {name: net.trainable()[name].clone() for name in extra}
    net.train()(255 * noise(2, 3, 64, 64), (64, 64))
    assert not any(torch.equal(before[name], net.trainable()[name]) for name in extra)
    merged = merged_tensors(net, base)
    assert {name for name in merged if not name.startswith("head.")} == base.state.keys()
    assert all(torch.equal(merged[name], net.trainable()[name]) for name in extra)


def test_pinned_batchnorms_stay_and_those_of_the_head_move(base):
    net = build_model(Model(train="full", width=32), base, seed=0).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with torch.no_grad():
        net(255 * noise(2, 3, 64, 64), (64, 64))
    moved = {name for name, b in net.named_buffers() if not torch.equal(b, before[name])}
    assert moved == {name for name in before if name.startswith("head.")}
    assert moved == net.trainable().keys() & before.keys()
    assert net.eval()(torch.zeros(1, 3, 64, 64), (50, 70)).shape == (1, 4, 50, 70)


# Gradients


def steps(net: Nucsam, number: int) -> dict[str, list[bool]]:
    """Whether each parameter had a gradient that is not 0 (or any, if frozen) in each step."""
    images = 255 * noise(2, 3, 64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, 5:25, 5:30], labels[0, 25:45, 9:29], labels[1, 30:60, 8:40] = 1, 2, 2
    counted = noise(2, 64, 64, seed=1) < 0.9
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-2)
    net.train()
    reached = {name: [] for name, _ in net.named_parameters()}
    for _ in range(number):
        optimizer.zero_grad()
        terms = net.loss(net(images, (64, 64)), labels, counted, 2, Loss())
        sum(terms.values()).mean().backward()
        for name, p in net.named_parameters():
            has = p.grad is not None and (not p.requires_grad or bool(p.grad.ne(0).any()))
            assert p.grad is None or p.grad.isfinite().all()
            reached[name].append(has)
        optimizer.step()
    return reached


@pytest.mark.parametrize(("train", "head"), SIX)
def test_every_trainable_parameter_has_a_gradient_by_step_2(base, train, head):
    net = build_model(Model(train=train, head=head, width=32), base, seed=0)
    reached = steps(net, 2)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name, has in reached.items() if has[1]} == trained
    # B is 0, so that A waits for step 2.
    waiting = {name for name in trained if not reached[name][0]}
    assert waiting == {name for name in trained if name.endswith(".lora_A")}
    assert bool(waiting) == (train == "lora")


def test_lora_on_every_linear_layer_trains_where_a_gradient_comes(base):
    """Default DDP stops at a trainable parameter without a gradient."""
    net = build_model(Model(head="sam", pattern="."), base, seed=0)
    reached = steps(net, 2)
    assert len(net.trainable()) > 2 * (40 + 28)
    assert all(reached[name][1] for name in net.trainable())


# Heads


@pytest.mark.parametrize(
    ("head", "channels", "names"),
    [
        ("instance", 4, {"cross_entropy", "tversky", "distance"}),
        ("sam", 1, {"cross_entropy", "dice"}),
    ],
)
def test_vague_pixels_have_no_part_in_a_heads_loss(base, head, channels, names):
    """In no term, by value or gradient; and each other pixel has one."""
    net = build_model(Model(head=head, width=32), base, seed=0)
    maps = (4 * noise(2, channels, 32, 32) - 2).requires_grad_()
    labels = torch.zeros(2, 32, 32, dtype=torch.int64)
    labels[0, 5:25, 5:30], labels[1, 8:20, 9:29] = 1, 2
    counted = noise(2, 32, 32, seed=1) < 0.7
    other = torch.where(counted[:, None], maps, 9.0).detach()
    terms, same = (net.loss(m, labels, counted, 2, Loss()) for m in (maps, other))
    assert terms.keys() == names
    for name, term in terms.items():
        assert torch.equal(term, same[name])
        (gradient,) = torch.autograd.grad(term.sum(), maps, retain_graph=True)
        assert torch.equal(gradient.ne(0).any(1), counted)
    everywhere = torch.ones_like(counted)
    terms, same = (net.loss(m, labels, everywhere, 2, Loss()) for m in (maps, other))
    assert all((term != same[name]).all() for name, term in terms.items())  # negative control
    tripled = Loss(cross_entropy=3.0, tversky=3.0, distance=12.0, dice=3.0)
    scaled = net.loss(maps, labels, everywhere, 2, tripled)
    torch.testing.assert_close(scaled, {name: 3 * term for name, term in terms.items()})


def square() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of a nucleus of 4 x 4 px in 8 x 8: 12 boundary pixels, 4 inside; all are counted."""
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 2:6, 2:6] = 1
    return labels, labels >= 0


def test_a_nucleus_pixel_weighs_three_background_pixels_in_the_distance_loss():
    """Depths of 1 inside and 0.5 at the boundary against 0: 10 in 16 pixels, 0 in 48."""
    labels, counted = square()
    maps = torch.full((1, 4, 8, 8), -99.0)
    terms = InstanceHead(32).loss(maps, labels, counted, 1, Loss(distance=1.0))
    assert terms["distance"].item() == pytest.approx(3 * 10 / (3 * 16 + 48))


def test_a_boundary_pixel_weighs_more_in_the_cross_entropy():
    """Sure of the inside everywhere, off by 2: 12 boundary pixels of weight 5, 48 background."""
    labels, counted = square()
    maps = torch.zeros(1, 4, 8, 8)
    maps[:, INSIDE] = 99.0
    terms = InstanceHead(32).loss(maps, labels, counted, 1, Loss(boundary=5.0))
    assert terms["cross_entropy"].item() == pytest.approx(99 * (5 * 12 + 48) / (5 * 12 + 48 + 4))


def test_a_sure_nucleus_far_from_labels_may_weigh_less():
    """A labelled nucleus, and one that the annotators missed 12 px from it."""
    labels = torch.zeros(1, 8, 32, dtype=torch.int64)
    labels[0, 2:6, 2:6] = 1
    maps = torch.zeros(1, 4, 8, 32)
    maps[:, BACKGROUND] = 9.0
    maps[:, BACKGROUND, 2:6, 2:6] = -9.0
    one, counted = maps.clone(), labels >= 0
    maps[:, BACKGROUND, 2:6, 18:22] = -9.0
    ignored = counted.clone()
    ignored[:, 2:6, 18:22] = False
    head = InstanceHead(32)
    terms = head.loss(maps, labels, counted, 1, Loss(lovasz=1.0, unlabelled=1e-9))
    torch.testing.assert_close(terms, head.loss(maps, labels, ignored, 1, Loss(lovasz=1.0)))
    # The nucleus of `one` counts where labels are at most 8 px to its right, and not beyond.
    for shift, same in ((8, True), (9, False)):
        right = labels.roll(shift, dims=2)
        less = head.loss(one, right, counted, 1, Loss(unlabelled=1e-9))["cross_entropy"]
        full = head.loss(one, right, counted, 1, Loss())["cross_entropy"]
        assert torch.equal(less, full) == same


def test_the_losses_get_their_powers_shares_and_weights():
    """Against the losses called directly; 0.95 is surer than 0.9, 0.85 is not."""
    labels = torch.zeros(1, 8, 40, dtype=torch.int64)
    labels[0, 2:6, 2:6] = 1
    maps = torch.zeros(1, 4, 8, 40)
    for columns, p in ((slice(20, 24), 0.95), (slice(30, 34), 0.85)):
        maps[:, BACKGROUND, 2:6, columns] = math.log(2 * (1 - p) / p)
    counted = labels >= 0
    share = counted.float()
    share[:, 2:6, 20:24] = 0.5
    weights = Loss(boundary=1.0, focal=2.0, tversky_misses=0.7, tversky_power=1.0, unlabelled=0.5)
    terms = InstanceHead(32).loss(maps, labels, counted, 1, weights)
    probability = 1 - maps[:, :3].softmax(1)[:, BACKGROUND]
    focal = losses.cross_entropy(maps[:, :3], targets.classes(labels), share, focal=2.0)
    options = {"alpha": 0.7, "beta": 0.3, "gamma": 1.0}
    tversky = losses.focal_tversky(probability, labels > 0, share, **options)
    torch.testing.assert_close(terms["cross_entropy"], focal)
    torch.testing.assert_close(terms["tversky"], tversky)


def test_lovasz_is_a_term_where_it_has_a_weight():
    labels, counted = square()
    maps = torch.zeros(1, 4, 8, 8)
    maps[:, BACKGROUND] = 99.0
    terms = InstanceHead(32).loss(maps, labels, counted, 1, Loss(lovasz=2.0))
    assert terms["lovasz"].item() == pytest.approx(2 * 1.0)  # all 16 pixels are missed


@pytest.mark.parametrize("classes", [[INSIDE], [BOUNDARY], [INSIDE, BOUNDARY]])
def test_the_foreground_is_the_inside_and_the_boundary(classes):
    """In the loss and in the instances: wherever the background is unlikely is nucleus."""
    labels, counted = square()
    maps = torch.full((1, 4, 8, 8), -20.0)
    maps[:, BACKGROUND] = torch.where(labels > 0, -20.0, 20.0)
    maps[:, classes] = torch.where(labels > 0, 20.0, -20.0)
    head = InstanceHead(32)
    assert head.loss(maps, labels, counted, 1, Loss())["tversky"].item() < 1e-3
    label = head.instances(head.probabilities(maps)[0].numpy(), Instances(area=1))
    np.testing.assert_array_equal(label, labels[0])


def test_a_missed_pixel_costs_as_much_as_a_false_one():
    labels, counted = square()
    maps = torch.zeros(1, 4, 8, 8)
    maps[:, BACKGROUND] = 99.0
    head = InstanceHead(32)
    missed = head.loss(maps, labels, counted, 1, Loss())["tversky"]
    maps[:, INSIDE] = 199.0 * (labels > 0)
    false = head.loss(maps, 0 * labels, counted, 1, Loss())["tversky"]
    assert missed.item() == pytest.approx((1 - 1 / (1 + 0.5 * 16)) ** 0.75)
    assert false.item() == pytest.approx(missed.item())


def test_probabilities_of_inside_and_boundary_add_up():
    """0.3 + 0.3 is nucleus though 0.4, the background, is the most likely class."""
    logits = torch.tensor([0.4, 0.3, 0.3, 1.0]).log().view(1, 4, 1, 1).expand(1, 4, 8, 8)
    head = InstanceHead(32)
    maps = head.probabilities(logits)[0].numpy()
    for threshold, found in ((0.59, 1), (0.61, 0)):
        config = Instances(foreground=threshold, confidence=0.0)
        assert (head.instances(maps, config) == found).all()


def test_a_folded_model_makes_the_same_maps(base):
    net = build_model(Model(), base, seed=0)
    x = 255 * noise(2, 3, 96, 64)
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


def test_a_norm_adapts_to_each_image_alone():
    """The share moves mean and variance from those of the training to those of the image."""
    x = 3 * noise(2, 4, 8, 6) + 5
    norm = Norm(4).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    plain = norm(x)
    for share in (0.25, 1.0):
        norm.adapt = share
        for one, y in zip(x, norm(x)):
            for c in range(4):
                mean = share * one[c].mean()  # the norm's own is 0, and its variance 1
                variance = (1 - share) + share * one[c].var(correction=0)
                z = (one[c] - mean) / (variance + norm.eps).sqrt()
                torch.testing.assert_close(y[c], norm.weight[c] * z + norm.bias[c])
    norm.train()(x)
    assert norm.running_mean.min() > 0.1  # training moves the statistics, as without a share
    norm = Norm(4).eval()
    norm.adapt = 0.0
    assert torch.equal(norm(x), nn.functional.batch_norm(x, *norm.buffers(), eps=norm.eps))
    assert not torch.equal(plain, x)


def test_a_block_that_adapts_wholly_undoes_a_change_of_contrast():
    block, x = Block(3, 8).eval(), noise(2, 3, 16, 16)
    with torch.no_grad():
        assert (block(2 * x) - block(x)).abs().max() > 0.1
        block[1].adapt = 1.0
        torch.testing.assert_close(block(2 * x), block(x), atol=1e-3, rtol=1e-3)


def test_a_model_that_adapts_does_so_when_folded(base):
    net = build_model(Model(adapt=0.5), base, seed=0)
    x = 255 * noise(2, 3, 96, 64)
    with torch.no_grad():
        expected = net.eval()(x, (96, 64))
        assert torch.allclose(net.fold()(x, (96, 64)), expected, atol=1e-4)
        assert torch.allclose(
            net(x[:1], (96, 64)), expected[:1], atol=1e-4
        )  # no image sees another
        net.adapt(0.0)
        assert not torch.allclose(net(x, (96, 64)), expected, atol=1e-2)


# Weights


def test_the_seed_sets_the_head_and_the_adapters(base):
    config = Model(width=32)
    one, same, other = (build_model(config, base, seed=s).state_dict() for s in (0, 0, 1))
    assert same_tensors(one, same)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    drawn = {n for n in one if n.startswith("head.") and n.endswith("weight") and one[n].ndim == 4}
    assert drawn <= differing
    adapters = {n for n in one if n.endswith("lora_A")}
    assert {n for n in differing if not n.startswith("head.")} == adapters


@pytest.mark.parametrize(("train", "head"), SIX)
def test_a_new_model_has_the_stock_part_and_leaves_the_base_and_random_state(base, train, head):
    before = torch.get_rng_state()
    net = build_model(Model(train=train, head=head, width=32), base, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    state = {name: t for name, t in net.state_dict().items() if ".lora_" not in name}
    stock = {name: t for name, t in state.items() if not name.startswith("head.")}
    dead = ("image_encoder.head.", "image_encoder.norm_head.")
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")[: 3 if head == "sam" else 1]
    expected = {n: t for n, t in base.state.items() if n.startswith(parts)}
    assert same_tensors(stock, {n: t for n, t in expected.items() if not n.startswith(dead)})
    assert (len(stock) < len(state)) == (head == "instance")
    assert any(isinstance(m, LoRALinear) for m in net.modules()) == (train == "lora")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert state_sha256(base.state) == base.sha256


@pytest.mark.parametrize(("head", "channels"), [("instance", 4), ("sam", 1)])
def test_a_new_adapter_changes_nothing(base, head, channels):
    images = 255 * noise(1, 3, 64, 96)
    adapted, plain = (
        build_model(Model(train=train, head=head, width=32), base, seed=0).eval()
        for train in ("lora", "head")
    )
    with torch.no_grad():
        expected = plain(images, (64, 96))
        assert torch.equal(adapted(images, (64, 96)), expected)
        assert expected.shape == (1, channels, 64, 96)
        assert expected.std() > 1e-4
        for weights in adapted.trainable().values():
            weights += 0.05
        assert not torch.allclose(adapted(images, (64, 96)), expected, atol=1e-3)


def test_an_export_brings_its_head(base):
    trained = build_model(Model(width=32), base, seed=0).state_dict()
    head = {name: t + 0.25 for name, t in trained.items() if name.startswith("head.")}
    export = replace(base, extra=head, source="nuclei.safetensors")
    state = build_model(Model(width=32), export, seed=9).state_dict()
    assert all(torch.equal(state[name], head[name]) for name in head)
    # The sam head has no place for it.
    sam = build_model(Model(head="sam"), export, seed=9)
    assert not any(name.startswith("head.") for name in sam.state_dict())


def test_a_pattern_of_layers_that_do_not_train_is_refused(base):
    config = Model(head="sam", pattern="iou_prediction_head")
    with pytest.raises(UserError, match=r"model\.pattern: found 'iou_prediction_head'"):
        build_model(config, base, seed=0)
