"""Run the jobs of a cross-validation: the launched processes share them, then one table.

    accelerate launch [options] -m nucsam.folds [CONFIG.toml] [table.key=value ...] --out RUNS
        [--grid 'table.key=[a, b, c]' ...]

A process claims a job and runs `nucsam.train --resume` on it in a child process. The system drops
the claim once both are gone, so a process that dies blocks nobody. Nothing here loads torch, so a
process that waits stays small.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.markdown import Markdown

from nucsam import config
from nucsam.claims import Claim, is_claimed
from nucsam.config import Config
from nucsam.console import PlainConsole
from nucsam.data.folders import Record, raise_problems
from nucsam.data.samples import read_digest, read_each
from nucsam.data.splits import find_split, inventory, split_records, training_images
from nucsam.errors import UserError
from nucsam.files import expanded, make_folder, printable, write_text
from nucsam.folds.jobs import Job, child_environment, device_of, plan, variants
from nucsam.folds.methods import methods_section
from nucsam.folds.table import cross_validation, table_csv, table_latex, table_rows, table_sections
from nucsam.processes import ask_to_stop, child_options, is_first, is_launched, signals_handled
from nucsam.run.directory import RunDirectory, run_folders
from nucsam.run.learning import learnt_nothing
from nucsam.score.tables import COLUMNS, percent, write_json

POLL = 0.5  # s between looks at a child and at the other jobs

TRAINER = (sys.executable, "-m", "nucsam.train")


class Board:
    """The jobs as their files and locks show them.

    Args:
        jobs: in the order in which they are taken.
        shown: whether this process also shows them to a person.
    """

    def __init__(self, jobs: Sequence[Job], *, shown: bool) -> None:
        self.jobs = jobs
        self.failures = {job: _failures(job) for job in jobs}  # before this launch
        self.shown = shown
        self.console = PlainConsole()
        self.done: set[Job] = set()
        self._told: dict[Job, tuple[str, int]] = {}

    def outcome(self, job: Job) -> str:
        """Of a job that nobody holds: done, failed in this launch, or waiting."""
        if job not in self.done and job.scores() is not None:
            self.done.add(job)
        if job in self.done:
            return "done"
        return "failed" if _failures(job) > self.failures[job] else "waiting"

    def state(self, job: Job) -> str:
        """running, or the outcome."""
        if job in self.done:
            return "done"
        return "running" if is_claimed(job.lock) else self.outcome(job)

    def ended(self) -> bool:
        return all(self.state(job) in ("done", "failed") for job in self.jobs)

    def claim(self) -> tuple[Job, Claim] | None:
        """The next job that waits, and the claim on it."""
        for job in self.jobs:
            if self.outcome(job) == "waiting" and (claim := Claim.take(job.lock)):
                if self.outcome(job) == "waiting":
                    return job, claim
                claim.release()  # another process has ended it meanwhile
        return None

    def refresh(self) -> None:
        """Print a line for each job that has changed since the last call."""
        if not self.shown:
            return
        for job in self.jobs:
            state, note, epochs = self.state(job), job.note(), job.epochs_done()
            if (state, epochs) == self._told.get(job, ("waiting", 0)):
                continue
            self._told[job] = (state, epochs)
            if state == "failed":
                self.console.say(_failure(job, note), "red")
                continue
            where = f" on {note['where']}" if state == "running" and note else ""
            text = f"{job.name}: {state}{where}, epoch {epochs} of {job.config.train.epochs}"
            if scores := job.scores() if state == "done" else None:
                means = [f"{COLUMNS[k]} {percent(v)}" for k, v in scores["headline"].items()]
                text += f", {scores['images_of']} {', '.join(means)}"
            self.console.say(text)
            if scores and (sentence := learnt_nothing(scores)):
                self.console.say(f"{job.name}: {sentence}", "yellow")


def _failures(job: Job) -> int:
    """How many attempts at a job have failed: counted, because a clock can be set back."""
    return job.note().get("failures", 0)


def _failure(job: Job, note: dict[str, Any]) -> str:
    """How a job's child ended, and the last lines of its traceback or else of its output."""
    status = note["status"]
    end = f"ended with status {status}"
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        end = f"was killed by {names.get(-status, f'signal {-status}')}"
    log = job.log.read_bytes() if job.log.is_file() else b""
    lines = log[note["log_from"] :].decode(errors="replace").splitlines()
    traces = [k for k, line in enumerate(lines) if line.startswith("Traceback ")]
    tail = lines[traces[-1] if traces else 0 :][-20:]
    return "\n".join([f"{job.name} {end}; a rerun resumes it. {job.log} ends with:", *tail])


