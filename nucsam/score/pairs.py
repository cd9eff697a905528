"""Folders of label maps, of any tool: files matched by stem and scored."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nucsam.config import compiled
from nucsam.data import folders
from nucsam.data.images import IMAGES, LABELS, read_label
from nucsam.data.samples import attempt, read_nuclei, read_vague
from nucsam.errors import UserError
from nucsam.files import shortened
from nucsam.progress import with_bar
from nucsam.score.metrics import Protocol, protocol_named, score_maps
from nucsam.score.tables import image_row, scored


@dataclass(frozen=True)
class Pair:
    """The files of one image; `name` is the stem, or `ORGAN_STEM` where organs share a stem."""

    name: str
    organ: str
    truth: Path
    pred: Path
    vague: Path | None


class _File(NamedTuple):
    organ: str
    stem: str
    path: Path
    vague: Path | None = None

    @property
    def long_name(self) -> str:
        return f"{self.organ}_{self.stem}"


def _label_files(folder: Path, suffixes: Sequence[str]) -> dict[str, _File]:
    """Name -> file, of a folder and of its sub-folders, which are organs; `OVERLAYS` is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of label maps")
    problems: list[str] = []
    files: list[_File] = []
    inside = folders.list_folder(folder, folders_only=True)
    for place in (folder, *(path for path in inside if path.name != folders.OVERLAYS)):
        paths = [path for path in folders.list_folder(place) if not _is_no_label(path)]
        by_stem = folders.files_by_stem(paths, suffixes, problems)
        organ = "" if place is folder else place.name
        files += [_File(organ, stem, path) for stem, path in by_stem.items()]
    if not files:
        kinds = ", ".join(suffixes)
        raise UserError(f"{folder}: found no {kinds} file in it or in its sub-folders")
    stems = Counter(file.stem for file in files)
    by_name: dict[str, _File] = {}
    for file in files:
        name = file.long_name if file.organ and stems[file.stem] > 1 else file.stem
        first = by_name.setdefault(name, file)
        if first is not file:
            problems.append(f"{file.path}: found the image of {first.path} again")
    folders.raise_problems(folder, problems)
    return by_name


def _is_no_label(path: Path) -> bool:
    """Whether a file is one of those that nucsam predict writes beside its outlines."""
    return path.name == folders.PREDICTIONS or path.name.endswith(".tissue.geojson")


def _by_any_name(files: dict[str, _File]) -> dict[str, _File]:
    """Files by name, by ORGAN_STEM, which the other folder may use, and without `_masks`."""
    bare = {name: folders.bare_stem(name) for name in files}
    alike = Counter(bare.values())
    short = {bare[name]: file for name, file in files.items() if alike[bare[name]] == 1}
    return short | {file.long_name: file for file in files.values()} | files


def _organs(files: Mapping[str, _File]) -> set[str]:
    return {file.organ for file in files.values()} - {""}


def _differ(a: _File, b: _File, organs: set[str]) -> bool:
    """Whether files of one stem are of two organs.

    False if one lies in no organ's folder, or if neither organ is among `organs`, the names that
    both trees have: tools may name their folders differently.
    """
    return bool(a.organ and b.organ and a.organ != b.organ and organs & {a.organ, b.organ})


def _truth_files(folder: Path) -> dict[str, _File]:
    """Name -> file, of a data set as `nucsam train` takes it or of a folder of label maps."""
    predicted = (folder / folders.PREDICTIONS).is_file()  # with outlines of its label maps
    if not predicted and folders.is_data_set(folder):
        records = folders.find_records(folder)
        return {r.name: _File(r.organ, r.name, r.label, r.vague) for r in records}
    places = (folder, *folders.list_folder(folder, folders_only=True))
    files = (path for place in places for path in folders.list_folder(place))
    maps = any(path.suffix.lower() in LABELS for path in files)
    return _label_files(folder, LABELS if maps else folders.KNOWN_LABELS)


