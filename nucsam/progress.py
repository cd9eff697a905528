"""A progress bar for results that come one by one, also in notebooks."""

import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from nucsam.processes import is_first


def console_options() -> dict[str, bool]:
    """Options of a rich Console whose bars are redrawn in place, or not drawn at all.

    A command that a notebook starts (`!nucsam train`) seems to write to a terminal, but there each
    redraw of a bar adds a line. In the notebook's own process rich draws bars with ipywidgets, and
    without it warns at each redraw.
    """
    if "JPY_PARENT_PID" not in os.environ:  # set for a notebook's kernel and what it starts
        return {}
    jupyter = {} if find_spec("ipywidgets") else {"force_jupyter": False}
    return {"force_terminal": False, **jupyter}


def with_bar(results: Iterable[Any], count: int, title: str) -> Iterator[Any]:
    """Pass results through, under a progress bar on stderr with their rate and the time left.

    The bar appears on the first process of a launch, where stderr is a terminal, or in a notebook.
    It vanishes at the end.

    Args:
        results: what to pass through, in order.
        count: how many results there are.
        title: the text beside the bar.
    """
    from rich import progress
    from rich.console import Console

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task):
            return progress.TaskProgressColumn.render_speed(task.speed)

    console = Console(stderr=True, markup=False, **console_options())
    counts = (progress.BarColumn(), progress.MofNCompleteColumn(), Rate())
    columns = ("{task.description}", *counts, progress.TimeRemainingColumn())
    shown = is_first() and (console.is_interactive or console.is_jupyter)
    with progress.Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield from bar.track(results, count, description=title)
