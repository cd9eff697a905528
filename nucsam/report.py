"""report.html: a run or a cross-validation as one page that needs no network; its charts and pictures as files.

The numbers are those of scores.json and metrics.jsonl; only the gallery's images are predicted again. Needs the extra
`report` (matplotlib, jinja2).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from nucsam.atomic import write_text
from nucsam.config import Config, differences
from nucsam.gallery import SHAPES, gallery, picks, scaled
from nucsam.metrics import OUTCOMES
from nucsam.results import NO_ORGAN, SHOWN, Trained, by_organ, findings, percent, plain, read


def charts(all_runs: Sequence[Trained], runs: Sequence[Trained], net: Any) -> dict[str, tuple[Any, str]]:
    """Name -> figure and what it shows: curves and organs of `runs`, one variant's, and how all compare."""
    from nucsam import charts

    made: dict[str, tuple[Any, str]] = {}
    trained = [run for run in runs if run.lines]
    one = trained[0] if len(trained) == 1 else None

    def line(run: Trained, key: str, factor: float = 1.0) -> tuple[list, list]:
        found = [entry for entry in run.lines if key in entry]
        return [entry["epoch"] for entry in found], [factor * entry[key] for entry in found]

    def curve(name: str, title: str, y: str, series: dict[str, tuple], says: str) -> None:
        kept = one.scores["epoch"] if one and one.scores and name == "validation" else 0
        series = {label: points for label, points in series.items() if points[0]}
        if series:
            made[name] = charts.curves(series, title, "epoch", y, kept), f"{title} by epoch: {says}"

    def ends(series: dict[str, tuple], form: str) -> str:
        return "; ".join(f"{k} {ys[0]:{form}} to {ys[-1]:{form}}" for k, (_, ys) in series.items() if ys)

    if trained:
        terms = sorted({key for key in trained[0].lines[-1] if key.startswith("loss_")}) if one else []
        titles = {"loss": "total"} | {key: key.removeprefix("loss_").replace("_", " ") for key in terms}
        lossy = {titles[k]: line(one, k) for k in titles} if one else {run.name: line(run, "loss") for run in trained}
        curve("loss", "Training loss", "loss", lossy, ends(lossy, ".3g"))
        rates = {run.name: line(run, "lr") for run in trained[:1]}
        curve("rate", "Learning rate", "rate at the end of the epoch", rates, ends(rates, ".2g"))
        best = trained[0].config.train.best
        tried = {SHOWN[k]: line(one, k, 100) for k in SHOWN} if one else {r.name: line(r, best, 100) for r in trained}
        title = f"Validation{'' if one else f': {SHOWN[best]}'}, {trained[0].config.data.select} split"
        curve("validation", title, "percent", tried, ends(tried, ".1f"))
    rows = [row for run in runs for row in run.rows]
    for metric, title in SHOWN.items():
        if values := by_organ(rows, metric):
            means = sorted((fmean(found), organ) for organ, found in values.items())
            says = ", ".join(f"{organ} {percent(mean)}" for mean, organ in means)
            made[f"organs-{metric}"] = charts.organs(values, f"{title} by organ"), f"Mean {title} by organ: {says}"
    scored = [run for run in all_runs if run.scores]
    for name, title, key in (
        ("folds", "Test scores by fold", "name"),
        ("variants", "Test scores by variant", "variant"),
    ):
        groups = defaultdict(lambda: {title: [] for title in SHOWN.values()})
        for run in runs if name == "folds" else scored:
            for metric, label in SHOWN.items():
                if run.scores:
                    groups[getattr(run, key)][label].append(run.scores["headline"][metric])
        if len(groups) > 1:
            says = "; ".join(
                f"{g}: " + ", ".join(f"{k} {percent(fmean(v))}" for k, v in m.items()) for g, m in groups.items()
            )
            made[name] = (
                charts.compare(groups, title, "; dots: folds" if name == "variants" else ""),
                f"{title}: {says}",
            )
    if hasattr(getattr(net, "image_encoder", None), "neck"):
        pattern = runs[0].config.model.pattern if runs[0].config.model.train == "lora" else "(LoRA is off)"
        says = ", ".join(f"{part.name} {part.trained:,} of {part.parameters:,} trained" for part in charts.parts(net))
        made["network"] = charts.network(net, pattern), f"The network: {says}"
    return made


def summary(runs: Sequence[Trained]) -> dict[str, Any]:
    """Of the folds of one variant: each metric's mean over images, then folds, its deviation over folds, and facts."""
    done = [run for run in runs if run.scores]
    whole = done[0].scores["scores"][0]["summary"] if len(runs) == len(done) == 1 else None
    found = {metric: [run.scores["headline"][metric] for run in done] for metric in SHOWN}
    return {
        "variant": runs[0].variant,
        "folds": f"{len(done)} of {len(runs) if len(runs) == 1 else runs[0].config.data.folds}",
        "mean": {metric: fmean(values) if values else None for metric, values in found.items()},
        "std": {metric: stdev(values) if len(values) > 1 else None for metric, values in found.items()},
        "interval": {metric: (whole["low"][metric], whole["high"][metric]) for metric in SHOWN} if whole else {},
        "kept": ", ".join(f"{run.scores['epoch']}" for run in done),
    }


