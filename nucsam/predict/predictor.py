"""Any image, any size -> label map: cut into overlapping tiles, stitched as dense maps.

Loads no torch. What runs a model on a batch of tiles is in `pytorch.py` and `onnx.py`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image
from PIL.ImageOps import exif_transpose

from nucsam.config import Config, Instances
from nucsam.data import geojson
from nucsam.data.images import check_mpp, read_image, read_mpp
from nucsam.data.labels import median_area
from nucsam.data.samples import by_nuclei
from nucsam.data.slides import Windows
from nucsam.errors import UserError
from nucsam.files import expanded
from nucsam.model.instances import Nuclei, lenient, with_confidence
from nucsam.predict.measure import measure
from nucsam.predict.threads import in_threads
from nucsam.predict.tiles import Area, Key, Tiles, Window, own_nuclei, windows, windows_in
from nucsam.predict.tissue import Tissue

Parts = list[tuple[Key, np.ndarray]]  # tiles with their maps
Group = list[tuple[Tiles, Key, np.ndarray]]  # a batch: tiles with pixels or maps
Read = tuple[Tiles, int, Key | None, np.ndarray | None]  # a tile with its pixels; see `_planned`
Picture = np.ndarray | str | Path | Image  # what `predict` takes

CORE = 1024  # px: longest side of a window's core
MARGIN = 128  # px: farthest that a nucleus reaches from its centroid
READERS = 2  # threads that read tiles
RATIO = 8.0  # most that an image's magnification may differ from that of the training
MODES = ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV")  # of Pillow images that become RGB
LOOKS = 4  # windows of the first look at an image, which tells how large its nuclei are


@dataclass(eq=False)
class Predictor:
    """Runs a model over whole images. `nucsam.load` makes one:

        model = nucsam.load("model.safetensors")
        label = model.predict(image)  # uint8 (H, W, 3) -> int32 (H, W), 0 = background

    Several threads may use one predictor. Lengths are px of the images trained on. For an image of
    another magnification they follow its microns per px, or the size of its nuclei.

    Args:
        scale: model px per image px, as in training.
        instances: thresholds of the extraction of nuclei.
        tile: longest side of a tile, px; a smaller image is one tile.
        overlap: what neighbouring tiles share, px.
        mpp: microns per px of the images trained on; None = not known.
        nucleus_area: median area of the nuclei trained on, px. An image is predicted twice, the
            second time at the magnification at which its nuclei have that area; 0 = once.
        batch: tiles of one size that go through the model together.
        tta: average the maps over the eight flips and quarter turns.
        adapt: share of a tile's own statistics in the head's norms, as the model already has it.
        certainty: usual certainty of the nuclei of a window. Below it the thresholds fall; see
            `nucsam.model.instances.lenient`. 0 = they stay.
        trained: how it was trained, for the message when it finds nothing.
        ratio: px of any image per px of those trained on, whatever its mpp; None = by mpp.
        core: longest side of a window's core, px; see `predict.tiles`.
        margin: px around a core.
        sha256: of the model, which tells it from others.
    """

    _: KW_ONLY
    scale: float
    instances: Instances
    tile: int
    overlap: int
    mpp: float | None = None
    nucleus_area: float = 0.0
    batch: int = 4
    tta: bool = False
    adapt: float = 0.0
    certainty: float = 0.0
    trained: str = ""
    ratio: float | None = None
    core: int = CORE
    margin: int = MARGIN
    sha256: str = ""

    lanes: ClassVar[int] = 1  # batches that are on the device together
    out_of_memory: ClassVar[type[Exception]] = MemoryError  # what `maps` raises then

    def __post_init__(self) -> None:
        self.tiles_done = 0

    def maps(self, pixels: np.ndarray, sides: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """Run the model on a batch of tiles.

        Args:
            pixels: uint8 (B, h, w, 3).
            sides: rows and columns of the model's input, model px.
            size: rows and columns of the maps.

        Returns:
            Probabilities float32 or float16 (B, C, *size).
        """
        raise NotImplementedError

    def nuclei(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Probabilities float32 (C, H, W), foreground first -> label map int32 (H, W)."""
        raise NotImplementedError

    def predict(self, image: Picture, *, mpp: float | None = None) -> np.ndarray:
        """Predict one image.

        Args:
            image: uint8 (H, W, 3), an image file, or a Pillow image of 8 bits a channel; an
                orientation tag of either turns it.
            mpp: microns per px of the image, by default what its file says; used where those
                trained on are known too.

        Returns:
            A label map int32 (H, W), 0 = background, ids 1, 2, ...

        Raises:
            UserError: another type or shape, a file that cannot be read, no mpp of a microscope, or
                a magnification more than `RATIO` times off.
        """
        return next(self.predict_many([image], [mpp]))

    def predict_nuclei(self, image: Picture, *, mpp: float | None = None) -> dict[str, Any]:
        """Predict one image as a table of its nuclei.

        Args and errors as in `predict`.

        Returns:
            Columns with one row per nucleus: those of `measure`, and confidence, 0..1, the mean
            foreground probability, all (n,); and outline, a list of GeoJSON geometries, px.
        """
        pixels, mpp = _opened(image, mpp)
        nuclei = next(self.nuclei_many([pixels], [mpp]))
        columns = measure(nuclei.label, pixels, mpp, confidence=nuclei.confidence)
        return columns | {"outline": list(geojson.geometries(nuclei.label))}

    def predict_many(
        self, images: Iterable[Picture], mpps: Iterable[float | None] = repeat(None)
    ) -> Iterator[np.ndarray]:
        """Label maps of images, in order. Args and errors as in `nuclei_many`."""
        return (nuclei.label for nuclei in self.nuclei_many(images, mpps))

    def nuclei_many(
        self, images: Iterable[Picture], mpps: Iterable[float | None] = repeat(None)
    ) -> Iterator[Nuclei]:
        """The nuclei of images, in order.

        Nuclei are extracted while the next tiles are on the device.

        Args:
            images: as in `predict`, or `Windows` of large ones.
            mpps: microns per px of each, as in `predict`.

        Raises:
            UserError: as in `predict`, or fewer numbers than images.
        """
        grids = (self.grid(image, mpp=mpp) for image, mpp in _all_opened(images, mpps))
        results = self.extract(grids)
        for tiles, parts in groupby(results, key=lambda result: result[0]):
            whole = np.zeros(tiles.size, np.int32)
            confidences = [np.zeros(0)]
            count = 0
            for _, window, (label, confidence) in parts:
                place = whole[window.outer]
                free = (label > 0) & (place == 0)
                place[free] = label[free] + count
                confidences.append(confidence)
                count += len(confidence)
            nuclei = Nuclei(whole, np.concatenate(confidences))
            yield _without_hidden(nuclei) if len(tiles.windows) > 1 else nuclei

    def grid(
        self,
        image: Any,
        *,
        mpp: float | None = None,
        area: Area | None = None,
        tissue: Tissue | None = None,
    ) -> Tiles:
        """The tiles and windows of an image.

        Args:
            image: uint8 (H, W, 3), or what slices like it.
            mpp: microns per px of the image; None = not known.
            area: where to predict; None = everywhere.
            tissue: where the image shows tissue; None = everywhere.

        Raises:
            UserError: a magnification more than `RATIO` times off.
        """
        ratio = self.ratio or (self.mpp / mpp if mpp and self.mpp else 1.0)
        check_ratio(ratio)
        if self.nucleus_area:
            ratio = self._by_nuclei(self._grid(image, ratio, area, tissue, most=LOOKS), ratio)
        return self._grid(image, ratio, area, tissue)

    def _grid(
        self,
        image: Any,
        ratio: float,
        area: Area | None,
        tissue: Tissue | None,
        most: int | None = None,
    ) -> Tiles:
        """`grid` of an image of `ratio` px per px trained on, with at most `most` windows."""
        tile, overlap, core, margin = (
            max(1, round(px * ratio)) if px else 0
            for px in (self.tile, self.overlap, self.core, self.margin)
        )
        # A nucleus grows with the ratio; a window that did so would take ratio² of the memory.
        core = min(core, max(self.core, 4 * margin))
        places = windows(image.shape[:2], core, margin)
        if area is not None:
            places = windows_in(places, area, margin)
        if tissue is not None:
            places = [window for window in places if tissue.meets(window.core)] or places[:1]
        if most and places:
            places = places[:: math.ceil(len(places) / most)]
        return Tiles(image, self.scale / ratio, tile, overlap, places, tissue, area)

    def _by_nuclei(self, tiles: Tiles, ratio: float) -> float:
        """The ratio at which the nuclei of an image have `nucleus_area`, within `RATIO`.

        Args:
            tiles: some windows of the image at `ratio`.
            ratio: px of the image per px of those trained on, as far as is known.

        Raises:
            UserError or OSError: the image cannot be read.
        """
        area = median_area([nuclei.label for *_, nuclei in self.extract([tiles])])
        if tiles.failed:
            raise tiles.failed
        ratio *= by_nuclei(area / ratio**2, self.nucleus_area)
        return min(max(ratio, 1 / RATIO), RATIO)

    def extract(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, Window, Nuclei]]:
        """The nuclei of each window of images, in order.

        An image that cannot be read to its end lacks windows, and its tiles' `failed` says why.

        Returns:
            Tiles, window, and the window's own nuclei in its outer place.
        """
        return in_threads(self._instances, self._stream(images))

    def _instances(self, tiles: Tiles, k: int, parts: Parts) -> tuple[Tiles, Window, Nuclei]:
        """Stitch window k, and extract its own nuclei."""
        window = tiles.windows[k]
        if not parts:  # glass
            shape = [place.stop - place.start for place in window.outer]
            return tiles, window, Nuclei(np.zeros(shape, np.int32), np.zeros(0))
        area = round(self.instances.area * (self.scale / tiles.scale) ** 2)
        thresholds = replace(self.instances, area=area)
        maps = tiles.stitch(k, parts)
        label = self.nuclei(maps, thresholds)
        if self.certainty:
            certainty = with_confidence(label, maps[0]).certainty
            if certainty and certainty < self.certainty:
                label = self.nuclei(maps, lenient(thresholds, certainty, self.certainty))
        return tiles, window, with_confidence(own_nuclei(label, window, tiles.area), maps[0])

    def _stream(self, images: Iterable[Tiles]) -> Iterator[tuple[Tiles, int, Parts]]:
        """Tiles, number of the window, and what `Tiles.take` gives for it, in order.

        Other threads read the next tiles, and run the model on a batch or two.
        """
        waiting: deque[tuple[Tiles, int]] = deque()
        tiles_read = in_threads(_read, _planned(images), READERS)
        for group in in_threads(self._run, self._groups(tiles_read, waiting), self.lanes):
            self.tiles_done += len(group)
            for tiles, key, maps in group:
                tiles.add(key, maps)
            yield from _taken(waiting)
        yield from _taken(waiting)

    def _groups(self, tiles_read: Iterable[Read], waiting: deque) -> Iterator[tuple[Group]]:
        """Batches of tiles of one scale and size, which may be of several images.

        A tile of a coarser level of a slide has other pixels for the same px of the image.

        A window whose tiles have all been read joins `waiting`.
        """
        group: Group = []
        kind_of_group = None
        for tiles, k, key, pixels in tiles_read:
            if key is None:
                if not tiles.failed:
                    waiting.append((tiles, k))
                continue
            if pixels is None:
                tiles.add(key, None)
                continue
            kind = tiles.scale, tiles.sides, pixels.shape
            if group and (len(group) == self.batch or kind != kind_of_group):
                yield (group,)
                group = []
            kind_of_group = kind
            group.append((tiles, key, pixels))
        if group:
            yield (group,)

    def _run(self, group: Group) -> Group:
        """Run the model on a batch of tiles: each tile with its maps."""
        pixels = np.stack([tile for *_, tile in group])
        if self.lanes > 1:  # one shape of batch: a GPU's plans and graphs are made once
            pixels = np.pad(pixels, ((0, self.batch - len(group)), *[(0, 0)] * 3), mode="edge")
        forward = self._averaged if self.tta else self.maps
        maps = forward(pixels, group[0][0].model_sides, group[0][0].sides)
        # A view would keep the whole batch.
        return [(tiles, key, part.copy()) for (tiles, key, _), part in zip(group, maps)]

    def _averaged(
        self, pixels: np.ndarray, sides: tuple[int, int], size: tuple[int, int]
    ) -> np.ndarray:
        """The mean over the eight flips and quarter turns: no map has a direction."""
        total = np.zeros((), np.float32)
        for turns in range(4):
            along = -1 if turns % 2 else 1  # a quarter turn swaps rows and columns
            for flip in (1, -1):
                turned = np.rot90(pixels[:, :, ::flip], turns, (1, 2))
                maps = self.maps(np.ascontiguousarray(turned), sides[::along], size[::along])
                total = total + np.rot90(maps, -turns, (2, 3))[..., ::flip]
        return total / 8


