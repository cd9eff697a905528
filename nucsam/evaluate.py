"""Label maps -> scores: files matched by stem, scored by one protocol, summed up over images and organs.

    find_pairs -> score_pair, a row an image -> summarise -> summary_table, organ_table, write_json, write_csv

A row is a plain dict: `name`, `organ`, `warnings` and everything that `Score.as_dict` gives, so rows read back
from JSON sum up as well as fresh ones.
"""

import csv
import io
import json
import math
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nucsam.atomic import atomic
from nucsam.metrics import METRICS, Protocol, Score, pool, protocol_named, score

AGGREGATES = {  # each answers another question; they differ by points
    "mean": "image mean",
    "std": "image std",
    "low": "95 % from",
    "high": "95 % to",
    "pooled": "pooled",
    "weighted": "by nuclei",
}
MAIN = ("dice", "aji", "aji_plus", "dq", "sq", "pq")  # of the table of organs, which must fit a terminal of 80 columns
COLUMNS = {  # F1 is DQ
    "dice": "Dice",
    "dice2": "Dice2",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "dq": "DQ=F1",
    "sq": "SQ",
    "pq": "PQ",
    "precision": "Prec.",
    "recall": "Rec.",
    "map": "mSA",
}


@dataclass(frozen=True)
class Pair:
    """The files of one image; `name` is the stem, or `ORGAN_STEM` where sub-folders share a stem."""

    name: str
    organ: str
    truth: Path
    pred: Path
    vague: Path | None


# ---- files ----


