"""Charts of runs: curves of training, bars of organs, scores against a setting.

Series differ in colour, marker and dash. matplotlib is imported inside functions: the
end of a training imports this module, and must work without the extra `report`.
"""

import html
import io
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nucsam.config import MAY_CHANGE, SETTINGS
from nucsam.files import atomic
from nucsam.report.facts import SHOWN, by_organ
from nucsam.run.directory import RunRecord
from nucsam.score.tables import over_folds, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {  # CSS variable of the page -> colour in a file
    "ink": "#1b2733",
    "muted": "#8a97a3",
    "line": "#d5dce2",
    "soft": "#eef2f5",
    "s1": "#0b6fb8",
    "s2": "#c04a00",
    "s3": "#13805a",
    "s4": "#8440a8",
    "s5": "#8a6a00",
}
SERIES = [COLOURS[f"s{k}"] for k in range(1, 6)]  # five, as there are usually folds
MARKERS = "os^DvPX"
DASHES = ("-", "--", "-.", (0, (1, 1.5)), (0, (6, 2)))

STYLE = {
    "text.parse_math": False,  # a name may hold a $
    "text.color": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, as journals ask for
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nucsam",  # the same chart gives the same file
}

Points = tuple[list[int], list[float]]  # epochs and values


class Chart(NamedTuple):
    figure: "Figure"
    text: str  # what the chart shows, for readers who cannot see it


# ---- what to draw ----


def run_charts(runs: Sequence[RunRecord]) -> dict[str, Chart]:
    """Every chart of a report on the folds of one variant, by name."""
    rows = [row for run in runs for row in run.rows]
    groups = by_organ(rows)
    charts = training_charts([run for run in runs if run.epochs])
    scored = [run for run in runs if run.scores]
    if len(scored) > 1:
        charts["folds"] = fold_scores({run.name: run.scores["headline"] for run in scored})
    for metric, title in SHOWN.items() if rows else ():
        values = {organ: [row[metric] for row in group] for organ, group in groups.items()}
        charts[f"organs-{metric}"] = organs(values, title)
    return charts


def training_charts(runs: Sequence[RunRecord]) -> dict[str, Chart]:
    """Loss, learning rate and scores by epoch: a line per term of one run, or a line per run."""
    if not runs:
        return {}
    first = runs[0]
    validation = f"{first.config.data.select} split"
    mark = None
    if len(runs) == 1:
        terms = ["loss", *sorted(key for key in first.epochs[-1] if key.startswith("loss_"))]
        # "loss" is the total, "loss_cross_entropy" is labelled "cross entropy".
        losses = {term[5:].replace("_", " ") or "total": _points(first, term) for term in terms}
        scores = {title: _points(first, metric, 100) for metric, title in SHOWN.items()}
        if first.scores:
            mark = first.scores["epoch"]
    else:
        best = first.config.train.best
        losses = {run.name: _points(run, "loss") for run in runs}
        scores = {run.name: _points(run, best, 100) for run in runs}
        validation = f"{SHOWN[best]}, {validation}"
    rates = {first.name: _points(first, "lr")}
    charts = {
        "loss": curves(losses, "Training loss", "loss", ".3g"),
        "rate": curves(rates, "Learning rate", "rate at the end of the epoch", ".2g"),
        "validation": curves(scores, f"Validation: {validation}", "percent", ".1f", mark),
    }
    return {name: chart for name, chart in charts.items() if chart}


