"""`nucsam predict`: files in, files out; runs and exports; several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_outputs import same_nuclei
from test_predict import Colour, discs, predictor

import nucsam
from nucsam import batch, checkpoint, images
from nucsam.cli import run as run_command
from nucsam.export import export
from nucsam.images import read_image, read_label
from nucsam.train import train


@pytest.fixture(scope="module", params=["instance", "sam"])
def trained(request, tiny, tmp_path_factory):
    """A run, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    train(tiny(f"model.head={request.param}", "train.epochs=1"), folder / "run")
    export(folder / "run", folder / "nuclei.safetensors")
    return folder / "run", folder / "nuclei.safetensors"


def some_image(height=100, width=130, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- models ----


def test_an_export_predicts_as_its_run(trained):
    """Within float error of base + adapter; and not as with another adapter and head."""
    run, exported = trained
    one, other = nucsam.load(run, device="cpu"), nucsam.load(exported, device="cpu")
    maps, same = (next(p.maps([some_image()])) for p in (one, other))
    assert np.abs(maps - same).max() < 1e-5 * max(1.0, np.abs(maps).max())
    moved, config = checkpoint.open_run(run)[:2]
    with torch.no_grad():
        for parameter in moved.trainable().values():
            parameter.add_(0.05)
    kept, one.model = one.model, moved
    assert np.abs(next(one.maps([some_image()])) - same).max() > 1e-3
    one.model = kept
    for p in (one, other):
        assert (p.scale, p.instances, p.tile, p.overlap, p.batch) == (1.0, config.instances, 256, 8, 1)
        assert not p.model.training and p.autocast is None


def test_a_loaded_model_predicts(trained):
    label = nucsam.load(trained[1], device="cpu", tile=64, overlap=8, tta=True).predict(some_image(50, 90))
    assert label.dtype == np.int32 and label.shape == (50, 90)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"device": "gpu"}, "--device: found 'gpu', expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, r"--device: found 'cuda:99', but PyTorch sees \d+ GPU\(s\), so no cuda:99"),
        ({"device": "cpu:1"}, "--device: found 'cpu:1'"),
        ({"tile": 10}, "--tile: found 10, expected at least 64 px"),
        ({"tile": 100, "overlap": 51}, "--overlap: found 51, expected 0 to half a tile, 50 px"),
        ({"batch": 0}, "--batch: found 0, expected at least 1"),
        ({"scale": -1.0}, "--scale: found -1, expected a positive number"),
    ],
)
def test_options_out_of_range(trained, options, says):
    with pytest.raises(ValueError, match=says):
        nucsam.load(trained[0], **{"device": "cpu", **options})


