import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nucsam.base import Base, build_sam, load_base, state_sha256
from nucsam.checkpoint import save_adapter, write_tensors, write_text
from nucsam.config import Config, Model, to_toml
from nucsam.export import FORMATS, export
from nucsam.model import Nucsam, build

MODEL = Model(width=32, weights="none", rank=2, alpha=6.0)
IMAGES = 255 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
PIXELS = 255 * torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(3))


def make_run(run: Path, base: Base, model: Model) -> Nucsam:
    """A run as training leaves it, and its model."""
    net, generator = build(model, base, seed=0).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.trainable().values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    write_tensors(run / "base.safetensors", base.state, {"kind": "base", "source": base.source})
    write_text(run / "config.toml", to_toml(replace(Config(), model=model)))
    facts = {"config": {"model": {"width": 32}}, "base": {"sha256": base.sha256, "source": base.source}, "epoch": 3}
    save_adapter(run / "adapter.safetensors", net.trainable(), facts)
    return net


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, base, MODEL)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Nucsam:
    return make_run(tmp_path_factory.mktemp("again"), base, MODEL)


@torch.no_grad()
def stock_embedding(sam: torch.nn.Module) -> torch.Tensor:
    """What stock code computes of 1024 px, `.eval()` called after loading."""
    sam.eval()
    return sam.image_encoder(sam.preprocess(PIXELS))


@torch.no_grad()
def our_embedding(net: Nucsam) -> torch.Tensor:
    return net.image_encoder.embed(net.image_encoder(PIXELS))


@torch.no_grad()
def maps(net: Nucsam) -> torch.Tensor:
    return net.eval()(IMAGES, (64, 96))


def test_stock_mobile_sam_loads_the_export_and_gives_our_embedding(run, base, trained, tmp_path):
    from mobile_sam import sam_model_registry

    for suffix in (".pt", ".safetensors"):
        sentence = export(run, tmp_path / f"merged{suffix}", format="mobile-sam")
        assert sentence.startswith(f"{tmp_path / f'merged{suffix}'}: {len(base.state)} tensors, ")
        assert " MiB" in sentence
    stock = sam_model_registry["vit_t"](checkpoint=str(tmp_path / "merged.pt"))  # loads with strict=True
    found = stock_embedding(stock)
    assert found.shape == (1, 256, 64, 64)
    torch.testing.assert_close(found, our_embedding(trained), atol=1e-4, rtol=0)
    # The same tensors in the other file, and another embedding than the base's
    tensors = load_file(tmp_path / "merged.safetensors")
    assert tensors.keys() == base.state.keys()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in tensors.items())
    stock.load_state_dict(base.state, strict=True)
    of_base = stock_embedding(stock)
    assert (found - of_base).abs().max() > 0.05
    assert set(torch.load(tmp_path / "merged.pt", weights_only=True)) == set(base.state)


@pytest.mark.parametrize("train", ["full", "head"])
def test_stock_mobile_sam_loads_exports_of_the_sam_head(base, tmp_path, train):
    net = make_run(tmp_path / "run", base, Model(head="sam", train=train, weights="none"))
    export(tmp_path / "run", tmp_path / "merged.safetensors", format="mobile-sam")
    state = load_file(tmp_path / "merged.safetensors")
    build_sam().load_state_dict(state, strict=True)
    own = net.state_dict()
    assert all(torch.equal(state[name], own[name]) for name in net.trainable())
    assert {name for name in state if not torch.equal(state[name], base.state[name])} == net.trainable().keys()
    again = load_base(tmp_path / "merged.safetensors")
    torch.testing.assert_close(
        maps(build(Model(head="sam", train="head"), again, seed=7)), maps(net), atol=1e-5, rtol=1e-5
    )


def test_safetensors_export_is_a_base_with_its_head(run, base, trained, tmp_path):
    out = tmp_path / "new" / "nuclei.safetensors"
    sentence = export(run, out)
    found = load_base(out)
    assert found.state.keys() == base.state.keys()
    assert found.extra.keys() == {name for name in trained.state_dict() if name.startswith("head.")}
    values = sum(t.numel() for t in (*found.state.values(), *found.extra.values()))
    assert sentence.startswith(f"{out}: {len(base.state) + len(found.extra)} tensors, {values:,} values, ")
    assert found.sha256 != base.sha256
    torch.testing.assert_close(maps(build(MODEL, found, seed=9)), maps(trained), atol=1e-5, rtol=1e-5)
    other = maps(build(MODEL, replace(found, state=base.state), seed=9))  # the head alone is not the model
    assert (other - maps(trained)).abs().max() > 1e-3


def test_safetensors_export_says_what_it_is(run, base, tmp_path):
    export(run, tmp_path / "a.safetensors")
    described = json.loads(load_base(tmp_path / "a.safetensors").metadata["nucsam"])
    assert described["kind"] == "merged"
    assert described["base"] == {"sha256": base.sha256, "source": base.source}
    assert (described["epoch"], described["scores"]) == (3, None)
    assert described["config"]["model"]["width"] == 32


def test_scores_go_with_the_export(base, tmp_path):
    make_run(tmp_path / "run", base, MODEL)
    scores = {"dice": 0.5, "aji": 0.25, "pq": 0.125}
    write_text(tmp_path / "run" / "scores.json", json.dumps({"headline": scores, "scores": []}))
    export(tmp_path / "run", tmp_path / "a.safetensors")
    assert json.loads(load_base(tmp_path / "a.safetensors").metadata["nucsam"])["scores"] == scores


def test_same_run_same_export(run, tmp_path):
    export(run, tmp_path / "a.safetensors")
    export(run, tmp_path / "b.safetensors")
    a, b = load_base(tmp_path / "a.safetensors"), load_base(tmp_path / "b.safetensors")
    assert (a.sha256, a.metadata) == (b.sha256, b.metadata)
    assert state_sha256(a.extra) == state_sha256(b.extra)


def test_exporting_leaves_the_run_alone(run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    export(run, tmp_path / "a.safetensors")
    assert len(before) == 3
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("format", FORMATS)
def test_existing_file_is_refused_without_force(run, tmp_path, format):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(ValueError) as caught:
        export(run, out, format=format)
    assert str(caught.value) == f"{out}: exists; --force replaces it"
    assert out.read_bytes() == b"precious"
    export(run, out, format=format, force=True)
    assert len(load_file(out)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_unknown_format(run, tmp_path):
    with pytest.raises(ValueError, match=r"found 'onyx', expected one of safetensors, mobile-sam"):
        export(run, tmp_path / "a.onyx", format="onyx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [("adapter.safetensors", "no such file"), ("config.toml", "found no config.toml, expected a run")],
)
@pytest.mark.parametrize("format", FORMATS)
def test_run_without_an_adapter_or_a_configuration(base, tmp_path, missing, words, format):
    make_run(tmp_path / "run", base, MODEL)
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(ValueError, match=words) as caught:
        export(tmp_path / "run", tmp_path / "a.safetensors", format=format)
    assert str(tmp_path / "run") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
