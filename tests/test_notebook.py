"""The notebook runs from top to bottom, and progress bars behave in notebooks."""

import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rich.progress import track

from nucsam.config import load_config
from nucsam.console import PlainConsole

NOTEBOOK = Path(__file__).parents[1] / "launch" / "notebook.ipynb"
REDRAWN = re.compile(r"\x1b\[\d*[A-K]|\r(?!\n)")  # what moves a terminal's cursor back


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("notebook", [True, False])
def test_bars_are_redrawn_in_terminals_only(notebook, monkeypatch):
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    monkeypatch.setenv("TERM", "xterm-color")
    if notebook:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    file = Terminal()
    console = PlainConsole(file=file)
    for k in track(range(200), "working", console=console, update_period=0):
        if k % 100 == 0:
            console.print("a line")
    text = file.getvalue()
    assert text.count("a line") == 2 and "working" in text
    assert bool(REDRAWN.search(text)) != notebook
    assert not notebook or text.count("\n") == 3


def test_the_notebook_runs(report_drawn, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in codes)
    (choices,) = (cell for cell in codes if "parameters" in cell.metadata.get("tags", ()))
    assert 'CONFIG = "configs/quickstart.toml"\nSETTINGS = ""' in re.sub(
        "  #.*", "", choices.source
    )
    out = tmp_path / "the five"
    small = "data.folds=2 data.crop=64 data.workers=0 model.width=32 train.epochs=2"
    reduced = {"DATA": str(tmp_path / "data"), "IMAGES": 8, "OUT": str(out), "SETTINGS": small}
    choices.source += "".join(f"\n{name} = {value!r}" for name, value in reduced.items())
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, resources=folder).execute()

    outputs = [output for cell in codes for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert re.search(r"epoch 2: loss .*, AJI", printed) and "epoch 2 of 2" in printed
    assert not REDRAWN.search(printed) and printed.count("\n") < 250
    kinds = [*outputs[-2].data, *outputs[-1].data]
    assert kinds.count("text/markdown") == 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1 + 3 + 3
    assert "over 2 folds" in outputs[-1].data["text/markdown"]
    assert load_config(out / "fold0" / "config.toml").data.folds == 2
    figures = {path.name for path in (out / "figures").iterdir()}
    assert {"folds.pdf", "folds.png", "organs-aji.pdf", "validation.svg"} <= figures
    assert (out / "figures" / "folds.pdf").read_bytes().startswith(b"%PDF")
