"""The command line: typer and rich, no logic. Heavy modules are imported inside the commands that need them."""

import errno
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Nuclei instance segmentation in H&E images: MobileSAM fine-tuned with LoRA.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
SETTINGS = {"ignore_unknown_options": True}  # `--epochs 3` comes among the overrides, where it is explained


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status. A user's mistake is one message on stderr and status 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without a line of source code
    try:
        app(arguments, prog_name="nucsam")
    except SystemExit as exit:
        return int(exit.code or 0)
    except (ValueError, RuntimeError, OSError) as error:
        if not _mistake(error):
            raise
        print(f"nucsam: {error}", file=sys.stderr)
        return 2
    return 0


def _mistake(error: Exception) -> bool:
    """Whether the message tells a user enough: those raised in nucsam itself, and of a file or a full disk."""
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").startswith("nucsam")


@app.command(context_settings=SETTINGS)
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [table.key=value ...]", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/<configuration>-fold<K> if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train one fold, choose its best epoch and score its test images.

    Without a configuration it takes nucsam's best, configs/nuinsseg.toml. On several devices, or for fp16 and bf16:
    accelerate launch --config_file launch/ddp.yaml -m nucsam.train ...
    """
    from nucsam import config

    path, overrides = configuration(arguments or [])
    settings = config.load(path, overrides)
    from nucsam.train import train  # imports torch

    train(settings, out or Path("runs") / f"{path.stem}-fold{settings.data.fold}", resume=resume)


@app.command(context_settings=SETTINGS)
def folds(
    out: Annotated[Path, typer.Option(help="Folder of all runs; the same again does what is missing.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.toml] [table.key=value ...]", show_default=False)
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="'table.key=[a, b]'", help="Every fold for each value; may be repeated.")
    ] = None,
) -> None:
    """Train and score every fold, one at a time on each device, and write the cross-validation table.

    On several devices: accelerate launch --multi_gpu --num_processes 4 -m nucsam.folds ...
    """
    from nucsam.folds import folds

    path, overrides = configuration(arguments or [])
    raise typer.Exit(folds(path, overrides, out, grid or []))


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run directory: scores its test images.")] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="RUN's model as it was before training.")] = False,
    data: Annotated[str, typer.Option(help="Folder of RUN's images, if it has moved.")] = "",
    overlays: Annotated[Path | None, typer.Option(help="Folder for RUN's pictures with contours.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Folder of true label maps, instead of RUN.")] = None,
    pred: Annotated[Path | None, typer.Option(help="Folder of predicted label maps, of any tool.")] = None,
    vague: Annotated[Path | None, typer.Option(help="Folder of masks of vague areas.")] = None,
    protocol: Annotated[str, typer.Option(help="nuinsseg, nuceval or plain.")] = "nuinsseg",
    iou: Annotated[float | None, typer.Option(help="Matching threshold, instead of the protocol's.")] = None,
    at_least: Annotated[bool, typer.Option("--at-least", help="Match at IoU >= threshold, not >.")] = False,
    zone: Annotated[int | None, typer.Option(help="Ring ignored round true boundaries, px.")] = None,
    connected: Annotated[bool, typer.Option("--connected", help="Label the components of binary masks.")] = False,
    organ: Annotated[str, typer.Option(help="Regular expression on the stem that gives the organ.")] = "",
    workers: Annotated[int, typer.Option(help="Processes; 0 = one a core.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="File for a line per image.")] = None,
    as_json: Annotated[str, typer.Option("--json", help="File for every image's scores and counts; - prints it.")] = "",
) -> None:
    """Score a run's test images, or --pred against --truth: label maps of any tool, files matched by stem."""
    from rich.console import Console

    from nucsam import evaluate

    if (run is None) == (truth is None or pred is None):
        raise ValueError("evaluate: expected either RUN, or both --truth and --pred")
    console = Console(stderr=as_json == "-")
    if run is not None:
        from nucsam.scoring import score_run, sentence

        results = score_run(run, untrained=untrained, root=data, overlays=overlays)
        console.print(sentence(results), style="bold")
    else:
        results = evaluate.score_folders(
            truth,
            pred,
            vague=vague,
            protocol=protocol,
            iou=iou,
            at_least=at_least,
            zone=zone,
            connected=connected,
            organ=organ,
            workers=workers,
        )
        for remark in evaluate.remarks(results):
            console.print(remark, style="yellow", markup=False)
    for result in results["scores"]:
        console.print(evaluate.organ_table(result), evaluate.summary_table(result))
    if as_json == "-":
        print(evaluate.to_json(results))
    elif as_json:
        evaluate.write_json(as_json, results)
    if csv:
        evaluate.write_csv(csv, results)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Run directory, or a safetensors file of nucsam export.")
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="PATHS...", help="Image files, and folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the results, files named by the images' stems.")],
    formats: Annotated[
        str, typer.Option(help="Some of labels,geojson,csv,overlay: STEM.tif, .geojson, .csv, overlays/STEM.png.")
    ] = "labels",
    scale: Annotated[float | None, typer.Option(help="Model px per image px; else by microns per px.")] = None,
    mpp: Annotated[float | None, typer.Option(help="Microns per px of the images; else their TIFF tags.")] = None,
    tile: Annotated[int | None, typer.Option(help="Side of a tile, px at the trained scale; else a crop.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Px that tiles share; else one 32nd of a tile.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tiles at a time; else 1 on a CPU, as trained on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tta: Annotated[bool, typer.Option("--tta", help="Mean over the eight flips and turns; 8 times slower.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
) -> None:
    """Predict images of any size: label maps, GeoJSON for QuPath, a table of nuclei, pictures with contours.

    Exit status 1 if an image could not be predicted, which is named; the others are. On several devices:
    accelerate launch --multi_gpu --num_processes 4 -m nucsam.predict ...
    """
    from nucsam.batch import predict_files

    options = {"scale": scale, "mpp": mpp, "tile": tile, "overlap": overlap, "batch": batch, "tta": tta}
    names = [name.strip() for name in formats.split(",") if name.strip()]
    raise typer.Exit(predict_files(model, paths, out, formats=names, device=device, force=force, **options))


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    images: Annotated[int, typer.Option(help="How many.")] = 40,
    size: Annotated[int, typer.Option(help="Side, px.")] = 256,
    seed: Annotated[int, typer.Option(help="Same seed, same images.")] = 0,
) -> None:
    """Write synthetic H&E images with exact labels, in NuInsSeg's layout."""
    from nucsam.synthetic import write_dataset

    write_dataset(out, images=images, size=size, seed=seed)
    print(f"{out}: {images} images of {size} px")


