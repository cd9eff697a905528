"""A process: what its launcher (`accelerate launch`, SLURM) says, its signals, cores and memory.

Windows has no SIGTERM that a process could handle. Ctrl-Break takes its place.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from nucsam.errors import UserError

CGROUP = Path("/sys/fs/cgroup")  # Linux: where the limits of a container stand


def process_count() -> int:
    """How many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the first of its launch, which writes and prints for all."""
    return int(os.environ.get("RANK", "0")) == 0


def check_joined(joined: int) -> None:
    """Check that Accelerate has joined as many processes as the launcher started.

    Raises:
        UserError: it has not, and each process would run alone.
    """
    if process_count() != joined:
        found = f"the launcher started {process_count()} processes, Accelerate joined {joined}"
        advice = "on CPUs set ACCELERATE_USE_CPU=true or use launch/cpu2.yaml"
        raise UserError(f"WORLD_SIZE: {found}, so each would run alone; {advice}")


def chosen_threads() -> int | None:
    """The threads that OMP_NUM_THREADS chooses, of a list the first number; None = none chosen."""
    match = re.match(r"\s*([1-9]\d{0,5})", os.environ.get("OMP_NUM_THREADS", ""))
    return int(match[1]) if match else None


def is_launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process."""
    # Users set ACCELERATE_MIXED_PRECISION and ACCELERATE_USE_CPU themselves.
    return any(name in os.environ for name in ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"))


def launch_time() -> float:
    """When this launch began, s since 1970: the same on all of its processes.

    Without a launcher it is now.
    """
    launchers = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
    if "RANK" in os.environ and any(name in os.environ for name in launchers):
        return psutil.Process(os.getppid()).create_time()
    return time.time()


@contextmanager
def signals_handled(
    handler: Callable[[int, FrameType | None], Any], *signals: int
) -> Iterator[None]:
    """Context in which signals call `handler`.

    Python sets signal handlers in the main thread only; elsewhere this changes nothing.
    """
    if signal.SIGTERM in signals and sys.platform == "win32":
        signals += (signal.SIGBREAK,)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def exit_on_sigterm() -> AbstractContextManager[None]:
    """Context that turns SIGTERM into SystemExit, which removes partial files on its way out."""
    return signals_handled(lambda number, _: sys.exit(128 + number), signal.SIGTERM)


def child_options(descriptor: int) -> dict[str, Any]:
    """Options of `Popen` for a child that Ctrl-C does not reach, so that it can save.

    Args:
        descriptor: of a file that the child keeps open. Windows hands none over.
    """
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"pass_fds": (descriptor,), "start_new_session": True, "preexec_fn": _die_with_parent}


def ask_to_stop(child: subprocess.Popen) -> None:
    """Send a child of `child_options` the signal on which it saves."""
    child.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else signal.SIGTERM)


def _die_with_parent() -> None:
    """In the child: ask for SIGTERM, on which it saves, when its parent is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def allowed_cores() -> int:
    """Cores that this process may use: of its affinity, and of a container's quota; at least 1."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota_and_period = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
    for names in quota_and_period:  # control groups of version 2, and of version 1
        # Without a quota there is no file, or it holds "max" or -1.
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((CGROUP / n).read_text() for n in names).split())
            cores = min(cores, quota // period) if quota > 0 else cores
    return max(1, cores)


def idle_cores() -> int:
    """This process's share of the `allowed_cores` that no other program uses; at least 1.

    It watches the cores for half a second, so that only programs that run now count. The load
    average would also count what ended a minute ago, such as an installation.
    """
    cores = os.cpu_count() or 1
    busy = cores * psutil.cpu_percent(0.5) / 100
    idle = min(allowed_cores(), round(cores - busy))
    return max(1, idle // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for the tensors of its next step.

    By default glibc, the C library of most Linux systems, gives large blocks back, and the system
    clears their pages again at each step.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks
