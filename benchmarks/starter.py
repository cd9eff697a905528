"""Train the starter, score it on images it never saw, and ask how many images are enough.

    python benchmarks/starter.py train DSB --out RUNS [table.key=value ...]
    python benchmarks/starter.py score DATA ... --out RUNS [--model MODEL] [--adapt SHARE]
    python benchmarks/starter.py curve DATA ... --out RUNS [--model MODEL] [--only REGEX]
        [--images 4,8,16,32] [--seeds 0,1,2] [--presentations 1000] [table.key=value ...]

`train` trains configs/starter.toml on the folder DSB, or resumes, and writes what was trained, in
half precision, as RUNS/starter.safetensors. An inner split of DSB chooses the epoch.

`score` scores MODEL (RUNS/starter.safetensors) once on every image of each folder, and writes
RUNS/scores.json, or with --adapt, which is that of `nucsam predict`, RUNS/scores-adapt.json. A
metric is the mean over a folder's images.

`curve` joins the folders, in NuInsSeg's layout, and trains on 4, 8, 16 and 32 of their images, from
MODEL and from MobileSAM, with the settings of configs/starter.toml. Seed k tests on fold k, by
source image, and draws other training images. Every run sees about as many images, repeats counted
(--presentations). Part of its few images are its inner split, which chooses the epoch, and so are
not trained on. Several processes share the runs, as in `nucsam folds`; --only takes some of them,
such as 'seed 0'. The same command again does what is missing. It writes RUNS/curve.md and
.json, and RUNS/starter-curve.png, .pdf and .svg.

The last line that `score` and `curve` print is one JSON document.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

from accuracy import link, numbers

import nucsam
from nucsam import UserError, config
from nucsam.claims import Claim
from nucsam.config import Config, changed
from nucsam.data.folders import Record, find_records
from nucsam.data.samples import Samples
from nucsam.data.splits import find_split, with_epochs
from nucsam.export.merged import export_run
from nucsam.files import read_json, without_nan, write_text
from nucsam.folds import runner
from nucsam.folds.jobs import Job
from nucsam.names import find_model
from nucsam.report import charts
from nucsam.run import checkpoint
from nucsam.run.metadata import known_certainty
from nucsam.score.runs import headline, score_images, scoring_accelerator
from nucsam.score.tables import COLUMNS, HEADLINE, over_folds, percent, write_json

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "starter.toml"
FILE = "starter.safetensors"  # under --out: what `train` writes
GROUP = r"^(.*)_\d+$"  # patches NAME_0, NAME_1, ... of one source image
FOLDS = 5
STARTS = ("starter", "MobileSAM")


# ---- train ----


def train(args: argparse.Namespace) -> None:
    """Train the starter, and write it."""
    if len(args.data) != 1:
        raise UserError(f"train: found {len(args.data)} folders, expected one")
    settings = config.load_config(CONFIG, [f"data.root={args.data[0]}", *args.settings])
    run = args.out / "starter"
    nucsam.fit(settings, run, resume=run.is_dir())
    print(export_run(run, args.out / FILE, format="adapter", half=True, force=True))


# ---- score ----


def score(args: argparse.Namespace) -> None:
    """Score a model once on every image of each folder."""
    rows = {}
    for root in args.data:
        rows[root.name] = row = scores_of(args.model, find_records(root), args.adapt)
        print(f"{root.name}, {row['images']} images: {_sentence(row)}")
    name = "scores.json" if args.adapt is None else "scores-adapt.json"
    finish({"adapt": args.adapt, "scores": rows}, args.out / name)


def scores_of(model: str, records: Sequence[Record], adapt: float | None = None) -> dict[str, Any]:
    """Mean scores, 0..1, of an adapter on all images of some records."""
    net, settings, _, metadata = checkpoint.open_adapter(find_model(model)[0])
    if adapt is not None:
        net.adapt(adapt)
    accelerator = scoring_accelerator(metadata)
    net.to(accelerator.device)
    samples = Samples(records, memory_gib=settings.data.memory)
    certainty = known_certainty(settings, metadata)
    every = range(len(records))
    results = score_images(net, settings, samples, every, accelerator, certainty=certainty)
    return {"images": len(records), **headline(results)}


def _sentence(scores: dict[str, float]) -> str:
    return ", ".join(f"{COLUMNS[metric]} {percent(scores[metric])}" for metric in HEADLINE)


# ---- curve ----


def curve(args: argparse.Namespace) -> None:
    """Do the runs of the curve that are missing, then draw it."""
    data = args.out / "curve" / "data"
    link(args.data, data)
    fixed = {"data.root": str(data), "data.layout": "nuinsseg", "data.group": GROUP}
    fixed |= {"data.folds": FOLDS, "data.fold": 0}
    common = config.override(
        changed(config.load_config(CONFIG).to_dict(), fixed, "curve").to_dict(), args.settings
    )
    jobs = [
        curve_job(args, common, start, images, seed)
        for seed in args.seeds
        for images in args.images
        for start in STARTS
    ]
    mine = [job for job in jobs if re.search(args.only, job.variant)]
    runner.run_jobs(mine, common, args.out / "curve")
    rows = [row for job in jobs if (row := curve_row(job))]
    rows += [untrained_row(args, common, seed) for seed in args.seeds]
    points = {start: scores for start, scores in aji_by_images(rows).items() if scores}
    chart = charts.against(points, "AJI by the number of images", "images with labels")
    charts.write_chart(chart, args.out / "starter-curve")
    text = curve_table(rows)
    write_text(args.out / "curve.md", text)
    print(text)
    missing = [job.variant for job in jobs if curve_row(job) is None]
    finish({"missing": missing, "rows": rows}, args.out / "curve.json")


def curve_job(args: argparse.Namespace, common: Config, start: str, images: int, seed: int) -> Job:
    """One run of the curve."""
    values = {
        "data.images": images,
        "train.presentations": args.presentations,
        "data.fold": seed,
        "train.seed": seed,
        "model.weights": args.model if start == STARTS[0] else "auto",
    }
    settings = with_epochs(changed(common.to_dict(), values, "curve"))
    every = {"train.validate_every": max(1, settings.train.epochs // 5)}
    name = f"{start}, {images} images, seed {seed}"
    place = f"{start}-{images}-seed{seed}"
    return Job(
        name,
        seed,
        changed(settings.to_dict(), every, "curve"),
        args.out / "curve" / place,
        args.out / "curve" / ".locks" / place,
        (sys.executable, str(Path(__file__).resolve()), "fit"),
    )


def fit(args: argparse.Namespace) -> None:
    """What `curve` runs as a child: one training."""
    nucsam.fit(args.data[0], args.out, resume=args.resume)


def curve_row(job: Job) -> dict[str, Any] | None:
    """The scores, 0..1, of a finished run; None of any other."""
    scores = job.scores()
    if scores is None:
        return None
    settings = job.config
    return {
        "start": job.variant.split(", ")[0],
        "images": settings.data.images,
        "seed": settings.train.seed,
        "of_them": job.directory.read_environment()["images"],
        "epochs": settings.train.epochs,
        "epoch": scores["epoch"],
        **scores["headline"],
    }


def untrained_row(args: argparse.Namespace, common: Config, seed: int) -> dict[str, Any]:
    """The scores of the starter as it is on the test images of a seed."""
    file = args.out / "curve" / f"untrained-seed{seed}.json"
    with Claim.take(args.out / "curve" / ".locks" / file.name, wait=True):
        if not file.is_file():
            records, split = find_split(replace(common.data, fold=seed))
            write_json(file, scores_of(args.model, [records[i] for i in split.test]))
    scores = read_json(file.read_bytes(), str(file))
    return {"start": STARTS[0], "seed": seed, **scores, "images": 0}


def aji_by_images(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Start -> number of images -> AJI of the seeds."""
    series = {start: {} for start in STARTS}
    for row in rows:
        series[row["start"]].setdefault(row["images"], []).append(row["aji"])
    return series


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """The curve as Markdown, in percent: mean over seeds ± sample standard deviation."""
    lines = ["| images | from | seeds | Dice | AJI | PQ |", "|---|---|---|---|---|---|"]
    for images in sorted({row["images"] for row in rows}):
        for start in STARTS:
            found = [row for row in rows if (row["images"], row["start"]) == (images, start)]
            if not found:
                continue
            over = over_folds([{metric: row[metric] for metric in HEADLINE} for row in found])
            cells = [_spread(over["mean"][metric], over["std"][metric]) for metric in HEADLINE]
            lines.append(f"| {images} | {start} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(mean: float, std: float) -> str:
    return percent(mean) + ("" if math.isnan(std) else f" ± {percent(std)}")


# ---- the command ----


def finish(document: dict[str, Any], path: Path) -> None:
    """Write the document, and print it as the last line."""
    document = {"benchmark": "starter", "date": date.today().isoformat(), **document}
    write_json(path, document)
    print(json.dumps(without_nan(document)))


MODES = {"train": train, "score": score, "curve": curve, "fit": fit}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("mode", choices=MODES, metavar="train | score | curve")
    add("data", nargs="+", metavar="FOLDER | table.key=value")
    add("--out", type=Path, required=True)
    add("--model", help=f"an adapter file or starter; default: OUT/{FILE}")
    add("--adapt", type=float, help="share of an image's own statistics; default: as set")
    add("--only", default="", help="regular expression on the names of the curve's runs")
    add("--images", type=numbers, default=(4, 8, 16, 32))
    add("--seeds", type=numbers, default=(0, 1, 2))
    add("--presentations", type=int, default=1000, help="images that a run sees, with repeats")
    add("--resume", action="store_true", help=argparse.SUPPRESS)  # of a child
    args = parser.parse_intermixed_args(arguments)
    args.settings = [text for text in args.data if "=" in text]
    args.data = [Path(text) for text in args.data if "=" not in text]
    args.model = args.model or str(args.out / FILE)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    MODES[args.mode](args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"starter: {error}", file=sys.stderr)
        sys.exit(2)
