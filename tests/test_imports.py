"""Each wing imports only from rows above its own, and nothing runs in circles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nucsam

ROOT = Path(__file__).parents[1]
PACKAGE = Path(nucsam.__file__).parent
ROWS = (  # a wing imports from rows above its own; only files of one wing may import each other
    "errors",
    "processes",
    "files config claims progress",
    "console",
    "download names",
    "data",
    "model",
    "run",
    "predict",
    "score",
    "train",
    "folds report export",
    "cli",
)
ROW = {wing: row for row, wings in enumerate(ROWS) for wing in wings.split()}
ENTRIES = ("__init__", "__main__")  # import anything, when asked for


def modules() -> dict[str, Path]:
    """Dotted name below `nucsam` -> file."""
    files = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts): path for name, path in files.items()}


def imports(source: str, known: set[str]) -> set[str]:
    """The `known` modules that a source imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its wing"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("nucsam.") for name in names} & known


def graph() -> dict[str, set[str]]:
    files = modules()
    edges = {name: imports(path.read_text("utf-8"), set(files)) for name, path in files.items()}
    assert sum(map(len, edges.values())) > 60  # the reading of imports does see them
    return edges


def wing(module: str) -> str:
    return module.split(".")[0]


def is_entry(module: str) -> bool:
    return module.split(".")[-1] in ENTRIES


def test_imports_inside_functions_are_seen():
    source = (
        "def f():\n    if True:\n        from nucsam.data import images\nimport nucsam.cli as c"
    )
    assert imports(source, {"data.images", "cli", "files"}) == {"data.images", "cli"}


def test_a_wing_imports_only_from_rows_above():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if not is_entry(module)
        and wing(other) != wing(module)
        and ROW[wing(other)] >= ROW[wing(module)]
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    edges = graph()

    def reached(module: str, seen: set[str]) -> set[str]:
        for other in edges[module] - seen:
            reached(other, seen | {other})
            seen |= {other} | reached(other, seen | {other})
        return seen

    assert [module for module in edges if module in reached(module, set())] == []


def test_only_the_command_line_imports_nucsam_inside_functions():
    late = [
        module
        for module, path in modules().items()
        for function in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nucsam")
    ]
    assert set(late) == {"cli", "__main__", "predict.models"}


def test_every_place_that_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    places = re.findall(r"`(nucsam/[\w/]+\.py)(?::([\w.]+))?`", text)
    assert len(places) > 15
    for file, name in places:
        node = ast.parse((ROOT / file).read_text("utf-8"))
        for part in filter(None, name.split(".")):
            named = [child for child in node.body if getattr(child, "name", None) == part]
            assert named, f"{file}:{name}"
            node = named[0]


def test_no_public_function_bears_the_name_of_a_package():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert {"train", "data", "score"} <= packages
    names = {
        node.name
        for path in modules().values()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert names & packages == set()


def child(code: str) -> list[str]:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()


LIGHT = """
    data model.instances score.metrics score.pairs predict.writers predict.models predict.images
    folds.runner
"""


def test_modules_without_torch():
    """In one child, one after the other; the last one, which needs it, shows that it is seen."""
    code = "import sys\n"
    for module in (*LIGHT.split(), "model.targets"):
        code += f"import nucsam.{module}; print('{module}', 'torch' in sys.modules)\n"
    assert child(code) == [*(f"{module} False" for module in LIGHT.split()), "model.targets True"]


COMMAND = """
import runpy, sys
for arguments in {commands}:
    sys.argv = ["nucsam", *arguments]
    try:
        runpy.run_module("nucsam", run_name="__main__")
    except SystemExit as end:
        print("exit", end.code)
    heavy = "torch numpy scipy skimage accelerate mobile_sam timm PIL tifffile".split()
    print("loaded", *[name for name in heavy if name in sys.modules])
"""


def test_help_imports_nothing_heavy():
    commands = [["--help"], ["train", "--help"], ["evaluate", "--help"], ["predict", "--help"]]
    lines = child(COMMAND.format(commands=commands))
    ends = [lines[k : k + 2] for k, line in enumerate(lines) if line.startswith("exit")]
    assert ends == [["exit 0", "loaded"]] * 4
    assert sum("Usage: nucsam" in line for line in lines) == 4


def test_a_command_imports_what_it_needs(tmp_path):
    arguments = ["synth", str(tmp_path / "data"), "--images", "1", "--size", "64"]
    *_, status, loaded = child(COMMAND.format(commands=[arguments]))
    assert status == "exit 0"
    assert {"numpy", "scipy"} <= set(loaded.split())
    assert "torch" not in loaded


def test_the_package_is_light_and_lists_its_public_names():
    code = """
import sys, nucsam
print(nucsam.__version__, "torch" in sys.modules, "numpy" in sys.modules)
print(*(name for name in dir(nucsam) if name in nucsam.__all__))
print(nucsam.load.__module__, nucsam.fit.__module__, nucsam.Predictor.__module__)
print(issubclass(nucsam.UserError, ValueError), hasattr(nucsam, "lode"))
print(nucsam.predict_files.__module__)
"""
    assert child(code) == [
        f"{nucsam.__version__} False False",
        "Predictor UserError __version__ fit load predict_files",
        "nucsam.predict.models nucsam.train.loop nucsam.predict.predictor",
        "True False",
        "nucsam.predict.images",
    ]
    assert (PACKAGE / "py.typed").is_file()
