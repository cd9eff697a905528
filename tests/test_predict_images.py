"""`nucsam predict`: files in, files out; runs and exports; several processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tifffile
import torch
from PIL import Image
from test_geojson import drawing, polygon, square
from test_predict import Colour, discs, maps_of, predictor
from test_writers import same_nuclei

import nucsam
from nucsam.claims import folder_of_claims
from nucsam.cli import run_command
from nucsam.data import images
from nucsam.data.geojson import read_shapes
from nucsam.data.images import read_image, read_label
from nucsam.data.labels import median_area
from nucsam.data.rois import Outlines
from nucsam.data.samples import Samples
from nucsam.data.splits import find_split
from nucsam.errors import UserError
from nucsam.export.merged import export_run
from nucsam.files import write_text
from nucsam.predict import images as predict_images
from nucsam.predict import results, writers
from nucsam.predict.devices import half_type, make_accelerator
from nucsam.predict.results import RESULTS
from nucsam.run import checkpoint
from nucsam.run.metadata import known_certainty
from nucsam.score.runs import (
    headline,
    score_images,
    score_run,
    scoring_accelerator,
    scoring_predictor,
    usual_certainty,
)
from nucsam.train import loop
from nucsam.train.loop import fit

# ---- models ----


@pytest.fixture(scope="module", params=["instance", "sam"])
def trained(request, tiny, tmp_path_factory):
    """A run, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    fit(tiny(f"model.head={request.param}", "train.epochs=1"), folder / "run")
    export_run(folder / "run", folder / "nuclei.safetensors")
    return folder / "run", folder / "nuclei.safetensors"


one_head = pytest.mark.parametrize("trained", ["instance"], indirect=True)


