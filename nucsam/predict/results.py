"""What lies in a folder of results: predict.json, and which files are its own.

A file that nucsam has not written here is never replaced or taken for a result, and one that has
been edited since is never replaced, unless `force` says so.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nucsam import __version__
from nucsam.claims import lock_file
from nucsam.config import changes
from nucsam.data.folders import PREDICTIONS, stem_of
from nucsam.data.rois import Outlines
from nucsam.download import file_checksum
from nucsam.errors import UserError
from nucsam.files import TEXT, check_form, read_json, shortened, write_text
from nucsam.predict import writers
from nucsam.predict.predictor import Predictor

RESULTS = ".predict.jsonl"  # for each image that was written, a line of its files' checksums
SAMPLES, SAMPLE = 16, 2**16  # parts of an image file, and bytes of each, by which it is known
OPTIONS = ("nucleus_area", "tile", "overlap", "tta", "adapt", "certainty")  # of a predictor
UNRECORDED = ("nucsam", "model")  # entries of predict.json that may differ from run to run
LOCK = f".{PREDICTIONS}.lock"


def check_files(
    files: Mapping[Path, dict[str, Path]], out: Path, regions: Collection[Path]
) -> None:
    """Refuse results that would overwrite those of another image, or lie beside the images.

    Refuse also results that, in any format, would overwrite a file of regions to predict in.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, expected a folder")
    owners: dict[Path, Path] = {}
    for path, results in files.items():
        for result in results.values():
            owner = owners.setdefault(result, path)
            if owner is not path:
                expected = "expected another stem or another out"
                raise UserError(f"{path}: has the stem of {owner}, {expected}")
    stems = {stem_of(path) for path in files}
    every = {out.resolve() / name.format(s) for name in writers.FILES.values() for s in stems}
    for path in regions:
        if {path.resolve(), path.parent.resolve() / path.name} & every:
            found = "the results would replace this file of regions"
            raise UserError(f"roi: {path}: {found}; expected another out")
    folders = {out.resolve(), *(result.parent.resolve() for result in owners)}
    for path in files:
        if folders & {path.parent.resolve(), Path(os.path.realpath(path)).parent}:
            found = "lies in a folder of results, which could overwrite it"
            raise UserError(f"{path}: {found}; expected another out")


def settings_of(model: str, predictor: Predictor, mpp: float | None) -> dict[str, Any]:
    """What predict.json says about the results beside it."""
    thresholds = asdict(predictor.instances)
    del thresholds["lenient"]  # which `certainty` says
    return {
        "nucsam": __version__,
        "model": model,
        "weights_sha256": predictor.sha256,
        "scale": predictor.scale / (predictor.ratio or 1.0),
        "mpp_trained": predictor.mpp,
        "mpp": mpp,
        **{name: getattr(predictor, name) for name in OPTIONS},
        "instances": thresholds,
    }


def record_files(
    out: Path,
    settings: dict[str, Any],
    files: Mapping[Path, dict[str, Path]],
    rois: Mapping[Path, Outlines],
    force: bool,
) -> dict[str, set[str]]:
    """Write predict.json: `settings`, and what each image and its regions are.

    If the old settings differ, `force` removes their results.

    Args:
        out: the folder.
        settings: of `settings_of`, and others.
        files: the result files by format, of each image.
        rois: regions to predict in, by image.
        force: replace what is there.

    Returns:
        File in `out` -> the checksums that it has had.

    Raises:
        UserError: the folder has results of other settings or images, or files that are no results,
            or that have been edited.
    """
    with lock_file(out / LOCK):  # processes may run side by side
        record, log = out / PREDICTIONS, out / RESULTS
        inputs = {stem_of(path): _known_by(path, rois.get(path)) for path in files}
        known, changed = {}, {}
        if record.is_file():
            absent = {"adapt": 0.0, "nucleus_area": 0.0, "certainty": 0.0}  # of earlier versions
            before = absent | read_json(record.read_bytes(), str(record))
            known = check_form(before.get("inputs", {}), {str: [str]}, str(record))
            changed = changes(before | {name: settings[name] for name in UNRECORDED}, settings)
            if before.get("roi") and "inputs" not in before:  # by a version without checksums
                changed["roi"] = f"roi: {before['roi']!r} -> checksums"
            _replace_others(out, changed, known, inputs, files, force)
        results = read_results(out)
        if not force:
            checked = files
            if record.is_file() and not log.is_file():
                # of a version that noted no checksums, or copied without them
                checked = {p: own for p, own in files.items() if stem_of(p) not in known}
            _check_own(out, checked, results if record.is_file() else {})
        if changed or not record.is_file():
            known = {}
            log.write_bytes(b"")
        write_text(record, json.dumps(settings | {"inputs": known | inputs}, indent=2) + "\n")
        return results


def _replace_others(
    out: Path,
    changed: Mapping[str, str],
    known: Mapping[str, list[str]],
    inputs: Mapping[str, list[str]],
    files: Mapping[Path, dict[str, Path]],
    force: bool,
) -> None:
    """Refuse results of other settings or images, or with `force` remove them.

    That is done before predict.json changes: a run that is cut off must not leave results of both.
    """
    names = writers.FILES.values() if changed else ()
    # once each: *.geojson is also *.tissue.geojson
    results = sorted({path for name in names for path in out.glob(name.format("*"))})
    if results and not force:
        found = f"the results beside it have other settings: {'; '.join(changed.values())}"
        raise UserError(f"{out / PREDICTIONS}: {found}; expected another out, or force")
    others = _results_of_others(out, known, inputs)
    if others and not force:
        found = "found results of another image of this name, or of other regions"
        lines = [f"{paths[0]}: {found}" for paths in others.values()]
        raise UserError("\n  ".join([*lines, "expected another out, or force"]))
    if changed:  # all results go, those of others among them
        _remove_results(results, files)
    else:
        _remove_others(out, list(chain.from_iterable(others.values())), files)