def check_ratio(ratio: float) -> None:
    """Check the px of an image per px of those trained on.

    Raises:
        UserError: the magnification is more than `RATIO` times off.
    """
    if not 1 / RATIO <= ratio <= RATIO:
        found = f"found {ratio:g} times the magnification trained on"
        raise UserError(f"mpp, scale: {found}, expected {1 / RATIO:g} to {RATIO:g} times")


def _without_hidden(nuclei: Nuclei) -> Nuclei:
    """Nuclei without those that nuclei of other windows cover whole; ids 1, 2, ..."""
    label, confidence = nuclei
    seen = np.bincount(label.ravel(), minlength=len(confidence) + 1)[1:] > 0
    if seen.all():
        return nuclei
    return Nuclei(np.append(0, np.cumsum(seen)).astype(np.int32)[label], confidence[seen])


def _opened(image: Picture, mpp: float | None) -> tuple[np.ndarray, float | None]:
    """The pixels uint8 (H, W, 3) of an image, and its microns per px."""
    check_mpp(mpp)
    if isinstance(image, str | Path):
        image = expanded(image)
        return read_image(image), mpp or read_mpp(image)
    try:
        if isinstance(image, Image):
            image = exif_transpose(image)
            image = image.convert("RGB") if image.mode in MODES else image
        pixels = np.asarray(image)
    # a closed file; a tensor that needs a gradient, or is on a GPU
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        found = f"{type(image).__name__} ({error})"
        raise UserError(f"image: found {found}, expected uint8 (H, W, 3)") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise UserError(f"image: found {found}, expected uint8 (H, W, 3)")
    if isinstance(image, Image) and image.mode != "RGB":
        raise UserError(f"image: found a Pillow image of mode {image.mode}, expected RGB")
    return pixels, mpp


