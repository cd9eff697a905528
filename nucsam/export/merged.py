"""The model of a run, or of an adapter file and its base, as one file.

- safetensors: the base's tensors with LoRA merged, the head's tensors, and as metadata what
  prediction needs. nucsam predicts with it, or trains it further.
- sam: the base's tensors alone, in the form of its published file, which the stock code of the base
  loads with strict=True. Call `.eval()` after loading: stock TinyViT caches its attention biases at
  that call. It is a torch file, or safetensors by its suffix.
- onnx: `graph.Graph`, LoRA merged.
- adapter: what was trained alone, with the metadata of safetensors.

No path of this machine goes into a file. Of the data folder it holds the name.
"""

import io
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nucsam import __version__
from nucsam.config import SETTINGS, Config
from nucsam.errors import UserError, check_packages
from nucsam.export import graph
from nucsam.files import atomic, folder_name
from nucsam.model.bases import BASES
from nucsam.model.network import Nucsam
from nucsam.model.weights import Base
from nucsam.names import (
    FILE,
    PREFIX,
    check_repository,
    find_model,
    portable_name,
    push_model,
)
from nucsam.run import checkpoint
from nucsam.run.directory import RunDirectory
from nucsam.score.tables import COLUMNS, percent

FORMATS = {  # format -> `kind` in the metadata of its files
    "safetensors": "merged",
    "sam": "sam",
    "onnx": "graph",
    "adapter": "adapter",
}
SUFFIXES = {  # of a file -> formats that it may have, the first one without being asked
    ".onnx": ("onnx",),
    ".pt": ("sam",),
    ".safetensors": ("safetensors", "sam", "adapter"),
}

# Settings that a training must share with the export whose weights it takes.
SHAPE = ("model.encoder", "model.head", "model.width", "model.finest", "data.scale")


def export_run(
    source: str | Path,
    out: Path,
    *,
    format: str = "",
    base: str = "",
    half: bool = False,
    adapt: float | None = None,
    force: bool = False,
) -> str:
    """Write the best weights of a finished run as one file.

    Args:
        source: a run directory, or a file of the format adapter, or a name of one: "starter".
        out: the file.
        format: one of `FORMATS`; "" = the one of the suffix in `SUFFIXES`.
        base: base weights of an adapter file, as `open_base` takes them; "" = the file's own.
        half: keep fractions in half precision; for nucsam's own formats.
        adapt: `model.adapt` of the file; None = that of the run.
        force: replace an existing file.

    Returns:
        A sentence about the file.

    Raises:
        UserError: arguments that do not fit each other, an existing file, a run without an adapter
            or not finished, or an adapter on another base.
        RuntimeError: onnxruntime gives other maps than PyTorch.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"out: found {out}, expected a name that ends in {', '.join(SUFFIXES)}")
    format = format or SUFFIXES[out.suffix][0]
    source, _ = find_model(source)
    if not source.exists():
        expected = "expected a run directory, an adapter file or starter"
        raise UserError(f"{source}: no such file or folder, {expected}")
    _check(source, out, format, base, half, adapt, force)
    if source.is_file():
        net, config, stock, metadata = checkpoint.open_adapter(source, base)
    else:
        net, config, stock, metadata = checkpoint.open_run(source)
        metadata |= _finished(RunDirectory(source), config)
    if adapt is not None:
        config = replace(config, model=replace(config.model, adapt=adapt))
        net.adapt(adapt)
    tensors = _tensors(format, net, stock)
    if half:
        tensors = {name: _in_half(tensor) for name, tensor in tensors.items()}
    metadata = _portable(metadata, config) | {"kind": FORMATS[format]}
    remark = _write(out, format, tensors, metadata, net, config)
    values = sum(tensor.numel() for tensor in tensors.values())
    content = "a graph" if format == "onnx" else f"{len(tensors)} tensors, {values:,} values"
    return f"{out}: {content}{remark}, {out.stat().st_size / 2**20:.2f} MiB"


def _in_half(tensor: Tensor) -> Tensor:
    """The tensor in half precision; integers, and what half precision cannot hold, stay."""
    half = tensor.half()
    return half if tensor.is_floating_point() and half.isfinite().all() else tensor


def push_run(
    source: str | Path,
    name: str,
    *,
    format: str = "",
    base: str = "",
    half: bool = False,
    adapt: float | None = None,
) -> str:
    """Upload the model of a finished run, with a card, to the Hugging Face Hub.

    Args:
        source, base, half, adapt: as in `export_run`.
        name: USER/NAME of the repository, which is made if need be. A card that is there stays.
        format: safetensors or adapter; "" = safetensors.

    Returns:
        A sentence with the name that predicts and trains.

    Raises:
        UserError: as in `export_run`, or the Hub refuses.
    """
    name = check_repository(name)
    if format not in ("", "safetensors", "adapter"):
        raise UserError(f"format: found {format!r} to upload, expected safetensors or adapter")
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        options = {"base": base, "half": half, "adapt": adapt}
        export_run(source, file, format=format or "safetensors", **options)
        _, metadata = checkpoint.read_tensors(file, "merged", "adapter")
        pushed, kept = push_model(name, file, model_card(name, metadata))
    card = "; its README.md stays: delete it there for a new one" if kept else ""
    return f"{pushed}: uploaded{card}; nucsam predict {PREFIX}{name} IMAGES --out DIR takes it"


def model_card(name: str, metadata: dict[str, Any]) -> str:
    """The README.md of a model's repository: what the metadata of its file say, as Markdown."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("nucsam.export"), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    config = Config.from_dict(metadata["config"], "metadata")
    values = config.flat()
    shape = [f" {key}={values[key]}" for key in SHAPE if values[key] != SETTINGS[key].default]
    text = environment.get_template("card.md").render(
        name=name,
        m=metadata,
        c=config,
        columns=COLUMNS,
        settings="".join(shape),
        pattern=config.model.pattern or BASES[config.model.encoder].pattern,
    )
    return text + "\n"


