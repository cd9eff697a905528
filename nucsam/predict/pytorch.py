"""Prediction with PyTorch: the models of runs and exports."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nucsam.config import Config, Instances
from nucsam.errors import UserError
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import load_base, state_sha256
from nucsam.predict.devices import autocast_dtype, find_device
from nucsam.predict.predictor import Opened, Predictor
from nucsam.run import checkpoint
from nucsam.run.metadata import check_metadata


@dataclass(eq=False)
class TorchPredictor(Predictor):
    """A predictor that runs PyTorch.

    Args:
        model: on its device, in eval mode.
        autocast: dtype of the forward pass; None = the model's own.
    """

    model: Nucsam
    autocast: torch.dtype | None = field(default=None, kw_only=True)

    out_of_memory = torch.OutOfMemoryError

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = next(self.model.parameters()).device
        if self.device.type == "cuda":
            self.lanes = 2  # the host prepares a batch while the device runs another

    def maps(self, pixels: np.ndarray, sides: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        uploaded = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            uploaded = uploaded.pin_memory()
        images = uploaded.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        if images.shape[2:] != sides:
            images = F.interpolate(images, size=sides, mode="bilinear")
        cast = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad():
            with cast:
                maps = self.model(images, size)
            return _on_host(self.model.probabilities(maps.float()))

    def nuclei(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        return self.model.instances(maps, config)


def _on_host(maps: torch.Tensor) -> np.ndarray:
    """Probabilities (B, C, H, W) as an array: float32, or float16 from a GPU.

    Half precision and pinned memory take a quarter of the time to leave a GPU.
    """
    if maps.device.type != "cuda":
        return maps.cpu().numpy()
    host = maps.half().to("cpu", non_blocking=True)  # that is into pinned memory
    torch.cuda.current_stream(maps.device).synchronize()
    return host.numpy()


def open_weights(
    path: Path, device: str, per_device: int = 1, adapt: float | None = None
) -> Opened:
    """A predictor without its options, of a run directory or a safetensors file.

    Args:
        path: the directory or file.
        device: auto, cpu, cuda, cuda:N or mps.
        per_device: launched processes that share a GPU.
        adapt: in place of the `model.adapt` of its configuration; None = keep it.

    Raises:
        UserError: as in `open_model`, no such device, or no head that adapts.
    """
    where = find_device(device, per_device)
    model, config, metadata = open_model(path)
    if adapt is not None:
        config = replace(config, model=replace(config.model, adapt=adapt))  # which checks it
        model.adapt(adapt)
    cast = autocast_dtype(metadata.get("precision"), where)
    sha256 = state_sha256(model.state_dict())
    make = partial(TorchPredictor, model.fold().to(where), autocast=cast, sha256=sha256)
    return make, config, metadata, where.type == "cpu"


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
        expected = "a run directory, or a safetensors or ONNX file of nucsam export"
        raise UserError(f"{path}: found {found}, expected {expected}, 'starter' or hf:USER/NAME")
    _, metadata = checkpoint.read_tensors(path, "merged", "adapter")
    if metadata["kind"] == "adapter":
        model, config, *_ = checkpoint.open_adapter(path)
        return model, config, metadata
    config = check_metadata(path, metadata)
    base = load_base(path, config.model.encoder)
    if config.model.head == "instance" and not base.extra:
        raise UserError(f"{path}: found no tensor of the head, expected a whole export")
    model = build_model(replace(config.model, train="head"), base, seed=0)
    return model.eval(), config, metadata
