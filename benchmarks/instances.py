"""How long does it take to split one image's dense maps into nuclei, beside the ways of HoVer-Net and micro-sam?

    python benchmarks/instances.py [--image-size 512] [--nuclei 10 100 600] [--repeat 30] [--json FILE]

All three get maps of the same synthetic nuclei, blurred and with noise of the same strength, and run on one CPU core;
"times ours" is of CPU time, which others on the machine do not add to.
ours: `nucsam.instances.from_depth`, on foreground and depth.
hover: Sobel edges of the horizontal and vertical offsets, markers, watershed (Graham et al. 2019, `__proc_np_hv`).
micro-sam: smoothed distances to centre and boundary, markers, watershed (Archit et al. 2025).
The two are written with scipy and scikit-image as their public code has them. AJI, against the labels that the maps
were made of, says whether speed is bought with quality. --device, --batch and --dtype are taken and change nothing.
"""

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import sys
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

from nucsam import targets
from nucsam.instances import from_depth
from nucsam.metrics import PROTOCOLS, score

NOISE, GRAIN, BLUR = 0.08, 2.0, 1.0  # standard deviation of the noise, its grain and the blur of the maps in px
ELLIPSE = np.pad(np.ones((3, 5), bool), ((1, 1), (0, 0))) | (np.arange(5) == 2)  # OpenCV's of 5 x 5
BAR = 5.0  # times as fast as each peer
Maps = dict[str, np.ndarray]


# ---- what all are given ----


def scene(side: int, n: int, seed: int = 0) -> np.ndarray:
    """Label map int32 (side, side) of n nuclei of up to 450 px on a shaken grid; neighbours touch and overlap."""
    rng, cells = np.random.default_rng(seed), int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.divmod(rng.permutation(cells**2)[:n], cells), 1)
    centres = (grid + rng.uniform(0.3, 0.7, (n, 2))) * side / cells
    areas = min(450, 0.55 * side**2 / n) * rng.uniform(0.55, 1.45, n)
    return ellipses(side, centres, areas, rng.uniform(0.6, 1, n), rng.uniform(0, np.pi, n))


def maps_of(labels: np.ndarray, seed: int = 0) -> Maps:
    """A network's maps of these nuclei, float32 (H, W): foreground, depth, centre in 0..1; across, down in -1..1."""
    batch = torch.from_numpy(labels.astype(np.int64))[None]
    depth = targets.depth(batch, targets.classes(batch), int(labels.max()))[0].numpy()
    down, across, centre = offsets(labels)
    clean = {"foreground": labels > 0, "depth": depth, "centre": centre, "across": across, "down": down}
    rng, made = np.random.default_rng(seed), {}
    for name, pixels in clean.items():
        noise = ndimage.gaussian_filter(rng.standard_normal(labels.shape), GRAIN)
        pixels = ndimage.gaussian_filter(pixels.astype(np.float32), BLUR) + NOISE * noise / noise.std()
        made[name] = np.clip(pixels, -1.0 if name in ("across", "down") else 0.0, 1).astype(np.float32)
    return made


def offsets(labels: np.ndarray) -> np.ndarray:
    """From a nucleus's centroid, scaled per nucleus, (3, H, W): HoVer-Net's vertical and horizontal offset, -1..1 and 0
    in the background, and micro-sam's distance, 0..1 and 1 in the background."""
    made = np.zeros((3, *labels.shape), np.float32)
    made[2] = 1
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        mask = labels[box] == number
        apart = [place - place.mean() for place in np.nonzero(mask)]
        for pixels, away in zip(made, apart):
            far = np.where(away < 0, max(-away.min(), 1e-6), max(away.max(), 1e-6))
            pixels[box][mask] = away / far
        away = np.hypot(*apart)
        made[2][box][mask] = away / max(away.max(), 1)
    return made


# ---- peers ----


