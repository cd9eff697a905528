"""The commands as a user gives them: what they print, write and return."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nucsam.cli import run

ROOT = Path(__file__).parents[1]


def nucsam(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "nucsam", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


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
    assert "trains 158,773 of 5,902,665 parameters" in output
    assert "chosen by aji on the inner split" in output
    assert (run / "scores.json").is_file()


def test_evaluate_a_run(trained, tmp_path):
    path, _ = trained
    done = nucsam("evaluate", path, "--overlays", tmp_path / "overlays", "--json", "-")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    names = [row["name"] for row in scores["scores"][0]["images"]]
    assert scores["images_of"] == "test" and len(names) == 3
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    assert scores["headline"] == json.loads((path / "scores.json").read_text())["headline"]
    untrained = nucsam("evaluate", path, "--untrained")
    assert "untrained model, test images" in untrained.stdout


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


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["train", "missing.toml"], "missing.toml: no such configuration file"),
        (["train", "train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["train", "train.epochs=many"], "train.epochs: found 'many' (str), expected a whole number"),
        (["train", "a.toml", "b.toml"], "found 2 configurations (a.toml, b.toml), expected one"),
        (["train", "data.root=nowhere", "model.weights=none", "--out", "run"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere: found no config.toml"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message_and_status_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("nucsam: ") and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_commands_and_imports_nothing_heavy():
    done = nucsam("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "evaluate", "synth", "inspect", "export"))
    code = "import sys; from nucsam.cli import run\nrun(['--help'])\n"
    code += "print([m for m in ('torch', 'numpy', 'scipy', 'accelerate') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip().endswith("[]"), loaded.stdout + loaded.stderr
