"""Cross-validation: every fold of every grid variant is a job; the launched processes share the jobs; then one table.

    accelerate launch [options] -m nucsam.folds [CONFIG.toml] [table.key=value ...] --out RUNS
        [--grid 'table.key=[a, b, c]' ...]

A job is a run directory (RUNS/fold0, with a grid RUNS/model.rank-4/fold0), beside it the configuration and the output
of its child process, `nucsam.train --resume`, which sees one device and no distributed environment. A claim on a job is
a file lock in RUNS/.locks that process and child hold: the system drops it when both are gone, so a dead one blocks
nobody and no process group is needed. Nodes share jobs where their file system has locks (NFS; Lustre with -o flock).
Nothing imports torch before the report at the end, so a process that waits stays small.
"""

import ctypes
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from nucsam import config, evaluate, report
from nucsam.atomic import write_text
from nucsam.config import Config

TRAINER = (sys.executable, "-m", "nucsam.train")
POLL = 0.5  # s between looks at a child and at the other jobs
SHOWN = ("dice", "aji", "pq")
COUNTS = ("parameters_trainable", "parameters")
DISTRIBUTED = re.compile(
    r"(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|(MASTER|GROUP|ROLE|TORCHELASTIC|FSDP|MEGATRON_LM|PMI|PMIX|OMPI|MV2)_.*"
    r"|ACCELERATE_(?!MIXED_PRECISION$|USE_CPU$).*"
)
PUBLISHED = (  # model, parameters, Dice, AJI, PQ in percent, source
    ("Shallow U-Net", "1.9 M", "78.8", "50.5", "42.7", "NuInsSeg paper"),
    ("Deep U-Net", "7.7 M", "79.7", "49.4", "40.4", "NuInsSeg paper"),
    ("Attention U-Net", "2.3 M", "80.5", "45.7", "36.4", "NuInsSeg paper"),
    ("Residual Attention U-Net", "2.4 M", "81.4", "46.2", "36.9", "NuInsSeg paper"),
    ("Two-stage U-Net", "3.9 M", "76.6", "52.8", "47.2", "NuInsSeg paper"),
    ("Dual Decoder U-Net", "3.5 M", "79.4", "55.9", "51.3", "NuInsSeg paper"),
    ("HoVer-Net (simplified)", "", "80.29", "57.50", "53.40", "NucEval, arXiv 2605.03144"),
    ("HoVer-NeXt", "", "82.59", "58.45", "54.17", "NucEval"),
    ("CellViT (ViT-256)", "", "81.92", "60.03", "56.44", "NucEval"),
    ("MobileSAM + LoRA, as reported", "2.1 M", "67.4", "42.3", "39.8", "a student report"),
)
CAVEATS = (
    "Published rows are for NuInsSeg (official split, 665 images) and comparable only on it: U-Nets from its paper, "
    "HoVer-Net, HoVer-NeXt and CellViT from NucEval, MobileSAM + LoRA from a student report.",
    "The U-Nets and HoVer-NeXt chose their best epoch on the fold they report.",
    "CellViT and HoVer-NeXt folds use seed 42, the paper's use 19.",
    "The report's published code trains 4,182,404 parameters and scores masks turned to 0/1: its row is as reported.",
)
UNKNOWN = dict.fromkeys(SHOWN, math.nan)
NOTHING = {"protocol": "no fold done", "rules": "", "mean": UNKNOWN, "std": UNKNOWN, "organs": {}}