def _all_opened(
    images: Iterable[Picture], mpps: Iterable[float | None]
) -> Iterator[tuple[np.ndarray, float | None]]:
    if isinstance(images, str | Path | Image):
        raise UserError(f"images: found one {type(images).__name__}, expected a list of images")
    values = iter(mpps)
    for image in images:
        try:
            mpp = next(values)
        except StopIteration:
            raise UserError("mpps: found fewer than images, expected one for each") from None
        yield (image, mpp) if isinstance(image, Windows) else _opened(image, mpp)


def _planned(images: Iterable[Tiles]) -> Iterator[tuple[Tiles, int, Key | None]]:
    """The tiles of each window of images, and None where all of a window have been named."""
    for tiles in images:
        for k in range(len(tiles.windows)):
            for key in tiles.ask(k):
                yield tiles, k, key
            yield tiles, k, None
            if tiles.failed:
                break


def _read(tiles: Tiles, k: int, key: Key | None) -> Read:
    """An item of `_planned` with the tile's pixels."""
    return tiles, k, key, None if key is None or tiles.failed else tiles.read(key)


def _taken(waiting: deque[tuple[Tiles, int]]) -> Iterator[tuple[Tiles, int, Parts]]:
    """Remove the first windows from the queue, as long as their maps are there."""
    while waiting and waiting[0][0].ready(waiting[0][1]):
        tiles, k = waiting.popleft()
        yield tiles, k, tiles.take(k)


# What opens a model: the predictor without its options, its configuration and metadata, and whether
# it runs on a CPU.
Opened = tuple[Callable[..., Predictor], Config, dict[str, Any], bool]
