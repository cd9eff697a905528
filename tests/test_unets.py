"""The peers of benchmarks/unets.py: sizes, maps, losses, nuclei, and training by nucsam.fit."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import nucsam
from nucsam.config import Instances, Loss, Model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import unets

from nucsam.data import splits
from nucsam.data.samples import Samples
from nucsam.model import targets
from nucsam.run.directory import RunDirectory
from nucsam.score import runs

PARAMETERS = {  # the paper gives 1.9, 7.7, 2.3, 2.4, 3.9 and 3.5 million
    "shallow": 1942577,
    "deep": 7763041,
    "attention": 2205145,
    "residual-attention": 2292969,
    "two-stage": 3885298,
    "dual-decoder": 3557874,
}


def build(name, seed=0, **options):
    return unets.build(name, Model(), None, seed=seed, **options)


@pytest.fixture
def labels():
    """Two images of 64 px: a disc of radius 10, and two that touch."""
    y, x = np.mgrid[:64, :64]
    maps = np.zeros((2, 64, 64), np.int64)
    for image, number, cx, cy in ((0, 1, 30, 30), (1, 1, 20, 30), (1, 2, 39, 30)):
        maps[image][np.hypot(x - cx, y - cy) < 10] = number
    return torch.from_numpy(maps)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_maps_and_gradients(name, labels):
    net = build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    channels = 2 if name in ("two-stage", "dual-decoder") else 1
    maps = net(torch.rand(2, 3, 64, 64) * 255, (64, 64))
    assert maps.shape == (2, channels, 64, 64)
    terms = net.loss(maps, labels, labels >= 0, 2, Loss())
    assert [*terms] == ["cross_entropy", "dice", "depth"][: channels + 1]
    sum(terms.values()).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    with torch.no_grad():
        assert net(torch.rand(1, 3, 32, 96), (16, 48)).shape == (1, channels, 16, 48)


def test_true_maps_give_the_true_nuclei(labels):
    """The depth separates discs that touch; a flat depth does not (negative control)."""
    net = build("dual-decoder")
    depth = targets.depth(labels, targets.classes(labels), 2)
    for image, depths, nuclei in ((0, depth, 1), (1, depth, 2), (1, torch.zeros_like(depth), 1)):
        logits = (labels[image] > 0) * 20.0 - 10
        maps = net.probabilities(torch.stack([logits, depths[image]])[None])
        label = net.instances(maps[0].numpy(), Instances())
        assert label.dtype == np.int32
        assert label.max() == nuclei
        assert np.array_equal(label > 0, labels[image].numpy() > 0)
    foreground = logits.sigmoid()[None].numpy()
    assert build("shallow").instances(foreground, Instances()).max() == 2


def test_fit_trains_a_net_and_keeps_what_it_scores(tmp_path, tiny):
    """Statistics of BatchNorms included; a net of other weights scores otherwise."""
    config = tiny("train.lr_adapter=1e-3", "instances.confidence=0")
    scores = nucsam.fit(config, tmp_path / "run", build=partial(unets.build, "shallow"))
    run = RunDirectory(tmp_path / "run")
    first, second = run.read_metrics()
    assert second["loss"] < first["loss"]
    records, split = splits.find_split(config.data)
    nets = {True: build("shallow", 9, start=run.adapter_file), False: build("shallow")}
    for same, net in nets.items():
        accelerator = runs.scoring_accelerator({})
        known = {"certainty": scores["certainty"]}
        results = runs.score_images(net, config, Samples(records), split.test, accelerator, **known)
        assert (runs.headline(results) == scores["headline"]) == same
