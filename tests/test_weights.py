"""Base weights: which files are read, which are refused, and what identifies a base."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import same_tensors
from safetensors.torch import save_file

from nucsam.errors import UserError
from nucsam.files import shortened
from nucsam.model.bases import BASES
from nucsam.model.weights import build_sam, default_cache, load_base, random_base, state_sha256


@pytest.fixture(scope="module")
def state():
    return random_base(3).state


def test_a_random_base_is_stock_and_follows_its_seed_only():
    before = torch.get_rng_state()
    base = load_base("none", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    stock = build_sam(3).state_dict()
    assert base.state.keys() == stock.keys()
    assert base.sha256 == state_sha256(stock) != random_base(4).sha256
    assert base.source == "none (random, seed 3)"
    parameters = [t for n, t in stock.items() if "running" not in n and "num_b" not in n]
    assert sum(t.numel() for t in parameters) > 10_130_000


LIGHT = """
import sys, warnings
from nucsam.model.weights import build_sam
sam = build_sam()
print({"timm", "torchvision", "mobile_sam.predictor"} & set(sys.modules))
warnings.warn("ours")
warnings.simplefilter("ignore")
from mobile_sam import SamPredictor, modeling
import timm
print(SamPredictor(sam).device, isinstance(sam, modeling.Sam), len(timm.list_models()) > 9)
"""


def test_mobile_sam_comes_without_timm_and_silently_and_leaves_both_usable():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["set()", "cpu True True"]
    assert run.stderr.count("Warning") == 1
    assert "ours" in run.stderr


def test_a_model_that_a_check_has_built_serves_once(state, tmp_path):
    save_file(state, tmp_path / "base.safetensors")
    load_base(tmp_path / "base.safetensors")
    one, two = build_sam(), build_sam()
    assert one is not two
    assert same_tensors(one.state_dict(), two.state_dict())


def test_identity_counts_names_dtypes_shapes_and_values_only():
    a, b = torch.tensor(7), torch.arange(6.0).view(2, 3)
    by_hand = hashlib.sha256(
        b'["a", "torch.int64", []]' + (7).to_bytes(8, "little")
        + b'["b", "torch.float32", [2, 3]]' + b.numpy().tobytes()
    ).hexdigest()  # fmt: skip
    assert state_sha256({"b": b, "a": a}) == by_hand
    strided = b.t().contiguous().t().requires_grad_()
    assert state_sha256({"a": a, "b": strided}) == by_hand
    for change in ({"c": b}, {"b": b.double()}, {"b": b.view(3, 2)}, {"b": b + 1}):
        assert state_sha256({"a": a, **change}) != by_hand


def test_both_formats_give_the_same_base(state, tmp_path):
    torch.save(state, tmp_path / "base.pt")
    save_file(state, tmp_path / "base.safetensors", metadata={"made by": "a test"})
    before = torch.get_rng_state()
    plain, safe = load_base(tmp_path / "base.pt"), load_base(str(tmp_path / "base.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)
    assert plain.sha256 == safe.sha256 == state_sha256(state)
    assert plain.source == str(tmp_path / "base.pt")
    assert plain.extra == safe.extra == {}
    assert all(torch.equal(safe.state[name], tensor) for name, tensor in state.items())


def test_an_export_brings_its_head_and_keeps_its_identity(state, tmp_path):
    head = {"head.out.weight": torch.ones(2, 2), "head.out.bias": torch.zeros(2)}
    save_file(state | head, tmp_path / "export.safetensors", metadata={"nucsam": "{}"})
    export = load_base(tmp_path / "export.safetensors")
    assert export.state.keys() == state.keys()
    assert export.sha256 == state_sha256(state)
    assert list(export.extra) == ["head.out.bias", "head.out.weight"]

    save_file(state | head, tmp_path / "other.safetensors")  # not written by nucsam
    with pytest.raises(UserError, match=r"other\.safetensors.*head\.out\.bias"):
        load_base(tmp_path / "other.safetensors")


def test_a_checkpoint_that_does_not_fit_is_refused_with_each_reason(state, tmp_path):
    neck = "image_encoder.neck"
    other = state | {"module.extra": torch.zeros(1)}
    other[f"{neck}.0.weight"] = torch.zeros(256, 320, 3, 3)
    other[f"{neck}.1.bias"] = torch.zeros(256, dtype=torch.int64)
    del other["prompt_encoder.no_mask_embed.weight"]
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError) as refusal:
        load_base(tmp_path / "other.pt")
    message = str(refusal.value)
    for fact in (
        str(tmp_path / "other.pt"),
        "4 tensors differ; ",
        f"{neck}.0.weight: found fractions (256, 320, 3, 3), expected fractions (256, 320, 1, 1), ",
        f"{neck}.1.bias: found integers (256,), expected fractions (256,), ",
        "module.extra: found fractions (1,), expected none and 1 more. Expected",
    ):
        assert fact in message
    assert len(message) < 900


@pytest.mark.parametrize(
    "content",
    [
        {3: torch.zeros(1)},
        {"weight": torch.zeros(3, device="meta")},
        {"weight": torch.tensor([1.0, torch.inf])},
    ],
)
def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt") as refusal:
        load_base(tmp_path / "a.pt")
    assert "does not fit" not in str(refusal.value)  # it is refused before its names are compared


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors"])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=r"no such file.*" + name.replace(".", r"\.")):
        load_base(tmp_path / name)
    with pytest.raises(UserError, match=f"found the folder {re.escape(str(tmp_path))}, expected a"):
        load_base(tmp_path)


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("NUCSAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "nucsam"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "nucsam"
    monkeypatch.setenv("NUCSAM_CACHE", "~/own")
    assert default_cache() == tmp_path / "own"


def test_auto_downloads_once_and_then_needs_no_address(published, tmp_path, base, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("NUCSAM_CACHE", str(cache))
    downloaded = load_base("auto")
    assert downloaded.sha256 == base.sha256
    assert downloaded.source == str(cache / "mobile_sam.pt")
    monkeypatch.setitem(BASES, "mobile_sam", replace(BASES["mobile_sam"], urls=()))
    assert load_base("auto").sha256 == base.sha256


def test_half_precision_is_read_in_full(state, tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    read = load_base(tmp_path / "half.safetensors")
    assert same_tensors(read.state, {name: t.to(state[name].dtype) for name, t in half.items()})
    assert read.sha256 == state_sha256(read.state) != state_sha256(state)


def test_a_long_list_of_names_says_how_many_more_there_are():
    assert shortened(["a", "b"], most=2) == "a, b"
    assert shortened(list("abcdef"), most=2) == "a, b and 4 more"