def _check(
    source: Path, out: Path, format: str, base: str, half: bool, adapt: float | None, force: bool
) -> None:
    """Refuse what can be refused before the model is read."""
    if format not in FORMATS:
        raise UserError(f"format: found {format!r}, expected one of {', '.join(FORMATS)}")
    if format not in SUFFIXES[out.suffix]:
        expected = " or ".join(suffix for suffix in SUFFIXES if format in SUFFIXES[suffix])
        raise UserError(f"out: found {out} for the format {format}, expected {expected}")
    if base and source.is_dir():
        raise UserError(f"base: {source} is a run and names its base, expected an adapter file")
    if half and format not in ("safetensors", "adapter"):
        raise UserError(f"half: found it for the format {format}, expected safetensors or adapter")
    if adapt is not None and format == "sam":
        raise UserError("adapt: found it for the format sam, which has no head that adapts")
    if format == "onnx":
        check_packages("onnx", "onnx", "onnxscript", "onnxruntime")
    if out.is_file() and not force:
        raise UserError(f"{out}: exists; force replaces it")


def _finished(run: RunDirectory, config: Config) -> dict[str, Any]:
    """The scores of a run, for the metadata of its export.

    Raises:
        UserError: the run is not finished.
    """
    scores = run.read_scores(config)
    if scores is None:
        scoreless = "" if run.scores_file.is_file() else " and no scores"
        raise UserError(
            f"{run.path}: found an unfinished run, {run.progress(config)}{scoreless}; "
            f"nucsam train {run.config_file} --out {run.path} --resume finishes it"
        )
    return {"scores": scores["headline"], "scores_of": scores["images_of"]}


def _tensors(format: str, net: Nucsam, stock: Base) -> dict[str, Tensor]:
    if format == "adapter":
        return net.trainable()
    tensors = checkpoint.merged_tensors(net, stock)
    if format == "sam":
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    return tensors


def _write(
    out: Path,
    format: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    net: Nucsam,
    config: Config,
) -> str:
    """Write the file, and return a remark on it."""
    if format == "onnx":
        with atomic(out) as partial:
            onnx = graph.Graph(net.fold(), config.data.scale)
            difference = graph.write_graph(partial, onnx, metadata)
        return f", at most {difference:.1g} from PyTorch's maps in onnxruntime"
    if format == "sam" and out.suffix != ".safetensors":
        state = {name: tensor.contiguous() for name, tensor in tensors.items()}
        part = BASES[config.model.encoder].part
        buffer = io.BytesIO()  # in a file, torch makes a RuntimeError of a full disk
        torch.save({part: state} if part else state, buffer)
        with atomic(out) as partial:
            partial.write_bytes(buffer.getbuffer())
    else:
        checkpoint.write_tensors(out, tensors, metadata)
    return ""


def _portable(metadata: dict[str, Any], config: Config) -> dict[str, Any]:
    """An adapter's metadata without the paths of this machine."""
    root, test = (d and folder_name(d) for d in (config.data.root, config.data.test))
    data = replace(config.data, root=root, test=test)
    model = replace(config.model, weights=portable_name(config.model.weights))
    return metadata | {
        "version": __version__,
        "config": replace(config, data=data, model=model).to_dict(),
        "base": metadata["base"] | {"source": portable_name(metadata["base"]["source"])},
        "data": data.root,
    }
