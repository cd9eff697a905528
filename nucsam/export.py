"""The model of a run, or of an adapter file and its base, as one file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nucsam import __version__, checkpoint, graph
from nucsam.atomic import atomic
from nucsam.config import Config, read_json

FORMATS = ("safetensors", "mobile-sam", "onnx", "adapter")


def export(
    source: Path,
    out: Path,
    *,
    format: str = "safetensors",
    base: str = "",
    without_head: bool = False,
    force: bool = False,
) -> str:
    """Write the best weights of a run directory, and return a sentence about the file.

    safetensors: stock MobileSAM's tensors, LoRA merged, and the head's, with all else that prediction needs as
    metadata; nucsam predicts with it or trains on from it. mobile-sam: stock tensors alone, a torch file (or
    safetensors, by the suffix of `out`) that stock `mobile_sam` loads with strict=True; call `.eval()` after loading,
    for stock keeps the attention biases of the moment `.eval()` was called. onnx: `graph.Graph`, merged. adapter: what
    was trained alone, LoRA and head, or LoRA with `without_head`; metadata as of safetensors.
    source: a run directory, or a file of the format adapter, whose base is `base` (as `load_base` takes it; "auto" if
    not given). No path of this machine goes into a file, of the data folder only its name.
    ValueError on an unknown format, an existing `out` without `force`, a run without an adapter or not finished, and an
    adapter on another base; RuntimeError where onnxruntime gives other maps than PyTorch.
    """
    _check(source, out, format, base, without_head, force)
    if source.is_file():
        net, config, stock, metadata = checkpoint.open_adapter(source, base or "auto")
    else:
        net, config, stock, metadata = checkpoint.open_run(source)
        metadata |= _finished(source, config)
    has_head = metadata["kind"] == "adapter" and not without_head
    if format == "onnx" and not has_head:
        raise ValueError(f"{source}: found an adapter without a head, which --format onnx needs")
    if without_head and not any(name.startswith(checkpoint.ENCODER) for name in net.trainable()):
        raise ValueError(f"--without-head: {source} trained nothing but a head")
    described = _described(metadata, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out.parent}: cannot be made ({error.strerror}), expected a folder") from error

    if format == "adapter":
        state = {name: p for name, p in net.trainable().items() if has_head or name.startswith(checkpoint.ENCODER)}
        kind = "adapter" if has_head else checkpoint.HEADLESS
    else:
        state = checkpoint.merged(net, stock)
        kind = {"safetensors": "merged" if has_head else "encoder", "onnx": "graph"}.get(format, format)
        if format == "mobile-sam" or not has_head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    values = f"{len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} values"
    if format == "onnx":
        with atomic(out) as partial:
            difference = graph.write(partial, graph.Graph(net.fold(), config.data.scale), {**described, "kind": kind})
        values += f", at most {difference:.1g} from PyTorch's maps in onnxruntime"
    elif format == "mobile-sam" and out.suffix != ".safetensors":
        with atomic(out) as partial, partial.open("wb") as file:
            torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        checkpoint.write_tensors(out, state, {**described, "kind": kind})
    return f"{out}: {values}, {out.stat().st_size / 2**20:.2f} MiB"


def _check(source: Path, out: Path, format: str, base: str, without_head: bool, force: bool) -> None:
    """What can be refused before the model is read."""
    if format not in FORMATS:
        raise ValueError(f"--format: found {format!r}, expected one of {', '.join(FORMATS)}")
    if without_head and format != "adapter":
        raise ValueError(f"--without-head: found --format {format}, expected adapter")
    if base and source.is_dir():
        raise ValueError(f"--base: found the run {source}, which names its base; expected an adapter file")
    if format == "onnx":
        graph.check_packages()
    if out.is_dir():
        raise ValueError(f"{out}: found a folder, expected the name of a file")
    if out.exists() and not force:
        raise ValueError(f"{out}: exists; --force replaces it")


def _finished(run: Path, config: Config) -> dict[str, Any]:
    """What a run's files say beside its adapter: mean scores, versions. ValueError where it is not finished."""
    log, scored = run / "metrics.jsonl", run / "scores.json"
    lines = log.read_bytes().splitlines() if log.is_file() else []
    epochs = read_json(lines[-1], f"{log}: last line").get("epoch", 0) if lines else 0
    if epochs < config.train.epochs or not scored.is_file():
        raise ValueError(
            f"{run}: found an unfinished run, {epochs} of {config.train.epochs} epochs"
            f"{'' if scored.is_file() else ' and no scores.json'}; "
            f"nucsam train {run / 'config.toml'} --out {run} --resume finishes it"
        )
    scores = read_json(scored.read_bytes(), str(scored))
    if "headline" not in scores:
        raise ValueError(f"{scored}: found no headline, expected the scores of a run")
    found = {"scores": scores["headline"], "scores_of": scores.get("images_of")}
    if (path := run / "environment.json").is_file():
        environment = read_json(path.read_bytes(), str(path))
        found["versions"] = {name: environment.get(name) for name in ("nucsam", "python", "packages")}
    return found


def _described(metadata: dict[str, Any], config: Config) -> dict[str, Any]:
    """An adapter's metadata without the paths of this machine."""
    data = replace(config.data, root=Path(config.data.root).resolve().name)
    model = replace(config.model, weights=Path(config.model.weights).name)
    base = metadata["base"] | {"source": Path(metadata["base"]["source"]).name}
    tables = replace(config, data=data, model=model).to_dict()
    return {**metadata, "version": __version__, "config": tables, "base": base, "data": data.root}
