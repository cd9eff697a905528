"""Files of many images, or of a slide, shared by the launched processes: `nucsam predict`.

N processes deal out the images. Those left over where N does not divide their number they share by the window, if they
have several.
"""

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nucsam import __version__, images, outputs
from nucsam.atomic import write_text
from nucsam.base import state_sha256
from nucsam.config import read_json
from nucsam.data import visible
from nucsam.predict import Predictor, check_joined, load, processes
from nucsam.tiles import Tiles, Window


def predict_files(
    model: Path,
    paths: Sequence[Path],
    out: Path,
    *,
    formats: Sequence[str] = ("labels",),
    scale: float | None = None,
    mpp: float | None = None,
    device: str = "auto",
    tta: bool = False,
    force: bool = False,
    **options: int | None,
) -> int:
    """Predict images into files of `out` and return the exit status: 1 if an image failed, else 0.

    paths: image files, and folders of them. formats: of `outputs.FILES`. mpp: microns per px of all images, instead of
    what their TIFF tags say. force: predict also images that have all their files. Else as of `load`.
    ValueError, before anything is written, on what is wrong with more than one image.
    """
    odd = [name for name in formats if name not in outputs.FILES]
    if odd or not formats:
        raise ValueError(f"--formats: found {odd or 'none'}, expected {', '.join(outputs.FILES)}")
    if scale and mpp:
        raise ValueError("--scale, --mpp: found both, expected one")
    if mpp is not None and mpp <= 0:
        raise ValueError(f"--mpp: found {mpp:g}, expected a positive number")
    files = {path: outputs.files(out, path.stem, formats) for path in find_images(paths)}
    _check_files(files, out)
    predictor = load(model, device=device, scale=scale, tta=tta, **options)
    state = None
    if processes() > 1:  # one that is done waits for as long as a slide of another takes
        state = PartialState(cpu=predictor.device.type == "cpu", timeout=timedelta(days=7))
        check_joined(state.num_processes)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves no part of a file
    try:
        return Batch(predictor, files, mpp, state).run(_settings(model, predictor, mpp), out / "predict.json", force)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"out of device memory: lower --batch, then --tile ({error})") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        if state:
            torch.distributed.destroy_process_group()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files of files and folders (not of their subfolders), each once. ValueError on all that is none at once."""
    found: dict[Path, None] = {}
    problems = []
    for path in paths:
        inside = [p for p in visible(path) if p.suffix.lower() in images.IMAGES and p.is_file()]
        if path.is_dir() and not inside:
            problems.append(f"{path}: found no image, expected {', '.join(images.IMAGES)}")
        elif not path.is_dir() and not path.exists():
            problems.append(f"{path}: no such file or folder")
        elif not path.is_dir() and path.suffix.lower() not in images.IMAGES:
            problems.append(f"{path}: found {path.suffix or 'no'} suffix, expected {', '.join(images.IMAGES)}")
        found |= dict.fromkeys(inside if path.is_dir() else [path])
    if problems:
        raise ValueError("\n  ".join(problems))
    return list(found)


def _check_files(files: dict[Path, dict[str, Path]], out: Path) -> None:
    """ValueError where an output would overwrite an image, or those of another image."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, expected a folder")
    inputs = {path.resolve(): path for path in files}
    writer: dict[Path, Path] = {}
    problems = []
    for path, results in files.items():
        for file in results.values():
            if (image := inputs.get(file.resolve())) is not None:
                problems.append(f"{image}: would be overwritten by its own results; expected another --out")
            if (first := writer.setdefault(file, path)) is not path:
                problems.append(
                    f"{path}: found the stem of {first} again, expected one image a stem; use another --out"
                )
                break
    if problems:
        raise ValueError("\n  ".join(problems))
    if any(path.parent.resolve() == out.resolve() for path in files):
        raise ValueError(f"--out: found {out}, a folder of images to predict, expected another")


def _settings(model: Path, predictor: Predictor, mpp: float | None) -> dict[str, Any]:
    """What predict.json says of how the files beside it were made."""
    p = predictor
    return {
        "nucsam": __version__,
        "model": str(model),
        "weights_sha256": state_sha256(p.model.state_dict()),
        "scale": p.scale / (p.ratio or 1.0),
        "mpp_trained": p.mpp,
        "mpp": mpp,
        "tile": p.tile,
        "overlap": p.overlap,
        "tta": p.tta,
        "instances": asdict(p.instances),
    }


