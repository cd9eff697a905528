"""The console that every command prints on, and its progress bar."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nucsam.files import printable
from nucsam.progress import console_options


class PlainConsole(Console):
    """A console that shows texts as they are: names may hold markup and control characters."""

    def __init__(self, **options: Any) -> None:
        plain = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(**plain | console_options() | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, but a table has 80 columns at least: a terminal wraps it and hides nothing."""
        if self.width < 80 and any(isinstance(thing, Table) for thing in objects):
            PlainConsole(width=80, file=self.file).print(*objects, **options)
        else:
            super().print(*objects, **options)

    def say(self, text: str, style: str = "") -> None:
        """Print a text whose lines end only where the text says so."""
        self.print(text, style=style, soft_wrap=True)


class Bar(Progress):
    """A progress bar with a text and the time left.

    It appears only on a terminal or in a notebook, and where `shown` is on.
    """

    def __init__(self, console: Console, *, total: int, done: int = 0, shown: bool) -> None:
        columns = ("{task.description}", BarColumn(), TimeRemainingColumn())
        shown = shown and (console.is_interactive or console.is_jupyter)
        super().__init__(*columns, console=console, disable=not shown)
        self.add_task("", total=total, completed=done)
        (self.task,) = self.tasks

    def show(self, text: str, done: float) -> None:
        self.update(self.task.id, description=text, completed=done)
