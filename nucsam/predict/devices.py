"""The device of this process, and the type of number in which a model runs on it."""

import os
import re

import torch
from accelerate.utils import parse_flag_from_env

from nucsam.errors import UserError
from nucsam.processes import process_count


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
        raise UserError(
            f"device: found {name!r}, but PyTorch sees {count} GPU(s), so no cuda:{number}; "
            "expected cpu"
        )
    return torch.device("cuda", number)


def autocast_dtype(precision: str | None, device: torch.device) -> torch.dtype | None:
    """The type in which a model runs that was trained in a precision; None = its own.

    A CPU has no fp16, and not every GPU of Apple has bf16: there the model keeps its own type.

    Args:
        precision: fp16, bf16 or another name of Accelerate's; None = not known.
        device: where the model is.
    """
    if precision == "bf16" and device.type != "mps":
        return torch.bfloat16
    if precision == "fp16" and device.type == "cuda":
        return torch.float16
    return None
