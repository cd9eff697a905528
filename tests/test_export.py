import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import expit

from nucsam import __version__, graph
from nucsam.atomic import write_text
from nucsam.base import Base, build_sam, load_base, state_sha256
from nucsam.checkpoint import open_run, read_tensors, save_adapter, write_tensors
from nucsam.config import Config, Data, Instances, Model, Train, to_toml
from nucsam.export import FORMATS, export
from nucsam.instances import from_depth
from nucsam.model import Nucsam, build
from nucsam.predict import open_model

MODEL = Model(width=32, weights="none", rank=2, alpha=6.0)
IMAGES = 255 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
PIXELS = 255 * torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(3))


SCORES = {"dice": 0.5, "aji": 0.25, "pq": 0.125}
VERSIONS = {"nucsam": "0.0.7", "python": "3.11.1", "packages": {"torch": "2.6.0"}}


def make_run(run: Path, base: Base, model: Model) -> Nucsam:
    """A finished run as training leaves it, and its model."""
    net, generator = build(model, base, seed=0).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.trainable().values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    write_tensors(run / "base.safetensors", base.state, {"kind": "base", "source": base.source})
    data = Data(root="/home/somebody/secret/Slides of 2024", crop=64, scale=2.0)
    config = Config(data, model=model, instances=Instances(foreground=0.4), train=Train(epochs=3, validate_every=1))
    write_text(run / "config.toml", to_toml(config))
    facts = {"config": config.to_dict(), "base": {"sha256": base.sha256, "source": base.source}}
    facts |= {"epoch": 3, "mpp": 0.25, "precision": "bf16", "version": "0.0.7"}
    save_adapter(run / "adapter.safetensors", net.trainable(), facts)
    write_text(run / "metrics.jsonl", "".join(json.dumps({"epoch": epoch}) + "\n" for epoch in (1, 2, 3)))
    write_text(run / "scores.json", json.dumps({"images_of": "test", "headline": SCORES, "scores": []}))
    write_text(run / "environment.json", json.dumps({**VERSIONS, "command": ["/home/somebody/bin/nucsam"]}))
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


@pytest.mark.parametrize("format", ["safetensors", "mobile-sam", "adapter"])
def test_metadata_is_all_that_prediction_needs_and_no_path(run, base, tmp_path, format):
    export(run, tmp_path / "a.safetensors", format=format)
    described = read_tensors(tmp_path / "a.safetensors")[1]
    assert described["kind"] == {"safetensors": "merged"}.get(format, format)
    assert described["base"] == {"sha256": base.sha256, "source": base.source}
    config = Config.from_dict(described["config"])
    assert (config.data.scale, config.instances.foreground, config.model) == (2.0, 0.4, MODEL)
    assert config.data.root == described["data"] == "Slides of 2024"
    assert {
        key: described[key] for key in ("epoch", "mpp", "precision", "version", "versions", "scores", "scores_of")
    } == {
        "epoch": 3,
        "mpp": 0.25,
        "precision": "bf16",
        "version": __version__,
        "versions": VERSIONS,
        "scores": SCORES,
        "scores_of": "test",
    }
    assert "somebody" in (run / "config.toml").read_text()
    assert "somebody" not in json.dumps(described)