def cross_validate(
    path: Path, overrides: Sequence[str], out: Path, grid: Sequence[str] = ()
) -> int:
    """Train and score every fold of every variant, with the other launched processes; tabulate.

    Args:
        path: the configuration file.
        overrides: texts 'table.key=value'.
        out: folder of the runs, and of table.json, .md, .csv and .tex, and of methods.md.
        grid: as in `variants`.

    Returns:
        The exit status: 1 on the first process if a job has failed.

    Raises:
        UserError: before anything runs, for a wrong argument, or if `out` holds other runs.
        SystemExit: 128 + signal, after SIGTERM or SIGINT, once the child has saved.
    """
    named = [text.partition("=")[0].strip() for text in overrides]
    if "data.fold" in named:
        advice = "folds trains every fold without it"
        raise UserError(f"data.fold: found it on the command line; {advice}")
    if twice := {*named} & {text.partition("=")[0].strip() for text in grid}:
        keys = ", ".join(sorted(twice))
        raise UserError(f"grid: found {keys} among the overrides too, expected one of both")
    if "=" in str(out):
        expected = "expected a path without =, which would read as table.key=value"
        raise UserError(f"out: found {out}, {expected}")
    base = config.load_config(path, overrides)
    if base.data.test:
        expected = "expected none; nucsam train tests them"
        raise UserError(f"data.test: found {base.data.test!r}, {expected}")
    by_label = variants(base, grid)
    for variant in by_label.values():
        config.check_effect(named, variant)
    jobs = plan(by_label, out)
    _check_splits(jobs)
    board = run_jobs(jobs, base, out)
    if not is_first():
        return 0  # the first one reports; a launcher would end the others on any other status
    table = cross_validation(jobs, path.stem)
    sections, rows = table_sections(table), table_rows(table)
    methods = [
        methods_section(list(folds), nuinsseg=bool(table["published"]))
        for _, folds in itertools.groupby(jobs, lambda job: job.variant)
    ]
    write_json(out / "table.json", table)
    write_text(out / "table.md", "\n".join(sections))
    write_text(out / "table.csv", table_csv(rows))
    write_text(out / "table.tex", table_latex(rows))
    write_text(out / "methods.md", "\n".join(methods))
    console = board.console
    if len(methods) == 1:
        console.print(Markdown(methods[0]))
    # rich cuts a long word in a table off, such as the name of a variant
    wide = max(console.width, 60 + max(len(job.variant) for job in jobs))
    for section in reversed(sections):
        PlainConsole(width=wide, file=console.file).print(Markdown(printable(section)))
    failed = [job for job in jobs if job not in board.done]
    for job in failed:
        console.say(f"not done: {job.name}, see {job.log}", "red")
    console.say(f"For your text: {out / 'table.md'}, table.csv and table.tex (LaTeX): the scores")
    console.say(f"{out / 'methods.md'}: the methods, with citations")
    return 1 if failed else 0


def _check_splits(jobs: Sequence[Job]) -> None:
    """Refuse a variant of which every fold would refuse its split, before the first one starts."""
    for _, folds in itertools.groupby(jobs, lambda job: job.variant):
        folds = list(folds)
        if all(job.scores() is not None for job in folds):
            continue
        configs = [job.config.data for job in folds]
        records, _ = find_split(configs[0])
        errors = []
        for data in configs:
            try:
                training_images(data, records, split_records(records, data))
            except UserError as error:
                errors.append(error)
        if len(errors) == len(configs):
            raise errors[0]


def run_jobs(jobs: Sequence[Job], base: Config, out: Path) -> Board:
    """Do the jobs with the other launched processes, until each is done or has failed.

    Args:
        jobs: in the order in which they are taken.
        base: the configuration that they have in common.
        out: folder of the runs.

    Raises:
        UserError, SystemExit: as in `cross_validate`.
    """
    environment = child_environment(os.environ, device_of(os.environ))
    board = Board(jobs, shown=is_first())
    _prepare(out, base, jobs)
    stop = _Stop()
    with signals_handled(stop.ask, signal.SIGTERM, signal.SIGINT):
        while not stop() and not board.ended():
            if claimed := board.claim():
                _work(*claimed, environment, stop, board)
            else:
                board.refresh()
                time.sleep(POLL)
        board.refresh()
    if stop():
        if stop.orphaned:
            board.console.say("stopped, because the launcher has ended; a rerun continues", "red")
        raise SystemExit(128 + stop.signal)
    return board


