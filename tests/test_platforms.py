"""Windows and macOS, simulated; and the interface: types, version, completion, quickstart."""

import os
import pydoc
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import nucsam
from nucsam import __version__, processes
from nucsam.config import Config, to_toml
from nucsam.errors import UserError
from nucsam.predict.devices import autocast_dtype, find_device, half_type
from nucsam.run.directory import RunDirectory

# A system without fcntl, sched_getaffinity and SIGCHLD, whose processes start afresh.
WINDOWS = """
import multiprocessing, os, signal, sys
if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    from test_claims import Msvcrt, claims
    claims.fcntl, claims.msvcrt = None, Msvcrt()
    sys.modules["fcntl"] = None
    del os.sched_getaffinity
    multiprocessing.set_start_method("spawn")
    from nucsam.cli import run_command
    status = run_command(sys.argv[1:])
    print("workers", multiprocessing.get_start_method(), hasattr(os, "sched_getaffinity"))
    sys.exit(status)
"""


def test_training_without_fcntl_affinity_and_fork(tmp_path, tiny):
    (tmp_path / "c.toml").write_text(to_toml(tiny("data.workers=1", "train.epochs=1")))
    (tmp_path / "main.py").write_text(WINDOWS)
    command = ["main.py", str(Path(__file__).parent), "train", "c.toml", "--out", "run"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("workers spawn False\n")
    run = RunDirectory(tmp_path / "run")
    assert run.read_scores(run.read_config()) is not None


def test_signals_and_children_of_windows(monkeypatch):
    monkeypatch.setattr(processes.sys, "platform", "win32")
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    assert processes.child_options(3) == {"creationflags": 512}
    with pytest.raises(SystemExit) as stopped, processes.exit_on_sigterm():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stopped.value.code == 128 + signal.SIGUSR1
    with subprocess.Popen(["sleep", "60"]) as child:
        processes.ask_to_stop(child)
    assert child.returncode == -signal.SIGUSR1


def test_the_gpu_of_apple(monkeypatch):
    with pytest.raises(UserError, match="found 'mps'"):
        find_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("nucsam.predict.devices.uses_gpu", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert find_device("auto") == find_device("mps") == torch.device("mps")
    assert autocast_dtype("bf16", torch.device("mps")) is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert find_device("auto").type == "cpu"


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    "capability, dtype", [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")]
)
def test_a_gpu_before_ampere_computes_in_fp16_what_was_trained_in_bf16(
    capability, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert half_type(CUDA) == autocast_dtype("bf16", CUDA) == getattr(torch, dtype)
    assert autocast_dtype("fp16", CUDA) == torch.float16
    assert autocast_dtype("no", CUDA) is None


@pytest.mark.parametrize("fast, dtype", [(True, torch.bfloat16), (False, None)])
def test_a_cpu_is_asked_whether_it_computes_bf16_fast(fast, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert half_type(CPU) == autocast_dtype("bf16", CPU) == dtype
    assert autocast_dtype("fp16", CPU) is None


# ---- the interface ----

TYPED = """
from pathlib import Path

import numpy as np
import numpy.typing as npt

import nucsam


def outlines(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    scores: dict[str, object] = nucsam.fit("a.toml", Path("run"), resume=True)
    model: nucsam.Predictor = nucsam.load("run", device="cpu", tile=256)
    print(scores["headline"], nucsam.__version__)
    return model.predict(image, mpp=0.25)
"""


def test_types_of_the_public_interface_are_strict(tmp_path):
    (tmp_path / "user.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(TYPED.replace('device="cpu"', "device=3"))
    # without the types of torch, which take a minute to read
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    package = str(Path(processes.__file__).parents[1])
    done = subprocess.run(
        [*command, "user.py", "wrong.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": package},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("wrong.py"), done.stdout
    assert "[arg-type]" in lines[0] and "1 error in 1 file" in lines[1]


def command_line(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "nucsam", *arguments]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout


def test_version_and_completion():
    assert command_line("--version") == f"nucsam {__version__}\n"
    words = {"COMP_WORDS": "nucsam qui", "COMP_CWORD": "1", "_NUCSAM_COMPLETE": "complete_bash"}
    assert command_line(**words).split() == ["quickstart"]


def test_help_shows_the_three_names_with_an_example_each():
    text = pydoc.plain(pydoc.render_doc(nucsam))
    for name in ("class Predictor", "    fit(", "    load("):
        assert name in text
    assert text.count("nucsam.load(") >= 3 and text.count("nucsam.fit(") >= 2


def test_quickstart_makes_trains_and_resumes(tmp_path, monkeypatch, capsys):
    from nucsam import cli

    small = tmp_path / "small.toml"
    tables = {**TINY, "train": TINY["train"] | {"epochs": 1}}
    small.write_text(to_toml(Config.from_dict(tables)))
    monkeypatch.setattr(cli, "shipped_configuration", lambda name="nuinsseg": small)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = []

    def write_dataset(folder, *, images, size, seed):
        made.append((images, size, seed))

        WRITE(folder, images=12, size=96, seed=seed)

    from nucsam.data import synthetic

    WRITE = synthetic.write_dataset
    monkeypatch.setattr(synthetic, "write_dataset", write_dataset)
    out = tmp_path / "qs"
    assert cli.run_command(["quickstart", str(out)]) == 0
    run = RunDirectory(out / "fold0")
    weights = run.adapter_file.read_bytes()
    assert cli.run_command(["quickstart", str(out)]) == 0
    assert made == [(60, 256, 0)] and run.adapter_file.read_bytes() == weights
    assert "after, epoch 1" in capsys.readouterr().out
