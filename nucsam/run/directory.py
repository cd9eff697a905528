"""The run directory: the names of its files, reading and writing them, and what they belong to."""

import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nucsam.claims import Claim, read_note
from nucsam.config import SPLIT, Config, changes, conflicts, load_config, to_toml
from nucsam.data.splits import inventory_changes
from nucsam.errors import UserError
from nucsam.files import (
    check_form,
    make_folder,
    printable,
    read_json,
    stale_partials,
    to_json,
    write_text,
)
from nucsam.run.metadata import ENVIRONMENT, EPOCH, IMAGES, SCORES


class RunDirectory:
    """One run of `nucsam train` on disk. No other module names these files.

    - `config.toml`: the whole configuration.
    - `environment.json`: versions, hardware, parameters, numbers of images.
    - `images.json`: organ, group, part of the split and SHA-256 of each image.
    - `metrics.jsonl`: one line per epoch.
    - `adapter.safetensors`: the weights of the best epoch so far.
    - `base.safetensors`: the base weights, only where they are random.
    - `state/last.safetensors`: everything that resuming needs.
    - `scores.json`: the scores of the test images, written when training has ended.
    - `report.html`: the run as a page.
    - `.lock`: the claim of the process that trains.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.environment_file = path / "environment.json"
        self.images_file = path / "images.json"
        self.metrics_file = path / "metrics.jsonl"
        self.adapter_file = path / "adapter.safetensors"
        self.base_file = path / "base.safetensors"
        self.state_file = path / "state" / "last.safetensors"
        self.scores_file = path / "scores.json"
        self.report_file = path / "report.html"
        self.lock_file = path / ".lock"

    def exists(self) -> bool:
        """Whether the directory holds a run, finished or not."""
        return self.config_file.is_file()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Context of the only training in this directory, which it makes.

        A directory that still holds no run at the end is removed, if it is empty.

        Raises:
            UserError: another process trains here, or no folder can be made.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        make_folder(self.path)
        try:
            claim = Claim.take(self.lock_file)
        except UserError as error:
            warnings.warn(f"{error}; another training in this directory goes unseen", stacklevel=3)
            yield
            return
        if claim is None:
            holder = read_note(self.lock_file).get("holder", "another process")
            found = f"{holder} trains in this directory"
            raise UserError(f"{self.path}: {found}; wait for its end, or give another out")
        with claim:
            claim.note({"holder": f"process {os.getpid()} on {socket.gethostname()}"})
            try:
                yield
            finally:
                if not self.exists():
                    with suppress(OSError):  # Windows removes no open file
                        self.lock_file.unlink()
                        for folder in made:
                            folder.rmdir()

    def check(self, config: Config, *, resume: bool) -> None:
        """Check that a run of `config` can start here, or resume, perhaps for more epochs.

        Raises:
            UserError: the directory holds files and `resume` is off; or it holds a run of another
                configuration, or a trained one without its state.
        """
        if resume and self.exists():
            before = load_config(self.config_file)
            longer = config.train.epochs > before.train.epochs
            more = ["train.epochs", "train.presentations"] if longer else []
            if not self.state_file.is_file() and self.is_trained(before):
                found = f"found none, but {self.path} is trained"
                advice = f"nucsam evaluate {self.path} scores it, another out starts a new run"
                raise UserError(f"{self.state_file}: {found}; {advice}")
            if changed := conflicts(before, config, *more):
                found = f"another configuration: {'; '.join(changed.values())} (found -> wanted)"
                advice = "Give the run's own settings, or another out for a new run"
                raise UserError(f"{self.config_file}: cannot resume with {found}. {advice}")
        elif self.path.exists() and any(
            path not in (self.lock_file, self.images_file) and path.suffix != ".partial"
            for path in self.path.iterdir()
        ):
            advice = "give another out, or resume to continue the run there"
            raise UserError(f"{self.path}: found files, expected a new or empty folder; {advice}")

    def prepare(
        self, config: Config, images: Mapping[str, Mapping[str, str]], *, fresh: bool = False
    ) -> None:
        """Clear the directory of partial files, and write the inventory and the configuration.

        The files of a process that still runs stay. With `fresh`, for a run that has not begun, it
        also removes the results of an earlier start.
        """
        if fresh:
            results = (self.adapter_file, self.metrics_file, self.scores_file, self.report_file)
            for file in results:
                file.unlink(missing_ok=True)
        for folder in (self.path, self.state_file.parent):
            for partial in stale_partials(folder):
                partial.unlink(missing_ok=True)
        if self.exists() and self.read_config().train.epochs < config.train.epochs:
            self.scores_file.unlink(missing_ok=True)  # they are not those of more epochs
        write_text(self.images_file, json.dumps(images, indent=1) + "\n")
        write_text(self.config_file, to_toml(config))  # the last one: it makes this a run

    def read_config(self) -> Config:
        """The run's configuration.

        Raises:
            UserError: the directory holds no run, or its configuration cannot be read.
        """
        if not self.exists():
            runs = [path.name for path in self.path.glob("*/") if RunDirectory(path).exists()]
            several = f", such as {self.path / min(runs)}" if runs else ""
            expected = f"expected a run directory of nucsam train{several}"
            raise UserError(f"{self.path}: found no {self.config_file.name}, {expected}")
        return load_config(self.config_file)

    def read_images(self) -> dict[str, dict[str, str]]:
        """The inventory of the run's images; empty where there is no run."""
        return _read_document(self.images_file, IMAGES) or {}

    def check_images(self, images: Mapping[str, Mapping[str, str]], root: str | Path) -> None:
        """Check that images are those the run was split on, in the same parts.

        Args:
            images: of `splits.inventory`.
            root: their folder, for the message.

        Raises:
            UserError: names the images that differ.
        """
        if changed := inventory_changes(self.read_images(), images):
            found = f"found other images than {self.path} was split on"
            why = "so that test images may have been trained on"
            raise UserError(f"{root}: {found}, {why}; {'; '.join(changed)}")

    def write_environment(self, facts: dict[str, Any]) -> None:
        write_text(self.environment_file, json.dumps(facts, indent=2) + "\n")

    def read_environment(self, form: Any = dict) -> dict[str, Any]:
        """The facts of `write_environment`; empty where the run has not written them yet.

        Args:
            form: as in `check_form`.

        Raises:
            UserError: the file is damaged, or of another form.
        """
        try:
            return _read_document(self.environment_file, form) or {}
        except UserError as error:
            raise UserError(f"{error}; remove it, and resuming the run writes it again") from None

    def write_metrics(self, epochs: Sequence[dict[str, Any]]) -> None:
        write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in epochs))

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch done, in order."""
        if not self.metrics_file.is_file():
            return []
        source = str(self.metrics_file)
        lines = self.metrics_file.read_bytes().splitlines()
        return [read_json(line, source, EPOCH) for line in lines]

    def write_scores(self, scores: dict[str, Any]) -> None:
        write_text(self.scores_file, to_json(scores) + "\n")

    def read_scores(self, config: Config) -> dict[str, Any] | None:
        """The scores of the test images; None where the run of `config` is not finished.

        Raises:
            UserError: the file is damaged, or holds scores of another split.
        """
        if not self.is_finished(config):
            return None
        scores = _read_document(self.scores_file, SCORES)
        split = check_form(scores.get("split", {}), dict, f"{self.scores_file}: split")
        wanted = {f"data.{key}": getattr(config.data, key) for key in SPLIT}
        scored = wanted | {f"data.{key}": value for key, value in split.items()}
        if changed := changes(scored, wanted):
            found = f"found scores of another split than {self.config_file} has"
            raise UserError(f"{self.scores_file}: {found}: {'; '.join(changed.values())}")
        return scores

    def trained_scores(self, untrained: dict[str, Any]) -> dict[str, Any] | None:
        """The finished run's scores by the rules and in the tiles of `untrained`; None = none."""
        scores = self.read_scores(self.read_config())
        rules = [result["rules"] for result in untrained["scores"]]
        same = scores and rules == [result["rules"] for result in scores["scores"]]
        return scores if same and scores.get("tile") == untrained["tile"] else None

    def epochs_done(self) -> int:
        epochs = self.read_metrics()
        return epochs[-1]["epoch"] if epochs else 0

    def progress(self, config: Config) -> str:
        """Epochs done, as "2 of 20 epochs"."""
        return f"{self.epochs_done()} of {config.train.epochs} epochs"

    def is_trained(self, config: Config) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done() >= config.train.epochs

    def is_finished(self, config: Config) -> bool:
        """Whether all epochs are done and the test images are scored."""
        return self.is_trained(config) and self.scores_file.is_file()


