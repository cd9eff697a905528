"""Base weights: MobileSAM's published file, a path, a nucsam export, or random ones; and their identity.

A base is always a full state dict under the keys of stock `mobile_sam`: `image_encoder.*`, `prompt_encoder.*`
and `mask_decoder.*`.
"""

import hashlib
import json
import os
import urllib.request
import warnings
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# The authors' file, from their repository and from their page on Hugging Face.
FILE = "mobile_sam.pt"
FILE_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
URLS = (
    "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
    "https://huggingface.co/ChaoningZhang/MobileSAM/resolve/main/mobile_sam.pt",
)
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Base:
    """MobileSAM's weights and where they came from."""

    state: dict[str, Tensor]  # stock keys, CPU
    sha256: str  # `state_sha256(state)`: the same for a .pt and a .safetensors file of the same tensors
    source: str  # a path, or "none (random, seed 0)"
    extra: dict[str, Tensor] = field(default_factory=dict)  # `head.*` of a nucsam export
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file


def load_base(spec: str | Path, *, cache: str | Path | None = None, seed: int = 0) -> Base:
    """The base that `model.weights` names.

    `spec` is "auto" (MobileSAM's published file, from the cache or else downloaded into it), "none" (random
    weights drawn from `seed`), or the path of a `.safetensors` or torch file, a nucsam export included.
    `cache` is a folder, by default $NUCSAM_CACHE, $XDG_CACHE_HOME/nucsam or ~/.cache/nucsam.
    A file that is missing, not a checkpoint, or does not fit stock MobileSAM is a ValueError that names it.
    """
    if spec == "none":
        return random_base(seed)
    path = _published(Path(cache) if cache else default_cache()) if spec == "auto" else Path(spec)
    if not path.is_file():
        raise ValueError(f"model.weights: no such file: {path} (expected a path, 'auto' or 'none')")
    tensors, metadata = read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    heads = {key for key in tensors if key.startswith("head.")} if "nucsam" in metadata else set()
    state = {key: tensor for key, tensor in tensors.items() if key not in heads}
    _check_fit(state, path)
    return Base(state, state_sha256(state), str(path), {key: tensors[key] for key in sorted(heads)}, metadata)


def random_base(seed: int) -> Base:
    """The weights that `mobile_sam` starts from, drawn from `seed`. The global random state stays as it was."""
    state = build_sam(seed).state_dict()
    return Base(state, state_sha256(state), f"none (random, seed {seed})")


def build_sam(seed: int = 0) -> nn.Module:
    """The stock `mobile_sam` model (`vit_t`), in eval mode, with random weights drawn from `seed`.

    Silences the seven warnings of its import and no others. The global random state stays as it was.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"Importing from timm\.models\.(layers|registry) is deprecated", FutureWarning
        )
        warnings.filterwarnings("ignore", r"Overwriting tiny_vit_\w+ in registry with mobile_sam", UserWarning)
        from mobile_sam import build_sam_vit_t
    generator = torch.default_generator  # not torch.manual_seed, which would seed the accelerators too
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        return build_sam_vit_t()
    finally:
        generator.set_state(before)


def state_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors by sorted name: name, dtype, shape and bytes. Neither order nor device counts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    if odd := sorted(key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()):
        raise ValueError(f"{path}: found NaN or infinity in {len(odd)} tensors: {_shortened(odd)}")


def default_cache() -> Path:
    """$NUCSAM_CACHE, else $XDG_CACHE_HOME/nucsam, else ~/.cache/nucsam."""
    if own := os.environ.get("NUCSAM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nucsam"


def _published(cache: Path) -> Path:
    """MobileSAM's published file in `cache`, downloaded where it is not there yet."""
    path = cache / FILE
    if not path.exists():
        _download(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != FILE_SHA256:
        raise ValueError(
            f"{path} is not MobileSAM's published {FILE}: its SHA-256 is {found}, expected {FILE_SHA256}. "
            "Delete it to download it again, or give its path as model.weights to use it as it is."
        )
    return path


def _download(path: Path) -> None:
    """Fetches the first of `URLS` with the right SHA-256 to `path`, which appears whole or not at all."""
    part = path.with_name(f"{FILE}.{os.getpid()}.part")
    failures = []
    for url in URLS:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _fetch(url, part)
            if found == FILE_SHA256:
                part.replace(path)
                return
            failures.append(f"{url}: SHA-256 {found}, expected {FILE_SHA256}")
        except (OSError, HTTPException) as error:
            failures.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise ValueError(
        "model.weights = 'auto': MobileSAM's weights could not be downloaded.\n  "
        + "\n  ".join(failures)
        + f"\nPut {FILE} there yourself: {path}"
        + "\nor set model.weights to its path, or to 'none' for random weights."
    )


def _fetch(url: str, part: Path) -> str:
    """Writes the body at `url` to `part`, with a progress bar on standard error, and returns its SHA-256."""
    digest = hashlib.sha256()
    columns = TextColumn(FILE), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response,
        part.open("wb") as file,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        size = response.headers["Content-Length"]
        task = progress.add_task(FILE, total=int(size) if size else None)
        while chunk := response.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on garbage the unpickler raises whatever its bytes lead to
        raise ValueError(
            f"{path} is not a whole checkpoint of tensors alone ({type(error).__name__}); a file that would run code is"
            f" never read. Expected MobileSAM's {FILE} (download it again) or a file of nucsam export"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds a {type(value).__name__} under {key!r}, expected only tensors: save the weights alone"
            )
        if not isinstance(key, str):
            raise ValueError(f"{path} holds a tensor under {key!r}, expected only names")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path} holds a tensor without dense values under {key!r}, expected only dense ones")
    _check_finite(state, path)
    return state


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; a ValueError names one that is missing, damaged, or holds NaN or infinity."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected one that nucsam wrote") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    _check_finite(tensors, path)
    return tensors, metadata


def _check_fit(state: dict[str, Tensor], path: Path) -> None:
    fresh = build_sam().state_dict()
    stock = {key: tuple(tensor.shape) for key, tensor in fresh.items()}
    kinds = [
        f"{key} {tensor.dtype}, expected {fresh[key].dtype}"
        for key, tensor in state.items()
        if key in stock and tensor.is_floating_point() != fresh[key].is_floating_point()
    ]
    shapes = [
        f"{key} {tuple(tensor.shape)}, expected {stock[key]}"
        for key, tensor in state.items()
        if key in stock and tuple(tensor.shape) != stock[key]
    ]
    problems = {
        "missing": stock.keys() - state.keys(),
        "unexpected": state.keys() - stock.keys(),
        "of another shape": shapes,
        "of another type": kinds,
    }
    found = [f"{len(keys)} keys {what}: {_shortened(sorted(keys))}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{path} does not fit MobileSAM (vit_t). {'; '.join(found)}. Expected MobileSAM's {FILE} or a file of "
            "nucsam export; an adapter is merged with its base by nucsam export first"
        )


def _shortened(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
