"""What a training prints: speed and memory, a line per epoch."""

import os
import shlex
from typing import Any

import psutil
import torch

from nucsam.config import Config
from nucsam.console import PlainConsole
from nucsam.processes import is_launched
from nucsam.run.directory import RunDirectory
from nucsam.run.learning import USUAL_STEPS, advice, learnt_nothing, steps_sentence
from nucsam.score.runs import scores_sentence
from nucsam.score.tables import HEADLINE

console = PlainConsole()


def epoch_speed(device: torch.device, seconds: float, images: int) -> dict[str, float]:
    """Time and memory of an epoch.

    Memory is the peak allocated on a GPU; on a CPU it is what is resident at the end.
    """
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / max(seconds, 1e-3), 3),
        "memory_gib": round(memory / 2**30, 3),
    }


def print_start(facts: dict[str, Any], device: torch.device, setting: str) -> None:
    """What trains on what, and in how many steps.

    Args:
        facts: of environment.json.
        device: where it trains.
        setting: train.precision.
    """
    images = ", ".join(f"{count} {name}" for name, count in facts["images"].items())
    where = {"cpu": "the CPU", "cuda": "the GPU"}.get(device.type, device.type)
    precision = facts["precision"].replace("no", "fp32")
    precision += " (train.precision=auto)" if setting == "auto" else ""
    processes = f" in {facts['processes']} processes" if facts["processes"] > 1 else ""
    console.say(f"images: {images}; base {facts['base']}")
    trained = f"{facts['parameters_trainable']:,} of {facts['parameters']:,} parameters"
    console.print(f"trains {trained} on {where} in {precision}{processes}")
    names = ("threads", "loader_processes", "idle_cores")
    console.print(", ".join(f"{name.replace('_', ' ')}: {facts[name]}" for name in names))
    steps = steps_sentence(facts["images"]["train"], facts["epochs"], facts["steps"])
    console.print(steps, style="yellow" if facts["steps"] < USUAL_STEPS else "")
    if facts["base"].startswith("none"):
        print_warning("random base weights: the scores say nothing about published weights")


def print_epoch(line: dict[str, Any]) -> None:
    """One line of metrics.jsonl for a person: loss, speed and, where validated, percent scores."""
    speed = f"{line['images_per_second']:.3g} images/s"
    scores = [f"{name.upper()} {100 * line[name]:.1f}" for name in HEADLINE if name in line]
    text = f"epoch {line['epoch']}: loss {line['loss']:.3f}, {speed}"
    console.print(f"{text}; {', '.join(scores)}" if scores else text)


def print_stopped(run: RunDirectory, step: int | None, steps: int) -> None:
    """What a training that was stopped has saved, and how to continue it.

    Args:
        run: its directory.
        step: optimizer steps in the saved state; None = nothing is saved.
        steps: optimizer steps in all.
    """
    saved = f"{run.state_file} holds step {step} of {steps}" if step else "no step is saved yet"
    line = "give the same command with --resume"  # a launcher's choices are not in the run
    if not ("RANK" in os.environ or is_launched()):
        line = shlex.join(["nucsam", "train", "--resume", "--out", str(run.path)])
    console.say(f"stopped: {saved}; to continue:", style="yellow")
    console.say(line)


def print_warning(text: str) -> None:
    console.print(text, style="yellow")


def print_scores(scores: dict[str, Any], config: Config, history: list[dict[str, Any]]) -> None:
    """The scores of a run; warns where it ends below the model it began with, or learnt nothing.

    Args:
        scores: content of scores.json.
        config: of the run.
        history: the lines of metrics.jsonl.
    """
    metric = config.train.best
    first, last = history[0], history[-1]
    if first["epoch"] == 0 and last[metric] < first[metric]:
        before, after = (f"{100 * line[metric]:.1f}" for line in (first, last))
        change = f"{metric} {before} at epoch 0, {after} at the end"
        kept = "the kept weights are those of the best epoch"
        print_warning(f"training made it worse: {change}; {kept}")
    console.say(scores_sentence(scores))
    if sentence := learnt_nothing(scores):
        print_warning(f"{sentence} {advice(config, last['epoch'], last['step'])}")
