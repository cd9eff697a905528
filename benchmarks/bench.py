"""What the benchmarks share: options, clocks, memory, the machine's ceilings, the last line."""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from nucsam import UserError
from nucsam.config import Config, differences, load_config
from nucsam.files import without_nan, write_text
from nucsam.predict.devices import allow_tf32, find_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "mobilesam-mirror")


def parser(
    doc: str, *, batch: int = 4, image_size: int = 512, repeat: int = 7
) -> argparse.ArgumentParser:
    """The options that all scripts have.

    Args:
        doc: docstring of the script.
        batch: default of --batch.
        image_size: default of --image-size, px.
        repeat: default of --repeat.
    """
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch", type=integer(), default=batch)
    side = integer(64, multiple_of=32)
    add("--image-size", type=side, default=image_size, help=f"px, default {image_size}")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--repeat", type=integer(), default=repeat, help="timed turns, after one to warm up")
    threads = torch.get_num_threads()
    add("--threads", type=integer(), default=threads, help="of torch in the main process")
    add("--json", type=new_file, help="also write the JSON document to this file")
    return options


def integer(least: int = 1, *, multiple_of: int = 1) -> Callable[[str], int]:
    """The type of an option: a multiple of `multiple_of`, at least `least`."""

    def read(text: str) -> int:
        number = int(text)
        if number < least or number % multiple_of:
            multiple = f", a multiple of {multiple_of}" if multiple_of > 1 else ""
            raise argparse.ArgumentTypeError(f"found {number}, expected at least {least}{multiple}")
        return number

    read.__name__ = "integer"  # argparse names it in its message about text that is no number
    return read


