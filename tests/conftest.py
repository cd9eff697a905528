"""Shared by the tests: one thread, a tiny data set, and the configuration of a run of seconds."""

import copy
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # also where there is a GPU

import pytest

# What tests start draws no report, because that takes longer than a tiny training.
NO_REPORT = str(Path(__file__).parent / "no_report")
PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)
PATHS = [path for path in PATHS if path not in ("", NO_REPORT)]  # pytest-xdist hands it on
os.environ["PYTHONPATH"] = os.pathsep.join([NO_REPORT, *PATHS])

TINY = {
    "data": {"crop": 64, "scale": 1.0, "workers": 0, "folds": 3, "inner": 0.3},
    "model": {"weights": "none", "width": 32},
    "train": {"epochs": 2, "batch": 2, "validate_every": 1, "precision": "fp32"},
}


def whole_scores(**changes):
    """A scores.json with one image, as far as nucsam reads it, with other entries on top."""
    mean = {"dice": 0.8, "aji": 0.6, "pq": 0.5}
    outcomes = dict.fromkeys(("missed", "false", "split", "merged"), 0)
    image = {"name": "a", "organ": "b", **mean, "n_truth": 2, "n_pred": 2, "outcomes": outcomes}
    summary = {"images": 1, "mean": mean, "low": mean, "high": mean, "organs": {}}
    summary |= {"nuclei": 2, "predicted": 2, "pooled": mean}
    rules = {"protocol": {"name": "nuinsseg"}, "rules": "nuinsseg: its rules"}
    return {
        "images_of": "test",
        "untrained": False,
        "epoch": 2,
        "epoch_chosen_by": "aji on the inner split",
        "base": {"source": "a.pt"},
        "headline": mean,
        "scores": [rules | {"images": [image], "summary": summary}],
        **changes,
    }


def snapshot(folder):
    """Mode, size and time of writing of all but locks in a folder; of a folder only its mode."""
    states = {}
    for path in folder.rglob("*"):
        if path.name == ".lock":  # says who holds a run
            continue
        status = path.lstat()
        content = (status.st_size, status.st_mtime_ns) if not path.is_dir() else ()
        states[path] = (status.st_mode, *content)
    return states


def same_tensors(a, b):
    """Whether two states hold the same tensors under the same names, bit for bit."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture(scope="session", autouse=True)
def all_cores_idle():
    """A training in this process does not watch the cores first, which takes half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nucsam.processes.psutil.cpu_percent", lambda seconds: 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def stock_built_once(request):
    """Each stock MobileSAM of a seed is a copy of one, as its construction takes 3 times as long.

    Not in the tests of what is built.
    """
    from nucsam.model.bases import BASES

    def build(base=BASES["mobile_sam"]):
        import torch

        return copy.deepcopy(_stock_model(base.stock, torch.initial_seed()))

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_weights":
            patch.setitem(BASES, "mobile_sam", replace(BASES["mobile_sam"], stock=build))
        yield


@lru_cache(4)
def _stock_model(build, _seed):
    """The model that `build` makes from random numbers of `_seed`, which has been set."""
    return build()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve synthetic images of 96 px in NuInsSeg's layout."""
    from nucsam.data.synthetic import write_dataset

    out = tmp_path_factory.mktemp("data") / "set"
    write_dataset(out, images=12, size=96, seed=3)
    return out


@pytest.fixture(scope="session")
def tiny(folder):
    """A function that makes the configuration of a run of seconds from overrides."""
    from nucsam.config import override

    def make(*overrides):
        tables = {name: dict(values) for name, values in TINY.items()}
        tables["data"]["root"] = str(folder)
        return override(tables, list(overrides))

    return make


@pytest.fixture(scope="session")
def base():
    """A random base with no zeros and ones in BatchNorms, their statistics, attention biases."""
    import torch

    from nucsam.model.weights import load_base, state_sha256

    fresh, generator = load_base("none", seed=1), torch.Generator().manual_seed(4)
    state = {}
    for name, tensor in fresh.state.items():
        if tensor.is_floating_point() and tensor.ndim < 3:
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        state[name] = tensor.abs() + 0.1 if name.endswith("running_var") else tensor
    return replace(fresh, state=state, sha256=state_sha256(state))


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """Pretends that a file of `base` is MobileSAM's published one, in the cache; its path."""
    import hashlib

    import torch

    from nucsam.model.bases import BASES

    path = tmp_path_factory.mktemp("published") / "mobile_sam.pt"
    torch.save(base.state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    facts = {"sha256": sha256, "size": path.stat().st_size, "urls": (path.as_uri(),)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASES, "mobile_sam", replace(BASES["mobile_sam"], **facts))
        patch.setenv("NUCSAM_CACHE", str(path.parent))
        yield path


@pytest.fixture
def report_drawn(monkeypatch):
    """What the test starts draws its report."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(PATHS))


@pytest.fixture(scope="module", autouse=True)
def no_report(request):
    """Only the report's own tests draw it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_report":
            patch.setattr(
                "nucsam.report.page.finish", lambda folder, net=None: "no report in the tests"
            )
        yield
