"""What a run writes and reads: adapter, resumable state, merged weights. Every write is atomic.

Files are safetensors with one metadata entry, `nucsam`, a JSON document; nothing is ever unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nucsam import lora
from nucsam.atomic import atomic
from nucsam.base import Base, load_base, read_safetensors
from nucsam.config import Config, load, read_json
from nucsam.model import Nucsam, build

ENCODER = "image_encoder."
HEADLESS = "adapter of the encoder"  # kind of an adapter file without a head
LORA = ("train", "rank", "alpha", "pattern")  # of the model's configuration; the shapes do not tell all of it


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and a JSON document to `path`, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as partial:  # save_file has a temporary file of its own, which a kill would leave
        partial.write_bytes(save(tensors, metadata={"format": "pt", "nucsam": json.dumps(metadata)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON document of a file of `write_tensors`; a ValueError names a file that is none."""
    tensors, found = read_safetensors(path)
    if "nucsam" not in found:
        raise ValueError(f"{path}: found no `nucsam` metadata, expected a file that nucsam wrote")
    return tensors, read_json(found["nucsam"], f"{path}: `nucsam` metadata")


def save_adapter(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write what was trained: LoRA matrices and head, or with `model.train = "full"` every trained tensor.

    `metadata` must hold `config` (tables of the run) and `base` (sha256 and source).
    """
    assert {"config", "base"} <= metadata.keys()
    write_tensors(path, weights, {"kind": "adapter", **metadata})


def load_adapter(path: Path, model: Nucsam, base: Base) -> dict[str, Any]:
    """Put an adapter file's weights into `model`, built on `base`, and return its metadata.

    ValueError where the adapter was trained on another base, or does not fit the model.
    """
    weights, metadata = _read_adapter(path, ("adapter",))
    _put_adapter(path, weights, metadata, model, base)
    return metadata


def open_adapter(path: Path, weights: str = "auto") -> tuple[Nucsam, Config, Base, dict[str, Any]]:
    """As `open_run`, of an exported adapter file alone, on the base that `weights` names (`load_base`).

    Its kind tells whether it holds a head; one of the kind HEADLESS leaves the head of the model random.
    """
    tensors, metadata = _read_adapter(path, ("adapter", HEADLESS))
    config = Config.from_dict(metadata["config"], f"{path}: configuration")
    base = load_base(weights)
    net = build(config.model, base, seed=config.train.seed)
    _put_adapter(path, tensors, metadata, net, base)
    return net.eval(), config, base, metadata


def _read_adapter(path: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, metadata = read_tensors(path)
    if metadata.get("kind") not in kinds:
        raise ValueError(f"{path}: found a file of kind {metadata.get('kind')!r}, expected {kinds[0]!r}")
    match metadata:
        case {"base": {"sha256": str(), "source": str()}, "config": {"model": dict()}}:
            return weights, metadata
    raise ValueError(f"{path}: found metadata without base and config, expected those of an adapter")


def _put_adapter(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any], model: Nucsam, base: Base) -> None:
    trained_on = metadata["base"]
    if trained_on["sha256"] != base.sha256:
        raise ValueError(
            f"{path}: trained on the base {trained_on['sha256'][:12]} ({trained_on['source']}), "
            f"found the base {base.sha256[:12]} ({base.source})"
        )
    put(model, weights, path, prefix=ENCODER if metadata["kind"] == HEADLESS else "")


def put(model: Nucsam, weights: dict[str, Tensor], source: Path, prefix: str = "") -> None:
    """Copy trained weights into the model in place; they must be exactly its trainable parameters of that prefix."""
    own = {name: parameter for name, parameter in model.trainable().items() if name.startswith(prefix)}
    if odd := _unlike(weights, own):
        raise ValueError(f"{source}: weights do not fit the model: {len(odd)} tensors differ, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _unlike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, else of tensors of another shape, or of whole numbers in place of fractions."""
    return sorted(found.keys() ^ wanted.keys()) or [
        name
        for name, tensor in wanted.items()
        if found[name].shape != tensor.shape or found[name].is_floating_point() != tensor.is_floating_point()
    ]


def open_run(run: Path) -> tuple[Nucsam, Config, Base, dict[str, Any]]:
    """The model of a run directory with its best adapter, its configuration, base, and the adapter's metadata.

    ValueError where a file is missing or damaged, or the adapter was not trained with the configured LoRA.
    """
    if not (run / "config.toml").is_file():
        raise ValueError(f"{run}: found no config.toml, expected a run directory of nucsam train")
    path = run / "adapter.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file: the run did not come to its first validation; go on by nucsam train --resume"
        )
    config = load(run / "config.toml")
    base = run_base(run, config)
    net = build(config.model, base, seed=config.train.seed)
    metadata = load_adapter(path, net, base)
    trained, found = metadata["config"]["model"], config.to_dict()["model"]
    changed = [f"model.{k}: {trained[k]!r} -> {found[k]!r}" for k in LORA if k in trained and trained[k] != found[k]]
    if changed:
        raise ValueError(f"{path}: trained otherwise than {run / 'config.toml'} says: {'; '.join(changed)}")
    return net.eval(), config, base, metadata


