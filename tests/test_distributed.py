"""Two CPU processes (gloo) equal one with twice the batch; every image is scored once; exits are clean."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from nucsam.train import train


def launch(processes, *arguments, cwd, **environment):
    """`torchrun` on `processes` CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(
        [*command, "-m", "nucsam.train", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def largest_difference(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and len(a) > 10
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path, accumulate):
    """Augmentation on, vague areas and images without nuclei in the data; at least five optimizer steps."""
    config = tiny("train.batch=2", f"train.accumulate={accumulate}", "train.epochs=3", "train.validate_every=3")
    train(config, tmp_path / "one")
    overrides = [f"train.accumulate={accumulate}", "train.batch=1"]
    done = launch(2, str(tmp_path / "one" / "config.toml"), *overrides, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = tmp_path / "one", tmp_path / "two"
    steps = [json.loads(line)["step"] for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] >= 5 and steps == [
        json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()
    ]
    assert largest_difference(one / "state" / "last.safetensors", two / "state" / "last.safetensors") < 1e-5
    scores = [json.loads((run / "scores.json").read_text()) for run in (one, two)]
    names = [[row["name"] for row in s["scores"][0]["images"]] for s in scores]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0]) == 4
    for metric, value in scores[0]["headline"].items():
        assert scores[1]["headline"][metric] == pytest.approx(value, abs=0.02), metric


def test_processes_that_do_not_know_of_each_other_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without the addresses that a launcher sets beside it
    with pytest.raises(ValueError, match="started 2 processes, Accelerate joined 1, so each would train alone"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
