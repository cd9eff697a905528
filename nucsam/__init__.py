"""nucsam: nuclei instance segmentation with MobileSAM, LoRA and Accelerate."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nucsam")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    """`nucsam.load` is `nucsam.predict.load`, which imports torch: only who asks for it waits for that."""
    if name == "load":
        from nucsam.predict import load

        return load
    raise AttributeError(f"module 'nucsam' has no attribute {name!r}")
