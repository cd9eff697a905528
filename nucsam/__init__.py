"""Nuclei instance segmentation in H&E images: MobileSAM fine-tuned with LoRA.

Train one fold into a run directory, open its model, and predict an image of any size:

    import nucsam

    scores = nucsam.fit("configs/nuinsseg.toml", "runs/first")
    model = nucsam.load("runs/first")  # or an .onnx file, which needs no PyTorch
    label = model.predict(image)  # uint8 (H, W, 3) -> int32 (H, W), 0 = background

`nucsam.predict_files` predicts image files into a folder, as `nucsam predict` does.
`nucsam.Predictor` is what `load` returns. `nucsam.UserError` is raised for every mistake that the
user can fix.
"""

import importlib.util
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nucsam.errors import UserError

if TYPE_CHECKING:
    from nucsam.predict.images import predict_files
    from nucsam.predict.models import load
    from nucsam.predict.predictor import Predictor
    from nucsam.train.loop import fit

try:
    __version__ = version("nucsam")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Predictor", "UserError", "__version__", "fit", "load", "predict_files"]

_HOMES = {  # imported on first use, because they import numpy or torch
    "Predictor": "nucsam.predict.predictor",
    "load": "nucsam.predict.models",
    "fit": "nucsam.train.loop",
    "predict_files": "nucsam.predict.images",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nucsam' has no attribute {name!r}")


def __dir__() -> list[str]:
    absent = set() if importlib.util.find_spec("torch") else {"fit"}
    return sorted({*globals(), *__all__} - absent)
