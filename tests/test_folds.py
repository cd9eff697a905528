"""Folds as jobs: who runs which, what a child sees, what survives, and the table.

A tiny script stands for the trainer where the training itself is not the point: processes start in half a second then.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nucsam import folds
from nucsam.cli import run
from nucsam.config import load, to_toml

ROOT = Path(__file__).parents[1]
DRIVER = """
import sys
from nucsam import cli, folds
folds.TRAINER, folds.POLL = (sys.executable, {trainer!r}), 0.05
sys.exit(cli.run(["folds", *sys.argv[1:]]))
"""
TRAINER = """
import json, os, signal, sys, time, tomllib
from pathlib import Path

settings, flag, out, resume = sys.argv[1:]
assert (flag, resume) == ("--out", "--resume")
text, out = Path(settings).read_text(), Path(out)
fold = tomllib.loads(text)["data"]["fold"]
does = json.loads(os.environ.get("FAKE", "{}")).get(str(fold), "")
out.mkdir(exist_ok=True)
with open(os.environ["STARTED"], "a") as file:
    file.write(json.dumps({"run": str(out), "fold": fold, "pid": os.getpid(), "environment": dict(os.environ)}) + "\\n")
(out / "config.toml").write_text(text)
if does == "fail":
    print("before the traceback")
    raise RuntimeError("boom")
