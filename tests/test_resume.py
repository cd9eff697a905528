"""Runs killed at random points, in the middle of writes, or by a full disk resume bit for bit."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tifffile
import torch
from test_train import history, same

from nucsam.cli import run_command
from nucsam.config import to_toml
from nucsam.errors import UserError
from nucsam.run import checkpoint
from nucsam.run.directory import RunDirectory
from nucsam.score.runs import score_run
from nucsam.train import loop, training
from nucsam.train.loop import fit

fork = multiprocessing.get_context("fork")  # a child has everything imported already
# No child could compute gradients if this process did so first after an export to ONNX.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A configuration that saves after each of 18 steps, and its uninterrupted run."""
    config = tiny("train.epochs=6", "train.validate_every=2", "train.save_minutes=0")
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(config, run)
    return config, run


def start(prepare, config, run):
    """Resume a run in a child process, after `prepare()` there."""

    def resume():
        prepare()
        fit(config, run, resume=True)

    process = fork.Process(target=resume)
    process.start()
    return process


def assert_readable(run):
    """Every file under its final name is whole."""
    tensors = [path for path in run.rglob("*.safetensors") if not path.name.startswith(".")]
    for path in tensors:
        checkpoint.read_tensors(path)
    if (run / "metrics.jsonl").exists():
        history(run)


def assert_equal(run, whole_run):
    names = [{str(path.relative_to(r)) for path in r.rglob("*")} for r in (run, whole_run)]
    assert names[0] == names[1] and len(names[0]) == 10  # nothing half-written is left
    for name in ("adapter.safetensors", "base.safetensors", "state/last.safetensors"):
        assert same(run / name, whole_run / name), name
    assert history(run) == history(whole_run)
    scores = [json.loads((r / "scores.json").read_text()) for r in (run, whole_run)]
    assert scores[0] == scores[1]


def in_write(name, nth, act):
    """Call `act(partial)` before the nth write of a file takes its name."""

    def prepare():
        replace, seen = Path.replace, []

        def acting_replace(partial, path):
            seen.append(path.name)
            if path.name == name and seen.count(name) == nth:
                act(partial)
            return replace(partial, path)

        Path.replace = acting_replace

    return prepare


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in(name, nth, written):
    """Kill the process in its nth write of a file, with the share `written` on disk."""

    def die(partial):
        os.truncate(partial, int(written * partial.stat().st_size))
        kill()

    return in_write(name, nth, die)


def dying_after(calls):
    """Kill the process `calls` function calls and returns after its first write of the state."""

    def die_later(_):
        following = itertools.count(1)
        sys.setprofile(lambda *_: kill() if next(following) == calls else None)

    return in_write("last.safetensors", 1, die_later)


def test_killed_in_the_middle_of_writes(whole, tmp_path):
    config, run = whole[0], tmp_path / "run"
    deaths = [
        ("base.safetensors", 1, 0.5),
        ("last.safetensors", 1, 0.5),
        ("last.safetensors", 5, 1.0),
        ("adapter.safetensors", 1, 0.3),
        ("adapter.safetensors", 1, 1.0),
        ("metrics.jsonl", 1, 0.5),
        ("last.safetensors", 2, 0.9),
    ]
    for name, nth, written in deaths:
        process = start(dying_in(name, nth, written), config, run)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (name, nth)
        assert [path.name for path in run.rglob(".*.partial")] == [f".{name}.{process.pid}.partial"]
        assert_readable(run)
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


def test_killed_ten_times_at_random_points(whole, tmp_path):
    config, run, rng = whole[0], tmp_path / "run", random.Random(0)
    for kills in range(10):
        process = start(dying_after(rng.randint(1, 100_000)), config, run)  # 70,000 are a step
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"the run ended after {kills} kills"
        assert_readable(run)
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


