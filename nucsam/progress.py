"""A progress bar for results that come one by one."""

from collections.abc import Iterable, Iterator
from typing import Any


def with_bar(results: Iterable[Any], count: int, title: str) -> Iterator[Any]:
    """Pass results through, under a progress bar on stderr with their rate and the time left.

    The bar appears only where stderr is a terminal or a notebook, and vanishes at the end.

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

    console = Console(stderr=True, markup=False)
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), Rate())
    bar = progress.Progress(
        "{task.description}",
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_interactive or console.is_jupyter),
    )
    with bar:
        yield from bar.track(results, count, description=title)
