"""What is damaged is refused by name and changes nothing; what is odd but legal is read."""

import builtins
import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from conftest import snapshot
from PIL import Image

from nucsam.config import load_config
from nucsam.data import draw, geojson
from nucsam.data.folders import find_records
from nucsam.data.images import read_image, read_label, read_mask, read_mpp, write_label
from nucsam.data.samples import Samples, read_nuclei
from nucsam.errors import UserError
from nucsam.export.merged import export_run
from nucsam.files import write_text
from nucsam.model.network import build_model
from nucsam.model.weights import load_base
from nucsam.predict.pytorch import open_model
from nucsam.run import checkpoint
from nucsam.run.directory import read_runs
from nucsam.train.loop import fit

H, W = 70, 90
ROWS, COLUMNS = np.mgrid[:H, :W]
RGB = np.stack([ROWS, COLUMNS, ROWS ^ COLUMNS], -1).astype(np.uint8)
GREY = RGB[..., 0]
IDS = np.zeros((H, W), np.uint16)
IDS[5:15, 5:15], IDS[30:40, 10:30], IDS[50:54, 60:66] = 2, 300, 9
WIDE = IDS.astype(np.int64)


@contextmanager
def refused(folder: Path, names: str) -> Iterator[None]:
    """A UserError that names something and leaves the folder as it is."""
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"(?s){names}"):
        yield
    assert snapshot(folder) == before


# ---- files of images, labels and settings ----


def encoded(array: np.ndarray, suffix: str, **options: object) -> bytes:
    """An array as the bytes of a file."""
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, array)
    elif suffix == ".tif":
        kind = "rgb" if array.shape[-1] == 3 else "minisblack"
        tifffile.imwrite(file, array, **{"photometric": kind} | options)
    else:
        return saved(Image.fromarray(array), suffix[1:].replace("jpg", "jpeg"))
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def read_outlines(path: Path) -> np.ndarray:
    return read_nuclei(path, (H, W))[0]


def damaged_files() -> Iterator[tuple]:
    """A title, the name of a file, its bytes, and what reads it."""
    outlines = json.dumps([*geojson.features(geojson.geometries(IDS))]).encode()
    wholes = [(".geojson", ".geojson", outlines, read_outlines)]
    for read, array, suffixes in (
        (read_image, RGB, (".png", ".jpg", ".bmp", ".tif")),
        (read_label, IDS, (".png", ".npy", ".tif")),
    ):
        wholes += [(suffix, suffix, encoded(array, suffix), read) for suffix in suffixes]
        for options in ({"compression": "zlib"}, {"tile": (32, 32)}, {"bigtiff": True}):
            wholes.append((f"{options}", ".tif", encoded(array, ".tif", **options), read))
    for title, suffix, whole, read in wholes:
        last = len(whole) - (9 if suffix == ".tif" else 15)
        for size in (0, 5, len(whole) // 10, len(whole) // 2, last):
            yield f"{title} cut at {size}", f"a{suffix}", whole[:size], read
    pages = encoded(np.moveaxis(RGB, -1, 0), ".tif", ome=True, metadata={"axes": "CYX"})
    assert len(pages) > 3 * H * W
    for part in (0.4, 0.6, 0.9):
        yield f"channels cut at {part}", "a.tif", pages[: int(part * len(pages))], read_image
    png = encoded(IDS, ".png")
    for place in range(png.index(b"IDAT"), png.index(b"IEND"), 12):
        flipped = png[:place] + bytes([png[place] ^ 16]) + png[place + 1 :]
        yield f"bit flipped in byte {place}", "a.png", flipped, read_label
    signed = saved(Image.fromarray(GREY + 90), "TIFF", compression="tiff_lzw", tiffinfo={339: 2})
    whole = encoded(WIDE, ".npy")
    for title, name, content, read in (
        ("text", "a.png", b"no image", read_image),
        ("text", "a.tif", b"no image", read_image),
        ("TIFF stack", "a.png", encoded(np.stack([RGB, RGB]), ".tif"), read_image),
        ("JPEG", "a.png", encoded(GREY, ".jpg"), read_label),
        ("lossy label", "a.jpg", encoded(GREY, ".jpg"), read_label),
        ("negative LZW", "a.tif", signed, read_label),
        ("sum for a shape", "a.npy", whole.replace(b"(70, 90)", b"(9**9,9)"), read_label),
        ("more rows than bytes", "a.npy", whole.replace(b"(70, 90)", b"(999,90)"), read_label),
        ("UTF-16", "a.geojson", b"\xff\xfe[", read_outlines),
        ("many brackets", "a.geojson", b"[" * 100_000, read_outlines),
        ("no features", "a.geojson", b'{"type": "FeatureCollection"}', read_outlines),
        ("a key twice", "a.toml", b"[train]\nepochs = 1\nepochs = 2", load_config),
        ("a table in a table", "a.toml", b"[train.epochs]\nx = 3", load_config),
        ("a list of tables", "a.toml", b"[[train]]\nepochs = 3", load_config),
        ("UTF-16", "a.toml", "[train]\n".encode("utf-16"), load_config),
        ("null bytes", "a.toml", b"\0" * 100, load_config),
        ("many digits", "a.toml", b"[train]\nepochs = " + b"9" * 5000, load_config),
        ("a thousand brackets", "a.toml", b"[train]\nepochs = " + b"[" * 1000, load_config),
    ):
        yield title, name, content, read


def odd_arrays() -> Iterator[tuple]:
    images = [np.zeros((5, H, W), np.uint8), np.zeros((2, 5, H, W), np.uint8), ROWS * 1j]
    images += [RGB.astype(np.float32), RGB * np.uint32(70_000), -ROWS]
    labels = [
        RGB,
        np.stack([WIDE] * 5),
        WIDE * 1j,
        WIDE.astype(np.float32) / 2,
        -WIDE,
        WIDE * 2**40,
    ]
    labels.append((WIDE * 2**23).astype(np.uint32))
    flat = [WIDE.ravel(), np.array(3), np.zeros((0, W), int), np.zeros((H, W), [("a", int)])]
    nine_channels = encoded(np.dstack([GREY] * 9), ".tif", planarconfig="contig")
    yield "nine channels", "a.tif", nine_channels, read_image
    for array in images:
        yield "odd", "a.tif", encoded(array, ".tif"), read_image
    for array in labels:
        yield "odd", "a.tif", encoded(array, ".tif"), read_label
    for array in (*labels, *flat, WIDE.astype(str), WIDE.astype("M8[s]")):
        yield "odd", "a.npy", encoded(array, ".npy"), read_label


def named(cases: Iterator[tuple]) -> list:
    return [pytest.param(*rest, id=f"{rest[0]} {title}") for title, *rest in cases]


@pytest.mark.parametrize("name, content, read", named([*damaged_files(), *odd_arrays()]))
def test_a_bad_file_is_named(name, content, read, tmp_path):
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path, re.escape(f"{tmp_path / name}: ")):
        read(tmp_path / name)


