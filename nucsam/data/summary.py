"""What `nucsam inspect` prints and draws: the contents of a data set."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from nucsam.data import draw
from nucsam.data.folders import Record, Scan, format_size
from nucsam.data.images import read_image, read_mpp
from nucsam.data.samples import read_each, read_nuclei, read_sample
from nucsam.errors import UserError

EXAMPLES = 24  # images on the contact sheet


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
    root: str | Path, *, layout: str = "auto", group: str = "", connected: bool = False
) -> dict:
    """Read a whole data set and count what is in it.

    Args:
        root, layout, group: as for `nucsam.data.find_records`.
        connected: each connected component of a label is a nucleus.

    Returns:
        A dict fit for JSON. `rows`: one per organ and a last one for all, with images, groups,
        nuclei, median nuclear area in px, vague area in percent of the images that have a mask,
        microns per pixel, and sizes. `bad`: every problem; unreadable images are not counted.
        `remarks`. `examples`: name, image path and label path of up to EXAMPLES images, taken
        round-robin from the organs.
    """
    scan = Scan(Path(root), layout, group)
    records = [replace(record, connected=connected) for record in scan.records]
    problems = scan.problems
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
        "rows": rows,
        "bad": problems,
        "remarks": scan.remarks,
        "examples": [(record.name, str(record.image), str(record.label)) for record in records],
    }


def draw_examples(summary: dict, path: Path) -> None:
    """Write a PNG of the summary's examples with the contours of their nuclei."""

    def outlined(image_path: str, label_path: str) -> np.ndarray:
        image = read_image(image_path)
        return draw.contours(image, read_nuclei(Path(label_path), image.shape[:2]))

    tiles = ((name, outlined(image, label)) for name, image, label in summary["examples"])
    draw.contact_sheet(tiles, path)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count})" for key, count in value.items())
    if isinstance(value, list):
        return ", ".join(f"{number:.3g}" for number in value) or "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def summary_table(summary: dict):
    """The rows of a summary as a rich Table, without its problems and remarks."""
    from rich.table import Table

    table = Table(title=summary["root"])
    for name in summary["rows"][0] if summary["rows"] else ():
        justify = "left" if name in ("organ", "sizes") else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")
    for row in summary["rows"]:
        table.add_row(*map(_cell, row.values()))
    return table
