"""The commands as a user gives them, those of the README first: what they print, write and return."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY
from PIL import Image

from nucsam import config, folds
from nucsam.cli import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = [f"{table}.{key}={value}" for table, values in TINY.items() for key, value in values.items()]
NOT_RUN = {  # how a line begins, and why no test runs it
    "bash launch/quickstart.sh": "makes an environment; `trained` below does what it then does, shortened",
    "bash launch/test.sh": "runs the tests",
    "kaggle ": "needs an account and a network",
    "hf ": "needs an account and a network",
    "nucsam export runs/fold0 --out nuclei.onnx ": "takes 20 seconds; test_export makes and runs one",
    "sbatch ": "needs a cluster",
    "!": "cells of a notebook that has GPUs",
    "accelerate launch --multi_gpu ": "needs GPUs; test_folds and test_distributed launch several processes",
    "accelerate launch --config_file launch/ddp.yaml ": "needs GPUs; test_distributed launches several processes",
}
COPY = """
import shutil, sys
settings, out = sys.argv[1], sys.argv[sys.argv.index("--out") + 1]
shutil.copytree("runs/fold0", out)
shutil.copy(settings, out + "/config.toml")
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = ("train", "folds", "evaluate", "predict", "synth", "inspect", "export", "report")
LINES = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def newcomer(folder, tmp_path, monkeypatch):
    """An empty working directory of a newcomer, with what the README's lines name: NuInsSeg, my_folder, slides."""
    shutil.copytree(folder, tmp_path / "data/NuInsSeg")
    for kind in ("my_folder/images", "my_folder/labels", "slides"):
        (tmp_path / kind).mkdir(parents=True)
    for number, image in enumerate(sorted(folder.glob("*/tissue images/*.png"))):
        shutil.copy(image, tmp_path / "my_folder/images")
        shutil.copy(image.parents[1] / "label masks modify" / f"{image.stem}.tif", tmp_path / "my_folder/labels")
        if number < 3:
            shutil.copy(image, tmp_path / "slides")
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "finished.py").write_text(COPY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folds, "TRAINER", (sys.executable, str(tmp_path / "finished.py")))
    monkeypatch.setattr(folds, "POLL", 0.05)
    return tmp_path


def shortened(words: list[str]) -> list[str]:
    """A line's words with the settings of a run of seconds, before its own, which win; and its random base."""
    if words[:3] == ["nucsam", "export", "adapter.safetensors"]:
        return [*words, "--base", "runs/fold0/base.safetensors"]
    at = [k for k, word in enumerate(words) if word in ("train", "folds", "nucsam.train", "nucsam.folds")]
    return words[: at[0] + 1] + SHORT + words[at[0] + 1 :] if at else words


def test_the_readmes_commands_run(newcomer, capfd):
    """Each bash line in turn, as written but for `shortened`; `nucsam folds` takes copies of the first run as its runs.

    A line that is neither known here nor in NOT_RUN fails. What follows `python` blocks is looked at below.
    """
    assert len(LINES) >= 25
    ran = []
    for line in LINES:
        words = shlex.split(line, comments=True)
        assert all(Path(word).exists() for word in words if word.startswith(("launch/", "configs/"))), line
        if any(line.startswith(start) for start in NOT_RUN):
            config.override({}, [word for word in words if re.match(r"(data|model|train)\.\w+=", word)])
            continue
        if words[0] == "nucsam":
            status = run(shortened(words)[1:])
        else:
            assert words[:2] == ["accelerate", "launch"], f"no test knows how to run: {line}"
            launch = [sys.executable, "-m", "accelerate.commands.launch", *shortened(words)[2:]]
            status = subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300).returncode
        assert status == 0, f"{line}\n{capfd.readouterr().err}"
        assert "--out" not in words or Path(words[words.index("--out") + 1]).exists(), line
        ran.append(words[1])
    assert {"train", "folds", "evaluate", "predict", "export", "report", "inspect", "launch"} <= set(ran)
    assert len(list(Path("predicted").glob("*.tif"))) == len(list(Path("qupath").glob("*.geojson"))) == 3
    assert len(json.loads(Path("runs/ranks/table.json").read_text())["variants"]) == 3

    (code,) = blocks("python")
    image = np.asarray(Image.open(next(Path("slides").iterdir())))
    exec(code, names := {"image": image})
    assert names["label"].dtype == np.int32 and names["label"].shape == image.shape[:2]