class Batch:
    """Images and their files, shared by the launched processes."""

    def __init__(
        self,
        predictor: Predictor,
        files: dict[Path, dict[str, Path]],
        mpp: float | None,
        state: PartialState | None,
    ) -> None:
        self.predictor, self.files, self.mpp, self.state = predictor, files, mpp, state
        self.rank, self.processes = (state.process_index, state.num_processes) if state else (0, 1)
        self.console = Console(stderr=True)
        self.failed: list[str] = []
        self.nuclei, self.told = 0, False

    def run(self, settings: dict[str, Any], record: Path, force: bool) -> int:
        plan: list[Any] = [None]
        if self.rank == 0:
            try:
                plan = [self._plan(settings, record, force)]
            except (ValueError, OSError) as error:
                plan = [error]
        if self.state:
            broadcast_object_list(plan)
        if isinstance(plan[0], Exception):
            raise plan[0]
        own, shared = plan[0]
        own, began = own[self.rank :: self.processes], time.monotonic()
        with self._bar(len(own) + len(shared)):
            self._predict_images(own)
            for path in shared:
                self._predict_shared(path)
        counts = [(self.nuclei, self.predictor.tiles_done, len(own) + len(shared) * (self.rank == 0), self.failed)]
        counts = gather_object(counts) if self.state else counts
        nuclei, tiles, total, failed = (sum(column, start) for column, start in zip(zip(*counts), (0, 0, 0, [])))
        if self.rank == 0:
            seconds = time.monotonic() - began
            self.console.print(
                f"{record.parent}: {total - len(failed)} image(s), {nuclei:,} nuclei, {tiles} tiles in {seconds:.1f} s"
                + (f"; {len(failed)} failed" if failed else ""),
                markup=False,
                soft_wrap=True,
            )
        if self.state:
            self.state.wait_for_everyone()
        return int(bool(failed))

    def _plan(self, settings: dict[str, Any], record: Path, force: bool) -> tuple[list[Path], list[Path]]:
        """The images to predict: those that each process has whole, dealt in turn, and those shared by windows."""
        todo = [path for path, own in self.files.items() if force or not all(file.is_file() for file in own.values())]
        made = read_json(record.read_bytes(), str(record)) if record.is_file() else settings
        changed = [
            f"{k}: {made.get(k)!r} -> {v!r}"
            for k, v in settings.items()
            if k not in ("nucsam", "model") and made.get(k) != v
        ]
        if changed and force:
            self._clear(record.parent)
        elif changed:
            raise ValueError(
                f"{record}: made otherwise than now wanted: {'; '.join(changed)}; expected another --out, or --force"
            )
        if skipped := len(self.files) - len(todo):
            self.console.print(
                f"{skipped} image(s) with results skipped; --force replaces them", markup=False, soft_wrap=True
            )
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=2) + "\n")
        whole = len(todo) // self.processes * self.processes
        shared = [path for path in todo[whole:] if self._several_windows(path)]
        return [path for path in todo if path not in shared], shared

    def _clear(self, out: Path) -> None:
        """Before another record: no result made otherwise may stay beside it, not even if this run is cut off."""
        own = {file.resolve() for files in self.files.values() for file in files.values()}
        there = [path for pattern in outputs.FILES.values() for path in out.glob(pattern.format("*"))]
        others = sorted(str(path) for path in there if path.resolve() not in own)
        if others:
            raise ValueError(
                f"{out}: found {len(others)} result(s) that --force would leave as they are, such as {others[0]}; "
                "expected their images and formats too, or another --out"
            )
        for path in there:
            path.unlink()

    def _several_windows(self, path: Path) -> bool:
        try:
            return len(self._open(path).windows) > 1
        except (ValueError, OSError):
            return False

    def _open(self, path: Path, part: slice = slice(None)) -> Tiles:
        image = images.open_image(path)
        if 0 in image.shape:
            raise ValueError(f"{path}: found no pixels")
        try:
            return self.predictor.grid(image, mpp=self._mpp(path), part=part)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _mpp(self, path: Path) -> float | None:
        """Microns per px of an image. Says once that they are not known, of an image or in training."""
        mpp, p = self.mpp or images.read_mpp(path), self.predictor
        if not self.told and self.rank == 0 and p.ratio is None and (mpp is None) != (p.mpp is None):
            text = f"{path} has no microns per px" if mpp is None else "the model was trained without microns per px"
            self.console.print(f"{text}: taken for the magnification trained on", markup=False, soft_wrap=True)
            self.told = True
        return mpp

    def _predict_images(self, paths: Sequence[Path]) -> None:
        opened: dict[Tiles, Path] = {}

        def tiles() -> Iterator[Tiles]:
            for path in paths:
                try:
                    of_image = self._open(path)
                except (ValueError, OSError) as error:
                    self._fail(path, error)
                    self._advance(1)
                    continue
                opened[of_image] = path
                yield of_image

        for of_image, found in groupby(_ahead(self.predictor.extract(tiles())), key=lambda item: item[0]):
            self._write(opened.pop(of_image), of_image, ((window, label) for _, window, label in found))
        for of_image, path in opened.items():  # not one window could be read
            self._fail(path, of_image.failed)

    def _predict_shared(self, path: Path) -> None:
        """Each process predicts a part of the windows into pieces, hidden beside the results; the main one merges."""
        pieces = next(iter(self.files[path].values())).with_name(f".{path.stem}.pieces")
        try:
            self._predict_pieces(path, pieces)
        except BaseException:
            shutil.rmtree(pieces, ignore_errors=True)
            raise
        if self.rank == 0:
            shutil.rmtree(pieces, ignore_errors=True)
        self.state.wait_for_everyone()

    def _predict_pieces(self, path: Path, pieces: Path) -> None:
        error, whole = None, None
        try:
            pieces.mkdir(parents=True, exist_ok=True)
            whole = self._open(path)
            edges = [len(whole.windows) * k // self.processes for k in range(self.processes + 1)]
            tiles = self._open(path, slice(*edges[self.rank : self.rank + 2]))
            for k, (_, _, label) in enumerate(_ahead(self.predictor.extract([tiles])), edges[self.rank]):
                np.savez_compressed(pieces / f"{k}.npz", label=label)
                self._advance(1 / len(tiles.windows))
            error = tiles.failed
        except (ValueError, OSError) as failed:
            error = failed
        errors = [text for text in gather_object([str(error) if error else ""]) if text]
        if self.rank == 0 and errors:
            self._fail(path, ValueError(errors[0]))
        elif self.rank == 0:
            merged = ((w, np.load(pieces / f"{k}.npz")["label"]) for k, w in enumerate(whole.windows))
            self._write(path, whole, merged, advance=0)

    def _write(self, path: Path, tiles: Tiles, found: Iterable[tuple[Window, np.ndarray]], advance: float = 1) -> None:
        def windows() -> Iterator[tuple[Window, np.ndarray]]:
            for window, label in found:
                yield window, label
                self._advance(advance / len(tiles.windows))
            if tiles.failed:
                raise tiles.failed

        try:
            self.nuclei += outputs.write(self.files[path], tiles.image, windows(), self._mpp(path))
        except (ValueError, OSError) as error:
            self._fail(path, error)

    def _fail(self, path: Path, error: Exception) -> None:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        self.failed.append(text)
        self.console.print(text, style="red", markup=False, soft_wrap=True)

    def _bar(self, total: int) -> Progress:
        columns = TextColumn("{task.fields[text]}"), BarColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=self.console, disable=self.rank > 0)
        self.began = time.monotonic()
        self.task = self.bar.add_task("", total=total, text=f"0/{total} images")
        return self.bar

    def _advance(self, images: float) -> None:
        self.bar.advance(self.task, images)
        task, seconds = self.bar.tasks[0], time.monotonic() - self.began
        speed = self.predictor.tiles_done / seconds
        self.bar.update(self.task, text=f"{int(task.completed + 1e-6)}/{task.total:.0f} images, {speed:.1f} tiles/s")


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items; the next one is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
