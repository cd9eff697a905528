"""Shared by the tests: one thread, a tiny data set, and the configuration of a run of seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the tests are of the CPU also where there is a GPU

import pytest

TINY = {
    "data": {"crop": 64, "scale": 1.0, "workers": 0, "folds": 3, "inner": 0.3},
    "model": {"weights": "none", "width": 32},
    "train": {"epochs": 2, "batch": 2, "validate_every": 1},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twelve synthetic images of 96 px in NuInsSeg's layout."""
    from nucsam.synthetic import write_dataset

    out = tmp_path_factory.mktemp("data") / "set"
    write_dataset(out, images=12, size=96, seed=3)
    return out


@pytest.fixture(scope="session")
def tiny(folder):
    """Makes the configuration of a run of seconds; arguments are table.key=value overrides."""
    from nucsam.config import override

    def make(*overrides):
        tables = {name: dict(values) for name, values in TINY.items()}
        tables["data"]["root"] = str(folder)
        return override(tables, list(overrides))

    return make


@pytest.fixture(scope="session")
def base():
    """A random base with nothing left at 0 or 1: BatchNorms, their statistics, attention biases."""
    from dataclasses import replace

    import torch

    from nucsam.base import load_base, state_sha256

    fresh, generator = load_base("none", seed=1), torch.Generator().manual_seed(4)
    state = {}
    for name, tensor in fresh.state.items():
        if tensor.is_floating_point() and tensor.ndim < 3:
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        state[name] = tensor.abs() + 0.1 if name.endswith("running_var") else tensor
    return replace(fresh, state=state, sha256=state_sha256(state))


@pytest.fixture(scope="module", autouse=True)
def no_report(request):
    """A training's report page takes longer than a tiny training: only its own tests make it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_report":
            patch.setattr("nucsam.report.finish", lambda folder, net=None: "no report in the tests")
        yield
