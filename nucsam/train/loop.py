"""The training loop of one fold, from top to bottom: fit, epoch, step, validate."""

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nucsam.config import Config, Train, load_config
from nucsam.console import Bar
from nucsam.data.augment import augment
from nucsam.errors import UserError
from nucsam.files import expanded
from nucsam.model.network import build_model
from nucsam.processes import exit_on_sigterm, is_first
from nucsam.run.checkpoint import load_adapter, put_weights
from nucsam.run.directory import RunDirectory
from nucsam.run.metadata import known_certainty
from nucsam.score.runs import describe_scores, headline, usual_certainty
from nucsam.train.progress import console, epoch_speed, print_epoch, print_scores, print_stopped
from nucsam.train.signals import StopSignals
from nucsam.train.training import Training

# What PyTorch says where a loader process is killed, or finds no room in /dev/shm.
_LOADER_DIED = re.compile(
    r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)|shared memory|/torch_\d"
)
QUIET = 60  # s: a shorter epoch prints a line only where it is validated
CHECK_STEPS = 20  # optimizer steps between checks that wait for the device and other processes


def fit(
    config: Config | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    build: Callable[..., nn.Module] = build_model,
) -> dict[str, Any]:
    """Train one fold, keep its best epoch, and score its test images.

        scores = nucsam.fit("configs/nuinsseg.toml", "runs/first")
        print(scores["headline"])

    Args:
        config: a configuration, or the path of a TOML file.
        out: run directory; new or empty, unless `resume` is on.
        resume: continue the run in `out`, or start it where there is none.
        build: makes the model from `(config.model, base, seed=, checkpoint=)`. The model must have
            the methods of `nucsam.model.network.Nucsam`.

    Returns:
        The content of scores.json. With `data.fold = "all"` the inner split is scored.

    Raises:
        UserError: a setting, an image or a file is wrong; a loss is not finite; the device has too
            little memory; another process trains in `out`.
        SystemExit: SIGTERM or Ctrl-C has arrived; a message says what is saved.
    """
    if not isinstance(config, Config):
        config = load_config(expanded(config))
    out = expanded(out)
    threads = torch.get_num_threads()
    try:
        with RunDirectory(out).claim() if is_first() else nullcontext():
            return _fit(config, out, resume, build)
    finally:
        torch.set_num_threads(threads)  # `Training` takes those of the idle cores


def _fit(
    config: Config, out: Path, resume: bool, build: Callable[..., nn.Module]
) -> dict[str, Any]:
    """`fit` in a directory that this launch alone writes."""
    training = Training(config, out, resume=resume, build=build)
    config, progress = training.config, training.progress
    trained = training.base.trained_head == config.model.head
    if trained and not progress.step and not progress.history:
        # The base is a trained model: epoch 0 shows later whether training made it worse.
        training.log({"epoch": 0, "step": 0, **validate(training)}, validated=True)
    training.net.train()
    main = training.accelerator.is_main_process
    bar = Bar(console, total=training.steps, done=progress.step, shown=main)
    try:
        with bar, StopSignals() as stop, memory_advice(config):
            while progress.epochs < config.train.epochs:
                epoch(training, bar, stop)
            if stop.agreed(training.accelerator)[0]:
                raise SystemExit(stop.status)
        with exit_on_sigterm():
            scores = score_best(training)
    except (KeyboardInterrupt, SystemExit) as stopped:
        if main:
            print_stopped(training.run, training.saved_step, training.steps)
        raise SystemExit(getattr(stopped, "code", 128 + signal.SIGINT)) from None
    training.accelerator.wait_for_everyone()  # else gloo sometimes aborts at interpreter exit
    training.accelerator.end_training()
    return scores


def epoch(training: Training, bar: Bar, stop: StopSignals) -> None:
    """Run the steps of an epoch that are not done yet, validate if it is time, and log."""
    t = training.config.train
    batches = training.batches
    progress = training.progress
    accelerator = training.accelerator
    number = progress.epochs
    done = progress.step - number * batches.steps  # all of them, if only the log line is missing
    batches.set_epoch(number, skip=done * t.accumulate)
    micro_batches = iter(training.loader)
    began = time.monotonic() - progress.seconds
    validated = (number + 1) % t.validate_every == 0 or number + 1 == t.epochs
    for _ in range(done, batches.steps):
        step(training, micro_batches)
        speed = (bar.task.speed or 0) * _step_images(training)
        text = f"epoch {number + 1}/{t.epochs}, step {progress.step}/{training.steps}"
        bar.show(f"{text}, {speed:.3g} images/s", progress.step)
        last = progress.step % batches.steps == 0
        check = progress.step % CHECK_STEPS == 0 or last
        if check:
            training.check_losses()
        due = time.monotonic() - training.saved_at > 60 * t.save_minutes
        due |= last and validated  # a run may be killed while it validates
        stopped, due = stop.agreed(accelerator, due, check)
        if stopped or due:
            progress.seconds = time.monotonic() - began
            training.save()
        if stopped:
            raise SystemExit(stop.status)

    seconds = time.monotonic() - began
    line = {"epoch": number + 1, "step": progress.step, **training.take_mean_losses()}
    peak = training.optimizer.param_groups[-1]["peak"]
    line["lr"] = peak * rate(progress.step - 1, training.steps, batches.steps, t)
    images = batches.steps * _step_images(training)
    line |= epoch_speed(accelerator.device, seconds, images)
    if validated:
        line |= validate(training)
    training.log(line, validated=validated)
    accelerator.log({k: v for k, v in line.items() if k != "step"}, step=progress.step)
    if accelerator.is_main_process and (validated or seconds > QUIET):
        print_epoch(line)