def test_what_is_no_model(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pt").write_bytes(b"")
    for path, says in [
        (tmp_path / "gone", "gone: no such file, expected a run directory or a safetensors file of nucsam export"),
        (tmp_path / "empty", "found no config.toml, expected a run directory"),
        (tmp_path / "a.pt", "found a .pt file, expected .safetensors or a run directory"),
        (trained[0] / "adapter.safetensors", "found a file of kind 'adapter', expected 'merged'"),
        (trained[0] / "base.safetensors", "found a file of kind 'base', expected 'merged'"),
    ]:
        with pytest.raises(ValueError, match=says):
            nucsam.load(path, device="cpu")


# ---- files ----


@pytest.fixture
def colour(monkeypatch):
    """`nucsam predict` with `Colour` in place of a trained model, windows of 150 px; the predictors that were made."""
    made = []

    def load(model, *, device="cpu", scale=None, tta=False, **options):
        made.append(predictor(Colour(), tile=128, core=150, margin=40, tta=tta, mpp=0.25))
        return made[-1]

    monkeypatch.setattr(batch, "load", load)
    return made


def predict(*arguments) -> int:
    return run_command(["predict", "model", *map(str, arguments)])


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def anything(tmp_path_factory):
    """Images of all kinds: 16 px, grey, alpha, 16 bits, JPEG, tiles; and two bad ones."""
    out = tmp_path_factory.mktemp("images")
    image, _ = discs(420)
    Image.fromarray(image[:16, :16]).save(out / "tiny.png")
    Image.fromarray(image[:90, :80]).convert("L").save(out / "grey.png")
    Image.fromarray(np.dstack([image[:100, :130], image[:100, :130, 0]])).save(out / "alpha.png")
    Image.fromarray(image[:100, :130]).save(out / "photo.jpg")
    tifffile.imwrite(out / "deep.tif", image[:100, :130].astype(np.uint16) * 257, photometric="rgb")
    tifffile.imwrite(out / "large.tif", image, tile=(64, 64), compression="zlib", photometric="rgb")
    (out / "cut.png").write_bytes((out / "grey.png").read_bytes()[:300])
    torn = bytearray((out / "large.tif").read_bytes())
    with tifffile.TiffFile(out / "large.tif") as tiff:
        offset = tiff.pages[0].dataoffsets[-1]
    torn[offset : offset + 20] = b"\x07" * 20
    (out / "torn.tif").write_bytes(torn)
    (out / "notes.txt").write_text("not an image")
    (out / ".hidden.png").write_text("not an image")
    return out


GOOD = ("alpha", "deep", "grey", "large", "photo", "tiny")


def test_a_folder_of_anything(anything, tmp_path, colour, capsys, monkeypatch):
    """Good images come out, whatever the bad ones are: one that cannot be opened, one that is torn in its last tile."""
    monkeypatch.setattr(images, "WHOLE", 50_000)
    out = tmp_path / "out"
    assert predict(anything, "--out", out, "--formats", "labels,geojson,csv,overlay") == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert "cut.png: cannot be read" in errors and "torn.tif: cannot be read" in errors
    assert "6 image(s)" in errors and "2 failed" in errors
    kinds = ["{}.csv", "{}.geojson", "{}.tif", "overlays/{}.png"]
    assert names(out) == sorted(["predict.json", *(kind.format(stem) for stem in GOOD for kind in kinds)])
    for stem in GOOD:
        image = read_image(next(anything.glob(f"{stem}.*")))
        label = read_label(out / f"{stem}.tif")
        assert same_nuclei(label, colour[0].predict(image)), stem
        assert len((out / f"{stem}.csv").read_text().splitlines()) == label.max() + 1
    assert read_label(out / "large.tif").max() > 150
    np.testing.assert_array_equal(read_label(out / "deep.tif"), read_label(out / "alpha.tif"))


def test_results_are_skipped_or_replaced(anything, tmp_path, colour, capsys):
    paths = [anything / "tiny.png", anything / "grey.png"]
    assert predict(*paths, "--out", tmp_path) == 0
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in ("tiny.tif", "grey.tif")}
    (tmp_path / "grey.tif").unlink()
    capsys.readouterr()
    assert predict(*paths, "--out", tmp_path) == 0
    assert "1 image(s) with results skipped; --force replaces them" in capsys.readouterr().err
    assert (tmp_path / "tiny.tif").stat().st_mtime_ns == before["tiny.tif"]
    assert colour[1].tiles_done == 1
    assert predict(*paths, "--out", tmp_path, "--formats", "labels,csv") == 0  # a file of each is missing
    assert names(tmp_path) == ["grey.csv", "grey.tif", "predict.json", "tiny.csv", "tiny.tif"]
    assert predict(*paths, "--out", tmp_path, "--force") == 0
    assert [p.tiles_done for p in colour] == [2, 1, 2, 2]


def test_results_of_another_model_are_not_mixed(anything, tmp_path, colour, capsys):
    image = anything / "tiny.png"
    assert predict(image, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "predict.json").read_text())["tta"] is False
    for options in (["--tta"], ["--mpp", "0.3"]):
        assert predict(image, "--out", tmp_path, *options) == 2
        assert "predict.json: made otherwise than now wanted: " in capsys.readouterr().err
    assert predict(image, "--out", tmp_path, "--tta", "--force") == 0
    assert json.loads((tmp_path / "predict.json").read_text())["tta"] is True


def test_force_with_another_model_leaves_no_result_of_the_one_before(anything, tmp_path, colour, capsys):
    tiny, grey = anything / "tiny.png", anything / "grey.png"
    assert predict(tiny, grey, "--out", tmp_path) == 0
    before = (tmp_path / "grey.tif").read_bytes()
    assert predict(tiny, "--out", tmp_path, "--tta", "--force") == 2
    assert "1 result(s) that --force would leave as they are, such as" in capsys.readouterr().err
    assert (tmp_path / "grey.tif").read_bytes() == before
    assert json.loads((tmp_path / "predict.json").read_text())["tta"] is False
    assert predict(tiny, "--out", tmp_path, "--force") == 0  # the same settings: those of others may stay
    broken = tmp_path / "grey.png"
    broken.write_bytes(grey.read_bytes()[:300])
    out = tmp_path / "out"
    assert predict(tiny, grey, "--out", out) == 0
    assert predict(tiny, broken, "--out", out, "--tta", "--force") == 1
    assert names(out) == ["predict.json", "tiny.tif"]  # none of grey made otherwise


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["{in}/gone.png"], "gone.png: no such file or folder"),
        (["{in}/notes.txt", "{in}/gone"], "notes.txt: found .txt suffix, expected .png"),
        (["{empty}"], "found no image, expected .png"),
        (["{in}/tiny.png", "{other}/tiny.bmp"], "tiny.bmp: found the stem of "),
        (["{in}", "--formats", "labels,xml"], "--formats: found ['xml'], expected labels, geojson, csv, overlay"),
        (["{in}", "--formats", ""], "--formats: found none"),
        (["{in}", "--scale", "1", "--mpp", "0.2"], "--scale, --mpp: found both, expected one"),
        (["{in}", "--mpp", "0"], "--mpp: found 0, expected a positive number"),
    ],
)
def test_a_mistake_on_the_command_line_does_nothing(anything, tmp_path, colour, capsys, arguments, says):
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    Image.fromarray(some_image()).save(tmp_path / "other" / "tiny.bmp")
    places = {"in": anything, "empty": tmp_path / "empty", "other": tmp_path / "other"}
    assert predict(*(a.format(**places) for a in arguments), "--out", tmp_path / "out") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not colour


