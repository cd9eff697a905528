"""What one training holds: set up from a configuration, then logged, saved and restored."""

import atexit
import hashlib
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, LoggerType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nucsam import __version__
from nucsam.config import Config, Data, Train
from nucsam.data.augment import window
from nucsam.data.folders import Record, describe_records
from nucsam.data.samples import SAME_SCALE, Crops, EpochBatches, Samples, by_nuclei, is_resampled
from nucsam.data.splits import Split, find_split, inventory, training_images, with_epochs
from nucsam.errors import UserError
from nucsam.files import check_form
from nucsam.model.network import calibrated
from nucsam.model.weights import Base, load_base
from nucsam.predict.devices import PRECISIONS, half_type, make_accelerator, uses_gpu
from nucsam.predict.predictor import RATIO
from nucsam.processes import (
    check_joined,
    chosen_threads,
    idle_cores,
    keep_freed_memory,
    process_count,
)
from nucsam.run import checkpoint
from nucsam.run.checkpoint import Progress
from nucsam.run.directory import RunDirectory
from nucsam.score.runs import score_images
from nucsam.train.progress import console, print_start, print_warning
from nucsam.train.signals import ignore_signals, kill_workers

CALIBRATION_IMAGES = 16  # crops that set a random base's BatchNorm statistics
PACKAGES = "torch torchvision timm accelerate safetensors numpy scipy scikit-image"


