"""Tensors on disk: adapter, random base and resumable state of a run, and the model they make.

Every file is safetensors with one metadata entry, `nucsam`, which is a JSON document. Nothing is
ever unpickled, and every write is atomic.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nucsam.config import SPLIT, Config, differences
from nucsam.errors import UserError
from nucsam.files import atomic, read_json
from nucsam.model import lora
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import Base, load_base, misfit, read_safetensors, state_sha256
from nucsam.names import find_model, is_hub_name, is_permanent
from nucsam.run.directory import RunDirectory
from nucsam.run.metadata import check_metadata

# Settings of an adapter that shapes do not reveal.
FIXED = (
    *("model.encoder", "model.train", "model.rank", "model.alpha", "model.pattern"),
    *(f"data.{key}" for key in (*SPLIT, "nucleus_area")),
)
_START_AGAIN = "delete it to start the run again"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and a JSON document to `path`, or leave what was there."""
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    document = {"format": "pt", "nucsam": json.dumps(metadata)}
    with atomic(path) as partial:  # safetensors' save_file leaves its own partial file when killed
        partial.write_bytes(save(values, metadata=document))


def read_tensors(path: Path, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON document of a file of `write_tensors`.

    Args:
        path: the file.
        kinds: what the document may have as `kind`; without any, everything.

    Raises:
        UserError: the file is missing, damaged, not one that nucsam wrote, or of another kind.
    """
    tensors, entries = read_safetensors(path)
    if "nucsam" not in entries:
        raise UserError(f"{path}: found no `nucsam` metadata, expected a file that nucsam wrote")
    metadata = read_json(entries["nucsam"], f"{path}: `nucsam` metadata")
    kind = metadata.get("kind")
    if kinds and kind not in kinds:
        raise UserError(f"{path}: found a file of kind {kind!r}, expected {kinds[0]!r}")
    return tensors, metadata


# ---- adapter ----


def save_adapter(path: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write what was trained: LoRA and head, or every trained tensor with `model.train = "full"`.

    Args:
        path: file to write.
        weights: `Nucsam.trainable()` of the model, or an average of it.
        metadata: must hold `config` (the run's tables) and `base` (sha256 and source).
    """
    assert {"config", "base"} <= metadata.keys()
    write_tensors(path, weights, {"kind": "adapter", **metadata})


def load_adapter(path: Path, model: Nucsam, base: Base) -> dict[str, Any]:
    """Copy an adapter file's weights into `model`, which is built on `base`; return its metadata.

    Args:
        path: the file.
        model: the model to change.
        base: what it is built on.

    Raises:
        UserError: the adapter was trained on another base, or does not fit the model.
    """
    weights, metadata = read_tensors(path, "adapter")
    check_metadata(path, metadata)
    trained_on = metadata["base"]
    if trained_on["sha256"] != base.sha256:
        raise UserError(
            f"{path}: trained on the base {trained_on['sha256'][:12]} ({trained_on['source']}), "
            f"found the base {base.sha256[:12]} ({base.source})"
        )
    put_weights(model, weights, path)
    return metadata


def open_adapter(path: Path, weights: str = "") -> tuple[Nucsam, Config, Base, dict[str, Any]]:
    """The model of an exported adapter file.

    Args:
        path: adapter file of `nucsam export`.
        weights: names the base, as in `open_base`; "" takes the name that the file gives, or else
            the published file of its encoder.

    Returns:
        As `open_run`.
    """
    _, metadata = read_tensors(path)
    if (kind := metadata.get("kind")) != "adapter":
        expected = "expected an adapter file or a run directory; export that run again"
        raise UserError(f"{path}: found a file of kind {kind!r}, {expected}")
    config = check_metadata(path, metadata)
    named = metadata["base"]["source"]
    if not weights and named.startswith("none"):
        expected = "expected that run directory, or the base"
        raise UserError(f"{path}: trained on random base weights, which its run holds; {expected}")
    base = open_base(weights or (named if is_permanent(named) else "auto"), config.model.encoder)
    net = build_model(config.model, base, seed=config.train.seed)
    try:
        load_adapter(path, net, base)
    except UserError as error:
        if weights or base.sha256 == metadata["base"]["sha256"]:
            raise
        merges = (
            f"nucsam export {path} --base FILE --out merged.safetensors merges it with its base"
        )
        raise UserError(f"{error}; {merges}") from None
    return net.eval(), config, base, metadata


def put_weights(model: Nucsam, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy trained weights into the model, in place.

    Args:
        model: the model to change.
        weights: exactly the model's trainable tensors.
        source: file named in an error.

    Raises:
        UserError: names, shapes or types differ.
    """
    targets = model.trainable()
    if problem := misfit(weights, targets):
        raise UserError(f"{source}: weights do not fit the model: {problem}")
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])


# ---- base, and the model of a run ----


def open_base(spec: str, encoder: str = "mobile_sam") -> Base:
    """The base that `model.weights` names.

    An adapter, such as the starter, is merged with its own base, and its head goes with it.

    Args:
        spec: "auto", "none", or a name or path of `find_model`.
        encoder: a name in `BASES`.

    Raises:
        UserError: as in `load_base`, `find_model` and `open_adapter`; an adapter of another
            encoder.
    """
    if spec in ("auto", "none"):
        return load_base(spec, encoder)
    path, source = find_model(spec)
    kind, config = _exported(path)
    if kind != "adapter":
        head = config.model.head if kind == "merged" else ""
        return replace(load_base(path, encoder), source=source, trained_head=head)
    if config.model.encoder != encoder:
        found = f"found an adapter of {config.model.encoder!r}"
        raise UserError(f"{source}: {found}, expected one of model.encoder = {encoder!r}")
    net, _, base, _ = open_adapter(path)
    state = merged_tensors(net, base)
    head = {name: state.pop(name) for name in sorted(state) if name.startswith("head.")}
    sha256 = state_sha256(base.state | net.trainable())
    return Base(state, sha256, source, head, encoder, config.model.head)


def _exported(path: Path) -> tuple[str, Config | None]:
    """The kind and the configuration of a nucsam export; "" and None of any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return "", None
    _, entries = read_safetensors(path)
    metadata = read_json(entries.get("nucsam", "{}"), f"{path}: `nucsam` metadata")
    kind = metadata.get("kind")
    return (kind, check_metadata(path, metadata)) if kind in ("adapter", "merged") else ("", None)


def save_random_base(run: RunDirectory, base: Base) -> None:
    """Keep a random base with its run: nobody else has it."""
    write_tensors(run.base_file, base.state, {"kind": "base", "source": base.source})


def run_base(run: RunDirectory, config: Config) -> Base:
    """The base of a run: the one that `model.weights` names, or the random one it keeps.

    A name on the Hub means the commit that the run began with, and a relative path a file where
    the run began, if there is none here.

    Raises:
        UserError: the file is missing, damaged, or no base.
    """
    encoder = config.model.encoder
    weights = config.model.weights
    if weights != "none":
        facts = run.read_environment()
        began = str(facts.get("base"))
        there = Path(str(facts.get("directory", ""))) / weights
        if is_hub_name(weights) and began.partition("@")[0] == weights.partition("@")[0]:
            weights = began
        elif not Path(weights).exists() and there.is_file():
            weights = str(there)
        return open_base(weights, encoder)
    _, metadata = read_tensors(run.base_file, "base")
    return replace(load_base(run.base_file, encoder), source=str(metadata.get("source")))


def open_run(path: Path) -> tuple[Nucsam, Config, Base, dict[str, Any]]:
    """The model of a run directory.

    Returns:
        The model in eval mode with the weights of the best epoch, the run's configuration, its
        base, and the adapter's metadata.

    Raises:
        UserError: a file is missing or damaged, or the adapter was trained with other LoRA
            settings or on another split than the configuration says.
    """
    run = RunDirectory(path)
    config = run.read_config()
    if not run.adapter_file.is_file():
        raise UserError(
            f"{run.adapter_file}: no such file: the run has not reached its first validation; "
            "resume it with nucsam train --resume"
        )
    base = run_base(run, config)
    net = build_model(config.model, base, seed=config.train.seed)
    metadata = load_adapter(run.adapter_file, net, base)
    trained = Config.from_dict(metadata["config"], f"{run.adapter_file}: configuration")
    changes = [text for name, text in differences(trained, config).items() if name in FIXED]
    if changes:
        raise UserError(
            f"{run.adapter_file}: trained with other settings than {run.config_file} says: "
            f"{'; '.join(changes)}"
        )
    return net.eval(), config, base, metadata


def merged_tensors(model: Nucsam, base: Base) -> dict[str, Tensor]:
    """The base's tensors with LoRA merged, and the head's (`head.*`).

    Starts from the base's own tensors (unfolded BatchNorms, unused classifier, mask decoder) and
    replaces only what was trained.
    """

    def stock_name(name: str) -> str:
        layer, adapter, _ = name.rpartition(".lora_")
        return f"{layer}.weight" if adapter else name

    trained = {stock_name(name) for name in model.trainable()}
    merged = deepcopy(model)
    lora.merge(merged)
    state = merged.state_dict()
    return base.state | {
        name: state[name] for name in state if name in trained or name.startswith("head.")
    }


# ---- resumable state ----


@dataclass
class Progress:
    """How far a run has come: what its state file holds beside tensors."""

    step: int = 0  # optimizer steps done
    images: int = 0  # seen by this process since the epoch began
    seconds: float = 0.0  # since then, without what lay between a stop and its resume
    sums: dict[str, float] = field(default_factory=dict)  # of each loss term over those images
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    best: dict[str, Any] = field(default_factory=dict)  # the line whose weights are kept

    @property
    def epochs(self) -> int:
        """Epochs done, each with its line in the history."""
        return self.history[-1]["epoch"] if self.history else 0


def save_state(
    path: Path,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> None:
    """Write everything that resuming needs.

    Args:
        path: file to write.
        weights: the trainable tensors, by name.
        average: their running average; empty where there is none.
        optimizer: an Adam of these weights.
        metadata: JSON values to keep with the tensors.
    """
    tensors = {f"weights.{name}": p for name, p in weights.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, p in weights.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    write_tensors(path, tensors, {"kind": "state", **metadata})


def load_state(
    path: Path,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Put a state file's tensors where `save_state` took them from, and return its metadata.

    Raises:
        UserError: the file is damaged or of another run. Nothing is changed then.
    """
    try:
        tensors, metadata = read_tensors(path, "state")
    except UserError as error:
        raise UserError(f"{error}; {_START_AGAIN}") from None
    targets = {f"weights.{name}": p for name, p in weights.items()}
    targets |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, p in weights.items():
        moments = {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
        entries = {f"optimizer.{name}.{key}": tensor for key, tensor in moments.items()}
        if entries.keys() & tensors.keys():  # Adam has no state before the first step
            targets |= entries
    if problem := misfit(tensors, targets):
        raise UserError(f"{path}: does not fit this run: {problem}; {_START_AGAIN}")
    with torch.no_grad():
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind != "optimizer":
                targets[key].copy_(tensor)
                continue
            name, _, entry = name.rpartition(".")
            p = weights[name]
            optimizer.state[p][entry] = tensor.to(p.device)  # a fused Adam's `step` too
    return metadata


def read_progress(path: Path, metadata: dict[str, Any]) -> Progress:
    """The progress in a state file's metadata.

    Raises:
        UserError: it is missing or of another form.
    """
    values = metadata.get("progress")
    kinds = {key: type(value) for key, value in asdict(Progress()).items()}
    if isinstance(values, dict):
        values = {"seconds": 0.0} | values  # of earlier versions
        if {key: type(value) for key, value in values.items()} == kinds:
            return Progress(**values)
    raise UserError(f"{path}: found no progress of a run; {_START_AGAIN}")