def hover(maps: Maps, area: int = 10) -> np.ndarray:
    """HoVer-Net's `__proc_np_hv`; OpenCV's 21 x 21 Sobel is its two one-dimensional kernels."""
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
    """torch-em's `watershed_from_center_and_boundary_distances`, with the values that micro-sam calls it with."""
    nucleus = ndimage.gaussian_filter(maps["foreground"], 1.0) > 0.5
    centre, boundary = (ndimage.gaussian_filter(values, 1.6) for values in (maps["centre"], 1 - maps["depth"]))
    markers = connected_components((centre < 0.5) & (boundary < 0.5) & nucleus)
    return watershed(boundary, markers, mask=nucleus)


def stretched(values: np.ndarray) -> np.ndarray:
    """From 0 to 1."""
    return (values - values.min()) / (values.max() - values.min())


def drop_small(labels: np.ndarray, area: int) -> np.ndarray:
    small = np.bincount(labels.ravel()) < area
    return np.where(small[labels], 0, labels)


def ours(maps: Maps) -> np.ndarray:
    return from_depth(maps["foreground"], maps["depth"])


WAYS = {"ours": ours, "hover": hover, "micro-sam": micro_sam}


def measure(machine: bench.Machine, side: int, n: int, repeat: int, copy: float) -> dict[str, dict]:
    """What each way takes on one scene of n nuclei; `copy` is a memory copy's GB/s."""
    truth = scene(side, n)
    maps = maps_of(truth)
    found = machine.turns({name: lambda _, way=way: way(maps) for name, way in WAYS.items()}, repeat)
    moved = sum(maps[name].nbytes for name in ("foreground", "depth")) + truth.nbytes
    for name, way in WAYS.items():
        labels, row = way(maps).astype(np.int32), found[name]
        row |= {"images_per_second": 1e3 / row["ms"], "times_ours": row["cpu_ms"] / found["ours"]["cpu_ms"]}
        row |= {"nuclei": len(np.unique(labels)) - 1, "truth": len(np.unique(truth)) - 1}
        row |= {"aji": float(score(truth, labels, protocol=PROTOCOLS["plain"]).aji)}
        row |= {"peak_mib": machine.peak_mib(partial(way, maps)), "part_of_copy": 1e-6 * moved / row["ms"] / copy}
    return found


def cells(row: dict) -> dict[str, str | float]:
    return {
        "ms": row["ms"],
        "min - max": bench.spread(row),
        "images/s": row["images_per_second"],
        "CPU ms": row["cpu_ms"],
        "times ours": row["times_ours"],
        "nuclei": f"{row['nuclei']} of {row['truth']}",
        "AJI": f"{row['aji']:.3f}",
        "peak MiB": row["peak_mib"],
        "of a copy": f"{row['part_of_copy']:.1%}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, repeat=30)
    parser.add_argument("--nuclei", type=bench.integer(), nargs="+", default=[10, 100, 600])
    args = bench.parse(parser, arguments)
    args.device = "cpu"  # where nuclei are extracted also beside a GPU
    machine, console = bench.Machine(args), Console(width=125)
    copy = machine.ceiling()["gb_per_s"]
    results = {str(n): measure(machine, args.image_size, n, args.repeat, copy) for n in args.nuclei}
    rows = {f"{n} {name}": cells(row) for n, found in results.items() for name, row in found.items()}
    caption = f"of a copy: maps read and labels written, beside a memory copy of {copy:.1f} GB/s"
    console.print(bench.table(f"dense maps of {args.image_size} px -> nuclei, one CPU core", rows, caption))
    ratios = {n: {name: row["times_ours"] for name, row in of.items() if name != "ours"} for n, of in results.items()}
    met = {n: min(of.values()) >= BAR for n, of in ratios.items()}
    said = ", ".join(f"{n} nuclei {'met' if good else 'MISSED'}" for n, good in met.items())
    console.print(f"bar, {BAR:g} times as fast as each peer: {said}")
    document = {"benchmark": "instances", **bench.asked(args), **machine.about(), "copy_gb_per_s": copy}
    bench.finish(document | {"results": results, "ratios": ratios, "met": met}, args.json)


if __name__ == "__main__":
    main()