class Training:
    """One training. Every process counts and reads; only the main one writes.

    Attributes:
        config, run, accelerator: settings, directory, devices.
        samples: decoded images. `train`, `select` and `score` index those to train on, to choose
            the epoch by, and to score at the end; `scored_split` is "test" or "inner".
        batches, loader: crops of an epoch in optimizer steps.
        base, net, ddp: base weights, the model, and the model as the accelerator prepares it.
        weights: trainable tensors of `net`, by name. `average`: their running average; empty where
            EMA is off.
        facts: JSON values of the adapter's metadata.
        progress: how far the run has come. `loss_sums`: of each term over the epoch's images.
    """

    def __init__(
        self, config: Config, out: Path, *, resume: bool, build: Callable[..., nn.Module]
    ) -> None:
        """Set up, and restore where the run resumes.

        Checks everything that a user can get wrong before it writes anything. Arguments and errors
        are those of `nucsam.train.loop.fit`.
        """
        self.run = RunDirectory(out)
        records, split = self._find_images(config.data, resume)
        self.config = config = with_epochs(config, process_count(), split)
        self.cores = idle_cores()
        # A thread waits for all others at each step: two on one busy core take longer than one.
        if not chosen_threads():
            torch.set_num_threads(self.cores)
        if not uses_gpu():
            keep_freed_memory()
        self.accelerator = _accelerator(config, self.run)
        self.run.check(config, resume=resume)
        self._load_images(records, split, resume)
        self._load_model(build)
        self.progress = Progress()
        self.loss_sums: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None  # optimizer steps in the saved state
        if resume and self.run.state_file.is_file():
            self.restore()
        elif resume and self.accelerator.is_main_process:
            print_warning(f"resume: {out} holds no saved state; a new run starts")
        self._write_start()
        self.accelerator.init_trackers("nucsam", config.flat())

    def _find_images(self, d: Data, resume: bool) -> tuple[list[Record], Split]:
        try:
            return find_split(d)
        except UserError as error:
            if not (resume and self.run.exists()):
                raise
            hint = "if the images have moved, data.root=FOLDER says where they are"
            raise UserError(f"{error}; {hint}") from error

    def _load_images(self, records: Sequence[Record], split: Split, resume: bool) -> None:
        """Samples and their split."""
        d = self.config.data
        self.train, self.select = training_images(d, records, split)
        self.score = split.test or split.inner
        self.scored_split = "test" if split.test else "inner"
        self.samples = Samples(records, memory_gib=d.memory)
        self.images = inventory(records, split, self.samples.digests)
        if resume and self.run.exists():
            self.run.check_images(self.images, d.root)
        self._check_test_images(split.test)
        mpps, areas = self.samples.mpps, self.samples.areas
        self.mpp, self.ratios = magnification(d, mpps, areas, self.train)
        self._check_nuclei(d)
        side = max(min(size) for size in self.samples.sizes)
        if self.accelerator.is_main_process and d.crop > side:
            found = f"found {d.crop} px, but no image with a shorter side over {side} px"
            print_warning(f"data.crop: {found}; a smaller crop is faster")

    def _check_nuclei(self, d: Data) -> None:
        """Refuse to train on images whose nuclei are none or vague; warn of choosing by them."""
        for images, use in ((self.train, "train on"), (self.select, "choose the epoch by")):
            if any(self._has_nucleus(i) for i in images) or not images:
                continue
            vague = any(self.samples[i].label.any() for i in images)
            outside = " outside the vague areas" if vague else ""
            found = f"found no nucleus{outside} in the {len(images)} images of {d.root} to {use}"
            if images is self.train:
                expected = "expected label maps with an id per nucleus"
                counts = f"nucsam inspect {d.root} counts them"
                raise UserError(f"data.root: {found}, {expected}; {counts}")
            if self.accelerator.is_main_process:
                why = "AJI is 0 there, so the first epoch that is validated is kept"
                print_warning(f"data.root: {found}. {why}; another data.seed draws others")

    def _has_nucleus(self, index: int) -> bool:
        sample = self.samples[index]
        return bool((sample.label if sample.vague is None else sample.label[~sample.vague]).any())

    def _nucleus_area(self) -> float | None:
        """The median of the `median_area` of the images trained on, px of the run; None = none."""
        areas = [self.samples.areas[i] / self.ratios[i] ** 2 for i in self.train]
        known = [area for area in areas if area]
        return statistics.median(known) if known else None

    def _check_test_images(self, test: Sequence[int]) -> None:
        """Refuse a folder of test images that holds an image to train on, whatever its labels.

        Images without a nucleus may be there twice. In one folder the split decides, and copies of
        an image are not looked for.
        """
        if not self.config.data.test:
            return
        records = self.samples.records
        others = {self._pixels(i): records[i] for i in self.train + self.select}
        others.pop("", None)
        same = [(records[i], others[key]) for i in test if (key := self._pixels(i)) in others]
        if same:
            (copy, image), count = same[0], len(same)
            found = (
                f"found {count} image(s) to train on, such as {copy.image}, a copy of {image.image}"
            )
            raise UserError(f"data.test: {found}; expected others")

    def _pixels(self, index: int) -> str:
        """SHA-256 of an image's pixels; "" of one without a nucleus."""
        image, label, _ = self.samples.planes(index)
        return hashlib.sha256(image).hexdigest() if label.any() else ""

    def _load_model(self, build: Callable[..., nn.Module]) -> None:
        """Batches, base, model and optimizer."""
        d, t = self.config.data, self.config.train
        accelerator = self.accelerator
        side = window(d.crop, self.config.augment)
        # On a CPU a loader process would take a core from the training.
        self.workers = min(d.workers, max(1, self.cores - 1)) if uses_gpu() else 0
        crops = Crops(self.samples, window=side, seed=t.seed, ratios=self.ratios)
        self.batches = EpochBatches(
            self.train,
            batch=t.batch,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            accumulation=t.accumulate,
            seed=t.seed,
        )
        self.loader = DataLoader(
            crops,
            batch_sampler=self.batches,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=uses_gpu(),
            worker_init_fn=ignore_signals,
        )
        if self.workers:
            atexit.register(kill_workers)
        first_crops = [crops[0, i] for i in self.train[:CALIBRATION_IMAGES]]
        self.base = _load_base(self.config, self.run, first_crops, accelerator)
        self.net = build(self.config.model, self.base, seed=t.seed, checkpoint=t.checkpoint)
        self.ddp = accelerator.prepare(self.net)
        if t.compile:
            # The head's norms talk to the other processes, which no full graph can hold.
            self.ddp = torch.compile(self.ddp, fullgraph=accelerator.num_processes == 1)
        # After `prepare`, which replaces the buffers of processes on CPUs.
        self.weights: dict[str, Tensor] = self.net.trainable()
        averaged = self.weights if t.ema else {}
        self.average = {name: p.detach().clone() for name, p in averaged.items()}
        self.optimizer = accelerator.prepare(make_optimizer(self.weights, t))
        self.facts = {
            "mpp": self.mpp,
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
        }

    def _write_start(self) -> None:
        """Write the files that a run directory has before the first step, and print the facts."""
        accelerator = self.accelerator
        random_base = self.config.model.weights == "none"
        accelerator.wait_for_everyone()  # a slower one would take the new files for an older run's
        if accelerator.is_main_process:
            epochs = self.config.train.epochs
            fresh = not self.progress.step and not self.progress.history
            if not fresh and (before := self.run.read_config().train.epochs) != epochs:
                rate = "the rate follows the new schedule from here on"
                result = f"so the result is not that of {epochs} epochs in one run"
                print_warning(f"train.epochs: {before} -> {epochs}; {rate}, {result}")
            self.run.prepare(self.config, self.images, fresh=fresh)
            if self.progress.history:
                self.run.write_metrics(self.progress.history)  # they may be lost or damaged
            if random_base:
                checkpoint.save_random_base(self.run, self.base)
        accelerator.wait_for_everyone()
        if random_base and accelerator.num_processes > 1:
            # That of the main process: machines differ in the last bit.
            self.base = checkpoint.run_base(self.run, self.config)
        if accelerator.is_main_process:
            facts = self._environment()
            with suppress(UserError):  # a damaged file is replaced
                before = self.run.read_environment()
                facts |= {name: before[name] for name in ("command", "directory") if name in before}
            self.run.write_environment(facts)
            console.say(f"{self.config.data.root}: {describe_records(self.samples.records)}")
            print_start(facts, accelerator.device, self.config.train.precision)

    def _environment(self) -> dict[str, Any]:
        device = self.accelerator.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        parameters = list(self.net.parameters())
        images = {"train": len(self.train), self.config.data.select: len(self.select)}
        images["test"] = len(self.score) if self.scored_split == "test" else 0
        return {
            "nucsam": __version__,
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES.split()},
            "platform": platform.platform(),
            "device": gpu or platform.processor() or "CPU",
            "device_type": device.type,
            "threads": torch.get_num_threads(),
            "loader_processes": self.workers,
            "idle_cores": self.cores,
            "command": sys.argv,
            "directory": str(Path.cwd()),
            "parameters_trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
            "base": self.base.source,
            "base_sha256": self.base.sha256,
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "images": images,
            "epochs": self.config.train.epochs,
            "steps": self.steps,
            "mpp": self.mpp,
            "resampled": sum(map(is_resampled, self.ratios)),
        }

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.batches.steps * self.config.train.epochs

    def score_samples(self, indices: Sequence[int], certainty: float = 0.0) -> list[dict[str, Any]]:
        """The scores of some of the samples, by the weights in `net`; as in `score_images`."""
        known = {"mpp": self.mpp, "certainty": certainty}
        return score_images(self.net, self.config, self.samples, indices, self.accelerator, **known)

    # ---- losses ----

    def add_losses(self, terms: dict[str, Tensor]) -> None:
        """Add a batch's loss terms, each (B,), without waiting for the device."""
        for name, term in terms.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + term.detach().sum()
        self.progress.images += len(next(iter(terms.values())))

    def check_losses(self) -> None:
        """Raise UserError if a loss since the epoch began is not finite. Waits for the device."""
        totals = {name: float(total) for name, total in self.loss_sums.items()}
        if broken := {name: t for name, t in totals.items() if not math.isfinite(t)}:
            raise self._not_finite(f"the loss {broken}")

    def take_mean_losses(self) -> dict[str, float]:
        """Means of the loss terms over the epoch's images of all processes; starts the next sum."""
        self.check_losses()
        means = torch.stack([*self.loss_sums.values()]) / self.progress.images
        means = self.accelerator.reduce(means, "mean").tolist()
        terms = {f"loss_{name}": value for name, value in zip(self.loss_sums, means)}
        self.loss_sums = {}
        self.progress.images = 0
        self.progress.seconds = 0.0
        return {"loss": sum(terms.values()), **terms}

    def _not_finite(self, what: str) -> UserError:
        found = f"{what} is not finite at or before step {self.progress.step}"
        advice = "Lower train.lr_head and train.lr_adapter, or use train.precision=bf16 or fp32"
        return UserError(f"{found}. {advice}; resume continues from the last saved state")

    # ---- files ----

    def save(self) -> None:
        """Write the resumable state. Every process must call it at the same step.

        Raises:
            UserError: a loss or a weight is not finite. Nothing is written then.
        """
        self.check_losses()
        if not all(bool(p.isfinite().all()) for p in self.weights.values()):
            raise self._not_finite("a weight")
        self.saved_at = time.monotonic()
        self.saved_step = self.progress.step
        means = {name: self.accelerator.reduce(x, "mean") for name, x in self.loss_sums.items()}
        if not self.accelerator.is_main_process:
            return
        self.progress.sums = {name: float(total) for name, total in means.items()}
        scaler = self.accelerator.scaler
        metadata = {
            "progress": asdict(self.progress),
            "about": self._needed(),
            "scaler": {} if scaler is None else scaler.state_dict(),
        }
        checkpoint.save_state(
            self.run.state_file, self.weights, self.average, self.optimizer, metadata
        )

    def restore(self) -> None:
        """Continue where `save` stopped.

        Raises:
            UserError: the state is damaged, of another run, or was saved with other images, base
                weights, processes or precision.
        """
        path = self.run.state_file
        metadata = checkpoint.load_state(path, self.weights, self.average, self.optimizer)
        self.progress = checkpoint.read_progress(path, metadata)
        self.saved_step = self.progress.step
        saved = check_form(metadata.get("about", {}), dict, f"{path}: about")
        for name, value in self._needed().items():
            if saved.get(name, value) != value:
                found = f"{name}: found {saved[name]!r}, wanted {value!r}"
                advice = "resume with the same images, base weights, processes and precision"
                raise UserError(f"{path}: cannot resume with {found}; {advice}")
        device = self.accelerator.device
        self.loss_sums = {
            name: torch.tensor(total, device=device) for name, total in self.progress.sums.items()
        }
        scaler = self.accelerator.scaler
        if scaler is not None and metadata.get("scaler"):  # empty in a state of fp32
            scaler.load_state_dict(metadata["scaler"])

    def _needed(self) -> dict[str, Any]:
        """What must be the same where the run resumes."""
        return self.facts | {"base_sha256": self.base.sha256}

    def log(self, line: dict[str, Any], *, validated: bool) -> None:
        """Add an epoch's line to metrics.jsonl, keep the weights if it is the best, and save."""
        metric = self.config.train.best
        progress = self.progress
        progress.history.append(line)
        main = self.accelerator.is_main_process
        if validated and line[metric] > progress.best.get(metric, -1.0):
            progress.best = line
            if main:
                self._save_adapter()
        if main:
            self.run.write_metrics(progress.history)
        self.save()

    def _save_adapter(self) -> None:
        best = self.progress.best
        metadata = {
            "version": __version__,
            "config": self.config.to_dict(),
            "base": {"sha256": self.base.sha256, "source": self.base.source},
            "epoch": best["epoch"],
            **self.facts,
            "nucleus_area": self._nucleus_area(),
            "selected": {"by": self.config.train.best, "on": self.config.data.select, **best},
        }
        checkpoint.save_adapter(self.run.adapter_file, self.average or self.weights, metadata)


