"""Scores of a model on images of its data set: in training, and of a finished run."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import nn

from nucsam.config import SPLIT, Config, compiled
from nucsam.data.draw import overlay, write_png
from nucsam.data.folders import first_group
from nucsam.data.samples import Samples
from nucsam.data.splits import Split, find_split, inventory
from nucsam.errors import UserError
from nucsam.model.network import build_model
from nucsam.predict.devices import PRECISIONS, autocast_dtype, find_device, make_accelerator
from nucsam.predict.pytorch import TorchPredictor
from nucsam.predict.tiles import usual_batch, usual_tiles
from nucsam.run.checkpoint import open_run
from nucsam.run.directory import RunDirectory
from nucsam.run.metadata import known_certainty
from nucsam.score.metrics import score_maps
from nucsam.score.pairs import protocols_for
from nucsam.score.tables import HEADLINE, image_row, percent, scored


def score_images(
    net: nn.Module,
    config: Config,
    samples: Samples,
    indices: Sequence[int],
    accelerator: Accelerator,
    *,
    mpp: float | None = None,
    certainty: float = 0.0,
    tta: bool = False,
    overlays: Path | None = None,
    **rules: Any,
) -> list[dict[str, Any]]:
    """Scores of images by a protocol, NuInsSeg's by default, and its variant without vague areas.

    The processes share the images; each image is scored once.

    Args:
        net: the model, on the accelerator's device, which may have prepared it.
        config: its configuration.
        samples: images with labels.
        indices: of the samples to score.
        accelerator: of this launch.
        mpp: microns per px of the run; each image is scored at that magnification, as in
            `nucsam predict`. None = not known.
        certainty: as in `Predictor`.
        tta: average over the eight flips and turns.
        overlays: folder for one PNG per image, with contours of ground truth and prediction.
        rules: protocol and changes of `protocols_for`.

    Returns:
        One dict of `nucsam.score.tables.scored` per protocol, the same on every process.
    """
    share = np.array_split(indices, accelerator.num_processes)[accelerator.process_index].tolist()
    vague = any(samples.records[i].vague for i in indices)
    protocols = protocols_for(**rules, vague=vague)
    rows = []
    known = {"mpp": mpp, "certainty": certainty, "tta": tta}
    predictor = scoring_predictor(net, config, accelerator.mixed_precision, **known)
    images = (samples[i].image for i in share)
    found = predictor.nuclei_many(images, [samples.mpps[i] for i in share])
    for index, nuclei in zip(share, found):
        record, sample = samples.records[index], samples[index]
        truth, pred = sample.counted(sample.label), sample.counted(nuclei.label)
        for protocol in protocols:
            score = score_maps(truth, pred, vague=sample.vague, protocol=protocol)
            row = image_row(record.name, record.organ, score)
            rows.append(row | {"certainty": nuclei.certainty})
        if overlays is not None:
            picture = overlay(sample.image, sample.label, nuclei.label)
            write_png(overlays / f"{record.name}.png", picture)
    rows = gather_object(rows)  # process by process, so in the order of the images
    return [scored(rows[k :: len(protocols)], protocol) for k, protocol in enumerate(protocols)]


def headline(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over images of Dice, AJI and PQ by the first protocol, 0 to 1."""
    return {name: results[0]["summary"]["mean"][name] for name in HEADLINE}


def usual_certainty(results: Sequence[dict[str, Any]]) -> float | None:
    """The lower quartile of the images' certainties, 0 to 1; None where none has enough nuclei.

    Args:
        results: of `score_images`, at the thresholds of the configuration.
    """
    images = [image["certainty"] for image in results[0]["images"]]
    known = [certainty for certainty in images if certainty]
    return float(np.quantile(known, 0.25)) if known else None


def score_run(
    path: Path,
    *,
    untrained: bool = False,
    root: str = "",
    overlays: Path | None = None,
    organ: str = "",
    **rules: Any,
) -> dict[str, Any]:
    """Score a run's test images with the weights of its best epoch.

    With `data.fold = "all"` the inner split is scored. Vague areas are those of the data set.
    Every image must be the one it was when the run was split, wherever the folder lies now. Writes
    scores.json if the run has ended and is scored by NuInsSeg's protocol and its own organs.

    Args:
        path: run directory.
        untrained: score the model as it was before the first step.
        root: folder of the images, if it has moved.
        overlays: as in `score_images`.
        organ: regular expression searched in an image's name; its first group, or else the whole
            match, is the organ.
        rules: protocol and changes of `protocols_for`.

    Returns:
        The content of scores.json.

    Raises:
        UserError: a file is missing or damaged, or the images are not those of the training.
    """
    pattern = compiled("organ", organ)
    protocols = protocols_for(**rules)
    net, config, base, metadata = open_run(path)
    if untrained:
        net = build_model(config.model, base, seed=config.train.seed)
    run = RunDirectory(path)
    samples, split = _open_samples(run, config, root)
    if organ:
        places = [first_group(pattern, r.name) or r.organ for r in samples.records]
        samples.records = [replace(r, organ=place) for r, place in zip(samples.records, places)]
    accelerator = scoring_accelerator(metadata)
    net.to(accelerator.device)
    certainty = 0.0 if untrained else known_certainty(config, metadata)
    rules |= {"mpp": metadata.get("mpp"), "certainty": certainty, "overlays": overlays}
    results = score_images(net, config, samples, split.test or split.inner, accelerator, **rules)
    of = "test" if split.test else "inner"
    unfinished = "" if run.is_trained(config) else run.progress(config)
    state = {"certainty": certainty, "untrained": untrained, "unfinished": unfinished}
    scores = describe_scores(results, metadata, of=of, **state)
    changed = untrained or organ or protocols != protocols_for()
    if not changed and run.is_trained(config):
        try:
            run.write_scores(scores)
        except UserError as error:  # such as in a folder of somebody else
            warnings.warn(f"{error}; the scores are not kept in the run", stacklevel=2)
    return scores


