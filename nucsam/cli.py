"""The command line: typer and rich, no logic.

Commands import what they need when they run, so that `--help` is quick.
"""

import errno
import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nucsam import __version__
from nucsam.errors import UserError
from nucsam.files import expanded, printable

app = typer.Typer(
    rich_markup_mode="markdown",  # a single line end in a docstring is a space
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# An unknown option such as `--epochs 3` reaches `configuration`, which explains settings.
LENIENT = {"ignore_unknown_options": True}

# Shared by several commands.
Settings = Annotated[
    list[str] | None,
    Argument(metavar="[FOLDER] [CONFIG.toml] [table.key=value ...]", show_default=False),
]
Grid = Annotated[list[str] | None, Option(metavar="'table.key=[a, b]'", help="May be repeated.")]
DataFolder = Annotated[str, Option(help="Folder of RUN's images, if it has moved.")]
Force = Annotated[bool, Option("--force", help="Replace existing results.")]
RegionClass = Annotated[str, Option(help="Class of annotated regions, beside QuPath's Region*.")]


def run_command(arguments: list[str]) -> int:
    """Run one command line.

    A user's mistake is one message on stderr and status 2; every other exception passes through.

    Args:
        arguments: the words after `nucsam`.

    Returns:
        The exit status.
    """
    # Print a warning without its source line.
    warnings.formatwarning = lambda message, *_, **__: printable(f"warning: {message}\n")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook has replaced it
            stream.reconfigure(errors="replace")  # a terminal may lack a character
    try:
        app([_with_home(text) for text in arguments], prog_name="nucsam")
    except SystemExit as exit:
        if isinstance(getattr(exit.__context__, "__cause__", None), KeyboardInterrupt):
            print("nucsam: stopped by Ctrl-C", file=sys.stderr)  # typer says nothing
        return int(exit.code or 0)
    except ModuleNotFoundError as error:
        if importlib.util.find_spec("torch"):
            raise
        needs = f"needs {error.name}, which is not installed"
        expected = "expected nucsam with its requirements: pip install nucsam, without --no-deps"
        print(f"nucsam: {arguments[0]} {needs}; {expected}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        names_file = isinstance(error, UserError) or error.filename
        # a full disk; a working directory that has been removed
        if not names_file and error.errno not in (errno.ENOSPC, errno.ENOENT):
            raise
        print(printable(f"nucsam: {error}"), file=sys.stderr)
        return 2
    return 0


def _with_home(argument: str) -> str:
    """`--out=~/folder` with the home folder for the `~`, which a shell leaves there."""
    option, _, value = argument.partition("=")
    return f"{option}={expanded(value)}" if _IN_HOME.match(argument) else argument


_IN_HOME = re.compile("--(base|csv|data|figures|json|out|overlays|pred|roi|sheet|truth|vague)=~")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"nucsam {__version__}")
        raise typer.Exit


@app.callback()
def nucsam_command(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Nuclei instance segmentation in H&E images: MobileSAM fine-tuned with LoRA."""


@app.command("quickstart")
def quickstart_command(
    folder: Annotated[Path, Argument(metavar="[DIR]")] = Path("runs/quickstart"),
) -> None:
    """Train and score a model on synthetic images in DIR: minutes on a CPU, nothing to download.

    After an interruption, the same command continues.
    """
    from nucsam.data.synthetic import write_dataset

    data, run = folder / "data", folder / "fold0"
    if not data.is_dir():
        write_dataset(data, images=60, size=256, seed=0)
    settings = [str(shipped_configuration("quickstart")), f"data.root={data}"]
    train_command(settings, out=run, resume=run.is_dir())
    evaluate_command(run, untrained=True)
    print("What your images take      nucsam train my_folder --dry-run")


@app.command("train", context_settings=LENIENT)
def train_command(
    arguments: Settings = None,
    out: Annotated[Path | None, Option(help="Default: runs/NAME-foldK.")] = None,
    resume: Annotated[bool, Option("--resume", help="Resume the run in --out.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Estimate the cost; keep nothing.")] = False,
) -> None:
    """Train one fold on the images of FOLDER, choose its best epoch and score its test images.

    The default configuration is nucsam's best, configs/nuinsseg.toml; with --resume, that of the
    run. train.epochs=N adds epochs to a finished run. `nucsam settings` lists all settings.

    Several devices: accelerate launch --config_file launch/ddp.yaml -m nucsam.train ...
    """
    from nucsam.config import load_config
    from nucsam.files import folder_name

    path, overrides = configuration(arguments or [])
    shipped = path == shipped_configuration()
    if not out:
        data = load_config(path, overrides).data
        name = folder_name(data.root) if shipped else path.stem
        out = Path("runs") / f"{name}-fold{data.fold}"
    own = out / "config.toml"
    settings = load_config(own if resume and shipped and own.is_file() else path, overrides)
    if dry_run:
        from nucsam.train.rehearsal import rehearse

        rehearse(settings)
        return
    from nucsam.train.loop import fit  # after the configuration, because it imports torch

    fit(settings, out, resume=resume)
    _draw_report(out)


@app.command("folds", context_settings=LENIENT)
def folds_command(
    out: Annotated[Path, Option(help="Folder of all runs; a second call runs what is missing.")],
    arguments: Settings = None,
    grid: Grid = None,
) -> None:
    """Train and score every fold, one at a time per device; write tables, figures and methods.

    With --grid, every fold runs for each value.

    Several devices: accelerate launch --multi_gpu --num_processes 4 -m nucsam.folds ...
    """
    from nucsam.folds.runner import cross_validate

    path, overrides = configuration(arguments or [])
    status = cross_validate(path, overrides, out, grid or [])
    _draw_report(out, out / "figures")
    raise typer.Exit(status)


@app.command("settings")
def settings_command(
    arguments: Annotated[
        list[str] | None, Argument(metavar="[CONFIG.toml] [WORD]", show_default=False)
    ] = None,
) -> None:
    """List the settings that hold WORD: defaults, what CONFIG.toml changes, meanings, units."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from nucsam.config import load_config, setting_rows
    from nucsam.console import PlainConsole

    words = [text for text in arguments or [] if not text.endswith(".toml")]
    path, _ = configuration([text for text in arguments or [] if text not in words])
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("setting", "default", path.stem, "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "setting")
    for row in setting_rows(load_config(path), " ".join(words)):
        table.add_row(*row)
    PlainConsole().print(table)


def _draw_report(out: Path, figures: Path | None = None) -> None:
    """Draw the report once for all processes of a launch."""
    from nucsam.processes import is_first

    if is_first():
        from nucsam.report.page import finish

        print(printable(finish(out, figures)))


def _refuse(options: dict[str, Any], kind: str) -> None:
    """Refuse options that were given and say nothing of `kind`."""
    given = [
        name for name, value in options.items() if value not in (None, "") and value is not False
    ]
    if given:
        found = f"found --{', --'.join(given)} beside {kind}".replace("_", "-")
        raise UserError(f"evaluate: {found}, which does not take that (see --help)")


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path | None, Argument(metavar="[RUN]", help="Run directory to score.")] = None,
    untrained: Annotated[bool, Option("--untrained", help="Score RUN before training.")] = False,
    data: DataFolder = "",
    overlays: Annotated[Path | None, Option(help="Folder for images with contours.")] = None,
    truth: Annotated[Path | None, Option(help="Folder of true label maps, without RUN.")] = None,
    pred: Annotated[Path | None, Option(help="Folder of any tool's predicted label maps.")] = None,
    vague: Annotated[Path | None, Option(help="Folder of masks of vague areas.")] = None,
    protocol: Annotated[str, Option(help="nuinsseg, nuceval or plain.")] = "nuinsseg",
    iou: Annotated[float | None, Option(help="Threshold; default: the protocol's.")] = None,
    at_least: Annotated[bool, Option("--at-least", help="Match at IoU >= threshold.")] = False,
    zone: Annotated[int | None, Option(help="Ignored ring around true boundaries, px.")] = None,
    connected: Annotated[bool, Option("--connected", help="Label masks' components.")] = False,
    organ: Annotated[str, Option(help="Regular expression that finds the organ in a stem.")] = "",
    region_class: RegionClass = "",
    workers: Annotated[int | None, Option(help="Processes; by default up to 8.")] = None,
    csv: Annotated[str, Option(help="File with a line per image; - prints them.")] = "",
    as_json: Annotated[str, Option("--json", help="File of all scores; - prints them.")] = "",
) -> None:
    """Score a run's test images, or --pred against --truth: label maps with the same stems.

    --untrained, --data and --overlays need RUN; for a finished run, --untrained prints the scores
    before and after training. --vague, --connected, --region-class and --workers need --truth and
    --pred: a run's data set and configuration say how it is scored.
    """
    from nucsam.console import PlainConsole
    from nucsam.score import pairs, tables

    if as_json == csv == "-":
        raise UserError("evaluate: found - for --json and --csv, expected a file for one of them")
    console = PlainConsole(stderr="-" in (as_json, csv))
    strict = False if at_least else None
    rules = {"protocol": protocol, "iou": iou, "strict": strict, "zone_width": zone, "organ": organ}
    maps = {"vague": vague, "connected": connected, "region_class": region_class}
    if run is not None:
        _refuse({"truth": truth, "pred": pred, **maps, "workers": workers}, "RUN")
        from nucsam.run.directory import RunDirectory
        from nucsam.score.runs import score_run, scores_sentence  # imports torch

        results = score_run(run, untrained=untrained, root=data, overlays=overlays, **rules)
        trained = RunDirectory(run).trained_scores(results) if untrained else None
        remarks = [] if trained else [scores_sentence(results)]
    elif truth is None or pred is None:
        raise UserError("evaluate: expected either RUN, or both --truth and --pred")
    else:
        of_runs = {"untrained": untrained, "data": data, "overlays": overlays}
        _refuse(of_runs, "--truth and --pred")
        results = pairs.score_folders(truth, pred, workers=workers or 0, **maps, **rules)
        trained, remarks = None, pairs.remarks(results)
    # files first: they stay where printing fails
    if as_json == "-":
        print(tables.to_json(results))
    elif as_json:
        tables.write_json(as_json, results)
    if csv == "-":
        print(tables.image_csv(results).replace("\r\n", "\n"), end="")
    elif csv:
        tables.write_csv(csv, results)
    for remark in remarks:
        console.print(remark, style="bold" if run is not None else "yellow")
    if trained:
        console.print(tables.change_table(results, trained))
    for result in [] if trained else results["scores"]:
        console.print(tables.organ_table(result), tables.summary_table(result))


@app.command("predict")
def predict_command(
    model: Annotated[
        str, Argument(metavar="MODEL", help="starter, hf:USER/NAME, run directory or export.")
    ],
    paths: Annotated[list[Path], Argument(metavar="PATHS...", help="Image files or folders.")],
    out: Annotated[Path, Option(help="Folder of the results, named by the images' stems.")],
    formats: Annotated[str, Option(help="Comma-separated.")] = "labels,geojson,overlay",
    scale: Annotated[float | None, Option(help="Model px per image px; default: by mpp.")] = None,
    mpp: Annotated[float | None, Option(help="Microns per image px; default: the file's.")] = None,
    tile: Annotated[
        int | None, Option(help="Longest side, px as trained; default: a crop, 256 or more.")
    ] = None,
    overlap: Annotated[int | None, Option(help="Px that tiles share; default: tile / 16.")] = None,
    batch: Annotated[int | None, Option(help="Tiles at a time; GPU default: as trained.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    tta: Annotated[bool, Option("--tta", help="Average 8 flips and turns: 8 times slower")] = False,
    adapt: Annotated[
        float | None, Option(help="0 to 1: adapt to other stains, such as 0.06; default: as set.")
    ] = None,
    auto_scale: Annotated[
        bool | None, Option(help="Take the magnification from the nuclei; default: as trained.")
    ] = None,
    lenient: Annotated[
        bool | None, Option(help="Lower thresholds for uncertain images; default: as set.")
    ] = None,
    roi: Annotated[Path | None, Option(help="GeoJSON, or a folder of STEM.geojson.")] = None,
    tissue: Annotated[
        bool, Option("--tissue-mask/--no-tissue-mask", help="Skip tiles that show only glass.")
    ] = True,
    per_device: Annotated[int, Option(help="Launched processes that share a GPU.")] = 1,
    force: Force = False,
) -> None:
    """Predict images of any size: label maps, GeoJSON for QuPath, tables of nuclei, overlays.

    Formats: labels (STEM.tif), geojson, geojson.gz, csv, parquet, overlay (overlays/STEM.png), and
    tissue (STEM.tissue.geojson), the mask of what is not glass.
    The tables give sizes in px and with mpp in µm, colours as 0..255, haematoxylin and eosin as
    optical density, and confidence, the mean foreground probability, 0..1.

    With --auto-scale, each image is looked at first, in up to 4 windows of 1,024 px. If at least 10
    nuclei are found, it is predicted at the magnification that gives them the median area of those
    trained on, up to 3 times more or less. Models trained with data.nucleus_area always do this. It
    fails where nuclei are over twice as long as those trained on: they are found in pieces, and
    magnified further. Give --mpp or --scale for such images.

    With --roi, only nuclei inside the regions of a file, such as one that QuPath exports, are
    predicted.

    A failed image is named, the others continue, and the exit status is 1.

    Several devices: accelerate launch --multi_gpu --num_processes 4 -m nucsam.predict ...
    With twice as many processes and --per-device 2, two share a GPU.
    """
    from nucsam.predict.images import predict_files

    names = [name.strip() for name in formats.split(",") if name.strip()]
    tiling = {"scale": scale, "mpp": mpp, "tile": tile, "overlap": overlap, "batch": batch}
    status = predict_files(
        model,
        paths,
        out,
        formats=names,
        device=device,
        per_device=per_device,
        tta=tta,
        adapt=adapt,
        auto_scale=auto_scale,
        lenient=lenient,
        force=force,
        roi=roi,
        tissue=tissue,
        **tiling,
    )
    raise typer.Exit(status)


@app.command("models")
def models_command() -> None:
    """List the models that have a name: the starter, and what lies in the caches.

    predict and model.weights take these names; model.encoder takes those of published weights.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from nucsam.console import PlainConsole
    from nucsam.predict.models import list_models

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("name", "origin", "MiB", "file"):
        table.add_column(heading, overflow="fold")
    for name, origin, size, path in list_models():
        table.add_row(name, origin, f"{size / 2**20:.1f}", printable(str(path)))
    PlainConsole().print(table)


@app.command("synth")
def synth_command(
    out: Annotated[Path, Argument(metavar="OUT", help="New or empty folder.")],
    images: Annotated[int, Option(help="Number of images.")] = 40,
    size: Annotated[int, Option(help="Side of an image, px.")] = 256,
    seed: Annotated[int, Option(help="The same seed gives the same images.")] = 0,
) -> None:
    """Write synthetic H&E images with exact labels, in NuInsSeg's layout."""
    from nucsam.data.synthetic import write_dataset
    from nucsam.processes import exit_on_sigterm

    with exit_on_sigterm():
        write_dataset(out, images=images, size=size, seed=seed)
    print(f"{out}: {images} images of {size} px")


@app.command("download")
def download_command(
    name: Annotated[str, Argument(metavar="SET", help="nuinsseg, monuseg, tnbc, ...")],
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder to unpack it into.")],
) -> None:
    """Download a public data set, or name the page that has it."""
    from nucsam.data.sources import download_set

    print(f"{download_set(name, folder)}: a data set, ready for nucsam inspect")


@app.command("inspect")
def inspect_command(
    data: Annotated[Path, Argument(metavar="DATA", help="Folder of images and label maps.")],
    layout: Annotated[str, Option(help="auto, or how DATA is arranged.")] = "auto",
    group: Annotated[str, Option(help="Regular expression that finds the group in a stem.")] = "",
    connected: Annotated[bool, Option("--connected", help="Label masks' components.")] = False,
    region_class: RegionClass = "",
    sheet: Annotated[
        Path | None, Option(help="Contact sheet; default: contact_sheet.png, not in DATA.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count images and nuclei per organ, name every bad file, and draw a contact sheet."""
    from nucsam.console import PlainConsole
    from nucsam.data.summary import draw_examples, inspect_folder, summary_table

    if sheet and sheet.suffix.lower() != ".png":
        raise UserError(f"sheet: found {sheet}, expected a name that ends in .png")
    summary, examples = inspect_folder(
        data, layout=layout, group=group, connected=connected, region_class=region_class
    )
    console = PlainConsole(stderr=as_json)
    console.print(f"{summary['root']}, layout {summary['layout']}: {summary['taken']}")
    console.print(summary_table(summary))
    for kind, style in (("remarks", "yellow"), ("bad", "red")):
        for text in summary[kind]:
            console.print(text, style=style)
    if as_json:
        print(json.dumps(summary, indent=2))
    inside = Path.cwd().is_relative_to(data.resolve())
    if examples and inside and not sheet:
        console.print("no contact sheet: it would lie in DATA; --sheet names a file for it")
    elif examples:
        try:
            draw_examples(examples, sheet or Path("contact_sheet.png"))
            console.print(f"contact sheet: {sheet or 'contact_sheet.png'}")
        except UserError as error:
            if sheet:
                raise
            console.print(f"no contact sheet: {error}; name a file", style="yellow")
    raise typer.Exit(1 if summary["bad"] else 0)


@app.command("export")
def export_command(
    run: Annotated[str, Argument(metavar="RUN", help="Run directory, adapter file or starter.")],
    out: Annotated[Path | None, Option(help="File to write.")] = None,
    push: Annotated[str, Option(help="USER/NAME: upload it to the Hugging Face Hub.")] = "",
    format: Annotated[str, Option(help="One of the formats above; default: by suffix.")] = "",
    base: Annotated[str, Option(help="Base of an exported adapter: a path or auto.")] = "",
    half: Annotated[bool, Option("--half", help="Half precision: half the size.")] = False,
    adapt: Annotated[
        float | None, Option(help="0 to 1: the file adapts to other stains; default: as the run.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a finished run's model as one file, or upload it with a card that describes it.

    Formats: safetensors (merged LoRA and head, for nucsam), onnx, which takes a minute, sam (the
    base's own tensors, .pt), or adapter (LoRA and head alone).
    """
    from nucsam.console import PlainConsole
    from nucsam.export.merged import export_run, push_run

    if not (out or push):
        raise UserError("export: expected --out FILE, --push USER/NAME, or both")
    options = {"base": base, "half": half, "adapt": adapt}
    sentences = []
    with PlainConsole(stderr=True).status(f"writing {out or push}"):
        if out:
            sentences.append(export_run(run, out, format=format, force=force, **options))
        if push:
            sentences.append(push_run(run, push, format=format, **options))
    print(printable("\n".join(sentences)))


@app.command("report")
def report_command(
    run: Annotated[Path, Argument(metavar="RUN", help="Folder of nucsam train or nucsam folds.")],
    data: DataFolder = "",
    figures: Annotated[Path | None, Option(help="Folder for charts and pictures.")] = None,
    every_image: Annotated[bool, Option("--every-image", help="Picture all test images.")] = False,
) -> None:
    """Write RUN/report.html: a run or a cross-validation as one page that needs no network.

    --figures writes every chart and picture as a file.
    """
    from nucsam.report.page import write_report

    for path in write_report(run, root=data, figures=figures, every_image=every_image):
        print(printable(str(path)))


def configuration(arguments: list[str]) -> tuple[Path, list[str]]:
    """Separate the TOML file, by default nucsam's best, and the overrides among the arguments.

    A folder is data.root.
    """
    files = [text for text in arguments if text.endswith(".toml") and "=" not in text]
    folders = [text for text in arguments if text not in files and Path(text).is_dir()]
    overrides = [
        f"data.root={text}" if text in folders else text for text in arguments if text not in files
    ]
    for text in folders:
        from nucsam.run.directory import RunDirectory

        run = RunDirectory(Path(text))
        if run.exists() and run.images_file.is_file():
            advice = f"nucsam train --out {text} --resume continues it"
            raise UserError(f"{text}: found a run, expected a folder of images; {advice}")
    options = [text for text in overrides if text.startswith("-")]
    for kind, names in (("configurations", files), ("folders", folders)):
        if len(names) > 1:
            raise UserError(f"found {len(names)} {kind} ({', '.join(names)}), expected one")
    if options:
        example = "a setting is table.key=value, such as train.epochs=10"
        raise UserError(f"no such option: {options[0]} (--help lists them); {example}")
    return (Path(files[0]) if files else shipped_configuration()), overrides


def shipped_configuration(name: str = "nuinsseg") -> Path:
    """configs/NAME.toml of this installation, or of this source tree."""
    package = Path(__file__).parent
    paths = [folder / "configs" / f"{name}.toml" for folder in (package, package.parent)]
    return next(path for path in paths if path.is_file())
