"""What does a whole slide cost, from file to nuclei?

    python benchmarks/slide.py [--side 30000] [--share 0.2] [--data FOLDER] [--model RUN]
        [--stored] [--formats labels,csv] [--against 6bdc1a4] [--repeat 1] [--threads N]
        [--json FILE]

The slide is in Aperio's form: JPEG tiles and levels at 1/4 and 1/16. Its tissue, two ellipses,
repeats eight images, of a data set or synthetic. Glass is bright noise.

- before, now: the host alone, on a TIFF without levels: stored maps replace the network, and label
  maps are written. "before" is another commit, in a worktree.
- now, pyramid: the same on the slide with its levels, which give a mask of tissue.
- with FORMAT: one more format is written.
- network: `nucsam predict` with a model trained briefly, and all formats. Beside it the document
  has the time of the stock encoder on the same tiles, the host's share of the CPU time, and whether
  kill -9 and a rerun give the same files.

CPU time is of all threads. "RssAnon" is the peak of anonymous memory. With --stored there is no
network: for slides of 100,000 px. The script prints a table, and one JSON line last.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import psutil
import tifffile
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
from instances import maps_of
from stock import embed, stock_sam
from train_step import random_base

from nucsam.data.folders import find_records
from nucsam.data.images import read_image, read_label
from nucsam.data.synthetic import make_image, write_dataset

ROOT = Path(__file__).parents[1]
FORMATS = "labels,geojson,csv,overlay"
GOAL = 0.4  # most of the host's CPU time before
TILE = 512  # px: side of a tile of the slide, and of a tissue image
GLASS = 236  # grey level of glass, with noise of 2


@dataclass
class Slide:
    """A synthetic slide in Aperio's form: a mosaic of tissue tiles in two ellipses, glass around.

    Args:
        side: px, a multiple of `TILE`.
        tissue: uint8 (N, TILE, TILE, 3), the tiles that the mosaic repeats.
        share: of the slide that is tissue.
    """

    side: int
    tissue: np.ndarray
    share: float = 0.2

    def __post_init__(self) -> None:
        n = self.side // TILE
        y, x = (np.mgrid[:n, :n] + 0.5) / n
        radius = np.sqrt(self.share / np.pi)  # of two ellipses, each half of the share
        self.kinds = np.full((n, n), -1)  # number of each tile's tissue image, -1 = glass
        for cy, cx, turn in ((0.32, 0.34, 2.0), (0.68, 0.66, 0.5)):
            inside = ((y - cy) ** 2 * turn + (x - cx) ** 2 / turn) < radius**2 / 2
            places = np.indices(self.kinds.shape).sum(0) + 2 * (
                np.indices(self.kinds.shape)[0] // 2
            )
            self.kinds[inside] = places[inside] % len(self.tissue)
        noise = np.random.default_rng(0).normal(GLASS, 2, (TILE, TILE, 3))
        self.glass = noise.round().clip(0, 255).astype(np.uint8)

    def tiles(self, shrink: int) -> Iterator[bytes]:
        """The JPEG of each tile of a level, row by row."""

        @cache
        def encode(block: bytes, shape: tuple[int, int]) -> bytes:
            kinds = np.frombuffer(block, self.kinds.dtype).reshape(shape)
            pixels = np.tile(self.glass, (shrink, shrink, 1))
            for row, column in product(*map(range, shape)):
                if kinds[row, column] >= 0:
                    place = np.s_[TILE * row :, TILE * column :]
                    pixels[place][:TILE, :TILE] = self.tissue[kinds[row, column]]
            if shrink > 1:
                pixels = np.asarray(Image.fromarray(pixels).reduce(shrink))
            return imagecodecs.jpeg8_encode(
                pixels, level=85, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"
            )

        for row, column in product(range(0, len(self.kinds), shrink), repeat=2):
            kinds = self.kinds[row : row + shrink, column : column + shrink]
            yield encode(np.ascontiguousarray(kinds).tobytes(), kinds.shape)

    def write(self, path: Path, levels: tuple[int, ...] = (1, 4, 16)) -> None:
        about = f"Aperio Image Library v11\n{self.side}x{self.side}|AppMag = 40|MPP = 0.25"
        options = {"photometric": "ycbcr", "subsampling": (2, 2), "metadata": None}
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            for number, shrink in enumerate(levels):
                shape = (*[-(-self.side // shrink)] * 2, 3)
                form = {"shape": shape, "dtype": np.uint8, "tile": (TILE, TILE)}
                text = about if shrink == 1 else "Aperio Image Library"
                file.write(
                    self.tiles(shrink), **form, **options, compression="jpeg", description=text
                )
                if number == 0 and len(levels) > 1:  # Aperio's second page
                    thumbnail = np.full((64, 64, 3), GLASS, np.uint8)
                    file.write(thumbnail, photometric="rgb", metadata=None, description=text)


# ---- what is measured ----


def tissue_of(folder: Path | None, count: int = 8) -> tuple[np.ndarray, list[np.ndarray]]:
    """Images uint8 (count, TILE, TILE, 3) and their label maps, real or synthetic."""
    if folder is None:
        made = [make_image(TILE, seed, organ="human kidney") for seed in range(count)]
        return np.stack([image for image, *_ in made]), [label for _, label, *_ in made]
    records = find_records(folder)[:: max(1, len(find_records(folder)) // count)]
    samples = [(read_image(record.image), read_label(record.label)) for record in records]
    samples = [sample for sample in samples if sample[1].shape == (TILE, TILE)][:count]
    return np.stack([image for image, _ in samples]), [label for _, label in samples]


def train(data: Path | None, folder: Path, epochs: int) -> Path:
    """A model trained briefly, in crops of 256 px at scale 1: not good, but with nuclei."""
    if data is None:
        data = folder / "data"
        write_dataset(data, images=24, size=256)
    command = [
        sys.executable,
        "-m",
        "nucsam",
        "train",
        str(data),
        "data.crop=256",
        "data.scale=1.0",
    ]
    command += [f"train.epochs={epochs}", f"train.validate_every={epochs}", "data.workers=0"]
    command += [r"data.group=^(.*)_\d+$", "--out", str(folder / "run")]
    subprocess.run(command, env=environment(ROOT), check=True, stderr=subprocess.DEVNULL)
    return folder / "run"


def environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout)}


def host(checkout: Path, slide: Path, folder: Path, formats: str) -> dict[str, Any]:
    """What `slide_host.py` says of a slide whose maps are stored."""
    script = Path(__file__).with_name("slide_host.py")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, script, slide, folder, out, formats]
        child = subprocess.run(
            command, env=environment(checkout), stdout=subprocess.PIPE, check=True, text=True
        )
    document = json.loads(child.stdout.splitlines()[-1])
    assert document["status"] == 0, document
    return document


def predict(model: Path, images: Sequence[Path], out: Path, kill: bool = False) -> dict:
    """`nucsam predict` in a child: wall and CPU seconds and peak RssAnon.

    Args:
        model: a run or an export.
        images: image files.
        out: folder of the results.
        kill: send the child SIGKILL as soon as the first image has its table.
    """
    command = [sys.executable, "-m", "nucsam", "predict", model, *images, "--out", out]
    command += ["--formats", FORMATS]
    began, peak, cpu = time.perf_counter(), 0, 0.0
    child = psutil.Popen([str(word) for word in command], env=environment(ROOT))
    while child.poll() is None:
        with suppress(psutil.Error, FileNotFoundError, IndexError):
            text = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(peak, int(text.split("RssAnon:")[1].split()[0]))
            cpu = sum(child.cpu_times()[:2])
        if kill and any(out.glob("*.csv")):
            child.kill()
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    assert child.returncode == (-signal.SIGKILL if kill else 0)
    return {"wall_s": seconds, "cpu_s": cpu, "rss_anon_mib": peak / 1024}


def stock_seconds(tissue: np.ndarray) -> float:
    """CPU seconds a megapixel of the stock encoder on tissue tiles, one at a time, fp32."""
    tiles = torch.from_numpy(tissue).permute(0, 3, 1, 2).float()
    sam = stock_sam(random_base(tiles[:1]), TILE)
    with torch.no_grad():
        embed(sam, tiles[:1])  # warms up
        began = time.process_time()
        for tile in tiles:
            embed(sam, tile[None])
    return (time.process_time() - began) / (len(tissue) * TILE**2 / 1e6)


def interrupted(model: Path, tissue: np.ndarray, folder: Path) -> bool:
    """Whether kill -9 between three small slides, and a rerun, give what one run gives."""
    paths = [folder / f"small{k}.tif" for k in range(3)]
    for k, path in enumerate(paths):
        Slide(2 * TILE, np.roll(tissue, k, axis=0), share=0.8).write(path)
    whole, cut = folder / "whole", folder / "cut"
    predict(model, paths, whole)
    predict(model, paths, cut, kill=True)
    assert len(list(cut.glob("*.csv"))) < len(paths)  # killed before the end
    predict(model, paths, cut)
    files = [sorted(p.relative_to(out) for p in out.rglob("*.*")) for out in (whole, cut)]
    same = files[0] == files[1] and not list(cut.rglob("*.partial"))
    return same and all(
        (whole / name).read_bytes() == (cut / name).read_bytes() for name in files[0]
    )


def measure(args: argparse.Namespace, folder: Path, worktree: Path | None) -> dict[str, Any]:
    tissue, labels = tissue_of(args.data)
    slide = Slide(args.side // TILE * TILE, tissue, args.share)
    maps = [[made[name] for name in ("foreground", "depth")] for made in map(maps_of, labels)]
    np.save(folder / "maps.npy", np.float32(maps))
    np.save(folder / "kinds.npy", slide.kinds)
    slide.write(folder / "slide.svs")
    pixels = slide.side**2 / 1e6
    on_tissue = float((slide.kinds >= 0).mean()) * pixels
    results: dict[str, Any] = {}
    if worktree:
        slide.write(folder / "slide.tif", levels=(1,))
        for _ in range(args.repeat):
            for name, checkout in (("before", worktree), ("now", ROOT)):
                row = host(checkout, folder / "slide.tif", folder, "labels")
                old = results.setdefault(f"{name}, no pyramid", row)
                results[f"{name}, no pyramid"] = min(row, old, key=lambda row: row["cpu_s"])
    results["now, pyramid"] = host(ROOT, folder / "slide.svs", folder, "labels")
    labels_s = results["now, pyramid"]["cpu_s"]
    for name in [name for name in args.formats.split(",") if name != "labels"]:
        row = results[f"with {name}"] = host(ROOT, folder / "slide.svs", folder, f"labels,{name}")
        row["us_a_nucleus"] = 1e6 * (row["cpu_s"] - labels_s) / max(1, row["nuclei"])
    document: dict[str, Any] = {}
    if not args.stored:
        model = args.model or train(args.data, folder, args.epochs)
        results["network"] = predict(model, [folder / "slide.svs"], folder / "out")
        document["stock_s_per_mp"] = stock_seconds(tissue)
        document["host_share"] = labels_s / results["network"]["cpu_s"]
        document["same_after_kill"] = interrupted(model, tissue, folder)
    for row in results.values():
        row["cpu_ms_per_mp"] = 1e3 * row["cpu_s"] / pixels
        row["cpu_ms_per_mp_tissue"] = 1e3 * row["cpu_s"] / on_tissue
    if worktree:
        before, now = (results[f"{name}, no pyramid"]["cpu_s"] for name in ("before", "now"))
        assert results["before, no pyramid"]["nuclei"] == results["now, no pyramid"]["nuclei"]
        document |= {"times_before": now / before, "met": now <= GOAL * before}
    return document | {"mp": pixels, "mp_tissue": on_tissue, "results": results}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, batch=1, repeat=1)
    add = parser.add_argument
    add("--side", type=bench.integer(TILE), default=30_000, help="px of the slide")
    add("--share", type=float, default=0.2, help="of the slide that is tissue")
    add("--data", type=Path, help="data set whose images are the tissue; default: synthetic")
    add("--model", type=Path, help="run or export; default: trained briefly")
    add("--epochs", type=bench.integer(), default=8, help="of the brief training")
    add("--formats", default=FORMATS, help="to write on the host alone, each beside labels")
    add("--stored", action="store_true", help="no network: stored maps alone")
    add("--against", default="6bdc1a4", help="commit to compare with; '' = none")
    args = bench.parse(parser, arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worktree = None
        if args.against:
            worktree = folder / "before"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "-q", "--detach", worktree, args.against], check=True)
            stack.callback(subprocess.run, [*git, "remove", "--force", worktree], check=True)
        measured = measure(args, folder, worktree)
    about = bench.host(args).about()
    document = {"benchmark": "slide", **bench.options(args), **about, **measured}
    rows = {
        name: {
            "CPU s": row["cpu_s"],
            "wall s": row["wall_s"],
            "CPU ms/MP": row["cpu_ms_per_mp"],
            "of tissue": row["cpu_ms_per_mp_tissue"],
            "tiles": str(row.get("tiles", "")),
            "nuclei": str(row.get("nuclei", "")),
            "us a nucleus": row.get("us_a_nucleus", ""),
            "RssAnon MiB": row["rss_anon_mib"],
        }
        for name, row in measured["results"].items()
    }
    title = f"{args.side} px, {measured['mp_tissue']:,.0f} of {measured['mp']:,.0f} MP are tissue"
    Console(width=120).print(bench.table(title, rows))
    bench.finish(document, args.json)


if __name__ == "__main__":
    main()
