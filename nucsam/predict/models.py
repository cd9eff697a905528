"""Models to predict with, by name or path. Loads torch only for a model that needs it."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nucsam.config import Config
from nucsam.errors import UserError
from nucsam.model.bases import BASES
from nucsam.names import STARTER, STARTER_FILE, default_cache, find_model, hub_models
from nucsam.predict.onnx import open_graph
from nucsam.predict.predictor import Predictor, check_ratio
from nucsam.predict.tiles import usual_batch, usual_tiles
from nucsam.run.learning import advice
from nucsam.run.metadata import known_certainty


def load(
    path: str | Path,
    *,
    device: str = "auto",
    per_device: int = 1,
    scale: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    batch: int | None = None,
    tta: bool = False,
    adapt: float | None = None,
    auto_scale: bool | None = None,
    lenient: bool | None = None,
) -> Predictor:
    """Load a model.

        label = nucsam.load("starter").predict(image)

    On a GPU it runs in the precision of its training, or in fp16 where that is bf16 and the GPU is
    older than Ampere; on a CPU in bf16 if that is fast and was used in training, else in fp32. An
    ONNX file runs in fp32, by onnxruntime, and needs no torch. It gives the same nuclei as fp32 if
    32 / `data.scale` is a whole number; otherwise, or for another magnification than the
    training's, nearly the same, because tiles are resized differently.

    Batch: tiles of one size go through the model together. A larger batch changes no result beyond
    rounding; it is faster on a GPU, rarely on a CPU.

    Threads: the model takes as many as OMP_NUM_THREADS says, by default all cores. Up to 4 more
    extract nuclei. Several threads may use one model.

    Memory: that of the weights and of one batch. `predict` adds about 30 bytes a pixel of the
    image; `nucsam predict` reads windows of a large image, so its memory does not grow with it.

    Args:
        path: a run directory, a safetensors or ONNX file of `nucsam export`, or as text a name of
            `nucsam.names.find_model`: "starter" or hf:USER/NAME.
        device: auto, cpu, cuda, cuda:N or mps.
        per_device: launched processes that share a GPU.
        scale: model px per image px of any image; None = as trained, by microns per px.
        tile: longest side of a tile, px; None = a training crop, but at least 256.
        overlap: what neighbouring tiles share, px; None = a 16th of a tile.
        batch: tiles at a time; None = as trained on a GPU, 1 on a CPU.
        tta: average the maps over the eight flips and quarter turns.
        adapt: share, 0 to 1, of a tile's own statistics in the head's norms: for images of another
            laboratory, whose stain differs. None = `model.adapt` of its configuration. An ONNX file
            has the share with which it was exported.
        auto_scale: predict an image twice, the second time at the magnification that gives its
            nuclei the median area of those trained on; None = as trained (`data.nucleus_area`). At
            least 10 nuclei must be found, and the magnification changes by at most 3 times.
        lenient: lower the thresholds for images, or windows of large ones, that the model is less
            certain of than of the images that chose its epoch, as in another laboratory's stain.
            At least 10 nuclei must be found. None = `instances.lenient` of its configuration.

    Raises:
        UserError: a file is missing or damaged, an argument out of range, or no such device.
    """
    path, _ = find_model(path)
    if path.suffix == ".onnx":
        open_file = open_graph
    elif importlib.util.find_spec("torch") is None:
        expected = "expected an .onnx file of nucsam export"
        raise UserError(f"{path}: needs PyTorch, found none; {expected}")
    else:
        from nucsam.predict.pytorch import open_weights as open_file
    if per_device < 1:
        raise UserError(f"per_device: found {per_device}, expected at least 1")
    make, config, metadata, on_cpu = open_file(path, device, per_device, adapt)
    tile, overlap = usual_tiles(config.data.crop, tile, overlap)
    if batch is None:
        batch = usual_batch(config.train.batch, on_cpu=on_cpu)
    sizes = {"tile": tile, "overlap": overlap, "batch": batch}
    _check_numbers(scale, **sizes)
    ratio = config.data.scale / scale if scale else None
    if ratio:
        check_ratio(ratio)
    if lenient is not None:
        config = replace(config, instances=replace(config.instances, lenient=lenient))
    if auto_scale is None:
        auto_scale = config.data.nucleus_area > 0 and scale is None
    return make(
        scale=config.data.scale,
        instances=config.instances,
        mpp=metadata.get("mpp"),
        nucleus_area=_nucleus_area(path, config, metadata, scale) if auto_scale else 0.0,
        tta=tta,
        adapt=config.model.adapt,
        certainty=known_certainty(config, metadata),
        trained=_training(config, metadata) if path.is_dir() else "",
        ratio=ratio,
        **sizes,
    )


def _check_numbers(scale: float | None, tile: int, overlap: int, batch: int) -> None:
    for name, value, valid, expected in (
        ("scale", scale, scale is None or 0 < scale < math.inf, "a positive number"),
        ("tile", tile, tile >= 64, "at least 64 px"),
        ("overlap", overlap, 0 <= overlap <= tile // 2, f"0 to half a tile, {tile // 2} px"),
        ("batch", batch, batch >= 1 and batch == int(batch), "a whole number from 1"),
    ):
        if not valid:
            raise UserError(f"{name}: found {value:g}, expected {expected}")


def _nucleus_area(
    path: Path, config: Config, metadata: dict[str, Any], scale: float | None
) -> float:
    """Median area of the nuclei that a model was trained on, px."""
    if scale:
        raise UserError("scale, auto_scale: found both, expected one")
    area = config.data.nucleus_area or metadata.get("nucleus_area")
    if not area:
        found = f"{path} does not say how large the nuclei of its training were"
        raise UserError(f"auto_scale: {found}; expected scale, or a newer model")
    return area


def _training(config: Config, metadata: dict[str, Any]) -> str:
    """How long a model was trained, from the metadata of its file; "" where it does not say."""
    match metadata.get("selected"):
        case {"epoch": int(epoch), "step": int(step)}:
            return advice(config, epoch, step)
    return ""


def list_models() -> list[tuple[str, str, int, Path]]:
    """What can be named without a download: name, origin, size in bytes, file.

    The starter, the published bases in `default_cache`, and the models in the Hub's cache.
    """
    files = [(STARTER, "comes with nucsam", STARTER_FILE)]
    for name, base in BASES.items():
        path = default_cache() / base.file
        if path.is_file() and base.size in (0, path.stat().st_size):  # else it is damaged
            files.append((name, f"published {base.name}", path))
    files += [(name, "Hugging Face Hub", path) for name, path in hub_models().items()]
    return [(name, origin, p.stat().st_size, p) for name, origin, p in files if p.is_file()]
