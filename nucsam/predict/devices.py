"""The device of this process, and the precision in which a model runs on it."""

import os
import re
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from nucsam.errors import UserError
from nucsam.processes import process_count

# Accelerate's names
PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "no"}


def uses_gpu() -> bool:
    """Whether to run on a GPU: there is one, and the launcher does not ask for the CPU."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def find_device(name: str, per_device: int = 1) -> torch.device:
    """The device of a name; with auto and cuda, each launched process has a GPU of its own.

    Args:
        name: auto, cpu, cuda, cuda:N or mps (Apple's GPU).
        per_device: launched processes that share a GPU.

    Raises:
        UserError: no such device.
    """
    name = str(name)  # also of a torch.device
    match = re.fullmatch(r"auto|cpu|mps|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device: found {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    processes = process_count()
    if match[1] and processes > 1:
        raise UserError(f"device: found {name!r} for {processes} processes, expected cuda")
    mps = torch.backends.mps.is_available()
    if name == "mps" and not mps:
        raise UserError("device: found 'mps', but PyTorch sees no GPU of Apple; expected cpu")
    if name == "auto" and not uses_gpu():
        name = "mps" if mps and not parse_flag_from_env("ACCELERATE_USE_CPU") else "cpu"
    if name in ("cpu", "mps"):
        return torch.device(name)
    number = int(match[1] or int(os.environ.get("LOCAL_RANK", 0)) // per_device)
    count = torch.cuda.device_count()
    if number >= count:
        seen = f"PyTorch sees {count} GPU(s), so no cuda:{number}"
        raise UserError(f"device: found {name!r}, but {seen}; expected cpu")
    allow_tf32()
    return torch.device("cuda", number)


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """Accelerate on the GPU or the CPU, as `uses_gpu` says.

    Args:
        precision: one of PRECISIONS; another one than an earlier accelerator of this process had
            ends that one.
        options: others of Accelerator.
    """
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    if uses_gpu():
        allow_tf32()
    return Accelerator(cpu=not uses_gpu(), mixed_precision=precision, **options)


def half_type(device: torch.device) -> torch.dtype | None:
    """The type of 16 bits in which a device computes fast; None = it has none.

    Among NVIDIA's GPUs, those before Ampere (T4, V100, P100) have fp16 alone.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else None


def allow_tf32() -> None:
    """Let GPUs since Ampere round the factors of fp32 matrix products to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = True  # that of convolutions is on


def autocast_dtype(precision: str | None, device: torch.device) -> torch.dtype | None:
    """The type in which a model runs that was trained in a precision; None = its own.

    For bf16 that is what `half_type` says: fp16 on a GPU without fast bf16, the model's own type on
    a CPU without it. Only NVIDIA's GPUs take fp16.

    Args:
        precision: fp16, bf16 or another name of Accelerate's; None = not known.
        device: where the model is.
    """
    if precision == "bf16":
        return half_type(device)
    if precision == "fp16" and device.type == "cuda":
        return torch.float16
    return None