def grid_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Test scores against the first number in which variants differ; None where there is none.

    The spread is over folds and seeds. Each metric has a line. Where variants differ in other
    settings too, each of these variants has a line of its AJI. `data.images` counts what was used.
    """
    scored = [run for run in runs if run.scores]
    flats = [run.config.flat() for run in scored]
    free = (*MAY_CHANGE, "data.fold", "train.seed")
    if any(flat["train.presentations"] for flat in flats):
        free += ("train.epochs",)  # which follow from them
    settings = [key for key in SETTINGS if key not in free]
    varied = [key for key in settings if len({flat[key] for flat in flats}) > 1]
    axis = next((key for key in varied if type(SETTINGS[key].default) in (int, float)), None)
    if axis is None:
        return None
    # number in the setting -> where it is drawn
    places = {flat[axis]: flat[axis] for flat in flats}
    if axis == "data.images":
        places = {flat[axis]: _images_used(run) for run, flat in zip(scored, flats)}
    points = defaultdict(lambda: defaultdict(list))
    for run, flat in zip(scored, flats):
        headline = run.scores["headline"]
        label = ", ".join(f"{key}={flat[key]}" for key in varied if key != axis)
        lines = {label: "aji"} if label else {title: metric for metric, title in SHOWN.items()}
        for line, metric in lines.items():
            if headline[metric] is not None:
                points[line][places[flat[axis]]].append(headline[metric])
    title = f"Test {'AJI' if len(varied) > 1 else 'scores'} by {axis}"
    return against(points, title, axis) if points else None


def _images_used(run: RunRecord) -> int:
    """How many images outside its test fold a run used."""
    images = run.environment.get("images", {})
    return sum(count for part, count in images.items() if part != "test")


def _points(run: RunRecord, key: str, factor: float = 1) -> Points:
    epochs = [epoch for epoch in run.epochs if key in epoch]
    return [epoch["epoch"] for epoch in epochs], [factor * epoch[key] for epoch in epochs]


# ---- drawing ----


@contextmanager
def _style() -> Iterator[None]:
    """The style of the charts, without a warning for each letter that the measuring font lacks."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _axes(width: float, height: float, title: str, y: str = "") -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(title=title, ylabel=y)


@_style()
def curves(
    series: Mapping[str, Points], title: str, y: str, form: str, mark: int | None = None
) -> Chart | None:
    """Lines by epoch, or None without a point.

    Args:
        series: label -> points of its line.
        title: of the chart.
        y: label of the vertical axis.
        form: format of values in the chart's text.
        mark: epoch whose weights are kept.
    """
    series = {label: points for label, points in series.items() if points[0]}
    if not series:
        return None
    figure, axes = _axes(4.3, 3.1, title, y)
    axes.set_xlabel("epoch")
    for k, (label, (epochs, values)) in enumerate(series.items()):
        marker = MARKERS[k % len(MARKERS)] if len(epochs) < 40 else ""
        look = {"color": SERIES[k % 5], "linestyle": DASHES[k % 5], "marker": marker}
        axes.plot(epochs, values, label=label, markersize=4, **look)
    last = max(max(epochs) for epochs, _ in series.values())
    axes.set_xlim(0, last + max(1, 0.05 * last))  # one epoch needs an axis too
    axes.locator_params(axis="x", integer=True)
    if mark is not None:
        axes.axvline(mark, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
        late = mark > np.mean(axes.get_xlim())
        inside = {"xycoords": ("data", "axes fraction"), "ha": "right" if late else "left"}
        offset = {"xytext": (-3 if late else 3, -2), "textcoords": "offset points", "va": "top"}
        axes.annotate("kept", (mark, 1), fontsize=8, **inside, **offset)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=2 if len(series) < 7 else 3, fontsize=9)
    spans = (f"{name} {ys[0]:{form}} to {ys[-1]:{form}}" for name, (_, ys) in series.items())
    return Chart(figure, f"{title} by epoch: {'; '.join(spans)}")


@_style()
def fold_scores(headlines: Mapping[str, Mapping[str, float]]) -> Chart:
    """A dot per fold for each metric, and the mean over folds with its sample standard deviation.

    Args:
        headlines: fold -> its test scores by metric, 0..1.
    """
    statistics = over_folds(list(headlines.values()))
    mean, std = ([100 * values[metric] for metric in SHOWN] for values in statistics.values())
    figure, axes = _axes(4.3, 3.1, "Test scores by fold", "percent")
    places = np.arange(len(SHOWN))
    bar = {"fmt": "_", "color": COLOURS["ink"], "markersize": 12, "capsize": 4}
    axes.errorbar(places, mean, std, label="mean ± std", **bar)
    for k, (label, headline) in enumerate(headlines.items()):
        values = 100 * np.array([headline[metric] for metric in SHOWN], float)  # None is NaN
        look = {"color": SERIES[k % 5], "marker": MARKERS[k % len(MARKERS)]}
        axes.scatter(places + 0.12 * (k + 1), values, s=22, label=label, **look)
    axes.set_xticks(places + 0.06 * (len(headlines) + 1), SHOWN.values())
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    numbers = (f"{SHOWN[m]} {a:.1f} ± {s:.1f}" for m, a, s in zip(SHOWN, mean, std))
    return Chart(figure, f"Test scores of {len(headlines)} folds: {', '.join(numbers)}")


