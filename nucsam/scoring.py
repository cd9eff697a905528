"""Scores of a model on images of its data set: in training, and of a finished run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from nucsam import checkpoint, data, draw, evaluate, metrics
from nucsam.config import Config, Data
from nucsam.model import build
from nucsam.predict import Predictor, uses_gpu

PROTOCOL = "nuinsseg"
HEADLINE = ("dice", "aji", "pq")


def find_images(d: Data) -> tuple[list[data.Record], data.Split]:
    """The images of a configuration and their split: training and scoring must agree on it."""
    records = data.find_records(d.root, layout=d.layout, group=d.group)
    return records, data.split_records(records, scheme=d.split, folds=d.folds, fold=d.fold, inner=d.inner, seed=d.seed)


def scorer(metadata: dict[str, Any]) -> Accelerator:
    """The device that is there, in the precision of a run's training; of fp16, which only a GPU has, else fp32."""
    on_gpu, precision = uses_gpu(), metadata.get("precision", "no")
    return Accelerator(cpu=not on_gpu, mixed_precision=precision if on_gpu or precision != "fp16" else "no")


def predictor(net: Any, config: Config, *, tta: bool = False) -> Predictor:
    """The predictor that scores a run: tiles so large that images of the data sets are whole."""
    d, batch = config.data, config.train.batch
    tile = max(1024, d.crop)
    return Predictor(net, scale=d.scale, instances=config.instances, tile=tile, batch=batch, tta=tta)


def score_images(
    net: Any,
    config: Config,
    samples: data.Samples,
    indices: Sequence[int],
    accelerator: Accelerator,
    *,
    tta: bool = False,
) -> list[dict[str, Any]]:
    """`evaluate.scored` of images for each variant of NuInsSeg's protocol, the same on every process.

    The processes share the images, each of which is scored once. tta: as of `nucsam.predict.Predictor`.
    """
    own = list(indices)[accelerator.process_index :: accelerator.num_processes]
    vague = any(samples.records[i].vague for i in indices)
    protocols = evaluate.protocols_for(PROTOCOL, vague=vague)
    was_training = net.training
    net.eval()
    rows = []
    predicted = predictor(net, config, tta=tta).predict_many(samples[i].image for i in own)
    for index, pred in zip(own, predicted):
        record, sample = samples.records[index], samples[index]
        for protocol in protocols:
            score = metrics.score(sample.label, pred, vague=sample.vague, protocol=protocol)
            rows.append((index, evaluate.row(record.name, record.organ, score)))
    net.train(was_training)
    rows = gather_object(rows) if accelerator.num_processes > 1 else rows
    place = {index: k for k, index in enumerate(indices)}
    rows = [row for _, row in sorted(rows, key=lambda pair: place[pair[0]])]
    return [evaluate.scored(rows[k :: len(protocols)], protocol) for k, protocol in enumerate(protocols)]


def headline(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over images of Dice, AJI and PQ by the first protocol, 0 to 1."""
    return {name: scored[0]["summary"]["mean"][name] for name in HEADLINE}


def score_run(run: Path, *, untrained: bool = False, root: str = "", overlays: Path | None = None) -> dict[str, Any]:
    """Score a run's test images (with fold "all", the inner split's) with its best weights.

    untrained: the model as it was before the first step. root: the data folder, where it has moved.
    overlays: a folder for one PNG an image, with true and predicted contours.
    Returns what scores.json holds, and writes that file if the run is scored as it stands.
    """
    net, config, base, metadata = checkpoint.open_run(run)
    if untrained:
        net = build(config.model, base, seed=config.train.seed)
    d = replace(config.data, root=root or config.data.root)
    try:
        records, split = find_images(d)
    except ValueError as error:
        raise ValueError(f"{error}" + ("" if root else "; where the images have moved: --data FOLDER")) from None
    if metadata.get("images", found := data.identity(records)) != found:
        raise ValueError(
            f"{d.root}: found other images than {run} was split on, so that test images may have been trained on; "
            "expected the same names, organs and groups"
        )
    indices = split.test or split.inner
    samples = data.Samples([records[i] for i in indices], memory_gib=d.memory)
    accelerator = scorer(metadata)
    net = accelerator.prepare_model(net, evaluation_mode=True)  # as training scores it
    found = score_images(net, config, samples, range(len(samples)), accelerator)
    scores = describe(found, metadata, of="test" if split.test else "inner", untrained=untrained)
    if overlays is not None:
        write_overlays(net, config, samples, range(len(samples)), overlays)
    if not untrained and not root:
        evaluate.write_json(run / "scores.json", scores)
    return scores


def describe(scored: list[dict[str, Any]], metadata: dict[str, Any], *, of: str, untrained: bool) -> dict[str, Any]:
    """scores.json: whose scores, of which images, by which choice of epoch; then the scores."""
    config = metadata["config"]
    return {
        "images_of": of,
        "untrained": untrained,
        "epoch": 0 if untrained else metadata["selected"]["epoch"],
        "epoch_chosen_by": f"{config['train']['best']} on the {config['data']['select']} split",
        "base": metadata["base"],
        "split": {key: config["data"][key] for key in ("split", "folds", "fold", "group", "seed")},
        "seed": config["train"]["seed"],
        "headline": headline(scored),
        "scores": scored,
    }


def sentence(scores: dict[str, Any]) -> str:
    """The scores for a person, with what must be known to read them."""
    numbers = ", ".join(f"{name.upper()} {100 * value:.1f}" for name, value in scores["headline"].items())
    if scores["untrained"]:
        return f"untrained model, {scores['images_of']} images: {numbers}"
    marked = ", THE IMAGES SCORED HERE" if scores["epoch_chosen_by"].endswith("test split") else ""
    return (
        f"epoch {scores['epoch']} (chosen by {scores['epoch_chosen_by']}{marked}), {scores['images_of']} images, "
        f"one seed, base {scores['base']['source']}: {numbers}"
    )


def write_overlays(net: Any, config: Config, samples: data.Samples, indices: Sequence[int], folder: Path) -> None:
    """One PNG an image: the image, true contours, predicted contours."""
    folder.mkdir(parents=True, exist_ok=True)
    net.eval()
    predicted = predictor(net, config).predict_many(samples[i].image for i in indices)
    for index, pred in zip(indices, predicted):
        record, sample = samples.records[index], samples[index]
        name = f"{record.organ}_{record.name}" if record.organ else record.name
        draw.write_png(folder / f"{name}.png", draw.overlay(sample.image, sample.label, np.asarray(pred)))