@dataclass(frozen=True)
class Job:
    """One fold of one variant; `variant` is "" without a grid."""

    variant: str
    fold: int
    config: Config
    run: Path
    lock: Path
    trainer: tuple[str, ...] = ()  # the child's command before its arguments; none = TRAINER
    last: str = "scores.json"  # the last file that the child writes

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.variant, f"fold {self.fold}")))

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    def scores(self) -> dict[str, Any] | None:
        """The run's scores.json; None while the child has not written all, or it is not whole."""
        if not (self.run / self.last).is_file():
            return None
        try:
            return json.loads((self.run / "scores.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def record(self) -> dict[str, Any]:
        """What the last holder of the lock wrote: began, where, log_from; at its end ended, and failed, status."""
        try:
            return json.loads(self.lock.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def variants(base: Config, grid: Sequence[str]) -> dict[str, Config]:
    """Label -> configuration for the cartesian product of 'table.key=[a, b]' texts, the last one changing fastest.

    ValueError where a text is no such list, or a key or value is given twice, unknown or out of range.
    """
    axes = [_axis(text) for text in grid]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names) or "data.fold" in names:
        raise ValueError(f"--grid: found {', '.join(names)}, expected each key once, and not data.fold")
    result: dict[str, Config] = {}
    for values in itertools.product(*(values for _, values in axes)):
        made = config.changed(base.to_dict(), dict(zip(names, values)), "--grid")
        held = made.flat()  # 8 and 8.0 are one alpha
        label = ", ".join(f"{name}={held[name]}" for name in names)
        if label in result:
            raise ValueError(f"--grid: found {label} twice")
        result[label] = made
    return result


def _axis(text: str) -> tuple[str, list[Any]]:
    name, _, values = text.partition("=")
    try:
        found = tomllib.loads(f"values = {values}")["values"]
    except tomllib.TOMLDecodeError:
        found = None
    if not (isinstance(found, list) and found and "." in name):
        raise ValueError(f"--grid: found {text!r}, expected 'table.key=[a, b, c]' in TOML's notation, strings quoted")
    return name.strip(), found


def plan(found: Mapping[str, Config], out: Path) -> list[Job]:
    """The jobs in the order in which they are taken: variant after variant, fold after fold."""
    jobs = []
    for label, settings in found.items():
        wanted = label.replace(", ", ",").replace("=", "-")  # `a=b` would read as an override
        folder = re.sub(r"[^\w.,+-]+", "-", wanted)[:100]
        if folder != wanted:
            folder += "-" + hashlib.sha256(label.encode()).hexdigest()[:8]
        for fold in range(settings.data.folds):
            settings = replace(settings, data=replace(settings.data, fold=fold))
            lock = out / ".locks" / f"{folder},fold{fold}".removeprefix(",")
            jobs.append(Job(label, fold, settings, out / folder / f"fold{fold}", lock))
    return jobs


def child_environment(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """`environment` without what launchers tell of processes, with one device ("" = none: the CPU).

    Mixed precision and the choice of the CPU stay. OMP_NUM_THREADS, where no one has set it, is this process's share.
    """
    child = {name: value for name, value in environment.items() if not DISTRIBUTED.fullmatch(name)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    child.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", 1)))))
    return child | {"CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1"}


def device_of(environment: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES of this process's children: the LOCAL_RANK-th of the visible ones; "" = the CPU.

    ValueError where there are fewer GPUs than processes on this machine.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return ""
    local, listed = int(environment.get("LOCAL_RANK", 0)), environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None and local == 0:
        return "0"  # without a GPU that is none
    if listed is None:  # counted by a process that ends: torch is large
        code = "import torch; print(*range(torch.cuda.device_count()), sep=',')"
        listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    visible = [name.strip() for name in listed.split(",") if name.strip()]
    if visible and local >= len(visible):
        raise ValueError(
            f"LOCAL_RANK: found {local} with the GPUs {', '.join(visible)}, expected at most one process for each; "
            "CUDA_VISIBLE_DEVICES=0,0 puts two on one"
        )
    return visible[local] if visible else ""


def folds(path: Path, overrides: Sequence[str], out: Path, grid: Sequence[str] = ()) -> int:
    """Train and score every fold of every variant under `out`, with the other launched processes, and write the table.

    Returns the exit status: 1 on the first process if a job has failed. ValueError, before anything runs, for a
    user's mistake or where `out` holds runs of another configuration. SystemExit(128 + signal) after SIGTERM or
    SIGINT, once the child has saved.
    """
    if any(text.partition("=")[0].strip() == "data.fold" for text in overrides):
        raise ValueError("data.fold: found it on the command line; folds trains every fold without it")
    if "=" in str(out):
        raise ValueError(f"--out: found {out}, expected a path without =, which would read as table.key=value")
    base = config.load(path, overrides)
    jobs = plan(variants(base, grid), out)
    board = run(jobs, base, out)
    if not is_first():
        return 0  # the first one tells; a launcher would end the others on any other status
    table = cross_validation(jobs, path.stem)
    parts = markdown(table)
    write_text(out / "table.json", evaluate.to_json(table) + "\n")
    write_text(out / "table.md", "\n".join(parts))
    for part in reversed(parts):
        board.console.print(Markdown(part))
    failed = [job for job in jobs if job not in board.done]
    for job in failed:
        board.say(f"not done: {job.name}, see {job.log}", "red")
    board.say(f"table: {out / 'table.md'}, {out / 'table.json'}")
    board.say(report.finish(out))
    return 1 if failed else 0


def is_first() -> bool:
    """Whether this process is the launch's first, which tells and writes for all."""
    return int(os.environ.get("RANK", 0)) == 0


def run(jobs: Sequence[Job], base: Config, out: Path) -> "Board":
    """Do the jobs under `out` with the other launched processes, until each is done or has failed.

    `base` is what they have in common. Raises as `folds` does.
    """
    environment = child_environment(os.environ, device_of(os.environ))
    _check(out, base, jobs)
    board = Board(jobs, since=_launched(), shown=is_first())
    with _Stop() as stop, board.live or nullcontext():
        while not stop() and not board.ended():
            if claim := board.claim():
                _work(*claim, environment, stop, board)
            else:
                board.refresh()
                time.sleep(POLL)
        board.refresh()
    if stop():
        raise SystemExit(128 + stop.signal)
    return board


class Board:
    """The jobs as files and locks show them; on the first process also for a person."""

    def __init__(self, jobs: Sequence[Job], *, since: float, shown: bool) -> None:
        self.jobs, self.since, self.shown = jobs, since, shown
        self.console = Console()
        self.live = Live(console=self.console, auto_refresh=False) if shown and self.console.is_terminal else None
        self.done: set[Job] = set()
        self.told: dict[Job, tuple] = {}

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def outcome(self, job: Job) -> str:
        """done, failed in this launch, or waiting: of a job that nobody holds."""
        if job not in self.done and job.scores() is not None:
            self.done.add(job)
        if job in self.done:
            return "done"
        return "failed" if job.record().get("failed", 0) >= self.since else "waiting"

    def state(self, job: Job) -> str:
        """running, or the outcome. Looking shares the lock, so that two that look do not see each other."""
        if job in self.done:
            return "done"
        lock = _lock(job.lock, fcntl.LOCK_SH)
        if lock is None:
            return "running"
        os.close(lock)
        return self.outcome(job)

    def ended(self) -> bool:
        return all(self.state(job) in ("done", "failed") for job in self.jobs)

    def claim(self) -> tuple[Job, int] | None:
        """The next job that waits, and its lock, held."""
        for job in self.jobs:
            if self.outcome(job) == "waiting" and (lock := _lock(job.lock, fcntl.LOCK_EX)) is not None:
                if self.outcome(job) == "waiting":
                    return job, lock
                os.close(lock)  # it has ended since we looked
        return None

    def refresh(self) -> None:
        """Show the jobs: a live table, or where no terminal is a line for each change."""
        if not self.shown:
            return
        table = Table("job", "state", "epoch", "Dice", "AJI", "PQ", "images/s", "time", box=SIMPLE)
        for job in self.jobs:
            state, record, (epochs, last, speed) = self.state(job), job.record(), _progress(job)
            scores = [f"{100 * last[name]:.1f}" if last else "" for name in SHOWN]
            seconds = record.get("ended", time.time()) - record["began"] if record else 0
            where = f"{state}, {record['where']}" if state == "running" and record else state
            epoch = f"{epochs} of {job.config.train.epochs}"
            table.add_row(escape(job.name), where, epoch, *scores, speed, str(timedelta(seconds=int(seconds))))
            news = (state, last.get("epoch"))
            if news == self.told.get(job, ("waiting", None)):
                continue
            self.told[job] = news
            if state == "failed":
                self.say(_failure(job, record), "red")
            elif not self.live:
                measured = f", Dice {scores[0]}, AJI {scores[1]}, PQ {scores[2]}, {speed} images/s" if last else ""
                self.say(f"{job.name}: {where}, epoch {epoch}{measured}")
        if self.live:
            self.live.update(table, refresh=True)


class _Stop:
    """Context in which SIGTERM and SIGINT only ask; the call says whether to end. A launcher that is gone asks too."""

    def __enter__(self) -> "_Stop":
        self.signal, launchers = 0, ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
        self.parent = os.getppid() if any(name in os.environ for name in launchers) else None
        self.before = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _tell(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def __call__(self) -> bool:
        # `accelerate launch` of one process does not forward signals: the launcher goes, the process stays
        if self.parent and os.getppid() != self.parent:
            self.signal = self.signal or signal.SIGTERM
        return bool(self.signal)


def _work(job: Job, lock: int, environment: dict[str, str], stop: _Stop, board: Board) -> None:
    """Run a claimed job's child to its end and note how it ended; SIGTERM is forwarded to it, once."""
    job.run.parent.mkdir(parents=True, exist_ok=True)
    settings = job.run.with_name(f"{job.run.name}.toml")
    write_text(settings, config.to_toml(job.config))
    with job.log.open("ab") as log:
        where = f"{socket.gethostname()} {environment.get('CUDA_VISIBLE_DEVICES') or 'CPU'}"
        record = {"began": time.time(), "where": where, "log_from": log.tell()}
        _note(lock, record)
        child = subprocess.Popen(
            [*(job.trainer or TRAINER), str(settings), "--out", str(job.run), "--resume"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C reaches this process only, which lets the child save
            preexec_fn=_die_with_parent,
        )
        told = False
        while True:
            try:
                status = child.wait(POLL)
                break
            except subprocess.TimeoutExpired:
                board.refresh()
            if stop() and not told:
                child.terminate()
                told = True
    if job.scores() is None and not stop():
        record |= {"failed": time.time(), "status": status}
    _note(lock, record | {"ended": time.time()})
    fcntl.flock(lock, fcntl.LOCK_UN)  # a loader process that outlives its killed parent still has the file open
    os.close(lock)


def _die_with_parent() -> None:
    """In the child: SIGTERM, which saves, when the process that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor of the file, locked; None where another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        raise ValueError(f"--out: {path} cannot be locked ({error}); expected a file system with locks") from None
    return descriptor


def _note(lock: int, record: dict[str, Any]) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(record).encode(), 0)


def _check(out: Path, base: Config, jobs: Sequence[Job]) -> None:
    """Make `out`, or refuse one that holds runs of another configuration; a grid may grow."""
    if (out / "config.toml").exists():
        raise ValueError(f"--out: {out} is a run of nucsam train, expected a folder to hold the runs of all folds")
    (out / ".locks").mkdir(parents=True, exist_ok=True)
    with (out / ".locks" / "folds").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        written = {out / "folds.toml": base} | {job.run / "config.toml": job.config for job in jobs}
        changed = []
        for path, wanted in written.items():
            found = config.differences(config.load(path), wanted) if path.is_file() else []
            if lines := [line for line in found if not line.startswith((*config.MAY_CHANGE, "data.fold:"))]:
                changed.append(f"{path}: {'; '.join(lines)}")
        if changed:
            raise ValueError(
                "--out: holds runs of another configuration (found -> wanted), expected the same or another folder:\n"
                + "\n".join(changed)
            )
        write_text(out / "folds.toml", config.to_toml(base))


def _launched() -> float:
    """When this launch began, s since 1970, alike on its processes: a job that failed since is not tried again."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
    if "RANK" in os.environ and any(name in os.environ for name in names):
        return psutil.Process(os.getppid()).create_time()
    return time.time()


def _progress(job: Job) -> tuple[int, dict[str, Any], str]:
    """Epochs done, the last line with scores, images/s of the last line."""
    path = job.run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    validated = next((line for line in reversed(lines) if SHOWN[0] in line), {})
    speed = lines[-1].get("images_per_second") if lines else None
    return (lines[-1]["epoch"] if lines else 0), validated, f"{speed:.1f}" if speed else ""


def _failure(job: Job, record: dict[str, Any]) -> str:
    """How a job's child ended, and the tail of its last traceback, or of its output."""
    status = record["status"]
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = job.log.read_bytes()[record["log_from"] :].decode(errors="replace").splitlines()
    traces = [k for k, line in enumerate(lines) if line.startswith("Traceback ")]
    tail = "\n".join(["", *(lines[traces[-1] :] if traces else lines)[-20:]])
    return f"{job.name} {how}; a rerun goes on with it. {job.log} ends with:{tail}"


# ---- the table ----


def cross_validation(jobs: Sequence[Job], name: str) -> dict[str, Any]:
    """table.json: for each variant its means over the finished folds, 0 to 1, and what must be known to read them.

    Means are over the images of a fold, then over folds; std is the sample standard deviation over folds (NaN of
    one). An organ's mean is over the folds that have it. `name` labels the variant where there is no grid.
    """
    rows = []
    for label in dict.fromkeys(job.variant for job in jobs):
        own = [job for job in jobs if job.variant == label]
        done = {job.fold: scores for job in own if (scores := job.scores()) is not None}
        facts = [json.loads((job.run / "environment.json").read_text()) for job in own if job.fold in done]
        c = own[0].config
        row = {"variant": label or name, "folds": len(own), "missing": [j.fold for j in own if j.fold not in done]}
        row |= {key: facts[0][key] if facts else None for key in COUNTS}
        row |= {"epochs": c.train.epochs, "best_epochs": {fold: scores["epoch"] for fold, scores in done.items()}}
        row["epoch_chosen_by"] = f"{c.train.best} on the {c.data.select} split"
        row["epoch_chosen_on_test"] = c.data.select == "test"
        row["base"] = list(dict.fromkeys(scores["base"]["source"] for scores in done.values()))
        row["random_base"] = c.model.weights == "none"
        row["split"] = {"scheme": c.data.split, "group": c.data.group, "seed": c.data.seed}
        rows.append(row | {"seed": c.train.seed, "protocols": _protocols(list(done.values()))})
    return {"name": name, "variants": rows, "published": [list(row) for row in PUBLISHED], "caveats": list(CAVEATS)}


def _protocols(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The folds' scores by each protocol; a fold without vague areas scores the same with and without them."""
    longest = max((scores["scores"] for scores in done), key=len, default=[])
    result = []
    for k, scored in enumerate(longest):
        summaries = [(scores["scores"][k:] or scores["scores"])[0]["summary"] for scores in done]
        organs = {}
        for organ in sorted({organ for summary in summaries for organ in summary["organs"]}):
            groups = [summary["organs"][organ] for summary in summaries if organ in summary["organs"]]
            images = sum(group["images"] for group in groups)
            organs[organ] = {"images": images, "folds": len(groups), **_over_folds([g["mean"] for g in groups])}
        means = _over_folds([summary["mean"] for summary in summaries])
        rules = {"protocol": scored["protocol"]["name"], "rules": scored["rules"]}
        result.append({**rules, "images": sum(s["images"] for s in summaries), **means, "organs": organs})
    return result


def _over_folds(means: list[dict[str, float | None]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each metric; NaN where it is undefined."""
    values = {name: [math.nan if m[name] is None else m[name] for m in means] for name in means[0]}
    std = {name: float(np.std(v, ddof=1)) if len(v) > 1 else math.nan for name, v in values.items()}
    return {"mean": {name: float(np.mean(v)) for name, v in values.items()}, "std": std}


def markdown(table: dict[str, Any]) -> list[str]:
    """table.md in parts: the cross-validation, how it was made, and a part for each variant's organs."""
    main, how, organs, rules = [], [], [], {}
    for row in table["variants"]:
        missing, split, name = row["missing"], row["split"], f"`{row['variant']}`"
        marks = {
            "EPOCH CHOSEN ON THE TEST IMAGES": row["epoch_chosen_on_test"],
            "RANDOM BASE WEIGHTS": row["random_base"],
            f"INCOMPLETE: fold {', '.join(map(str, missing))} of {row['folds']} missing": missing,
        }
        label = "; ".join([name, *(f"**{mark}**" for mark, holds in marks.items() if holds)])
        trained, parameters = (f"{row[key]:,}" if row[key] else "-" for key in COUNTS)
        for scored in row["protocols"] or [NOTHING]:
            rules[scored["rules"]] = None
            main.append([f"{label}; {scored['protocol']}", *_cells(scored), trained])
            found = [[o, f"{g['images']}", f"{g['folds']}", *_cells(g)] for o, g in scored["organs"].items()]
            title = f"Per organ: {label}; {scored['protocol']}"
            organs += [part(title, "organ|images|folds|Dice|AJI|PQ", found)] if found else []
        kept = ", ".join(f"{epoch} in fold {fold}" for fold, epoch in row["best_epochs"].items())
        scheme = f"{row['folds']} {split['scheme']} folds, seed {split['seed']}, group {split['group'] or 'none'}"
        base = "; ".join(row["base"]) or "-"
        epochs = f"{row['epochs']}; kept {kept or 'none'}, chosen by {row['epoch_chosen_by']}"
        how.append([name, epochs, base, parameters, scheme, f"{row['seed']}"])
    main += [[f"published: {model}", *scores, parameters] for model, parameters, *scores, _ in table["published"]]
    notes = [
        "Percent: mean over a fold's images, then over folds ± standard deviation over folds.",
        *filter(None, rules),
    ]
    return [
        part(f"Cross-validation: {table['name']}", "model|Dice|AJI|PQ|trained", main, [*notes, *table["caveats"]]),
        part("How", "model|epochs|base weights|parameters in all|split|seed", how),
        *organs,
    ]


def part(title: str, columns: str, rows: list[list[str]], notes: Sequence[str] = ()) -> str:
    """A table and remarks in Markdown; `columns` are parted by |."""
    columns = columns.split("|")
    cells = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    lines = [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in cells), "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _cells(scored: Mapping[str, Any]) -> list[str]:
    """Dice, AJI and PQ in percent, with their spread where there is one; - where undefined."""
    pairs = [(100 * scored["mean"][name], 100 * scored["std"][name]) for name in SHOWN]
    spread = ["" if math.isnan(std) else f" ± {std:.2f}" for _, std in pairs]
    return ["-" if math.isnan(mean) else f"{mean:.2f}{text}" for (mean, _), text in zip(pairs, spread)]


if __name__ == "__main__":
    from nucsam.cli import run as run_command

    sys.exit(run_command(["folds", *sys.argv[1:]]))
