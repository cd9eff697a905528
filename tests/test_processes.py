"""The cores and the memory of this process."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from nucsam import processes


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 8 cores, of which this process may use those that a test says."""

    def make(*, percent=0.0, affinity=8, quota=None, version=2, share=1):
        monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(
            processes.os, "sched_getaffinity", lambda _: range(affinity), raising=False
        )
        usage = SimpleNamespace(cpu_percent=lambda _: percent)
        monkeypatch.setattr(processes, "psutil", usage)
        monkeypatch.setattr(processes, "CGROUP", tmp_path)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(share))
        if quota is not None and version == 2:
            (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        elif quota is not None:
            (tmp_path / "cpu").mkdir()
            (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        return processes.idle_cores()

    return make


@pytest.mark.parametrize(
    ("facts", "cores"),
    [
        ({}, 8),
        ({"percent": 30.0}, 6),
        ({"percent": 75.0}, 2),
        ({"percent": 100.0}, 1),
        ({"affinity": 3}, 3),
        ({"affinity": 3, "percent": 50.0}, 3),  # on the other five
        ({"quota": 250_000}, 2),
        ({"quota": 50_000}, 1),
        ({"quota": "max"}, 8),
        ({"quota": 400_000, "version": 1}, 4),
        ({"quota": -1, "version": 1}, 8),
        ({"share": 3}, 2),
    ],
)
def test_idle_cores(machine, facts, cores):
    assert machine(**facts) == cores


FAULTS = """
import ctypes, resource
from nucsam.processes import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(block := libc.malloc(2**26), 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
ctypes.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
first = faults(), faults()
keep_freed_memory()
print(*first, faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_not_asked_for_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, again, _, kept = map(int, done.stdout.split())
    assert kept < again / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda _: object())
    processes.keep_freed_memory()
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    monkeypatch.delattr(processes.ctypes, "CDLL")
    processes.keep_freed_memory()


@pytest.mark.parametrize(
    ("text", "threads"), [("", None), ("4", 4), (" 4,2", 4), ("0", None), ("all", None)]
)
def test_threads_are_chosen_as_openmp_reads_them(monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert processes.chosen_threads() == threads
