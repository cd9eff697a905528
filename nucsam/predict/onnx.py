"""Prediction with onnxruntime: a graph of `nucsam export`, without torch."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nucsam.config import Config, Instances
from nucsam.download import file_checksum
from nucsam.errors import UserError, check_packages
from nucsam.files import read_json
from nucsam.model.instances import from_depth, from_foreground
from nucsam.predict.predictor import Predictor
from nucsam.run.metadata import check_metadata

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SPLITS = {"foreground": from_foreground, "foreground,depth": from_depth}  # names of the maps


@dataclass(eq=False)
class OnnxPredictor(Predictor):
    """A predictor that runs an ONNX graph of `nucsam export`.

    The graph takes px of the images trained on. For another magnification tiles are resized before
    it and maps after it. Sides that are no multiple of the graph's are mirrored up to one.

    Args:
        session: of the graph.
        path: its file.
        multiple: sides of the graph's images are multiples of it, px.
        split: from maps to nuclei, one of `SPLITS`.
    """

    session: "InferenceSession"
    path: Path
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

    def weights_sha256(self) -> str:
        return file_checksum(self.path)


def resized(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel centres at halves, as PyTorch's `interpolate`.

    Args:
        maps: float32 (B, C, h, w).
        size: rows and columns.

    Returns:
        float32 (B, C, *size); `maps` itself where it has that size.
    """
    for axis, length in zip((2, 3), size):
        old = maps.shape[axis]
        if old == length:
            continue
        place = np.clip((np.arange(length) + 0.5) * (old / length) - 0.5, 0, old - 1)
        low = place.astype(int)
        share = (place - low).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        below, above = (maps.take(k, axis) for k in (low, np.minimum(low + 1, old - 1)))
        maps = below + (above - below) * share
    return maps


def open_graph(
    path: Path, device: str
) -> tuple[Callable[..., Predictor], Config, dict[str, Any], bool]:
    """As `pytorch.open_weights`, of an ONNX file.

    Raises:
        UserError: no onnxruntime, no such file or device, or a graph that nucsam has not written.
    """
    check_packages("onnx", "onnxruntime")
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected one of nucsam export")
    session = _session(path, device)
    entries = session.get_modelmeta().custom_metadata_map
    maps, multiple = entries.get("maps"), entries.get("multiple", "")
    named = "nucsam" in entries and maps in SPLITS
    if not named or not re.fullmatch(r"[1-9]\d{0,4}", multiple):
        raise UserError(f"{path}: found another graph, expected one of nucsam export")
    metadata = read_json(entries["nucsam"], f"{path}: `nucsam` metadata")
    config = check_metadata(path, metadata)
    make = partial(OnnxPredictor, session, path, int(multiple), SPLITS[maps])
    return make, config, metadata, session.get_providers()[0] == "CPUExecutionProvider"


def _session(path: Path, device: str) -> "InferenceSession":
    import onnxruntime

    name, _, number = device.partition(":")
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not gpu):
        expected = "auto, cpu, cuda or cuda:N" if gpu else "auto or cpu (no CUDA in onnxruntime)"
        raise UserError(f"device: found {device!r}, expected {expected}")
    providers: list[Any] = ["CPUExecutionProvider"]
    if gpu and name != "cpu":
        number = number or os.environ.get("LOCAL_RANK", "0")
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))  # 0 = all cores
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises classes of its own
        raise UserError(f"{path}: not a readable ONNX graph ({error})") from error
