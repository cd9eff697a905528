"""The commands as a user gives them, those of the README first: what they print, write, return."""

import errno
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from conftest import TINY
from PIL import Image

from nucsam import cli, progress
from nucsam.cli import run_command
from nucsam.config import load_config
from nucsam.errors import UserError
from nucsam.folds import runner

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = [f"{table}.{key}={value}" for table, keys in TINY.items() for key, value in keys.items()]
COMMANDS = typer.main.get_command(cli.app).commands
ELSEWHERE = (".", "bash", "cd", "git", "hf", "kaggle", "pip")  # commands of other programs
COPY = """
import json, pathlib, shutil, sys, tomllib
settings, out = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
shutil.copytree("runs/fold0", out)
shutil.copy(settings, out / "config.toml")
(out / "images.json").unlink()  # parts of another fold
scores = json.loads((out / "scores.json").read_text())
scores["split"] |= {k: tomllib.loads(open(settings).read())["data"][k] for k in scores["split"]}
(out / "scores.json").write_text(json.dumps(scores))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


LINES = [
    shlex.split(part.removeprefix("!"), comments=True)
    for block in blocks("bash")
    for line in block.splitlines()
    for part in line.split(" && ")
    if part.strip()
]


def nucsam_words(words: list[str]) -> list[str]:
    """The command line of nucsam in a line of the README; empty where it runs something else."""
    if words[0] == "nucsam":
        return words[1:]
    if words[0] == "sbatch":
        return words[2:]
    if words[:2] == ["accelerate", "launch"]:
        _, module, *arguments = words[words.index("-m") :]
        return [module.removeprefix("nucsam."), *arguments]
    assert words[0] in ELSEWHERE, f"no test knows how to run: {words}"
    return []


def runs_here(words: list[str]) -> bool:
    """Whether a line needs neither several devices, nor a notebook, nor more than seconds."""
    if any(word.startswith(("/kaggle/", "data.root=/kaggle/")) for word in words):
        return False
    if words[0] == "nucsam":
        if re.search(r"\bstarter\b|hf:|--push", " ".join(words)):  # needs MobileSAM, or the Hub
            return False
        # An export to ONNX takes half a minute; test_export makes and runs one.
        return not any(word.endswith(".onnx") for word in words)
    if words[:3] != ["accelerate", "launch", "--config_file"]:
        return False
    return yaml.safe_load((ROOT / words[3]).read_text())["num_processes"] == 1


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_line_of_the_readme_can_be_parsed(words, tmp_path, monkeypatch):
    (tmp_path / "my_folder").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    paths = [word for word in words if word.startswith(("launch/", "configs/"))]
    assert all((ROOT / path).exists() for path in paths)
    command, *arguments = nucsam_words(words) or [""]
    if command:
        params = COMMANDS[command].make_context(command, arguments).params
        load_config(*cli.configuration(params.get("arguments") or []))


@pytest.fixture
def newcomer(folder, tmp_path, monkeypatch):
    """The working directory of a newcomer, with the folders that the README names."""
    shutil.copytree(folder, tmp_path / "data/NuInsSeg")
    for kind in ("my_folder/images", "my_folder/labels", "slides"):
        (tmp_path / kind).mkdir(parents=True)
    for number, image in enumerate(sorted(folder.glob("*/tissue images/*.png"))):
        label = image.parents[1] / "label masks modify" / f"{image.stem}.tif"
        shutil.copy(image, tmp_path / "my_folder/images")
        shutil.copy(label, tmp_path / "my_folder/labels")
        if number < 3:
            shutil.copy(image, tmp_path / "slides")
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "finished.py").write_text(COPY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "TRAINER", (sys.executable, str(tmp_path / "finished.py")))
    monkeypatch.setattr(runner, "POLL", 0.05)
    return tmp_path


def shortened(words: list[str]) -> list[str]:
    """Words with the settings of a run of seconds before their own, which win; and its base."""
    if words[:2] == ["export", "adapter.safetensors"]:
        return [*words, "--base", "runs/fold0/base.safetensors"]
    short = [*SHORT, "train.epochs=1"]
    return [words[0], *short, *words[1:]] if words[0] in ("train", "folds") else words


def test_the_readme_runs_from_top_to_bottom(newcomer, capfd):
    """Each line as written but for `shortened`; `folds` takes copies of the first run as its runs.

    The model of the `python` block is loaded from the run that the lines leave.
    """
    for words in filter(runs_here, LINES):
        command = shortened(nucsam_words(words))
        if words[0] == "nucsam":
            status = run_command(command)
        else:
            launcher = [sys.executable, "-m", "accelerate.commands.launch", *words[2:4]]
            launched = [*launcher, "-m", f"nucsam.{command[0]}", *command[1:]]
            status = subprocess.run(launched, timeout=300).returncode
        assert status == 0, f"{words}\n{capfd.readouterr().err}"
        assert "--out" not in words or Path(words[words.index("--out") + 1]).exists(), words
    for pattern in ("*.tif", "*.geojson", "overlays/*.png"):
        assert len(list(Path("predicted").glob(pattern))) == 3
    assert len(list(Path("qupath").glob("*.geojson"))) == 3
    assert len(json.loads(Path("runs/ranks/table.json").read_text())["variants"]) == 3

    (code,) = blocks("python")
    image = np.asarray(Image.open(next(Path("slides").iterdir())))
    exec(code, names := {"image": image})
    assert names["label"].dtype == np.int32 and names["label"].shape == image.shape[:2]


def test_the_readme_names_files_that_exist():
    names = set(re.findall(r"(?:nucsam|launch|configs|benchmarks)/[\w/.]+\.\w+", README))
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and citation["authors"]
    assert citation["references"]
    for work in citation["references"]:
        assert work.keys() >= {"type", "title", "authors", "year"}
        assert work.keys() & {"doi", "url"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """A run of the quickstart's configuration, shortened, and what it printed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    settings = ["data.crop=64", "data.inner=0.3", "train.epochs=1", "train.validate_every=1"]
    command = ["train", str(ROOT / "configs/quickstart.toml"), f"data.root={folder}", *settings]
    with redirect_stdout(io.StringIO()) as output:
        assert run_command([*command, "--out", str(run)]) == 0
    return run, " ".join(output.getvalue().split())