if does == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "hang":
    def save(*_):
        (out / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (out / "hangs").touch()
    time.sleep(60)
if does == "slow":
    time.sleep(1)
line = {"epoch": 2, "dice": 0.8, "aji": 0.6, "pq": 0.5, "images_per_second": 12.34}
(out / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
(out / "environment.json").write_text('{"parameters_trainable": 1000, "parameters": 5000000}')
mean = {"dice": 0.8, "aji": 0.6, "pq": 0.5}
summary = {"images": 1, "mean": mean, "organs": {}}
scores = [{"protocol": {"name": "nuinsseg"}, "rules": "nuinsseg: its rules", "summary": summary}]
(out / "scores.json").write_text(json.dumps({"epoch": 2, "base": {"source": "a.pt"}, "scores": scores}))
"""
LAUNCHED = {  # what torchrun, accelerate and MPI tell a process
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "PMI_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}


@pytest.fixture
def launch(tmp_path):
    """Starts `nucsam folds` with the fake trainer, in `tmp_path`, as one process of a launch."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "five.toml").write_text('[data]\nfolds = 5\n[train]\nepochs = 2\nvalidate_every = 1\nbest = "dice"\n')

    def start(*arguments, fake=None, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        told = {"STARTED": str(tmp_path / "started"), "FAKE": json.dumps(fake or {}), "COLUMNS": "200"}
        driver = DRIVER.format(trainer=str(tmp_path / "trainer.py"))
        command = [sys.executable, "-c", driver, "five.toml", "--out", "runs", *arguments]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=clean | told | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def end(process):
    """Exit status and output."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def started(folder):
    path = folder / "started"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return found


def wait_for(path, seconds=20):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def test_jobs_of_a_grid_in_order(tmp_path, tiny):
    grid = ["model.rank=[2, 4]", "model.alpha=[4, 8.0]"]
    found = folds.variants(tiny(), grid)
    labels = [f"model.rank={rank}, model.alpha={alpha}" for rank in (2, 4) for alpha in (4.0, 8.0)]
    assert list(found) == labels
    assert [(c.model.rank, c.model.alpha) for c in found.values()] == [(2, 4.0), (2, 8.0), (4, 4.0), (4, 8.0)]
    jobs = folds.plan(found, tmp_path)
    assert [(job.variant, job.fold) for job in jobs] == [(label, fold) for label in labels for fold in range(3)]
    assert jobs[4].run == tmp_path / "model.rank-2,model.alpha-8.0" / "fold1"
    assert jobs[4].config.data.fold == 1 and jobs[4].config.model.alpha == 8.0
    assert len({job.lock for job in jobs}) == 12
    assert [job.run for job in folds.plan(folds.variants(tiny(), []), tmp_path)] == [
        tmp_path / f"fold{k}" for k in range(3)
    ]


def test_values_that_fit_only_together(tiny):
    found = folds.variants(
        tiny("train.epochs=4", "train.validate_every=4"), ["train.epochs=[2]", "train.validate_every=[2]"]
    )
    assert found["train.epochs=2, train.validate_every=2"].train.validate_every == 2


def test_values_that_no_folder_can_be_named_after(tmp_path, tiny):
    grid = [r"model.pattern=['a/attn\.(qkv|proj)', 'a/attn\.(qkv,proj)']", 'model.head=["instance", "sam"]']
    jobs = folds.plan(folds.variants(tiny(), grid), tmp_path)
    folders = {job.run.parent for job in jobs}
    assert len(folders) == 4 and {folder.parent for folder in folders} == {tmp_path}
    assert all(re.fullmatch(r"model\.pattern-a-attn-[\w.,-]+-[0-9a-f]{8}", folder.name) for folder in folders)
    assert jobs[0].config.model.pattern == r"a/attn\.(qkv|proj)"


@pytest.mark.parametrize(
    "grid, message",
    [
        (["model.rank=4"], r"--grid: found 'model.rank=4', expected 'table.key=\[a, b, c\]'"),
        (["model.head=[sam]"], "strings quoted"),
        (["model.rank=[]"], r"--grid: found 'model.rank=\[\]'"),
        (["model.rnk=[4]"], "--grid: unknown key model.rnk; did you mean model.rank"),
        (["modle.rank=[4]"], r"--grid: unknown table \[modle\]; did you mean model"),
        (["model.rank=[4, 0]"], "model.rank: found 0, expected at least 1"),
        (["model.alpha=[8, 8.0]"], "--grid: found model.alpha=8.0 twice"),
        (["model.rank=[4]", "model.rank=[8]"], "expected each key once"),
        (["data.fold=[0, 1]"], "not data.fold"),
    ],
)
def test_a_grid_that_is_none(tiny, grid, message):
    with pytest.raises(ValueError, match=message):
        folds.variants(tiny(), grid)


def test_devices():
    assert folds.device_of({"CUDA_VISIBLE_DEVICES": "3,GPU-b", "LOCAL_RANK": "1"}) == "GPU-b"
    assert folds.device_of({"CUDA_VISIBLE_DEVICES": "3,GPU-b"}) == "3"
    assert folds.device_of({}) == "0"
    assert folds.device_of({"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "1"}) == ""
    assert folds.device_of({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_USE_CPU": "True"}) == ""
    with pytest.raises(ValueError, match="LOCAL_RANK: found 2 with the GPUs 0, 1, expected at most one process"):
        folds.device_of({"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_RANK": "2"})


def test_environment_of_a_child():
    kept = {"PATH": "/bin", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_CPU": "true", "RANKING": "mine"}
    child = folds.child_environment(LAUNCHED | kept, "1")
    assert child.pop("OMP_NUM_THREADS") == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert child == kept | {"CUDA_VISIBLE_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
    assert folds.child_environment({"OMP_NUM_THREADS": "7"}, "")["OMP_NUM_THREADS"] == "7"


def test_two_processes_share_five_jobs(launch, tmp_path):
    visible = {"CUDA_VISIBLE_DEVICES": "3,GPU-b", "ACCELERATE_MIXED_PRECISION": "bf16"}
    fake = dict.fromkeys("01234", "slow")
    second = launch(fake=fake, **LAUNCHED | visible)
    first = launch(fake=fake, **LAUNCHED | visible | {"RANK": "0", "LOCAL_RANK": "0"})
    (status, output), (other_status, other_output) = end(first), end(second)
    assert (status, other_status, other_output) == (0, 0, "")
    found = started(tmp_path)
    assert sorted(job["fold"] for job in found) == [0, 1, 2, 3, 4]
    assert {job["environment"]["CUDA_VISIBLE_DEVICES"] for job in found} == {"3", "GPU-b"}
    for job in found:
        assert not LAUNCHED.keys() & job["environment"].keys()
        assert job["environment"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for fold in range(5):
        assert f"fold {fold}: done, epoch 2 of 2, Dice 80.0, AJI 60.0, PQ 50.0, 12.3 images/s" in output
    assert "80.00 ± 0.00" in output and "published: CellViT (ViT-256)" in output
    assert json.loads((tmp_path / "runs/table.json").read_text())["variants"][0]["missing"] == []


def test_jobs_that_fail_or_are_killed_are_left_to_the_rerun(launch, tmp_path):
    status, output = end(launch(fake={"1": "fail", "2": "kill"}))
    assert status == 1
    assert [job["fold"] for job in started(tmp_path)] == [0, 1, 2, 3, 4]
    assert "fold 1 ended with status 1; a rerun goes on with it. runs/fold1.log ends with:\nTraceback" in output
    assert "RuntimeError: boom" in output and "before the traceback" not in output
    assert "fold 2 was killed by SIGKILL" in output
    assert "not done: fold 1, see runs/fold1.log\nnot done: fold 2" in output
    assert "INCOMPLETE: fold 1, 2 of 5 missing" in (tmp_path / "runs/table.md").read_text()
    (tmp_path / "runs/fold3/scores.json").write_text('{"epoch": ')  # killed while it was written
    assert end(launch())[0] == 0
    assert [job["fold"] for job in started(tmp_path)] == [1, 2, 3]
    assert "INCOMPLETE" not in (tmp_path / "runs/table.md").read_text()
    assert end(launch())[0] == 0 and not (tmp_path / "started").exists()


def test_sigterm_saves_and_a_rerun_goes_on(launch, tmp_path):
    process = launch(fake={"1": "hang"})
    wait_for(tmp_path / "runs/fold1/hangs")
    process.terminate()
    assert end(process)[0] == 128 + signal.SIGTERM
    assert (tmp_path / "runs/fold1/saved").exists() and not (tmp_path / "runs/table.md").exists()
    assert [job["fold"] for job in started(tmp_path)] == [0, 1]
    assert end(launch())[0] == 0
    assert [job["fold"] for job in started(tmp_path)] == [1, 2, 3, 4]


def test_a_killed_process_takes_its_child_along_and_keeps_no_claim(launch, tmp_path):
    process = launch(fake={"0": "hang"})
    wait_for(tmp_path / "runs/fold0/hangs")
    process.kill()
    rerun = launch()  # at once: the child may still be saving
    assert process.wait() == -signal.SIGKILL and end(rerun)[0] == 0
    assert (tmp_path / "runs/fold0/saved").exists()
    assert sorted(job["fold"] for job in started(tmp_path)) == [0, 0, 1, 2, 3, 4]
    process.stdout.close()


def test_a_launcher_that_dies_ends_its_process(launch, tmp_path):
    """One process of `accelerate launch`, which forwards no signal, stood for by a shell."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    told = {"STARTED": str(tmp_path / "started"), "FAKE": '{"0": "hang"}', "ACCELERATE_MIXED_PRECISION": "no"}
    (tmp_path / "driver.py").write_text(DRIVER.format(trainer=str(tmp_path / "trainer.py")))
    launcher = subprocess.Popen(
        ["sh", "-c", '"$0" driver.py five.toml --out runs; exit 0', sys.executable],
        cwd=tmp_path,
        env=os.environ | told,
        stdout=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "runs/fold0/hangs")
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path / "runs/fold0/saved")
    assert [job["fold"] for job in started(tmp_path)] == [0]


def test_another_configuration_is_refused_before_anything_runs(launch, tmp_path, monkeypatch, capsys):
    assert end(launch())[0] == 0
    started(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setattr(folds, "TRAINER", (sys.executable, str(tmp_path / "trainer.py")))
    same = ["folds", "five.toml", "--out", "runs"]
    assert run([*same, "train.epochs=3", "data.seed=20"]) == 2 and not (tmp_path / "started").exists()
    output = capsys.readouterr().err
    assert "runs of another configuration (found -> wanted)" in output
    assert "runs/folds.toml: data.seed: 19 -> 20; train.epochs: 2 -> 3" in output
    assert "runs/fold4/config.toml: data.seed: 19 -> 20; train.epochs: 2 -> 3" in output
    assert run([*same, "data.root=elsewhere"]) == 0 and not (tmp_path / "started").exists()  # the data may have moved
    assert run([*same, "--grid", "model.rank=[8]"]) == 0 and len(started(tmp_path)) == 5  # a grid may grow


def test_a_users_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["folds", "data.fold=2", "--out", "runs"]) == 2
    assert "data.fold: found it on the command line" in capsys.readouterr().err
    assert run(["folds", "none.toml", "--out", "runs"]) == 2
    assert "none.toml: no such configuration file" in capsys.readouterr().err
    assert run(["folds", "--out", "a=b"]) == 2
    assert "--out: found a=b, expected a path without =" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").touch()
    assert run(["folds", "--out", "run"]) == 2
    assert "run is a run of nucsam train" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def write_scores(job, *, dice, organs=None, no_vague=None, epoch=1):
    """A finished run with given mean Dice, AJI a half and PQ a quarter of it."""
    of = lambda value: {"dice": value, "aji": value and value / 2, "pq": value and value / 4}  # noqa: E731
    groups = {organ: {"images": images, "mean": of(value)} for organ, (images, value) in (organs or {}).items()}
    images = sum(group["images"] for group in groups.values())
    scores = [("nuinsseg", dice), *([("nuinsseg-no-vague", no_vague)] if no_vague is not None else [])]
    scores = [
        {
            "protocol": {"name": name},
            "rules": f"{name}: rules",
            "summary": {"images": images, "mean": of(value), "organs": groups},
        }
        for name, value in scores
    ]
    job.run.mkdir(parents=True)
    (job.run / "scores.json").write_text(
        json.dumps({"epoch": epoch, "base": {"source": "mobile_sam.pt"}, "scores": scores})
    )
    (job.run / "environment.json").write_text('{"parameters_trainable": 1234567, "parameters": 5826993}')


def test_numbers_of_the_table(tmp_path, tiny):
    base = tiny("data.select=test", "model.weights=auto", "train.best=dice")
    jobs = folds.plan(folds.variants(base, ["model.rank=[4, 8]"]), tmp_path)
    write_scores(jobs[0], dice=0.6, organs={"liver": (2, 0.5), "brain": (1, 0.8)}, epoch=1)
    write_scores(jobs[1], dice=0.7, organs={"liver": (1, 0.7)}, no_vague=0.75, epoch=2)
    write_scores(jobs[2], dice=0.8, organs={"liver": (3, None)}, epoch=2)  # undefined there
    write_scores(jobs[4], dice=0.5)
    table = folds.cross_validation(jobs, "tiny")
    row, other = table["variants"]
    plain, no_vague = row["protocols"]
    assert plain["mean"] == pytest.approx({"dice": 0.7, "aji": 0.35, "pq": 0.175})
    assert plain["std"] == pytest.approx({"dice": 0.1, "aji": 0.05, "pq": 0.025})  # n - 1 below the square root
    assert no_vague["mean"]["dice"] == pytest.approx((0.6 + 0.75 + 0.8) / 3)  # only fold 1 has vague areas
    assert plain["images"] == 7 and plain["organs"]["brain"]["mean"]["dice"] == 0.8
    assert (plain["organs"]["liver"]["images"], plain["organs"]["liver"]["folds"]) == (6, 3)
    assert plain["organs"]["liver"]["mean"]["dice"] != plain["organs"]["liver"]["mean"]["dice"]  # NaN
    assert row["best_epochs"] == {0: 1, 1: 2, 2: 2} and row["missing"] == [] and other["missing"] == [0, 2]
    assert len(table["published"]) == 10

    text = "\n".join(folds.markdown(table))
    mark = "`model.rank=4`; **EPOCH CHOSEN ON THE TEST IMAGES**; nuinsseg"
    assert f"| {mark} | 70.00 ± 10.00 | 35.00 ± 5.00 | 17.50 ± 2.50 | 1,234,567 |" in text
    assert f"| {mark}-no-vague | 71.67 ± 10.41 |" in text
    assert "**INCOMPLETE: fold 0, 2 of 3 missing**; nuinsseg | 50.00 | 25.00 | 12.50 |" in text
    assert "| liver | 6 | 3 | - | - | - |" in text and "| brain | 1 | 1 | 80.00 | 40.00 | 20.00 |" in text
    assert "| 2; kept 1 in fold 0, 2 in fold 1, 2 in fold 2, chosen by dice on the test split |" in text
    assert "| published: CellViT (ViT-256) | 81.92 | 60.03 | 56.44 |" in text
    assert "chose their best epoch on the fold they report" in text and "comparable only on it" in text
    assert "RANDOM BASE" not in text


def test_a_table_without_any_fold_says_so(tmp_path, tiny):
    text = "\n".join(folds.markdown(folds.cross_validation(folds.plan(folds.variants(tiny(), []), tmp_path), "tiny")))
    label = "`tiny`; **RANDOM BASE WEIGHTS**; **INCOMPLETE: fold 0, 1, 2 of 3 missing**; no fold done"
    assert f"| {label} | - | - | - | - |" in text
    assert "kept none" in text


def test_two_folds_by_accelerate_launch(tiny, tmp_path):
    (tmp_path / "two.toml").write_text(to_toml(tiny("data.folds=2")))
    command = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml"), "-m", "nucsam.folds"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "two.toml", "train.epochs=1", "--out", "runs", "--grid", "model.rank=[2]"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "runs/table.json").read_text())["variants"][0]
    scores = [json.loads((tmp_path / f"runs/model.rank-2/fold{k}/scores.json").read_text()) for k in range(2)]
    names = [{row["name"] for row in s["scores"][0]["images"]} for s in scores]
    assert len(names[0]) == len(names[1]) == 6 and not names[0] & names[1]
    assert table["missing"] == [] and table["random_base"] and table["protocols"][0]["images"] == 12
    mean = sum(s["headline"]["dice"] for s in scores) / 2
    assert table["protocols"][0]["mean"]["dice"] == pytest.approx(mean)
    assert "RANDOM BASE WEIGHTS" in done.stdout
    assert load(tmp_path / "runs/model.rank-2/fold1/config.toml").data.fold == 1
    assert table["parameters_trainable"] == 114_800 - 44_544 // 2  # rank 2, not 4
    assert "trains 92,528 of" in (tmp_path / "runs/model.rank-2/fold1.log").read_text()


SRUN = """#!/bin/sh
echo "srun $*" >> calls
while [ "${1#-}" != "$1" ]; do shift; done
for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k SLURM_NODEID=0 "$@" & pids="$pids $!"; done
echo $pids > pids
status=0
for p in $pids; do wait $p || status=$?; done
exit $status
"""
TASK = """#!/bin/sh
echo "$(basename "$0") $* RANK=$RANK LOCAL_RANK=$LOCAL_RANK $ACCELERATE_MIXED_PRECISION" >> calls
trap 'exit 143' TERM
touch ready$SLURM_PROCID
[ "$HANG" ] && while :; do sleep 0.05; done
exit 0
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts launch/slurm.sh as SLURM's batch step does, with two tasks; stands for srun, scancel, scontrol, python."""
    shown = '#!/bin/sh\necho "$(basename "$0") $*" >> calls\n'
    commands = {"srun": SRUN, "python": TASK, "accelerate": TASK}
    commands |= {"scancel": shown + "kill -TERM $(cat pids)\n", "scontrol": shown + "printf 'node1\\nnode2\\n'\n"}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(*arguments, **environment):
        slurm = {"NNODES": 1, "NTASKS_PER_NODE": 2, "CPUS_PER_TASK": 3, "JOB_ID": 7, "JOB_NODELIST": "node[1-2]"}
        told = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "launch/slurm.sh"), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | told | path | environment)

    return start


