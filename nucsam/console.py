"""The console that every command prints on."""

from typing import Any

from rich.console import Console
from rich.text import Text

from nucsam.files import printable


class PlainConsole(Console):
    """A console that shows texts as they are: names may hold markup and control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
