"""How long does it take to split an image's dense maps into nuclei?

    python benchmarks/instances.py [--image-size 512] [--nuclei 10 100 600] [--repeat 30]
        [--stardist PYTHON] [--tiatoolbox PYTHON] [--json FILE]

The peers are the ways of HoVer-Net and micro-sam, written with scipy and scikit-image after their
public code. All three get maps of the same synthetic nuclei, with the same blur and noise.

- ours: `nucsam.model.instances.from_depth`, on foreground and depth.
- hover: Sobel edges of the horizontal and vertical offsets, markers, watershed (Graham et al. 2019,
  `__proc_np_hv`).
- micro-sam: smoothed distances to centre and boundary, markers, watershed (Archit et al. 2025).

With the Python of an environment that has them, two packages run too, each in a process of its own:

- stardist: non-maximum suppression and drawing, with the thresholds of `2D_versatile_he`, on its
  own distances and probabilities of the labels, without blur and noise (Weigert and Schmidt 2022).
- tiatoolbox: `HoVerNet._proc_np_hv` at 40x, on the maps of hover.

Each runs on one CPU core. "times ours" compares CPU time, to which other programs do not add. AJI
against the labels behind the maps shows whether speed costs quality. --device, --batch and --dtype
change nothing.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from scipy import ndimage
from scipy.special import comb
from skimage.measure import label as connected_components
from skimage.segmentation import watershed

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
from metrics import ellipses

from nucsam.config import Instances
from nucsam.model import targets
from nucsam.model.instances import from_depth
from nucsam.score.metrics import PROTOCOLS, score_maps

NOISE, GRAIN = 0.08, 2.0  # of the maps' noise: standard deviation; smoothing, px
BLUR = 1.0  # px, of the maps
ELLIPSE = np.pad(np.ones((3, 5), bool), ((1, 1), (0, 0))) | (np.arange(5) == 2)  # OpenCV's, 5 x 5
GOAL = 5.0  # times as fast as each peer
Maps = dict[str, np.ndarray]


# ---- the maps ----


def scene(side: int, n: int, seed: int = 0) -> np.ndarray:
    """Label map int32 (side, side) of n nuclei of up to 450 px on a jittered grid.

    Neighbours touch and overlap.
    """
    rng, cells = np.random.default_rng(seed), int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.divmod(rng.permutation(cells**2)[:n], cells), 1)
    centres = (grid + rng.uniform(0.3, 0.7, (n, 2))) * side / cells
    areas = min(450, 0.55 * side**2 / n) * rng.uniform(0.55, 1.45, n)
    return ellipses(side, centres, areas, rng.uniform(0.6, 1, n), rng.uniform(0, np.pi, n))


def maps_of(labels: np.ndarray, seed: int = 0) -> Maps:
    """Maps float32 (H, W) as a network predicts them for these nuclei.

    Foreground, depth and centre are 0..1, across and down are -1..1.
    """
    batch = torch.from_numpy(labels.astype(np.int64))[None]
    depth = targets.depth(batch, targets.classes(batch), int(labels.max()))[0].numpy()
    down, across, centre = offsets(labels)
    clean = {
        "foreground": labels > 0,
        "depth": depth,
        "centre": centre,
        "across": across,
        "down": down,
    }
    rng = np.random.default_rng(seed)
    maps = {}
    for name, pixels in clean.items():
        noise = ndimage.gaussian_filter(rng.standard_normal(labels.shape), GRAIN)
        blurred = ndimage.gaussian_filter(pixels.astype(np.float32), BLUR)
        lowest = -1.0 if name in ("across", "down") else 0.0
        noisy = np.clip(blurred + NOISE * noise / noise.std(), lowest, 1)
        maps[name] = noisy.astype(np.float32)
    return maps


def offsets(labels: np.ndarray) -> np.ndarray:
    """Offsets from each nucleus's centroid, scaled per nucleus.

    Returns:
        (3, H, W): HoVer-Net's vertical and horizontal offset, -1..1, 0 in the background; and
        micro-sam's distance, 0..1, 1 in the background.
    """
    maps = np.zeros((3, *labels.shape), np.float32)
    maps[2] = 1
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        mask = labels[box] == number
        shifts = [place - place.mean() for place in np.nonzero(mask)]
        for pixels, shift in zip(maps, shifts):
            extent = np.where(shift < 0, max(-shift.min(), 1e-6), max(shift.max(), 1e-6))
            pixels[box][mask] = shift / extent
        distance = np.hypot(*shifts)
        maps[2][box][mask] = distance / max(distance.max(), 1)
    return maps


# ---- peers ----


def hover(maps: Maps, area: int = 10) -> np.ndarray:
    """HoVer-Net's `__proc_np_hv`, with OpenCV's 21 x 21 Sobel as two one-dimensional kernels."""
    nucleus = drop_small(connected_components(maps["foreground"] >= 0.5, connectivity=1), area) > 0
    smooth, slope = comb(20, np.arange(21)), np.convolve(comb(19, np.arange(20)), [-1, 1])
    edges = []
    for name, axis in (("across", 1), ("down", 0)):
        steep = ndimage.correlate1d(stretched(maps[name]).astype(np.float64), slope, axis)
        edges.append(1 - stretched(ndimage.correlate1d(steep, smooth, 1 - axis)))
    edge = np.clip(np.maximum(*edges) - ~nucleus, 0, None)
    energy = -ndimage.gaussian_filter((1 - edge) * nucleus, 0.8, radius=1)
    markers = ndimage.binary_fill_holes(nucleus & (edge < 0.4))
    markers = connected_components(ndimage.binary_opening(markers, ELLIPSE), connectivity=1)
    return watershed(energy, drop_small(markers, area), mask=nucleus)


def micro_sam(maps: Maps) -> np.ndarray:
    """torch-em's `watershed_from_center_and_boundary_distances`, with micro-sam's values."""
    nucleus = ndimage.gaussian_filter(maps["foreground"], 1.0) > 0.5
    centre, boundary = (
        ndimage.gaussian_filter(values, 1.6) for values in (maps["centre"], 1 - maps["depth"])
    )
    markers = connected_components((centre < 0.5) & (boundary < 0.5) & nucleus)
    return watershed(boundary, markers, mask=nucleus)


def stretched(values: np.ndarray) -> np.ndarray:
    """Scaled to 0..1."""
    return (values - values.min()) / (values.max() - values.min())


def drop_small(labels: np.ndarray, area: int) -> np.ndarray:
    small = np.bincount(labels.ravel()) < area
    return np.where(small[labels], 0, labels)


def ours(maps: Maps) -> np.ndarray:
    return from_depth(maps["foreground"], maps["depth"], Instances(confidence=0.0))


PACKAGES = {
    "stardist": """