def _open_samples(run: RunDirectory, config: Config, root: str) -> tuple[Samples, Split]:
    """The images of a run, which are in `root` if they have moved, and their split."""
    try:
        records, split = find_split(config.data, root)
    except UserError as error:
        hint = "" if root else "; if the images have moved, name their folder"
        hint += f"; {run.config_file} names that of the test images" if config.data.test else ""
        raise UserError(f"{error}{hint}") from None
    samples = Samples(records, memory_gib=config.data.memory)
    run.check_images(inventory(records, split, samples.digests), root or config.data.root)
    return samples, split


def describe_scores(
    results: list[dict[str, Any]],
    metadata: dict[str, Any],
    *,
    of: str,
    certainty: float,
    untrained: bool = False,
    unfinished: str = "",
) -> dict[str, Any]:
    """The content of scores.json: what a reader must know of the scores, then the scores.

    Args:
        results: of `score_images`.
        metadata: the adapter's.
        of: "test" or "inner", the split that was scored.
        certainty: with which they were scored.
        untrained: whether the model was scored as it was before the first step.
        unfinished: "2 of 20 epochs" where a run was scored before its end.
    """
    config = metadata["config"]
    return {
        "images_of": of,
        "untrained": untrained,
        "unfinished": unfinished,
        "epoch": 0 if untrained else metadata["selected"]["epoch"],
        "epoch_chosen_by": f"{config['train']['best']} on the {config['data']['select']} split",
        "epoch_chosen_on_these": not untrained and config["data"]["select"] == of,
        "base": metadata["base"],
        "split": {key: config["data"][key] for key in SPLIT},
        "seed": config["train"]["seed"],
        "tile": usual_tiles(config["data"]["crop"])[0],
        "certainty": certainty,
        "headline": headline(results),
        "scores": results,
    }


def scores_sentence(scores: dict[str, Any]) -> str:
    """The headline scores in percent, with what a reader must know of them."""
    numbers = [f"{name.upper()} {percent(value)}" for name, value in scores["headline"].items()]
    images = f"{scores['images_of']} images"
    if scores["untrained"]:
        return f"untrained model, {images}: {', '.join(numbers)}"
    warning = ", THE IMAGES SCORED HERE" if scores["epoch_chosen_on_these"] else ""
    unfinished = f"UNFINISHED, {scores['unfinished']}: " if scores["unfinished"] else ""
    epoch = f"epoch {scores['epoch']} (chosen by {scores['epoch_chosen_by']}{warning})"
    run = f"{images}, one seed, base {scores['base']['source']}"
    return f"{unfinished}{epoch}, {run}: {', '.join(numbers)}"


def scoring_accelerator(metadata: dict[str, Any]) -> Accelerator:
    """An accelerator in the precision of a run's training, if the device computes it fast."""
    dtype = autocast_dtype(metadata.get("precision"), find_device("auto"))
    return make_accelerator(PRECISIONS[dtype])


def scoring_predictor(
    net: nn.Module,
    config: Config,
    precision: str,
    *,
    mpp: float | None = None,
    certainty: float = 0.0,
    tta: bool = False,
) -> TorchPredictor:
    """The predictor that scores a run as `nucsam predict` works: tiles, precision, folded weights.

    The other arguments are those of `Predictor`.

    Args:
        net: the model, as in `score_images`. It stays as it is; a copy is folded.
        config: its configuration.
        precision: of its training, one of PRECISIONS.
    """
    tile, overlap = usual_tiles(config.data.crop)
    # Without Accelerate's autocast, for the predictor has one of its own.
    copy = extract_model_from_parallel(deepcopy(net), keep_fp32_wrapper=False)
    device = next(copy.parameters()).device
    return TorchPredictor(
        copy.eval().fold(),
        autocast=autocast_dtype(precision, device),
        scale=config.data.scale,
        instances=config.instances,
        mpp=mpp,
        nucleus_area=config.data.nucleus_area,
        tile=tile,
        overlap=overlap,
        batch=usual_batch(config.train.batch, on_cpu=device.type == "cpu"),
        certainty=certainty,
        tta=tta,
    )
