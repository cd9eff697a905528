"""Tensors on disk: adapters, merged weights, resumable state; what does not fit is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nucsam.config import Config, Loss, Model, Train, to_toml
from nucsam.errors import UserError
from nucsam.files import atomic, write_text
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import Base, load_base, state_sha256
from nucsam.run.checkpoint import (
    load_adapter,
    load_state,
    merged_tensors,
    open_run,
    read_tensors,
    save_adapter,
    save_state,
    write_tensors,
)

SIX = [(train, head) for train in ("lora", "full", "head") for head in ("instance", "sam")]
IMAGES = 255 * torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def trained(base: Base, seed: int = 5, **model) -> Nucsam:
    """A model whose trainable weights are all away from where they began."""
    net = build_model(Model(width=32, **model), base, seed=0).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.trainable().values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return net


@pytest.fixture(scope="module")
def weights(base) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trained(base).trainable().items()}


def facts(base: Base) -> dict:
    return {
        "config": Config().to_dict(),
        "base": {"sha256": base.sha256, "source": base.source},
        "epoch": 3,
    }


@torch.no_grad()
def maps(net: Nucsam) -> torch.Tensor:
    return net(IMAGES, (64, 96))


# Files


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {
        "a.weight": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(4, 3).T,
        "last": torch.randn(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "learned": torch.nn.Parameter(torch.randn(2)),
    }
    metadata = {"kind": "x", "nested": {"list": [1, 2.5, None, "核"]}}
    write_tensors(tmp_path / "new" / "folder" / "a.safetensors", tensors, metadata)
    found, described = read_tensors(tmp_path / "new" / "folder" / "a.safetensors")
    assert described == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == (torch.float32 if name in ("half", "bfloat") else tensor.dtype)
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_text_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    with pytest.raises(error), atomic(path) as partial:
        assert partial.parent == tmp_path  # the same file system, so that taking the name is atomic
        assert partial.name.endswith(".partial")  # a killed write leaves it, and its name clears it
        partial.write_text("ne")
        assert path.read_text() == "old\n"
        raise error
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "näw\n")
    assert path.read_text(encoding="utf-8") == "näw\n"
    assert list(tmp_path.iterdir()) == [path]


# Adapter


@pytest.mark.parametrize(("train", "head"), SIX)
def test_adapter_round_trip(base, tmp_path, train, head):
    net = trained(base, train=train, head=head)
    save_adapter(tmp_path / "a.safetensors", net.trainable(), facts(base))
    other = build_model(Model(width=32, train=train, head=head), base, seed=8).eval()
    assert not torch.allclose(maps(other), maps(net), atol=1e-3)
    parameters = dict(other.named_parameters())
    metadata = load_adapter(tmp_path / "a.safetensors", other, base)
    assert metadata == {"kind": "adapter", **facts(base)}
    assert torch.equal(maps(other), maps(net))
    # In place: an optimizer still holds them.
    assert all(p is parameters[name] for name, p in other.named_parameters())
    assert read_tensors(tmp_path / "a.safetensors")[0].keys() == net.trainable().keys()


def test_adapter_of_another_base_is_refused(base, weights, tmp_path):
    save_adapter(tmp_path / "a.safetensors", weights, facts(base))
    other = load_base("none", seed=2)
    net = build_model(Model(width=32), other, seed=0)
    before = state_sha256(net.state_dict())
    with pytest.raises(UserError, match=rf"a\.safetensors: .*{base.sha256[:12]}"):
        load_adapter(tmp_path / "a.safetensors", net, other)
    assert state_sha256(net.state_dict()) == before


# Merging


@pytest.mark.parametrize(("train", "head"), SIX)
def test_merged_is_the_trained_model_and_not_the_base(base, train, head):
    net = trained(base, train=train, head=head)
    state = merged_tensors(net, base)
    config = Model(width=32, train="head", head=head)
    extra = {name: t for name, t in state.items() if name.startswith("head.")}
    stock = {name: t for name, t in state.items() if name not in extra}
    assert stock.keys() == base.state.keys()
    assert extra.keys() == {name for name in net.state_dict() if name.startswith("head.")}
    assert bool(extra) == (head == "instance")
    assert all(
        t.shape == base.state[name].shape and t.dtype == base.state[name].dtype
        for name, t in stock.items()
    )
    alone = build_model(config, replace(base, state=stock, extra=extra), seed=9).eval()
    torch.testing.assert_close(maps(alone), maps(net), atol=1e-5, rtol=1e-5)
    if (train, head) != ("head", "instance"):  # whose encoder is the base's
        untrained = build_model(config, replace(base, extra=extra), seed=9)
        assert not torch.allclose(maps(alone), maps(untrained), atol=1e-3)
    changed = {name for name in stock if not torch.equal(stock[name], base.state[name])}
    owners = {re.sub(r"\.lora_[AB]$", ".weight", name) for name in net.trainable()}
    assert changed == {name for name in owners if not name.startswith("head.")}


def test_merging_is_w_plus_scale_times_b_a(base):
    net = trained(base, rank=2, alpha=6.0)
    state, name = merged_tensors(net, base), "image_encoder.layers.2.blocks.3.attn.qkv"
    weights = net.trainable()
    update = 3.0 * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
    torch.testing.assert_close(state[f"{name}.weight"], base.state[f"{name}.weight"] + update)
    assert update.abs().max() > 0.01


def test_merging_twice_changes_nothing(base):
    net = trained(base)
    before = state_sha256(base.state), state_sha256(net.state_dict())
    once, twice = merged_tensors(net, base), merged_tensors(net, base)
    assert state_sha256(once) == state_sha256(twice)
    assert (state_sha256(base.state), state_sha256(net.state_dict())) == before


# Resumable state


def loop(
    net: Nucsam, optimizer: torch.optim.Optimizer, average: dict[str, torch.Tensor], steps: int
) -> None:
    labels = torch.zeros(2, 64, 96, dtype=torch.int64)
    labels[:, 10:30, 20:40] = 1
    for _ in range(steps):
        optimizer.zero_grad()
        terms = net.loss(net(IMAGES, (64, 96)), labels, labels >= 0, 1, Loss())
        sum(terms.values()).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in net.trainable().items():
                average[name].lerp_(p, 0.5)


def start(base: Base, seed: int) -> tuple[Nucsam, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    net = build_model(Model(width=32), base, seed=seed)
    weights = net.trainable()
    halves = [
        {"params": [p for p in weights.values() if (p.ndim < 2) == vector]}
        for vector in (False, True)
    ]
    average = {name: p.detach().clone() for name, p in weights.items()}
    return net, torch.optim.AdamW(halves, lr=1e-3), average


def test_state_comes_back_bit_for_bit_and_continues_the_same(base, tmp_path):
    path = tmp_path / "state" / "last.safetensors"
    net, optimizer, average = start(base, 0)
    loop(net, optimizer, average, 2)
    save_state(path, net.trainable(), average, optimizer, {"progress": {"step": 2}})

    other, restored, other_average = start(base, 1)
    assert load_state(path, other.trainable(), other_average, restored) == {
        "kind": "state",
        "progress": {"step": 2},
    }

    def same() -> None:
        for name, p in net.trainable().items():
            q = other.trainable()[name]
            assert torch.equal(p, q)
            assert torch.equal(average[name], other_average[name])
            trains = p.requires_grad  # unlike a BatchNorm's statistics
            moments = {"step", "exp_avg", "exp_avg_sq"} if trains else set()
            assert optimizer.state[p].keys() == restored.state[q].keys() == moments
            for key, value in optimizer.state[p].items():
                assert value.dtype == restored.state[q][key].dtype
                assert value.device == restored.state[q][key].device
                assert torch.equal(value, restored.state[q][key])

    same()
    at_save = {name: p.detach().clone() for name, p in net.trainable().items()}
    loop(net, optimizer, average, 2)
    loop(other, restored, other_average, 2)
    same()
    assert not any(torch.equal(p, at_save[name]) for name, p in net.trainable().items())


def test_state_without_its_optimizer_continues_elsewhere(base, tmp_path):
    """Negative control of the test above: the optimizer's state matters."""
    path = tmp_path / "last.safetensors"
    net, optimizer, average = start(base, 0)
    loop(net, optimizer, average, 2)
    save_state(path, net.trainable(), average, optimizer, {})
    other, restored, other_average = start(base, 0)
    load_state(path, other.trainable(), other_average, restored)
    restored.state.clear()
    loop(net, optimizer, average, 1)
    loop(other, restored, other_average, 1)
    assert any(not torch.equal(p, other.trainable()[name]) for name, p in net.trainable().items())