def _read_document(path: Path, form: Any) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_json(path.read_bytes(), str(path), form)


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says, read at one moment."""

    folder: Path
    config: Config
    epochs: list[dict[str, Any]]  # of metrics.jsonl
    environment: dict[str, Any]
    scores: dict[str, Any] | None  # None where the run has none yet
    variant: str = ""  # names the run's settings among several variants
    digests: tuple[str, ...] = ()  # SHA-256 of each image of the data set, if they are known

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        run = RunDirectory(folder)
        config = run.read_config()
        scores = run.read_scores(config)
        digests = tuple(sorted(image["sha256"] for image in run.read_images().values()))
        epochs, environment = run.read_metrics(), run.read_environment(ENVIRONMENT)
        return cls(folder, config, epochs, environment, scores, digests=digests)

    @property
    def name(self) -> str:
        return f"fold {self.config.data.fold}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per scored image, by the first protocol, with its `fold` and its `run`."""
        images = self.scores["scores"][0]["images"] if self.scores else []
        place = {"fold": self.config.data.fold, "run": self}
        return [{**image, "organ": printable(image["organ"]), **place} for image in images]


def run_folders(folder: Path) -> list[Path]:
    """The run directories in the folder of a cross-validation, also in those of its variants."""
    inside = [*folder.glob("*/"), *folder.glob("*/*/")]
    return [path for path in inside if RunDirectory(path).exists()]