def test_images_are_never_overwritten(anything, tmp_path, colour, capsys):
    tifffile.imwrite(tmp_path / "a.tif", some_image(), photometric="rgb")
    before = (tmp_path / "a.tif").read_bytes()
    assert predict(tmp_path / "a.tif", "--out", tmp_path, "--force") == 2
    assert "a.tif: would be overwritten by its own results; expected another --out" in capsys.readouterr().err
    assert (tmp_path / "a.tif").read_bytes() == before and names(tmp_path) == ["a.tif"]
    Image.fromarray(some_image()).save(tmp_path / "b.png")
    assert predict(tmp_path / "b.png", "--out", tmp_path) == 2
    assert "a folder of images to predict, expected another" in capsys.readouterr().err
    assert names(tmp_path) == ["a.tif", "b.png"]


def test_an_image_given_twice_is_one(anything, tmp_path, colour):
    assert predict(anything / "tiny.png", anything / "tiny.png", "--out", tmp_path) == 0
    assert colour[0].tiles_done == 1


@pytest.mark.parametrize(
    "given, tagged, seen",
    [(None, 0.5, (4, 128)), (0.125, 0.5, (1, 64)), (None, None, (1, 128)), (None, 0.25, (1, 128))],
)
def test_microns_per_px_of_tags_or_of_the_command_line(tmp_path, colour, capsys, given, tagged, seen):
    """Twice the microns per px of the training: twice the model px, in tiles of half the image px; µm in the table."""
    known = {"resolution": (1e4 / tagged, 1e4 / tagged), "resolutionunit": "CENTIMETER"} if tagged else {}
    tifffile.imwrite(tmp_path / "a.tif", discs(100)[0], photometric="rgb", **known)
    options = ["--mpp", given] if given else []
    assert predict(tmp_path / "a.tif", "--out", tmp_path / "out", "--formats", "csv", *options) == 0
    assert (colour[0].tiles_done, colour[0].model.seen[0][2]) == seen
    header = (tmp_path / "out" / "a.csv").read_text().splitlines()[0]
    assert ("area_um2" in header) == bool(tagged)
    assert ("has no microns per px" in capsys.readouterr().err) == (not tagged)


# ---- processes ----


def start(processes, *arguments, cwd):
    """`torchrun` on CPU processes; one process is a plain command."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] * (processes > 1)
    return subprocess.Popen(
        [sys.executable, *command, "-m", "nucsam.predict", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Five images: four of one window, of which one is bad, and one of two windows."""
    out = tmp_path_factory.mktemp("slides")
    for k in range(3):
        Image.fromarray(some_image(seed=k)).save(out / f"a{k}.png")
    (out / "bad.png").write_bytes(b"not a picture")
    tifffile.imwrite(out / "z.tif", np.tile(some_image(110, 100), (10, 3, 1)), tile=(256, 256), photometric="rgb")
    return out


@pytest.mark.parametrize("trained", ["instance"], indirect=True)
def test_two_processes_do_what_one_does(trained, slides, tmp_path, capsys):
    """They deal out four images and share the windows of the fifth; nothing else is left behind."""
    arguments = [str(slides), "--formats", "labels,geojson", "--device", "cpu"]
    assert run_command(["predict", str(trained[1]), *arguments, "--out", str(tmp_path / "1")]) == 1
    errors = [capsys.readouterr().err]
    two = start(2, trained[1], *arguments, "--out", tmp_path / "2", cwd=tmp_path)
    errors.append(two.communicate(timeout=300)[1])
    assert two.returncode == 1, errors[1]
    kinds = [f"{stem}.{suffix}" for stem, suffix in product(("a0", "a1", "a2", "z"), ("geojson", "tif"))]
    for text, out in zip(errors, (tmp_path / "1", tmp_path / "2")):
        assert text.count("bad.png: cannot be read") == 1
        assert "4 image(s), " in " ".join(text.split()) and "; 1 failed" in text
        assert names(out) == sorted([*kinds, "predict.json"])
        assert not list(out.rglob(".*"))
    for name in ("a0", "a1", "a2", "z"):
        one, other = (read_label(tmp_path / str(n) / f"{name}.tif") for n in (1, 2))
        assert (one != other).mean() < 1e-3  # tiles that both run may differ in the last bit


@pytest.mark.parametrize("trained", ["instance"], indirect=True)
def test_sigterm_leaves_no_part_of_a_file(trained, slides, tmp_path):
    done = start(1, trained[1], slides / "z.tif", "--out", "out", "--tta", "--formats", "labels,csv", cwd=tmp_path)
    while done.poll() is None and not list(tmp_path.glob("out/.z.csv.*.partial")):
        time.sleep(0.05)
    done.send_signal(signal.SIGTERM)
    assert done.wait(60) == 128 + signal.SIGTERM, done.stderr.read()
    assert names(tmp_path / "out") == ["predict.json"]
