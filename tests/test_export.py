"""A run as one file: with nucsam, stock MobileSAM, onnxruntime, and as an adapter."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import whole_scores
from PIL import Image
from safetensors.torch import load_file
from scipy.special import expit

import nucsam
from nucsam import __version__
from nucsam.config import Config, Data, Instances, Model, Train, to_toml
from nucsam.data.images import read_label
from nucsam.errors import UserError
from nucsam.export import graph
from nucsam.export.merged import FORMATS, export_run
from nucsam.files import write_text
from nucsam.model.instances import from_depth
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import Base, build_sam, load_base, state_sha256
from nucsam.predict.onnx import resized
from nucsam.predict.pytorch import open_model
from nucsam.run.checkpoint import read_tensors, save_adapter, write_tensors

MODEL = Model(width=32, weights="none", rank=2, alpha=6.0, adapt=0.25)
IMAGES = 255 * torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
PIXELS = 255 * torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(3))
SCORES = {"dice": 0.5, "aji": 0.25, "pq": 0.125}


def make_run(run: Path, base: Base, model: Model) -> Nucsam:
    """A finished run as training leaves it, and its model."""
    net, generator = build_model(model, base, seed=0).eval(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.trainable().values():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    write_tensors(run / "base.safetensors", base.state, {"kind": "base", "source": base.source})
    config = Config(
        Data(root="/home/somebody/secret/Slides of 2024", crop=64, scale=2.0),
        model=model,
        instances=Instances(foreground=0.4),
        train=Train(epochs=3, validate_every=1),
    )
    facts = {"config": config.to_dict(), "base": {"sha256": base.sha256, "source": base.source}}
    facts |= {"epoch": 3, "mpp": 0.25, "precision": "bf16", "version": "0.0.7"}
    facts |= {"nucleus_area": 150.0, "selected": {"epoch": 3, "certainty": 0.875}}
    save_adapter(run / "adapter.safetensors", net.trainable(), facts)
    files = {
        "config.toml": to_toml(config),
        "metrics.jsonl": "".join(json.dumps({"epoch": epoch}) + "\n" for epoch in (1, 2, 3)),
        "scores.json": json.dumps(whole_scores(headline=SCORES)),
        "environment.json": json.dumps({"command": ["/home/somebody/bin/nucsam"]}),
    }
    for name, text in files.items():
        write_text(run / name, text)
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


def test_a_file_adapts_as_the_export_was_told(run, tmp_path):
    for name, options in (("as the run", {}), ("adapts", {"adapt": 0.06})):
        export_run(run, tmp_path / f"{name}.safetensors", **options)
    assert nucsam.load(tmp_path / "as the run.safetensors").adapt == MODEL.adapt == 0.25
    adapts = nucsam.load(tmp_path / "adapts.safetensors")
    asked = nucsam.load(tmp_path / "as the run.safetensors", adapt=0.06)
    pixels = np.zeros((1, 64, 96, 3), np.uint8)
    pixels[:, :, 40:] = 200
    expected, found = (p.maps(pixels, (64, 96), (64, 96)) for p in (asked, adapts))
    np.testing.assert_array_equal(found, expected)
    plain = nucsam.load(tmp_path / "as the run.safetensors").maps(pixels, (64, 96), (64, 96))
    assert adapts.adapt == 0.06 and np.abs(found - plain).max() > 1e-3
    with pytest.raises(UserError, match=r"model\.adapt: found 2"):
        export_run(run, tmp_path / "much.safetensors", adapt=2.0)


def test_stock_mobile_sam_loads_the_export_and_gives_our_embedding(run, base, trained, tmp_path):
    from mobile_sam import sam_model_registry

    for suffix in (".pt", ".safetensors"):
        out = tmp_path / f"merged{suffix}"
        sentence = export_run(run, out, format="" if suffix == ".pt" else "sam")
        assert sentence.startswith(f"{out}: {len(base.state)} tensors, ")
        assert sentence.endswith(f", {out.stat().st_size / 2**20:.2f} MiB")
    build = sam_model_registry["vit_t"]
    stock = build(checkpoint=str(tmp_path / "merged.pt"))  # loads with strict=True
    embedding = stock_embedding(stock)
    assert embedding.shape == (1, 256, 64, 64)
    torch.testing.assert_close(embedding, our_embedding(trained), atol=1e-4, rtol=0)
    # The same tensors in the other file, and another embedding than the base's
    tensors = load_file(tmp_path / "merged.safetensors")
    assert tensors.keys() == base.state.keys()
    assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in tensors.items())
    stock.load_state_dict(base.state, strict=True)
    assert (embedding - stock_embedding(stock)).abs().max() > 0.05
    assert set(torch.load(tmp_path / "merged.pt", weights_only=True)) == set(base.state)


@pytest.mark.parametrize("train", ["full", "head"])
def test_stock_mobile_sam_loads_exports_of_the_sam_head(base, tmp_path, train):
    net = make_run(tmp_path / "run", base, Model(head="sam", train=train, weights="none"))
    export_run(tmp_path / "run", tmp_path / "merged.safetensors", format="sam")
    state = load_file(tmp_path / "merged.safetensors")
    build_sam().load_state_dict(state, strict=True)
    ours = net.state_dict()
    assert all(torch.equal(state[name], ours[name]) for name in net.trainable())
    changed = {name for name in state if not torch.equal(state[name], base.state[name])}
    assert changed == net.trainable().keys()
    again = load_base(tmp_path / "merged.safetensors")
    same = build_model(Model(head="sam", train="head"), again, seed=7)
    torch.testing.assert_close(maps(same), maps(net), atol=1e-5, rtol=1e-5)


def test_safetensors_export_is_a_base_with_its_head(run, base, trained, tmp_path):
    out = tmp_path / "new" / "nuclei.safetensors"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    sentence = export_run(run, out)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    merged = load_base(out)
    head = {name for name in trained.state_dict() if name.startswith("head.")}
    assert (merged.state.keys(), merged.extra.keys()) == (base.state.keys(), head)
    values = sum(t.numel() for t in (*merged.state.values(), *merged.extra.values()))
    assert f": {len(merged.state) + len(head)} tensors, {values:,} values, " in sentence
    assert merged.sha256 != base.sha256
    same = build_model(MODEL, merged, seed=9)
    torch.testing.assert_close(maps(same), maps(trained), atol=1e-5, rtol=1e-5)
    head_alone = build_model(MODEL, replace(merged, state=base.state), seed=9)
    assert (maps(head_alone) - maps(trained)).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["safetensors", "sam", "adapter"])
def test_metadata_is_all_that_prediction_needs_and_no_path(run, base, tmp_path, format):
    export_run(run, tmp_path / "a.safetensors", format=format)
    metadata = read_tensors(tmp_path / "a.safetensors")[1]
    assert metadata["kind"] == {"safetensors": "merged"}.get(format, format)
    assert metadata["base"] == {"sha256": base.sha256, "source": base.source}
    config = Config.from_dict(metadata["config"])
    assert (config.data.scale, config.instances.foreground, config.model) == (2.0, 0.4, MODEL)
    assert config.data.root == metadata["data"] == "Slides of 2024"
    expected = {"epoch": 3, "mpp": 0.25, "precision": "bf16", "version": __version__}
    expected |= {"nucleus_area": 150.0, "selected": {"epoch": 3, "certainty": 0.875}}
    expected |= {"scores": SCORES, "scores_of": "test"}
    assert {name: metadata[name] for name in expected} == expected
    assert "somebody" in (run / "config.toml").read_text()
    assert "somebody" not in json.dumps(metadata)


def test_thresholds_changed_in_the_run_go_with_the_export(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    text = (run / "config.toml").read_text()
    changed = text.replace("foreground = 0.4", "foreground = 0.7")
    write_text(tmp_path / "run" / "config.toml", changed)
    export_run(tmp_path / "run", tmp_path / "a.safetensors")
    assert open_model(tmp_path / "a.safetensors")[1].instances.foreground == 0.7


# ---- refusals ----

NAMES = {
    "safetensors": "a.safetensors",
    "sam": "a.pt",
    "onnx": "a.onnx",
    "adapter": "a.safetensors",
}


@pytest.mark.parametrize("format", FORMATS)
def test_existing_file_is_replaced_with_force_alone(run, tmp_path, format):
    out = tmp_path / NAMES[format]
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match=rf"{out}: "):
        export_run(run, out, format=format)
    assert out.read_bytes() == b"precious"
    if format == "onnx":  # takes half a minute
        return
    export_run(run, out, format=format, force=True)
    assert out.stat().st_size > 10**5
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    "name, text, found",
    [
        ("metrics.jsonl", '{"epoch": 1}\n{"epoch": 2}\n', "2 of 3 epochs"),
        ("metrics.jsonl", None, "0 of 3 epochs"),
        ("scores.json", None, "3 of 3 epochs"),
        ("scores.json", "{}", "scores.json: "),
        ("adapter.safetensors", None, "adapter.safetensors: "),
        ("config.toml", None, "found no config.toml"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_unfinished_and_incomplete_runs_are_refused(run, tmp_path, format, name, text, found):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if text is not None:
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        export_run(tmp_path / "run", tmp_path / NAMES[format], format=format, force=True)
    assert str(tmp_path / "run") in str(caught.value)
    assert not (tmp_path / NAMES[format]).exists()


@pytest.mark.parametrize(
    "name, format",
    [("a.onnx", "adapter"), ("a.safetensors", "onnx"), ("a.pt", "safetensors"), ("a.pt", "onnx")],
)
def test_a_suffix_of_another_format_is_refused(run, tmp_path, name, format):
    with pytest.raises(UserError, match=f"^out: found .*{name} for the format {format}, "):
        export_run(run, tmp_path / name, format=format)


# ---- adapters ----


@pytest.mark.parametrize("format", ["safetensors", "sam"])
def test_an_adapter_and_its_base_give_the_same_file_as_the_run(run, tmp_path, format):
    adapter = tmp_path / "adapter.safetensors"
    export_run(run, adapter, format="adapter")
    export_run(run, tmp_path / "a.safetensors", format=format)
    base = str(run / "base.safetensors")
    export_run(adapter, tmp_path / "b.safetensors", format=format, base=base)
    (state, metadata), again = (read_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert metadata == again[1]
    assert state_sha256(state) == state_sha256(again[0])


@pytest.mark.parametrize("format", FORMATS)
def test_another_base_than_the_adapters_is_refused(run, tmp_path, format):
    export_run(run, tmp_path / "adapter.safetensors", format="adapter")
    other = load_base("none", seed=8)
    shutil.copytree(run, tmp_path / "run")
    replaced = tmp_path / "run" / "base.safetensors"
    write_tensors(replaced, other.state, {"kind": "base", "source": "another"})
    for source, options in (
        (tmp_path / "adapter.safetensors", {"base": str(replaced)}),
        (tmp_path / "run", {}),
    ):
        with pytest.raises(UserError, match=r"adapter\.safetensors: "):
            export_run(source, tmp_path / NAMES[format], format=format, **options)
    assert not (tmp_path / NAMES[format]).exists()


def test_an_export_that_has_lost_its_head_is_no_model(run, tmp_path):
    export_run(run, tmp_path / "a.safetensors")
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    headless = {name: t for name, t in tensors.items() if not name.startswith("head.")}
    write_tensors(tmp_path / "b.safetensors", headless, metadata)
    with pytest.raises(UserError, match=r"b\.safetensors: "):
        open_model(tmp_path / "b.safetensors")


# ---- ONNX ----


@pytest.fixture(scope="module")
def onnx(run, tmp_path_factory) -> tuple[Path, str]:
    """An export of the run, and its sentence."""
    out = tmp_path_factory.mktemp("onnx") / "nuclei.onnx"
    return out, export_run(run, out)


@torch.no_grad()
def test_onnx_gives_our_maps_at_any_batch_and_size(onnx, trained):
    out, sentence = onnx
    assert float(sentence.split("at most ")[1].split()[0]) < 1e-4
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(7)
    # Scale 2: sides are multiples of 16 image px
    for batch, height, width in ((1, 32, 48), (3, 64, 32), (2, 112, 80)):
        images = 255 * torch.rand(batch, 3, height, width, generator=generator)
        (graph_maps,) = session.run(None, {"image": images.numpy()})
        size = 2 * height, 2 * width
        larger = torch.nn.functional.interpolate(images, size=size, mode="bilinear")
        raw = trained(larger, (height, width))
        logits = raw.numpy()
        foreground = 1 - np.exp(logits[:, 0]) / np.exp(logits[:, :3]).sum(1)
        expected = np.stack([foreground, expit(logits[:, 3])], 1)
        assert graph_maps.shape == (batch, 2, height, width)
        np.testing.assert_allclose(graph_maps, expected, atol=1e-4)
        assert expected.std() > 0.01
        options = Instances(foreground=0.4, confidence=0.0, area=5)
        nuclei = from_depth(*graph_maps[0], options)
        assert np.array_equal(
            nuclei, trained.instances(trained.probabilities(raw)[0].numpy(), options)
        )


IMAGE = np.kron(
    np.random.default_rng(0).integers(0, 256, (24, 28, 3)), np.ones((8, 8, 1), int)
).astype(np.uint8)[:187, :219]
# Thresholds in the middle of an untrained model's maps, where they give many nuclei
UNSURE = Instances(foreground=0.5, confidence=0.0, area=5, seed_rise=0.001)


def dense_maps(file: Path, image: np.ndarray = IMAGE, mpp: float | None = None, **options):
    """A model in small tiles, and its maps of an image."""
    p = nucsam.load(file, device="cpu", tile=64, overlap=8, **options)
    p.autocast = None  # the run's metadata say bf16
    whole = replace(p, core=2**31)
    ((tiles, *part),) = whole._stream([whole.grid(image, mpp=mpp)])
    return p, tiles.stitch(*part)


def label_maps(file: Path, image: np.ndarray = IMAGE, **options) -> tuple[np.ndarray, np.ndarray]:
    """Maps and nuclei of an image, at the median of the foreground."""
    p, maps = dense_maps(file, image, **options)
    p.instances = replace(UNSURE, foreground=float(np.median(maps[0])))
    return maps, p.predict(image)


@pytest.mark.parametrize("options", [{"batch": 3}, {"tta": True, "image": IMAGE[:107, :107]}])
def test_onnx_gives_the_same_tiles_and_nuclei(run, onnx, options):
    """Of an image whose sides are no multiple of the graph's."""
    (maps, label), (same, again) = (label_maps(file, **options) for file in (run, onnx[0]))
    np.testing.assert_allclose(same, maps, atol=1e-5)
    assert label.max() > 20 and maps[0].std() > 0.003
    assert (again != label).mean() < 1e-3