def notices(folder: Path, all_runs: Sequence[Trained]) -> list[str]:
    """What a reader must know before any number: what is missing, and what makes the numbers flatter or say nothing."""
    found = []
    cross = all_runs[0].folder != folder
    missing = [run for run in all_runs if run.scores is None]
    for run in missing:
        done = run.lines[-1]["epoch"] if run.lines else 0
        what = ", ".join(filter(None, (run.variant, run.name))) if cross else "This run"
        found.append(
            f"{what} is unfinished: {done} of {run.config.train.epochs} epochs, no scores.json. "
            "The same command with --resume goes on with it; nucsam evaluate scores its best epoch so far."
        )
    for variant in dict.fromkeys(run.variant for run in all_runs if cross):
        own = [run for run in all_runs if run.variant == variant]
        if len(own) < own[0].config.data.folds:
            found.append(
                f"{variant or 'The cross-validation'} has {len(own)} of {own[0].config.data.folds} folds so far."
            )
    scored = [run for run in all_runs if run.scores]
    if any(run.config.data.select == "test" for run in scored):
        found.append("The epoch was chosen on the test images: these scores flatter the model.")
    if any(run.scores.get("images_of") == "inner" for run in scored):
        found.append("No test images: the scores are of the inner split, which chose the epoch, and flatter the model.")
    if any(run.config.model.weights == "none" for run in all_runs):
        found.append("Random base weights: the scores say nothing about MobileSAM.")
    return found


def facts(runs: Sequence[Trained], all_runs: Sequence[Trained]) -> dict[str, str]:
    """How the runs of a variant were made, by name."""
    run = next((own for own in runs if own.environment), runs[0])
    d, t, env, of = run.config.data, run.config.train, run.environment, f" in {run.name}" if len(runs) > 1 else ""
    bases = {f"{e['base']}, SHA-256 {e['base_sha256'][:12]}": 0 for own in runs if "base" in (e := own.environment)}
    scored = [own for own in runs if own.scores]
    seeds = sorted({own.config.train.seed for own in all_runs})
    trained, every = env.get("parameters_trainable"), env.get("parameters")
    seconds = sum(line.get("seconds", 0) for own in runs for line in own.lines)
    speeds = [line["images_per_second"] for own in runs for line in own.lines if "images_per_second" in line]
    memory = [
        line[key] for own in runs for line in own.lines for key in ("memory_gib", "peak_memory_gib") if key in line
    ]
    kept = "; ".join(f"epoch {o.scores['epoch']}" + (f" in {o.name}" if len(runs) > 1 else "") for o in scored)
    software = {name: env[name] for name in ("nucsam", "python") if name in env} | env.get("packages", {})
    others = {}
    for k, other in enumerate(max((own.scores["scores"] for own in scored), key=len, default=[])[1:], 1):
        # a fold without vague areas scores the same with and without them
        means = [(own.scores["scores"][k:] or own.scores["scores"])[0]["summary"]["mean"] for own in scored]
        numbers = (f"{title} {percent(fmean(mean[metric] for mean in means))}" for metric, title in SHOWN.items())
        others[f"By {other['protocol']['name']}"] = f"{', '.join(numbers)} ({other['rules']})"
    found = {
        "Base weights": "; ".join(bases),
        "Images": ", ".join(f"{count} {name}" for name, count in env.get("images", {}).items()) + of,
        "Split": f"{d.split}, {d.folds} folds, {'fold ' + str(d.fold) if len(runs) == 1 else 'each tested once'}, "
        f"seed {d.seed}, group {d.group or 'none'}, inner part {d.inner:g}",
        "Epoch kept": f"{kept or 'none yet'}; chosen by {SHOWN[t.best]} on the {d.select} split",
        "Seeds": f"{len(seeds)} (train.seed = {', '.join(map(str, seeds))})"
        + ("; the spread over seeds is not known" if len(seeds) == 1 else ""),
        "Scoring": scored[0].scores["scores"][0]["rules"] if scored else "",
        **others,
        "Parameters trained": f"{trained:,} of {every:,} ({trained / every:.2%})" if trained and every else "",
        "Training": f"{seconds / 60:.1f} min"
        + (f", {np.median(speeds):.1f} images/s" if speeds else "")
        + (f", {max(memory):.1f} GiB" if memory else ""),
        "Device": f"{env['device']}, {env.get('processes', 1)} process(es), precision {env.get('precision', '?')}"
        if "device" in env
        else "",
        "Software": ", ".join(f"{name} {number}" for name, number in software.items()),
        "Platform": env.get("platform", ""),
        "Command": " ".join(env.get("command", [])),
    }
    return {name: text for name, text in found.items() if text}


