"""Nuclei instance segmentation in H&E images: MobileSAM fine-tuned with LoRA.

- `nucsam.load(path)` opens a trained model: `nucsam.load("model.safetensors").predict(image)`.
- `nucsam.Predictor` is what `load` returns: label maps of images of any size.
- `nucsam.fit(config, out)` trains one fold into a run directory.
- `nucsam.UserError` is raised for every mistake that the user can mend.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nucsam.errors import UserError

if TYPE_CHECKING:
    from nucsam.predict.predictor import Predictor, load
    from nucsam.train.loop import fit

try:
    __version__ = version("nucsam")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Predictor", "UserError", "__version__", "fit", "load"]

_HOMES = {  # imported on first use, because they import torch
    "Predictor": "nucsam.predict.predictor",
    "load": "nucsam.predict.predictor",
    "fit": "nucsam.train.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nucsam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
