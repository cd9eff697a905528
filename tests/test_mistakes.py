"""The likeliest mistakes of a newcomer, as command lines: each message names the thing and says what to do."""

import errno
import json
import shutil
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY
from PIL import Image

from nucsam.cli import run

SHORT = [f"{table}.{key}={value}" for table, values in TINY.items() for key, value in values.items()]


# A name, a command line in `place` (PLAIN: a data set in order; TINY: the settings of a run of seconds), and what the
# message holds: the thing, and what to do about it.
MISTAKES = [
    # the data
    (
        "wrong folder",
        "train data.root=nowhere TINY",
        "nowhere: found no data set (no such folder)",
        "expected ORGAN/tissue images",
    ),
    ("no data where the default looks", "train", "data/NuInsSeg: found no data set (no such", "or images"),
    ("a folder too high", "inspect .", ".: found no data set", "did you mean binary?"),
    ("a file for a folder", "inspect page.pt", "page.pt: found no data set (a file", "unpack it"),
    ("images without folders", "inspect flat", "flat: found no data set", "or images (plain) in it"),
    (
        "labels in a folder of another name",
        "train data.root=masks TINY",
        "masks/images/",
        "expected one in masks/labels",
    ),
    ("no label for an image", "train data.root=unlabelled TINY", "mouse_liver_1.png", "in unlabelled/labels"),
    (
        "masks of 0 and 255",
        "train data.root=binary TINY",
        ".png: found a binary mask",
        "one id per nucleus, as of skimage",
    ),
    ("colour masks", "train data.root=colour TINY", "colour/labels/", "integer ids (H, W), not a picture"),
    ("masks of another size", "train data.root=cut TINY", "found 64x64 px", "expected 96x96 as in cut/images/"),
    ("no nuclei", "train data.root=empty TINY", "no nucleus in the 5 images of empty", "nucsam inspect empty counts"),
    ("a crop that fits no stride", "train data.crop=50 data.scale=1", "data.crop * data.scale", "a multiple of 32"),
    ("fold out of range", "train TINY data.fold=3", "data.fold: found 3", "expected 0 to 2 or 'all'"),
    ("more folds than images", "train PLAIN data.folds=20", "data.folds: found 20", "expected 2 to 12"),
    # the weights
    ("weights that are not there", "train PLAIN model.weights=sam.pth", "no such file: sam.pth", "a path, 'auto' or"),
    (
        "weights of another model",
        "train PLAIN model.weights=other.pt",
        "other.pt",
        "Expected MobileSAM's mobile_sam.pt",
    ),
    ("a web page saved as weights", "train PLAIN model.weights=page.pt", "page.pt", "download it again"),
    ("a training checkpoint as weights", "train PLAIN model.weights=all.pt", "under 'model'", "save the weights alone"),
    (
        "an adapter as base",
        "train PLAIN model.weights=run/adapter.safetensors",
        "run/adapter",
        "by nucsam export first",
    ),
    ("no network", "train PLAIN model.weights=auto", "could not be downloaded", "there yourself: cache/mobile_sam.pt"),
    # the settings
    ("typo in a key", "train train.epoch=3", "unknown key train.epoch", "did you mean train.epochs?"),
    ("typo in a table", "train trian.epochs=3", "unknown table [trian]", "did you mean train?"),
    ("a word for a number", "train train.epochs=many", "train.epochs: found 'many'", "expected a whole number"),
    ("settings as options", "train --epochs 3", "no such option: --epochs", "such as train.epochs=10"),
    ("the folder as argument", "train plain", "found 'plain'", "such as data.root=my_folder"),
    ("no such configuration", "train mine.toml", "mine.toml: ", "no such configuration file"),
    ("two configurations", "train a.toml b.toml", "found 2 configurations (a.toml, b.toml)", "expected one"),
    ("a fold for all folds", "folds data.fold=1 --out f", "data.fold: found it", "every fold without it"),
    # where it runs
    ("processes not joined", "WORLD_SIZE=2 train PLAIN", "WORLD_SIZE: the launcher started 2", "use launch/cpu2.yaml"),
    ("no such GPU", "predict run flat --out p --device cuda:99", "found 'cuda:99', but PyTorch sees", "expected cpu"),
    ("no disk", "synth full --images 1 --size 64", "[Errno 28]", "No space left on device"),
    # runs and files
    ("run directory exists", "train PLAIN --out run", "run: found files", "give another --out, or --resume to go on"),
    ("resume otherwise", "train PLAIN train.seed=1 --out run --resume", "train.seed: 0 -> 1", "or another --out"),
    ("no run", "evaluate plain", "plain: found no config.toml", "expected a run directory of nucsam train"),
    ("a run of another version", "evaluate old", "old/config.toml: unknown key loss.hover", "known: cross_entropy"),
    ("data that has moved", "evaluate run --data nowhere", "nowhere: ", "expected ORGAN/tissue images"),
    ("nothing to score", "evaluate --pred plain/labels", "evaluate: ", "either RUN, or both --truth and --pred"),
    ("predictions of other names", "evaluate --truth plain/labels --pred plain", "no file of plain", "expected human_"),
    ("typo in the protocol", "evaluate --truth flat --pred flat --protocol nuinseg", "'nuinseg'", "one of nuinsseg, "),
    ("a folder without images", "predict run old --out p", "old: found no image", "expected .png, .tif"),
    ("a file that is no model", "predict other.pt flat --out p", "other.pt: found a .pt", "or a run directory"),
    ("an adapter as model", "predict run/adapter.safetensors flat --out p", "run/adapter", "by nucsam export first"),
    (
        "over the images",
        "predict run plain/labels --out plain/labels",
        "would be overwritten",
        "expected another --out",
    ),
    ("typo in the formats", "predict run flat --out p --formats label", "found ['label']", "expected labels, geojson"),
    (
        "a report of no run",
        "report plain",
        "plain: found no config.toml",
        "expected a run of nucsam train or the folder",
    ),
    ("a run that has just begun", "export begun --out m", "begun/adapter.safetensors", "by nucsam train --resume"),
    ("export over a file", "export run --out other.pt", "other.pt", "--force replaces it"),
    ("no such format", "export run --out m --format pickle", "--format: found 'pickle'", "expected one of safetensors"),
    ("synthetic images over others", "synth plain", "plain: found files there", "expected a new or empty folder"),
]


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory) -> Path:
    """A folder with what the command lines name: data sets gone wrong in one way each, weights, a run."""
    place = tmp_path_factory.mktemp("place")
    images = sorted(folder.glob("*/tissue images/*.png"))
    assert len(images) == 12
    for kind in ("plain/images", "plain/labels", "flat"):
        (place / kind).mkdir(parents=True)
    for image in images:
        shutil.copy(image, place / "plain/images")
        shutil.copy(image, place / "flat")
        shutil.copy(image.parents[1] / "label masks modify" / f"{image.stem}.tif", place / "plain/labels")
    changes = {
        "binary": lambda label: (label > 0).astype(np.uint8) * 255,
        "colour": lambda label: np.stack([label * 40, label * 90, label * 7], -1).astype(np.uint8),
        "cut": lambda label: label[:64, :64],
        "empty": np.zeros_like,
    }
    for name, change in changes.items():
        every_label(shutil.copytree(place / "plain", place / name), change)
    shutil.copytree(place / "plain", place / "masks")
    (place / "masks/labels").rename(place / "masks/masks")
    shutil.copytree(place / "plain", place / "unlabelled")
    (place / "unlabelled/labels/mouse_liver_1.tif").unlink()

    torch.save({"image_encoder.weight": torch.zeros(3)}, place / "other.pt")
    torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 3}, place / "all.pt")
    (place / "page.pt").write_text("<!DOCTYPE html><title>404</title>")
    assert run(["train", f"data.root={place / 'plain'}", *SHORT, "--out", str(place / "run")]) == 0
    (shutil.copytree(place / "run", place / "begun") / "adapter.safetensors").unlink()
    config = shutil.copytree(place / "run", place / "old") / "config.toml"
    config.write_text(config.read_text().replace("[loss]", "[loss]\nhover = 1.0"))
    return place