from stardist.geometry import polygons_to_label, star_dist
from stardist.nms import non_maximum_suppression
from stardist.utils import edt_prob
truth = inputs["labels"]
distances = star_dist(truth, 32)[::2, ::2].copy()
probabilities = edt_prob(truth)[::2, ::2].astype("float32")
def way():
    points, scores, kept = non_maximum_suppression(
        distances, probabilities, grid=(2, 2), prob_thresh=0.692478, nms_thresh=0.3
    )
    return polygons_to_label(kept, points, truth.shape, prob=scores)
""",
    "tiatoolbox": """
from tiatoolbox.models.architecture.hovernet import HoVerNet
foreground = inputs["foreground"][..., None]
offsets = np.stack([inputs["across"], inputs["down"]], -1)
def way():
    return HoVerNet._proc_np_hv(foreground, offsets)
""",
}
CHILD = """
import json, sys, time
import numpy as np
inputs = np.load(sys.argv[1])
{package}
way()
wall, cpu = [], []
for _ in range({repeat}):
    start = time.perf_counter(), time.process_time()
    labels = way()
    wall.append(1e3 * (time.perf_counter() - start[0]))
    cpu.append(1e3 * (time.process_time() - start[1]))
np.save(sys.argv[2], labels)
row = dict(ms=np.median(wall), ms_min=min(wall), ms_max=max(wall), cpu_ms=np.median(cpu))
print(json.dumps(row))
"""


def packaged(
    name: str, python: Path, maps: Maps, truth: np.ndarray, repeat: int
) -> tuple[dict[str, float], np.ndarray]:
    """The times of a package in its own environment, and its label map."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / file) for file in ("inputs.npz", "labels.npy")]
        np.savez(files[0], labels=truth, **maps)
        code = CHILD.format(package=PACKAGES[name], repeat=repeat)
        done = subprocess.run([python, "-c", code, *files], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1]), np.load(files[1])