def read_runs(folder: Path) -> list[RunRecord]:
    """The run in `folder`, or the runs of a cross-validation, sorted by variant and fold.

    A run on all folds (`data.fold = "all"`) beside runs of folds is left out.

    Raises:
        UserError: `folder` holds no run, or two of one fold with the same settings, or a file of
            one is damaged.
    """
    if RunDirectory(folder).exists():
        return [RunRecord.read(folder)]
    runs = [RunRecord.read(path) for path in run_folders(folder)]
    if not runs:
        found = f"found no {RunDirectory(folder).config_file.name} in it or in its sub-folders"
        expected = "expected a run of nucsam train or the folder of nucsam folds"
        raise UserError(f"{folder}: {found}, {expected}")
    folds = [run for run in runs if run.config.data.fold != "all"]
    runs = folds or runs
    first = runs[0].config
    differing = {name for run in runs for name in conflicts(first, run.config, "data.fold")}
    if len({run.digests for run in runs if run.digests}) > 1:
        # not one data set that lies in several places
        places = ("data.root", "data.test")
        differing |= {key for key in places if len({r.config.flat()[key] for r in runs}) > 1}
    if all(run.config.train.presentations for run in runs):
        differing.discard("train.epochs")  # follows from them and the number of images

    def varied(run: RunRecord) -> dict[str, Any]:
        return {key: value for key, value in run.config.flat().items() if key in differing}

    runs.sort(key=lambda run: ([*varied(run).values()], run.config.data.fold))
    variants = [", ".join(f"{key}={value}" for key, value in varied(run).items()) for run in runs]
    runs = [replace(run, variant=variant) for run, variant in zip(runs, variants)]
    for run, following in pairwise(runs):
        if (run.variant, run.name) == (following.variant, following.name):
            found = f"{run.folder} and {following.folder}: found two runs of {run.name}"
            raise UserError(f"{found} with the same settings, expected one")
    return runs
