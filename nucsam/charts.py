"""Charts of runs by matplotlib: curves, bars with every image as a dot, comparisons, and where LoRA sits.

Series differ in colour and in marker, dash or hatch. Each function returns a `Figure` that no global state knows;
`svg` gives one as part of a page, whose light or dark colours it takes on, and `write` as files.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import nn

from nucsam.atomic import atomic
from nucsam.lora import LoRALinear

COLOURS = {  # a page's CSS variable -> the colour in a file
    "ink": "#1b2733",
    "muted": "#8a97a3",
    "line": "#d5dce2",
    "soft": "#eef2f5",
    "s1": "#0b6fb8",
    "s2": "#c04a00",
    "s3": "#13805a",
    "s4": "#8440a8",
}
SERIES = [COLOURS[name] for name in ("s1", "s2", "s3", "s4")]
MARKERS, DASHES, HATCHES = "os^DvPX", ("-", "--", "-.", (0, (1, 1.5))), ("", "///", "...", "xxx")
STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # a name may hold a $
    "text.color": COLOURS["ink"],
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
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
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "hatch.color": COLOURS["soft"],
    "hatch.linewidth": 1.2,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nucsam",  # the same chart, the same file
}


def curves(series: Mapping[str, tuple[Sequence, Sequence]], title: str, x: str, y: str, mark: float = 0) -> Figure:
    """Lines of label -> (xs, ys); a vertical line at `mark`, the epoch whose weights are kept (0 = none)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(4.3, 3.1, title, x, y)
        for k, (label, (xs, ys)) in enumerate(series.items()):
            few = {"marker": MARKERS[k % len(MARKERS)], "markersize": 4} if len(xs) < 40 else {}
            axes.plot(xs, ys, color=SERIES[k % 4], linestyle=DASHES[k % 4], label=label, **few)
        if mark:
            axes.axvline(mark, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
            axes.annotate("kept", (mark, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=2 if len(series) < 7 else 3, fontsize=9)
        return figure


def organs(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A bar an organ, its mean, over a dot an image; values 0 to 1, shown in percent, the lowest mean first."""
    order = sorted(values, key=lambda organ: (np.mean(values[organ]), organ), reverse=True)
    labels = [textwrap.fill(organ, 20, break_on_hyphens=False) for organ in order]
    with matplotlib.rc_context(STYLE):
        height = 0.19 * sum(max(2, label.count("\n") + 1) for label in labels) + 0.9
        figure, axes = _axes(4.6, height, title, "percent; bar: mean, dots: images", "")
        means = [100 * np.mean(values[organ]) for organ in order]
        axes.barh(labels, means, height=0.62, color=COLOURS["line"], edgecolor=COLOURS["muted"])
        for place, organ in enumerate(order):
            found = 100 * np.sort(values[organ])
            spread = 0.09 * (np.arange(len(found)) % 5 - 2) if len(found) > 3 else np.zeros(len(found))
            axes.scatter(found, place + spread, s=14, color=COLOURS["s1"], alpha=0.75, linewidths=0)
            axes.text(102, place, f"{means[place]:.1f}", va="center", fontsize=9)
        axes.set_xlim(0, 112)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(axis="y", visible=False)
        return figure


def compare(groups: Mapping[str, Mapping[str, Sequence[float]]], title: str, dots: str) -> Figure:
    """Bars of group -> metric -> values, 0 to 1, shown in percent: their mean, with a dot a value where several."""
    metrics = list(next(iter(groups.values())))
    width = 0.8 / len(metrics)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(max(4.3, 1.1 * len(groups) + 1), 3.3, title, "", f"percent{dots}")
        for k, metric in enumerate(metrics):
            found = [100 * np.array(values[metric]) for values in groups.values()]
            at, means = np.arange(len(groups)) + (k - (len(metrics) - 1) / 2) * width, [np.mean(v) for v in found]
            axes.bar(at, means, 0.9 * width, color=SERIES[k], hatch=HATCHES[k], label=metric)
            for x, mean, values in zip(at, means, found):
                if len(values) > 1:
                    axes.scatter([x] * len(values), values, s=14, facecolor=COLOURS["soft"], edgecolor=COLOURS["ink"])
                axes.text(x, max(values) + 2.5, f"{mean:.1f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(groups)), [textwrap.fill(label, 16) for label in groups])
        axes.set_ylim(0, 108)
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=len(metrics), fontsize=9)
        return figure


class Part(NamedTuple):
    """A part of the network: its module, parameters in all and trained, and its linear layers, block by block."""

    name: str
    parameters: int
    trained: int
    blocks: dict[str, list[tuple[str, int]]]  # block -> (layer, LoRA parameters or 0)


def parts(net: nn.Module) -> list[Part]:
    """The network from input to output: the encoder's stem and stages, its neck where the decoder follows, the head."""
    encoder = net.image_encoder
    stages = {f"image_encoder.layers.{k}": stage for k, stage in enumerate(encoder.layers)}
    neck = {"image_encoder.neck": encoder.neck} if hasattr(net, "mask_decoder") else {}
    tops = {name: child for name, child in net.named_children() if name != "image_encoder"}
    modules = {"image_encoder.patch_embed": encoder.patch_embed, **stages, **neck, **tops}
    found, seen = [], set()
    for name, module in modules.items():
        own = [p for p in module.parameters() if id(p) not in seen]  # the sam head holds modules that others hold
        seen |= {id(p) for p in own}
        blocks: dict[str, list[tuple[str, int]]] = {}
        for path, child in module.named_modules():
            if own and isinstance(child, nn.Linear):
                words = path.split(".")
                cut = max((k + 1 for k, word in enumerate(words[:-1]) if word.isdigit()), default=len(words) - 1)
                added = child.lora_A.numel() + child.lora_B.numel() if isinstance(child, LoRALinear) else 0
                blocks.setdefault(".".join(words[:cut]), []).append((".".join(words[cut:]), added))
        sizes = [sum(p.numel() for p in own if p.requires_grad or not only) for only in (False, True)]
        if own:
            found.append(Part(name, *sizes, blocks))
    return found


def network(net: nn.Module, pattern: str) -> Figure:
    """Where LoRA sits: every part with its parameters, every linear layer with those that LoRA adds to it."""
    row, cells, width, gap = 0.3, 4, 9.0, 0.22  # inches a line, layers a line, inches a figure, between parts
    shown: list[tuple[Part, list[tuple[str, list]], float]] = []
    for part in parts(net):
        adapted = any(added for layers in part.blocks.values() for _, added in layers)
        blocks = part.blocks.items() if adapted else ()
        lines = [
            (block if not k else "", all_[k : k + cells]) for block, all_ in blocks for k in range(0, len(all_), cells)
        ]
        shown.append((part, lines, row * max(1, len(lines)) + 0.1))
    with matplotlib.rc_context(STYLE):
        height, top = sum(tall + gap for *_, tall in shown) + 0.7, 0.7
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        axes.text(0.1, 0.22, "Where LoRA sits", weight="bold", fontsize=11, va="center")
        axes.text(0.1, 0.48, textwrap.shorten(f"model.pattern = {pattern}", 110), fontsize=8, va="center")
        for number, (part, lines, tall) in enumerate(shown):
            _part(axes, part, lines, top, tall, row)
            if number:
                arrow = {"arrowstyle": "->", "ec": COLOURS["ink"]}
                axes.annotate("", (0.6, top), (0.6, top - gap), arrowprops=arrow)
            top += tall + gap
        return figure


def _part(axes: Axes, part: Part, lines: list[tuple[str, list]], top: float, tall: float, row: float) -> None:
    """A box of the network's drawing, `tall` inches from `top` down."""
    whole = part.trained == part.parameters
    face, edge = (COLOURS["line"], COLOURS["s2"]) if whole else (COLOURS["soft"], COLOURS["muted"])
    axes.add_patch(FancyBboxPatch((0.1, top), 8.8, tall, "round,pad=0,rounding_size=0.06", fc=face, ec=edge))
    says = "all trained" if whole else f"{part.trained:,} trained" if part.trained else "frozen"
    says += ", on the image and the maps of all parts above" if part.name == "head" else ""
    below = len(lines) > 1
    axes.text(0.2, top + 0.2, part.name, fontsize=9, weight="bold", va="center")
    at = (0.2, top + 0.44) if below else (2.5, top + 0.2)
    axes.text(*at, f"{part.parameters:,} parameters, {says}", fontsize=8, va="center")
    for k, (block, layers) in enumerate(lines):
        middle = top + 0.05 + row * (k + 0.5)
        axes.text(4.05, middle, block, fontsize=7, va="center", ha="right")
        for j, (layer, added) in enumerate(layers):
            left, label = 4.15 + 1.17 * j, f"{layer} +{added:,}" if added else layer
            face, ink = (COLOURS["s1"], COLOURS["soft"]) if added else ("none", COLOURS["ink"])
            axes.add_patch(Rectangle((left, middle - 0.12), 1.12, 0.24, fc=face, ec=COLOURS["muted"], lw=0.7))
            size, label = (7, label) if len(label) < 20 else (5, "\n.".join(label.rsplit(".", 1)))
            look = {"fontsize": size, "color": ink, "weight": "bold" if added else "normal", "linespacing": 1.1}
            axes.text(left + 0.56, middle, label, ha="center", va="center", **look)


def svg(figure: Figure, name: str, says: str) -> str:
    """The figure as an <svg> element: ids begin with `name`, colours are CSS variables, `says` describes it."""
    file = io.StringIO()
    with _quiet():
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"^.*?<svg [^>]*?viewBox=\"([\d. ]+)\"[^>]*>", r'<svg viewBox="\1">', file.getvalue(), flags=re.S)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    said = says.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1)


def write(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.svg and PATH.png, 200 dots an inch, on white. Atomic."""
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    for file in paths:
        with atomic(file) as partial, _quiet():
            figure.savefig(partial, format=file.suffix[1:], dpi=200, facecolor="white")
    return paths


@contextmanager
def _quiet():
    """In the style, and without a warning for each letter that the measuring font lacks."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _axes(width: float, height: float, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y)
