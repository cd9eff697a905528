"""The page of a run or of a cross-validation, which needs no network to be read.

Its numbers come from the run directories; only the images of the gallery are predicted again. Needs
the extra `report` (matplotlib).
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

from nucsam.config import Config, differences
from nucsam.data.draw import overlay, write_png
from nucsam.errors import UserError, check_packages
from nucsam.files import folder_name, make_folder, printable, write_text
from nucsam.report import facts
from nucsam.report.charts import Chart, grid_chart, run_charts, svg, write_chart
from nucsam.report.gallery import SHAPES, make_gallery, picks, scaled
from nucsam.run.directory import RunDirectory, RunRecord, read_runs
from nucsam.run.learning import advice, learnt_nothing
from nucsam.score.metrics import OUTCOMES
from nucsam.score.tables import percent

SWATCH = 3.5  # px: size of a shape in the legend of the gallery


def write_report(
    folder: Path, *, root: str = "", figures: Path | None = None, every_image: bool = False
) -> list[Path]:
    """Write the page of a run or of a cross-validation, and its charts and pictures as files.

    Of several variants, the page shows the one with the highest mean AJI in detail. Without weights
    or images the page has no gallery, and says why.

    Args:
        folder: run directory, or folder of `nucsam folds`.
        root: folder of the images, if it has moved.
        figures: folder for the charts and the pictures; None = page only.
        every_image: show every test image, not the worst, median and best ones alone.

    Returns:
        The paths written, the page first.

    Raises:
        UserError: a package is missing, `folder` holds no run, or a file of a run is damaged; with
            `root` or `every_image` also where there can be no gallery.
    """
    check_packages("report", "matplotlib")
    all_runs = read_runs(folder)
    variants = [list(runs) for _, runs in groupby(all_runs, attrgetter("variant"))]
    runs = max(variants, key=lambda runs: facts.summary(runs)["mean"]["aji"] or -1)
    charts = run_charts(runs)
    if chart := grid_chart(all_runs):
        charts["grid"] = chart
    pictures, no_pictures = [], ""
    try:
        pictures = make_gallery(picks(_rows(runs), every_image), runs, root)
    except (UserError, OSError) as error:
        no_pictures = f"{error}. If the images have moved, run nucsam report {folder} --data FOLDER"
        if root or every_image:  # who asks for pictures may have a page that shows some
            raise UserError(no_pictures) from error
    words = [Path(word) for run in runs for word in run.environment.get("command", [])]
    commands = filter(Path.is_absolute, words)
    text = _render(
        [
            folder,
            *map(Path, filter(None, (runs[0].config.data.root, runs[0].config.data.test, root))),
            *commands,
        ],
        **_contents(folder, runs, all_runs, pictures),
        summaries=[facts.summary(folds) for folds in variants],
        no_pictures=no_pictures,
        charts={name: svg(chart, name) for name, chart in charts.items()},
        pictures=pictures,
    )
    page = RunDirectory(folder).report_file
    write_text(page, printable(text))
    if figures is None:
        return [page]
    return [page, *_write_figures(figures, charts, pictures)]


def finish(folder: Path, figures: Path | None = None) -> str:
    """Write the page after a training, whatever goes wrong with it; return a line about it.

    Args:
        folder, figures: as in `write_report`.
    """
    try:
        page = write_report(folder, figures=figures)[0]
        return f"report: {page}" + (f"; figures as PDF, PNG and SVG: {figures}" if figures else "")
    except Exception as error:  # even a bug: the training is done and its files are written
        return f"no report ({type(error).__name__}: {error}); to try again: nucsam report {folder}"


def _rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The scored images of runs, the lowest AJI first."""
    rows = [row for run in runs for row in run.rows]
    return sorted(rows, key=lambda row: (row["aji"], row["name"]))


def _contents(
    folder: Path,
    runs: Sequence[RunRecord],
    all_runs: Sequence[RunRecord],
    pictures: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What the page takes from the run directories, and the places of its pictures."""
    rows = _rows(runs)
    places = {picture["row"]["name"]: picture["id"] for picture in pictures}
    return {
        "title": folder_name(folder),
        "cross": all_runs[0].folder != folder,
        "best": facts.summary(runs),
        "runs": runs,
        "all_runs": all_runs,
        "blank": [row for row in rows if facts.is_blank(row)],
        "findings": facts.findings(runs, places),
        "organs": facts.organ_table(rows),
        "rows": rows,
        "places": places,
        "cost": facts.training_cost(runs),
        "changed": differences(Config(), runs[0].config).values(),
        "toml": RunDirectory(runs[0].folder).config_file.read_text("utf-8", "surrogateescape"),
        "pages": [RunDirectory(run.folder).report_file.relative_to(folder) for run in all_runs],
    }


def without_folders(text: str, places: Iterable[Path] = ()) -> str:
    """A text without the folders of absolute paths: a page is shown to others.

    Args:
        text: for a person to read; of a path with spaces, the folders before them go.
        places: paths whose folders go wherever they stand, spaces or not.
    """
    inner = r"([^\s'\"=;,/\\]+[/\\]+)"  # TOML escapes a backslash by another
    for folder in sorted({str(path.absolute().parent) for path in places}, key=len, reverse=True):
        text = re.sub(re.escape(folder.rstrip("/\\") + os.sep) + f"{inner}*", "", text)
    # a backslash alone begins no path, for patterns are full of them
    return re.sub(rf"(?<![\w.:/-])(/|~[/\\]+|[A-Za-z]:[/\\]+){inner}+", "", text)


def command_line(words: Sequence[str]) -> str:
    """The words of `sys.argv` as a shell takes them, without the folder of the program."""
    *folders, program = re.split(r"[/\\]", words[0])
    if program == "__main__.py" and "nucsam" in folders:  # python -m nucsam, or of its packages
        above = takewhile(lambda name: name != "nucsam", reversed(folders))
        program = f"python -m {'.'.join(['nucsam', *reversed([*above])])}"
    return " ".join([program, *map(shlex.quote, words[1:])])


def _render(private: Sequence[Path], **values: Any) -> str:
    """The page, without the folders of `private` and of other absolute paths."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nucsam.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["command_line"] = command_line
    environment.filters["local"] = lambda text: without_folders(str(text), private)
    shapes = {name: scaled(shape, SWATCH) for name, shape in SHAPES.items()}
    template = environment.get_template("report.html")
    values |= {"advice": advice, "learnt_nothing": learnt_nothing}
    return template.render(shown=facts.SHOWN, outcomes=OUTCOMES, shapes=shapes, **values)


def _write_figures(
    folder: Path, charts: Mapping[str, Chart], pictures: Sequence[dict[str, Any]]
) -> list[Path]:
    """Write every chart and every picture of the gallery."""
    make_folder(folder)
    paths = []
    for name, chart in charts.items():
        paths += write_chart(chart, folder / name)
    for picture in pictures:
        sample = picture["sample"]
        paths.append(folder / f"{picture['kind'] or 'image'}-rank{picture['rank']}.png")
        write_png(paths[-1], overlay(sample.image, sample.label, picture["pred"]))
    return paths
