"""Names that reach a terminal or a table, and partial files."""

import io
import os

import pytest
from rich.table import Table

from nucsam.console import PlainConsole
from nucsam.files import atomic, csv_text, printable, stale_partials


def test_a_name_is_shown_and_never_obeyed():
    name = "[/red][bold]a:smile:\x1b]0;title\x07\u202eb"
    console = PlainConsole(file=io.StringIO(), width=200)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(name, style="red")
    console.print(table)
    shown = r"[/red][bold]a:smile:\x1b]0;title\x07\u202eb"
    assert console.file.getvalue().count(shown) == 4
    assert printable(f"{name}\n\t\udcffé") == f"{shown}\n\t\\udcffé"


def test_a_table_keeps_its_columns_in_a_narrow_terminal():
    tables = []
    for width in (30, 80):
        console = PlainConsole(file=io.StringIO(), width=width)
        table = Table()
        for heading in ("name of a row", *(f"column {k}" for k in range(6))):
            table.add_column(heading)
        table.add_row("mean", *["12.34"] * 6)
        console.print(table)
        tables.append(console.file.getvalue())
    assert tables[0] == tables[1] and tables[0].count("12.34") == 6


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_name_is_a_formula(name):
    assert csv_text(name) == f"'{name}"
    assert csv_text("liver=1") == "liver=1"
    assert csv_text("\r=1\x1b[2J") == r"\r=1\x1b[2J"


def test_partial_files_are_stale_where_their_process_is_gone(tmp_path):
    result = tmp_path / "a.b.tif"
    with atomic(result) as own:
        own.write_text("half")
        assert own.is_file() and stale_partials(tmp_path) == {}
        dead = tmp_path / ".a.b.tif.999999999.partial"
        dead.touch()
        (tmp_path / f".c.tif.{os.getppid()}.partial").touch()
        inner = tmp_path / f".{dead.name}.999999999.partial"  # written by `atomic` within `atomic`
        inner.touch()
        assert stale_partials(tmp_path) == {dead: result, inner: result}