def note_results(
    out: Path, partials: Mapping[Path, Path], known: Mapping[str, set[str]] | None = None
) -> None:
    """Note the checksums of files that are about to take their names in `out`.

    A folder of a version that noted none gets no notes: its results would seem to be no results.

    Args:
        out: the folder.
        partials: file -> its temporary file.
        known: what `record_files` returned; None = replace whatever is there.

    Raises:
        UserError: a file of other content is there, which was not known.
    """
    sums = {file: file_checksum(partial) for file, partial in partials.items()}
    names = {file: file.relative_to(out).as_posix() for file in sums}
    for file, checksum in sums.items() if known is not None else ():
        if os.path.lexists(file) and _checksum(file) not in {checksum, *known.get(names[file], ())}:
            found = "is not what nucsam had written here when this prediction began"
            raise UserError(f"{file}: {found}; expected another out, or force")
    if (out / RESULTS).is_file():
        line = json.dumps({names[file]: checksum for file, checksum in sums.items()})
        with lock_file(out / LOCK), (out / RESULTS).open("a") as log:
            log.write(f"\n{line}")  # a line that was cut off before ends here


def read_results(out: Path) -> dict[str, set[str]]:
    """File in `out` -> the checksums that it has had."""
    known = defaultdict(set)
    lines = (out / RESULTS).read_bytes().splitlines() if (out / RESULTS).is_file() else []
    for line in lines:
        with suppress(UserError):  # a line of a process that was killed
            for name, checksum in read_json(line, RESULTS, {str: TEXT}).items():
                known[name].add(checksum)
    return known


def _checksum(file: Path) -> str:
    """The checksum of a file; "" of a folder, a link to nothing, and what cannot be read."""
    try:
        return file_checksum(file)
    except OSError:
        return ""


def _check_own(
    out: Path, files: Mapping[Path, dict[str, Path]], known: Mapping[str, set[str]]
) -> None:
    """Refuse files where results belong that are none, or were edited and would be replaced."""
    why = "" if (out / PREDICTIONS).is_file() else f", or {PREDICTIONS} is missing"
    problems = []
    for results in files.values():
        there = {p: p.relative_to(out).as_posix() for p in results.values() if os.path.lexists(p)}
        foreign = [path for path, name in there.items() if name not in known]
        problems += [f"{path}: may be yours: nucsam has not written it{why}" for path in foreign]
        if not foreign and len(there) < len(results):  # they will be written together
            edited = [path for path, name in there.items() if _checksum(path) not in known[name]]
            problems += [f"{path}: has been edited since nucsam wrote it" for path in edited]
    if problems:
        lines = shortened(problems, between="\n  ")
        raise UserError(f"{lines}\n  expected another out, or force to replace what is there")


def _known_by(image: Path, roi: Outlines | None) -> list[str]:
    """Checksums of the size and `SAMPLES` of an image file, and of the file of its regions."""
    regions = [file_checksum(roi.path)] if roi else []
    digest = hashlib.sha256()
    with suppress(OSError), image.open("rb") as file:  # reading the image says what is wrong
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        # without a gap in a file that is no larger than all samples
        for place in np.linspace(0, max(0, size - SAMPLE), SAMPLES).astype(int).tolist():
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return [digest.hexdigest(), *regions]


def _results_of_others(
    out: Path, known: Mapping[str, list[str]], inputs: Mapping[str, list[str]]
) -> dict[str, list[Path]]:
    """Stem -> results in every format, where they are of another image or other regions."""
    others = {}
    for stem, now in inputs.items():
        if known.get(stem, now) != now:
            paths = [out / name.format(stem) for name in writers.FILES.values()]
            others[stem] = [path for path in paths if path.is_file()]
    return {stem: paths for stem, paths in others.items() if paths}


def _not_replaced(results: Sequence[Path], files: Mapping[Path, dict[str, Path]]) -> list[Path]:
    """The results that are not among `files`, sorted."""
    replaced = {file.resolve() for own in files.values() for file in own.values()}
    return sorted(path for path in results if path.resolve() not in replaced)


def _remove_others(
    out: Path, others: Sequence[Path], files: Mapping[Path, dict[str, Path]]
) -> None:
    """Remove the results of other images, if nucsam wrote them or `files` replaces them."""
    written = read_results(out)
    kept = [
        str(path)
        for path in _not_replaced(others, files)
        if _checksum(path) not in written.get(path.relative_to(out).as_posix(), ())
    ]
    if kept:
        found = "found files of images that have changed, not written by nucsam or edited since"
        lines = shortened(kept, between="\n  ")
        raise UserError(f"{out}: {found}: {lines}\n  expected another out, or these moved away")
    for path in others:
        path.unlink(missing_ok=True)


def _remove_results(results: Sequence[Path], files: Mapping[Path, dict[str, Path]]) -> None:
    """Remove all results of a folder, if `files` replaces them all."""
    if kept := _not_replaced(results, files):
        found = f"found {len(kept)} result(s) that force would not replace, such as {kept[0]}"
        expected = "expected their images and formats too, or another out"
        raise UserError(f"{results[0].parent}: {found}; {expected}")
    for path in results:
        path.unlink(missing_ok=True)
