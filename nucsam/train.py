"""The training loop of one fold, read from top to bottom: `accelerate launch -m nucsam.train`."""

import atexit
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nucsam import checkpoint, data, evaluate, model, report, scoring
from nucsam.augment import augment, window
from nucsam.base import Base, load_base
from nucsam.config import Config, Train
from nucsam.predict import check_joined
from nucsam.run import Run, check_out, make_out

console = Console()
CALIBRATION_IMAGES = 16  # crops that set a random base's BatchNorm statistics
CHECK_STEPS = 20  # optimizer steps between looks at the loss, each of which waits for the device


def train(config: Config, out: Path, *, resume: bool = False, build: Callable = model.build) -> dict[str, Any]:
    """Train one fold and score its test images (with fold "all", the inner split's); all files go under `out`.

    `build(config.model, base, seed=..., checkpoint=...)` makes the model; it must have what `nucsam.model.Nucsam` has.
    Returns scores.json's content. A user's mistake is a ValueError; a loss that is not finite a RuntimeError.
    """
    d, t = config.data, config.train
    on_gpu = scoring.uses_gpu()
    if t.log_with and t.log_with not in LoggerType.list():
        raise ValueError(f"train.log_with: found {t.log_with!r}, expected one of {', '.join(LoggerType.list())} or ''")
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision=_precision(t.precision, on_gpu),
        log_with=t.log_with or None,
        project_dir=out,
    )
    processes, main, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    check_joined(processes)
    if t.log_with and not accelerator.log_with:
        raise ValueError(f"train.log_with: {t.log_with} is not installed; expected one that is, or ''")
    check_out(out, config, resume)

    records, split = scoring.find_images(d)
    training = split.train + split.inner if d.select == "test" else split.train
    selecting = split.test if d.select == "test" else split.inner
    if not training or not selecting:
        raise ValueError(
            f"data.root: found {len(records)} images in {d.root}, of which {len(training)} are left to train on and "
            f"{len(selecting)} to choose the epoch by; expected at least one of each"
        )
    samples = data.Samples(records, memory_gib=d.memory, progress=main)
    if not any(samples[i].label.any() for i in training):
        raise ValueError(
            f"data.root: found no nucleus in the {len(training)} images of {d.root} to train on, expected label maps "
            f"with an id per nucleus; nucsam inspect {d.root} counts them"
        )
    if main and d.crop > (side := max(min(size) for size in samples.sizes)):
        warning = (
            f"data.crop: found {d.crop} px, but no image with a shorter side over {side} px: a smaller crop is faster"
        )
        console.print(warning, style="yellow")
    crops = data.Crops(samples, window=window(d.crop, config.augment), seed=t.seed)
    batches = data.EpochBatches(
        training,
        batch=t.batch,
        rank=accelerator.process_index,
        processes=processes,
        accumulation=t.accumulate,
        seed=t.seed,
    )
    loader = DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=d.workers,
        persistent_workers=d.workers > 0,
        pin_memory=on_gpu,
        worker_init_fn=_ignore_sigterm,
    )
    if d.workers:
        atexit.register(_end_workers)

    base = _base(config, out, [crops[0, i] for i in training[:CALIBRATION_IMAGES]], accelerator)
    net = build(config.model, base, seed=t.seed, checkpoint=t.checkpoint)
    ddp = accelerator.prepare(net)
    weights = net.trainable()  # not before: several processes on the CPU get other tensors for their buffers
    optimizer = accelerator.prepare(torch.optim.AdamW(_groups(weights, t), betas=(0.9, 0.99)))
    average = {name: p.detach().clone() for name, p in weights.items()} if t.ema else {}
    about = {
        "mpp": _mpp(config, records),
        "images": data.identity(records),
        "processes": processes,
        "precision": accelerator.mixed_precision,
    }
    run = Run(out, config, base, weights, average, optimizer, accelerator.scaler, about, main)
    if resume and run.state.is_file():
        run.restore()
    elif resume and main:
        console.print(f"--resume: found no run to go on with in {out}; a new one begins", style="yellow", markup=False)
    accelerator.wait_for_everyone()  # what one writes now, none takes for something that was there
    if main:  # and nothing is written before all that a user can get wrong has been looked at
        make_out(out, config)
        if config.model.weights == "none":
            metadata = {"kind": "base", "source": base.source}
            checkpoint.write_tensors(out / "base.safetensors", base.state, metadata)
    accelerator.wait_for_everyone()
    if config.model.weights == "none":  # the main process's: unlike machines calibrate unlike in the last bit
        run.base = base = checkpoint.run_base(out, config)
    progress, steps = run.progress, batches.steps * t.epochs
    if main:
        images = {"train": len(training), d.select: len(selecting), "test": len(split.test)}
        run.environment(device, _facts(net, accelerator, images, base))
    accelerator.init_trackers("nucsam", config.flat())

    def validate() -> dict[str, float]:
        current = {name: p.detach().clone() for name, p in weights.items()}
        checkpoint.put(net, average or current, out)
        found = scoring.score_images(net, config, samples, selecting, accelerator)
        checkpoint.put(net, current, out)
        net.train()
        return scoring.headline(found)

    if progress.step == 0 and base.extra and not progress.history:
        run.log({"epoch": 0, "step": 0, **validate()}, keep=average or weights)
    net.train()
    with _bar(shown=main) as bar, _Sigterm() as stopping, _memory_advice(config):
        task = bar.add_task("", total=steps, completed=progress.step, speed="")
        while (epoch := progress.epochs) < t.epochs:
            within = progress.step - epoch * batches.steps  # all of them if only the end of the epoch was not reached
            batches.set_epoch(epoch, skip=within * t.accumulate)
            stream, began = iter(loader), time.monotonic()
            for _ in range(within, batches.steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(progress.step, steps, batches.steps, t)
                for micro in range(t.accumulate):
                    batch = next(stream)
                    n = int(batch["label"].max())
                    window_maps = (batch[key].to(device, non_blocking=True) for key in ("image", "label", "counted"))
                    images, labels, counted = augment(
                        *window_maps, batch["draws"], crop=d.crop, scale=d.scale, config=config.augment
                    )
                    with nullcontext() if micro == t.accumulate - 1 else accelerator.no_sync(ddp):
                        maps = ddp(images, (d.crop, d.crop))
                        terms = net.loss(maps, labels, counted, n, config.loss)
                        accelerator.backward(sum(terms.values()).mean() / t.accumulate)
                    run.add(terms)
                accelerator.clip_grad_norm_(list(weights.values()), t.clip)
                optimizer.step()
                optimizer.zero_grad()
                progress.step += 1
                if average:
                    _update(average, weights, min(t.ema, (1 + progress.step) / (10 + progress.step)))
                bar.update(
                    task,
                    completed=progress.step,
                    description=f"epoch {epoch + 1}/{t.epochs}",
                    speed=_rate_text(bar.tasks[task], t.batch * t.accumulate * processes),
                )
                if progress.step % CHECK_STEPS == 0:
                    run.check()
                if stopping(accelerator):
                    run.save()
                    raise SystemExit(128 + signal.SIGTERM)
                if time.monotonic() - run.saved > 60 * t.save_minutes:
                    run.save()

            seconds = time.monotonic() - began
            line = {"epoch": epoch + 1, "step": progress.step, **run.losses(accelerator)}
            line["lr"] = optimizer.param_groups[-1]["peak"] * rate(progress.step - 1, steps, batches.steps, t)
            line |= _speed(device, seconds, (batches.steps - within) * t.accumulate * t.batch * processes)
            validated = (epoch + 1) % t.validate_every == 0 or epoch + 1 == t.epochs
            if validated:
                line |= validate()
            run.log(line, keep=(average or weights) if validated else None)
            accelerator.log({k: v for k, v in line.items() if k != "step"}, step=progress.step)
            if main:
                bar.console.print(_sentence(line))

    accelerator.wait_for_everyone()  # the main process has written the best weights
    metadata = checkpoint.load_adapter(out / "adapter.safetensors", net, base)
    indices = split.test or split.inner
    found = scoring.score_images(net, config, samples, indices, accelerator)
    scores = scoring.describe(found, metadata, of="test" if split.test else "inner", untrained=False)
    if main:
        evaluate.write_json(out / "scores.json", scores)
        _warn_if_worse(progress.history, t.best)
        console.print(scoring.sentence(scores))
        console.print(report.finish(out, net), markup=False, soft_wrap=True)
    accelerator.end_training()
    if torch.distributed.is_initialized():  # gloo sometimes aborts at interpreter exit otherwise
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return scores


def rate(step: int, steps: int, epoch_steps: int, t: Train) -> float:
    """Learning rate of an optimizer step (from 0), as a part of its peak."""
    if t.schedule == "step":
        return t.gamma ** (step // (t.step_epochs * epoch_steps))
    warmup = max(1, round(t.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _precision(wanted: str, on_gpu: bool) -> str | None:
    """Accelerate's name; None = what the launcher says. A CPU has no fp16 arithmetic: fp32 there, said aloud."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    name = {"auto": launched, "fp32": "no"}.get(wanted, wanted)
    if name == "fp16" and not on_gpu:
        warnings.warn("train.precision: fp16 needs a GPU; computing in fp32 on this CPU", stacklevel=3)
        return "no"
    return name


def _base(config: Config, out: Path, crops: list[dict[str, Tensor]], accelerator: Accelerator) -> Base:
    """The base weights; random ones, where the run does not hold them yet, are calibrated on a few crops."""
    if config.model.weights != "none" or (out / "base.safetensors").is_file():
        with accelerator.main_process_first():  # one download
            return checkpoint.run_base(out, config)
    side = max(64, round(config.data.crop * config.data.scale) // 32 * 32)
    images = torch.stack([crop["image"] for crop in crops]).float()
    images = nn.functional.interpolate(images, size=(side, side), mode="bilinear")
    return model.calibrated(load_base("none", seed=config.train.seed), images)


def _mpp(config: Config, records: list[data.Record]) -> float | None:
    """Microns per image px: as configured, else the median of what the image files say."""
    found = [mpp for record in records if (mpp := data.read_mpp(record.image))]
    return config.data.mpp or (statistics.median(found) if found else None)


def _groups(weights: dict[str, Tensor], t: Train) -> list[dict[str, Any]]:
    """Adapter (or encoder) and head, each with its peak rate; no decay on vectors (norms, biases)."""
    groups = []
    for of_head, peak in ((False, t.lr_adapter), (True, t.lr_head)):
        own = [p for name, p in weights.items() if _is_head(name) == of_head]
        for vector in (False, True):
            params = [p for p in own if (p.ndim < 2) == vector]
            decay = 0.0 if vector else t.weight_decay
            if params:
                groups.append({"params": params, "lr": peak, "peak": peak, "weight_decay": decay})
    return groups


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "mask_decoder.")) and ".lora_" not in name


@torch.no_grad()
def _update(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average.values()), [p.detach() for p in weights.values()], 1 - decay)


def _bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not shown)


def _rate_text(task: Task, images: int) -> str:
    return f"{task.speed * images:.1f} images/s" if task.speed else ""


def _sentence(line: dict[str, Any]) -> str:
    """An epoch for a person: its loss, speed and, where validated, scores in percent."""
    scores = ", ".join(f"{name.upper()} {100 * line[name]:.1f}" for name in scoring.HEADLINE if name in line)
    return f"epoch {line['epoch']}: loss {line['loss']:.3f}, {line['images_per_second']:.1f} images/s" + (
        f"; {scores}" if scores else ""
    )


def _speed(device: torch.device, seconds: float, images: int) -> dict[str, float]:
    """Time and memory of an epoch; memory is the peak allocated on a GPU, on a CPU what is resident at the end."""
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return {
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3),
        "memory_gib": round(memory / 2**30, 3),
    }


def _facts(net: nn.Module, accelerator: Accelerator, images: dict[str, int], base: Base) -> dict[str, Any]:
    """What environment.json says of this run; the first lines of it are printed."""
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    facts = {
        "parameters_trainable": trainable,
        "parameters": sum(p.numel() for p in net.parameters()),
        "base": base.source,
        "base_sha256": base.sha256,
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "images": images,
    }
    console.print(
        f"trains {trainable:,} of {facts['parameters']:,} parameters on base {base.source}; "
        f"images: {', '.join(f'{count} {name}' for name, count in images.items())}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, {accelerator.mixed_precision}"
    )
    if base.source.startswith("none"):
        console.print("[yellow]random base weights: the scores say nothing about MobileSAM[/]")
    return facts


def _warn_if_worse(history: list[dict[str, Any]], best: str) -> None:
    first, last = history[0], history[-1]
    if first["epoch"] == 0 and last[best] < first[best]:
        console.print(
            f"[yellow]training made it worse: {best} {100 * first[best]:.1f} at epoch 0, {100 * last[best]:.1f} at the "
            "end; the kept weights are those of the best epoch[/]"
        )


@contextmanager
def _memory_advice(config: Config) -> Iterator[None]:
    """Out of memory on the device: a RuntimeError with the numbers that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        d, t = config.data, config.train
        side = round(d.crop * d.scale)
        raise RuntimeError(
            f"out of device memory with train.batch={t.batch} crops of data.crop={d.crop} px, {side} px to the model "
            f"(data.scale={d.scale:g}), train.checkpoint={str(t.checkpoint).lower()}. Try, in this order: "
            f"train.precision=fp16; train.batch={max(1, t.batch // 2)} train.accumulate={2 * t.accumulate}, the same "
            f"training with half the images at a time; train.checkpoint=true; data.crop={d.crop // 2}. ({error})"
        ) from error


def _ignore_sigterm(_: int) -> None:
    """In a loader worker: a SIGTERM to the whole process group leaves the trainer its workers until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit: the workers ignore the SIGTERM that multiprocessing would send them and then wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class _Sigterm:
    """Context in which SIGTERM only asks; the call after each step says whether to end, on all processes alike."""

    def __enter__(self) -> "_Sigterm":
        self.told, self.asked = False, None
        self.before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _tell(self, *_: object) -> None:
        self.told = True

    def __call__(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes == 1:
            return self.told
        # What all said after the step before: reading it now does not wait for the step that has just been queued.
        before = self.asked
        self.asked = accelerator.reduce(torch.tensor(float(self.told), device=accelerator.device), "sum")
        return before is not None and bool(before > 0)


if __name__ == "__main__":
    from nucsam.cli import run as run_command

    sys.exit(run_command(["train", *sys.argv[1:]]))
