"""Any image, any size -> label map: cut into overlapping tiles, stitched as dense maps."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nucsam.config import Config, Instances
from nucsam.errors import UserError
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import load_base
from nucsam.predict.devices import autocast_dtype, find_device
from nucsam.predict.tiles import Area, Key, Tiles, Window, own_nuclei, windows, windows_in
from nucsam.run import checkpoint
from nucsam.run.learning import advice

CORE = 1024  # px: longest side of a window's core
MARGIN = 128  # px: farthest that a nucleus reaches from its centroid
SHARE = 32  # neighbours share one 32nd of a tile's side, if nothing else is asked for
RATIO = 8.0  # most that an image's magnification may differ from that of the training


@dataclass(eq=False)
class Predictor:
    """Runs a model over whole images.

    Lengths are px of the images trained on. For an image of another magnification they follow its
    microns per px.

    Args:
        model: on its device, in eval mode.
        scale: model px per image px, as in training.
        instances: thresholds of the extraction of nuclei.
        mpp: microns per px of the images trained on; None = not known.
        tile: longest side of a tile, px; a smaller image is one tile.
        overlap: what neighbouring tiles share, px.
        batch: tiles of one size that go through the model together.
        autocast: dtype of the forward pass; None = the model's own.
        tta: average the maps over the eight flips and quarter turns.
        trained: what training it had, for the message that it finds nothing.
        ratio: px of any image per px of those trained on, whatever its mpp; None = by mpp.
        core: longest side of a window's core, px; see `predict.tiles`.
        margin: px around a core.
    """

    model: Nucsam
    _: KW_ONLY
    scale: float
    instances: Instances
    mpp: float | None = None
    tile: int = 512
    overlap: int = 16
    batch: int = 4
    autocast: torch.dtype | None = None
    tta: bool = False
    trained: str = ""
    ratio: float | None = None
    core: int = CORE
    margin: int = MARGIN

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.tiles_done = 0

    def predict(self, image: np.ndarray, *, mpp: float | None = None) -> np.ndarray:
        """Predict one image.

        Args:
            image: uint8 (H, W, 3).
            mpp: microns per px of the image; used where those trained on are known too.

        Returns:
            A label map int32 (H, W), 0 = background, ids 1, 2, ...

        Raises:
            UserError: another type or shape, or a magnification more than `RATIO` times off.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"image: found {image.dtype} of shape {image.shape}, expected uint8 (H, W, 3)"
            )
        return next(self.predict_many([image], [mpp]))

    def predict_many(
        self, images: Iterable[np.ndarray], mpps: Iterable[float | None] = repeat(None)
    ) -> Iterator[np.ndarray]:
        """Label maps of images, in order, as of `predict`.

        Nuclei are extracted while the next tiles are on the device.

        Args:
            images: uint8 (H, W, 3) each.
            mpps: microns per px of each.
        """
        grids = (self.grid(image, mpp=mpp) for image, mpp in zip(images, mpps))
        results = self.extract(grids)
        for tiles, parts in groupby(results, key=lambda result: result[0]):
            whole = np.zeros(tiles.size, np.int32)
            count = 0
            for _, window, label in parts:
                place = whole[window.outer]
                free = (label > 0) & (place == 0)
                place[free] = label[free] + count
                count += int(label.max())
            yield whole

    def grid(self, image: Any, *, mpp: float | None = None, area: Area | None = None) -> Tiles:
        """The tiles and windows of an image.

        Args:
            image: uint8 (H, W, 3), or what slices like it.
            mpp: microns per px of the image; None = not known.
            area: where to predict; None = everywhere.

        Raises:
            UserError: a magnification more than `RATIO` times off.
        """
        ratio = self.ratio or (self.mpp / mpp if mpp and self.mpp else 1.0)
        if not 1 / RATIO <= ratio <= RATIO:
            raise UserError(
                f"mpp, scale: found {ratio:g} times the magnification trained on, expected "
                f"{1 / RATIO:g} to {RATIO:g} times"
            )
        tile, overlap, core, margin = (
            max(1, round(px * ratio)) if px else 0
            for px in (self.tile, self.overlap, self.core, self.margin)
        )
        places = windows(image.shape[:2], core, margin)
        if area is not None:
            places = windows_in(places, area, margin)
        tiles = Tiles(image, scale=self.scale / ratio, tile=tile, overlap=overlap, windows=places)
        tiles.area = area
        return tiles

    def extract(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, Window, np.ndarray]]:
        """The nuclei of each window of images, in order.

        An image that cannot be read to its end lacks windows, and its tiles' `failed` says why.

        Returns:
            Tiles, window, and label map int32 of the window's outer place, its own nuclei alone.
        """
        threads = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            extracting: deque[Future] = deque()
            for window in self._dense(images):
                extracting.append(pool.submit(self._instances, *window))
                while len(extracting) > threads + 1 or (extracting and extracting[0].done()):
                    yield extracting.popleft().result()
            while extracting:
                yield extracting.popleft().result()

    def _instances(
        self, tiles: Tiles, window: Window, maps: np.ndarray
    ) -> tuple[Tiles, Window, np.ndarray]:
        area = round(self.instances.area * (self.scale / tiles.scale) ** 2)
        label = self.model.instances(maps, replace(self.instances, area=area))
        return tiles, window, own_nuclei(label, window, tiles.area)

    def _dense(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, Window, np.ndarray]]:
        """Tiles, window and dense maps (C, h, w) of its outer place, in order.

        A batch may hold tiles of several images, of one scale and size.
        """
        waiting: deque[tuple[Tiles, int]] = deque()
        group: list[tuple[Tiles, Key, np.ndarray]] = []
        kind_of_group = None
        for tiles in images:
            for k in range(len(tiles.windows)):
                for key, tile in tiles.ask(k):
                    kind = tiles.scale, tile.shape
                    if group and (len(group) == self.batch or kind != kind_of_group):
                        self._run(group)
                        group = []
                    kind_of_group = kind
                    group.append((tiles, key, tile))
                if tiles.failed:
                    break
                waiting.append((tiles, k))
                yield from _stitched(waiting)
        if group:
            self._run(group)
        yield from _stitched(waiting)

    def _run(self, group: list[tuple[Tiles, Key, np.ndarray]]) -> None:
        """Run the model on a batch of tiles, and give each tile its maps."""
        pixels = torch.from_numpy(np.stack([tile for *_, tile in group])).to(self.device)
        images = pixels.permute(0, 3, 1, 2).float()
        size, sides = group[0][0].sides, group[0][0].model_sides
        if sides != size:
            images = F.interpolate(images, size=sides, mode="bilinear")
        forward = self._averaged if self.tta else self.model
        cast = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad(), cast:
            maps = forward(images, size).float().cpu().numpy()
        self.tiles_done += len(group)
        for (tiles, key, _), maps_of_tile in zip(group, maps):
            tiles.add(key, maps_of_tile.copy())  # a view would keep the whole batch

    def _averaged(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The mean over the eight flips and quarter turns: no map has a direction."""
        total = 0.0
        for turns in range(4):
            for flips in ([], [3]):
                turned = images.flip(flips).rot90(turns, (2, 3)).contiguous()
                maps = self.model(turned, size[::-1] if turns % 2 else size).float()
                total = total + maps.rot90(-turns, (2, 3)).flip(flips)
        return total / 8


def _stitched(waiting: deque[tuple[Tiles, int]]) -> Iterator[tuple[Tiles, Window, np.ndarray]]:
    """Remove the first windows from the queue, as long as their maps are there, and stitch them."""
    while waiting and waiting[0][0].ready(waiting[0][1]):
        tiles, k = waiting.popleft()
        yield tiles, tiles.windows[k], tiles.maps(k)


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
    """Load a model. On a GPU it runs in the precision of its training, on a CPU in bf16 or fp32.

    Args:
        path: a run directory, or a safetensors file of `nucsam export`.
        device: auto, cpu, cuda or cuda:N.
        scale: model px per image px of any image; None = as trained, by microns per px.
        tile: longest side of a tile, px; None = a training crop.
        overlap: what neighbouring tiles share, px; None = one 32nd of a tile.
        batch: tiles at a time; None = as trained on a GPU, 1 on a CPU.
        tta: average the maps over the eight flips and quarter turns.

    Raises:
        UserError: a file is missing or damaged, an argument out of range, or no such device.
    """
    where = find_device(device)
    model, config, metadata = open_model(Path(path))
    tile = max(config.data.crop, 256) if tile is None else tile
    overlap = tile // SHARE if overlap is None else overlap
    if batch is None:
        batch = 1 if where.type == "cpu" else config.train.batch
    for name, value, valid, expected in (
        ("scale", scale, scale is None or scale > 0, "a positive number"),
        ("tile", tile, tile >= 64, "at least 64 px"),
        ("overlap", overlap, 0 <= overlap <= tile // 2, f"0 to half a tile, {tile // 2} px"),
        ("batch", batch, batch >= 1, "at least 1"),
    ):
        if not valid:
            raise UserError(f"{name}: found {value:g}, expected {expected}")
    return Predictor(
        model.fold().to(where),
        scale=config.data.scale,
        instances=config.instances,
        mpp=metadata.get("mpp"),
        tile=tile,
        overlap=overlap,
        batch=batch,
        autocast=autocast_dtype(metadata.get("precision"), where),
        tta=tta,
        trained=_training(config, metadata),
        ratio=config.data.scale / scale if scale else None,
    )


def _training(config: Config, metadata: dict[str, Any]) -> str:
    """How long a model was trained, from the metadata of its file; "" where it does not say."""
    match metadata.get("selected"):
        case {"epoch": int(epoch), "step": int(step)}:
            return advice(config, epoch, step)
    return ""


def open_model(path: Path) -> tuple[Nucsam, Config, dict[str, Any]]:
    """The model of a run directory or of an export, in eval mode.

    Returns:
        The model, its configuration, and the metadata of its file.

    Raises:
        UserError: no such file, or one that holds no model to predict with.
    """
    if path.is_dir():
        model, config, _, metadata = checkpoint.open_run(path)
        return model, config, metadata
    if not path.is_file() or path.suffix != ".safetensors":
        found = f"a {path.suffix or 'nameless'} file" if path.is_file() else "no such file"
        expected = "a run directory or a safetensors file of nucsam export"
        raise UserError(f"{path}: found {found}, expected {expected}")
    _, metadata = checkpoint.read_tensors(path)
    if metadata.get("kind") != "merged":
        raise UserError(
            f"{path}: found a file of kind {metadata.get('kind')!r}, expected 'merged'; nucsam "
            "export merges an adapter with its base"
        )
    base = load_base(path)
    config = checkpoint.check_metadata(path, metadata)
    if config.model.head == "instance" and not base.extra:
        raise UserError(f"{path}: found no tensor of the head, expected a whole export")
    model = build_model(replace(config.model, train="head"), base, seed=0)
    return model.eval(), config, metadata
