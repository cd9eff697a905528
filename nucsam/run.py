"""A training run's directory: what is written when, and how far the run has come."""

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nucsam import __version__, checkpoint
from nucsam.atomic import write_text
from nucsam.base import Base
from nucsam.config import MAY_CHANGE, Config, differences, load, to_toml

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "safetensors", "numpy", "scipy", "scikit-image")
_NOT_FINITE = (
    "{} is not finite at or before step {}. Lower train.lr_head and train.lr_adapter, or use train.precision=bf16 or "
    "fp32; --resume goes on from the last saved state"
)


@dataclass
class Progress:
    """How far a run has come: what its state file holds beside tensors."""

    step: int = 0  # optimizer steps done
    images: int = 0  # seen by this process since the epoch began
    sums: dict[str, float] = field(default_factory=dict)  # of each loss term over those images
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    best: dict[str, Any] = field(default_factory=dict)  # the line of the epoch whose weights are kept

    @property
    def epochs(self) -> int:
        """Epochs done, their line in the history written."""
        return self.history[-1]["epoch"] if self.history else 0


class Run:
    """Files of one run directory. Every process keeps count and reads; only the `main` one writes.

    `weights` are the trainable parameters, `average` their running average (empty where EMA is off); `about`, JSON
    values, goes into the adapter's metadata, and a run is gone on with only where it is the same.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        base: Base,
        weights: dict[str, Tensor],
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: Any = None,
        about: dict[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        self.out, self.config, self.base = out, config, base
        self.weights, self.average, self.optimizer, self.scaler = weights, average, optimizer, scaler
        self.about, self.main = about or {}, main
        self.progress, self.sums = Progress(), {}
        self.saved = time.monotonic()

    @property
    def state(self) -> Path:
        return self.out / "state" / "last.safetensors"

    def restore(self) -> None:
        """Go on where `save` left off."""
        metadata = checkpoint.load_state(self.state, self.weights, self.average, self.optimizer)
        found, kinds = metadata.get("progress"), {name: type(value) for name, value in asdict(Progress()).items()}
        if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
            raise ValueError(f"{self.state}: found no progress of a run; delete it to start the run anew")
        for name, value in self.about.items():
            if (before := metadata.get("about", {}).get(name, value)) != value:
                raise ValueError(
                    f"{self.state}: --resume with another {name}: found {before!r}, wanted {value!r}; launch it on the "
                    "same images, with the same number of processes and the same precision"
                )
        self.progress = Progress(**found)
        device = next(iter(self.weights.values())).device
        self.sums = {name: torch.tensor(total, device=device) for name, total in self.progress.sums.items()}
        if self.scaler is not None and metadata["scaler"]:  # none in a state of fp32
            self.scaler.load_state_dict(metadata["scaler"])

    def save(self) -> None:
        """Write the resumable state."""
        self.check()
        if not all(bool(p.isfinite().all()) for p in self.weights.values()):
            raise RuntimeError(_NOT_FINITE.format("a weight", self.progress.step))
        self.saved = time.monotonic()
        if not self.main:
            return
        self.progress.sums = {name: float(total) for name, total in self.sums.items()}
        metadata = {
            "progress": asdict(self.progress),
            "about": self.about,
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
        }
        checkpoint.save_state(self.state, self.weights, self.average, self.optimizer, metadata)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count a batch's loss terms, each (B,), without waiting for the device."""
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.detach().sum()
        self.progress.images += len(term)

    def check(self) -> None:
        """RuntimeError if a loss since the epoch began is not finite: nothing is saved after that."""
        totals = {name: float(total) for name, total in self.sums.items()}
        if odd := {name: total for name, total in totals.items() if not math.isfinite(total)}:
            raise RuntimeError(_NOT_FINITE.format(f"the loss {odd}", self.progress.step))

    def losses(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of the loss terms over the epoch's images, on all processes; the next epoch begins from 0."""
        self.check()
        totals = torch.stack([*self.sums.values()]) / self.progress.images
        totals = accelerator.reduce(totals, "mean").tolist()
        means = {f"loss_{name}": value for name, value in zip(self.sums, totals)}
        self.sums, self.progress.images = {}, 0
        return {"loss": sum(means.values()), **means}

    def log(self, line: dict[str, Any], keep: dict[str, Tensor] | None) -> None:
        """Add an epoch's line to metrics.jsonl; `keep` are the weights to keep if the line is the best so far."""
        progress, measure = self.progress, self.config.train.best
        progress.history.append(line)
        if keep is not None and line[measure] > progress.best.get(measure, -1.0):
            progress.best = line
            if self.main:
                self.keep(keep)
        if self.main:
            lines = "".join(json.dumps(line) + "\n" for line in progress.history)
            write_text(self.out / "metrics.jsonl", lines)
        self.save()

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Write `weights` as the run's adapter."""
        metadata = {
            "version": __version__,
            "config": self.config.to_dict(),
            "base": {"sha256": self.base.sha256, "source": self.base.source},
            "epoch": self.progress.best.get("epoch", 0),
            **self.about,
            "selected": {"by": self.config.train.best, "on": self.config.data.select, **self.progress.best},
        }
        checkpoint.save_adapter(self.out / "adapter.safetensors", weights, metadata)

    def environment(self, device: torch.device, facts: dict[str, Any]) -> None:
        """Write environment.json: versions, hardware and the facts of this run."""
        on_gpu = device.type == "cuda"
        found = {
            "nucsam": __version__,
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "command": sys.argv,
            **facts,
        }
        write_text(self.out / "environment.json", json.dumps(found, indent=2) + "\n")


def check_out(out: Path, config: Config, resume: bool) -> None:
    """Whether `out` can be made, or gone on with.

    ValueError where `out` holds a run and `resume` is off, or another configuration and `resume` is on.
    """
    written = out / "config.toml"
    if resume and written.is_file():
        changed = [line for line in differences(load(written), config) if not line.startswith(MAY_CHANGE)]
        if changed:
            raise ValueError(
                f"{written}: --resume with another configuration: {'; '.join(changed)} (found -> wanted); give the "
                "run's own settings, or another --out for a new run"
            )
    elif out.exists() and any(not path.name.endswith(".partial") for path in out.iterdir()):
        raise ValueError(
            f"{out}: found files, expected no such folder or an empty one; give another --out, or --resume to go on "
            "with the run there"
        )


def make_out(out: Path, config: Config) -> None:
    """Make the run directory, or clear it of what a process left that was killed in the middle of a write."""
    out.mkdir(parents=True, exist_ok=True)
    for partial in out.rglob(".*.partial"):
        partial.unlink()
    write_text(out / "config.toml", to_toml(config))
