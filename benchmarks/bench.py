"""What the benchmarks have in common: options, clocks, memory, what the machine can do at most, and the last line."""

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

from nucsam import config as configuration
from nucsam.atomic import atomic
from nucsam.config import Config
from nucsam.predict import find_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "mobilesam-mirror")


def parser(doc: str, *, batch: int = 4, image_size: int = 512, repeat: int = 7) -> argparse.ArgumentParser:
    """The options that all have; `doc` is the script's own."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--batch", type=integer(), default=batch)
    made.add_argument("--image-size", type=integer(64, of=32), default=image_size, help=f"px, default {image_size}")
    made.add_argument("--dtype", choices=DTYPES, default="fp32")
    made.add_argument("--repeat", type=integer(), default=repeat, help="turns of each, after one to warm up")
    made.add_argument("--threads", type=integer(), default=torch.get_num_threads(), help="of torch in the main process")
    made.add_argument("--json", type=new_file, help="also write the JSON document here")
    return made


def integer(least: int = 1, *, of: int = 1) -> Callable[[str], int]:
    """The type of an option: a multiple of `of`, at least `least`."""

    def read(text: str) -> int:
        found = int(text)
        if found < least or found % of:
            raise argparse.ArgumentTypeError(
                f"found {found}, expected at least {least}" + f", a multiple of {of}" * (of > 1)
            )
        return found

    read.__name__ = "integer"  # in argparse's own message on what is no number
    return read


def new_file(text: str) -> Path:
    """The type of an option: a file to write at the end, whose folder is there at the start."""
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"found no folder {path.parent}, expected the file in one that is there")
    return path


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options given, looked over; torch gets its threads."""
    args = parser.parse_args(arguments)
    try:
        args.device = str(find_device(args.device))  # cpu or cuda:N, and no other way to say so
    except ValueError as error:
        parser.error(str(error))
    if args.dtype == "fp16" and args.device == "cpu":
        parser.error("--dtype fp16: a CPU would compute in fp32, expected fp32 or bf16 there")
    torch.set_num_threads(args.threads)
    return args


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option `--config`: args.config is a `Config`."""

    def read(text: str) -> Config:
        try:
            return configuration.load(Path(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.add_argument("--config", type=read, default=Config(), metavar="CONFIG.toml", help="else nucsam's defaults")


def cropped(config: Config, side: int) -> Config:
    """The configuration with crops of `side` model px."""
    return replace(config, data=replace(config.data, crop=round(side / config.data.scale)))


class Machine:
    """A device and a dtype: clocks, peak memory, ceilings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.device)  # whose clock and memory are looked at
        # Which of the milliseconds of `turns` to compare by: CPU time says all only with one thread of torch.
        self.clock = "ms" if self.cuda or args.threads > 1 else "cpu_ms"

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def now(self) -> float:
        """Seconds once the device is idle: wall time; on a CPU those of this process, to which others do not add."""
        self.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()

    def turns(
        self, calls: Mapping[str, Callable[[int], Any]], repeat: int, *, steps: int = 1, warm: int = 1
    ) -> dict[str, dict[str, float]]:
        """Wall and CPU milliseconds of a step in calls of `steps` steps, CPU time with that of child processes.

        They take turns, so that a busy spell meets all. Each gets the number of the turn; the first `warm` warm up.
        A call counts whole, or from its own `start()`, and up to its own `stop()`.
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
            row = {"ms": np.median(wall), "ms_min": wall.min(), "ms_max": wall.max(), "cpu_ms": np.median(cpu)}
            rows[name] = {key: float(value) for key, value in row.items()}
        return rows

    def start(self) -> None:
        """Starts the clock of a turn, again in a call that is not to count what it has done so far."""
        children = _children_seconds()
        self.synchronize()
        self.began, self.spent = (time.perf_counter(), time.process_time() + children), None

    def stop(self) -> None:
        """Stops it; what follows in a call does not count."""
        if self.spent is None:
            self.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            self.spent = wall - self.began[0], cpu + _children_seconds() - self.began[1]

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Peak memory in one call above that before it: allocated on a GPU, resident on a CPU (Linux)."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if not Path("/proc/self/clear_refs").exists():
            return math.nan
        ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier call left in the heap would hide this one's
        Path("/proc/self/clear_refs").write_text("5")
        before = psutil.Process().memory_info().rss
        call()
        most = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        return max(int(most) / 2**10 - before / 2**20, 0.0)

    def ceiling(self) -> dict[str, float]:
        """The best that a large matrix product (TFLOP/s, in the dtype) and a memory copy (GB/s) reach here."""
        n, size = (8192, 2**30) if self.cuda else (1024, 2**28)
        a = torch.randn(n, n, device=self.device).to(self.dtype)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rows = self.turns({"matmul": lambda _: a @ a, "copy": lambda _: target.copy_(source)}, repeat=7)
        return {"tflops": 2e-9 * n**3 / rows["matmul"]["ms_min"], "gb_per_s": 2e-6 * size / rows["copy"]["ms_min"]}

    def about(self, packages: Sequence[str] = ()) -> dict[str, Any]:
        """Hardware, load, versions and date."""
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
    """The CPU, for what runs there beside any device."""
    return Machine(argparse.Namespace(**vars(args) | {"device": "cpu"}))


def _gpu() -> str:
    memory = torch.cuda.get_device_properties().total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {memory:.1f} GiB, CUDA {torch.version.cuda}"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _children_seconds() -> float:
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in a call."""
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward, torch.ops.aten.addmm_: _addmm_}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def _convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, _, groups, wanted, **__) -> int:
    """Each gradient takes what the forward pass takes: PyTorch's formula counts all groups of a weight's gradient."""
    return (wanted[0] + wanted[1]) * conv_flop_count(x, weight, grad, transposed)


def _addmm_(_, a: Sequence[int], b: Sequence[int], **__) -> int:
    """LoRA's, in place, which PyTorch has no formula for."""
    return 2 * a[0] * a[1] * b[1]


def table(title: str, rows: Mapping[str, Mapping[str, Any]], caption: str = "", first: str = "") -> Table:
    """A row for each of `rows`; the columns are the keys of all, and a value that is not a string gets three digits."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    made = Table(first, title=title, caption=caption or None)
    for name in names:
        made.add_column(name, justify="right")
    for label, row in rows.items():
        made.add_row(label, *(_cell(row.get(name, "")) for name in names))
    return made


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(row: Mapping[str, float]) -> str:
    """The fastest and the slowest turn."""
    return f"{_cell(row['ms_min'])} - {_cell(row['ms_max'])}"


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The options for the document."""
    found = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if "config" in found:
        found["config"] = configuration.differences(Config(), args.config)
    return found


def finish(document: dict[str, Any], path: Path | None) -> None:
    """Print the document as the last line, and write it where wanted."""
    text = json.dumps(document)
    print(text)
    if path:
        with atomic(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