@_style()
def against(series: Mapping[str, Mapping[float, Sequence[float]]], title: str, x: str) -> Chart:
    """A line of mean scores against a number, with their sample standard deviation.

    Args:
        series: label -> number -> scores, 0..1.
        title: of the chart.
        x: label of the horizontal axis.
    """
    figure, axes = _axes(4.3, 3.1, title, "percent")
    axes.set_xlabel(x)
    texts = []
    for k, (label, points) in enumerate(series.items()):
        places = sorted(points)
        means = [100 * fmean(points[place]) for place in places]
        stds = [100 * stdev(points[p]) if len(points[p]) > 1 else 0.0 for p in places]
        look = {"color": SERIES[k % 5], "linestyle": DASHES[k % 5], "marker": MARKERS[k % 7]}
        axes.errorbar(places, means, stds, label=label, markersize=4, capsize=3, **look)
        cells = [f"{p:g}: {m:.1f} ± {s:.1f}" for p, m, s in zip(places, means, stds)]
        texts.append(f"{label} {', '.join(cells)}")
    ticks = sorted({place for points in series.values() for place in points})
    if 0 < 8 * ticks[0] <= ticks[-1]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    columns = 3 if set(series) <= set(SHOWN.values()) else 1  # names of metrics are short
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    return Chart(figure, f"{title}: {'; '.join(texts)}")


@_style()
def organs(values: Mapping[str, Sequence[float]], metric: str) -> Chart:
    """A bar per organ, the lowest mean first, over a dot per image.

    Args:
        values: organ -> scores of its images, 0..1.
        metric: its title.
    """
    means = {organ: fmean(scores) for organ, scores in values.items()}
    order = sorted(means, key=lambda organ: (means[organ], organ))
    labels = [textwrap.fill(organ, 20, break_on_hyphens=False) for organ in order]
    height = 0.19 * sum(max(2, label.count("\n") + 1) for label in labels) + 0.9
    figure, axes = _axes(4.6, height, f"{metric} by organ")
    axes.set_xlabel("percent; bar: mean, dots: images")
    places = range(len(order))
    lengths = [100 * means[organ] for organ in order]
    look = {"color": COLOURS["line"], "edgecolor": COLOURS["muted"]}
    axes.barh(places, lengths, height=0.62, tick_label=labels, **look)
    for place, organ in enumerate(order):
        scores = 100 * np.sort(values[organ])
        spread = 0.09 if len(scores) > 3 else 0
        heights = place + spread * (np.arange(len(scores)) % 5 - 2)
        axes.scatter(scores, heights, s=14, color=COLOURS["s1"], alpha=0.75, linewidths=0)
        axes.text(102, place, percent(means[organ]), va="center", fontsize=9)
    axes.set_xlim(0, 112)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    text = ", ".join(f"{organ} {percent(means[organ])}" for organ in order)
    return Chart(figure, f"Mean {metric} by organ: {text}")


# ---- on a page and as files ----


@_style()
def svg(chart: Chart, name: str) -> str:
    """The chart as an <svg> element that takes on the page's colours.

    Args:
        chart: with the text that describes it.
        name: prefix of the element's ids.
    """
    file = io.StringIO()
    chart.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    element = re.search(r'<svg [^>]*?viewBox="([\d. ]+)"[^>]*>(.*)', text, re.DOTALL)
    box, content = element.groups()
    return f'<svg role="img" aria-label="{html.escape(chart.text)}" viewBox="{box}">{content}'


@_style()
def write_chart(chart: Chart, path: Path) -> list[Path]:
    """Write PATH.pdf, PATH.png (300 dots an inch) and PATH.svg on white. Atomic.

    Returns:
        The paths.
    """
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("pdf", "png", "svg")]
    for file in paths:
        with atomic(file) as partial:
            chart.figure.savefig(partial, format=file.suffix[1:], dpi=300, facecolor="white")
    return paths