def odd_files() -> Iterator[tuple]:
    palette = Image.fromarray(GREY, "P")
    palette.putpalette([value for k in range(256) for value in (k, 255 - k, 7)])
    looked_up = np.dstack([GREY, 255 - GREY, np.full_like(GREY, 7)])
    yield "palette", "a.png", saved(palette, "PNG"), read_image, looked_up
    yield "JPEG", "a.png", encoded(RGB * 0, ".jpg"), read_image, RGB * 0
    for text in ("1-2.e", "", "nan", "1e999", "-3"):
        content = encoded(RGB, ".tif", description=f'<OME PhysicalSizeX="{text}"', metadata=None)
        yield f"size {text!r}", "a.tif", content, read_mpp, None
    yield "ids of a palette", "a.tif", saved(palette, "TIFF"), read_label, GREY
    yield "ids of a palette", "a.png", saved(palette, "PNG"), read_label, GREY
    yield "16 bits", "a.png", encoded(IDS, ".png"), read_label, IDS
    large = WIDE.astype(np.int32) * 50_000
    lzw = saved(Image.fromarray(large), "TIFF", compression="tiff_lzw")
    yield "LZW", "a.tif", lzw, read_label, large
    yield "bool", "a.npy", encoded(IDS > 0, ".npy"), read_label, IDS > 0
    yield "big-endian", "a.npy", encoded(IDS.astype(">u4"), ".npy"), read_label, IDS
    yield "big-endian", "a.tif", encoded(IDS, ".tif", byteorder=">"), read_label, IDS
    yield "Fortran order", "a.npy", encoded(np.asfortranarray(IDS), ".npy"), read_label, IDS
    yield "upper case", "a.TIF", encoded(IDS, ".tif"), read_label, IDS