def _accelerator(config: Config, run: RunDirectory) -> Accelerator:
    t = config.train
    trackers = LoggerType.list()
    if t.log_with and t.log_with not in trackers:
        expected = f"expected one of {', '.join(trackers)} or ''"
        raise UserError(f"train.log_with: found {t.log_with!r}, {expected}")
    precision = _precision(t.precision, uses_gpu(), run)
    torch.backends.cudnn.benchmark = True  # all crops have one size
    ddp = DistributedDataParallelKwargs(
        # All processes have the same statistics, except of an encoder that learns a new base.
        broadcast_buffers=config.model.norms == "moving",
        gradient_as_bucket_view=True,
        static_graph=t.accumulate == 1,  # DDP cannot learn the graph while `no_sync` holds
    )
    accelerator = make_accelerator(
        precision, kwargs_handlers=[ddp], log_with=t.log_with or None, project_dir=run.path
    )
    check_joined(accelerator.num_processes)
    if t.log_with and not accelerator.log_with:
        found = f"{t.log_with} is not installed"
        raise UserError(f"train.log_with: {found}; expected one that is, or ''")
    return accelerator


def _precision(setting: str, on_gpu: bool, run: RunDirectory) -> str:
    """Accelerate's name of a precision. A CPU computes fp16 in fp32, which a warning says.

    `auto` is the launcher's choice, else that with which the run began, else the fastest.
    """
    name = {"fp32": "no"}.get(setting, setting)
    if name == "auto":
        name = PRECISIONS[half_type(torch.device("cuda" if on_gpu else "cpu"))]
        began = run.read_environment().get("precision")
        name = began if began in PRECISIONS.values() else name
        name = os.environ.get("ACCELERATE_MIXED_PRECISION", name)
        if name not in PRECISIONS.values():
            expected = f"expected {', '.join(PRECISIONS.values())}"
            raise UserError(f"ACCELERATE_MIXED_PRECISION: found {name!r}, {expected}")
    if name == "fp16" and not on_gpu:
        found = "fp16 needs a GPU; computing in fp32 on this CPU"
        warnings.warn(f"train.precision: {found}", stacklevel=5)
        return "no"
    return name


