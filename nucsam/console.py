"""The console that every command prints on, and a progress bar for results that come one by one."""

import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

from nucsam.files import printable


class PlainConsole(Console):
    """A console that shows texts as they are: names may hold markup and control characters.

    Its bars are redrawn in place, or not drawn at all. A command that a notebook starts (`!nucsam
    train`) seems to write to a terminal, but there each redraw of a bar adds a line. In the
    notebook's own process rich draws bars with ipywidgets, and without it warns at each redraw.
    """

    def __init__(self, **options: Any) -> None:
        plain = {"markup": False, "emoji": False, "highlight": False}
        if "JPY_PARENT_PID" in os.environ:  # set for a notebook's kernel and what it starts
            plain["force_terminal"] = False
            if find_spec("ipywidgets") is None:
                plain["force_jupyter"] = False
        super().__init__(**plain | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class Rate(progress.ProgressColumn):
    """Results per second."""

    def render(self, task: progress.Task) -> Text:
        return progress.TaskProgressColumn.render_speed(task.speed)


def with_bar(results: Iterable[Any], count: int, title: str) -> Iterator[Any]:
    """Pass results through, under a progress bar on stderr with their rate and the time left.

    The bar appears only where stderr is a terminal, or in a notebook, and vanishes at the end.

    Args:
        results: what to pass through, in order.
        count: how many results there are.
        title: the text beside the bar.
    """
    console = PlainConsole(stderr=True)
    counts = (progress.BarColumn(), progress.MofNCompleteColumn(), Rate())
    columns = ("{task.description}", *counts, progress.TimeRemainingColumn())
    shown = console.is_interactive or console.is_jupyter
    with progress.Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield from bar.track(results, count, description=title)