WAYS = {"ours": ours, "hover": hover, "micro-sam": micro_sam}


def measure(
    machine: bench.Machine, args: argparse.Namespace, n: int, copy: float
) -> dict[str, dict]:
    """The cost of each way on one scene of n nuclei; `copy` is the speed of a copy, GB/s."""
    truth = scene(args.image_size, n)
    maps = maps_of(truth)
    calls = {name: lambda _, way=way: way(maps) for name, way in WAYS.items()}
    rows = machine.turns(calls, args.repeat)
    results = {name: way(maps) for name, way in WAYS.items()}
    for name in PACKAGES:
        if python := getattr(args, name):
            rows[name], results[name] = packaged(name, python, maps, truth, args.repeat)
    moved = sum(maps[name].nbytes for name in ("foreground", "depth")) + truth.nbytes
    for name, row in rows.items():
        labels = results[name].astype(np.int32)
        row |= {
            "images_per_second": 1e3 / row["ms"],
            "times_ours": row["cpu_ms"] / rows["ours"]["cpu_ms"],
            "nuclei": len(np.unique(labels)) - 1,
            "truth": len(np.unique(truth)) - 1,
            "aji": float(score_maps(truth, labels, protocol=PROTOCOLS["plain"]).aji),
            "part_of_copy": 1e-6 * moved / row["ms"] / copy,
        }
        if name in WAYS:
            row["peak_mib"] = machine.peak_mib(partial(WAYS[name], maps))
    return rows


def cells(row: dict) -> dict[str, str | float]:
    return {
        "ms": row["ms"],
        "min - max": bench.spread(row),
        "images/s": row["images_per_second"],
        "CPU ms": row["cpu_ms"],
        "times ours": row["times_ours"],
        "nuclei": f"{row['nuclei']} of {row['truth']}",
        "AJI": f"{row['aji']:.3f}",
        "peak MiB": row.get("peak_mib", ""),
        "of a copy": f"{row['part_of_copy']:.1%}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, repeat=30)
    parser.add_argument("--nuclei", type=bench.integer(), nargs="+", default=[10, 100, 600])
    for name in PACKAGES:
        parser.add_argument(f"--{name}", type=Path, metavar="PYTHON")
    args = bench.parse(parser, arguments)
    args.device = "cpu"  # nuclei are extracted on the CPU, also beside a GPU
    machine, console = bench.Machine(args), Console(width=125)
    copy = machine.ceiling()["gb_per_s"]
    results = {str(n): measure(machine, args, n, copy) for n in args.nuclei}
    rows = {
        f"{n} {name}": cells(row) for n, scene in results.items() for name, row in scene.items()
    }
    title = f"dense maps of {args.image_size} px -> nuclei, one CPU core"
    caption = f"of a copy: maps read and labels written, beside a memory copy of {copy:.1f} GB/s"
    console.print(bench.table(title, rows, caption))
    ratios = {
        n: {name: row["times_ours"] for name, row in scene.items() if name != "ours"}
        for n, scene in results.items()
    }
    met = {n: min(peers.values()) >= GOAL for n, peers in ratios.items()}
    verdicts = [f"{n} nuclei {'met' if good else 'MISSED'}" for n, good in met.items()]
    console.print(f"goal: {GOAL:g} times as fast as each peer: {', '.join(verdicts)}")
    document = {
        "benchmark": "instances",
        **bench.options(args),
        **machine.about(),
        "copy_gb_per_s": copy,
        "results": results,
        "ratios": ratios,
        "met": met,
    }
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