def test_killed_in_a_validation(whole, tmp_path, monkeypatch):
    """Which may take longer than a launcher waits after its SIGTERM."""
    config = replace(whole[0], train=replace(whole[0].train, save_minutes=5.0))
    run = tmp_path / "run"
    process = start(lambda: monkeypatch.setattr(loop, "validate", kill), config, run)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    progress = checkpoint.read_tensors(run / "state" / "last.safetensors")[1]["progress"]
    assert progress["step"] == 6 and len(progress["history"]) == 1  # one epoch lacks its line
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_says_how_to_resume(whole, tmp_path, capfd, number):
    config, run = whole[0], tmp_path / "run"
    terminate = in_write("last.safetensors", 2, lambda _: signal.raise_signal(number))
    process = start(terminate, config, run)
    process.join(120)
    assert process.exitcode == 128 + number
    said = " ".join(capfd.readouterr().out.split())
    assert "step 3 of 18" in said and f"nucsam train --resume --out {run}" in said
    assert checkpoint.read_tensors(run / "state" / "last.safetensors")[1]["progress"]["step"] == 3
    assert not (run / "scores.json").exists()
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


def test_a_second_ctrl_c_stops_at_once_with_what_is_saved(whole, tmp_path, capfd):
    run = tmp_path / "run"

    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    process = start(in_write("last.safetensors", 2, twice), whole[0], run)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGINT
    assert "last.safetensors holds step 2 of 18" in " ".join(capfd.readouterr().out.split())
    fit(whole[0], run, resume=True)
    assert_equal(run, whole[1])


@pytest.mark.parametrize("limit", [200_000, 1_000_000])  # bytes; state 1.3 MB, adapter 0.3 MB
def test_a_full_disk_is_an_error_and_the_last_good_state_is_usable(whole, tmp_path, limit, capfd):
    config, run = whole[0], tmp_path / "run"
    process = start(dying_in("last.safetensors", 7, 1.0), config, run)
    process.join(120)
    good = (run / "state" / "last.safetensors").read_bytes()
    assert limit < len(good)
    process = start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), config, run)
    process.join(120)
    assert process.exitcode == 1
    assert "UserError" in capfd.readouterr().err
    assert (run / "state" / "last.safetensors").read_bytes() == good
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


def test_sigterm_to_the_whole_process_group_leaves_the_workers_until_all_is_saved(
    whole, tmp_path, capfd
):
    """As a shell, torchrun and SLURM send it; by itself PyTorch's loader makes a crash of it."""
    settings, run = tmp_path / "workers.toml", tmp_path / "run"
    settings.write_text(to_toml(whole[0]).replace("workers = 0", "workers = 2"))
    command = ["train", str(settings), "--out", str(run), "--resume"]

    def signalled():
        os.setsid()
        training.uses_gpu = lambda: True  # only beside a GPU do processes load images
        in_write("last.safetensors", 2, lambda _: os.killpg(0, signal.SIGTERM))()
        sys.exit(run_command(command))

    for _ in range(3):
        process = fork.Process(target=signalled)
        process.start()
        process.join(120)
        error = capfd.readouterr().err
        assert process.exitcode == 128 + signal.SIGTERM, error
        assert "Traceback" not in error
    assert RunDirectory(run).read_environment()["loader_processes"] > 0
    assert not (run / "scores.json").exists()
    assert run_command(command) == 0
    assert history(run) == history(whole[1])


def test_a_run_resumes_only_on_the_same_base(whole, tmp_path):
    base = shutil.copy(whole[1] / "base.safetensors", tmp_path / "base.safetensors")
    run = tmp_path / "run"
    config = replace(whole[0], model=replace(whole[0].model, weights=str(base)))
    start(dying_in("last.safetensors", 3, 1.0), config, run).join(120)
    tensors, metadata = checkpoint.read_tensors(base)
    name = max(tensors, key=lambda name: tensors[name].numel())
    checkpoint.write_tensors(base, tensors | {name: 2 * tensors[name]}, metadata)
    with pytest.raises(
        UserError, match=r"last\.safetensors: cannot resume with base_sha256: found"
    ):
        fit(config, run, resume=True)