@pytest.mark.parametrize("name, content, read, expected", named(odd_files()))
def test_an_odd_file_is_read(name, content, read, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(read(tmp_path / name), expected)


# ---- data sets ----


def plain(root: Path, stems: str | list[str] = "abc") -> Path:
    """A data set in the plain layout."""
    for kind, suffix, array in (("images", ".png", RGB), ("labels", ".tif", IDS)):
        for stem in stems:
            path = root / kind / f"{stem}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(array, suffix))
    return root


def read_all(root: Path) -> list[int]:
    """Numbers of nuclei."""
    samples = Samples(find_records(root))
    return [int(samples[k].label.max()) for k in range(len(samples))]


def replaced(name: str, make: Callable[[Path], object] = lambda path: None) -> Callable:
    """A change of a data set: `make` takes the place of an entry."""

    def change(root: Path) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(root.parent / "outside")
        make(path)

    return change


def writes(array: np.ndarray, suffix: str = ".tif") -> Callable:
    return lambda path: path.write_bytes(encoded(array, suffix))


DECOMPOSED = unicodedata.normalize("NFD", "é")
DATA_SETS = {
    "turned label": (replaced("labels/b.tif", writes(IDS.T.copy())), r"b\.tif: .*b\.png"),
    "PNG named .tif": (replaced("labels/b.tif", writes(IDS, ".png")), r"b\.tif: "),
    "vague area of floats": (replaced("vague/b.tif", writes(RGB / 2)), r"vague/b\.tif: "),
    "no images": (replaced("images"), "set: "),
    "no image": (replaced("images", Path.mkdir), "set: found no image"),
    "no labels": (replaced("labels"), r"a\.png.*b\.png.*c\.png"),
    "file for images": (replaced("images", Path.touch), "set: "),
    "stem in two forms": (partial(plain, stems=["é", DECOMPOSED]), f"/(é|{DECOMPOSED}).png: "),
    "links in a loop": (replaced("images/loop", lambda p: p.symlink_to(".")), r"loop/a\.png: "),
    "composed names": (partial(plain, stems=["x/1", "y/1", "z/x_1"]), r"/z/x_1\.png: "),
}
for name in ("images/b.png", "labels/b.tif"):
    for title, make in (
        ("empty", Path.touch),
        ("folder", Path.mkdir),
        ("pipe", os.mkfifo),
        ("dangling link", lambda path: path.symlink_to("gone")),
        ("link to itself", lambda path: path.symlink_to(path.name)),
        ("link to a folder", lambda path: path.symlink_to("..")),
    ):
        DATA_SETS[f"{name} {title}"] = (replaced(name, make), f"{re.escape(name)}: ")


@pytest.mark.parametrize("change, names", DATA_SETS.values(), ids=DATA_SETS)
def test_a_bad_data_set_is_named(change, names, tmp_path):
    change(plain(tmp_path / "set"))
    with refused(tmp_path, names):
        read_all(tmp_path / "set")


@pytest.mark.parametrize("name", ["images", "labels/b.tif", "images/b.png"])
def test_what_may_not_be_read_is_named(name, tmp_path, monkeypatch):
    root = plain(tmp_path / "set")

    def denying(function: Callable) -> Callable:  # file modes do not stop the superuser
        def denied(path: object, *args: object, **options: object) -> object:
            if str(path) == str(root / name):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return denied

    before = snapshot(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{re.escape(name)}: "):
        for module, function in ((builtins, "open"), (io, "open"), (os, "scandir")):
            patch.setattr(module, function, denying(getattr(module, function)))
        read_all(root)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("write", "content"),
    [
        (write_label, IDS),
        (draw.write_png, RGB),
        (geojson.write_geojson, []),
        (write_text, "new"),
        (partial(checkpoint.write_tensors, metadata={}), {}),
    ],
)
def test_a_failed_write_leaves_the_old_file(write, content, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk")

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", fail)
    with refused(tmp_path, re.escape(f"{path}: disk")):
        write(path, content)


NAMES = ["a b  c", "a [1] (b) {c}", "a\nb", "a'b\"c", "a%20#b", "naïve 核 🧬", "-rf", "a.tif.b"]
NAMES += [DECOMPOSED, os.fsdecode(b"a\xff"), "x" * 200]


@pytest.mark.parametrize("stem", NAMES, ids=ascii)
def test_any_name_is_read(stem, tmp_path):
    assert read_all(plain(tmp_path / "set", ["a", stem])) == [3, 3]


@pytest.mark.parametrize("name", ["images", "labels/b.tif", "images/b.png"])
def test_links_are_followed(name, tmp_path):
    root = plain(tmp_path / "set")
    replaced(name, lambda path: path.symlink_to(tmp_path / "outside"))(root)
    assert read_all(root) == [3, 3, 3]


# ---- runs, weights, exports ----


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> SimpleNamespace:
    """A run with its export and its base beside it, and another model on that base to load into."""
    config, run = tiny("train.epochs=1"), tmp_path_factory.mktemp("trained") / "run"
    fit(config, run)
    export_run(run, run / "export.safetensors")
    _, _, base, _ = checkpoint.open_run(run)
    torch.save(dict(base.state), run / "base.pt")
    model = build_model(config.model, base, seed=9)
    weights = model.trainable()
    average, before = ({k: p.detach().clone() for k, p in weights.items()} for _ in range(2))
    optimizer = torch.optim.AdamW(weights.values())
    state = {"weights": weights, "average": average, "optimizer": optimizer, "before": before}
    return SimpleNamespace(config=config, run=run, base=base, model=model, **state)


@contextmanager
def all_unchanged(trained: SimpleNamespace, folder: Path, name: str) -> Iterator[None]:
    """A UserError that names a file and changes neither the folder nor the model and its state."""
    with refused(folder, re.escape(name)):
        yield
    for tensors in (trained.weights, trained.average):
        assert all(torch.equal(tensors[key], p) for key, p in trained.before.items())
    assert not trained.optimizer.state


def run_copy(trained: SimpleNamespace, folder: Path) -> Path:
    """The run again. Its files are links, which `replace_file` breaks."""
    return Path(shutil.copytree(trained.run, folder / "run", copy_function=os.link))


def replace_file(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def take_state(path: Path, trained: SimpleNamespace) -> None:
    checkpoint.load_state(path, trained.weights, trained.average, trained.optimizer)


def export_beside(path: Path) -> None:
    export_run(path.parent, path.parents[1] / "out.safetensors")


TENSORS = {  # a file of a run, and what reads it
    "adapter.safetensors": lambda path, t: checkpoint.load_adapter(path, t.model, t.base),
    "state/last.safetensors": take_state,
    "base.safetensors": lambda path, _: checkpoint.open_run(path.parent),
    "export.safetensors": lambda path, _: open_model(path),
    "base.pt": lambda path, _: load_base(path),
}
BYTES = {
    "empty": lambda whole: b"",
    "cut in the header": lambda whole: whole[:30],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole[:-1],
}
HEADERS = {
    "header of 2^62 bytes": lambda whole: struct.pack("<Q", 2**62) + whole[8:],
    "no document": lambda whole: whole.replace(b'"nucsam"', b'"nucsom"', 1),
    "document no JSON": lambda whole: whole.replace(b'"nucsam":"{', b'"nucsam":"[', 1),
}
DAMAGES = [*itertools.product(TENSORS, BYTES), *itertools.product([*TENSORS][:-1], HEADERS)]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_file_of_tensors_is_named(name, damage, trained, tmp_path):
    path = run_copy(trained, tmp_path) / name
    replace_file(path, (BYTES | HEADERS)[damage](path.read_bytes()))
    with all_unchanged(trained, tmp_path, name):
        TENSORS[name](path, trained)


def becomes(value: Callable) -> Callable:
    def change(tensors: dict, _: dict) -> None:
        name = min(name for name, tensor in tensors.items() if tensor.ndim)
        tensors[name] = value(tensors[name])

    return change


CONTENTS = {
    "tensor missing": lambda tensors, _: tensors.pop(min(tensors)),
    "tensor too many": lambda tensors, _: tensors.update(x=torch.zeros(3)),
    "no tensors": lambda tensors, _: tensors.clear(),
    "twice the rows": becomes(lambda tensor: torch.cat([tensor, tensor])),
    "whole numbers": becomes(lambda tensor: tensor.long()),
    "NaN": becomes(lambda tensor: tensor * float("nan")),
    "no kind": lambda _, document: document.pop("kind"),
    "list for a kind": lambda _, document: document.update(kind=["adapter"]),
}
IDENTITY = {  # of an adapter
    "no base": lambda _, document: document.pop("base"),
    "text for a base": lambda _, document: document.update(base="x"),
    "base without source": lambda _, document: document["base"].pop("source"),
    "null for a base": lambda _, document: document["base"].update(sha256=None),
    "no configuration": lambda _, document: document.pop("config"),
}
PARTS = {  # parts of files by the prefix of their tensors
    "": "adapter.safetensors",
    "weights.": "state/last.safetensors",
    "average.": "state/last.safetensors",
    "optimizer.": "state/last.safetensors",
    "image_encoder.": "base.safetensors",
    "mask_decoder.": "export.safetensors",
    "head.": "export.safetensors",
}
LEGAL = [("optimizer.", "no tensors"), ("head.", "no tensors"), ("head.", "whole numbers")]
CHANGES = [pair for pair in itertools.product(PARTS, CONTENTS) if pair not in LEGAL]
CHANGES += [("", title) for title in IDENTITY]


@pytest.mark.parametrize("part, change", CHANGES)
def test_a_file_of_other_contents_is_named(part, change, trained, tmp_path):
    path = run_copy(trained, tmp_path) / PARTS[part]
    tensors, document = checkpoint.read_tensors(path)
    chosen = {name: tensors.pop(name) for name in [*tensors] if name.startswith(part)}
    (CONTENTS | IDENTITY)[change](chosen, document)
    path.unlink()
    checkpoint.write_tensors(path, tensors | chosen, document)
    with all_unchanged(trained, tmp_path, PARTS[part]):
        TENSORS[PARTS[part]](path, trained)


@pytest.mark.parametrize(
    "values", [None, {"step": "many"}, {**vars(checkpoint.Progress()), "x": 1}]
)
def test_what_is_no_progress_is_refused(values):
    with pytest.raises(UserError, match="last: "):
        checkpoint.read_progress(Path("last"), {"progress": values})


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["scores.json", "metrics.jsonl", "environment.json"])
def test_a_bad_report_of_a_run_is_named(name, content, trained, tmp_path):
    run = run_copy(trained, tmp_path)
    replace_file(run / name, content)
    with all_unchanged(trained, tmp_path, name):
        read_runs(run)
    if content == b"{" and name != "environment.json":  # which export does not read
        with all_unchanged(trained, tmp_path, name):
            export_beside(run / name)


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_run_resumes_without_its_reports(trained, tmp_path, content):
    run = run_copy(trained, tmp_path)
    for name in ("metrics.jsonl", "environment.json", "scores.json"):
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
    fit(trained.config, run, resume=True)
    for name in ("environment.json", "scores.json"):
        keys, expected = (json.loads((r / name).read_text()).keys() for r in (run, trained.run))
        assert keys == expected
    assert (run / "metrics.jsonl").read_text() == (trained.run / "metrics.jsonl").read_text()
    assert [path.name for path in run.rglob(".*")] == [".lock"]


# ---- nothing is unpickled ----


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def malicious(marker: Path) -> dict[str, bytes]:
    """One pickle bare, in torch's two formats, among tensors, and as an object array."""
    code = Malicious(marker)
    zipped, legacy, among, array = (io.BytesIO() for _ in range(4))
    torch.save(code, zipped)
    torch.save(code, legacy, _use_new_zipfile_serialization=False)
    torch.save({"image_encoder.x": torch.zeros(3), "y": code}, among)
    np.save(array, np.array([[code]], object), allow_pickle=True)
    files = {"zipped": zipped, "legacy": legacy, "among tensors": among, "array": array}
    return {"bare": pickle.dumps(code, 2)} | {name: file.getvalue() for name, file in files.items()}


def open_run_of(path: Path) -> None:
    checkpoint.open_run(path.parent)


READERS = {  # what reads a file, and the names of files that a user may hand over
    load_base: "base.pt base.safetensors base",
    read_label: "label.npy label.tif label.png",
    read_image: "image.png",
    read_mask: "vague.npy",
    read_outlines: "outlines.geojson",
    load_config: "config.toml",
    open_model: "export.safetensors",
    open_run_of: "run/adapter.safetensors run/base.safetensors run/config.toml",
    export_beside: "run/scores.json",
}


@pytest.mark.parametrize("form", ["bare", "zipped", "legacy", "among tensors", "array"])
def test_no_file_is_unpickled(trained, tmp_path, form):
    marker = tmp_path / "marker"
    content = malicious(marker)[form]
    resume = {
        lambda path: fit(trained.config, path.parents[1], resume=True): "run/state/last.safetensors"
    }
    for read, names in (READERS | resume).items():
        for name in names.split():
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            run_copy(trained, tmp_path)
            replace_file(tmp_path / name, content)
            with all_unchanged(trained, tmp_path, Path(name).name):
                read(tmp_path / name)
            assert not marker.exists(), name


def test_the_pickles_would_run(tmp_path):
    """Negative control of the test above."""
    for form, content in malicious(tmp_path / "marker").items():
        if form == "bare":
            pickle.loads(content)
        elif form == "array":
            np.load(io.BytesIO(content), allow_pickle=True)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        (tmp_path / "marker").unlink()
