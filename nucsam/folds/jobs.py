"""The jobs of a cross-validation: every fold of every grid variant is one.

A job is a run directory: RUNS/fold0, or with a grid RUNS/model.rank-4/fold0. Beside it lie the
configuration and the output of its child process, which sees one device and no launcher. A claim
on a job is a file lock in RUNS/.locks that process and child hold.
"""

import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nucsam import config
from nucsam.claims import read_note
from nucsam.config import Config
from nucsam.data.splits import with_epochs
from nucsam.errors import UserError
from nucsam.processes import allowed_cores
from nucsam.run.directory import RunDirectory

# what torchrun, accelerate and MPI tell a process of its launch
_OF_LAUNCHERS = re.compile(
    r"(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE"
    r"|(MASTER|GROUP|ROLE|TORCHELASTIC|FSDP|MEGATRON_LM|PMI|PMIX|OMPI|MV2)_.*"
    r"|ACCELERATE_(?!MIXED_PRECISION$|USE_CPU$).*"
)


@dataclass(frozen=True)
class Job:
    """One fold of one variant, as its files show it."""

    variant: str  # "" without a grid
    fold: int
    config: Config
    run: Path
    lock: Path
    trainer: tuple[str, ...] = ()  # command of the child before its arguments; () = nucsam.train
    last: str = ""  # name of the file that the child writes last; "" = the scores

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.variant, f"fold {self.fold}")))

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.run)

    @property
    def log(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    def scores(self) -> dict[str, Any] | None:
        """The run's scores; None until it is finished, or if they are damaged."""
        if self.last and not (self.run / self.last).is_file():
            return None
        try:
            return self.directory.read_scores(self.config)
        except UserError:
            return None

    def epochs_done(self) -> int:
        """Epochs that the job's metrics show; 0 where they are damaged: resuming writes them."""
        try:
            return self.directory.epochs_done()
        except UserError:
            return 0

    def note(self) -> dict[str, Any]:
        """The note of the last holder of the claim: began, where and log_from; at the end ended.

        Also failures, the number of attempts that failed so far, and the status of the last.
        """
        return read_note(self.lock)


def variants(base: Config, grid: Sequence[str]) -> dict[str, Config]:
    """The configurations of a grid: the cartesian product of its lists.

    Args:
        base: what the variants have in common.
        grid: texts 'table.key=[a, b]'; the last one changes fastest.

    Returns:
        Label -> configuration.

    Raises:
        UserError: a text is no such list, or a key or value is repeated, unknown or out of range.
    """
    axes = [_axis(text) for text in grid]
    names = [name for name, _ in axes]
    if len(set(names)) < len(names) or "data.fold" in names:
        keys = ", ".join(names)
        raise UserError(f"grid: found {keys}, expected each key once, and not data.fold")
    if idle := [name for name in names if name in config.MAY_CHANGE and name != "data.root"]:
        raise UserError(f"grid: found {', '.join(idle)}, which changes no result")
    by_label: dict[str, Config] = {}
    for values in itertools.product(*(values for _, values in axes)):
        variant = config.changed(base.to_dict(), dict(zip(names, values)), "grid")
        config.check_effect(names, variant)
        checked = variant.flat()  # 8 and 8.0 are one alpha
        label = ", ".join(f"{name}={checked[name]}" for name in names)
        if label in by_label:
            raise UserError(f"grid: found {label} twice")
        by_label[label] = variant
    return by_label


def _axis(text: str) -> tuple[str, list[Any]]:
    """The key and the values of one text of a grid."""
    name, _, listed = text.partition("=")
    values = config.parse_value(listed)
    if not (isinstance(values, list) and values and "." in name):
        expected = "'table.key=[a, b, c]' in TOML's notation, strings quoted"
        raise UserError(f"grid: found {text!r}, expected {expected}")
    return name.strip(), values


def plan(by_label: Mapping[str, Config], out: Path) -> list[Job]:
    """The jobs under `out` in the order in which they are taken: variant by variant, by fold."""
    jobs = []
    for label, variant in by_label.items():
        folder = _folder_name(label)
        for fold in range(variant.data.folds):
            settings = with_epochs(replace(variant, data=replace(variant.data, fold=fold)))
            lock = out / ".locks" / f"{folder},fold{fold}".removeprefix(",")
            jobs.append(Job(label, fold, settings, out / folder / f"fold{fold}", lock))
    return jobs


def _folder_name(label: str) -> str:
    """A variant's label as a file name, unique by a hash where characters are lost."""
    wanted = label.replace(", ", ",").replace("=", "-")  # `a=b` would read as an override
    name = re.sub(r"[^\w.,+-]+", "-", wanted)[:100]
    # a value with = or a comma could read as another label
    if name == wanted and all(part.count("=") == 1 for part in label.split(", ") if part):
        return name
    return f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def child_environment(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """A child's environment: without a launcher, with one device.

    The choices of precision and of the CPU stay. OMP_NUM_THREADS, unless it is set, is this
    process's share of the cores.

    Args:
        environment: of this process.
        device: CUDA_VISIBLE_DEVICES of the child; "" = the CPU.
    """
    child = {key: text for key, text in environment.items() if not _OF_LAUNCHERS.fullmatch(key)}
    threads = max(1, allowed_cores() // int(environment.get("LOCAL_WORLD_SIZE", 1)))
    child["OMP_NUM_THREADS"] = child.get("OMP_NUM_THREADS") or str(threads)
    return child | {"CUDA_VISIBLE_DEVICES": device, "PYTHONUNBUFFERED": "1"}


def device_of(environment: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES for the children of a process: one GPU for each LOCAL_RANK, "" = CPU.

    Raises:
        UserError: there are fewer GPUs than processes on this machine.
    """
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return ""
    rank = int(environment.get("LOCAL_RANK", 0))
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        listed = "0" if rank == 0 else _gpus()  # "0" is none on a machine without a GPU
    visible = [name.strip() for name in listed.split(",") if name.strip()]
    if visible and rank >= len(visible):
        found = f"found {rank} with the GPUs {', '.join(visible)}"
        expected = "expected at most one process for each; CUDA_VISIBLE_DEVICES=0,0 puts two on one"
        raise UserError(f"LOCAL_RANK: {found}, {expected}")
    return visible[rank] if visible else ""


def _gpus() -> str:
    """Numbers of all GPUs, comma-separated, from a process that ends: torch is large."""
    code = "import torch; print(*range(torch.cuda.device_count()), sep=',')"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