def write(folder: Path, *, net: Any = None, root: str = "", figures: Path | None = None) -> list[Path]:
    """Write `folder`/report.html of a run or a cross-validation, and into `figures` each chart and picture; the paths.

    net: the run's model with its best weights, where it is at hand. root: the data folder, where it has moved.
    Raises RuntimeError where the extra is missing, ValueError where `folder` holds no run or a file is damaged. Where
    only images or weights are missing the page says so.
    """
    if missing := [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]:
        raise RuntimeError(f"report: found no {' and no '.join(missing)}; pip install 'nucsam[report]' brings them")
    every = read(folder)
    names = dict.fromkeys(run.variant for run in every)
    variants = {name: [run for run in every if run.variant == name] for name in names}
    sums = [summary(runs) for runs in variants.values()]
    runs = variants[max(sums, key=lambda found: found["mean"]["aji"] or -1.0)["variant"]]
    rows = [row for run in runs for row in run.rows]
    from nucsam import charts as drawn  # imports torch: not for a folder that cannot be read

    said = notices(folder, every)
    shown, own = [], net
    try:
        shown, own = gallery(picks(rows), runs, net, root)
    except (ValueError, OSError) as error:
        said.append(f"No pictures: {error}. Where the images have moved: nucsam report {folder} --data FOLDER.")
    made = charts(every, runs, own)
    at = {picture["row"]["name"]: picture["id"] for picture in shown}
    page = {
        "title": folder.resolve().name,
        "cross": every[0].folder != folder,
        "notices": said,
        "sums": sums,
        "best": summary(runs),
        "runs": runs,
        "findings": findings([run for run in runs if run.scores or run.lines], at),
        "charts": {name: drawn.svg(figure, name, says) for name, (figure, says) in made.items()},
        "organs": _organ_table(rows),
        "pictures": shown,
        "rows": sorted(rows, key=lambda row: (row["aji"] is None, row["aji"], row["name"])),
        "at": at,
        "facts": facts(runs, every),
        "changed": differences(Config(), runs[0].config),
        "config": (runs[0].folder / "config.toml").read_text(encoding="utf-8"),
        "links": [run.folder.relative_to(folder).as_posix() for run in every if run.folder != folder],
    }
    write_text(folder / "report.html", plain(_template().render(page)))
    return [folder / "report.html", *(_figures(figures, made, shown, runs[0], root) if figures else [])]


def _organ_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    means = {metric: {organ: fmean(values) for organ, values in by_organ(rows, metric).items()} for metric in SHOWN}
    images = Counter(row["organ"] or NO_ORGAN for row in rows)
    return [{"organ": o, "images": images[o], **{m: means[m][o] for m in SHOWN}} for o in sorted(means["aji"])]


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("nucsam"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["percent"] = percent
    made.globals |= {"shown": SHOWN, "outcomes": OUTCOMES, "shapes": {k: scaled(v, 3.5) for k, v in SHAPES.items()}}
    return made.get_template("report.html")


def _figures(folder: Path, made: dict, shown: list[dict], run: Trained, root: str) -> list[Path]:
    """Write every chart as SVG and PNG, the gallery's panels, and a contact sheet of the data; the paths."""
    from nucsam import charts as drawn
    from nucsam import data, draw, scoring

    folder.mkdir(parents=True, exist_ok=True)
    written = [path for name, (figure, _) in made.items() for path in drawn.write(figure, folder / name)]
    for picture in shown:
        written.append(folder / f"{picture['kind']}-rank{picture['rank']}.png")
        draw.write_png(written[-1], draw.overlay(picture["sample"].image, picture["sample"].label, picture["pred"]))
    try:
        records, _ = scoring.find_images(replace(run.config.data, root=root or run.config.data.root))
    except ValueError:  # the page has said it
        return written
    organs = defaultdict(list)
    for record in records:
        organs[record.organ].append(record)
    turns = [record for turn in zip_longest(*organs.values()) for record in turn if record][:24]
    samples = ((record.name, data.read_sample(record)) for record in turns)
    draw.contact_sheet(((name, draw.contours(s.image, s.label)) for name, s in samples), folder / "samples.png")
    return [*written, folder / "samples.png"]


def finish(folder: Path, net: Any = None) -> str:
    """Make the page at the end of a training, which it never fails; a line that says what came of it."""
    try:
        return f"report: {write(folder, net=net)[0]}"
    except Exception as error:  # whatever it is, the training is done and its files are written
        again = "" if "nucsam[report]" in str(error) else f"; nucsam report {folder} tries again"
        return f"no report.html ({type(error).__name__}: {error}){again}"
