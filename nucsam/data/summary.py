"""What `nucsam inspect` prints and draws: the contents of a data set."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from nucsam.data import draw
from nucsam.data.folders import Record, format_size, scan_folder, taken
from nucsam.data.images import read_mpp
from nucsam.data.samples import by_region, image_remarks, read_each, read_sample
from nucsam.errors import UserError

EXAMPLES = 24  # images on the contact sheet
WIDTH = 80  # characters of a table

Contents = tuple[str, np.ndarray, float | None, float | None, str]


def _contents(record: Record) -> Contents:
    """Size, areas of the nuclei in px, vague area in percent, microns per pixel, and problem."""
    sample = read_sample(record)
    areas = np.bincount(sample.label.ravel())[1:]
    vague = None if sample.vague is None else 100 * sample.vague.mean()
    return format_size(sample.label.shape), areas, vague, read_mpp(record.image), sample.problem


def _row(organ: str, images: Sequence[tuple[Record, Contents]]) -> dict:
    sizes, areas, vague, mpp, _ = zip(*(contents for _, contents in images))
    nuclei = np.concatenate(areas)
    known = [percent for percent in vague if percent is not None]
    return {
        "organ": organ,
        "images": len(images),
        "groups": len({record.group for record, _ in images}),
        "nuclei": len(nuclei),
        "nuclei_per_image": len(nuclei) / len(images),
        "images_without": sum(len(area) == 0 for area in areas),
        "median_area_px": float(np.median(nuclei)) if len(nuclei) else None,
        "vague_percent": float(np.mean(known)) if known else None,
        "microns_per_px": sorted({value for value in mpp if value}),
        "sizes": dict(Counter(sizes).most_common()),
    }


def inspect_folder(
    root: str | Path,
    *,
    layout: str = "auto",
    group: str = "",
    region_class: str = "",
    connected: bool = False,
) -> dict:
    """Read a whole data set and count what is in it.

    Args:
        root, layout, group: as for `nucsam.data.find_records`.
        region_class: as of `nucsam.data.rois.Outlines`.
        connected: each connected component of a label map is a nucleus.

    Returns:
        A dict fit for JSON. `rows`: one per organ and a last one for all, with images, groups,
        nuclei, median nuclear area in px, vague area in percent of the images that have a mask,
        microns per pixel, and sizes. `layout`; `taken`: one line on what is taken. `bad`: every
        problem; unreadable images are not counted. `remarks`. `examples`: name, image path and
        label path of up to EXAMPLES images, taken round-robin from the organs; `example_regions`:
        class and number of the region of each.
    """
    scan = scan_folder(Path(root), layout, group)
    records = [replace(record, connected=connected) for record in scan.records]
    records, problems = by_region(records, region_class), scan.problems
    images, organs = [], defaultdict(list)
    for record, contents in zip(records, read_each(_contents, records, "Reading images")):
        if isinstance(contents, UserError):
            problems.append(str(contents))
        else:
            images.append((record, contents))
            organs[record.organ].append((record, contents))
            problems += filter(None, contents[-1:])
    rows = [_row(organ, pairs) for organ, pairs in organs.items()]
    if images:
        rows.append(_row("all", images))
    rounds = zip_longest(*organs.values())
    records = [pair[0] for turn in rounds for pair in turn if pair][:EXAMPLES]
    return {
        "root": str(root),
        "layout": scan.layout,
        "taken": taken(scan.records),
        "rows": rows,
        "bad": problems,
        "remarks": scan.remarks + image_remarks([record for record, _ in images]),
        "examples": [(record.name, str(record.image), str(record.label)) for record in records],
        "example_regions": [(record.region_class, record.region) for record in records],
    }


def draw_examples(summary: dict, path: Path) -> None:
    """Write a PNG of the summary's examples with the contours of their nuclei."""

    def outlined(example: tuple[str, ...], region: tuple) -> tuple[str, np.ndarray]:
        name, image, label = example
        sample = read_sample(Record(name, "", Path(image), Path(label), None, "", *region))
        return name, draw.contours(sample.image, sample.label)

    tiles = map(outlined, summary["examples"], summary["example_regions"])
    draw.contact_sheet(tiles, path)


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

    A column holds its longest word. What is left of WIDTH goes to those that would wrap, organs
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
