"""The console that every command prints on."""

from typing import Any

from rich.console import Console
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