def _load_base(
    config: Config, run: RunDirectory, crops: list[dict[str, Tensor]], accelerator: Accelerator
) -> Base:
    """The base weights. Random ones that the run does not hold yet are calibrated on `crops`."""
    if config.model.weights != "none" or run.base_file.is_file():
        with accelerator.main_process_first():  # one process downloads
            return checkpoint.run_base(run, config)
    side = max(64, round(config.data.crop * config.data.scale) // 32 * 32)
    images = torch.stack([crop["image"] for crop in crops]).float()
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear")
    return calibrated(load_base("none", config.model.encoder, seed=config.train.seed), images)


def magnification(
    d: Data, mpps: Sequence[float | None], areas: Sequence[float], train: Sequence[int]
) -> tuple[float | None, list[float]]:
    """The magnification of a run and of its images, by microns per px or `data.nucleus_area`.

    With `data.nucleus_area`, microns are used only where an image has too few nuclei. Without it,
    warns where the microns of images differ.

    Args:
        d: the section `data` of the configuration.
        mpps: microns per px of each image; None = not known.
        areas: of `Samples`.
        train: indices of the images to train on. No other image's labels count for the run.

    Returns:
        Microns per px of the run, None where no image says it; px of each image per px of the run.

    Raises:
        UserError: the microns per px of an image differ by more than the predictor takes.
    """
    by_size: list[float | None] = [None] * len(areas)
    known = [mpp for mpp in mpps if mpp]
    of_run = known
    if d.nucleus_area:
        by_size = [by_nuclei(area, d.nucleus_area) if area else None for area in areas]
        of_run = [mpps[i] * by_size[i] for i in train if mpps[i] and by_size[i]]
    mpp = d.mpp or (statistics.median(of_run) if of_run else None)
    if mpp and known:
        _check_spread(known, mpp, resampled=not d.nucleus_area)
    by_mpp = [mpp / own if mpp and own else 1.0 for own in mpps]
    return mpp, [size or microns for size, microns in zip(by_size, by_mpp)]


def _check_spread(mpps: Sequence[float], mpp: float, *, resampled: bool) -> None:
    """Check the microns per px of images beside those of their run; warn if they are resampled."""
    least, most = min(mpps), max(mpps)
    spread = f"data.root: found images of {least:g} to {most:g} microns per px"
    if max(most / mpp, mpp / least) > RATIO:
        raise UserError(f"{spread}, expected at most {RATIO:g} times off the run's {mpp:g}")
    if resampled and max(most / mpp, mpp / least) > math.exp(SAME_SCALE):
        use = f"training, scoring and prediction resample them to {mpp:g} (data.mpp)"
        warnings.warn(f"{spread}; {use}", stacklevel=3)


def make_optimizer(weights: dict[str, Tensor], t: Train) -> torch.optim.Optimizer:
    """AdamW. Adapter (or encoder) and head each have a peak rate; norms and biases do not decay.

    Args:
        weights: `Nucsam.trainable()` of the model.
        t: the section `train` of the configuration.
    """
    groups = []
    for head, peak in ((False, t.lr_adapter), (True, t.lr_head)):
        part = [p for name, p in weights.items() if _of_head(name) == head]
        for vectors, decay in ((False, t.weight_decay), (True, 0.0)):
            parameters = [p for p in part if (p.ndim < 2) == vectors]
            group = {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            if parameters:
                groups.append(group)
    # Fused: one launch, and it skips an fp16 step that overflowed without telling the host.
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def _of_head(name: str) -> bool:
    return name.startswith(("head.", "mask_decoder.")) and ".lora_" not in name