def test_what_is_not_run_is_in_the_readme():
    assert all(any(line.startswith(start) for line in LINES) for start in NOT_RUN)
    assert sum(not line.startswith(tuple(NOT_RUN)) for line in LINES) >= 20


def test_the_readme_maps_every_module():
    modules = {path.stem for path in (ROOT / "nucsam").glob("*.py")} - {"__init__", "__main__"}
    assert len(modules) > 20
    table = README[README.index("## File by file") :]
    assert modules - set(re.findall(r"(\w+)\.py", table)) == set()
    named = re.findall(r"(?:nucsam|launch|configs|benchmarks)/[\w.]+\.\w+", README)
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []


def test_the_citation_has_what_its_format_requires():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["message"] and found["title"] and found["authors"]
    assert len(found["references"]) == 9
    assert all(work.keys() >= {"type", "title", "authors", "year"} for work in found["references"])
    assert all(work.keys() & {"doi", "url"} for work in found["references"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """A run of the quickstart's configuration, shortened, by `accelerate launch` as the quickstart does it."""
    cwd = tmp_path_factory.mktemp("trained")
    command = ["accelerate.commands.launch", "--config_file", ROOT / "launch/cpu.yaml", "-m", "nucsam.train"]
    overrides = [f"data.root={folder}", "data.crop=64", "data.inner=0.3", "train.epochs=1", "train.validate_every=1"]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(ROOT / "configs/quickstart.toml"), *overrides, "--out", "run"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return cwd / "run", done.stdout


def test_training_prints_what_must_be_known(trained):
    run, output = trained
    output = " ".join(output.split())
    assert "random base weights: the scores say nothing about MobileSAM" in output
    assert "trains 284,828 of 6,028,720 parameters" in output
    assert "chosen by aji on the inner split" in output
    assert (run / "scores.json").is_file()


def test_evaluate_a_run(trained, tmp_path, capsys):
    path, _ = trained
    assert run(["evaluate", str(path), "--overlays", str(tmp_path / "overlays"), "--json", "-"]) == 0
    scores = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in scores["scores"][0]["images"]]
    assert scores["images_of"] == "test" and len(names) == 3
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    assert scores["headline"] == json.loads((path / "scores.json").read_text())["headline"]
    assert run(["evaluate", str(path), "--untrained"]) == 0
    assert "untrained model, test images" in capsys.readouterr().out


def test_evaluate_folders_of_label_maps(folder, tmp_path, capsys):
    organ = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    truth = organ / "label masks modify"
    assert run(["evaluate", "--truth", str(truth), "--pred", str(truth), "--json", str(tmp_path / "s.json")]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"][0]
    assert scores["protocol"]["name"] == "nuinsseg"
    assert scores["summary"]["mean"]["aji"] > 0.9  # the protocol removes predictions under 50 px
    assert run(["evaluate", "--truth", str(truth)]) == 2
    assert "expected either RUN, or both --truth and --pred" in capsys.readouterr().err


def test_inspect_counts_and_draws(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert run(["inspect", str(folder), "--sheet", str(sheet), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["rows"][-1]
    assert total["organ"] == "all" and total["images"] == 12
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_inspect_names_every_bad_file_and_fails(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = sorted(copy.glob("*/label masks modify/*.tif"))[:2]
    assert len(broken) == 2
    for path in broken:
        path.write_bytes(b"no image")
    assert run(["inspect", str(copy), "--sheet", str(tmp_path / "s.png")]) == 1
    output = capsys.readouterr().out.replace("\n", "")
    assert all(path.name in output for path in broken)


def test_synth_repeats_by_seed_and_refuses_a_full_folder(tmp_path, capsys):
    for name in ("a", "b"):
        assert run(["synth", str(tmp_path / name), "--images", "2", "--size", "64", "--seed", "5"]) == 0
    a, b = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.*")) for n in ("a", "b"))
    assert a == b and len(a) >= 4
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in a)
    assert run(["synth", str(tmp_path / "a"), "--images", "2"]) == 2
    assert str(tmp_path / "a") in capsys.readouterr().err


def test_export_and_its_refusals(trained, tmp_path, capsys):
    path, _ = trained
    out = tmp_path / "nuclei.safetensors"
    assert run(["export", str(path), "--out", str(out)]) == 0
    assert run(["export", str(path), "--out", str(out)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert run(["export", str(tmp_path), "--out", str(tmp_path / "x.pt")]) == 2
    assert "found no config.toml" in capsys.readouterr().err


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "nucsam", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert all(f"│ {name} " in done.stdout for name in COMMANDS)
