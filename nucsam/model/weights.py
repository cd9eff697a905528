"""Base weights: the published file of an encoder, another file of its tensors, or random ones.

A base holds every tensor of the stock model under its stock name: `image_encoder.*`,
`prompt_encoder.*` and `mask_decoder.*`. A nucsam export holds those and its head, `head.*`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nucsam.download import fetch, file_checksum
from nucsam.errors import UserError
from nucsam.files import expanded, shortened
from nucsam.model.bases import BASES, Published
from nucsam.model.stock import import_builders
from nucsam.names import default_cache

_DECODER = ("prompt_encoder.", "mask_decoder.")
# (seed, encoder) -> an unchanged model that a check has built; the next caller takes it.
_SPARE: dict[tuple[int, str], nn.Module] = {}


@dataclass(frozen=True)
class Base:
    """The weights of an encoder, and of its stock decoder, and where they come from."""

    state: dict[str, Tensor]  # stock names, CPU
    # `state_sha256(state)`, whatever the format of the file. Of an adapter on its base: that of the
    # tensors of both, because machines differ in the last bit of what they merge.
    sha256: str
    source: str  # a path, a name of `find_model`, or "none (random, seed 0)"
    extra: dict[str, Tensor] = field(default_factory=dict)  # `head.*` of a nucsam export
    encoder: str = "mobile_sam"  # a name in `BASES`
    trained_head: str = ""  # `model.head` of a nucsam export; "" of any other file


def load_base(spec: str | Path, encoder: str = "mobile_sam", *, seed: int = 0) -> Base:
    """The base that `model.weights` names.

    Args:
        spec: "auto" for the published file of the encoder, which is downloaded once; "none" for
            random weights; or the path of a `.safetensors` or torch file.
        encoder: a name in `BASES`.
        seed: random weights are drawn from it.

    Raises:
        UserError: the file is missing, is no checkpoint, or does not fit the stock model.
    """
    if spec == "none":
        return random_base(seed, encoder)
    base = BASES[encoder]
    path = _published(base) if spec == "auto" else expanded(spec)
    if path.is_dir():
        found = f"found the folder {path}, expected a file"
        raise UserError(f"model.weights: {found}; nucsam export makes one of a run directory")
    if not path.is_file():
        expected = "a path, 'auto', 'none', 'starter' or hf:USER/NAME"
        raise UserError(f"model.weights: no such file: {path}; expected {expected}")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        tensors, metadata = _read_torch(path, base), {}
    head = {}
    if "nucsam" in metadata:
        head = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith("head.")}
    stock = build_sam(encoder=encoder)
    expected = stock.state_dict()
    checked = tensors
    if not any(name.startswith(_DECODER) for name in expected):  # it is kept, but never run
        checked = {name: t for name, t in tensors.items() if not name.startswith(_DECODER)}
    if problem := misfit(checked, expected):
        raise UserError(
            f"{path} does not fit model.encoder = {encoder!r}: {problem}. Expected {base.name}'s "
            f"{base.file} or a merged file of nucsam export, which merges an adapter with its base"
        )
    _SPARE[0, encoder] = stock
    return Base(tensors, state_sha256(tensors), str(path), head, encoder)


def random_base(seed: int, encoder: str = "mobile_sam") -> Base:
    """The weights that the stock model starts from, drawn from `seed`."""
    state = build_sam(seed, encoder).state_dict()
    source = f"none (random, seed {seed})"
    return Base(state, state_sha256(state), source, encoder=encoder)


def build_sam(seed: int = 0, encoder: str = "mobile_sam") -> nn.Module:
    """A stock model in eval mode, with weights drawn from `seed`."""
    if spare := _SPARE.pop((seed, encoder), None):
        return spare
    import_builders()
    with seeded(seed):
        return BASES[encoder].stock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which the CPU's random numbers come from `seed`; the old state returns after."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(seed)
        yield


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of each tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Half precision comes back as float32.

    Raises:
        UserError: the file is missing or damaged, or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: _in_full(file.get_tensor(name)) for name in names}
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected one that nucsam wrote") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    _check_finite(tensors, path)
    return tensors, metadata


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Why tensors cannot take the place of `expected`; empty where they can.

    They need the same names and shapes, and fractions where fractions are expected.
    """
    problems = []
    for name in sorted(found.keys() | expected.keys()):
        forms = [_form(tensors.get(name)) for tensors in (found, expected)]
        if forms[0] != forms[1]:
            problems.append(f"{name}: found {forms[0]}, expected {forms[1]}")
    return f"{len(problems)} tensors differ; {shortened(problems, 3)}" if problems else ""


def _form(tensor: Tensor | None) -> str:
    """The kind of number and the shape of a tensor."""
    if tensor is None:
        return "none"
    kind = "fractions" if tensor.is_floating_point() else "integers"
    return f"{kind} {tuple(tensor.shape)}"


def _published(base: Published) -> Path:
    """The published file of a base in `default_cache()`, downloaded if it is not there."""
    path = default_cache() / base.file
    if not base.sha256:
        raise UserError(
            f"model.weights: found 'auto', but no address serves {base.name}'s {base.file}, "
            "expected its path, or 'none' for random weights"
        )
    if not path.is_file():
        checksum = f"sha256:{base.sha256}"
        advice = (
            f"; elsewhere, curl -L -o {base.file} {base.urls[0]} fetches it. NUCSAM_CACHE names "
            "another folder; for a training, model.weights takes its path, or 'none' (random)"
        )
        fetch(path, base.urls, checksum=checksum, size=base.size, advice=advice)
    digest = file_checksum(path).removeprefix("sha256:")
    if digest != base.sha256:
        raise UserError(
            f"{path} is not {base.name}'s published {base.file}: found SHA-256 {digest}, expected "
            f"{base.sha256}. Delete it to download it again"
        )
    return path


def _read_torch(path: Path, base: Published) -> dict[str, Tensor]:
    if path.suffix == ".onnx":
        expected = "expected a .safetensors file of nucsam export"
        raise UserError(f"{path}: found an ONNX graph, which cannot be trained; {expected}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes the unpickler raise anything
        raise UserError(
            f"{path} is not a whole checkpoint of tensors alone ({type(error).__name__}), and "
            f"nucsam reads no file that would run code. Expected {base.name}'s {base.file} "
            "(download it again) or a file of nucsam export"
        ) from error
    if base.part and isinstance(state, dict):
        state = state.get(base.part, state)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(
                f"{path} holds a {type(value).__name__} under {name!r}, expected only tensors "
                "under their names: save the weights alone"
            )
        if value.layout != torch.strided or value.is_meta:
            raise UserError(f"{path} holds a tensor without dense values under {name!r}")
    _check_finite(state, path)
    return state


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    names = sorted(
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    )
    if names:
        raise UserError(
            f"{path}: found NaN or infinity in {len(names)} tensors: {shortened(names)}"
        )