def test_slurm_runs_folds_as_tasks(cluster, tmp_path):
    assert cluster("folds", "a b.toml", "--out", "runs", ACCELERATE_MIXED_PRECISION="fp16").wait(20) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("srun --ntasks-per-node=2 --cpus-per-task=3 --kill-on-bad-exit=0 --wait=0 bash -c")
    wanted = [f"python -m nucsam.folds a b.toml --out runs RANK={k} LOCAL_RANK={k} fp16" for k in range(2)]
    assert sorted(line for line in calls if line.startswith("python")) == wanted
    assert cluster("fold").wait(20) == 2


def test_slurm_runs_one_launcher_a_node_for_ddp(cluster, tmp_path):
    assert cluster("train", "c.toml", "--out", "run", SLURM_NNODES="2").wait(20) == 0
    text = (tmp_path / "calls").read_text()
    assert "srun --ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 --kill-on-bad-exit=1 bash -c" in text
    wanted = "--num_machines 2 --machine_rank 0 --num_processes 4 --main_process_ip node1 --main_process_port 20007"
    assert wanted in text and "-m nucsam.train c.toml --out run --resume" in text


def test_slurm_signals_the_tasks_and_requeues(cluster, tmp_path):
    process = cluster("folds", "--out", "runs", HANG="1")
    wait_for(tmp_path / "ready0")
    wait_for(tmp_path / "ready1")
    process.terminate()
    assert process.wait(20) == 143
    assert (tmp_path / "calls").read_text().endswith("scancel --signal=TERM 7\nscontrol requeue 7\n")