def some_image(height=100, width=130, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_export_predicts_as_its_run(trained):
    """Within float error of base + adapter; and not as with another adapter and head."""
    run, exported = nucsam.load(trained[0], device="cpu"), nucsam.load(trained[1], device="cpu")
    maps, same = (next(maps_of(p, [some_image()])) for p in (run, exported))
    assert np.abs(maps - same).max() < 1e-5 * max(1.0, np.abs(maps).max())
    moved, config = checkpoint.open_run(trained[0])[:2]
    for p in (run, exported):
        assert (p.scale, p.instances, p.tile, p.overlap) == (1.0, config.instances, 256, 16)
        assert p.batch == 1 and not p.model.training and p.autocast is None
    with torch.no_grad():
        for parameter in moved.trainable().values():
            parameter.add_(0.05)
    run.model = moved
    assert np.abs(next(maps_of(run, [some_image()])) - same).max() > 1e-4


LOAD = """
import sys, nucsam
heavy = "timm torchvision torch._dynamo torch.distributed.fsdp scipy.ndimage skimage.transform"
nucsam.load(sys.argv[1], device="cpu")
print(set(heavy.split()) & set(sys.modules))
"""


@one_head
def test_load_imports_what_it_needs(trained):
    """So that it takes little longer than the import of torch."""
    command = [sys.executable, "-c", LOAD, str(trained[1])]
    assert subprocess.check_output(command, text=True) == "set()\n"


def test_a_loaded_model_predicts(trained):
    model = nucsam.load(trained[1], device="cpu", tile=64, overlap=8, tta=True)
    label = model.predict(some_image(50, 90))
    assert label.dtype == np.int32 and label.shape == (50, 90)


@one_head
def test_arguments_at_their_limits_and_beyond(trained):
    beyond = [
        ("device", "cpu:1"),
        ("tile", 63),
        ("overlap", 129),
        ("overlap", -1),
        ("overlap", -300),
    ]
    for name, value in [*beyond, ("batch", 0), ("scale", -1.0), ("scale", 0.0)]:
        with pytest.raises(UserError, match=f"^{name}: found"):
            nucsam.load(trained[0], **{"device": "cpu", name: value})
    with pytest.raises(UserError, match=r"^model\.adapt: found 1\.1"):
        nucsam.load(trained[0], device="cpu", adapt=1.1)
    model = nucsam.load(trained[0], device="cpu", tile=64, overlap=32, batch=1, scale=0.5)
    assert (model.tile, model.overlap, model.batch, model.ratio) == (64, 32, 1, 2.0)


@one_head
def test_the_nucleus_area_is_that_of_the_training(trained, tiny, tmp_path):
    run = trained[0]
    areas = [area for area in Samples(trained_on(run)).areas if area]
    options = {"device": "cpu", "auto_scale": True}
    assert nucsam.load(run, **options).nucleus_area == np.median(areas) > 0
    assert nucsam.load(run, device="cpu").nucleus_area == 0
    with pytest.raises(UserError, match=r"^scale, auto_scale: found both"):
        nucsam.load(run, scale=2.0, **options)
    older = tmp_path / "old.safetensors"
    tensors, metadata = checkpoint.read_tensors(trained[1], "merged")
    del metadata["nucleus_area"]
    checkpoint.write_tensors(older, tensors, metadata)
    with pytest.raises(UserError, match=r"^auto_scale: .*old\.safetensors does not say how large"):
        nucsam.load(older, **options)
    fit(tiny("train.epochs=1", "data.nucleus_area=300"), tmp_path / "run")
    metadata = checkpoint.open_run(tmp_path / "run")[3]
    assert metadata["nucleus_area"] == pytest.approx(300, rel=0.06)  # in steps of a crop's side
    assert nucsam.load(tmp_path / "run", device="cpu").nucleus_area == 300
    assert nucsam.load(tmp_path / "run", device="cpu", auto_scale=False).nucleus_area == 0
    assert nucsam.load(tmp_path / "run", device="cpu", scale=2.0).nucleus_area == 0


def test_the_usual_certainty_is_that_of_the_images_that_chose_the_epoch(
    tiny, tmp_path, monkeypatch
):
    """The lower quartile; kept in the run and its export, and used to score the test images."""
    # More, so that these test images fall below it.
    monkeypatch.setattr(loop, "usual_certainty", lambda scored: 0.2 + usual_certainty(scored))
    run, options = tmp_path / "run", {"device": "cpu"}
    scraps = {"foreground": 0.6, "seed_rise": 0.001, "confidence": 0, "area": 0}  # 10 at least
    fit(tiny("train.epochs=1", *(f"instances.{k}={v}" for k, v in scraps.items())), run)
    net, config, _, metadata = checkpoint.open_run(run)
    records, split = find_split(config.data)
    samples, accelerator = Samples(records), scoring_accelerator(metadata)
    results, _ = score_images(net, config, samples, split.inner, accelerator)
    certainties = [image["certainty"] for image in results["images"]]
    expected = 0.2 + np.quantile([c for c in certainties if c], 0.25)
    assert 0.25 < expected < 1
    assert nucsam.load(run, **options).certainty == pytest.approx(expected, abs=1e-6)
    export_run(run, tmp_path / "a.safetensors")
    assert nucsam.load(tmp_path / "a.safetensors", **options).certainty == pytest.approx(expected)
    assert nucsam.load(run, lenient=False, **options).certainty == 0

    score = partial(score_images, net, config, samples, split.test, accelerator)
    scores = json.loads((run / "scores.json").read_text())["headline"]
    assert scores == pytest.approx(headline(score(certainty=expected)))
    assert scores != pytest.approx(headline(score()))
    assert score_run(run)["headline"] == pytest.approx(scores)

    text = (run / "config.toml").read_text()
    write_text(run / "config.toml", text.replace("lenient = true", "lenient = false"))
    assert nucsam.load(run, **options).certainty == 0
    assert nucsam.load(run, lenient=True, **options).certainty > 0


def test_leniency_is_said_beside_the_results(trained, tmp_path):
    older = tmp_path / "sure.safetensors"
    tensors, metadata = checkpoint.read_tensors(trained[1], "merged")
    metadata["selected"]["certainty"] = 0.75
    checkpoint.write_tensors(older, tensors, metadata)
    Image.fromarray(some_image()).save(tmp_path / "a.png")
    command = ["predict", str(older), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert run_command(command) == 0
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["certainty"] == 0.75
    assert run_command([*command, "--no-lenient"]) == 2  # other settings
    assert run_command([*command, "--no-lenient", "--force"]) == 0
    said = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert said.pop("certainty") == 0
    assert said["instances"].keys() == {"foreground", "seed_rise", "confidence", "area"}
    write_text(tmp_path / "out" / "predict.json", json.dumps(said))  # as versions before it wrote
    assert run_command([*command, "--no-lenient"]) == 0
    for wrong in (2, "high"):
        metadata["selected"]["certainty"] = wrong
        checkpoint.write_tensors(older, tensors, metadata)
        with pytest.raises(UserError, match=f"certainty: found {wrong!r}, expected 0 to 1"):
            nucsam.load(older, device="cpu")


def trained_on(run):
    """The records of the images that a run was trained on."""
    records, split = find_split(checkpoint.open_run(run)[1].data)
    return [records[i] for i in split.train]


def test_a_run_is_scored_as_it_predicts(tiny, tmp_path):
    """In the same tiles, too: their size changes what a model finds."""
    fit(tiny("train.epochs=1", "data.nucleus_area=300", "model.adapt=0.5"), tmp_path / "run")
    net, config, _, metadata = checkpoint.open_run(tmp_path / "run")
    known = {"mpp": metadata.get("mpp"), "certainty": known_certainty(config, metadata)}
    scores = scoring_predictor(net, config, "no", **known)
    predicts = nucsam.load(tmp_path / "run", device="cpu")
    document = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert document["tile"] == predicts.tile
    names = ("scale", "instances", "mpp", "nucleus_area", "tile", "overlap", "core", "margin")
    for name in (*names, "batch", "certainty"):
        assert getattr(scores, name) == getattr(predicts, name)
    assert scores.ratio is predicts.ratio is None
    image = np.kron(some_image(20, 40), np.ones((16, 16, 1), np.uint8))
    once = [replace(p, nucleus_area=0.0) for p in (scores, predicts)]
    maps, same = (next(maps_of(p, [image])) for p in once)
    assert len(once[0].grid(image).starts[1]) > 1
    assert np.array_equal(maps, same) and np.ptp(maps[0]) > 1e-5


def test_scoring_folds_a_copy(trained):
    """Merged weights round otherwise, in 16 bits by enough to lose nuclei."""
    net, config = checkpoint.open_run(trained[0])[:2]
    net.train()
    names = list(net.state_dict())
    prepared = make_accelerator("bf16").prepare_model(net)
    scores = scoring_predictor(prepared, config, "bf16")
    x = torch.zeros(1, 3, 64, 64)
    assert scores.autocast == half_type(x.device)
    assert scores.model(x, (64, 64)).dtype == torch.float32 == prepared(x, (64, 64)).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert scores.model(x, (64, 64)).dtype == torch.bfloat16
    assert not any(".lora_" in name for name in scores.model.state_dict())
    assert list(net.state_dict()) == names and net.training and net.trainable()


# ---- files ----


@pytest.fixture
def colour(monkeypatch):
    """`Colour` in place of a trained model, windows of 150 px; the predictors that were loaded."""
    loaded = []

    def load(model, *, device="cpu", scale=None, tta=False, **options):
        loaded.append(predictor(Colour(), tile=128, core=150, margin=40, tta=tta, mpp=0.25))
        return loaded[-1]

    monkeypatch.setattr(predict_images, "load", load)
    return loaded


def predict(*arguments) -> int:
    return run_command(["predict", "model", *map(str, arguments)])


def names(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != RESULTS]
    return sorted(str(p.relative_to(folder)) for p in files)


@pytest.fixture(scope="module")
def anything(tmp_path_factory):
    """Images of all kinds: 16 px, grey, alpha, 16 bits, JPEG, tiles; and four bad ones."""
    out = tmp_path_factory.mktemp("images")
    image, _ = discs(420)
    part = image[:100, :130]
    Image.fromarray(image[:16, :16]).save(out / "tiny.png")
    Image.fromarray(image[:90, :80]).convert("L").save(out / "grey.png")
    Image.fromarray(np.dstack([part, part[..., 0]])).save(out / "alpha.png")
    Image.fromarray(part).save(out / "photo.jpg")
    tifffile.imwrite(out / "deep.tif", part.astype(np.uint16) * 257, photometric="rgb")
    tifffile.imwrite(out / "large.tif", image, tile=(64, 64), compression="zlib", photometric="rgb")
    (out / "cut.png").write_bytes((out / "grey.png").read_bytes()[:300])
    torn = bytearray((out / "large.tif").read_bytes())
    with tifffile.TiffFile(out / "large.tif") as tiff:
        offset = tiff.pages[0].dataoffsets[-1]
    torn[offset : offset + 20] = b"\x07" * 20
    (out / "torn.tif").write_bytes(torn)
    for link, target in (("lost.png", "nowhere.png"), ("loop.png", "loop.png")):
        (out / link).symlink_to(target)
    (out / "notes.txt").write_text("not an image")
    (out / ".hidden.png").write_text("not an image")
    return out


def test_bad_images_leave_the_good_ones(anything, tmp_path, colour, capsys, monkeypatch):
    """One cannot be opened, one is torn in its last tile, and two are links to nothing."""
    monkeypatch.setattr(images, "WHOLE", 50_000)
    out = tmp_path / "out"
    assert predict(anything, "--out", out, "--formats", "labels,geojson,csv,overlay") == 1
    errors = " ".join(capsys.readouterr().err.split())
    for name in ("cut.png", "torn.tif", "lost.png", "loop.png"):
        assert f"{name}: cannot be read" in errors
    assert "6 image(s)" in errors and "4 failed" in errors
    stems = ("alpha", "deep", "grey", "large", "photo", "tiny")
    kinds = ["{}.csv", "{}.geojson", "{}.tif", "overlays/{}.png"]
    expected = [kind.format(stem) for stem in stems for kind in kinds]
    assert names(out) == sorted(["predict.json", *expected])
    nuclei = 0
    for stem in stems:
        image = read_image(next(anything.glob(f"{stem}.*")))
        label = read_label(out / f"{stem}.tif")
        assert same_nuclei(label, colour[0].predict(image)), stem
        assert len((out / f"{stem}.csv").read_text().splitlines()) == label.max() + 1
        nuclei += label.max()
    assert f" {nuclei:,} nuclei, " in errors
    assert read_label(out / "large.tif").max() > 150
    np.testing.assert_array_equal(read_label(out / "deep.tif"), read_label(out / "alpha.tif"))


def test_only_regions_are_predicted(tmp_path, colour):
    """A round region and a small one, without an ignored area: all nuclei of them, few tiles."""
    Image.fromarray(discs(700)[0]).save(tmp_path / "a.png")
    turn = np.linspace(0, 2 * np.pi, 60)
    circle = np.stack([180 + 130 * np.cos(turn), 200 + 130 * np.sin(turn)], 1).tolist()
    shapes = [
        drawing(polygon(circle[:-1]), name="Region*"),
        drawing(polygon(square(560, 40, 60)), name="Region*"),
        drawing(polygon(square(150, 170, 60)), name="Ignore*"),
        drawing(polygon(square(600, 600, 90)), "detection"),
    ]
    (tmp_path / "a.geojson").write_text(json.dumps(shapes))
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert predict(tmp_path / "a.png", "--out", whole) == 0
    assert predict(tmp_path / "a.png", "--out", part, "--roi", tmp_path / "a.geojson") == 0
    label = read_label(whole / "a.tif")
    kept = []
    for value in range(1, label.max() + 1):
        y, x = (axis.mean() // 1 for axis in np.nonzero(label == value))
        inside = np.hypot(x + 0.5 - 180, y + 0.5 - 200) < 130 or (560 <= x < 620 and 40 <= y < 100)
        if inside and not (150 <= x < 210 and 170 <= y < 230):
            kept.append(value)
    assert 60 < len(kept) < label.max() / 4
    assert same_nuclei(read_label(part / "a.tif"), np.where(np.isin(label, kept), label, 0))
    tiles = [p.tiles_done for p in colour]
    assert tiles == [49, 20]


def test_a_first_look_keeps_to_the_regions(tmp_path, colour):
    """Large nuclei outside the regions do not change the magnification."""
    image = discs(600)[0]
    image[:300] = np.kron(image[300:450, :300], np.ones((2, 2, 1), np.uint8))
    Image.fromarray(image).save(tmp_path / "a.png")
    region = drawing(polygon([(0, 300), (600, 300), (600, 600), (0, 600), (0, 300)]))
    (tmp_path / "a.geojson").write_text(json.dumps([region]))
    p = predictor(Colour(), tile=128, core=150, margin=40)
    inside = Outlines(tmp_path / "a.geojson", *read_shapes(tmp_path / "a.geojson")).inside
    lower = p.predict(image[300:])
    p = replace(p, nucleus_area=median_area([lower]))
    assert p.grid(image, area=inside).scale == pytest.approx(1, rel=0.06)
    assert p.grid(image[:300]).scale == pytest.approx(0.5, rel=0.15)


def test_auto_scale_is_said_beside_the_results(tmp_path, trained):
    Image.fromarray(some_image()).save(tmp_path / "a.png")
    command = ["predict", str(trained[0]), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert run_command([*command, "--auto-scale"]) == 0
    said = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert said["nucleus_area"] == nucsam.load(trained[0], auto_scale=True).nucleus_area > 0
    assert run_command([*command]) == 2  # other settings
    del said["nucleus_area"]  # as versions before it wrote
    (tmp_path / "out" / "predict.json").write_text(json.dumps(said))
    assert run_command([*command]) == 0


def test_regions_lie_beside_several_images(tmp_path, colour, capsys):
    """One file for two images, a file for each, and regions of another image."""
    for name in ("a", "b"):
        Image.fromarray(some_image(200, 300)).save(tmp_path / f"{name}.png")
        left = 0 if name == "a" else 5000
        region = drawing(polygon(square(left, 0, 60)))
        (tmp_path / f"{name}.geojson").write_text(json.dumps([region]))
    paths = [
        tmp_path / "a.png",
        tmp_path / "b.png",
        "--out",
        tmp_path / "out",
        "--formats",
        "labels",
        "--roi",
    ]
    assert predict(*paths, tmp_path / "a.geojson") == 2
    assert "roi: " in capsys.readouterr().err
    assert predict(*paths, tmp_path) == 1
    assert "b.png" in (errors := capsys.readouterr().err) and "b.geojson" in errors
    assert names(tmp_path / "out") == ["a.tif", "predict.json"]
    assert predict(tmp_path / "a.png", "--out", tmp_path / "out") == 2  # everywhere: other results
    assert "other regions" in capsys.readouterr().err
    moved = (tmp_path / "a.geojson").rename(tmp_path / "moved.geojson")
    again = [tmp_path / "a.png", *paths[2:]]
    assert predict(*again, moved) == 0 and "1 image(s) with results skip" in capsys.readouterr().err
    moved.write_text(json.dumps([drawing(polygon(square(0, 0, 120)))]))
    assert predict(*again, moved) == 2 and "a.tif: found results of" in capsys.readouterr().err
    assert predict(*again, moved, "--force") == 0


def test_results_are_skipped_or_replaced(anything, tmp_path, colour, capsys):
    paths = [anything / "tiny.png", anything / "grey.png", anything / "tiny.png"]
    labels = ["--out", tmp_path, "--formats", "labels"]
    assert predict(*paths, *labels) == 0
    assert "2 image(s), " in capsys.readouterr().err  # tiny.png counts once
    before = (tmp_path / "tiny.tif").stat().st_mtime_ns
    (tmp_path / "grey.tif").unlink()
    assert predict(*paths, *labels) == 0
    shown = capsys.readouterr().err
    assert "1 image(s) with results skipped" in shown and " 1 tiles in " in shown
    assert (tmp_path / "tiny.tif").stat().st_mtime_ns == before
    assert predict(*paths, "--out", tmp_path, "--formats", "labels,csv") == 0  # one file is missing
    assert names(tmp_path) == ["grey.csv", "grey.tif", "predict.json", "tiny.csv", "tiny.tif"]
    assert predict(*paths, *labels, "--force") == 0
    assert [p.tiles_done for p in colour] == [2, 1, 2, 2]


def test_files_of_somebody_else_are_never_taken_or_replaced(tmp_path, colour, capsys):
    """Beside no predict.json; of a new format; as the regions to predict in."""
    Image.fromarray(some_image(200, 300)).save(tmp_path / "a.png")
    region = json.dumps([drawing(polygon(square(0, 0, 60)))])
    mine = tmp_path / "mine" / "a.geojson"
    mine.parent.mkdir()
    mine.write_text(region)
    paths = [tmp_path / "a.png", "--out", mine.parent, "--formats"]
    for formats in ("geojson", "geojson,csv"):
        assert predict(*paths, formats) == 2
        assert f"{mine}: may be yours" in capsys.readouterr().err
    for formats in ("geojson", "labels"):  # of which the second replaces nothing
        assert predict(*paths, formats, "--roi", mine.parent, "--force") == 2
        assert "roi: " in capsys.readouterr().err
    assert mine.read_text() == region and names(mine.parent) == ["a.geojson"]
    link = tmp_path / "linked" / "a.geojson"
    link.parent.mkdir()
    link.symlink_to(mine)
    assert predict(*paths[:1], "--out", link.parent, "--roi", link, "--force") == 2
    assert link.is_symlink()
    assert predict(*paths, "geojson", "--force") == 0 and mine.read_text() != region
    notes = mine.with_name("a.csv")
    notes.write_text("my notes")
    assert predict(*paths, "geojson,csv") == 2
    assert f"{notes}: may be yours" in capsys.readouterr().err and notes.read_text() == "my notes"
    (mine.parent / "predict.json").unlink()  # nobody knows any more with which settings
    assert predict(*paths, "geojson") == 2 and predict(*paths, "geojson", "--force") == 0


def test_force_removes_no_file_of_somebody_else_beside_a_changed_image(tmp_path, colour, capsys):
    image, out = tmp_path / "a.png", tmp_path / "out"
    formats = ["--out", out, "--formats"]
    Image.fromarray(some_image(200, 300)).save(image)
    assert predict(image, *formats, "labels,csv") == 0
    Image.fromarray(some_image(300, 200)).save(image)
    mine = {out / "a.geojson": "{}", out / "a.csv": "my notes"}
    for path, text in mine.items():
        path.write_text(text)
    assert predict(image, *formats, "labels", "--force") == 2
    shown = capsys.readouterr().err.replace("\n", "")
    assert all(str(path) in shown and path.read_text() == text for path, text in mine.items())
    for path in mine:
        path.unlink()
    assert predict(image, *formats, "labels", "--force") == 0


def test_results_are_not_replaced_once_somebody_has_edited_them(tmp_path, colour, capsys):
    for name in ("a", "b"):
        Image.fromarray(some_image(200, 300)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    images, formats = [tmp_path / "a.png", tmp_path / "b.png"], ["--out", out, "--formats"]
    assert predict(*images, *formats, "geojson,tissue") == 0
    edited = [out / "a.geojson", out / "b.tissue.geojson"]
    before = [path.read_text() for path in edited]
    for path in edited:
        path.write_text("[]")
    assert predict(*images, *formats, "geojson,tissue") == 0  # it replaces nothing
    assert predict(*images, *formats, "geojson,tissue,csv") == 2
    shown = capsys.readouterr().err
    assert all(f"{path}: has been edited" in shown for path in edited)
    assert all(path.read_text() == "[]" for path in edited) and not (out / "a.csv").exists()
    edited[0].write_text(before[0])
    assert predict(images[0], *formats, "geojson,tissue,csv") == 0
    with (out / RESULTS).open("a") as log:
        log.write('\n{"b.geo')  # a process was killed
    assert predict(images[1], *formats, "geojson,tissue,csv", "--force") == 0
    assert [path.read_text() for path in edited] == before
    assert predict(*images, *formats, "labels,geojson,tissue,csv") == 0
    (out / RESULTS).unlink()  # as versions left their folders that noted no checksums
    edited[0].write_text("[]")
    for name in ("a.csv", "b.csv"):
        (out / name).unlink()
    assert predict(*images, *formats, "labels,geojson,tissue,csv") == 1
    assert f"{edited[0]}: is not what nucsam had written" in capsys.readouterr().err
    assert not (out / RESULTS).exists() and edited[0].read_text() == "[]"
    assert (out / "b.csv").exists() and not (out / "a.csv").exists()


@pytest.mark.parametrize("line", ["[1]", "null", '{"a.tif": ["b"]}', "[" * 200_000, "\0"])
def test_a_damaged_note_of_results_hides_no_other(tmp_path, colour, line):
    Image.fromarray(some_image(64, 64)).save(tmp_path / "a.png")
    command = [tmp_path / "a.png", "--out", tmp_path / "out", "--formats"]
    assert predict(*command, "labels") == 0
    with (tmp_path / "out" / RESULTS).open("a") as log:
        log.write(f"\n{line}")
    assert predict(*command, "labels,csv") == 0


def test_what_appears_or_changes_while_images_are_predicted_is_kept(tmp_path, colour, monkeypatch):
    """An edit, a drawing, a link to nothing, and the results of another image of the same name."""
    for name in "abcd":
        Image.fromarray(some_image(64, 64)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    images = [tmp_path / f"{name}.png" for name in "abcd"]
    assert predict(images[0], "--out", out, "--formats", "geojson") == 0
    run = predict_images.Batch.run

    def meanwhile(batch):
        monkeypatch.setattr(predict_images.Batch, "run", run)
        (out / "a.geojson").write_text("my edit")
        (out / "b.geojson").write_text("my drawing")
        (out / "c.geojson").symlink_to("nowhere")
        (tmp_path / "other").mkdir()
        Image.fromarray(discs(90)[0]).save(tmp_path / "other" / "d.png")
        assert predict(tmp_path / "other", "--out", out, "--formats", "geojson,csv") == 0
        return run(batch)

    monkeypatch.setattr(predict_images.Batch, "run", meanwhile)
    assert predict(*images, "--out", out, "--formats", "geojson,labels") == 1
    assert (out / "a.geojson").read_text() == "my edit"
    assert (out / "b.geojson").read_text() == "my drawing"
    assert (out / "c.geojson").is_symlink()
    rows = (out / "d.csv").read_text().splitlines()[1:]
    assert len(json.loads((out / "d.geojson").read_text())["features"]) == len(rows) > 0
    assert names(out) == ["a.geojson", "b.geojson", "d.csv", "d.geojson", "predict.json"]


def test_force_replaces_results_of_other_settings_with_their_tissue(tmp_path, colour):
    Image.fromarray(some_image()).save(tmp_path / "a.png")
    command = [tmp_path / "a.png", "--out", tmp_path / "out", "--formats", "geojson,tissue"]
    assert predict(*command) == 0
    assert predict(*command, "--tta") == 2
    assert predict(*command, "--tta", "--force") == 0
    assert names(tmp_path / "out") == ["a.geojson", "a.tissue.geojson", "predict.json"]


def test_label_maps_beside_their_images_are_no_images(tmp_path, colour, capsys):
    for name in ("a", "a_mask", "b", "b-labels", "c_mask"):
        Image.fromarray(some_image(64, 64)).save(tmp_path / f"{name}.png")
    labels = ["--out", tmp_path / "out", "--formats", "labels"]
    assert predict(tmp_path, *labels) == 0
    assert "a_mask.png: found 2 label map(s)" in " ".join(capsys.readouterr().err.split())
    assert names(tmp_path / "out") == ["a.tif", "b.tif", "c_mask.tif", "predict.json"]
    assert predict(tmp_path, tmp_path / "a_mask.png", *labels) == 0
    assert (tmp_path / "out" / "a_mask.tif").is_file()


def test_regions_without_an_area_fail_their_image_alone(tmp_path, colour, capsys):
    point = drawing({"type": "Point", "coordinates": [3, 3]})
    detection = drawing(polygon(square(0, 0, 20))) | {"properties": {"objectType": "detection"}}
    area = drawing(polygon(square(0, 0, 60)))
    for name, drawn in {"a": [], "b": [point], "c": [detection], "d": [area]}.items():
        Image.fromarray(some_image(64, 64)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.geojson").write_text(json.dumps(drawn))
    assert predict(tmp_path, "--out", tmp_path / "out", "--roi", tmp_path) == 1
    shown = " ".join(capsys.readouterr().err.split())
    for name, found in {"a": "nothing", "b": "1 Point", "c": "1 detection"}.items():
        assert f"{name}.geojson: found {found} and no annotation, expected one to" in shown
    assert "1 image(s)" in shown and (tmp_path / "out" / "d.tif").is_file()


def test_results_of_another_image_of_the_same_name_are_not_taken(tmp_path, colour, capsys):
    for folder, side in (("fa", 200), ("fb", 210)):
        (tmp_path / folder).mkdir()
        Image.fromarray(discs(side)[0]).save(tmp_path / folder / "x.png")
    labels = ["--out", tmp_path / "out", "--formats", "overlay,labels"]
    assert predict(tmp_path / "fa", *labels) == 0
    assert f"{tmp_path / 'out'}: 1 image(s)" in capsys.readouterr().err.replace("\n", "")
    (tmp_path / "fa").rename(tmp_path / "moved")
    assert predict(tmp_path / "moved", *labels) == 0
    assert predict(tmp_path / "fb", *labels) == 2
    assert "found results of another image" in capsys.readouterr().err
    assert predict(tmp_path / "fb", *labels[:2], "--formats", "csv") == 2  # of another format
    assert predict(tmp_path / "fb", *labels[:2], "--formats", "geojson,labels", "--force") == 0
    assert "QuPath: open an image" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["predict.json", "x.geojson", "x.tif"]  # no overlay of fa
    assert tifffile.imread(tmp_path / "out" / "x.tif").shape == (210, 210)


def test_a_change_anywhere_in_an_image_is_noticed(tmp_path, colour, capsys):
    """Of the same size, in an uncompressed file."""
    image, _ = discs(420)
    for rows in (slice(0, 20), slice(200, 220), slice(400, 420)):
        tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
        out = tmp_path / f"out{rows.start}"
        assert predict(tmp_path / "a.tif", "--out", out, "--formats", "labels") == 0
        changed = image.copy()
        changed[rows] = 255 - changed[rows]
        tifffile.imwrite(tmp_path / "a.tif", changed, photometric="rgb")
        assert predict(tmp_path / "a.tif", "--out", out, "--formats", "labels") == 2
        assert "found results of another image" in capsys.readouterr().err


def test_single_processes_side_by_side_keep_each_others_images(tmp_path, monkeypatch):
    """A slow record of many."""
    read = results.read_json

    def slowly(*arguments):
        document = read(*arguments)
        time.sleep(0.01)
        return document

    monkeypatch.setattr(results, "read_json", slowly)
    paths = [tmp_path / f"{k}.png" for k in range(12)]
    out = tmp_path / "out"
    for path in paths:
        Image.fromarray(some_image(20, 20)).save(path)

    def run(path):
        return predict_images.predict_files("model", [path], out, formats=["csv"])

    loaded = predictor(Colour(), tile=128, core=150, margin=40, mpp=0.25)
    monkeypatch.setattr(predict_images, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(predict_images.Batch, "run", lambda self: 0)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, paths)) == [0] * 12
    inputs = json.loads((out / "predict.json").read_text())["inputs"]
    assert inputs.keys() == {path.stem for path in paths} and names(out) == ["predict.json"]


@pytest.mark.parametrize("mpp", ["nan", "inf", "250", "0", "-1"])
def test_microns_per_px_of_no_microscope_are_refused(tmp_path, colour, capsys, mpp):
    Image.fromarray(some_image()).save(tmp_path / "a.png")
    assert predict(tmp_path / "a.png", "--out", tmp_path / "out", f"--mpp={mpp}") == 2
    assert "mpp: found" in capsys.readouterr().err
    with pytest.raises(UserError, match="mpp: found"):
        predictor(Colour()).predict(some_image(), mpp=float(mpp))


def test_regions_are_found_whatever_the_unicode_form_of_their_name(tmp_path, colour):
    name = unicodedata.normalize("NFD", "Köln é")
    Image.fromarray(some_image(200, 300)).save(tmp_path / f"{name}.png")
    (tmp_path / "roi").mkdir()
    region = drawing(polygon(square(0, 0, 60)))
    (tmp_path / "roi" / f"{name}.geojson").write_text(json.dumps([region]))
    arguments = [tmp_path / f"{name}.png", "--out", tmp_path / "out", "--roi", tmp_path / "roi"]
    assert predict(*arguments) == 0


def test_a_parquet_file_lies_in_a_folder_with_a_colon(tmp_path, colour, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(discs(200)[0]).save("a.png")
    assert predict("a.png", "--out", "kidney:20x", "--formats", "parquet,csv") == 0
    table = pyarrow.parquet.read_table((tmp_path / "kidney:20x" / "a.parquet").open("rb"))
    assert len(table) == len(Path("kidney:20x/a.csv").read_text().splitlines()) - 1 > 0


def test_paths_may_be_text(tmp_path, colour):
    Image.fromarray(discs(200)[0]).save(tmp_path / "a.png")
    for k, paths in enumerate((str(tmp_path), [str(tmp_path / "a.png")], tmp_path / "a.png")):
        out = f"{tmp_path}/out{k}"
        assert predict_images.predict_files("model", paths, out, formats=["labels"]) == 0
        assert names(Path(out)) == ["a.tif", "predict.json"]


@one_head
def test_a_scale_that_no_image_can_have_writes_nothing(trained, tmp_path):
    Image.fromarray(some_image()).save(tmp_path / "a.png")
    for scale in (0.05, 100.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="scale"):
            predict_images.predict_files(trained[1], tmp_path, tmp_path / "out", scale=scale)
    with pytest.raises(UserError, match="batch"):
        nucsam.load(trained[1], device="cpu", batch=2.5)
    assert not (tmp_path / "out").exists()


def test_settings_without_results_hold_nobody(tmp_path, colour):
    broken = tmp_path / "a.png"
    broken.write_bytes(b"no image")
    labels = ["--out", tmp_path / "out", "--formats", "labels"]
    assert predict(broken, *labels) == 1
    Image.fromarray(some_image()).save(broken)
    assert predict(broken, *labels, "--tta") == 0


def test_results_of_other_settings_are_not_mixed(anything, tmp_path, colour, capsys):
    tiny, grey, out = anything / "tiny.png", anything / "grey.png", tmp_path / "out"
    labels = ["--out", out, "--formats", "labels"]
    tta = lambda: json.loads((out / "predict.json").read_text())["tta"]  # noqa: E731
    assert predict(tiny, grey, *labels) == 0
    before = (out / "grey.tif").read_bytes()
    for options in (["--tta"], ["--mpp", "0.3"]):
        assert predict(tiny, *labels, *options) == 2
        assert "predict.json" in capsys.readouterr().err
    assert predict(tiny, *labels, "--tta", "--force") == 2  # grey.tif would stay
    assert "grey.tif" in capsys.readouterr().err
    assert (out / "grey.tif").read_bytes() == before and tta() is False
    assert predict(tiny, *labels, "--force") == 0  # the same settings
    broken = tmp_path / "grey.png"
    broken.write_bytes(grey.read_bytes()[:300])
    assert predict(tiny, broken, *labels, "--tta", "--force") == 1
    assert names(out) == ["predict.json", "tiny.tif"] and tta() is True


@pytest.mark.parametrize(
    "arguments, problems",
    [
        (["{in}/notes.txt", "{in}/gone"], ["notes.txt: ", "gone: "]),
        (["{in}", "--formats", ""], ["formats: found none"]),
    ],
)
def test_every_mistake_is_named_before_anything_is_loaded_or_written(
    anything, tmp_path, colour, capsys, arguments, problems
):
    arguments = [argument.format(**{"in": anything}) for argument in arguments]
    assert predict(*arguments, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert all(problem in printed for problem in problems)
    assert not (tmp_path / "out").exists() and not colour


def test_images_are_never_overwritten(tmp_path, colour, capsys):
    (tmp_path / "overlays").mkdir()
    for name in ("a.tif", "b.png", "overlays/c.png"):
        file = tmp_path / name
        Image.fromarray(some_image()).save(file)
        before = names(tmp_path)
        assert predict(file, "--out", tmp_path, "--formats", "overlay,labels", "--force") == 2
        assert f"{file.name}: " in capsys.readouterr().err
        assert names(tmp_path) == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.tif").symlink_to(tmp_path / "a.tif")
    assert predict(tmp_path / "link", "--out", tmp_path) == 2
    assert predict(tmp_path / "b.png", "--out", tmp_path / "a.tif") == 2


@pytest.mark.parametrize(
    "given, tagged, seen",
    [(None, 0.5, (4, 128)), (0.125, 0.5, (1, 64)), (None, None, (1, 128)), (None, 0.25, (1, 128))],
)
def test_microns_per_px_of_tags_or_arguments(tmp_path, colour, capsys, given, tagged, seen):
    """Twice those of the training: twice the model px, in tiles of half the image px."""
    tags = {"resolutionunit": "CENTIMETER", "resolution": (1e4 / tagged,) * 2} if tagged else {}
    tifffile.imwrite(tmp_path / "a.tif", discs(100)[0], photometric="rgb", **tags)
    options = ["--mpp", given] if given else []
    assert predict(tmp_path / "a.tif", "--out", tmp_path / "out", "--formats", "csv", *options) == 0
    assert (colour[0].tiles_done, colour[0].model.seen[0][2]) == seen
    header = (tmp_path / "out" / "a.csv").read_text().splitlines()[0]
    assert ("area_um2" in header) == bool(tagged)
    assert ("a.tif has no microns per px" in capsys.readouterr().err) == (not tagged)


# ---- processes ----


def batch(images, out, **options):
    files = {path: {"labels": out / f"{path.stem}.tif"} for path in images}
    small = predictor(Colour(), tile=128, core=150, margin=40)
    return predict_images.Batch(small, files, out, claims=out / ".claims", **options)


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Three small images, and a folder of results with claims; all processes are of one launch."""
    monkeypatch.setattr(predict_images, "launch_time", lambda: 100.0)
    (tmp_path / "out" / ".claims").mkdir(parents=True)
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(some_image(40, 40)).save(path)
    return paths, tmp_path / "out"


def test_an_image_that_another_process_holds_is_left_to_it(shared, monkeypatch):
    (a, b, c), out = shared
    other = batch([a, b, c], out)
    taken = other._take()
    assert next(taken) == a

    def finish(_):  # in place of waiting
        other._end(a, nuclei=7, tiles=1)

    monkeypatch.setattr(predict_images.time, "sleep", finish)
    this = batch([a, b, c], out)
    with folder_of_claims(out / ".claims"):
        this.run()
        assert list(taken) == []
    assert this.outcomes[a]["nuclei"] == 7
    assert {path.name for path in out.iterdir()} == {"b.tif", "c.tif"}


@pytest.mark.parametrize("force", [False, True])
def test_what_another_process_has_ended_is_not_predicted_again(shared, force):
    (a, *_), out = shared
    other = batch([a], out, force=force)
    assert next(other._take()) == a
    other._end(a, failed="a.png: torn")
    assert batch([a], out, force=force).outcomes[a]["failed"] == "a.png: torn"


def test_outcomes_of_earlier_launches_do_not_count(shared):
    (a, *_), out = shared
    (out / ".claims" / "a.png").write_text(json.dumps({"ended": 1.0, "failed": "torn"}))
    assert batch([a], out).run() == 0
    assert (out / "a.tif").is_file()


def start(*arguments, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


fork = multiprocessing.get_context("fork")  # a child has everything imported already


def start_stuck(*arguments, **environment):
    """`nucsam predict` in a process that stays where it adds the nuclei of its first window."""
    stuck = fork.Event()

    def stay(*_):
        stuck.set()
        while True:
            time.sleep(0.01)

    def predict():
        os.environ |= environment
        writers.LabelBlocks.add = stay
        sys.exit(run_command(["predict", *map(str, arguments)]))

    process = fork.Process(target=predict)
    process.start()
    assert stuck.wait(120)
    return process


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Six images: a bad one, three of one window, two of two windows."""
    out = tmp_path_factory.mktemp("slides")
    for k in range(3):
        Image.fromarray(some_image(seed=k)).save(out / f"a{k}.png")
    (out / "bad.png").write_bytes(b"not a picture")
    for k in range(2):
        slide = np.tile(some_image(110, 100, k), (10, 3, 1))
        tifffile.imwrite(out / f"z{k}.tif", slide, tile=(256, 256), photometric="rgb")
    return out


@one_head
def test_results_do_not_depend_on_the_processes(trained, slides, tmp_path, capsys):
    arguments = [trained[1], slides, "--formats", "labels,geojson", "--device", "cpu", "--out"]
    assert run_command(["predict", *map(str, arguments), str(tmp_path / "1")]) == 1
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"
    two = start(*torchrun, "nucsam.predict", *arguments, tmp_path / "2", cwd=tmp_path)
    errors = [capsys.readouterr().err, two.communicate(timeout=300)[1]]
    assert two.returncode == 1, errors[1]
    summaries = []
    for text in errors:
        assert text.count("bad.png: cannot be read") == 1
        lines = [line.split(": ")[1] for line in text.splitlines() if " tiles in " in line]
        summaries += [line.split(" in ")[0] for line in lines]
        assert text.count("; 1 failed") == 1
    assert summaries[0].startswith("5 image(s), ") and summaries[0] == summaries[1]
    stems = ("a0", "a1", "a2", "z0", "z1")
    kinds = [f"{stem}.{suffix}" for stem in stems for suffix in ("geojson", "tif")]
    for out in (tmp_path / "1", tmp_path / "2"):
        assert names(out) == sorted([*kinds, "predict.json"])
        assert [path.name for path in out.rglob(".*")] == [RESULTS]
    for name in kinds:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@one_head
def test_another_process_takes_the_images_of_a_dead_one(
    trained, slides, tmp_path, capsys, monkeypatch
):
    """The first process ends its wait for the second by killing it."""
    out, images = tmp_path / "out", (slides / "z0.tif", slides / "z1.tif")
    arguments = [trained[1], *images, "--out", out, "--formats", "csv", "--device", "cpu"]
    second = start_stuck(*arguments, RANK="1", WORLD_SIZE="2")
    killed = []

    def kill(_):
        second.kill()
        second.join()
        killed.append(second.exitcode)

    monkeypatch.setattr(predict_images.time, "sleep", kill)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(["predict", *map(str, arguments)]) == 0
    assert killed == [-signal.SIGKILL]
    assert "2 image(s), " in capsys.readouterr().err
    assert {"z0.csv", "z1.csv"} <= {path.name for path in out.iterdir()}
    assert not (out / ".claims").exists()


@one_head
def test_sigterm_leaves_no_part_of_a_file(trained, slides, tmp_path):
    out = tmp_path / "out"
    process = start_stuck(trained[1], slides / "z0.tif", "--out", out, "--formats", "labels,csv")
    assert list(out.glob(".z0.csv.*.partial"))
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 128 + signal.SIGTERM
    assert names(out) == ["predict.json"]
