"""The gallery of a report: the worst, median and best images, each nucleus outlined by its outcome.

Outcomes are those of `nucsam.score.metrics.Score.outcomes`. Images are predicted again.
"""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nucsam.data import geojson
from nucsam.data.folders import Record
from nucsam.data.images import read_mpp
from nucsam.data.samples import read_sample
from nucsam.data.splits import find_split
from nucsam.errors import UserError
from nucsam.predict.models import load
from nucsam.predict.predictor import Predictor
from nucsam.report.facts import is_blank, told_apart
from nucsam.run.directory import RunRecord
from nucsam.score.metrics import OUTCOMES, Protocol, score_maps

PICTURE = 1536  # px: a larger image is shown smaller
TOLERANCE = 0.005  # of AJI, between the scores of a run and the image predicted again
SHAPES = {  # SVG path at the centre of a nucleus, for a size of 1 px; a matched nucleus has none
    "missed": "m-1-1l2 2m0-2l-2 2",
    "false": "m0-1.1l1.1 2h-2.2z",
    "split": "m0-1.2l1.2 1.2l-1.2 1.2l-1.2-1.2z",
    "merged": "m-1-1h2v2h-2z",
}


def picks(
    rows: Iterable[dict[str, Any]], every: bool = False
) -> list[tuple[str, int, dict[str, Any]]]:
    """The worst, median and best images by AJI: two of each, or one of each of fewer than nine.

    Args:
        rows: the images.
        every: also all others, of the kind "".

    Returns:
        (kind, rank, row) by rank; rank 1 has the lowest AJI. Two images have no median, and a
        single image is the worst. Images without a nucleus in either map come last.
    """
    ranked = sorted(rows, key=lambda row: (is_blank(row), row["aji"], row["name"]))
    if not ranked:
        return []
    count = len(told_apart(ranked))
    size = 2 if count >= 9 else 1
    firsts = {"median": (count - size) // 2, "best": count - size, "worst": 0}
    kinds = {first + k: kind for kind, first in firsts.items() for k in range(size)}
    shown = range(len(ranked)) if every else sorted(kinds)
    return [(kinds.get(index, ""), index + 1, ranked[index]) for index in shown]


def make_gallery(
    picked: Sequence[tuple[str, int, dict[str, Any]]], runs: Sequence[RunRecord], root: str
) -> list[dict[str, Any]]:
    """Predict and outline images.

    Args:
        picked: of `picks`.
        runs: the folds of one variant.
        root: folder of the images, if it has moved.

    Returns:
        A dict of `picture` per image, with an `id` on the page.

    Raises:
        UserError: weights or images are missing or damaged.
    """
    scored = {row["run"].folder: row["run"] for *_, row in picked}
    predictors = {folder: load(folder) for folder in scored}
    found = {folder: find_split(run.config.data, root)[0] for folder, run in scored.items()}
    records = {folder: {r.name: r for r in records} for folder, records in found.items()}
    pictures = []
    for number, (kind, rank, row) in enumerate(picked):
        folder = row["run"].folder
        record = records[folder].get(row["name"])
        if record is None:
            raise UserError(
                f"{root or row['run'].config.data.root}: found no image {row['name']}, on which "
                f"{folder} was scored"
            )
        place = {"id": f"image-{number}", "kind": kind, "rank": rank}
        pictures.append(place | picture(row, predictors[folder], record))
    return pictures


def picture(row: dict[str, Any], predictor: Predictor, record: Record) -> dict[str, Any]:
    """One image with its outlines.

    Args:
        row: of `RunRecord.rows`.
        predictor: of the row's run.
        record: the image with its label map.

    Returns:
        `row`; `width` and `height`, px; `jpeg` in base64; `layers` of the truth and the prediction;
        `aji` of the new prediction where it differs from the row's, else None; `sample` and `pred`.
    """
    from PIL import Image

    sample = read_sample(record)
    pred = sample.counted(predictor.predict(sample.image, mpp=read_mpp(record.image)))
    truth = sample.counted(sample.label)
    protocol = Protocol(**row["run"].scores["scores"][0]["protocol"])
    score = score_maps(truth, pred, vague=sample.vague, protocol=protocol)
    true_outcomes, outcomes = score.outcomes()
    file = io.BytesIO()
    shown = Image.fromarray(sample.image)
    shown.thumbnail((PICTURE, PICTURE))
    shown.save(file, format="JPEG", quality=88)
    height, width = sample.label.shape
    size = max(height, width) / 120
    return {
        "row": row,
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(file.getvalue()).decode(),
        "layers": {
            "truth": layers(truth, true_outcomes, size),
            "prediction": layers(pred, outcomes, size),
        },
        "aji": score.aji if abs(score.aji - row["aji"]) > TOLERANCE else None,
        "sample": sample,
        "pred": pred,
    }


def layers(label: np.ndarray, outcomes: dict[int, str], size: float) -> dict[str, dict[str, Any]]:
    """SVG paths of the nuclei with each outcome.

    Args:
        label: (H, W) int, 0 = background.
        outcomes: id -> outcome. A nucleus that is not scored has none and is left out.
        size: of a shape, px.

    Returns:
        Outcome -> `lines`, path data of the outlines; `marks`, path data of the shapes; `count`.
    """
    result: dict[str, dict[str, Any]] = {}
    for number, lines in outlines(label).items():
        if number not in outcomes:
            continue
        name = outcomes[number]
        layer = result.setdefault(name, {"lines": "", "marks": "", "count": 0})
        layer["count"] += 1
        for line in lines:
            points = " ".join(f"{x:g},{y:g}" for x, y in line[:-1].round(1))
            layer["lines"] += f"M{points}z"
        if name in SHAPES:
            x, y = max(lines, key=len)[:-1].mean(0)
            layer["marks"] += f"M{x:.1f} {y:.1f}{scaled(SHAPES[name], size)}"
    return {name: result[name] for name in OUTCOMES if name in result}


def outlines(label: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Id -> outlines of its pieces, each (n, 2) float, x and y in px from the image's corner.

    Args:
        label: (H, W) int, 0 = background.
    """
    from skimage.measure import approximate_polygon

    result = {}
    for number, shape in zip(np.unique(label[label > 0]).tolist(), geojson.geometries(label)):
        pieces = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
        rings = [np.array(ring, float) for rings in pieces for ring in rings]
        # a single pixel would become a line
        result[number] = [r if len(r) < 6 else approximate_polygon(r, 0.75) for r in rings]
    return result


def scaled(shape: str, size: float) -> str:
    """Path data of one of SHAPES, of `size` px."""
    return re.sub(r"-?\d+(\.\d+)?", lambda number: f" {float(number[0]) * size:.1f}", shape)
