"""How long does scoring one pair of label maps take, beside every peer that installs from PyPI?

    pip install torchmetrics panoptica stardist cellpose cellseg-metrics medpy
    python benchmarks/metrics.py [--repeat 30] [--sizes 512 1024 5000] [--peers stardist medpy] [--json FILE]

Prints a table, the bars, and one JSON line last. Single-threaded. Peers that are not installed, or that a size
is too much for, are skipped with the reason.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
from nucsam.metrics import PROTOCOLS, dice, score

NUCLEI = {512: 300, 1024: 600, 5000: 30_000}
SLOW = 1.0  # s; what takes longer is called once, after the warm-up
TOO_MUCH = {  # why a peer is not run at 5000 px: measured when the bars were set, or the size of what it allocates
    "stardist": "dense matrices of 30,000 x 27,000, 3 GB and more each: ran out of memory at 14 GB",
    "cellpose AP": "dense matrices of 30,000 x 27,000, 3 GB and more each: ran out of memory at 14 GB",
    "cellpose AJI": "dense matrices of 30,000 x 27,000, 3 GB and more each, as its AP",
    "cellseg-metrics": "one mask for each nucleus: needs over 1 GB at 1024 px already",
    "panoptica": "39 s a call",
    "torchmetrics": "137 s a call",
}


def ellipses(side: int, centres, areas, ratios, angles) -> np.ndarray:
    """(side, side) int32 label map; later nuclei cover earlier ones."""
    labels = np.zeros((side, side), np.int32)
    for name, ((y, x), area, ratio, angle) in enumerate(zip(centres, areas, ratios, angles), 1):
        long = np.sqrt(area / np.pi / ratio)
        box = tuple(slice(max(int(c - long), 0), min(int(c + long) + 2, side)) for c in (y, x))
        Y, X = np.ogrid[box]
        along = (X - x) * np.cos(angle) + (Y - y) * np.sin(angle)
        across = (Y - y) * np.cos(angle) - (X - x) * np.sin(angle)
        labels[box][(along / long) ** 2 + (across / long / ratio) ** 2 <= 1] = name
    return labels


def scene(side: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A truth with n nuclei of 250 to 650 px, and a prediction that moves all, loses 10 %, merges and splits 5 %."""
    rng = np.random.default_rng(seed)
    cells = int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.divmod(rng.permutation(cells**2)[:n], cells), 1)
    centres = (grid + rng.uniform(0.2, 0.8, (n, 2))) * side / cells
    shape = rng.uniform(250, 650, n), rng.uniform(0.6, 1, n), rng.uniform(0, np.pi, n)
    truth = ellipses(side, centres, *shape)
    kept = rng.random(n) > 0.1
    moved = (centres + rng.normal(0, 2, (n, 2)))[kept]
    areas, angles = shape[0] * rng.uniform(0.7, 1.3, n), shape[2] + rng.normal(0, 0.2, n)
    pred = ellipses(side, moved, areas[kept], shape[1][kept], angles[kept])
    k = len(moved)
    chosen = rng.permutation(k) + 1
    merged, split = chosen[: k // 20], chosen[k // 20 : k // 10]
    names = np.arange(k + 1)
    names[merged] = np.minimum(merged + 1, k)
    halves = np.isin(pred, split) & (np.arange(side) // 13 % 2 == 0)
    return truth, (names[pred] + k * halves).astype(np.int32)


def peers() -> dict[str, tuple[str, Callable]]:
    """Name -> (what it computes, function that imports it and returns the call)."""

    def stardist():
        from stardist.matching import matching

        return matching

    def cellpose_ap():
        from cellpose.metrics import average_precision

        thresholds = np.arange(0.5, 1, 0.05)
        return lambda t, p: average_precision([t], [p], threshold=thresholds)

    def cellpose_aji():
        from cellpose.metrics import aggregated_jaccard_index

        return lambda t, p: aggregated_jaccard_index([t], [p])

    def panoptica():
        from panoptica import InputType, NaiveThresholdMatching, Panoptica_Evaluator

        evaluator = Panoptica_Evaluator(
            expected_input=InputType.UNMATCHED_INSTANCE,
            instance_matcher=NaiveThresholdMatching(matching_threshold=0.5),
        )
        return lambda t, p: evaluator.evaluate(p, t, verbose=False)

    def torchmetrics():
        import torch
        from torchmetrics.functional.detection import panoptic_quality

        torch.set_num_threads(1)

        def call(t, p):
            both = (torch.from_numpy(np.stack([m > 0, m], -1).astype(np.int64))[None] for m in (p, t))
            return panoptic_quality(*both, things={1}, stuffs={0})

        return call

    def cellseg():
        from cellseg_metrics import functional

        def call(t, p):
            functional.panoptic_quality(t, p)
            functional.aggregated_jaccard_index(t, p)
            functional.dice2(t, p)

        return call

    def medpy():
        from medpy.metric import dc

        return lambda t, p: dc(p, t)

    return {
        "stardist": ("PQ, F1, AP at one threshold", stardist),
        "cellpose AP": ("AP at 10 thresholds", cellpose_ap),
        "cellpose AJI": ("its own AJI", cellpose_aji),
        "panoptica": ("PQ and instance scores", panoptica),
        "torchmetrics": ("PQ", torchmetrics),
        "cellseg-metrics": ("PQ, AJI, Dice2", cellseg),
        "medpy": ("Dice", medpy),
    }


def ours() -> dict[str, tuple[str, Callable]]:
    plain = PROTOCOLS["plain"]
    return {
        "floor": ("count_nonzero of both maps", lambda: lambda t, p: (np.count_nonzero(t), np.count_nonzero(p))),
        "nucsam score": ("all 11 metrics, AP, pairs", lambda: lambda t, p: score(t, p, protocol=plain)),
        "nucsam dice": ("Dice", lambda: dice),
    }


def peak_mb(call: Callable, *maps: np.ndarray) -> float:
    """Peak resident memory of one call above that before it, MB; NaN outside Linux."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3

    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier call left in the heap would hide this one's
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call(*maps)
    return max(resident("VmHWM") - before, 0.0)


def measure(calls: dict[str, Callable], maps: tuple[np.ndarray, np.ndarray], repeat: int) -> dict[str, dict]:
    """Median and fastest ms, number of calls and peak MB of each.

    The calls take turns, five times `repeat` / 5 in a row, so that a busy spell of the machine meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(6):  # the first is the warm-up: imports, compilation, caches
        for name, call in calls.items():
            known = min(seconds[name], default=0.0)
            if turn > 1 and known > SLOW:  # one call after the warm-up is enough
                continue
            for again in range(2 if turn == 0 else 1 + max(1, repeat // 5)):
                start = time.perf_counter()
                call(*maps)
                taken = time.perf_counter() - start
                if turn and (again or taken > SLOW):  # the first of a row finds another call's caches
                    seconds[name].append(taken)
                if taken > SLOW:
                    break
    return {
        name: {
            "ms": 1e3 * statistics.median(taken),
            "best_ms": 1e3 * min(taken),
            "calls": len(taken),
            "peak_mb": peak_mb(calls[name], *maps),
        }
        for name, taken in seconds.items()
    }


def bars(results: dict) -> list[dict]:
    """What issue 3 asks for, and what was measured."""

    def at(size: int, name: str, key: str = "ms") -> float:
        return results.get(str(size), {}).get(name, {}).get(key, float("nan"))

    rows = [
        ("times faster than StarDist, 512", at(512, "stardist") / at(512, "nucsam score"), ">=", 8),
        ("times faster than StarDist, 1024", at(1024, "stardist") / at(1024, "nucsam score"), ">=", 10),
        ("times the floor, 1024", at(1024, "nucsam score") / at(1024, "floor"), "<=", 20),
        ("seconds, 5000", at(5000, "nucsam score") / 1e3, "<=", 0.3),
        ("MB above the maps, 5000", at(5000, "nucsam score", "peak_mb"), "<=", 150),
        *(
            (f"Dice alone over medpy's, {size}", at(size, "nucsam dice") / at(size, "medpy"), "<=", 1)
            for size in NUCLEI
        ),
    ]
    return [
        {"bar": f"{title} {sign} {bar}", "measured": value, "met": bool(value >= bar if sign == ">=" else value <= bar)}
        for title, value, sign, bar in rows
        if not np.isnan(value)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30, help="calls of each, after a warm-up")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(NUCLEI), choices=list(NUCLEI))
    parser.add_argument(
        "--peers", nargs="*", default=None, metavar="NAME", help=f"default: all of {', '.join(peers())}"
    )
    parser.add_argument("--json", type=Path, help="also write the JSON document here")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    known = peers()
    wanted = [name for name in known if args.peers is None or name.split()[0] in args.peers or name in args.peers]
    calls, versions = {}, {"python": platform.python_version(), "numpy": np.__version__, "scipy": version("scipy")}
    for name, (_, load) in {**ours(), **{name: known[name] for name in wanted}}.items():
        try:
            calls[name] = load()
        except ImportError as error:
            print(f"{name}: skipped, {error}")
            continue
        if name in known:
            package = name.split()[0]
            versions[package] = version(package)

    computes = {name: what for name, (what, _) in {**ours(), **known}.items()}
    results: dict[str, dict] = {}
    for size in args.sizes:
        n = NUCLEI[size]
        maps = scene(size, n)
        print(f"\n{size} x {size} px, {n} nuclei")
        runnable = {name: call for name, call in calls.items() if size < 5000 or name not in TOO_MUCH}
        results[str(size)] = measure(runnable, maps, args.repeat if size < 5000 else min(args.repeat, 10))
        print(f"  {'':16} {'median ms':>10} {'vs score':>9} {'peak MB':>8}  computes")
        own = results[str(size)]["nucsam score"]["ms"]
        for name, row in results[str(size)].items():
            print(f"  {name:16} {row['ms']:10.3f} {row['ms'] / own:9.2f} {row['peak_mb']:8.1f}  {computes[name]}")
        for name in calls.keys() - runnable.keys():
            print(f"  {name:16} not run: {TOO_MUCH[name]}")

    print()
    for bar in bars(results):
        print(f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['measured']:.3g}")
    machine = {"machine": platform.machine(), "threads": 1, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    document = {"benchmark": "metrics", "versions": versions, **machine, "results": results, "bars": bars(results)}
    if args.json:
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
