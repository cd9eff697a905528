"""The package `mobile_sam`, imported without what its models do not need.

Its import takes longer than that of torch: it needs three small functions of timm, and for them
timm loads torchvision and each of its models.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType


def import_builders() -> ModuleType:
    """The module `mobile_sam.build_sam`.

    `mobile_sam` and timm load as usual where somebody else imports them.
    """
    if "mobile_sam" not in sys.modules:
        sys.modules["mobile_sam"] = _package("mobile_sam")
        # A version of timm that has its functions elsewhere is loaded whole.
        with suppress(ImportError, AttributeError), _part_of_timm():
            import_module("mobile_sam.build_sam")
    return import_module("mobile_sam.build_sam")


def _package(name: str) -> ModuleType:
    """An installed package whose `__init__` runs when a name is asked for that only it has."""
    spec = find_spec(name)
    package = module_from_spec(spec)

    def load(attribute: str) -> object:
        if attribute.startswith("__"):  # asked for by the import system
            raise AttributeError(attribute)
        del package.__getattr__
        spec.loader.exec_module(package)
        return getattr(package, attribute)

    package.__getattr__ = load
    return package


@contextmanager
def _part_of_timm() -> Iterator[None]:
    """Context in which `timm` has what TinyViT takes of it, and nothing else."""
    loaded = _take_timm()
    try:
        for name in ("timm", "timm.layers", "timm.models"):
            sys.modules[name] = _package(name)
        layers = sys.modules["timm.models.layers"] = ModuleType("timm.models.layers")
        layers.DropPath = import_module("timm.layers.drop").DropPath
        layers.to_2tuple = import_module("timm.layers.helpers").to_2tuple
        layers.trunc_normal_ = import_module("timm.layers.weight_init").trunc_normal_
        registry = sys.modules["timm.models.registry"] = ModuleType("timm.models.registry")
        registry.register_model = lambda function: function
        yield
    finally:
        _take_timm()
        sys.modules |= loaded


def _take_timm() -> dict[str, ModuleType]:
    """Timm's modules, taken out of those that are loaded."""
    names = [name for name in sys.modules if name.partition(".")[0] == "timm"]
    return {name: sys.modules.pop(name) for name in names}