@app.command()
def inspect(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of images and label maps.")],
    layout: Annotated[str, typer.Option(help="auto, nuinsseg or plain.")] = "auto",
    group: Annotated[str, typer.Option(help="Regular expression on the file stem.")] = "",
    sheet: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("contact_sheet.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count images and nuclei per organ, name every bad file, and draw a contact sheet."""
    from rich.console import Console

    from nucsam import data as folder
    from nucsam import draw

    summary = folder.inspect_folder(data, layout=layout, group=group)
    console = Console(stderr=as_json)
    console.print(folder.summary_table(summary))
    for kind, style in (("remarks", "yellow"), ("bad", "red")):
        for text in summary[kind]:
            console.print(text, style=style, markup=False)
    if summary["examples"]:
        tiles = (
            (name, draw.contours(image := folder.read_image(path), folder.read_nuclei(Path(label), image.shape[:2])))
            for name, path, label in summary["examples"]
        )
        draw.contact_sheet(tiles, sheet)
        console.print(f"contact sheet: {sheet}", markup=False)
    if as_json:
        print(json.dumps(summary, indent=2))
    raise typer.Exit(1 if summary["bad"] else 0)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of nucsam train, or an exported adapter.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="safetensors (LoRA merged, head included, for nucsam), mobile-sam (stock MobileSAM's tensors), onnx, "
            "or adapter (LoRA and head alone)."
        ),
    ] = "safetensors",
    base: Annotated[str, typer.Option(help="Base weights of an exported adapter: a path, or auto.")] = "",
    without_head: Annotated[bool, typer.Option("--without-head", help="Of an adapter, LoRA alone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a finished run's model as one file."""
    from rich.console import Console

    from nucsam.export import export

    with Console(stderr=True).status(f"writing {out}"):
        sentence = export(run, out, format=format, base=base, without_head=without_head, force=force)
    print(sentence)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of nucsam train or of nucsam folds.")],
    data: Annotated[str, typer.Option(help="Folder of RUN's images, if it has moved.")] = "",
    figures: Annotated[
        Path | None, typer.Option(help="Folder for every chart and picture as a file, and a contact sheet of the data.")
    ] = None,
) -> None:
    """Write RUN/report.html: a run or a cross-validation as one page that needs no network."""
    from nucsam.report import write

    for path in write(run, root=data, figures=figures):
        print(path)


def configuration(arguments: list[str]) -> tuple[Path, list[str]]:
    """The TOML file and the overrides among positional arguments."""
    files = [text for text in arguments if text.endswith(".toml")]
    if len(files) > 1:
        raise ValueError(f"found {len(files)} configurations ({', '.join(files)}), expected one, and table.key=value")
    overrides = [text for text in arguments if not text.endswith(".toml")]
    if odd := [text for text in overrides if text.startswith("-")]:
        raise ValueError(
            f"no such option: {odd[0]} (--help lists them); a setting is table.key=value, such as train.epochs=10"
        )
    return (Path(files[0]) if files else default_configuration()), overrides


def default_configuration() -> Path:
    """configs/nuinsseg.toml of this installation."""
    import nucsam

    source = Path(nucsam.__file__).parent
    found = [folder / "configs" / "nuinsseg.toml" for folder in (source, source.parent)]
    return next(path for path in found if path.is_file())