def test_onnx_has_the_share_that_it_was_exported_with(run, onnx):
    """The run's norms adapt to each image, unless they are told not to. The graph's always do."""
    part = IMAGE[:107, :107]
    (_, maps), (_, plain) = (dense_maps(run, part, adapt=share) for share in (MODEL.adapt, 0.0))
    assert np.abs(plain - maps).mean() > 1e-3
    np.testing.assert_array_equal(dense_maps(run, part)[1], maps)
    assert nucsam.load(onnx[0], adapt=MODEL.adapt).adapt == MODEL.adapt
    with pytest.raises(UserError, match=r"^adapt: found 0, but .*nuclei\.onnx has 0\.25"):
        nucsam.load(onnx[0], adapt=0.0)
    with pytest.raises(UserError, match=r"^model\.adapt: found 6.0, expected a number"):
        nucsam.load(onnx[0], adapt=6.0)


def test_onnx_knows_how_large_nuclei_are(onnx):
    model = nucsam.load(onnx[0], auto_scale=True)
    assert model.nucleus_area == 150 and model.grid(IMAGE).scale > 0
    assert nucsam.load(onnx[0]).nucleus_area == 0


def test_onnx_knows_how_certain_a_model_usually_is(onnx):
    assert nucsam.load(onnx[0]).certainty == 0.875
    assert nucsam.load(onnx[0], lenient=False).certainty == 0