def test_the_state_of_a_fused_optimizer_lies_on_the_device_of_its_weights(base, tmp_path):
    net, optimizer, average = start(base, 0)
    loop(net, optimizer, average, 1)
    save_state(tmp_path / "s", net.trainable(), average, optimizer, {})
    other, restored, _ = start(base, 1)
    other.to("meta")
    weights = other.trainable()
    load_state(tmp_path / "s", weights, {name: p.detach() for name, p in weights.items()}, restored)
    states = [restored.state[p] for p in weights.values() if p.requires_grad]
    assert {value.device.type for state in states for value in state.values()} == {"meta"}


def test_state_before_the_first_step_and_without_an_average(base, tmp_path):
    net, optimizer, _ = start(base, 0)
    save_state(tmp_path / "s", net.trainable(), {}, optimizer, {"progress": {}})
    other, restored, _ = start(base, 1)
    load_state(tmp_path / "s", other.trainable(), {}, restored)
    assert all(torch.equal(p, other.trainable()[name]) for name, p in net.trainable().items())
    assert not restored.state


# A run directory


def run_directory(folder: Path, base: Base, weights: dict[str, torch.Tensor]) -> None:
    """A run as training leaves it, on random weights that it keeps beside it."""
    model = Model(width=32, weights="none")
    write_tensors(folder / "base.safetensors", base.state, {"kind": "base", "source": base.source})
    write_text(folder / "config.toml", to_toml(replace(Config(), model=model, train=Train(seed=4))))
    save_adapter(folder / "adapter.safetensors", weights, facts(base))


def test_open_run(base, weights, tmp_path):
    run_directory(tmp_path, base, weights)
    found, config, found_base, metadata = open_run(tmp_path)
    assert all(torch.equal(p, weights[name]) for name, p in found.trainable().items())
    assert found.trainable().keys() == weights.keys()
    assert not found.training
    assert (config.model, config.train.seed) == (Model(width=32, weights="none"), 4)
    assert (found_base.sha256, found_base.source) == (base.sha256, "none (random, seed 1)")
    assert metadata["epoch"] == 3


def test_run_without_its_base_is_refused(base, weights, tmp_path):
    run_directory(tmp_path, base, weights)
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(UserError, match=r"base\.safetensors"):
        open_run(tmp_path)