def test_without_its_state_a_run_starts_again_from_nothing(whole, tmp_path):
    config, run = whole[0], tmp_path / "run"
    start(dying_in("last.safetensors", 12, 1.0), config, run).join(120)
    results = ("adapter.safetensors", "metrics.jsonl", "report.html")
    (run / "report.html").touch()
    assert all((run / name).exists() for name in results)
    shutil.rmtree(run / "state")
    start(dying_in("last.safetensors", 1, 0.5), config, run).join(120)
    assert not any((run / name).exists() for name in results)
    fit(config, run, resume=True)
    assert_equal(run, whole[1])


def test_a_finished_run_without_its_state_is_not_trained_again(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(run / "state")
    longer = replace(whole[0], train=replace(whole[0].train, epochs=11))
    for config in (whole[0], longer):
        with pytest.raises(UserError, match=r"last\.safetensors: found none, but .*run is trained"):
            fit(config, run, resume=True)
    (run / "scores.json").unlink()  # killed before it was scored
    with pytest.raises(UserError, match=r"nucsam evaluate .*run scores it, another out starts"):
        fit(whole[0], run, resume=True)
    score_run(run)
    assert (run / "scores.json").read_bytes() == (whole[1] / "scores.json").read_bytes()


def test_a_run_resumes_only_on_the_same_images(whole, tmp_path):
    config, run = whole[0], tmp_path / "run"
    start(dying_in("last.safetensors", 3, 1.0), config, run).join(120)
    more = tmp_path / "more"
    shutil.copytree(config.data.root, more)
    image = sorted(more.glob("*/tissue images/*.png"))[0]
    mask = image.parents[1] / "label masks modify" / f"{image.stem}.tif"
    shutil.copy(image, image.with_name("added.png"))
    shutil.copy(mask, mask.with_name("added.tif"))
    moved = replace(config, data=replace(config.data, root=str(more)))
    with pytest.raises(UserError, match=r"more: .*added: .*added"):
        fit(moved, run, resume=True)
    assert (run / "config.toml").read_text() == to_toml(config)
    fit(config, run, resume=True)
    with pytest.raises(UserError, match=str(more)):
        score_run(run, root=str(more))
    image.with_name("added.png").unlink()
    mask.with_name("added.tif").unlink()
    assert score_run(run, root=str(more))["headline"] == score_run(run)["headline"]
    label = tifffile.imread(mask)
    label[label == label.max()] = 0
    tifffile.imwrite(mask, label)
    with pytest.raises(UserError, match=f"other pixels or labels: .*{image.stem}"):
        score_run(run, root=str(more))


def test_a_run_is_scored_only_on_its_own_split_and_kept_only_at_its_end(whole, tmp_path):
    run = shutil.copytree(whole[1], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    (run / "scores.json").unlink()
    assert score_run(run)["unfinished"] == "2 of 6 epochs"
    assert not (run / "scores.json").exists()
    (run / "metrics.jsonl").write_text("".join(lines))
    assert score_run(run)["unfinished"] == "" and (run / "scores.json").exists()
    (run / "scores.json").unlink()
    (run / "scores.json").mkdir()  # in the way, as a file system is that can only be read
    with pytest.warns(UserWarning, match="scores.json: .*; the scores are not kept in the run"):
        assert score_run(run)["headline"]
    (run / "scores.json").rmdir()
    text = (run / "config.toml").read_text()
    for old, new in (
        ("fold = 0", "fold = 1"),
        ("inner = 0.3", "inner = 0.4"),
        ("seed = 19", "seed = 2"),
    ):
        assert old in text
        (run / "config.toml").write_text(text.replace(old, new))
        key = f"data.{old.split()[0]}"
        with pytest.raises(UserError, match=rf"adapter\.safetensors.*{key}"):
            score_run(run)
