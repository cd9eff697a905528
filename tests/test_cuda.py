"""Training and prediction on a GPU, where there is none: benchmarks/cuda_audit.py says how."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cuda_audit

from nucsam.config import Loss
from nucsam.data.augment import augment, window
from nucsam.data.samples import DRAWS
from nucsam.model.network import build_model
from nucsam.train import loop
from nucsam.train.training import Training

STEPS = [  # precision, head, what trains
    ("fp16", "instance", "lora"),
    ("bf16", "instance", "full"),
    ("fp32", "sam", "lora"),
]
SIDE = 64  # model px


def audit_step(precision, head, train, *, backward=False, change=lambda training: None):
    """The counts of a step, after a change of the training."""
    config = cuda_audit.settings(head, train, 2, SIDE)
    with cuda_audit.FakeGpu() as gpu, cuda_audit.fake_accelerator(precision) as accelerator:
        audit = cuda_audit.Audit(gpu, accelerator, config, backward=backward, blocks=1)
        change(audit.training)
        return audit.step()


def on_images(spoil):
    """A change of a training that spoils its images."""

    def change(training):
        forward = training.ddp
        training.ddp = lambda images, size: forward(spoil(images), size)

    return change


@pytest.mark.parametrize("case", STEPS, ids="-".join)
def test_a_step_fits_on_a_gpu_and_never_waits_for_it(case):
    counts = audit_step(*case)
    print(f"{counts.launches} launches, {counts.bytes / 2**20:.0f} MiB")
    assert counts.launches > 300
    assert not counts.syncs


def test_no_loss_waits_for_a_gpu():
    """With every term and weight that is off by default."""

    def change(training):
        weights = Loss(focal=2.0, lovasz=1.0, unlabelled=0.5)
        training.config = replace(training.config, loss=weights)

    plain, counts = audit_step(*STEPS[0]), audit_step(*STEPS[0], change=change)
    assert counts.launches > plain.launches + 10
    assert not counts.syncs


WAITS = {
    "_local_scalar_dense": lambda x: x * x.sum().item(),
    "nonzero": lambda x: x.index_fill(0, x[:, 0, 0, 0].nonzero()[:, 0], 0.0),
    "blocking copy from cpu": lambda x: x * torch.ones(SIDE).to(x.device),
    "blocking copy from cuda": lambda x: x * x.cpu().max(),
    "copy from memory that is not pinned": lambda x: (
        x * torch.ones(SIDE).to(x.device, non_blocking=True)
    ),
    "index by a mask": lambda x: torch.where(x > 0, x, x[x > 0].mean()),
    "index on the CPU": lambda x: x[torch.arange(len(x))],
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_would_be_seen(wait):
    """Negative control of the test above."""
    with cuda_audit.FakeGpu() as gpu:
        WAITS[wait](torch.zeros(2, 3, SIDE, SIDE, device="cuda"))
        (found,) = gpu.counts.syncs
    assert found.startswith(wait)


def test_a_wait_or_a_tensor_of_the_cpu_within_a_step_would_be_seen():
    """Negative control of the test of a step."""
    counts = audit_step(*STEPS[-1], change=on_images(WAITS["_local_scalar_dense"]))
    assert sum(counts.syncs.values()) == 1
    with pytest.raises(RuntimeError, match=r"cuda:0.*cpu"):
        audit_step(*STEPS[-1], change=on_images(lambda x: x * torch.ones(SIDE)))


def test_a_prediction_waits_for_its_pixels_and_its_maps_alone():
    config = cuda_audit.settings("instance", "lora", 2, SIDE)
    with cuda_audit.FakeGpu() as gpu, cuda_audit.fake_accelerator("fp16") as accelerator:
        audit = cuda_audit.Audit(gpu, accelerator, config, backward=False, blocks=1)
        counts = audit.prediction()
    assert counts.launches > 100
    assert sum(counts.syncs.values()) <= 2


@pytest.mark.parametrize("head, train", [("instance", "full"), ("sam", "lora")])
def test_forward_and_backward_need_no_values(head, train):
    """On the meta device `.item()`, `nonzero` and tensors of two devices raise errors."""
    config = cuda_audit.settings(head, train, 2, SIDE)
    net = build_model(config.model, cuda_audit.base(), seed=0).to("meta").train()
    crop, side = config.data.crop, window(config.data.crop, config.augment)
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")
    labels = torch.zeros(2, side, side, dtype=torch.int32, device="meta")
    draws = torch.full((2, DRAWS), 1e-3)
    options = {"crop": crop, "scale": config.data.scale, "config": config.augment}
    images, labels, counted = augment(images, labels, labels == 0, draws, **options)
    maps = net(images, (crop, crop))
    sum(net.loss(maps, labels, counted, 9, config.loss).values()).mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


# In child processes


def print_whole_steps():
    """The syncs of each step, backward pass included, and those of a spoilt one."""

    def spoil(x):
        x = x * torch.ones((), device=x.device).requires_grad_()
        x.register_hook(lambda gradient: gradient * gradient.sum().item())
        return x

    rows = {}
    for case in STEPS:
        counts = audit_step(*case, backward=True)
        rows["-".join(case)] = dict(counts.syncs)
        print(f"{case}: {counts.launches} launches, {counts.bytes / 2**20:.0f} MiB")
    rows["spoilt"] = dict(audit_step(*STEPS[-1], backward=True, change=on_images(spoil)).syncs)
    print(json.dumps(rows), flush=True)
    os._exit(0)  # threads of the autograd engine may abort at exit


@pytest.mark.skipif(bool(cuda_audit.missing()), reason=f"backward pass: {cuda_audit.missing()}")
def test_a_whole_step_never_waits_for_a_gpu():
    command = ["-c", "import test_cuda; test_cuda.print_whole_steps()"]
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    child = cuda_audit.run_with_driver(command, **options)
    assert child.returncode == 0, child.stderr
    print(child.stdout)
    rows = json.loads(child.stdout.splitlines()[-1])
    assert sum(rows.pop("spoilt").values()) == 1
    assert rows == {"-".join(case): {} for case in STEPS}


def train_on_gpu(configuration, out):
    """Three optimizer steps, of which the last two may not wait for the GPU."""
    training = Training(configuration, Path(out), resume=False, build=build_model)
    assert training.accelerator.device.type == "cuda"
    training.batches.set_epoch(0)
    for batch in training.loader:
        loop.step(training, iter([batch]))
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert training.progress.step == training.batches.steps > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_step_on_a_real_gpu_never_waits(folder, tmp_path, precision):
    code = (
        "import sys, test_cuda, conftest; from nucsam.config import override;"
        "tables = conftest.TINY; tables['data']['root'] = sys.argv[1];"
        "config = override(tables, ['train.precision=' + sys.argv[2]]);"
        "test_cuda.train_on_gpu(config, sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(folder), precision, str(tmp_path / "run")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "false"}
    child = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
