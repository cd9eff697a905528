"""Train the starter, score it on images it never saw, and ask how many images are enough.

    python benchmarks/starter.py train DSB --out RUNS [table.key=value ...]
    python benchmarks/starter.py score DATA [DATA ...] --out RUNS [--model MODEL]

`train` trains configs/starter.toml on the folder DSB, or resumes, and writes what was trained, in
half precision, as RUNS/starter.safetensors. An inner split of DSB chooses the epoch.

`score` scores MODEL (RUNS/starter.safetensors) once on every image of each folder, and writes
RUNS/scores.json. A metric is the mean over a folder's images.

The last line that `score` prints is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import nucsam
from nucsam import UserError, config
from nucsam.data.folders import find_records
from nucsam.data.samples import Samples
from nucsam.export.merged import export_run
from nucsam.run import checkpoint
from nucsam.score.runs import headline, score_images, scoring_accelerator
from nucsam.score.tables import COLUMNS, HEADLINE, percent, write_json

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "starter.toml"
FILE = "starter.safetensors"  # under --out: what `train` writes and `score` takes


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
        records = find_records(root)
        rows[root.name] = row = scores_of(args.model or args.out / FILE, records)
        print(f"{root.name}, {row['images']} images: {_sentence(row)}")
    document = {"benchmark": "starter", "date": date.today().isoformat(), "scores": rows}
    write_json(args.out / "scores.json", document)
    print(json.dumps(document))


def scores_of(model: Path, records: Sequence[Any]) -> dict[str, Any]:
    """Mean scores, 0..1, of an adapter file on all images of some records."""
    net, settings, _, metadata = checkpoint.open_adapter(model)
    accelerator = scoring_accelerator(metadata)
    net = accelerator.prepare_model(net, evaluation_mode=True)
    samples = Samples(records, memory_gib=settings.data.memory)
    results = score_images(net, settings, samples, range(len(records)), accelerator)
    return {"images": len(records), **headline(results)}


def _sentence(scores: dict[str, float]) -> str:
    return ", ".join(f"{COLUMNS[metric]} {percent(scores[metric])}" for metric in HEADLINE)


# ---- the command ----


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("mode", choices=MODES)
    add("data", type=Path, nargs="+", metavar="FOLDER | table.key=value")
    add("--out", type=Path, required=True)
    add("--model", type=Path, help=f"of score; default: OUT/{FILE}")
    args = parser.parse_intermixed_args(arguments)
    args.settings = [str(path) for path in args.data if "=" in str(path)]
    args.data = [path for path in args.data if "=" not in str(path)]
    return args


MODES = {"train": train, "score": score}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    MODES[args.mode](args)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"starter: {error}", file=sys.stderr)
        sys.exit(2)
