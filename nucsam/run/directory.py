"""The run directory: the names of its files, reading and writing them, and what they belong to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nucsam.config import Config, conflicts, load_config, to_toml
from nucsam.errors import UserError
from nucsam.files import printable, read_json, to_json, write_text


class RunDirectory:
    """One run of `nucsam train` on disk. No other module names these files.

    - `config.toml`: the whole configuration.
    - `environment.json`: versions, hardware, parameters, numbers of images.
    - `metrics.jsonl`: one line per epoch.
    - `adapter.safetensors`: the weights of the best epoch so far.
    - `base.safetensors`: the base weights, only where they are random.
    - `state/last.safetensors`: everything that resuming needs.
    - `scores.json`: the scores of the test images, written when training has ended.
    - `report.html`: the run as a page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.adapter_file = path / "adapter.safetensors"
        self.base_file = path / "base.safetensors"
        self.state_file = path / "state" / "last.safetensors"
        self.scores_file = path / "scores.json"
        self.report_file = path / "report.html"

    def exists(self) -> bool:
        """Whether the directory holds a run, finished or not."""
        return self.config_file.is_file()

    def check(self, config: Config, *, resume: bool) -> None:
        """Check that a run of `config` can start here, or resume.

        Raises:
            UserError: the directory holds files and `resume` is off, or it holds a run of another
                configuration.
        """
        if resume and self.exists():
            if changes := conflicts(load_config(self.config_file), config):
                raise UserError(
                    f"{self.config_file}: cannot resume with another configuration: "
                    f"{'; '.join(changes)} (found -> wanted). Give the run's own settings, or "
                    "another out for a new run"
                )
        elif self.path.exists() and any(
            not path.name.endswith(".partial") for path in self.path.iterdir()
        ):
            raise UserError(
                f"{self.path}: found files, expected a new or empty folder; give another out, or "
                "resume to continue the run there"
            )

    def prepare(self, config: Config) -> None:
        """Make the directory, clear it of partial files, and write the configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.rglob(".*.partial"):
            partial.unlink()
        write_text(self.config_file, to_toml(config))

    def read_config(self) -> Config:
        """The run's configuration.

        Raises:
            UserError: the directory holds no run, or its configuration cannot be read.
        """
        if not self.exists():
            raise UserError(
                f"{self.path}: found no {self.config_file.name}, expected a run directory of "
                "nucsam train"
            )
        return load_config(self.config_file)

    def write_environment(self, facts: dict[str, Any]) -> None:
        write_text(self.environment_file, json.dumps(facts, indent=2) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """The facts of `write_environment`; empty where the run has not written them yet."""
        return _read_document(self.environment_file) or {}

    def write_metrics(self, epochs: Sequence[dict[str, Any]]) -> None:
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in epochs))

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch done, in order."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        return [read_json(line, str(self.metrics_file)) for line in lines]

    def write_scores(self, scores: dict[str, Any]) -> None:
        write_text(self.scores_file, to_json(scores) + "\n")

    def read_scores(self) -> dict[str, Any] | None:
        """The scores of the test images; None where the run has not written them yet."""
        return _read_document(self.scores_file)

    def epochs_done(self) -> int:
        epochs = self.read_metrics()
        return epochs[-1].get("epoch", 0) if epochs else 0

    def is_finished(self, config: Config) -> bool:
        """Whether all epochs are done and the test images are scored."""
        return self.epochs_done() >= config.train.epochs and self.scores_file.is_file()


def _read_document(path: Path) -> dict[str, Any] | None:
    return read_json(path.read_bytes(), str(path)) if path.is_file() else None


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says, read at one moment."""

    folder: Path
    config: Config
    epochs: list[dict[str, Any]]  # of metrics.jsonl
    environment: dict[str, Any]
    scores: dict[str, Any] | None  # None where the run has none yet
    variant: str = ""  # names the run's settings among several variants

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        run = RunDirectory(folder)
        return cls(
            folder, run.read_config(), run.read_metrics(), run.read_environment(), run.read_scores()
        )

    @property
    def name(self) -> str:
        return f"fold {self.config.data.fold}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per scored image, by the first protocol, with its `fold` and its `run`."""
        images = self.scores["scores"][0]["images"] if self.scores else []
        if any("outcomes" not in image for image in images):
            raise UserError(
                f"{RunDirectory(self.folder).scores_file}: found scores of an earlier version, "
                f"expected the outcomes of nuclei; nucsam evaluate {self.folder} writes them"
            )
        place = {"fold": self.config.data.fold, "run": self}
        return [{**image, "organ": printable(image["organ"]), **place} for image in images]


def read_runs(folder: Path) -> list[RunRecord]:
    """The run in `folder`, or the runs of a cross-validation, sorted by variant and fold.

    Raises:
        UserError: `folder` holds no run, or a file of one is damaged.
    """
    if RunDirectory(folder).exists():
        return [RunRecord.read(folder)]
    inside = [*folder.glob("*/"), *folder.glob("*/*/")]
    runs = [RunRecord.read(path) for path in inside if RunDirectory(path).exists()]
    if not runs:
        raise UserError(
            f"{folder}: found no {RunDirectory(folder).config_file.name} in it or in its "
            "sub-folders, expected a run of nucsam train or the folder of nucsam folds"
        )
    first = runs[0].config
    lines = [line for run in runs for line in conflicts(first, run.config, ("data.fold:",))]
    differing = {line.partition(":")[0] for line in lines}
    varied = [key for key in first.flat() if key in differing]

    def values(run: RunRecord) -> list[Any]:
        settings = run.config.flat()
        return [settings[key] for key in varied]

    def order(run: RunRecord) -> tuple:
        fold = run.config.data.fold
        return values(run), fold == "all", fold

    def variant(run: RunRecord) -> str:
        return ", ".join(f"{key}={value}" for key, value in zip(varied, values(run)))

    return [replace(run, variant=variant(run)) for run in sorted(runs, key=order)]
