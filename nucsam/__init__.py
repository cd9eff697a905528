"""nucsam: nuclei instance segmentation with MobileSAM, LoRA and Accelerate."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nucsam")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