def every_label(root: Path, change: Callable) -> None:
    for path in (root / "labels").iterdir():
        Image.fromarray(change(tifffile.imread(path))).save(path.with_suffix(".png"))
        path.unlink()


def seen(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def offline(*_, **__):
    raise urllib.error.URLError("Name or service not known")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name, command, names, advises", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_one_message_that_says_what_to_do(name, command, names, advises, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("NUCSAM_CACHE", "cache")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    if name == "no disk":
        monkeypatch.setattr(tifffile, "imwrite", full)
    words = command.replace("PLAIN", "data.root=plain TINY").replace("TINY", " ".join(SHORT)).split()
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    before = seen(place)
    assert run(words) == 2
    said = capsys.readouterr().err
    assert names in said and advises in said
    assert said.count("nucsam: ") == 1 and "Traceback" not in said
    assert seen(place) - before <= {str(place / "cache")}  # nothing is left behind, nor begun


def test_there_are_twenty_and_more():
    assert len({mistake[0] for mistake in MISTAKES}) == len(MISTAKES) == 49


def test_what_may_be_meant_is_said_and_done(place, monkeypatch, capsys):
    """fp16 without a GPU, a crop over the images' size, --resume of nothing: training says so and goes on."""
    monkeypatch.chdir(place)
    words = ["data.root=plain", *SHORT, "data.crop=128", "train.epochs=1", "train.precision=fp16"]
    with pytest.warns(UserWarning, match="fp16 needs a GPU; computing in fp32 on this CPU"):
        assert run(["train", *words, "--out", "new", "--resume"]) == 0
    assert warnings.formatwarning("so it is", UserWarning, "file.py", 7) == "warning: so it is\n"
    said = " ".join(capsys.readouterr().out.split())
    assert "data.crop: found 128 px, but no image with a shorter side over 96 px: a smaller crop is faster" in said
    assert "--resume: found no run to go on with in new; a new one begins" in said


def test_binary_masks_for_predictions_are_scored_with_a_warning(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["evaluate", "--truth", "plain/labels", "--pred", "binary/labels", "--workers", "1", "--json", "-"]
    aji = []
    for options in ([], ["--connected"]):
        assert run([*command, *options]) == 0
        output = capsys.readouterr()
        aji.append(json.loads(output.out)["scores"][0]["summary"]["mean"]["aji"])
        assert ("prediction is a 0/255 mask" in output.err) == (not options)
    assert aji[0] < aji[1]