def run_base(run: Path, config: Config) -> Base:
    """The base of a run: what `model.weights` names, or the random base that the run keeps beside it."""
    if config.model.weights != "none":
        return load_base(config.model.weights)
    base = load_base(path := run / "base.safetensors")
    described = read_json(base.metadata.get("nucsam", "null"), f"{path}: `nucsam` metadata")
    if described.get("kind") != "base":
        raise ValueError(f"{path}: found a file of kind {described.get('kind')!r}, expected 'base'")
    return replace(base, source=str(described.get("source")))


def merged(model: Nucsam, base: Base) -> dict[str, Tensor]:
    """Stock MobileSAM's tensors, LoRA merged, and the head's (`head.*`).

    Starts from the base's own tensors (unfolded BatchNorms, dead classifier, mask decoder) and replaces only what
    was trained.
    """
    trained = {name.rpartition(".lora_")[0] + ".weight" if ".lora_" in name else name for name in model.trainable()}
    state = lora.merged_state_dict(model)
    return base.state | {name: state[name] for name in state if name in trained or name.startswith("head.")}


def save_state(
    path: Path,
    weights: dict[str, Tensor],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> None:
    """Write all that a run needs to go on: weights, their running average, the optimizer's state and `metadata`."""
    tensors = {f"weights.{name}": p for name, p in weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, p in weights.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    write_tensors(path, tensors, {"kind": "state", **metadata})


def load_state(
    path: Path,
    weights: dict[str, Tensor],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Put a state file's tensors where `save_state` took them from, and return its metadata.

    ValueError, before anything is changed, where the file is damaged or of another run.
    """
    anew = "delete it to start the run anew"
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {anew}") from None
    if metadata.get("kind") != "state":
        raise ValueError(f"{path}: found a file of kind {metadata.get('kind')!r}, expected 'state'; {anew}")
    wanted = {f"weights.{name}": p for name, p in weights.items()}
    wanted |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, p in weights.items():  # Adam has no state before the first step
        entries = {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
        own = {f"optimizer.{name}.{key}": tensor for key, tensor in entries.items()}
        wanted |= own if own.keys() & tensors.keys() else {}
    if odd := _unlike(tensors, wanted):
        raise ValueError(f"{path}: does not fit this run: {len(odd)} tensors differ, such as {odd[0]}; {anew}")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(tensors.pop(f"weights.{name}"))
        for name, tensor in average.items():
            tensor.copy_(tensors.pop(f"average.{name}"))
    for key, tensor in tensors.items():
        name, _, entry = key.removeprefix("optimizer.").rpartition(".")
        p = weights[name]
        optimizer.state[p][entry] = tensor if entry == "step" else tensor.to(p.device)
    return metadata
