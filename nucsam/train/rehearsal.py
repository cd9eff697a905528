"""A rehearsal: what a training will take on this device, measured on three real steps."""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from nucsam.config import Config
from nucsam.data.labels import areas
from nucsam.errors import UserError
from nucsam.model.network import build_model
from nucsam.processes import exit_on_sigterm, process_count
from nucsam.run.learning import USUAL_STEPS, of_length
from nucsam.score.metrics import PROTOCOLS
from nucsam.score.tables import FEWEST
from nucsam.train.loop import memory_advice, step
from nucsam.train.progress import console, epoch_speed, print_warning
from nucsam.train.training import Training

STEPS = 3
LONG = 120  # minutes: on a CPU, a longer training is worth a remark
SMALLEST = PROTOCOLS["nuinsseg"].min_area
TINY = 0.05  # share of nuclei under `instances.area` that is worth a remark


def rehearse(config: Config) -> dict[str, Any]:
    """Set a training up in a folder that is removed, time it, and print what it will take.

    Args:
        config: of the training.

    Returns:
        `step_seconds` of an optimizer step; `minutes` of the whole training and scoring;
        `memory_gib` in use; `problems`, sentences on what may go wrong.

    Raises:
        UserError: as `nucsam.train.loop.fit`, or several processes are launched.
    """
    if process_count() > 1:
        raise UserError(f"WORLD_SIZE: found {process_count()}, expected one process to rehearse")
    config = replace(config, train=replace(config.train, log_with=""))
    with exit_on_sigterm(), tempfile.TemporaryDirectory() as folder, memory_advice(config):
        training = Training(config, Path(folder), resume=False, build=build_model)
        facts = _measure(training)
    facts["problems"] = list(_problems(training, facts))
    groups = len({record.group for record in training.samples.records})
    seconds = f"about {facts['minutes']:.0f} min, with {facts['step_seconds']:.1f} s a step"
    cost = f"{seconds}; {facts['memory_gib']:.1f} GiB of memory"
    console.print(f"images in {groups} groups; {cost}; this dry run keeps nothing")
    for problem in facts["problems"]:
        print_warning(problem)
    return facts


def _measure(training: Training) -> dict[str, float]:
    """Times of steps and of a scored image, and memory."""
    t = training.config.train
    batches = chain.from_iterable(repeat(training.loader))
    training.net.train()
    console.print(f"dry run: {STEPS} steps and one scored image ...")
    times = [time.monotonic()]
    for _ in range(STEPS):
        step(training, batches)
        training.check_losses()  # waits for the device
        times.append(time.monotonic())
        console.print(f"  step: {times[-1] - times[-2]:.1f} s")
    training.score_samples(training.select[:1])
    times.append(time.monotonic())
    seconds = float(np.median(np.diff(times)[:STEPS]))
    images = math.ceil(t.epochs / t.validate_every) * len(training.select) + len(training.score)
    return {
        "step_seconds": seconds,
        "minutes": (training.steps * seconds + images * (times[-1] - times[-2])) / 60,
        "memory_gib": epoch_speed(training.accelerator.device, 1, 0)["memory_gib"],
    }


def _problems(training: Training, facts: dict[str, float]) -> Iterator[str]:
    """Sentences on what may go wrong in a training that has been set up and measured."""
    d, t = training.config.data, training.config.train
    least = training.config.instances.area
    by_image = [areas(training.samples[i].label) for i in training.train]
    removed = float(np.mean(np.concatenate(by_image) < SMALLEST))
    px = [area / training.ratios[i] ** 2 for i, area in zip(training.train, by_image)]  # of the run
    tiny = float(np.mean(np.concatenate(px) < least))
    if len(training.select) < FEWEST:
        yield f"data.inner: only {len(training.select)} image(s) choose the epoch, partly by chance"
    if len(training.score) < FEWEST:
        images = f"only {len(training.score)} image(s) are scored"
        yield f"data.folds: {images}; nucsam folds scores every image once"
    if removed > TINY:
        small = f"{removed:.0%} of the nuclei are under {SMALLEST} px"
        rule = "the protocol nuinsseg removes such predictions before it scores"
        yield f"{small}: {rule}; nucsam evaluate --protocol plain does not"
    if tiny > TINY:
        yield f"instances.area: {tiny:.0%} of the nuclei are under {least} px and will be dropped"
    if training.steps < USUAL_STEPS:
        overrides = of_length(t, math.ceil(USUAL_STEPS / training.batches.steps))
        yield f"{overrides} makes the usual {USUAL_STEPS:,} steps"
    if facts["minutes"] > LONG and training.accelerator.device.type == "cpu":
        if d.crop * d.scale > 256:
            share = (256 / (d.crop * d.scale)) ** 2
            smaller = f"data.crop=256 data.scale=1 takes about {share:.2g} times as long"
            yield f"data.crop: on a CPU, {smaller}, for scores a few points lower"
        epochs = int(60 * t.epochs / facts["minutes"])
        if epochs:
            yield f"{of_length(t, epochs)} takes about an hour on this device"
        else:
            yield "train.epochs: one epoch takes over an hour on this device"
