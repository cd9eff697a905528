"""The gallery of a report: the worst, median and best images, their nuclei outlined by what became of them."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nucsam.metrics import OUTCOMES, Protocol, score
from nucsam.results import Trained

PICTURE = 1536  # px: a larger image is shown smaller
SHAPES = {  # at the centre of a nucleus, in units of its size; a matched one has none
    "missed": "m-1-1l2 2m0-2l-2 2",
    "false": "m0-1.1l1.1 2h-2.2z",
    "split": "m0-1.2l1.2 1.2l-1.2 1.2l-1.2-1.2z",
    "merged": "m-1-1h2v2h-2z",
}


def picks(rows: Iterable[dict[str, Any]]) -> list[tuple[str, int, dict[str, Any]]]:
    """(kind, rank from the lowest AJI, row): the two worst, median and best images, one of each of fewer than nine."""
    ranked = sorted((row for row in rows if row["aji"] is not None), key=lambda row: (row["aji"], row["name"]))
    n = len(ranked)
    each = 2 if n >= 9 else 1
    places = {
        "worst": range(each),
        "median": range((n - each) // 2, (n - each) // 2 + each),
        "best": range(n - each, n),
    }
    taken: dict[int, str] = {}
    for kind in ("worst", "best", "median"):  # of two images there is no median
        for place in places[kind]:
            taken.setdefault(max(0, place), kind) if n else None
    order = sorted(taken, key=lambda place: (list(places).index(taken[place]), place))
    return [(taken[place], place + 1, ranked[place]) for place in order]


def outlines(label: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Id -> its outlines, each (n, 2) x, y in px from the image's corner, of a label map (H, W)."""
    from scipy.ndimage import find_objects
    from skimage.measure import approximate_polygon, find_contours

    found = {}
    for number, window in enumerate(find_objects(label), 1):
        if window is not None:
            start = np.array([window[1].start, window[0].start]) - 0.5  # of the padding's pixel, from its centre
            lines = find_contours(np.pad(label[window] == number, 1).astype(np.float32), 0.5)
            found[number] = [approximate_polygon(line, 0.4)[:, ::-1] + start for line in lines]
    return found


def layers(label: np.ndarray, outcomes: dict[int, str], size: float) -> dict[str, dict[str, Any]]:
    """Outcome -> SVG path data of its nuclei's outlines and of shapes of `size` px, and their number."""
    found = {name: {"lines": [], "marks": [], "count": 0} for name in OUTCOMES}
    for number, lines in outlines(label).items():
        if number in outcomes:  # too small ones are removed before scoring
            layer, name = found[outcomes[number]], outcomes[number]
            layer["count"] += 1
            layer["lines"] += ["M" + " ".join(f"{x:g},{y:g}" for x, y in line[:-1].round(1)) + "z" for line in lines]
            if name in SHAPES:
                x, y = max(lines, key=len)[:-1].mean(0)
                layer["marks"].append(f"M{x:.1f} {y:.1f}{scaled(SHAPES[name], size)}")
    return {
        name: {"lines": "".join(layer["lines"]), "marks": "".join(layer["marks"]), "count": layer["count"]}
        for name, layer in found.items()
        if layer["count"]
    }


def scaled(shape: str, size: float) -> str:
    """Path data of one of SHAPES, of `size` px."""
    return re.sub(r"-?\d+(\.\d+)?", lambda number: f" {float(number[0]) * size:.1f}", shape)


def picture(kind: str, rank: int, row: dict[str, Any], predictor: Any, record: Any) -> dict[str, Any]:
    """What the page needs of one image of the gallery, predicted again."""
    from PIL import Image

    from nucsam.data import read_sample

    sample = read_sample(record)
    pred = predictor.predict(sample.image)
    rules = Protocol(**row["run"].scores["scores"][0]["protocol"])
    found = score(sample.label, pred, vague=sample.vague, protocol=rules)
    height, width = sample.label.shape
    file, shown = io.BytesIO(), Image.fromarray(sample.image)
    shown.thumbnail((PICTURE, PICTURE))
    shown.save(file, format="JPEG", quality=88)
    truth, predicted = found.outcomes()
    size = max(height, width) / 120
    return {
        "kind": kind,
        "rank": rank,
        "row": row,
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(file.getvalue()).decode(),
        "layers": {"truth": layers(sample.label, truth, size), "prediction": layers(pred, predicted, size)},
        "aji": found.aji if abs(found.aji - row["aji"]) > 0.005 else None,  # weights or images are others by now
        "sample": sample,
        "pred": pred,
    }


def opened(run: Trained, net: Any = None) -> Any:
    """The predictor of a run: of `net`, which the training has at hand, or of its best weights."""
    import torch

    from nucsam import checkpoint, scoring

    if net is not None:
        return scoring.predictor(net.eval(), run.config)
    net, config, _, metadata = checkpoint.open_run(run.folder)
    on_gpu, precision = scoring.uses_gpu(), metadata.get("precision", "no")
    predictor = scoring.predictor(net.to("cuda" if on_gpu else "cpu"), config)
    predictor.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16 if on_gpu else None}.get(precision)
    return predictor


def gallery(picked: Sequence[tuple], runs: Sequence[Trained], net: Any, root: str) -> tuple[list[dict], Any]:
    """The pictures of `picks`, and a network of the runs. ValueError or OSError where weights or images are missing."""
    from nucsam import scoring

    wanted = {row["run"].folder: row["run"] for *_, row in picked} or {runs[0].folder: runs[0]}
    predictors = {folder: opened(run, net) for folder, run in wanted.items()}
    made = []
    for number, (kind, rank, row) in enumerate(picked):
        run = row["run"]
        records, _ = scoring.find_images(replace(run.config.data, root=root or run.config.data.root))
        found = [record for record in records if record.name == row["name"]]
        if not found:
            where = root or run.config.data.root
            raise ValueError(f"{where}: found no image {row['name']}, on which {run.folder} was scored")
        made.append({"id": f"image-{number}", **picture(kind, rank, row, predictors[run.folder], found[0])})
    return made, next(iter(predictors.values())).model
