"""Has a run learnt anything, and did it take enough optimizer steps?"""

import math
from collections.abc import Mapping
from typing import Any

from nucsam.config import Config, Train

# benchmarks/accuracy.md: on 32 images, 1,536 steps scored 1 to 3 AJI more than 384
USUAL_STEPS = 1500
USUAL = f"{USUAL_STEPS:,} or more are usual"
NO_DICE = 0.01  # a pooled Dice below it says that nothing was learnt


def steps_sentence(images: int, epochs: int, steps: int) -> str:
    """How many optimizer steps the images and epochs of a training make."""
    return f"{images} images x {epochs} epochs = {steps:,} optimizer steps; {USUAL}"


def of_length(train: Train, epochs: int) -> str:
    """The overrides that make a training this many epochs long."""
    setting = f"train.epochs={epochs}"
    return f"train.presentations=0 {setting}" if train.presentations else setting


def advice(config: Config, epoch: int, step: int) -> str:
    """Why a model may have learnt nothing after `step` optimizer steps, in `epoch` epochs."""
    t = config.train
    rates = f"train.lr_adapter = {t.lr_adapter:g} and train.lr_head = {t.lr_head:g}"
    taken = f"It has taken {step:,} optimizer steps in {epoch} epochs, with peak rates {rates}"
    if not 0 < epoch <= step or step >= USUAL_STEPS:
        return f"{taken}: other rates may help, if the labels belong to the images"
    overrides = of_length(t, math.ceil(USUAL_STEPS * epoch / step))
    longer = f"{overrides} would take for this number of images"
    return f"{taken}. That is few: {USUAL}, which {longer}"


def learnt_nothing(scores: Mapping[str, Any]) -> str:
    """A sentence where the content of scores.json says that the model has learnt nothing, or ""."""
    summary = scores["scores"][0]["summary"]
    if not summary["nuclei"]:
        return ""
    images = f"the {summary['images']} {scores['images_of']} images"
    if not summary["predicted"]:
        return f"The model has learnt nothing: it predicts no nucleus in {images}."
    if summary["pooled"]["dice"] < NO_DICE:  # the mean counts empty images as 1
        return f"The model has learnt nothing: its Dice on {images} is about 0."
    return ""
