"""How long does it take to measure, outline and write a nucleus, and does memory grow?

    python benchmarks/writing.py [--nuclei 20000] [--memory 200000 2000000] [--before 6bdc1a4]
        [--repeat 3] [--json FILE]

Every row is a process of its own that writes one file, of windows of 1024 px with the nuclei of one
synthetic image each. For memory they are 4,096 squares a window, which are quick. The peer is
nucsam itself at an earlier commit, in a worktree of git: one thread, `regionprops_table` and a loop
over the edges of each nucleus. The processes take turns.

Times are CPU time of all threads, to which other programs do not add, and wall time. "of before"
compares CPU time with the earlier commit's GeoJSON or CSV. Memory is the largest `RssAnon`, which
leaves out mapped files, so it exists on Linux alone. --device, --batch, --image-size, --dtype and
--threads change nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench

from nucsam.data.synthetic import make_image
from nucsam.predict.writers import TABLES

ROOT = Path(__file__).parents[1]
SIDE = 1024  # px of a window
GOAL = 0.3  # most of the earlier commit's time for GeoJSON
FLAT = 1.1  # most that memory grows from the first number of --memory to the last
CHILD = """
import json, sys, tempfile, threading, time
from pathlib import Path
import numpy as np
try:
    from nucsam.model.instances import Nuclei
    from nucsam.predict.tiles import windows
    from nucsam.predict.writers import output_files, write_files
    nuclei_of = lambda label: Nuclei(label, np.linspace(0.7, 1, label.max()))
except ImportError:  # the earlier commit
    from nucsam.outputs import files as output_files, write as write_files
    from nucsam.tiles import windows
    nuclei_of = lambda label: label
tile, label, format, count = np.load(sys.argv[1]), np.load(sys.argv[2]), sys.argv[3], sys.argv[4]
side, per_window = len(label), int(label.max())
across = max(1, round((int(count) / per_window) ** 0.5))
down = -(-int(count) // (per_window * across))

class Image:
    shape = side * down, side * across, 3
    def __getitem__(self, place):
        return tile

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) / 2**10 if "RssAnon:" in text else 0.0

def watch():
    while not done.wait(0.02):
        peaks.append(anonymous())

peaks, done = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
with tempfile.TemporaryDirectory(dir=Path(sys.argv[1]).parent) as folder:
    files = output_files(Path(folder), "a", [format])
    parts = ((window, nuclei_of(label)) for window in windows(Image.shape[:2], side, 0))
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    nuclei = write_files(files, Image(), parts, 0.25)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    size = files[format].stat().st_size
row = {"us": 1e6 * wall / nuclei, "cpu_us": 1e6 * cpu / nuclei, "bytes": size / nuclei}
print(json.dumps(row | {"peak_mib": max(peaks), "nuclei": nuclei}))
"""


@contextmanager
def worktree(commit: str) -> Iterator[Path | None]:
    """A folder with the files of a commit of this repository; None of no commit."""
    if not commit:
        yield None
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / commit
        add = [*git, "add", "--quiet", "--detach", str(path), commit]
        subprocess.run(add, check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def write(
    code: Path, folder: Path, format: str, count: int, label: str = "label"
) -> dict[str, float]:
    """Write `count` nuclei or some more to one file, by the nucsam in the folder `code`."""
    arguments = [str(folder / "image.npy"), str(folder / f"{label}.npy"), format, str(count)]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
    return json.loads(done.stdout)


def measure(
    args: argparse.Namespace, folder: Path, before: Path | None
) -> dict[str, dict[str, Any]]:
    """The rows of the first table: medians over the turns."""
    ways = {name: (ROOT, name) for name in TABLES}
    if before:
        ways |= {f"{args.before} {name}": (before, name) for name in ("geojson", "csv")}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, (code, format) in ways.items():
            turns[name].append(write(code, folder, format, args.nuclei))
    rows = {
        name: {key: median(turn[key] for turn in turns_of) for key in turns_of[0]}
        for name, turns_of in turns.items()
    }
    for name, row in rows.items():
        peer = rows.get(f"{args.before} {'csv' if name.endswith('csv') else 'geojson'}")
        if peer:
            row["of_before"] = row["cpu_us"] / peer["cpu_us"]
    return rows


def cells(row: dict[str, float]) -> dict[str, float]:
    names = {
        "us": "µs a nucleus",
        "cpu_us": "CPU µs",
        "of_before": "of before",
        "bytes": "bytes",
        "peak_mib": "RssAnon MiB",
    }
    return {title: row[name] for name, title in names.items() if name in row}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, repeat=3)
    parser.add_argument("--nuclei", type=bench.integer(), default=20_000)
    parser.add_argument("--memory", type=bench.integer(), nargs="*", default=[200_000, 2_000_000])
    parser.add_argument("--before", default="6bdc1a4", help="commit; '' = no peer")
    args = bench.parse(parser, arguments)
    args.device = "cpu"
    machine, console = bench.Machine(args), Console(width=125)
    with tempfile.TemporaryDirectory() as name, worktree(args.before) as before:
        folder = Path(name)
        image, label, _ = make_image(SIDE, 1, organ="human kidney")
        np.save(folder / "image.npy", image)
        np.save(folder / "label.npy", np.unique(label, return_inverse=True)[1].astype(np.int32))
        squares = np.arange(1, (SIDE // 16) ** 2 + 1, dtype=np.int32).reshape(SIDE // 16, -1)
        np.save(folder / "squares.npy", np.kron(squares, np.pad(np.ones((6, 6), np.int32), 5)))
        results = measure(args, folder, before)
        memory = {f"{n:,}": write(ROOT, folder, "geojson", n, "squares") for n in args.memory}
    rows = {name: cells(row) for name, row in results.items()}
    console.print(bench.table(f"one file of {args.nuclei:,} nuclei", rows))
    met = {"time": results["geojson"]["of_before"] <= GOAL} if args.before else {}
    if memory:
        rows = {name: cells(row) for name, row in memory.items()}
        console.print(bench.table("GeoJSON of", rows, first="nuclei"))
        first, *_, last = (row["peak_mib"] for row in [*memory.values()] * 2)
        met["memory"] = last <= FLAT * first
    goals = f"at most {GOAL:g} of the CPU time of {args.before}; memory at most {FLAT:g} times"
    console.print(
        f"goals: {goals}; {', '.join(f'{k} met' if v else f'{k} MISSED' for k, v in met.items())}"
    )
    document = {
        "benchmark": "writing",
        **bench.options(args),
        **machine.about(["shapely", "pyarrow"]),
        "results": results,
        "memory": memory,
        "met": met,
    }
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
