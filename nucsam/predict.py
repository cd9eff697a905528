"""Any image, any size -> label map: scaled, padded, cut into overlapping tiles, stitched as dense maps.

`accelerate launch -m nucsam.predict MODEL PATHS... --out DIR` is `nucsam predict` by several processes.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env

from nucsam import checkpoint
from nucsam.base import load_base
from nucsam.config import Config, Instances
from nucsam.model import Nucsam, build
from nucsam.tiles import Key, Tiles, Window, own, windows

CORE, MARGIN = 1024, 128  # of a window, px at the trained magnification; a nucleus is up to MARGIN from its centroid
SHARE = 32  # part of a tile's side that neighbours share, if not given
RATIO = 8.0  # most that an image may be magnified or shrunk against those trained on


class Predictor:
    """Runs a model over whole images.

    All px below are those of the images trained on; of an image of another magnification they follow `mpp`.

    Args:
        scale: model px per image px, as in training.
        mpp: microns per px of the images trained on; None = not known.
        tile, overlap: side of a tile and what neighbours share, px; an image up to a tile is one tile.
        batch: tiles of one size that go through the model together.
        autocast: dtype of the forward pass on a GPU or CPU; None = the model's own.
        tta: the mean of the maps over the eight flips and quarter turns.
        ratio: px of any image to one px of those trained on, whatever its mpp; None = by mpp.
        core, margin: of the windows in which nuclei are extracted, px; see `nucsam.tiles`.
    """

    def __init__(
        self,
        model: Nucsam,
        *,
        scale: float,
        instances: Instances,
        mpp: float | None = None,
        tile: int = 512,
        overlap: int = 16,
        batch: int = 4,
        autocast: torch.dtype | None = None,
        tta: bool = False,
        ratio: float | None = None,
        core: int = CORE,
        margin: int = MARGIN,
    ) -> None:
        self.model, self.scale, self.instances, self.mpp = model, scale, instances, mpp
        self.tile, self.overlap, self.batch = tile, overlap, batch
        self.core, self.margin, self.tta, self.ratio = core, margin, tta, ratio
        self.device = next(model.parameters()).device
        self.autocast = autocast
        self.tiles_done = 0

    def predict(self, image: np.ndarray, *, mpp: float | None = None) -> np.ndarray:
        """Image uint8 (H, W, 3) -> label map int32 (H, W), 0 = background, ids 1, 2, ...

        mpp: microns per px of the image; where those trained on are known too, it is scaled to their magnification.
        ValueError on another type or shape, or a magnification more than RATIO times off.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image: found {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)")
        return next(self.predict_many([image], mpp=mpp))

    def predict_many(self, images: Iterable[np.ndarray], *, mpp: float | None = None) -> Iterator[np.ndarray]:
        """Label maps of images, in order; instances are extracted while the next tiles are on the device."""
        for tiles, parts in groupby(self.extract(self.grid(image, mpp=mpp) for image in images), key=lambda p: p[0]):
            if len(tiles.windows) == 1:
                yield next(parts)[-1]
                continue
            whole, count = np.zeros(tiles.size, np.int32), 0
            for _, window, label in parts:
                place = whole[window.outer]
                free = (label > 0) & (place == 0)
                place[free] = label[free] + count
                count += int(label.max())
            yield whole

    def maps(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Dense maps float32 (C, H, W) of images, in order."""
        for _, _, maps in self._dense(self.grid(image, core=2**31) for image in images):
            yield maps

    def grid(
        self, image: Any, *, mpp: float | None = None, part: slice = slice(None), core: int | None = None
    ) -> Tiles:
        """The tiles of an image and its windows, or a part of them; an image is an array or what is sliced like one.

        ValueError where its magnification is more than RATIO times off that trained on.
        """
        ratio = self.ratio or (self.mpp / mpp if mpp and self.mpp else 1.0)
        if not 1 / RATIO <= ratio <= RATIO:
            raise ValueError(
                f"found {ratio:g} times the magnification trained on (by microns per px or --scale), expected "
                f"{1 / RATIO:g} to {RATIO:g} times"
            )
        tile, overlap, core, margin = (
            max(1, round(px * ratio)) if px else 0 for px in (self.tile, self.overlap, core or self.core, self.margin)
        )
        of = windows(image.shape[:2], core, margin)[part]
        return Tiles(image, scale=self.scale / ratio, tile=tile, overlap=overlap, windows=of)

    def extract(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, Window, np.ndarray]]:
        """(Tiles, window, label map int32 of its outer place with its own nuclei) of all windows of images, in order.

        An image that cannot be read to its end misses windows, and its tiles' `failed` says why.
        """
        threads = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            extracting: deque[Future] = deque()
            for job in self._dense(images):
                extracting.append(pool.submit(self._instances, *job))
                while len(extracting) > threads + 1 or (extracting and extracting[0].done()):
                    yield extracting.popleft().result()
            while extracting:
                yield extracting.popleft().result()

    def _instances(self, tiles: Tiles, window: Window, maps: np.ndarray) -> tuple[Tiles, Window, np.ndarray]:
        area = round(self.instances.area * (self.scale / tiles.scale) ** 2)
        return tiles, window, own(self.model.instances(maps, replace(self.instances, area=area)), window)

    def _dense(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, Window, np.ndarray]]:
        """(Tiles, window, dense maps of its outer place), in order; a batch may hold tiles of several images."""
        waiting: deque[tuple[Tiles, int]] = deque()
        group: list[tuple[Tiles, Key, np.ndarray]] = []
        for tiles in images:
            for k in range(len(tiles.windows)):
                for key, tile in tiles.ask(k):
                    if group and (
                        len(group) == self.batch or (group[0][0].scale, group[0][-1].shape) != (tiles.scale, tile.shape)
                    ):
                        self._run(group)
                        group = []
                    group.append((tiles, key, tile))
                if tiles.failed:
                    break
                waiting.append((tiles, k))
                while waiting and waiting[0][0].ready(waiting[0][1]):
                    yield self._ready(*waiting.popleft())
        if group:
            self._run(group)
        while waiting:
            yield self._ready(*waiting.popleft())

    def _ready(self, tiles: Tiles, k: int) -> tuple[Tiles, Window, np.ndarray]:
        return tiles, tiles.windows[k], tiles.maps(k)

    def _run(self, group: list[tuple[Tiles, Key, np.ndarray]]) -> None:
        pixels = torch.from_numpy(np.stack([tile for *_, tile in group])).to(self.device)
        size, sides = group[0][0].sides, group[0][0].model_sides
        images = pixels.permute(0, 3, 1, 2).float()
        if sides != size:
            images = F.interpolate(images, size=sides, mode="bilinear")
        with torch.no_grad(), self._autocast():
            maps = (self._turned if self.tta else self.model)(images, size).float().cpu().numpy()
        self.tiles_done += len(group)
        for (tiles, key, _), of_tile in zip(group, maps):
            tiles.add(key, of_tile.copy())  # a view would keep the whole batch

    def _turned(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The mean over the eight flips and quarter turns: no map has a direction."""
        total = 0.0
        for turns in range(4):
            for flips in ([], [3]):
                turned = images.flip(flips).rot90(turns, (2, 3)).contiguous()
                maps = self.model(turned, size[::-1] if turns % 2 else size).float()
                total = total + maps.rot90(-turns, (2, 3)).flip(flips)
        return total / 8

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()


# ---- from a file ----


def load(
    path: str | Path,
    *,
    device: str = "auto",
    scale: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch: int | None = None,
    tta: bool = False,
) -> Predictor:
    """The predictor of a run directory, or of a safetensors file of `nucsam export`.

    device: auto, cpu, cuda or cuda:N. scale: model px per image px whatever the magnification, instead of the trained
    one. tile, overlap, batch, tta: as of `Predictor`; a tile is a training crop if not given, and one 32nd of it is
    shared. On a GPU the model runs in the precision that it was trained in, on a CPU in bf16 or fp32.
    ValueError where a file is missing or damaged, an option is out of range, or there is no such device.
    """
    where = find_device(device)
    net, config, metadata = open_model(Path(path))
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(metadata.get("precision", "no"))
    tile = tile if tile is not None else max(config.data.crop, 256)
    options = {
        "tile": tile,
        "overlap": overlap if overlap is not None else tile // SHARE,
        "batch": batch if batch is not None else config.train.batch if where.type == "cuda" else 1,
        "ratio": config.data.scale / scale if scale else None,
    }
    _check(options, scale)
    return Predictor(
        net.fold().to(where),
        scale=config.data.scale,
        mpp=metadata.get("mpp"),
        instances=config.instances,
        autocast=None if where.type == "cpu" and precision == torch.float16 else precision,
        tta=tta,
        **options,
    )


def _check(options: dict[str, Any], scale: float | None) -> None:
    tile, overlap = options["tile"], options["overlap"]
    for name, value, holds, expected in (
        ("--scale", scale, scale is None or scale > 0, "a positive number"),
        ("--tile", tile, tile >= 64, "at least 64 px"),
        ("--overlap", overlap, 0 <= overlap <= tile // 2, f"0 to half a tile, {tile // 2} px"),
        ("--batch", options["batch"], options["batch"] >= 1, "at least 1"),
    ):
        if not holds:
            raise ValueError(f"{name}: found {value:g}, expected {expected}")


def uses_gpu() -> bool:
    """Whether to run on a GPU: there is one, and the launcher was not told to use the CPU."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def find_device(name: str) -> torch.device:
    """The device of auto, cpu, cuda or cuda:N; of several launched processes each its own GPU. ValueError if absent."""
    gpus = torch.cuda.device_count()
    kind, _, index = (("cuda" if uses_gpu() else "cpu") if name == "auto" else name).partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"--device: found {name!r}, expected auto, cpu, cuda or cuda:N")
    if index and processes() > 1:
        raise ValueError(f"--device: found {name!r} for {processes()} processes, expected auto, cpu or cuda")
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or os.environ.get("LOCAL_RANK", 0))
    if number >= gpus:
        raise ValueError(f"--device: found {name!r}, but PyTorch sees {gpus} GPU(s), so no cuda:{number}; expected cpu")
    return torch.device("cuda", number)


def processes() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_joined(joined: int) -> None:
    """ValueError where Accelerate joined others than the processes that the launcher started."""
    if processes() != joined:
        raise ValueError(
            f"WORLD_SIZE: the launcher started {processes()} processes, Accelerate joined {joined}, so each would run "
            "alone; on CPUs set ACCELERATE_USE_CPU=true or use launch/cpu2.yaml"
        )


def open_model(path: Path) -> tuple[Nucsam, Config, dict[str, Any]]:
    """The model of a run directory or of an export, in eval mode, with its configuration and metadata."""
    if path.is_dir():
        net, config, _, metadata = checkpoint.open_run(path)
        return net, config, metadata
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected a run directory or a safetensors file of nucsam export")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: found a {path.suffix or 'nameless'} file, expected .safetensors or a run directory")
    _, metadata = checkpoint.read_tensors(path)
    if metadata.get("kind") != "merged":
        raise ValueError(
            f"{path}: found a file of kind {metadata.get('kind')!r}, expected 'merged'; an adapter is merged with its "
            "base by nucsam export first"
        )
    base = load_base(path)
    config = Config.from_dict(metadata["config"], f"{path}: configuration")
    return build(replace(config.model, train="head"), base, seed=0).eval(), config, metadata


if __name__ == "__main__":
    from nucsam.cli import run as run_command

    sys.exit(run_command(["predict", *sys.argv[1:]]))