def test_training_prints_what_must_be_known(trained):
    run, output = trained
    assert "283,124 of 6,027,016 parameters" in output
    assert (run / "scores.json").is_file()


def test_evaluate_scores_a_run(trained, tmp_path, capsys):
    run, overlays = trained[0], tmp_path / "overlays"
    assert run_command(["evaluate", str(run), "--overlays", str(overlays), "--json", "-"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images_of"] == "test"
    assert len(scores["scores"][0]["images"]) == len(list(overlays.iterdir())) == 3
    assert scores["headline"] == json.loads((run / "scores.json").read_text())["headline"]


def test_evaluate_scores_folders_of_label_maps(folder, tmp_path, capsys):
    truth = str(min(folder.glob("*/label masks modify")))
    out = ["--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")]
    assert run_command(["evaluate", "--truth", truth, "--pred", truth, *out]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"][0]
    assert scores["protocol"]["name"] == "nuinsseg"
    assert scores["summary"]["mean"]["aji"] > 0.9  # the protocol removes predictions under 50 px
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + len(scores["images"])
    assert run_command(["evaluate", "--truth", truth]) == 2
    assert run_command(["evaluate", "run", "--truth", truth, "--pred", truth]) == 2
    assert capsys.readouterr().err.count("nucsam: evaluate: ") == 2


def test_scores_of_images_are_printed_as_they_are_written(folder, tmp_path, capsys, monkeypatch):
    """Also into the home folder, for which a shell leaves the ~ after a =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    truth = str(min(folder.glob("*/label masks modify")))
    score = ["evaluate", "--truth", truth, "--pred", truth]
    assert run_command([*score, "--csv=~/s.csv"]) == 0
    capsys.readouterr()
    assert run_command([*score, "--csv", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "s.csv").read_text()
    assert run_command([*score, "--csv", "-", "--json", "-"]) == 2
    assert "found - for --json and --csv" in capsys.readouterr().err
    assert run_command([*score, "--organ=~/", "--json=~/s.json"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "s.json"]


def test_settings_name_this_files_differences(capsys):
    assert run_command(["settings", str(ROOT / "configs/quickstart.toml"), "lr_"]) == 0
    words = capsys.readouterr().out.split()
    assert {"quickstart", "train.lr_adapter", "train.lr_head", "0.001", "0.003"} <= {*words}
    assert "train.epochs" not in words


def test_a_bare_resume_takes_the_runs_own_configuration(newcomer, capsys):
    """A run of the quickstart's settings, killed between training and scoring."""
    settings = [*SHORT, "my_folder", "train.epochs=1"]
    assert run_command(["train", "configs/quickstart.toml", *settings, "--out", "run"]) == 0
    before = Path("run/config.toml").read_text()
    scores = Path("run/scores.json").read_text()
    Path("run/scores.json").unlink()
    assert run_command(["train", "--resume", "--out", "run"]) == 0
    assert Path("run/config.toml").read_text() == before and "lr_head = 0.003" in before
    assert Path("run/scores.json").read_text() == scores
    shutil.copytree("run", "runs/my_folder-fold0")  # where a run is without --out
    assert run_command(["train", "my_folder", "--resume"]) == 0
    assert Path("runs/my_folder-fold0/config.toml").read_text() == before
    assert run_command(["train", "--dry-run", *settings, "--out", "new"]) == 0
    assert not Path("new").exists() and "dry run: 3 steps" in capsys.readouterr().out


def test_inspect_counts_and_draws(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert run_command(["inspect", str(folder), "--sheet", str(sheet), "--json"]) == 0
    total = json.loads(capsys.readouterr().out)["rows"][-1]
    assert total["organ"] == "all" and total["images"] == 12
    drawn = np.asarray(Image.open(sheet))
    assert (drawn == (0, 200, 80)).all(-1).any()  # the contours of nuclei
    assert run_command(["inspect", str(folder), "--sheet", str(tmp_path / "sheet.jpg")]) == 2
    assert "sheet.jpg, expected a name that ends in .png" in capsys.readouterr().err
    assert not (tmp_path / "sheet.jpg").exists()


def test_inspect_names_every_bad_file_and_fails(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken = sorted(copy.glob("*/label masks modify/*.tif"))[:2]
    for path in broken:
        path.write_bytes(b"no image")
    assert run_command(["inspect", str(copy), "--sheet", str(tmp_path / "s.png")]) == 1
    output = capsys.readouterr().out.replace("\n", "")
    assert all(path.name in output for path in broken)


# What comes of an error


def unpack():
    _, _ = [1]


def zip_strictly():
    list(zip([1], [1, 2], strict=True))


def broadcast():
    np.zeros(2) + np.zeros(3)


def no_file():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def raising(monkeypatch, function) -> None:
    """Make `nucsam synth` call a function inside nucsam."""
    monkeypatch.setattr("nucsam.data.synthetic.write_dataset", lambda *_, **__: function())


@pytest.mark.parametrize("bug", [unpack, zip_strictly, broadcast, no_file])
def test_a_bug_keeps_its_traceback(monkeypatch, bug):
    raising(monkeypatch, bug)
    with pytest.raises((ValueError, OSError)) as caught:
        run_command(["synth", "x"])
    assert not isinstance(caught.value, UserError)
    assert bug.__name__ in [entry.name for entry in caught.traceback]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "denied", "a.png"),
        OSError(errno.ENOSPC, "disk full: a.png"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_message_and_status_2(monkeypatch, capsys, error):
    def fail():
        raise error

    raising(monkeypatch, fail)
    assert run_command(["synth", "x"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nucsam: ") and "a.png" in message and message.count("\n") == 1


def test_ctrl_c_before_a_command_has_begun_is_said(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    raising(monkeypatch, interrupt)
    assert run_command(["synth", "x"]) == 130
    assert capsys.readouterr().err == "nucsam: stopped by Ctrl-C\n"


def test_a_command_that_needs_torch_says_so_where_there_is_none(monkeypatch, capsys):
    def fail():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    raising(monkeypatch, fail)
    with pytest.raises(ModuleNotFoundError):
        run_command(["synth", "x"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_command(["synth", "x"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nucsam: synth needs torch") and "pip install" in message


@pytest.mark.parametrize("arguments", [["synth"], ["synth", "x", "--images", "many"], ["trian"]])
def test_a_wrong_command_line_meets_its_usage(capsys, arguments):
    assert run_command(arguments) == 2
    assert "Usage: nucsam" in capsys.readouterr().err


# What is printed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_draws_the_report(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("nucsam.train.loop.fit", lambda *_, **__: None)
    monkeypatch.setattr("nucsam.folds.runner.cross_validate", lambda *_, **__: 3)
    assert run_command(["train", "--out", str(tmp_path)]) == 0
    assert run_command(["folds", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().out.count("no report in the tests\n") == 2 * (rank == "0")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_appears_on_a_terminal(monkeypatch, capsys, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.with_bar(iter("abc"), 3, "Reading")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert ("Reading" in shown) == terminal
    assert ("3/3" in shown) == terminal
    assert terminal or shown == ""
