"""Folds as jobs: who runs which, what a child sees, what survives.

Where the training is not the point a tiny script stands for the trainer, which starts at once.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import whole_scores

from nucsam.cli import run_command
from nucsam.config import Config, Data, load_config, to_toml
from nucsam.data.samples import read_digest
from nucsam.data.splits import find_split, inventory
from nucsam.errors import UserError
from nucsam.folds import runner
from nucsam.folds.jobs import child_environment, device_of, plan, variants
from nucsam.run.directory import RunDirectory

ROOT = Path(__file__).parents[1]
DRIVER = """
import sys
from nucsam.cli import run_command
from nucsam.folds import runner
runner.TRAINER, runner.POLL = (sys.executable, "trainer.py"), 0.05
sys.exit(run_command(["folds", "five.toml", "--out", "runs", *sys.argv[1:]]))
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
    file.write(json.dumps({"fold": fold, "environment": dict(os.environ)}) + "\\n")
(out / "config.toml").write_text(text)
if does == "fail":
    print("before the traceback")
    raise RuntimeError("boom")
if does == "kill":
    print("first line\\nlast line", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if does == "hang":
    def save(*_):
        (out / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (out / "hangs").touch()
    time.sleep(60)
while does == "wait" and not Path("go").exists():
    time.sleep(0.02)
line = {"epoch": 2, "dice": 0.9, "aji": 0.7, "pq": 0.6, "images_per_second": 12.34}
(out / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
(out / "environment.json").write_text('{"parameters_trainable": 1000, "parameters": 5000000}')
(out / "scores.json").write_text(os.environ["SCORES"])
"""
LAUNCHED = {  # what torchrun, accelerate and MPI tell a process
    **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), "1"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), "2"),
    **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    **{"TORCHELASTIC_RESTART_COUNT": "0", "ACCELERATE_DYNAMO_BACKEND": "no"},
}


@pytest.fixture
def launch(tmp_path, monkeypatch, folder):
    """Starts `nucsam folds` in `tmp_path` with the fake trainer, as one process of a launch."""
    monkeypatch.chdir(tmp_path)
    Path("trainer.py").write_text(TRAINER)
    Path("driver.py").write_text(DRIVER)
    data, train = f"root = '{folder}'\nfolds = 5", "epochs = 2\nvalidate_every = 1"
    Path("five.toml").write_text(f"[data]\n{data}\n[train]\n{train}\n")
    clean = {name: text for name, text in os.environ.items() if not name.startswith("ACCELERATE_")}

    def start(*arguments, fake=(), command=(sys.executable, "driver.py"), **environment):
        told = {"STARTED": str(tmp_path / "started"), "FAKE": json.dumps(dict(fake))}
        told["SCORES"] = json.dumps(whole_scores())
        return subprocess.Popen(
            [*command, *arguments],
            env=clean | told | {"COLUMNS": "200"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def end(process):
    """Exit status and output."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def started():
    """What the fake trainers since the last call were given."""
    path = Path("started")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def folds_started():
    return [job["fold"] for job in started()]


def wait_for(path, seconds=60):
    until = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def test_values_that_look_alike_in_a_name_have_folders_of_their_own(tmp_path, tiny):
    by_label = variants(tiny(), ["data.region_class=['a=b', 'a-b', 'a, b', 'a,b']"])
    runs = {job.run for job in plan(by_label, tmp_path)}
    assert len(by_label) == 4 and len(runs) == 4 * tiny().data.folds
    assert tmp_path / "data.region_class-a-b" / "fold0" in runs  # as it always was


def test_jobs_of_a_grid_in_order(tmp_path, tiny):
    by_label = variants(tiny(), ["model.rank=[2, 4]", "model.alpha=[4, 8.0]"])
    labels = [f"model.rank={rank}, model.alpha={alpha}" for rank in (2, 4) for alpha in (4.0, 8.0)]
    ranks = [(c.model.rank, c.model.alpha) for c in by_label.values()]
    assert list(by_label) == labels and ranks == [(2, 4.0), (2, 8.0), (4, 4.0), (4, 8.0)]
    jobs = plan(by_label, tmp_path)
    order = [(label, fold) for label in labels for fold in range(3)]
    assert [(job.variant, job.fold) for job in jobs] == order
    assert jobs[4].run == tmp_path / "model.rank-2,model.alpha-8.0" / "fold1"
    assert jobs[4].name == "model.rank=2, model.alpha=8.0, fold 1"
    assert jobs[4].config.data.fold == 1 and jobs[4].config.model.alpha == 8.0
    assert len({job.lock for job in jobs}) == 12
    single = plan(variants(tiny(), []), tmp_path)
    assert [job.run for job in single] == [tmp_path / f"fold{k}" for k in range(3)]


def test_values_that_fit_only_together(tiny):
    base = tiny("train.epochs=4", "train.validate_every=4")
    (variant,) = variants(base, ["train.epochs=[2]", "train.validate_every=[2]"]).values()
    assert (variant.train.epochs, variant.train.validate_every) == (2, 2)


def test_values_that_no_folder_can_be_named_after(tmp_path, tiny):
    patterns = r"model.pattern=['a/attn\.(qkv|proj)', 'a/attn\.(qkv,proj)']"
    jobs = plan(variants(tiny(), [patterns, 'model.head=["instance", "sam"]']), tmp_path)
    folders = {job.run.parent for job in jobs}
    assert len(folders) == 4 and {folder.parent for folder in folders} == {tmp_path}
    name = re.compile(r"model\.pattern-a-attn-[\w.,-]+-[0-9a-f]{8}")
    assert all(name.fullmatch(folder.name) for folder in folders)
    assert jobs[0].config.model.pattern == r"a/attn\.(qkv|proj)"
    long = "/".join("abc" * 50)
    (folder,) = {job.run.parent for job in plan({f"model.pattern={long}": tiny()}, tmp_path)}
    assert len(folder.name) <= 109


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        (["rank=[4]"], "'rank=.4.'"),
        (["model.head=[sam]"], "strings quoted"),
        (["model.rank=[]"], r"'model.rank=\[\]'"),
        (["model.rnk=[4]"], "model.rnk; did you mean model.rank"),
        (["modle.rank=[4]"], "modle"),
        (["model.rank=[4, 0]"], "model.rank: found 0"),
        (["model.rank=[4]", "model.rank=[8]"], "each key once"),
        (["data.workers=[0, 1]"], "data.workers, which changes no result"),
    ],
)
def test_what_is_no_grid_is_refused(tiny, grid, named):
    with pytest.raises(UserError, match=named):
        variants(tiny(), grid)


def test_devices():
    assert device_of({"CUDA_VISIBLE_DEVICES": "3,GPU-b", "LOCAL_RANK": "1"}) == "GPU-b"
    assert device_of({"CUDA_VISIBLE_DEVICES": "3, GPU-b"}) == "3"
    assert device_of({}) == "0"
    assert device_of({"CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "1"}) == ""
    assert device_of({"CUDA_VISIBLE_DEVICES": "0,1", "ACCELERATE_USE_CPU": "True"}) == ""


def test_environment_of_a_child():
    stays = {"PATH": "/bin", "ACCELERATE_MIXED_PRECISION": "fp16", "RANKING": "mine"}
    stays |= {"ACCELERATE_USE_CPU": "true"}
    child = child_environment(LAUNCHED | stays, "1")
    assert child.pop("OMP_NUM_THREADS") == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert child == stays | {"CUDA_VISIBLE_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
    assert child_environment({"OMP_NUM_THREADS": "7"}, "")["OMP_NUM_THREADS"] == "7"


def test_two_processes_share_five_jobs(launch):
    visible = {"CUDA_VISIBLE_DEVICES": "3,GPU-b", "ACCELERATE_MIXED_PRECISION": "bf16"}
    fake = dict.fromkeys("01234", "wait")
    second = launch(fake=fake, **LAUNCHED | visible)
    first = launch(fake=fake, **LAUNCHED | visible | {"RANK": "0", "LOCAL_RANK": "0"})
    running = [first.stdout.readline() for _ in range(2)]  # a fold of each process
    Path("go").touch()
    status, output = end(first)
    assert status == 0 and end(second) == (0, "")
    jobs = started()
    assert sorted(job["fold"] for job in jobs) == [0, 1, 2, 3, 4]
    assert {job["environment"]["CUDA_VISIBLE_DEVICES"] for job in jobs} == {"3", "GPU-b"}
    for job in jobs:
        assert not LAUNCHED.keys() & job["environment"].keys()
        assert job["environment"]["ACCELERATE_MIXED_PRECISION"] == "bf16"
    numbers = "done, epoch 2 of 2, test Dice 80.0, AJI 60.0, PQ 50.0"
    assert all(f"fold {fold}: {numbers}" in output for fold in range(5))
    assert re.search(r"fold \d: running on \S+ 3, epoch 0 of 2\n", "".join(running))
    assert "80.00 ± 0.00" in output and "published:" not in output
    assert "runs/methods.md: the methods, with citations" in output
    assert "We ran a 5-fold cross-validation." in Path("runs/methods.md").read_text()
    assert json.loads(Path("runs/table.json").read_text())["variants"][0]["missing"] == []


def test_each_epoch_is_told_once_and_without_scores(tmp_path, tiny, monkeypatch, capsys):
    """Scores of the inner split would be taken for results."""
    (job,) = plan(variants(tiny("data.folds=2"), []), tmp_path)[:1]
    job.run.mkdir()
    board = runner.Board([job], shown=True)
    monkeypatch.setattr(board, "state", lambda _: "running")
    for epoch in (1, 1, 2):
        job.directory.write_metrics([{"epoch": epoch, "dice": 0.5, "aji": 0.4, "pq": 0.3}])
        board.refresh()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"fold 0: running, epoch {epoch} of 2" for epoch in (1, 2)]


def test_jobs_that_fail_or_are_killed_are_left_to_the_rerun(launch):
    status, output = end(launch(fake={"1": "fail", "2": "kill"}))
    assert status == 1 and folds_started() == [0, 1, 2, 3, 4]
    assert re.search(r"fold 1 ended with status 1; .*runs/fold1\.log ends with:\nTrace", output)
    assert "RuntimeError: boom" in output and "before the traceback" not in output
    assert "fold 2 was killed by SIGKILL" in output
    assert "fold2.log ends with:\nfirst line\nlast line\n" in output
    assert "not done: fold 1, see runs/fold1.log\nnot done: fold 2" in output
    assert "INCOMPLETE: fold 1, 2 of 5 missing" in Path("runs/table.md").read_text()
    Path("runs/fold3/scores.json").write_text('{"epoch": ')  # killed while it was written
    Path("runs/fold4/metrics.jsonl").write_text('{"epoch": ')
    assert end(launch())[0] == 0 and folds_started() == [1, 2, 3, 4]
    assert "INCOMPLETE" not in Path("runs/table.md").read_text()
    assert end(launch())[0] == 0 and folds_started() == []


def test_a_signal_without_a_name_and_a_log_that_is_gone(tmp_path, tiny):
    (job,) = plan(variants(tiny("data.folds=2"), []), tmp_path)[:1]
    told = runner._failure(job, {"status": -40, "log_from": 0})
    assert told.startswith("fold 0 was killed by signal 40; a rerun resumes it.")


def test_a_failed_job_is_not_tried_again_under_a_clock_that_is_set_back(launch):
    driver = Path("driver.py")
    back = "import time; now = time.time; time.time = lambda: 2e9 - 3600 * now() % 1e9\n"
    driver.write_text(back + driver.read_text())
    status, _ = end(launch(fake={"1": "fail"}))
    assert status == 1 and folds_started() == [0, 1, 2, 3, 4]
    assert end(launch())[0] == 0 and folds_started() == [1]


def test_a_choice_of_precision_is_no_launcher(launch):
    """`nohup nucsam folds` goes on when its shell ends."""
    shell = ["sh", "-c", '"$0" driver.py --grid "train.seed=[0]" > log & exec sleep 60']
    fake = {"0": "wait"}
    outer = launch(command=[*shell, sys.executable], fake=fake, ACCELERATE_MIXED_PRECISION="no")
    wait_for("runs/train.seed-0/fold0/config.toml")
    outer.kill()
    outer.wait()
    time.sleep(0.3)  # several looks at the parent
    Path("go").touch()
    wait_for("runs/table.md")


def test_an_interrupted_retry_of_another_launch_keeps_how_the_first_try_ended(launch):
    first = launch(fake={"0": "fail", "1": "wait"})
    wait_for("runs/fold1/config.toml")  # so that fold 0 has failed
    second = launch(fake={"0": "hang"})
    wait_for("runs/fold0/hangs")
    second.send_signal(signal.SIGINT)
    end(second)
    Path("go").touch()
    status, output = end(first)
    assert status == 1 and "fold 0 ended with status 1" in output
    assert end(launch())[0] == 0


def test_a_stopped_fold_with_scores_is_not_finished(launch):
    assert end(launch())[0] == 0 and len(started()) == 5
    Path("runs/fold2/metrics.jsonl").write_text('{"epoch": 1}\n')  # as after `evaluate` of old
    assert end(launch())[0] == 0 and folds_started() == [2]


def test_variants_that_read_labels_in_another_way_have_their_own_images(tiny, tmp_path, folder):
    base = tiny(f"data.root={folder}")
    jobs = plan(variants(base, ["data.connected=[true, false]"]), tmp_path)
    halves = []
    for job in jobs[0], jobs[-1]:
        records, split = find_split(job.config.data)
        images = inventory(records, split, [read_digest(record) for record in records])
        job.directory.prepare(job.config, images)
        halves.append(images)
    assert halves[0] != halves[1]
    runner.check_images(jobs)
    jobs[0].directory.prepare(jobs[0].config, halves[0] | {"gone": next(iter(halves[0].values()))})
    with pytest.raises(UserError, match="removed: gone"):
        runner.check_images(jobs)


def test_runs_of_other_images_are_refused(launch, tmp_path, folder, monkeypatch):
    data = shutil.copytree(folder, tmp_path / "data")
    where = [f"data.root={data}"]
    assert end(launch(*where))[0] == 0 and len(started()) == 5
    settings = load_config(tmp_path / "runs/fold0/config.toml")
    records, split = find_split(settings.data)
    images = inventory(records, split, [read_digest(record) for record in records])
    RunDirectory(tmp_path / "runs/fold0").prepare(settings, images)
    data = data.rename(tmp_path / "moved")
    where = [f"data.root={data}"]
    assert end(launch(*where))[0] == 0 and started() == []
    image = sorted(data.glob("*/tissue images/*.png"))[0]
    label = image.parents[1] / "label masks modify" / f"{image.stem}.tif"
    shutil.copy(image, image.with_stem("added"))
    shutil.copy(label, label.with_stem("added"))
    status, output = end(launch(*where))
    assert status == 2 and started() == []
    assert f"{data}: found other images than runs/fold0" in output and "added: added" in output


def test_sigterm_saves_and_a_rerun_resumes(launch):
    process = launch(fake={"1": "hang"})
    wait_for("runs/fold1/hangs")
    process.terminate()
    assert end(process)[0] == 128 + signal.SIGTERM
    assert Path("runs/fold1/saved").exists() and not Path("runs/table.md").exists()
    assert folds_started() == [0, 1]
    assert end(launch())[0] == 0 and folds_started() == [1, 2, 3, 4]


def test_a_killed_process_takes_its_child_along_and_keeps_no_claim(launch):
    process = launch(fake={"0": "hang"})
    wait_for("runs/fold0/hangs")
    process.kill()
    rerun = launch()  # at once: the child may still be saving
    assert end(process)[0] == -signal.SIGKILL and end(rerun)[0] == 0
    assert Path("runs/fold0/saved").exists()
    assert sorted(folds_started()) == [0, 0, 1, 2, 3, 4]


def test_a_launcher_that_dies_ends_its_process(launch):
    """A shell stands for `accelerate launch` of one process, which forwards no signal."""
    shell = ["sh", "-c", '"$0" driver.py; exit 0', sys.executable]
    launcher = launch(command=shell, fake={"0": "hang"}, ACCELERATE_DYNAMO_BACKEND="no")
    wait_for("runs/fold0/hangs")
    launcher.kill()
    assert "the launcher has ended" in end(launcher)[1]
    wait_for("runs/fold0/saved")
    assert folds_started() == [0]


def test_another_configuration_is_refused_before_anything_runs(launch, monkeypatch, capsys):
    assert end(launch())[0] == 0 and len(started()) == 5
    monkeypatch.setenv("STARTED", "started")
    monkeypatch.setenv("SCORES", json.dumps(whole_scores()))
    monkeypatch.setattr(runner, "TRAINER", (sys.executable, "trainer.py"))
    same = ["folds", "five.toml", "--out", "runs"]
    assert run_command([*same, "train.epochs=3", "data.seed=20"]) == 2 and started() == []
    message = capsys.readouterr().err
    changed = "data.seed: 19 -> 20; train.epochs: 2 -> 3"
    assert f"runs/folds.toml: {changed}" in message
    assert f"runs/fold4/config.toml: {changed}" in message
    # the data may have moved, and a grid may grow
    assert run_command([*same, "data.root=elsewhere"]) == 0 and started() == []
    assert run_command([*same, "--grid", "model.rank=[8]"]) == 0 and len(started()) == 5
    # but not by what it holds already, which a report would count twice
    assert run_command([*same, "--grid", "model.rank=[4, 8]"]) == 2 and started() == []
    assert re.search(r"found runs/fold\d, which has the settings of", capsys.readouterr().err)
    assert run_command([*same, "model.rank=2", "--grid", "model.rank=[2]"]) == 2
    assert "model.rank among the overrides too" in capsys.readouterr().err


def test_two_folds_by_accelerate_launch(tiny, tmp_path):
    (tmp_path / "two.toml").write_text(to_toml(tiny("data.folds=2")))
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch/cpu.yaml")]
    arguments = ["two.toml", "train.epochs=1", "--out", "runs", "--grid", "model.rank=[2]"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "nucsam.folds", *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "runs/table.json").read_text())["variants"][0]
    runs = [tmp_path / f"runs/model.rank-2/fold{k}" for k in range(2)]
    scores = [json.loads((run / "scores.json").read_text()) for run in runs]
    names = [{row["name"] for row in s["scores"][0]["images"]} for s in scores]
    assert len(names[0]) == len(names[1]) == 6 and not names[0] & names[1]
    assert table["missing"] == [] and table["random_base"] and table["protocols"][0]["images"] == 12
    mean = sum(s["headline"]["dice"] for s in scores) / 2
    assert table["protocols"][0]["mean"]["dice"] == pytest.approx(mean)
    assert "RANDOM BASE WEIGHTS" in done.stdout
    assert load_config(runs[1] / "config.toml").data.fold == 1
    assert table["parameters_trainable"] == 114_428 - 44_544 // 2  # rank 2, not 4
    assert "trains 92,156 of" in runs[1].with_name("fold1.log").read_text()


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
until [ -s pids ]; do sleep 0.05; done
touch ready$SLURM_PROCID
[ "$HANG" ] && while :; do sleep 0.05; done
exit 0
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Starts launch/slurm.sh as a batch step with two tasks; scripts stand for the commands."""
    monkeypatch.chdir(tmp_path)
    shown = '#!/bin/sh\necho "$(basename "$0") $*" >> calls\n'
    commands = {
        "srun": SRUN,
        "python": TASK,
        "accelerate": TASK,
        "scancel": shown + "kill -TERM $(cat pids)\n",
        "scontrol": shown + "printf 'node1\\nnode2\\n'\n",
    }
    Path("bin").mkdir()
    for name, text in commands.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    slurm = {"NNODES": "1", "NTASKS_PER_NODE": "2", "CPUS_PER_TASK": "3"}
    slurm |= {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]"}
    told = {f"SLURM_{name}": value for name, value in slurm.items()}
    told["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def start(*arguments, **environment):
        command = ["bash", str(ROOT / "launch/slurm.sh"), *arguments]
        return subprocess.Popen(command, env=os.environ | told | environment)

    return start


def calls():
    return Path("calls").read_text()


def test_slurm_runs_folds_as_tasks(cluster):
    job = cluster("folds", "a b.toml", "--out", "runs", ACCELERATE_MIXED_PRECISION="fp16")
    assert job.wait(20) == 0
    first, *tasks = calls().splitlines()
    options = "--ntasks-per-node=2 --cpus-per-task=3 --kill-on-bad-exit=0 --wait=0"
    assert first.startswith(f"srun {options} bash -c")
    ranks = [f"RANK={k} LOCAL_RANK={k} fp16" for k in range(2)]
    wanted = [f"python -m nucsam.folds a b.toml --out runs {rank}" for rank in ranks]
    assert sorted(line for line in tasks if line.startswith("python")) == wanted
    assert cluster("fold").wait(20) == 2


def test_slurm_runs_one_launcher_a_node_for_ddp(cluster):
    assert cluster("train", "c.toml", "--out", "run", SLURM_NNODES="2").wait(20) == 0
    text = calls()
    options = "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 --kill-on-bad-exit=1"
    assert f"srun {options} bash -c" in text
    machines = "--num_machines 2 --machine_rank 0 --num_processes 4"
    assert f"{machines} --main_process_ip node1 --main_process_port 20007" in text
    assert "-m nucsam.train c.toml --out run --resume" in text


def test_slurm_predicts_with_the_tasks_of_an_array(cluster):
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    assert cluster("predict", "model", "slides", "--out", "out", **array).wait(20) == 0
    tasks = sorted(line for line in calls().splitlines() if line.startswith("python"))
    command = "python -m nucsam.predict model slides --out out"
    ranks = [f"RANK={rank} LOCAL_RANK={local} bf16" for rank, local in ((4, 0), (5, 1))]
    assert tasks == [f"{command} {rank}" for rank in ranks]


@pytest.mark.parametrize(
    "array, job",
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")],
)
def test_slurm_signals_the_tasks_and_requeues(cluster, array, job):
    process = cluster("folds", "--out", "runs", HANG="1", **array)
    wait_for("ready0")
    wait_for("ready1")
    process.terminate()
    assert process.wait(20) == 143
    assert calls().endswith(f"scancel --signal=TERM {job}\nscontrol requeue {job}\n")


@pytest.mark.parametrize("refused, done, raises", [("01", "", True), ("0", "", False),
    ("0", "1", False), ("01", "01", False)])  # fmt: skip
def test_a_split_is_refused_before_training_where_every_fold_refuses_it(
    monkeypatch, refused, done, raises
):
    def images(data, *_):
        if str(data.fold) in refused:
            raise UserError(f"fold {data.fold} has no image to train on")

    monkeypatch.setattr(runner, "find_split", lambda data: ([], None))
    monkeypatch.setattr(runner, "split_records", lambda records, data: None)
    monkeypatch.setattr(runner, "training_images", images)
    jobs = [
        SimpleNamespace(
            variant="",
            config=Config(data=Data(fold=fold)),
            scores=lambda fold=fold: {} if str(fold) in done else None,
        )
        for fold in (0, 1)
    ]
    with pytest.raises(UserError, match="fold 0") if raises else nullcontext():
        runner._check_splits(jobs)
