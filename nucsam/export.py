"""Merged weights of a run as one file."""

from pathlib import Path
from typing import Any

import torch

from nucsam import __version__, checkpoint

FORMATS = ("safetensors", "mobile-sam")


def export(run: Path, out: Path, *, format: str = "safetensors", force: bool = False) -> str:
    """Write the run's best weights, LoRA merged, and return a sentence about the file.

    safetensors: stock MobileSAM's tensors and the head's, with configuration, base and scores as metadata; nucsam
    predicts with it or trains on from it. mobile-sam: stock tensors alone, a torch file (or safetensors, by the suffix
    of `out`) that stock `mobile_sam` loads with strict=True; call `.eval()` after loading, for stock keeps the
    attention biases of the moment `.eval()` was called.
    ValueError on an unknown format, an existing `out` without `force`, or a run without an adapter.
    """
    if format not in FORMATS:
        raise ValueError(f"--format: found {format!r}, expected one of {', '.join(FORMATS)}")
    if out.is_dir():
        raise ValueError(f"{out}: found a folder, expected the name of a file")
    if out.exists() and not force:
        raise ValueError(f"{out}: exists; --force replaces it")
    net, _, base, metadata = checkpoint.open_run(run)
    scores = _headline(run / "scores.json") if format == "safetensors" else None
    state = checkpoint.merged(net, base)
    if format == "mobile-sam":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out.parent}: cannot be made ({error.strerror}), expected a folder") from error
    if format == "mobile-sam" and out.suffix != ".safetensors":
        with checkpoint.atomic(out) as partial, partial.open("wb") as file:
            torch.save({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        described = {**metadata, "kind": "merged", "version": __version__, "scores": scores}
        checkpoint.write_tensors(out, state, described)
    count = sum(tensor.numel() for tensor in state.values())
    return f"{out}: {len(state)} tensors, {count:,} values, {out.stat().st_size / 2**20:.1f} MiB"


def _headline(path: Path) -> dict[str, Any] | None:
    """Mean scores of a run's scores.json; None where the run has none."""
    if not path.is_file():
        return None
    scores = checkpoint.read_json(path.read_bytes(), str(path))
    if "headline" not in scores:
        raise ValueError(f"{path}: found no headline, expected the scores of a run; without the file none are kept")
    return scores["headline"]
