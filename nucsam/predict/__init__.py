"""Prediction: `predict_files`, imported on first use because it loads numpy and more."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nucsam.predict.images import predict_files

__all__ = ["predict_files"]


def __getattr__(name: str) -> Any:
    if name == "predict_files":
        from nucsam.predict.images import predict_files

        return predict_files
    raise AttributeError(f"module 'nucsam.predict' has no attribute {name!r}")