def find_pairs(
    truth: str | Path, pred: str | Path, vague: str | Path | None = None, *, organ: str = ""
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair the files that have the same stem, or the same without `_masks` and the like.

    Args:
        truth: folder of .tif, .tiff, .png or .npy label maps, or without any of .mat files or
            outlines, flat or with a sub-folder for each organ; or a data set, with its vague areas.
            Outlines are taken to be of an image of the prediction's size.
        pred: folder of label maps, flat or with sub-folders.
        vague: folder of image files, nonzero = vague.
        organ: regular expression searched in the name; its first group, or else the whole match,
            is the organ.

    Returns:
        The pairs, names of truths without a prediction, and names of predictions without a truth.

    Raises:
        UserError: a folder is missing or empty, files clash, or no names match.
    """
    pattern = compiled("organ", organ)
    truths, predictions = _truth_files(Path(truth)), _label_files(Path(pred), LABELS)
    masks = _label_files(Path(vague), IMAGES) if vague else {}
    predicted, unsure = _by_any_name(predictions), _by_any_name(masks)
    organs = _organs(truths) & _organs(predictions)
    places = _organs(truths) & _organs(masks)
    pairs, missing, problems = [], [], []
    used: dict[_File, Path] = {}
    for name, file in sorted(truths.items()):
        bare = folders.bare_stem(name)
        found = predicted.get(name) or (None if bare in truths else predicted.get(bare))
        if found is None or _differ(file, found, organs):
            name = file.long_name if found else name
            found = predicted.get(file.long_name)
        if found is None:
            missing.append(name)
            continue
        first = used.setdefault(found, file.path)
        if first is not file.path:
            problems.append(f"{file.path}: found {first} for {found.path.name} too, expected one")
        place = folders.first_group(pattern, name) or file.organ
        mask = unsure.get(name)
        own = mask and not _differ(file, mask, places)
        pairs.append(Pair(name, place, file.path, found.path, mask.path if own else file.vague))
    folders.raise_problems(truth, problems)
    others = {name: file for name, file in predictions.items() if file not in used}
    extra = sorted(
        f.long_name if f.organ and name in truths else name for name, f in others.items()
    )
    if not pairs:
        names = f"found {shortened(extra)}, expected {shortened(missing)}"
        raise UserError(f"no file of {pred} has the stem of one in {truth}: {names}")
    return pairs, sorted(missing), extra


def score_pair(
    pair: Pair, protocols: Sequence[Protocol], connected: bool = False, region_class: str = ""
) -> list[dict]:
    """A row of one image for each protocol.

    Nothing counts where nobody annotated.

    Raises:
        UserError: the files cannot be read or scored; names them.
    """
    pred = read_label(pair.pred)
    truth, rest, _ = read_nuclei(pair.truth, pred.shape, region_class)
    vague = read_vague(pair.vague, pred.shape, pair.pred)
    if rest is not None:  # as in `samples.Sample.counted`
        vague = rest if vague is None else rest | vague
        truth, pred = np.where(vague, 0, truth), np.where(vague, 0, pred)
    rows = []
    for protocol in protocols:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                score = score_maps(truth, pred, vague=vague, protocol=protocol, connected=connected)
            except UserError as error:
                raise UserError(f"{pair.pred} against {pair.truth}: {error}") from error
        ours = [warning.message for warning in caught if warning.category is UserWarning]
        warned = [f"{pair.name}: {message}" for message in ours]
        rows.append(image_row(pair.name, pair.organ, score, warned))
    return rows


def protocols_for(
    protocol: str = "nuinsseg", *, vague: bool = False, **changes: Any
) -> list[Protocol]:
    """The named protocol and, where vague areas are known, its variant without them.

    Args:
        protocol: name in PROTOCOLS.
        vague: whether vague areas are known.
        changes: fields of `Protocol` instead of the protocol's own; None changes nothing.

    Raises:
        UserError: there is no such protocol, or a number is out of range.
    """
    protocols = [protocol_named(protocol)]
    if vague and protocols[0].without_vague:
        protocols.append(protocol_named(protocols[0].without_vague))
    changes = {rule: value for rule, value in changes.items() if value is not None}
    if not changes:
        return protocols
    return [replace(rules, name=f"{rules.name} (changed)", **changes) for rules in protocols]


def score_folders(
    truth: str | Path,
    pred: str | Path,
    *,
    vague: str | Path | None = None,
    protocol: str = "nuinsseg",
    connected: bool = False,
    organ: str = "",
    region_class: str = "",
    workers: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Score a folder of predicted label maps against a folder of true ones.

    Args:
        truth, pred, vague, organ: as in `find_pairs`.
        protocol, changes: as in `protocols_for`.
        connected: as in `score_maps`.
        region_class: as in `nucsam.data.rois.Outlines`.
        workers: processes; 0 = one for each core, at most 8, and only one for a few images.

    Returns:
        {"scores": [a `scored` dict for each protocol], "missing": names, "extra": names,
        "warnings": texts}

    Raises:
        UserError: names every file that cannot be scored.
    """
    pairs, missing, extra = find_pairs(truth, pred, vague, organ=organ)
    protocols = protocols_for(protocol, vague=any(pair.vague for pair in pairs), **changes)
    if workers < 0:
        raise UserError(f"workers: found {workers}, expected 0 or more")
    workers = workers or min(os.cpu_count() or 1, 8, 1 + len(pairs) // 16)
    score = partial(score_pair, protocols=protocols, connected=connected, region_class=region_class)
    results = list(with_bar(_score_all(score, pairs, workers), len(pairs), "Scoring"))
    problems = [str(result) for result in results if isinstance(result, UserError)]
    folders.raise_problems(f"{len(pairs)} images", problems)
    return {
        "scores": [scored(rows, rules) for rows, rules in zip(zip(*results), protocols)],
        "missing": missing,
        "extra": extra,
        "warnings": [warning for rows in results for warning in rows[0]["warnings"]],
    }


def _score_all(
    score: Callable[[Pair], list[dict]], pairs: Sequence[Pair], workers: int
) -> Iterator[list[dict] | UserError]:
    """The rows of each pair, or its error, in order, from `workers` processes."""
    work = partial(attempt, score)
    if workers == 1:
        yield from map(work, pairs)
        return
    # A forked child of a process with threads, such as the bar's, may hang.
    with ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        yield from executor.map(work, pairs, chunksize=max(1, len(pairs) // (8 * workers)))


def remarks(results: dict) -> list[str]:
    """What `score_folders` left out or warned of, one sentence each, for a person."""
    beside = f"are not scored, beside {len(results['scores'][0]['images'])} images that are"
    left_out = {
        "true label maps without a prediction": results["missing"],
        "predictions without a true label map": results["extra"],
    }
    sentences = [
        f"{len(names)} {kind} {beside}: {shortened(names, 20)}"
        for kind, names in left_out.items()
        if names
    ]
    return sentences + results["warnings"]
