"""Prediction with onnxruntime: a graph of `nucsam export`, without torch."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage  # its parts load when they are first used

from nucsam.config import Instances
from nucsam.download import file_checksum
from nucsam.errors import UserError, check_packages
from nucsam.files import read_json
from nucsam.model.instances import from_depth, from_foreground
from nucsam.predict.predictor import Opened, Predictor
from nucsam.processes import chosen_threads
from nucsam.run.metadata import check_metadata

SPLITS = {"foreground": from_foreground, "foreground,depth": from_depth}  # names of the maps


@dataclass(eq=False)
class OnnxPredictor(Predictor):
    """A predictor that runs an ONNX graph of `nucsam export`.

    The graph takes px of the images trained on. For another magnification tiles are resized before
    it and maps after it. Sides that are no multiple of the graph's are mirrored up to one.

    Args:
        session: onnxruntime's InferenceSession of the graph.
        multiple: sides of the graph's images are multiples of it, px.
        split: from maps to nuclei, one of `SPLITS`.
    """

    session: Any
    multiple: int
    split: Callable[..., np.ndarray]

    def maps(self, pixels: np.ndarray, sides: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        h, w = (round(side / self.scale) for side in sides)
        missing = ((0, 0), (0, 0), (0, -h % self.multiple), (0, -w % self.multiple))
        images = np.pad(resized(images, (h, w)), missing, mode="symmetric")
        (maps,) = self.session.run(None, {"image": images})
        return resized(maps[:, :, :h, :w], size)

    def nuclei(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        return self.split(*maps, config)


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel centres at halves, as PyTorch's `interpolate`.

    Args:
        maps: float32 (B, C, h, w).
        size: rows and columns.

    Returns:
        float32 (B, C, *size); `maps` itself where it has that size.
    """
    if maps.shape[2:] == size:
        return maps
    shape = (*maps.shape[:2], *size)
    return skimage.transform.resize(
        maps, shape, order=1, mode="edge", anti_aliasing=False, preserve_range=True
    )


def open_graph(path: Path, device: str, per_device: int = 1, adapt: float | None = None) -> Opened:
    """As `pytorch.open_weights`, of an ONNX file.

    Raises:
        UserError: no onnxruntime, no such file or device, a graph that nucsam has not written, or
            one that was exported with another `model.adapt`.
    """
    check_packages("onnx", "onnxruntime")
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected one of nucsam export")
    session = _session(path, device, per_device)
    entries = session.get_modelmeta().custom_metadata_map
    maps, multiple = entries.get("maps"), entries.get("multiple", "")
    named = "nucsam" in entries and maps in SPLITS
    if not named or not re.fullmatch(r"[1-9]\d{0,4}", multiple):
        raise UserError(f"{path}: found another graph, expected one of nucsam export")
    metadata = read_json(entries["nucsam"], f"{path}: `nucsam` metadata")
    config = check_metadata(path, metadata)
    if adapt is not None and config != replace(config, model=replace(config.model, adapt=adapt)):
        found = f"found {adapt:g}, but {path} has {config.model.adapt:g} in its graph"
        raise UserError(f"adapt: {found}; nucsam export --adapt writes another")
    fields = {"multiple": int(multiple), "split": SPLITS[maps], "sha256": file_checksum(path)}
    make = partial(OnnxPredictor, session, **fields)
    return make, config, metadata, session.get_providers()[0] == "CPUExecutionProvider"


def _session(path: Path, device: str, per_device: int) -> Any:
    import onnxruntime

    device = str(device)  # also of a torch.device
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?" if gpu else "auto|cpu", device)
    if match is None:
        expected = "auto, cpu, cuda or cuda:N" if gpu else "auto or cpu (no CUDA in onnxruntime)"
        raise UserError(f"device: found {device!r}, expected {expected}")
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu and device != "cpu":
        number = match[1] or int(os.environ.get("LOCAL_RANK", "0")) // per_device
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = chosen_threads() or 0  # 0 = all cores
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises classes of its own
        raise UserError(f"{path}: not a readable ONNX graph ({error})") from error
