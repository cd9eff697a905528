"""The baselines of benchmarks/unets.py: sizes, maps, losses, instances, and that nucsam's loop keeps all of a net."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nucsam import checkpoint, targets
from nucsam.config import Instances, Loss, Model
from nucsam.train import train

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import unets

MILLIONS = {  # the table of the NuInsSeg paper
    "shallow": 1.9,
    "deep": 7.7,
    "attention": 2.3,
    "residual-attention": 2.4,
    "two-stage": 3.9,
    "dual-decoder": 3.5,
}


def made(name, seed=0, **how):
    return unets.build(name, Model(), None, seed=seed, **how)


@pytest.fixture(scope="module")
def labels():
    """Two images of 64 px: a disc of radius 10, and two that touch."""
    y, x = np.mgrid[:64, :64]
    maps = np.zeros((2, 64, 64), np.int64)
    for image, id, cx, cy in ((0, 1, 30, 30), (1, 1, 20, 30), (1, 2, 39, 30)):
        maps[image][(np.hypot(x - cx, y - cy) < 10)] = id
    return torch.from_numpy(maps)


def test_there_are_six():
    assert list(unets.NETS) == list(MILLIONS)
    assert {name: plan.millions for name, plan in unets.NETS.items()} == MILLIONS


@pytest.mark.parametrize("name", MILLIONS)
def test_size_maps_and_gradients(name, labels):
    net = made(name)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(MILLIONS[name], rel=0.1)
    channels = 2 if name in ("two-stage", "dual-decoder") else 1
    maps = net(torch.rand(2, 3, 64, 64) * 255, (64, 64))
    assert maps.shape == (2, channels, 64, 64)
    terms = net.loss(maps, labels, labels >= 0, 2, Loss())
    assert set(terms) == {"cross_entropy", "dice", *(["depth"] if channels == 2 else [])}
    assert all(term.shape == (2,) for term in terms.values())
    sum(terms.values()).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    with torch.no_grad():
        assert net(torch.rand(1, 3, 32, 96) * 255, (16, 48)).shape == (1, channels, 16, 48)


def test_the_seed_decides():
    a, b, other = (made("shallow", seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.blocks.0.body.0.0.weight"], other["encoder.blocks.0.body.0.0.weight"])


def test_depth_loss_counts_the_counted(labels):
    net, aim = made("dual-decoder"), targets.depth(labels, targets.classes(labels), 2)
    maps = torch.stack([torch.zeros_like(aim), aim], dim=1)
    assert net.loss(maps, labels, labels >= 0, 2, Loss())["depth"].tolist() == [0, 0]
    maps[:, 1, :32] += 2.0  # an error of 2 in the upper half: a mean square of 2, weighted by 5
    assert net.loss(maps, labels, labels >= 0, 2, Loss())["depth"].tolist() == pytest.approx([10.0, 10.0])
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[:, :32] = False
    assert net.loss(maps, labels, counted, 2, Loss())["depth"].tolist() == [0, 0]
    assert net.loss(maps, labels, counted & False, 2, Loss())["depth"].tolist() == [0, 0]


def test_second_stage_leaves_the_first_alone(labels):
    net = made("two-stage")
    net.loss(net(torch.rand(2, 3, 64, 64) * 255, (64, 64)), labels, labels >= 0, 2, Loss())["depth"].sum().backward()
    of_first = [p.grad for part in (net.encoder, net.foreground) for p in part.parameters()]
    assert len(of_first) > 50 and not any(grad is not None and bool(grad.any()) for grad in of_first)
    assert all(p.grad is not None for part in (net.second, net.depth) for p in part.parameters())


@pytest.mark.parametrize("name", ["shallow", "dual-decoder"])
def test_true_maps_give_the_true_nuclei(name, labels):
    """Discs that touch are two; the depth of one flat maximum makes them one (negative control)."""
    net = made(name)
    depth = targets.depth(labels, targets.classes(labels), 2)
    for image, depths, n in ((0, depth, 1), (1, depth, 2), (1, torch.zeros_like(depth), 1)):
        maps = torch.stack([(labels[image] > 0) * 20.0 - 10, depths[image]]).numpy()
        if name == "shallow":
            maps, n = maps[:1], image + 1
        found = net.instances(maps, Instances())
        assert found.dtype == np.int32 and found.max() == n
        assert np.array_equal(found > 0, labels[image].numpy() > 0)
    assert net.instances(np.full((2 if name == "dual-decoder" else 1, 64, 64), -9.0), Instances()).max() == 0


def test_statistics_of_batch_norm_are_kept_with_the_weights(tmp_path):
    net, fresh = made("attention"), made("attention", seed=5)
    optimizers = [torch.optim.AdamW(list(n.trainable().values()), lr=1e-2, weight_decay=0.1) for n in (net, fresh)]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    statistics = {name for name in net.trainable() if "running_" in name}
    assert len(statistics) == 2 * len(norms) > 40
    assert net.trainable().keys() - statistics == dict(net.named_parameters()).keys()
    for _ in range(2):
        net(torch.rand(2, 3, 32, 32) * 255, (32, 32)).square().mean().backward()
        before = {name: net.trainable()[name].clone() for name in statistics}
        optimizers[0].step()
    assert all(torch.equal(before[name], net.trainable()[name]) for name in statistics)  # no step, no weight decay
    checkpoint.save_state(tmp_path / "state", net.trainable(), {}, optimizers[0], {})
    checkpoint.load_state(tmp_path / "state", fresh.trainable(), {}, optimizers[1])
    mine, theirs = net.state_dict(), fresh.state_dict()
    assert mine.keys() == theirs.keys() == net.trainable().keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A finished run of the shallow U-Net in nucsam's loop."""
    out = tmp_path_factory.mktemp("runs") / "shallow"
    config = tiny("train.epochs=2", "train.lr_adapter=1e-3", "model.width=32", "instances.confidence=0")
    return out, config, train(config, out, build=partial(unets.build, "shallow"))


def test_loop_trains_scores_and_keeps_a_net(run):
    """What is kept, statistics included, is the averaged net that was scored."""
    from accelerate import Accelerator

    from nucsam import data, scoring

    out, config, scores = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[1]["loss"] < lines[0]["loss"]
    assert json.loads((out / "environment.json").read_text())["parameters_trainable"] == 1942577
    net = made("shallow", seed=9, start=out / "adapter.safetensors")
    kept = net.trainable()
    assert all(float((kept[name] - float("var" in name)).abs().max()) > 1e-3 for name in kept if "running_" in name)
    records, split = scoring.find_images(config.data)
    samples = data.Samples(records, progress=False)
    found = scoring.score_images(net, config, samples, split.test, Accelerator(cpu=True))
    assert scoring.headline(found) == scores["headline"]
    fresh = scoring.score_images(made("shallow"), config, samples, split.test, Accelerator(cpu=True))
    assert scoring.headline(fresh) != scores["headline"]


def test_a_run_starts_from_another_but_only_of_its_net(run):
    path = run[0] / "adapter.safetensors"
    weights, _ = checkpoint.read_tensors(path)
    net = made("shallow", seed=3, start=path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.trainable().items())
    with pytest.raises(ValueError, match=r"adapter\.safetensors: weights do not fit the model"):
        made("attention", start=path)
    with pytest.raises(ValueError, match=r"nothing: no such file"):
        made("shallow", start=path.with_name("nothing"))