class _Stop:
    """Whether SIGTERM or SIGINT, which `ask` handles, has asked to stop.

    A launcher that is gone asks as well: `accelerate launch` of one process forwards no signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.launcher = os.getppid() if is_launched() else None

    @property
    def orphaned(self) -> bool:
        return self.launcher is not None and os.getppid() != self.launcher

    def ask(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def __call__(self) -> bool:
        if self.orphaned:
            self.signal = self.signal or signal.SIGTERM
        return bool(self.signal)


def _work(job: Job, claim: Claim, environment: dict[str, str], stop: _Stop, board: Board) -> None:
    """Run a claimed job's child to its end, and note how it ended."""
    make_folder(job.run.parent)
    settings = job.run.with_name(f"{job.run.name}.toml")
    write_text(settings, config.to_toml(job.config))
    where = f"{socket.gethostname()} {environment['CUDA_VISIBLE_DEVICES'] or 'CPU'}"
    with job.log.open("ab") as log:
        note = {"began": time.time(), "where": where, "log_from": log.tell()}
        note |= {"failures": _failures(job), "status": job.note().get("status")}
        claim.note(note)
        child = subprocess.Popen(
            [*(job.trainer or TRAINER), str(settings), "--out", str(job.run), "--resume"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **child_options(claim.descriptor),
        )
    status = _wait(child, stop, board)
    if job.scores() is None and not stop():
        note |= {"failures": note["failures"] + 1, "status": status}
    claim.note(note | {"ended": time.time()})
    claim.release()


def _wait(child: subprocess.Popen, stop: _Stop, board: Board) -> int:
    """The exit status of a child. A request to stop is forwarded to it, once."""
    forwarded = False
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            board.refresh()
        if stop() and not forwarded:
            ask_to_stop(child)
            forwarded = True


def _prepare(out: Path, base: Config, jobs: Sequence[Job]) -> None:
    """Make `out`, or refuse one that holds runs of another configuration; a grid may grow."""
    if RunDirectory(out).exists():
        raise UserError(f"out: {out} is one run, expected a folder for the runs of all folds")
    if out.resolve() == expanded(base.data.root).resolve():
        raise UserError(f"out: {out} is the folder of the images, expected another")
    make_folder(out / ".locks")
    check_images(jobs)
    with Claim.take(out / ".locks" / "folds", wait=True):
        common = out / "folds.toml"
        wanted = {RunDirectory(job.run).config_file: job.config for job in jobs}
        changed = _changed(common, base, free=("data.fold",))
        changed += [line for path, new in wanted.items() for line in _changed(path, new)]
        if changed:
            found = "out: holds runs of another configuration (found -> wanted)"
            lines = [f"{found}, expected the same, or another folder:", *changed]
            raise UserError("\n".join(lines))
        _check_repeats(out, jobs)
        write_text(common, config.to_toml(base))


def _check_repeats(out: Path, jobs: Sequence[Job]) -> None:
    """Refuse jobs whose settings another run in `out` has: a report would count them twice."""
    folders = {job.run for job in jobs}
    for path in (path for path in run_folders(out) if path not in folders):
        other = RunDirectory(path).read_config()
        for job in jobs:
            same_root = other.data.root == job.config.data.root
            if same_root and not config.conflicts(other, job.config):
                found = f"found {path}, which has the settings of {job.name}"
                raise UserError(f"out: {found}; expected one run of them, or another folder")


def _changed(path: Path, wanted: Config, free: tuple[str, ...] = ()) -> list[str]:
    """A line for a configuration file that differs in what may not change."""
    if not path.is_file():
        return []
    changed = config.conflicts(config.load_config(path), wanted, *free)
    return [f"{path}: {'; '.join(changed.values())}"] if changed else []


def check_images(jobs: Sequence[Job]) -> None:
    """Refuse other images than the runs were split on: their folds together would be no partition.

    Reads the images only where a run says which they were, and each once.
    """
    digests: dict[Record, str | UserError] = {}
    for job in jobs:
        if not job.directory.images_file.is_file():
            continue
        records, split = find_split(job.config.data)
        new = [record for record in records if record not in digests]
        digests |= zip(new, read_each(read_digest, new, "Checking images"))
        found = [digests[record] for record in records]
        problems = [str(digest) for digest in found if isinstance(digest, UserError)]
        raise_problems(f"{len(records)} images", problems)
        job.directory.check_images(inventory(records, split, found), job.config.data.root)
