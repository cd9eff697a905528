"""The layers of the library: a module imports only from layers below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nucsam

PACKAGE = Path(nucsam.__file__).parent
LAYERS = (
    "atomic",
    "config images lora metrics instances targets losses synthetic geojson measure tiles",
    "encoder base head data augment draw charts",
    "model outputs",
    "checkpoint graph",
    "predict",
    "run batch evaluate export",
    "scoring results",
    "gallery",
    "report",
    "train",
    "folds",
    "cli",
    "__main__ __init__",  # __init__ holds `nucsam.load`, imported when asked for; all may import `__version__`
)
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules.split()}
WITHOUT_TORCH = ("metrics", "instances", "synthetic", "geojson", "measure", "tiles")


def is_script_guard(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`, whose body no import of the module runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported(source: str) -> set[str]:
    """Dotted names of what a module of the package imports anywhere, functions included."""
    found, queue = set(), [ast.parse(source)]
    while queue:
        node = queue.pop()
        if is_script_guard(node):
            continue
        queue += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(filter(None, ["nucsam" if node.level else "", node.module or ""]))
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def of_package(names: set[str]) -> set[str]:
    """The package's modules among dotted names; `from nucsam import __version__` is `__init__`."""
    parts = [name.split(".") for name in names if name.split(".")[0] == "nucsam"]
    return {part[1] if len(part) > 1 and (PACKAGE / f"{part[1]}.py").is_file() else "__init__" for part in parts}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.glob("**/*.py")}


def test_reading_of_imports():
    source = """
import os.path, nucsam.data
from nucsam import head, __version__
from nucsam.model import build
from . import lora
from .predict import Predictor
def f():
    if True:
        import torch.nn as nn
        from nucsam.base import Base
class C:
    import nucsam
if __name__ == "__main__":
    from nucsam.cli import run
"""
    found = imported(source)
    assert {name for name in found if not name.startswith("nucsam")} == {"os.path", "torch.nn"}
    modules = {"data", "head", "__init__", "model", "lora", "predict", "base"}
    assert of_package(found) == modules


def test_every_module_has_a_layer(sources):
    assert set(sources) == set(LAYER)
    assert len(sources) == 37 == sum(len(modules.split()) for modules in LAYERS)


def test_imports_go_down(sources):
    upwards, seen = [], 0
    for module, source in sources.items():
        for other in of_package(imported(source)):
            seen += 1
            if other != "__init__" and LAYER[other] >= LAYER[module]:
                upwards.append(f"{module} ({LAYER[module]}) imports {other} ({LAYER[other]})")
    assert upwards == []
    assert seen > 40


def test_no_torch_in_numpy_modules(sources):
    found = {module: {name.split(".")[0] for name in imported(sources[module])} for module in WITHOUT_TORCH}
    assert len(found) == 6
    assert all("numpy" in names for names in found.values())
    assert {module: names & {"torch", "torchvision", "accelerate", "timm"} for module, names in found.items()} == {
        module: set() for module in WITHOUT_TORCH
    }
    assert "torch" in {name.split(".")[0] for name in imported(sources["targets"])}  # this test does see it


HELP = """
import runpy, sys
sys.argv = ["nucsam", *{arguments}]
try:
    runpy.run_module("nucsam", run_name="__main__")
except SystemExit as end:
    print("exit", end.code)
heavy = ("torch", "numpy", "scipy", "skimage", "accelerate", "mobile_sam", "timm", "PIL", "tifffile")
print("loaded", *[name for name in heavy if name in sys.modules])
"""


def last_lines(arguments: list[str]) -> list[str]:
    code = HELP.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["predict", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    lines = last_lines(arguments)
    assert lines[-2:] == ["exit 0", "loaded"]
    assert any("Usage: nucsam" in line for line in lines)


def test_the_package_loads_a_model_when_asked_for():
    code = """
import sys, nucsam
print(nucsam.__version__, "torch" in sys.modules, "numpy" in sys.modules)
print(nucsam.load.__module__, "torch" in sys.modules, hasattr(nucsam, "lode"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [f"{nucsam.__version__} False False", "nucsam.predict True False"]


def test_modules_take_only_the_version_from_the_package(sources):
    """So that no module below `nucsam.predict` reaches it by way of `nucsam.load`."""
    names = {f"nucsam.{module}" for module in sources}
    taken = {
        (module, name)
        for module, source in sources.items()
        for name in imported(source)
        if name == "nucsam" or (name.count(".") == 1 and name.startswith("nucsam.") and name not in names)
    }
    assert {name for _, name in taken} == {"nucsam", "nucsam.__version__"}
    assert {module for module, name in taken if name == "nucsam"} == {"cli"}  # for the folder of the package


def test_a_command_imports_what_it_needs(tmp_path):
    """Negative control: the test above would see a heavy module."""
    lines = last_lines(["synth", str(tmp_path / "data"), "--images", "1", "--size", "64"])
    assert "exit 0" in lines[-2:]
    assert {"numpy", "scipy"} <= set(lines[-1].split())
    assert "torch" not in lines[-1].split()