def test_thresholds_changed_in_the_run_go_with_the_export(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    text = (run / "config.toml").read_text()
    assert text.count("foreground = 0.4") == 1
    write_text(tmp_path / "run" / "config.toml", text.replace("foreground = 0.4", "foreground = 0.7"))
    export(tmp_path / "run", tmp_path / "a.safetensors")
    assert open_model(tmp_path / "a.safetensors")[1].instances.foreground == 0.7


def test_predicting_with_the_export_equals_base_and_adapter_and_differs_from_the_base(run, base, trained, tmp_path):
    export(run, tmp_path / "a.safetensors")
    net, config, metadata = open_model(tmp_path / "a.safetensors")
    assert (config.data.scale, metadata["mpp"]) == (2.0, 0.25)
    torch.testing.assert_close(maps(net), maps(trained), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps(net), maps(open_run(run)[0]), atol=1e-5, rtol=1e-5)
    untrained = build(MODEL, base, seed=0)
    untrained.head.load_state_dict(net.head.state_dict())
    assert (maps(untrained) - maps(net)).abs().max() > 1e-3


def test_same_run_same_export(run, tmp_path):
    export(run, tmp_path / "a.safetensors")
    export(run, tmp_path / "b.safetensors")
    a, b = load_base(tmp_path / "a.safetensors"), load_base(tmp_path / "b.safetensors")
    assert (a.sha256, a.metadata) == (b.sha256, b.metadata)
    assert state_sha256(a.extra) == state_sha256(b.extra)


def test_exporting_leaves_the_run_alone(run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    export(run, tmp_path / "a.safetensors")
    assert len(before) == 6
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("format", FORMATS)
def test_existing_file_is_refused_without_force(run, tmp_path, format):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(ValueError) as caught:
        export(run, out, format=format)
    assert str(caught.value) == f"{out}: exists; --force replaces it"
    assert out.read_bytes() == b"precious"
    if format == "onnx":  # takes half a minute
        return
    export(run, out, format=format, force=True)
    assert len(load_file(out)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_unknown_format(run, tmp_path):
    with pytest.raises(ValueError, match=r"found 'onyx', expected one of safetensors, mobile-sam, onnx, adapter"):
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


@pytest.mark.parametrize("format", FORMATS)
def test_unfinished_runs_are_refused(run, tmp_path, format):
    def refused(name: str, text: str | None, words: str) -> None:
        unfinished, out = tmp_path / "run", tmp_path / "a.safetensors"
        shutil.copytree(run, unfinished)
        (unfinished / name).unlink() if text is None else (unfinished / name).write_text(text)
        with pytest.raises(ValueError) as caught:
            export(unfinished, out, format=format, force=True)
        resume = f"nucsam train {unfinished / 'config.toml'} --out {unfinished} --resume finishes it"
        assert str(caught.value) == f"{unfinished}: found an unfinished run, {words}; {resume}"
        assert not out.exists()
        shutil.rmtree(unfinished)

    refused("metrics.jsonl", '{"epoch": 1}\n{"epoch": 2}\n', "2 of 3 epochs")
    refused("metrics.jsonl", None, "0 of 3 epochs")
    refused("scores.json", None, "3 of 3 epochs and no scores.json")


# ---- adapters ----


def state_of(path: Path) -> str:
    return state_sha256(load_file(path))


@pytest.mark.parametrize("format", ["safetensors", "mobile-sam"])
def test_an_adapter_and_its_base_give_the_same_file_as_the_run(run, tmp_path, format):
    export(run, tmp_path / "adapter.safetensors", format="adapter")
    export(run, tmp_path / "a.safetensors", format=format)
    base = str(run / "base.safetensors")
    export(tmp_path / "adapter.safetensors", tmp_path / "b.safetensors", format=format, base=base)
    (_, first), (_, second) = (read_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert state_of(tmp_path / "a.safetensors") == state_of(tmp_path / "b.safetensors")
    assert first == second


def test_an_adapter_without_its_head_is_small_and_fits_stock_mobile_sam(base, tmp_path):
    make_run(tmp_path / "run", base, Model(weights="none"))  # rank 4
    export(tmp_path / "run", tmp_path / "lora.safetensors", format="adapter", without_head=True)
    assert (tmp_path / "lora.safetensors").stat().st_size < 1e6
    tensors, described = read_tensors(tmp_path / "lora.safetensors")
    assert len(tensors) == 40  # A and B of qkv and proj of ten blocks
    assert all(name.startswith("image_encoder.") and ".lora_" in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == 44_544
    assert described["kind"] == "adapter of the encoder"
    export(tmp_path / "run", tmp_path / "a.pt", format="mobile-sam")
    options = {"base": str(tmp_path / "run" / "base.safetensors")}
    export(tmp_path / "lora.safetensors", tmp_path / "b.pt", format="mobile-sam", **options)
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab")
    assert state_sha256(first) == state_sha256(second)
    # A model without a head is a base to train on, and nothing to predict with
    export(tmp_path / "lora.safetensors", tmp_path / "encoder.safetensors", **options)
    found = load_base(tmp_path / "encoder.safetensors")
    assert (found.sha256, found.extra) == (state_sha256(first), {})
    with pytest.raises(ValueError, match="found a file of kind 'encoder'"):
        open_model(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="found an adapter without a head, which --format onnx needs"):
        export(tmp_path / "lora.safetensors", tmp_path / "a.onnx", format="onnx", **options)
    shutil.copy(tmp_path / "lora.safetensors", tmp_path / "run" / "adapter.safetensors")
    with pytest.raises(ValueError, match="found a file of kind 'adapter of the encoder', expected 'adapter'"):
        export(tmp_path / "run", tmp_path / "c.safetensors")


def test_another_base_than_the_adapters_is_refused(run, base, tmp_path):
    export(run, tmp_path / "adapter.safetensors", format="adapter")
    other = load_base("none", seed=8)
    write_tensors(tmp_path / "other.safetensors", other.state, {"kind": "base", "source": "another"})
    for format in ("safetensors", "mobile-sam", "onnx", "adapter"):
        with pytest.raises(ValueError) as caught:
            export(
                tmp_path / "adapter.safetensors",
                tmp_path / "a",
                format=format,
                base=str(tmp_path / "other.safetensors"),
            )
        assert str(caught.value) == (
            f"{tmp_path / 'adapter.safetensors'}: trained on the base {base.sha256[:12]} ({base.source}), "
            f"found the base {other.sha256[:12]} ({tmp_path / 'other.safetensors'})"
        )
    # and of a run, whose base has been replaced
    shutil.copytree(run, tmp_path / "run")
    write_tensors(tmp_path / "run" / "base.safetensors", other.state, {"kind": "base", "source": "another"})
    with pytest.raises(ValueError, match=f"trained on the base {base.sha256[:12]}"):
        export(tmp_path / "run", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_options_that_do_not_belong_together(run, base, tmp_path):
    make_run(tmp_path / "run", base, replace(MODEL, train="head"))
    for source, words, options in (
        (run, "--without-head: found --format onnx, expected adapter", {"format": "onnx", "without_head": True}),
        (run, "--base: found the run .*, which names its base; expected an adapter file", {"base": "auto"}),
        (tmp_path / "run", "trained nothing but a head", {"format": "adapter", "without_head": True}),
    ):
        with pytest.raises(ValueError, match=words):
            export(source, tmp_path / "a.safetensors", **options)
    export(run, tmp_path / "merged.safetensors")
    with pytest.raises(ValueError, match="found a file of kind 'merged', expected 'adapter'"):
        export(tmp_path / "merged.safetensors", tmp_path / "a.onnx", format="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "merged.safetensors"}


# ---- ONNX ----


@pytest.fixture(scope="module")
def onnx(run, tmp_path_factory) -> tuple[Path, str]:
    """An export of the run, and its sentence."""
    out = tmp_path_factory.mktemp("onnx") / "nuclei.onnx"
    return out, export(run, out, format="onnx")


@torch.no_grad()
def test_onnx_gives_our_maps_at_any_batch_and_size(onnx, trained):
    out, sentence = onnx
    assert " from PyTorch's maps in onnxruntime, " in sentence
    assert float(sentence.split("at most ")[1].split()[0]) < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(7)
    for batch, height, width in ((1, 32, 48), (3, 64, 32), (2, 112, 80)):  # scale 2: multiples of 16 image px
        images = 255 * torch.rand(batch, 3, height, width, generator=generator)
        (found,) = session.run(None, {"image": images.numpy()})
        larger = torch.nn.functional.interpolate(images, size=(2 * height, 2 * width), mode="bilinear")
        logits = trained(larger, (height, width)).numpy()
        foreground = 1 - np.exp(logits[:, 0]) / np.exp(logits[:, :3]).sum(1)
        expected = np.stack([foreground, expit(logits[:, 3])], 1)
        assert found.shape == (batch, 2, height, width)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert expected.std() > 0.01
        options = Instances(foreground=0.4, confidence=0.0, area=5)
        nuclei = from_depth(*found[0], threshold=0.4, area=5)
        assert np.array_equal(nuclei, trained.instances(logits[0], options))


def test_onnx_says_what_it_is(onnx):
    session = onnxruntime.InferenceSession(onnx[0], providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    described = json.loads(found["nucsam"])
    assert (found["maps"], found["multiple"], described["kind"]) == ("foreground,depth", "16", "graph")
    assert (described["config"]["data"]["scale"], described["config"]["instances"]["foreground"]) == (2.0, 0.4)
    assert "somebody" not in str(found)
    (image,), (maps) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1]) == ("image", "tensor(float)", 3)
    assert [output.name for output in maps] == ["maps"]


def test_a_graph_of_other_maps_is_not_written(onnx, run, base, tmp_path, monkeypatch):
    """The file of another model stands for an export that went wrong."""

    class Program:
        class model:
            metadata_props: dict[str, str] = {}  # noqa: RUF012

        def save(self, path, external_data):
            shutil.copy(onnx[0], path)

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    export(run, tmp_path / "same.onnx", format="onnx")
    make_run(tmp_path / "run", base, replace(MODEL, rank=3))
    with pytest.raises(RuntimeError, match=r"onnxruntime and PyTorch differ by .*, expected at most 0\.001"):
        export(tmp_path / "run", tmp_path / "other.onnx", format="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "same.onnx"}


def test_onnx_without_its_packages(run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ValueError, match=r"onnxscript not installed; pip install 'nucsam\[onnx\]' brings them"):
        export(run, tmp_path / "a.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scale", "multiple", "model_px"), [(1.0, 32, 32), (2.0, 16, 32), (0.5, 64, 32), (1.5, 64, 96), (1.3, 320, 416)]
)
def test_sides_of_a_graph_are_whole_on_both_scales(trained, scale, multiple, model_px):
    found = graph.Graph(trained, scale)
    assert (found.multiple, found.model_px) == (multiple, model_px)


@torch.no_grad()
def test_graph_of_the_sam_head_gives_its_foreground(base):
    net = build(Model(head="sam", train="head", weights="none"), base, seed=0).eval()
    found = graph.Graph(net, 1.0)
    assert found.names == ("foreground",)
    torch.testing.assert_close(found(IMAGES), maps(net).sigmoid())