def new_file(text: str) -> Path:
    """The type of an option: a file to write at the end, in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"found no folder {path.parent}, expected a file in an existing folder"
        )
    return path


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The checked options. Sets the threads of torch."""
    args = parser.parse_args(arguments)
    try:
        args.device = str(find_device(args.device))  # cpu or cuda:N
    except UserError as error:
        parser.error(str(error))
    if args.dtype == "fp16" and args.device == "cpu":
        parser.error("--dtype fp16: a CPU would compute in fp32, expected fp32 or bf16 there")
    torch.set_num_threads(args.threads)
    return args


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option `--config`: args.config is a `Config`."""

    def read(text: str) -> Config:
        try:
            return load_config(Path(text))
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument(
        "--config",
        type=read,
        default=Config(),
        metavar="CONFIG.toml",
        help="default: nucsam's defaults",
    )


def cropped(config: Config, side: int) -> Config:
    """The configuration with crops of `side` model px."""
    return replace(config, data=replace(config.data, crop=round(side / config.data.scale)))


class Machine:
    """A device and a dtype: clocks, peak memory, ceilings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.dtype = DTYPES[args.dtype]
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.device)
            allow_tf32()  # as in training and prediction
        # The milliseconds of `turns` to compare: CPU time says all only with one thread of torch.
        self.clock = "ms" if self.cuda or args.threads > 1 else "cpu_ms"

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def now(self) -> float:
        """Seconds, read when the device is idle.

        Wall time on a GPU. On a CPU the time of this process, to which other programs do not add.
        """
        self.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()

    def turns(
        self,
        calls: Mapping[str, Callable[[int], Any]],
        repeat: int,
        *,
        steps: int = 1,
        warm: int = 1,
    ) -> dict[str, dict[str, float]]:
        """Time calls in turns, so that a busy spell of the machine meets all of them.

        A whole call counts, or what lies between its own `start()` and `stop()`.

        Args:
            calls: each gets the number of the turn.
            repeat: timed turns.
            steps: steps in a call.
            warm: turns before, which are not timed.

        Returns:
            For each call the wall and CPU milliseconds of a step. CPU time includes that of child
            processes.
        """
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for number in range(warm + repeat):
            for name, call in calls.items():
                self.start()
                call(number)
                self.stop()
                spent[name].append(self.spent)
        rows = {}
        for name, turns in spent.items():
            wall, cpu = 1e3 * np.array(turns[warm:]).T / steps
            row = {
                "ms": np.median(wall),
                "ms_min": wall.min(),
                "ms_max": wall.max(),
                "cpu_ms": np.median(cpu),
            }
            rows[name] = {key: float(value) for key, value in row.items()}
        return rows

    def start(self) -> None:
        """Start the clock of a turn. A call that starts it again drops what it has spent so far."""
        children = _children_seconds()
        self.synchronize()
        self.began = (time.perf_counter(), time.process_time() + children)
        self.spent = None

    def stop(self) -> None:
        """Stop the clock. The rest of the call does not count."""
        if self.spent is None:
            self.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            self.spent = wall - self.began[0], cpu + _children_seconds() - self.began[1]

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Peak memory of one call above the memory before it, MiB.

        Allocated memory on a GPU, resident memory on a CPU. NaN on systems other than Linux.
        """
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return math.nan
        # Memory that an earlier call left in the heap would hide this call's.
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = psutil.Process().memory_info().rss
        call()
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        return max(int(peak) / 2**10 - before / 2**20, 0.0)

    def ceiling(self) -> dict[str, float]:
        """The best speed of a large matrix product (TFLOP/s, in the dtype) and of a copy (GB/s)."""
        n, size = (8192, 2**30) if self.cuda else (1024, 2**28)
        a = torch.randn(n, n, device=self.device).to(self.dtype)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rows = self.turns(
            {"matmul": lambda _: a @ a, "copy": lambda _: target.copy_(source)}, repeat=7
        )
        return {
            "tflops": 2e-9 * n**3 / rows["matmul"]["ms_min"],
            "gb_per_s": 2e-6 * size / rows["copy"]["ms_min"],
        }

    def about(self, packages: Sequence[str] = ()) -> dict[str, Any]:
        """Hardware, load, date, and versions of `PACKAGES` and of `packages`."""
        return {
            "machine": _gpu() if self.cuda else _cpu(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "date": date.today().isoformat(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in (*PACKAGES, *packages)},
            },
        }


def host(args: argparse.Namespace) -> Machine:
    """The CPU, for work that runs there beside any device."""
    return Machine(argparse.Namespace(**vars(args) | {"device": "cpu"}))


def _gpu() -> str:
    memory = torch.cuda.get_device_properties().total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {memory:.1f} GiB, CUDA {torch.version.cuda}"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def _children_seconds() -> float:
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in a call."""
    mapping = {
        torch.ops.aten.convolution_backward: _convolution_backward,
        torch.ops.aten.addmm_: _addmm_,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def _convolution_backward(
    grad, x, weight, bias, stride, padding, dilation, transposed, _, groups, wanted, **__
) -> int:
    """Each gradient costs a forward pass. PyTorch's formula ignores groups in a weight's."""
    return (wanted[0] + wanted[1]) * conv_flop_count(x, weight, grad, transposed)


def _addmm_(_, a: Sequence[int], b: Sequence[int], **__) -> int:
    """LoRA's product in place, for which PyTorch has no formula."""
    return 2 * a[0] * a[1] * b[1]


def table(
    title: str, rows: Mapping[str, Mapping[str, Any]], caption: str = "", first: str = ""
) -> Table:
    """A rich Table; numbers get three digits.

    Args:
        title: above the table.
        rows: label -> cells; the columns are the keys of all rows.
        caption: below the table.
        first: title of the column of labels.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    grid = Table(first, title=title, caption=caption or None)
    for name in names:
        grid.add_column(name, justify="right")
    for label, row in rows.items():
        grid.add_row(label, *(_cell(row.get(name, "")) for name in names))
    return grid


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(row: Mapping[str, float]) -> str:
    """The fastest and the slowest turn."""
    return f"{_cell(row['ms_min'])} - {_cell(row['ms_max'])}"


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they stand in the document."""
    values = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    if "config" in values:
        values["config"] = [*differences(Config(), args.config).values()]
    return values


def finish(document: dict[str, Any], path: Path | None) -> None:
    """Print the document as the last line, and write it to `path` if there is one."""
    text = json.dumps(without_nan(document))
    print(text)
    if path:
        write_text(path, text + "\n")
