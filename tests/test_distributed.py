"""Two CPU processes (gloo) equal one with twice the batch; a dead process ends the run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from conftest import TINY
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from nucsam.cli import run_command
from nucsam.config import Data, load_config, override, to_toml
from nucsam.data import folders, splits
from nucsam.data.samples import Samples
from nucsam.data.synthetic import write_dataset
from nucsam.model.heads import Norm
from nucsam.model.network import build_model
from nucsam.run.checkpoint import run_base
from nucsam.run.directory import RunDirectory
from nucsam.train.loop import fit


def launch(processes, *arguments, cwd, program=("-m", "nucsam.train")):
    """`torchrun` on `processes` CPU processes."""
    words = "-m torch.distributed.run --standalone --nproc_per_node"
    return subprocess.Popen(
        [sys.executable, *words.split(), str(processes), *program, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Makes configurations: 6 training images (2 without nuclei, 4 with vague areas), 3, 3."""
    out = tmp_path_factory.mktemp("data") / "set"
    write_dataset(out, images=12, size=96, seed=4)
    tables = {name: dict(values) for name, values in TINY.items()}
    tables["data"] |= {"root": str(out), "folds": 4}
    samples = Samples(folders.find_records(out))
    data = Data(folds=4, fold=0, inner=0.3)
    chosen = [samples[i] for i in splits.split_records(samples.records, data).train]
    assert sum(sample.label.max() == 0 for sample in chosen) == 2
    assert sum(bool(sample.vague.any()) for sample in chosen) == 4
    return lambda *overrides: override(tables, list(overrides))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(function, *arguments):
    """Call function(*arguments) in two processes of one launch.

    Forked, they have imported everything, and know of earlier runs.
    """
    start_processes(_launched, (free_port(), function, *arguments), nprocs=2, start_method="fork")


def _launched(rank, port, function, *arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in told.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    function(*arguments)


def check_norm():
    dist.init_process_group("gloo")
    share = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    generator = torch.Generator().manual_seed(0)
    x, weight = (3 * torch.randn(6, 4, 5, 7, generator=generator) + 1 for _ in range(2))
    for layout in torch.contiguous_format, torch.channels_last:
        whole, part = (t.clone(memory_format=layout).requires_grad_() for t in (x, x[share]))
        one, two = torch.nn.BatchNorm2d(4), Norm(4)
        for norm in one, two:
            torch.nn.init.uniform_(norm.weight, generator=generator.manual_seed(1))
        expected, result = one(whole), two(part)
        (expected * weight).sum().backward()
        (result * weight[share]).sum().backward()
        alone = torch.nn.BatchNorm2d(4)(part)  # negative control: one process's statistics
        assert not torch.allclose(alone, result, atol=1e-2)
        assert result.is_contiguous(memory_format=layout)
        torch.testing.assert_close(result, expected[share])
        torch.testing.assert_close(part.grad, whole.grad[share], atol=1e-5, rtol=1e-5)
        for name, buffer in two.named_buffers():
            torch.testing.assert_close(buffer, one.get_buffer(name))
        for name, p in two.named_parameters():
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, one.get_parameter(name).grad, atol=1e-4, rtol=1e-5)
        half = part.detach().bfloat16().requires_grad_()
        (two(half) * weight[share]).sum().backward()
        torch.testing.assert_close(half.grad.float(), part.grad, atol=0.02, rtol=0.02)
    dist.barrier()  # else gloo sometimes aborts at interpreter exit
    dist.destroy_process_group()


def test_norm_of_two_processes_equals_batchnorm_over_both():
    """Values, gradients and statistics."""
    in_two_processes(check_norm)


def train(*arguments):
    assert run_command(["train", *arguments]) == 0


@pytest.mark.parametrize("head, accumulate", [("instance", 1), ("instance", 2), ("sam", 1)])
def test_two_processes_equal_one_with_twice_the_batch(config, tmp_path, head, accumulate):
    """With augmentation, vague areas and images without nuclei, after six optimizer steps."""
    one, two = tmp_path / "one", tmp_path / "two"
    epochs = {1: 2, 2: 3}[accumulate]
    schedule = [
        f"train.accumulate={accumulate}",
        f"train.epochs={epochs}",
        f"train.validate_every={epochs}",
    ]
    # Adam's first steps move a weight by the whole rate even for a rounding error: warm up.
    schedule += [f"model.head={head}", "train.warmup=0.9"]
    fit(config("train.batch=2", *schedule), one)
    in_two_processes(train, str(one / "config.toml"), "train.batch=1", "--out", str(two))
    lines = [
        [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()]
        for r in (one, two)
    ]
    steps = [[line["step"] for line in run] for run in lines]
    assert steps[0] == steps[1] and steps[0][-1] == 6
    losses = [[line["loss"] for line in run] for run in lines]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    states = [load_file(r / "state" / "last.safetensors") for r in (one, two)]
    weights = [name for name in states[0] if name.startswith("weights.")]
    assert states[0].keys() == states[1].keys() and len(weights) > 10
    if head == "sam":
        assert (
            max(float((states[0][name] - states[1][name]).abs().max()) for name in weights) < 1e-5
        )
    else:  # a BatchNorm leaves many gradients near 0, and Adam amplifies their rounding errors
        settings = load_config(one / "config.toml")
        start = build_model(
            settings.model, run_base(RunDirectory(one), settings), seed=settings.train.seed
        ).trainable()
        ends = [
            torch.cat([state[f"weights.{name}"].flatten() for name in start]) for state in states
        ]
        way = ends[0] - torch.cat([p.detach().flatten() for p in start.values()])
        assert (ends[0] - ends[1]).norm() < 0.03 * way.norm()

    scores = [json.loads((r / "scores.json").read_text()) for r in (one, two)]
    names = [[row["name"] for row in s["scores"][0]["images"]] for s in scores]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0]) == 3  # two processes share three images
    for metric, value in scores[0]["headline"].items():
        assert scores[1]["headline"][metric] == pytest.approx(value, abs=0.02), metric


def test_a_dead_process_ends_the_run_with_an_error(config, tmp_path):
    (tmp_path / "long.toml").write_text(
        to_toml(config("train.epochs=1000", "train.validate_every=1000"))
    )
    run = launch(2, "long.toml", "--out", "run", cwd=tmp_path)
    while run.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.1)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    assert run.wait(300) != 0
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2 and not alive


SIGNALLED = """
import os, runpy, signal, time
from nucsam.run.directory import RunDirectory

received = []
write = RunDirectory.write_metrics

def write_and_signal(*arguments):
    RunDirectory.write_metrics = write
    write(*arguments)
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *signalled: received.append(handler(*signalled)))
    os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which forwards it
    while not received:
        time.sleep(0.01)

RunDirectory.write_metrics = write_and_signal
runpy.run_module("nucsam.train", run_name="__main__")
"""


def test_sigterm_ends_all_processes_and_the_run_resumes(config, tmp_path, monkeypatch):
    settings = config("train.epochs=3", "train.validate_every=3", "train.batch=1")
    (tmp_path / "three.toml").write_text(to_toml(settings))
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    run = launch(2, "three.toml", "--out", "run", cwd=tmp_path, program=("signalled.py",))
    assert run.wait(300) != 0
    state = tmp_path / "run" / "state" / "last.safetensors"
    assert state.is_file() and not (tmp_path / "run" / "scores.json").exists()
    monkeypatch.chdir(tmp_path)
    in_two_processes(train, "three.toml", "--out", "run", "--resume")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