def _label_files(folder: str | Path, suffixes: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Name -> (sub-folder, file) for the files in a folder and in its sub-folders, which are organs."""
    from nucsam.data import visible

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of label maps")
    organs = [("", folder), *((child.name, child) for child in visible(folder) if child.is_dir())]
    found = [
        (organ, path)
        for organ, place in organs
        for path in visible(place)
        if path.is_file() and path.suffix.lower() in suffixes
    ]
    if not found:
        raise ValueError(f"{folder}: found no {', '.join(suffixes)} file in it or in its sub-folders")
    stems = Counter(path.stem for _, path in found)
    names = [(f"{organ}_{path.stem}" if organ and stems[path.stem] > 1 else path.stem) for organ, path in found]
    files = Counter(names)
    repeated = [str(path) for name, (_, path) in zip(names, found) if files[name] > 1]
    if repeated:
        raise ValueError(f"{folder}: found several files for one image: {', '.join(repeated)}")
    return dict(zip(names, found))


def _aliases(files: dict[str, tuple[str, Path]]) -> dict[str, str]:
    """Name or ORGAN_STEM -> name: the other folder may need the organ where this one does not."""
    return {f"{organ}_{path.stem}": name for name, (organ, path) in files.items()} | {name: name for name in files}


def _truth_files(folder: str | Path) -> dict[str, tuple[str, Path, Path | None]]:
    """Name -> (organ, label file, vague file) of a data set as `nucsam train` takes it, or of label maps."""
    from nucsam.data import LABELS, find_records

    folder = Path(folder)
    if any((folder / kind).is_dir() for kind in ("labels", "annotations")) or any(folder.glob("*/label masks*")):
        return {record.name: (record.organ, record.label, record.vague) for record in find_records(folder)}
    return {name: (organ, path, None) for name, (organ, path) in _label_files(folder, LABELS).items()}


def find_pairs(
    truth: str | Path, pred: str | Path, vague: str | Path | None = None, *, organ: str = ""
) -> tuple[list[Pair], list[str], list[str]]:
    """Pairs of files with the same stem, names without a prediction, and predictions without a truth.

    truth: folder of .tif, .tiff, .png or .npy label maps, flat or with a sub-folder for each organ; or a data set
        in NuInsSeg's or the plain layout, whose vague areas are used then; outlines of `annotations` are taken to be of
        an image of the prediction's size.
    pred: folder of label maps, flat or with sub-folders. vague: folder of masks, nonzero = vague.
    organ: regular expression whose first group (or match), searched in the name, is the organ.

    Raises ValueError where a folder is missing or empty, files clash, or no names match.
    """
    from nucsam.data import IMAGES, LABELS

    try:
        pattern = re.compile(organ)
    except re.error as error:
        raise ValueError(f"organ: found {organ!r}, expected a regular expression ({error})") from error
    truths, predictions = _truth_files(truth), _label_files(pred, LABELS)
    vagues = _label_files(vague, tuple({*IMAGES, *LABELS})) if vague else {}
    predicted, unsure = _aliases(predictions), _aliases(vagues)
    missing = sorted(truths.keys() - predicted.keys())
    extra = sorted(predictions.keys() - {predicted.get(name) for name in truths})
    if len(missing) == len(truths):
        found = f"found {_some(extra)}, expected {_some(missing)}"
        raise ValueError(f"no file of {pred} has the stem of one in {truth}: {found}")
    pairs = []
    for name in sorted(truths.keys() & predicted.keys()):
        place, path, own_vague = truths[name]
        match = pattern.search(name) if organ else None
        place = match[pattern.groups > 0] if match else place
        own_vague = vagues[unsure[name]][1] if name in unsure else own_vague
        pairs.append(Pair(name, place, path, predictions[predicted[name]][1], own_vague))
    return pairs, missing, extra


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_vague(path: str | Path) -> np.ndarray:
    """bool (H, W): the nonzero pixels of a mask file of any kind that `nucsam.data` reads."""
    from nucsam.data import read_image, read_label

    return read_label(path) != 0 if Path(path).suffix.lower() == ".npy" else read_image(path).any(axis=-1)


# ---- rows ----


def row(name: str, organ: str, found: Score, warned: Sequence[str] = ()) -> dict:
    """One image as a plain dict."""
    return {"name": name, "organ": organ, "warnings": list(warned), **found.as_dict()}


def score_pair(pair: Pair, protocols: Sequence[Protocol], connected: bool = False) -> list[dict]:
    """A row of one image for each protocol. ValueError, with the files' names, where they cannot be scored."""
    from nucsam.data import read_label, read_nuclei

    pred = read_label(pair.pred)
    truth = read_nuclei(pair.truth, pred.shape)
    vague = read_vague(pair.vague) if pair.vague else None
    rows = []
    for protocol in protocols:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = score(truth, pred, vague=vague, protocol=protocol, connected=connected)
            except ValueError as error:
                raise ValueError(f"{pair.pred} against {pair.truth}: {error}") from error
        rows.append(row(pair.name, pair.organ, found, [f"{pair.name}: {w.message}" for w in caught]))
    return rows


def _attempt(job: tuple[Pair, Sequence[Protocol], bool]) -> list[dict] | ValueError:
    try:
        return score_pair(*job)
    except ValueError as error:  # so that one run names every bad file
        return error


def protocols_for(
    protocol: str, *, vague: bool = False, iou: float | None = None, at_least: bool = False, zone: int | None = None
) -> list[Protocol]:
    """The named protocol and, with vague areas, its variant without them; the other arguments change rules.

    iou: matching threshold, 0 to 1. at_least: match at IoU >= iou rather than >. zone: `zone_width` in px.
    """
    named = protocol_named(protocol)
    found = [named] + ([protocol_named(named.without_vague)] if vague and named.without_vague else [])
    changes = {"iou": iou, "strict": False if at_least else None, "zone_width": zone}
    changes = {rule: value for rule, value in changes.items() if value is not None}
    return [replace(p, name=f"{p.name} (changed)", **changes) if changes else p for p in found]


def score_folders(
    truth: str | Path,
    pred: str | Path,
    *,
    vague: str | Path | None = None,
    protocol: str = "nuinsseg",
    iou: float | None = None,
    at_least: bool = False,
    zone: int | None = None,
    connected: bool = False,
    organ: str = "",
    workers: int = 0,
    progress: bool = True,
) -> dict:
    """Score a folder of predicted label maps against a folder of true ones; see `find_pairs` and `protocols_for`.

    workers: processes; 0 = one for each core, 8 at most, and one only for a few images.

    Returns {"scores": [one `scored` dict for each protocol], "missing": names, "extra": names, "warnings": texts}.
    Raises one ValueError that names every file that cannot be scored.
    """
    pairs, missing, extra = find_pairs(truth, pred, vague, organ=organ)
    protocols = protocols_for(protocol, vague=any(pair.vague for pair in pairs), iou=iou, at_least=at_least, zone=zone)
    if workers < 0:
        raise ValueError(f"workers: found {workers}, expected 0 or more")
    workers = workers or min(os.cpu_count() or 1, 8, 1 + len(pairs) // 16)
    jobs = [(pair, protocols, connected) for pair in pairs]
    results = list(_each(_attempt, jobs, workers, "Scoring", progress))
    bad = [str(result) for result in results if isinstance(result, ValueError)]
    if bad:
        raise ValueError(f"{len(bad)} of {len(pairs)} images cannot be scored:\n" + "\n".join(bad))
    by_protocol = [scored(list(rows), p) for rows, p in zip(zip(*results), protocols)]
    warned = [warning for rows in results for warning in rows[0]["warnings"]]
    return {"scores": by_protocol, "missing": missing, "extra": extra, "warnings": warned}


def _each(function: Callable, items: Sequence, workers: int, title: str, progress: bool) -> Iterator:
    """The result of each item, in order, from processes; a progress bar once it takes over two seconds."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f}/s")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    start, console = time.perf_counter(), Console(stderr=True)  # standard output is for the scores
    progress &= console.is_terminal or console.is_jupyter  # into a file, rich writes an empty line
    bar = Progress(*columns, console=console, transient=True, disable=not progress)
    task = bar.add_task(title, total=len(items), rate=0.0)
    # a forked child of a process with threads, such as the bar's, may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    chunk = max(1, len(items) // (8 * workers))
    try:
        results = executor.map(function, items, chunksize=chunk) if executor else map(function, items)
        for done, result in enumerate(results, 1):
            yield result
            seconds = time.perf_counter() - start
            bar.update(task, advance=1, rate=done / seconds)
            if seconds > 2 and not bar.live.is_started:
                bar.start()
    finally:
        if bar.live.is_started:
            bar.stop()
        if executor:
            executor.shutdown(cancel_futures=True)


# ---- sums ----


def _matrix(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(images, metrics) values and (images,) numbers of true nuclei of the rows in which the metrics are defined."""
    values = np.array([[math.nan if r[m] is None else r[m] for m in METRICS] for r in rows], float)
    values = values.reshape(-1, len(METRICS))
    defined = ~np.isnan(values).any(axis=1)
    return values[defined], np.array([r["n_truth"] for r in rows], float)[defined]


def means(rows: Sequence[dict]) -> dict[str, float]:
    """Mean over images of each metric, 0 to 1, over the images where it is defined; NaN without any."""
    values, _ = _matrix(rows)
    return dict(zip(METRICS, values.mean(axis=0).tolist() if len(values) else [math.nan] * len(METRICS)))


def pooled(rows: Iterable[dict], protocol: Protocol) -> dict[str, float]:
    """Each metric from the summed counts of all images (CoNIC's mPQ+, Kirillov's PQ)."""
    scores = [Score(protocol, **{**r["counts"], "ap_tp": tuple(r["counts"]["ap_tp"])}) for r in rows]
    total = pool(scores, protocol)
    return {metric: getattr(total, metric) for metric in METRICS}


def _group(rows: Sequence[dict], protocol: Protocol) -> dict:
    numbers = {
        "images": len(rows),
        "nuclei": sum(r["n_truth"] for r in rows),
        "predicted": sum(r["n_pred"] for r in rows),
        "both_empty": sum(r["both_empty"] for r in rows),
    }
    return {**numbers, "mean": means(rows), "pooled": pooled(rows, protocol)}


def summarise(rows: Sequence[dict], protocol: Protocol, *, draws: int = 2000, seed: int = 0) -> dict:
    """All aggregates of AGGREGATES over images, 0 to 1, numbers of images and nuclei, and the same by organ.

    std is the sample standard deviation over images. low and high are the 2.5 and 97.5 percentiles of the mean
    per image over `draws` bootstrap samples of the images (Efron's percentile interval). Images in which the
    metrics are undefined are left out of all but the pooled numbers, and `both_empty` counts them.
    """
    values, nuclei = _matrix(rows)
    n = len(values)
    undefined = np.full(len(METRICS), math.nan)
    low = high = std = weighted = undefined
    if n:
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
        low, high = np.percentile(counts @ values / n, (2.5, 97.5), axis=0)
        weighted = nuclei @ values / nuclei.sum() if nuclei.any() else undefined
        std = values.std(axis=0, ddof=1) if n > 1 else undefined
    spread = {"std": std, "low": low, "high": high, "weighted": weighted}
    organs = sorted({r["organ"] for r in rows})
    return {
        **_group(rows, protocol),
        **{name: dict(zip(METRICS, numbers.tolist())) for name, numbers in spread.items()},
        "organs": {o: _group([r for r in rows if r["organ"] == o], protocol) for o in organs if o},
    }


def scored(rows: Sequence[dict], protocol: Protocol) -> dict:
    """Rows with their protocol and summary: what tables and files are made of."""
    summary = summarise(rows, protocol)
    return {"protocol": asdict(protocol), "rules": protocol.rules, "summary": summary, "images": list(rows)}


# ---- tables and files ----


def _percent(values: dict[str, float], metrics: Iterable[str]) -> list[str]:
    return ["-" if math.isnan(values[m]) else f"{100 * values[m]:.1f}" for m in metrics]


def _table(title: str, first: Sequence[str], metrics: Iterable[str], caption: str):
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column(first[0], overflow="fold")
    for column in (*first[1:], *(COLUMNS[m] for m in metrics)):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _both_empty(summary: dict) -> str:
    return f"percent; both maps empty in {summary['both_empty']} of {summary['images']} images"


def summary_table(result: dict):
    """A rich Table of a `scored` dict, in percent: every aggregate over all images."""
    summary = result["summary"]
    numbers = f"{summary['nuclei']} nuclei, {summary['predicted']} predicted"
    table = _table(result["rules"], ["all images"], COLUMNS, f"{_both_empty(summary)}; {numbers}")
    for name, title in AGGREGATES.items():
        table.add_row(title, *_percent(summary[name], COLUMNS))
    return table


def organ_table(result: dict):
    """A rich Table of a `scored` dict, in percent: the mean per image of each organ and of all images, main metrics."""
    summary = result["summary"]
    table = _table(result["rules"], ["image mean", "images", "nuclei"], MAIN, _both_empty(summary))
    for name, group in {**summary["organs"], "all": summary}.items():
        table.add_row(name, str(group["images"]), str(group["nuclei"]), *_percent(group["mean"], MAIN))
    return table


def remarks(results: dict) -> list[str]:
    """What `score_folders` left out or warned of, one sentence each, for a person."""
    images = len(results["scores"][0]["images"])
    kinds = {"missing": "true label maps without a prediction", "extra": "predictions without a true label map"}
    left_out = [
        f"{len(results[key])} {kind} are not scored, beside {images} images that are: {_some(results[key], 20)}"
        for key, kind in kinds.items()
        if results[key]
    ]
    return left_out + results["warnings"]


def to_json(results: dict) -> str:
    """What `score_folders` returned, every image with its raw counts; NaN is null."""
    return json.dumps(_plain(results), indent=1, allow_nan=False)


def write_json(path: str | Path, results: dict) -> None:
    """`to_json` as a file, or what was there before."""
    _write(Path(path), to_json(results) + "\n")


def _write(path: Path, text: str) -> None:
    """As `atomic.write_text`, but that a pipe or device, also behind a link, is written to as it is."""
    as_it_is = path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir())
    with nullcontext(path) if as_it_is else atomic(path) as file:
        file.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")  # names of any bytes


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_csv(path: str | Path, results: dict) -> None:
    """A line for each image and protocol: metrics (0 to 1, empty where undefined) and raw counts. Atomic."""
    lines = []
    for result in results["scores"]:
        for r in result["images"]:
            counts = {name: value for name, value in r["counts"].items() if name != "ap_tp"}
            ap = {f"ap{50 + 5 * k}": value for k, value in enumerate(r["ap"])}
            numbers = {m: r[m] for m in METRICS} | ap | {key: r[key] for key in ("n_truth", "n_pred")} | counts
            named = {"name": r["name"], "organ": r["organ"], "protocol": result["protocol"]["name"]}
            lines.append({**named, **_plain(numbers)})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    _write(Path(path), file.getvalue())
