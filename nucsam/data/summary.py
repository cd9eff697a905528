"""What `nucsam inspect` prints and draws: the contents of a data set."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nucsam.data import draw
from nucsam.data.folders import Record, describe_records, format_size, scan_folder
from nucsam.data.images import read_metadata
from nucsam.data.labels import areas
from nucsam.data.samples import by_region, read_each, read_sample, summed_remarks
from nucsam.errors import UserError

EXAMPLES = 24  # images on the contact sheet
WIDTH = 80  # characters of a table


class Contents(NamedTuple):
    """What one image and its label hold."""

    size: str
    areas: np.ndarray  # of the nuclei, px
    vague: float | None  # percent of the image; None without a mask
    mpp: float | None
    remarks: list[str]
    problem: str


def _contents(record: Record) -> Contents:
    sample = read_sample(record)
    vague = None if sample.vague is None else 100 * sample.vague.mean()
    size = format_size(sample.label.shape)
    return Contents(size, areas(sample.label), vague, *read_metadata(record.image), sample.problem)


def _row(organ: str, images: Sequence[tuple[Record, Contents]]) -> dict:
    nuclei = np.concatenate([contents.areas for _, contents in images])
    known = [contents.vague for _, contents in images if contents.vague is not None]
    return {
        "organ": organ,
        "images": len(images),
        "groups": len({record.group for record, _ in images}),
        "nuclei": len(nuclei),
        "nuclei_per_image": len(nuclei) / len(images),
        "images_without": sum(len(contents.areas) == 0 for _, contents in images),
        "median_area_px": float(np.median(nuclei)) if len(nuclei) else None,
        "vague_percent": float(np.mean(known)) if known else None,
        "microns_per_px": sorted({contents.mpp for _, contents in images if contents.mpp}),
        "sizes": dict(Counter(contents.size for _, contents in images).most_common()),
    }


def inspect_folder(
    root: str | Path,
    *,
    layout: str = "auto",
    group: str = "",
    region_class: str = "",
    connected: bool = False,
) -> tuple[dict, list[Record]]:
    """Read a whole data set and count what is in it.

    Args:
        root, layout, group: as for `nucsam.data.find_records`.
        region_class: as in `nucsam.data.rois.Outlines`.
        connected: each connected component of a label map is a nucleus.

    Returns:
        A dict fit for JSON. `rows`: one per organ and a last one for all, with images, groups,
        nuclei, median nuclear area in px, vague area in percent of the images that have a mask,
        microns per pixel, and sizes. `layout`; `taken`: one line on what is taken. `bad`: every
        problem; unreadable images are not counted. `remarks`. Then up to EXAMPLES images, taken
        round-robin from the organs.
    """
    scan = scan_folder(Path(root), layout, group)
    records, problems = by_region(scan.records, region_class, connected), scan.problems
    images, organs = [], defaultdict(list)
    for record, contents in zip(records, read_each(_contents, records, "Reading images")):
        if isinstance(contents, UserError):
            problems.append(str(contents))
        else:
            images.append((record, contents))
            organs[record.organ].append((record, contents))
            problems += filter(None, [contents.problem])
    rows = [_row(organ, pairs) for organ, pairs in organs.items()]
    if images:
        rows.append(_row("all", images))
    rounds = zip_longest(*organs.values())
    examples = [pair[0] for turn in rounds for pair in turn if pair][:EXAMPLES]
    remarks = [(record.image, contents.remarks) for record, contents in images]
    summary = {
        "root": str(root),
        "layout": scan.layout,
        "taken": describe_records(scan.records),
        "rows": rows,
        "bad": problems,
        "remarks": scan.remarks + summed_remarks(remarks),
    }
    return summary, examples


def draw_examples(examples: Iterable[Record], path: Path) -> None:
    """Write a PNG of images with the contours of their nuclei."""

    def outlined(record: Record) -> tuple[str, np.ndarray]:
        sample = read_sample(record)
        return record.name, draw.contours(sample.image, sample.label)

    draw.contact_sheet(map(outlined, examples), path)


# Heading of the table -> key of a row. `empty` counts images without a nucleus; the area is the
# median.
COLUMNS = {
    "organ": "organ",
    "images": "images",
    "groups": "groups",
    "nuclei": "nuclei",
    "per image": "nuclei_per_image",
    "empty": "images_without",
    "area px": "median_area_px",
    "vague %": "vague_percent",
    "µm/px": "microns_per_px",
    "size px": "sizes",
}


def _range(values: list, unit: str = "") -> str:
    """Ascending values in a few words."""
    if len(values) < 3:
        return " and ".join(values) or "-"
    return f"{values[0]} to {values[-1]}, {len(values)} {unit}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # WIDTHxHEIGHT -> images
        ascending = sorted(value, key=lambda size: [int(side) for side in size.split("x")])
        return _range(ascending, "sizes")
    if isinstance(value, list):
        return _range([f"{number:.3g}" for number in value], "values")
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return str(value)


def _widths(columns: dict[str, list[str]]) -> tuple[dict[str, int], int]:
    """Width of each column, by heading, and the gap between two, in characters.

    A column holds its longest word. The rest of WIDTH goes to those that would wrap, organs
    first.
    """
    texts = {heading: [heading, *cells] for heading, cells in columns.items()}
    widths = {heading: max(map(len, " ".join(text).split())) for heading, text in texts.items()}
    spare = WIDTH - sum(widths.values()) - len(widths)
    gap = 1 if spare >= len(widths) else 0
    spare -= gap * len(widths)
    for heading in sorted(widths, key=lambda heading: heading != "organ"):
        more = min(max(map(len, texts[heading])) - widths[heading], max(0, spare))
        widths[heading] += more
        spare -= more
    return widths, gap


def summary_table(summary: dict):
    """The rows of a summary as a rich Table for 80 columns, without its problems and remarks.

    A column without a value is left out, and so is the one of groups where each image is its own.
    """
    from rich import box
    from rich.table import Table

    rows = summary["rows"]
    if len(rows) == 2:  # one organ and the same as all
        rows = [rows[0] | {"organ": rows[0]["organ"] or "all"}]
    columns = {heading: [_cell(row[key]) for row in rows] for heading, key in COLUMNS.items()}
    if all(row["groups"] == row["images"] for row in rows):
        del columns["groups"]
    columns = {heading: cells for heading, cells in columns.items() if {*cells} - {"-"}}
    widths, gap = _widths(columns)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for heading, width in widths.items():
        justify = "left" if heading in ("organ", "size px") else "right"
        table.add_column(heading, justify=justify, width=width)
    for cells in zip(*columns.values()):
        table.add_row(*cells)
    return table