def step(training: Training, micro_batches: Iterator[dict[str, Tensor]]) -> None:
    """One optimizer step over `train.accumulate` micro-batches."""
    d, t = training.config.data, training.config.train
    accelerator = training.accelerator
    progress = training.progress
    norms = [w for w in training.weights.values() if not w.requires_grad]  # their statistics
    scaled = accelerator.scaler is not None
    before = torch.cat(norms) if scaled and norms else None

    # Set the learning rate.
    factor = rate(progress.step, training.steps, training.batches.steps, t)
    for group in training.optimizer.param_groups:
        group["lr"] = group["peak"] * factor

    # Accumulate gradients; processes exchange them with the last micro-batch only.
    for micro in range(t.accumulate):
        images, labels, counted, largest_id = _augmented(training, next(micro_batches))
        last = micro == t.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(training.ddp):
            maps = training.ddp(images, (d.crop, d.crop))
            terms = training.net.loss(maps, labels, counted, largest_id, training.config.loss)
            accelerator.backward(sum(terms.values()).mean() / t.accumulate)
        training.add_losses(terms)

    # Clip, step, average.
    length = accelerator.clip_grad_norm_(list(training.weights.values()), t.clip)
    training.optimizer.step()
    training.optimizer.zero_grad()
    progress.step += 1
    decay = min(t.ema, (1 + progress.step) / (10 + progress.step))
    if scaled:
        # Where gradients overflow in fp16, the optimizer skips the step. So does all else that a
        # step changes, without asking the device whether it happened.
        decay = torch.where(length.isfinite(), decay, 1.0)
        if norms:
            kept = torch.where(length.isfinite(), torch.cat(norms), before)
            torch._foreach_copy_(norms, kept.split([len(norm) for norm in norms]))
    if training.average:
        _update_average(training.average, training.weights, decay)


def validate(training: Training) -> dict[str, float | None]:
    """Mean Dice, AJI and PQ of the weights to keep on the images that choose the epoch, 0 to 1.

    The usual certainty is there too: see `usual_certainty`.
    """
    current = {name: p.detach().clone() for name, p in training.weights.items()}
    put_weights(training.net, training.average or current, training.run.path)
    scored = training.score_samples(training.select)
    put_weights(training.net, current, training.run.path)
    return headline(scored) | {"certainty": usual_certainty(scored)}


def score_best(training: Training) -> dict[str, Any]:
    """Score the best epoch on the test images, and write and print the scores."""
    config = training.config
    accelerator = training.accelerator
    accelerator.wait_for_everyone()  # the main process has written the adapter
    metadata = load_adapter(training.run.adapter_file, training.net, training.base)
    certainty = known_certainty(config, metadata)
    scored = training.score_samples(training.score, certainty)
    scores = describe_scores(scored, metadata, of=training.scored_split, certainty=certainty)
    if accelerator.is_main_process:
        training.run.write_scores(scores)
        print_scores(scores, config, training.progress.history)
    return scores


def rate(step: int, steps: int, epoch_steps: int, t: Train) -> float:
    """The learning rate of an optimizer step as a fraction of its peak.

    Args:
        step: optimizer step, from 0.
        steps: optimizer steps of the whole training.
        epoch_steps: optimizer steps of an epoch.
        t: schedule, warm-up and decay.
    """
    if t.schedule == "step":
        return t.gamma ** (step // (t.step_epochs * epoch_steps))
    warmup = max(1, round(t.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _augmented(training: Training, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images, label maps and counted pixels on the device; the largest id, found on the CPU."""
    d = training.config.data
    largest_id = int(batch["label"].max())
    device = training.accelerator.device
    windows = [batch[k].to(device, non_blocking=True) for k in ("image", "label", "counted")]
    crops = augment(
        *windows, batch["draws"], crop=d.crop, scale=d.scale, config=training.config.augment
    )
    return *crops, largest_id


@torch.no_grad()
def _update_average(
    average: dict[str, Tensor], weights: dict[str, Tensor], decay: float | Tensor
) -> None:
    """average += (1 - decay) * (weights - average); a decay of 1 changes nothing."""
    averages = list(average.values())
    changes = torch._foreach_sub([p.detach() for p in weights.values()], averages)
    torch._foreach_mul_(changes, 1 - decay)
    torch._foreach_add_(averages, changes)


def _step_images(training: Training) -> int:
    """Images of all processes per optimizer step."""
    t = training.config.train
    return t.batch * t.accumulate * training.accelerator.num_processes


@contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Turn running out of memory of the device, or of loader processes, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        d, t = config.data, config.train
        raise UserError(
            f"out of device memory with train.batch={t.batch} crops of data.crop={d.crop} px, "
            f"{round(d.crop * d.scale)} px to the model (data.scale={d.scale:g}), "
            f"train.checkpoint={str(t.checkpoint).lower()}. Try, in this order: "
            f"train.precision=fp16; train.batch={max(1, t.batch // 2)} "
            f"train.accumulate={2 * t.accumulate}, the same training with half the images at a "
            f"time; train.checkpoint=true; data.crop={d.crop // 2}. ({error})"
        ) from error
    except RuntimeError as error:
        if config.data.workers and _LOADER_DIED.search(str(error)):
            reason = str(error).strip().splitlines()[-1]
            found = f"found {config.data.workers}"
            died = "but a loader process died or found no shared memory"
            advice = "or in a container give it more, as in docker run --shm-size=2g"
            message = f"data.workers: {found}, {died}. Use data.workers=0; {advice}. ({reason})"
            raise UserError(message) from error
        raise