def test_onnx_at_another_magnification_is_near(run, onnx):
    (_, maps), (_, near) = (dense_maps(file, mpp=0.3) for file in (run, onnx[0]))
    assert near.shape == maps.shape
    moved = np.roll(maps, 4, axis=1)
    for k in range(2):
        assert np.corrcoef(near[k].ravel(), maps[k].ravel())[0, 1] > 0.95
        assert np.corrcoef(moved[k].ravel(), maps[k].ravel())[0, 1] < 0.7


def test_resized_is_pytorchs_interpolation():
    maps = np.random.default_rng(0).random((2, 3, 17, 24), np.float32)
    for size in ((17, 24), (32, 16), (5, 50)):
        expected = torch.nn.functional.interpolate(torch.from_numpy(maps), size, mode="bilinear")
        np.testing.assert_allclose(resized(maps, size), expected.numpy(), atol=1e-4)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    absent = name.split(".")[0] in ("torch", "accelerate", "timm", "mobile_sam", "safetensors")
    return None if absent else find(name, path, target)
PathFinder.find_spec = find_spec
import nucsam
from nucsam.cli import run_command
print(nucsam.load(sys.argv[2]).tile, *(name for name in nucsam.__all__ if name in dir(nucsam)))
sys.exit(run_command(sys.argv[1:]))
"""


def test_onnx_predicts_where_torch_is_absent(run, onnx, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")

    def predict(model: Path, out: str) -> subprocess.CompletedProcess:
        command = ["predict", model, tmp_path / "a.png", "--out", tmp_path / out, "--device", "cpu"]
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *map(str, command)],
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = predict(onnx[0], "absent")
    assert done.returncode == 0, done.stderr
    public = ["Predictor", "UserError", "__version__", "load", "predict_files"]
    assert done.stdout.split() == ["256", *public]
    expected = nucsam.load(onnx[0], device="cpu").predict(IMAGE)
    np.testing.assert_array_equal(read_label(tmp_path / "absent" / "a.tif"), expected)
    refused = predict(run, "refused")
    assert "UserError" in refused.stderr and str(run) in refused.stderr


@pytest.mark.parametrize("content", [None, b"no graph"])
def test_what_is_no_graph_is_refused_by_name(tmp_path, content):
    if content:
        (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.onnx: "):
        nucsam.load(tmp_path / "a.onnx")


def test_a_graph_runs_on_devices_that_are_there(onnx):
    for device in ("cuda", "mps", "gpu", "cpu:0", "auto:1", None):
        with pytest.raises(UserError, match=f"^device: found '{device}'"):
            nucsam.load(onnx[0], device=device)
    assert nucsam.load(onnx[0], device=torch.device("cpu")).session


def test_requirements_without_torch_are_those_of_setup_cfg():
    root = Path(__file__).parents[1]
    setup = {line.strip() for line in (root / "setup.cfg").read_text("utf-8").splitlines()}
    lines = (root / "launch" / "requirements-onnx.txt").read_text("utf-8").splitlines()
    needed = {line for line in lines if not line.startswith("#")}
    assert len(needed) > 5 and needed <= setup


def test_onnx_says_what_it_is(onnx):
    session = onnxruntime.InferenceSession(onnx[0], providers=["CPUExecutionProvider"])
    entries = session.get_modelmeta().custom_metadata_map
    metadata = json.loads(entries["nucsam"])
    assert (entries["maps"], entries["multiple"]) == ("foreground,depth", "16")
    assert metadata["kind"] == "graph"
    assert metadata["config"]["data"]["scale"] == 2.0
    assert metadata["config"]["instances"]["foreground"] == 0.4
    assert "somebody" not in str(entries)
    for text in (b"site-packages", str(Path(nucsam.__file__).parent).encode()):
        assert text not in onnx[0].read_bytes()
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1]) == ("image", "tensor(float)", 3)
    assert output.name == "maps"


def test_a_graph_of_other_maps_is_not_written(onnx, run, base, tmp_path, monkeypatch):
    """The file of another model stands for an export that went wrong."""

    class Program:
        class model:
            metadata_props: dict[str, str] = {}  # noqa: RUF012
            graph = ()

        def save(self, path, external_data):
            shutil.copy(onnx[0], path)

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    export_run(run, tmp_path / "same.onnx", format="onnx")
    make_run(tmp_path / "run", base, replace(MODEL, rank=3))
    with pytest.raises(RuntimeError, match="onnxruntime"):
        export_run(tmp_path / "run", tmp_path / "other.onnx", format="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "same.onnx"}


@pytest.mark.parametrize(
    ("scale", "multiple", "model_px"),
    [(1.0, 32, 32), (2.0, 16, 32), (0.5, 64, 32), (1.5, 64, 96), (1.3, 320, 416)],
)
def test_sides_of_a_graph_are_whole_on_both_scales(trained, scale, multiple, model_px):
    made = graph.Graph(trained, scale)
    assert (made.multiple, made.model_px) == (multiple, model_px)


@torch.no_grad()
def test_graph_of_the_sam_head_gives_its_foreground(base):
    net = build_model(Model(head="sam", train="head", weights="none"), base, seed=0).eval()
    made = graph.Graph(net, 1.0)
    assert made.names == ("foreground",)
    torch.testing.assert_close(made(IMAGES), maps(net).sigmoid())
