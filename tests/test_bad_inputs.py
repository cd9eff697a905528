"""Bad inputs, and odd ones that are legal: each is refused by name or handled as documented; nothing is left behind.

A generator per kind yields cases. A case is prepared in an empty folder, which gives an action; then the action runs.
`says` is a regular expression for the message of the ValueError (or, where the action is a command line, for what
stands on standard error beside exit status 2); None = legal, and the action itself asserts what it should give.
"""

import builtins
import io
import json
import os
import pickle
import re
import shutil
import struct
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import save_file

from nucsam import checkpoint, cli, config, data, evaluate, images
from nucsam.base import load_base
from nucsam.config import Config, Model
from nucsam.export import export
from nucsam.model import build
from nucsam.run import Run
from nucsam.train import train

H, W = 70, 90
ROWS, COLUMNS = np.mgrid[:H, :W]
RGB = np.stack([ROWS, COLUMNS, ROWS ^ COLUMNS], -1).astype(np.uint8)
IDS = np.zeros((H, W), np.uint16)
IDS[5:15, 5:15], IDS[30:40, 10:30], IDS[50:54, 60:66] = 2, 300, 9
NAMES = {
    "spaces": "a b  c",
    "brackets": "a [1] (b) {c}",
    "newline": "a\nb",
    "quotes": "a'b\"c",
    "percent and hash": "a%20#b",
    "Unicode": "naïve 核 🧬",
    "decomposed": unicodedata.normalize("NFD", "é"),
    "leading dash": "-rf",
    "two dots": "a.tif.b",
    "bytes that are not UTF-8": os.fsdecode(b"a\xff"),
    "200 characters": "x" * 200,
}


@dataclass(frozen=True)
class Case:
    """`prepare(folder, made)` writes the input and gives the action; `made` is a run as training left it."""

    name: str
    prepare: Callable
    says: str | None


# ---- images and labels ----


def encoded(array: np.ndarray, suffix: str, **options) -> bytes:
    """An array as the bytes of a file."""
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, array)
    elif suffix == ".tif":
        tifffile.imwrite(file, array, **{"photometric": "rgb" if array.shape[-1] == 3 else "minisblack"} | options)
    else:
        Image.fromarray(array).save(file, {".jpg": "JPEG"}.get(suffix, suffix[1:].upper()), **options)
    return file.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def is_read(read: Callable, expected: np.ndarray) -> Callable:
    def action(path: Path) -> None:
        assert np.array_equal(read(path), expected)

    return action


def a_file(title: str, name: str, content: bytes, action: Callable, says: str | None) -> Case:
    """A case of one file, which a refusal names."""

    def prepare(folder: Path, made: object) -> Callable:
        (folder / name).write_bytes(content)
        return lambda: action(folder / name)

    return Case(title, prepare, says and rf"{re.escape(name)}: .*{says}")


def cut_files() -> Iterator[Case]:
    options = {"deflated": {"compression": "zlib"}, "tiled": {"tile": (32, 32)}, "big": {"bigtiff": True}, "": {}}
    kinds = [("image", images.read_image, RGB, s, {}) for s in (".png", ".jpg", ".bmp")]
    kinds += [("label", images.read_label, IDS, s, {}) for s in (".png", ".npy")]
    for what, read, array in (("image", images.read_image, RGB), ("label", images.read_label, IDS)):
        kinds += [(f"{kind} {what}".strip(), read, array, ".tif", o) for kind, o in options.items()]
    for what, read, array, suffix, o in kinds:
        whole = encoded(array, suffix, **o)
        for size in (0, 5, len(whole) // 10, len(whole) // 2, len(whole) - (9 if suffix == ".tif" else 15)):
            yield a_file(
                f"{what}: {suffix} cut after {size} bytes", f"cut{suffix}", whole[:size], read, "cannot be read"
            )
    whole = encoded(np.moveaxis(RGB, -1, 0), ".tif", ome=True, metadata={"axes": "CYX"})
    assert len(whole) > 3 * H * W
    says = "found 1 page.s. and no end of the page table"
    for part in (0.4, 0.6, 0.9):
        cut = whole[: int(part * len(whole))]
        yield a_file(f"image: OME-TIFF, a page a channel, cut at {part}", "o.tif", cut, images.read_image, says)
    last = struct.pack("<4sHH", b"II*\0", 16, 0)  # the page table would begin at 16
    yield a_file("label: TIFF cut before its page table", "t.tif", last, images.read_label, "found no page")
    png = encoded(IDS, ".png")
    for place in range(png.index(b"IDAT"), png.index(b"IEND"), 12):
        content = png[:place] + bytes([png[place] ^ 16]) + png[place + 1 :]
        yield a_file(f"label: PNG, a bit flipped in byte {place}", "flip.png", content, images.read_label, "")


def odd_images() -> Iterator[Case]:
    grey, rgba = ROWS.astype(np.uint8), np.dstack([RGB, np.full((H, W), 7, np.uint8)])
    refused = {
        "floats": (RGB.astype(np.float32) / 255, "found float32 in 0.0..*expected 8 or 16 bits"),
        "NaN": (np.full((H, W), np.nan, np.float32), "found float32 in nan"),
        "negative": (-ROWS.astype(np.int16), "found int16 in -69..0"),
        "32 bits": (ROWS.astype(np.uint32) * 70000, "found uint32 in 0..4830000"),
        "a stack": (np.zeros((5, H, W), np.uint8), "found axes .*expected one image"),
        "a stack in time": (np.zeros((2, 5, H, W), np.uint8), "expected one image"),
        "five channels": (np.zeros((H, W, 5), np.uint8), "expected"),
        "complex": (ROWS * 1j, "found complex128"),
    }
    for title, (array, says) in refused.items():
        yield a_file(f"image: {title}", "a.tif", encoded(array, ".tif"), images.read_image, says)
    two = io.BytesIO()
    with tifffile.TiffWriter(two) as tiff:
        tiff.write(RGB[:40, :40], photometric="rgb")
        tiff.write(RGB, photometric="rgb")
    yield a_file(
        "image: TIFF of two images", "a.tif", two.getvalue(), images.read_image, "found 2 images, expected one"
    )
    with tifffile.TiffWriter(thumb := io.BytesIO()) as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    yield a_file("image: TIFF with a thumbnail", "a.tif", thumb.getvalue(), is_read(images.read_image, RGB), None)
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    moving = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield a_file("image: animated PNG", "a.png", moving, images.read_image, "found 2 frames, expected one image")
    stack = encoded(np.stack([RGB, RGB]), ".tif")
    yield a_file("image: TIFF stack named .png", "a.png", stack, images.read_image, "cannot be read")
    yield a_file("image: text named .png", "a.png", b"no image", images.read_image, "cannot be read")
    yield a_file("image: text named .tif", "a.tif", b"no image", images.read_image, "cannot be read")
    yield a_file("image: SVG", "a.svg", b"<svg/>", images.read_image, "found .svg suffix, expected .png")
    yield a_file("image: without suffix", "a", encoded(RGB, ".png"), images.read_image, "found no suffix")
    palette = Image.fromarray(grey, "P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    legal = {
        "RGBA": (encoded(rgba, ".png"), RGB),
        "grey and alpha": (saved(Image.fromarray(grey).convert("LA"), "PNG"), grey[..., None].repeat(3, -1)),
        "palette": (saved(palette, "PNG"), np.dstack([grey, 255 - grey, np.full_like(grey, 7)])),
        "1 bit": (saved(Image.fromarray(grey > 9), "PNG"), ((grey > 9) * np.uint8(255))[..., None].repeat(3, -1)),
        "16 bits": (encoded(grey.astype(np.uint16) << 8, ".png"), grey[..., None].repeat(3, -1)),
        "JPEG named .png": (saved(Image.fromarray(RGB * 0), "JPEG"), RGB * 0),
    }
    for title, (content, expected) in legal.items():
        yield a_file(f"image: {title} (legal)", "a.png", content, is_read(images.read_image, expected), None)
    for text in ("1-2.e", "", "nan", "1e999", "-3"):
        content = encoded(RGB, ".tif", description=f'<OME PhysicalSizeX="{text}"', metadata=None)
        yield a_file(f"image: OME size {text!r} is none (legal)", "a.tif", content, no_size, None)


def no_size(path: Path) -> None:
    assert images.read_mpp(path) is None


def odd_labels() -> Iterator[Case]:
    ids, read = IDS.astype(np.int64), images.read_label
    whole = {
        "floats": (ids / 2, "found float64"),
        "whole floats": (ids.astype(np.float32), "found float32"),
        "NaN": (np.full((H, W), np.nan), "found float64"),
        "negative": (-ids, r"found ids in -300\.\.0"),
        "negative, 32 bits": (-ids.astype(np.int32), r"found ids in -300\.\.0"),
        "over int32": (ids.astype(np.uint32) * 14_000_000, "found ids in 0..4200000000"),
        "over int32 by far": (ids * 2**40, "found ids in 0..*, expected 0..2147483647"),
        "three channels": (RGB, "of shape .70, 90, 3., expected integer ids"),
        "four channels": (np.dstack([RGB, RGB[..., 0]]), "of shape .70, 90, 4."),
        "a stack": (np.stack([ids] * 5), r"expected (one image|integer ids)"),
        "complex": (ids * 1j, "found complex128"),
    }
    for title, (array, says) in whole.items():
        for suffix in (".npy", ".tif"):
            yield a_file(f"label: {title}, {suffix}", f"a{suffix}", encoded(array, suffix), read, says)
    only_npy = {
        "half floats": (ids.astype(np.float16), "found float16"),
        "one dimension": (ids.ravel(), "expected integer ids"),
        "a single number": (np.array(3), "expected integer ids"),
        "no pixels": (np.zeros((0, W), int), "of shape .0, 90."),
        "depth 1": (ids[..., None], "of shape .70, 90, 1."),
        "text": (ids.astype(str), "found <U"),
        "dates": (ids.astype("M8[s]"), "found datetime64"),
        "records": (np.zeros((H, W), [("a", int)]), "expected integer ids"),
        "objects": (np.array([[1, {}]], object), "cannot be read"),
    }
    for title, (array, says) in only_npy.items():
        yield a_file(f"label: {title}", "a.npy", encoded(array, ".npy"), read, says)
    huge = encoded(ids, ".npy").replace(b"(70, 90)", b"(9**9,9)")
    yield a_file("label: NPY with a sum for a shape", "a.npy", huge, read, "cannot be read")
    huge = encoded(ids, ".npy").replace(b"(70, 90)", b"(7000, 90)"[:8] + b"0)")
    yield a_file("label: NPY of more rows than bytes", "a.npy", huge, read, "cannot be read")
    for title, array in (("RGB", RGB), ("RGBA", np.dstack([RGB, RGB[..., 0]]))):
        yield a_file(f"label: {title} PNG", "a.png", encoded(array, ".png"), read, "expected integer ids")
    yield a_file("label: JPEG", "a.jpg", encoded(RGB, ".jpg"), read, "found .jpg suffix, expected .tif")
    yield a_file("label: JPEG named .png", "a.png", encoded(RGB, ".jpg"), read, "cannot be read")
    signed = np.minimum(ids, 100).astype(np.int8)
    signed[0, 0] = -1
    lzw = saved(Image.fromarray(signed.view(np.uint8)), "TIFF", compression="tiff_lzw", tiffinfo={339: 2})
    yield a_file("label: LZW, signed 8 bits, negative", "a.tif", lzw, read, "found ids in -1..100")
    palette = Image.fromarray(np.minimum(IDS, 200).astype(np.uint8), "P")
    palette.putpalette([5, 6, 7] * 256)
    legal = {
        "palette, whose indices are ids": ("a.png", saved(palette, "PNG"), np.minimum(IDS, 200)),
        "palette TIFF": ("a.tif", saved(palette, "TIFF"), np.minimum(IDS, 200)),
        "bool": ("a.npy", encoded(IDS > 0, ".npy"), IDS > 0),
        "big-endian": ("a.npy", encoded(IDS.astype(">u4"), ".npy"), IDS),
        "big-endian TIFF": ("a.tif", encoded(IDS, ".tif", byteorder=">"), IDS),
        "Fortran order": ("a.npy", encoded(np.asfortranarray(IDS), ".npy"), IDS),
        "upper-case suffix": ("a.TIF", encoded(IDS, ".tif"), IDS),
        "largest id": ("a.npy", encoded(np.where(IDS > 0, 2**31 - 1, 0), ".npy"), np.where(IDS > 0, 2**31 - 1, 0)),
    }
    for title, (name, content, expected) in legal.items():
        yield a_file(f"label: {title} (legal)", name, content, is_read(read, expected), None)


# ---- folders ----


def plain(folder: Path, stems: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """A data set in the plain layout, and nothing else, in `folder`."""
    for kind, suffix, array in (("images", ".png", RGB), ("labels", ".tif", IDS)):
        (folder / kind).mkdir(parents=True)
        for k, stem in enumerate(stems):
            (folder / kind / f"{stem}{suffix}").write_bytes(encoded(array + array.dtype.type(k) * (array > 0), suffix))
    return folder


def all_samples(folder: Path) -> list[data.Sample]:
    samples = data.Samples(data.find_records(folder), progress=False)
    return [samples[i] for i in range(len(samples))]


def a_folder(title: str, change: Callable[[Path], object], says: str | None, number: int = 3) -> Case:
    """A case of a data set that `change` has made odd. A legal one has `number` images, of three nuclei each."""

    def prepare(folder: Path, made: object) -> Callable:
        change(root := plain(folder / "set"))

        def action() -> None:
            found = all_samples(root)
            assert [int(sample.label.max()) for sample in found] == [3] * number

        return action

    return Case(f"folder: {title}", prepare, says)


def folders() -> Iterator[Case]:
    def label(array: np.ndarray, suffix: str = ".tif") -> Callable:
        return lambda root: (root / "labels/b.tif").write_bytes(encoded(array, suffix))

    def image(array: np.ndarray) -> Callable:
        return lambda root: (root / "images/b.png").write_bytes(encoded(array, ".png"))

    def link(name: str, target: str) -> Callable:
        def change(root: Path) -> None:
            (root / name).unlink(missing_ok=True)
            (root / name).symlink_to(target)

        return change

    def outside(name: str) -> Callable:
        def change(root: Path) -> None:
            (root / name).rename(root.parent / Path(name).name)
            (root / name).symlink_to(root.parent / Path(name).name)

        return change

    def instead(name: str, make: Callable[[Path], object]) -> Callable:
        def change(root: Path) -> None:
            (root / name).unlink()
            make(root / name)

        return change

    def loop(root: Path) -> None:
        for kind in ("images", "labels"):
            (root / kind / "loop").symlink_to(".")

    for value in (1, 255, 65535):
        mask = (IDS > 0) * np.uint16(value)
        says = rf"b\.tif: found a binary mask .3 components that all have the value {value}"
        yield a_folder(f"label is a 0/{value} mask", label(mask), says)
    yield a_folder("label is taller", label(np.pad(IDS, ((0, 1), (0, 0)))), r"b\.tif: found 90x71 px, expected 90x70")
    yield a_folder("label is turned", label(IDS.T.copy()), r"b\.tif: found 70x90 px, expected 90x70")
    yield a_folder("image is smaller", image(RGB[:66]), r"b\.tif: found 90x70 px, expected 90x66")
    yield a_folder("image and label are tiny", lambda r: (image(RGB[:9])(r), label(IDS[:9])(r)), "b.png: found 90x9 px")
    yield a_folder("label is PNG by content", label(IDS, ".png"), r"b\.tif: cannot be read")
    yield a_folder("no label", lambda r: (r / "labels/b.tif").unlink(), r"b\.png: found no label of this stem")
    yield a_folder("no labels", lambda r: shutil.rmtree(r / "labels"), r"found 3 problem.*\n.*a\.png: found no label")
    yield a_folder("no images", lambda r: shutil.rmtree(r / "images"), "found no data set")
    yield a_folder(
        "images is a file", lambda r: (shutil.rmtree(r / "images"), (r / "images").touch()), "found no image"
    )
    yield a_folder("two images of a stem", lambda r: (r / "images/b.tif").touch(), r"b\.tif: found the stem of b\.png")
    yield a_folder("two labels of a stem", lambda r: (r / "labels/b.png").touch(), r"b\.tif: found the stem of b\.png")
    composed = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    yield a_folder(
        "NFC and NFD", lambda r: [(r / "images" / n).touch() for n in composed], "found the stem of .* again"
    )
    yield a_folder("empty image", lambda r: (r / "images/b.png").write_bytes(b""), r"b\.png: cannot be read")
    yield a_folder("empty label", lambda r: (r / "labels/b.tif").write_bytes(b""), r"b\.tif: cannot be read")
    for name in ("images/b.png", "labels/b.tif"):
        said = re.escape(name)
        yield a_folder(f"{name} is a folder", instead(name, Path.mkdir), f"{said}: ")
        yield a_folder(f"{name} is a pipe", instead(name, os.mkfifo), f"{said}: cannot be read .*folder or device")
        yield a_folder(f"{name} is a dangling link", link(name, "gone"), f"{said}: cannot be read .FileNotFound")
        yield a_folder(f"{name} is a link to itself", link(name, Path(name).name), f"{said}: cannot be read .OSError")
        yield a_folder(f"{name} is a link to a folder", link(name, ".."), f"{said}: ")
        yield a_folder(f"{name} is a link out of the folder (legal)", outside(name), None)
    yield a_folder("images is a link (legal)", outside("images"), None)
    yield a_folder(
        "an image twice, by a link", link("images/b.png", "a.png"), r"b\.png: found the file of .*a\.png again"
    )
    yield a_folder("links in a loop", loop, r"found 3 problem.*\n.*loop/a\.png: found the file of .*a\.png again")
    vague = {"vague area of another size": RGB[:50], "vague area of floats": RGB.astype(np.float32)}
    for title, array in vague.items():

        def change(root: Path, array: np.ndarray = array) -> None:
            (root / "vague").mkdir()
            (root / "vague/b.tif").write_bytes(encoded(array, ".tif"))

        yield a_folder(title, change, r"vague/b\.tif: found ")

    def every(root: Path) -> None:
        for path in root.glob("*/*"):
            path.write_bytes(b"")

    yield a_folder(
        "every file is empty, and all are named", every, r"found 3 problem.*\n.*a\.png.*\n.*b\.png.*\n.*c\.png"
    )
    odd_files = ("images/Thumbs.db", "images/._a.png", "labels/.DS_Store", "README.txt", "images/notes")
    yield a_folder("other and hidden files (legal)", lambda r: [(r / n).touch() for n in odd_files], None)

    for title, name in NAMES.items():
        change = lambda r, name=name: [p.rename(p.with_stem(name)) for p in r.glob("*/b.*")]  # noqa: E731
        yield a_folder(f"a name with {title} (legal)", change, None)

    def organs(root: Path) -> None:
        shutil.rmtree(root)
        for organ, stem in (("a", "1"), ("b", "1"), ("c", "a_1")):
            plain(root / organ, (stem,))
        for kind in ("images", "labels"):
            for organ in "abc":
                shutil.copytree(root / organ / kind, root / kind / organ)

    yield a_folder("composed names that clash", organs, "found the name of .* again")
    for title, remark, change in (
        ("label", r"1 labels without an image.*lonely\.tif", lambda r: (r / "labels/lonely.tif").touch()),
        ("organ", r"1 labels without an image.*liver", lambda r: shutil.copytree(r / "labels", r / "labels/liver")),
        ("vague area", r"1 vague areas without", lambda r: ((r / "vague").mkdir(), (r / "vague/A.png").touch())),
    ):

        def prepare(folder: Path, made: object, change: Callable = change, remark: str = remark) -> Callable:
            change(root := plain(folder / "set"))

            def action() -> None:
                with pytest.warns(UserWarning, match=remark.replace("1 ", r"\d ")):
                    assert len(data.find_records(root)) == 3

            return action

        yield Case(f"folder: {title} without an image is told (legal)", prepare, None)
    unreadable = {"images": "cannot be listed", "labels/b.tif": "cannot be read", "images/b.png": "cannot be read"}
    for name, says in unreadable.items():
        yield Case(f"folder: {name} may not be read", without_rights(name), f"{re.escape(name)}: {says}.*Permission")
    for title, root in (("an empty name", ""), ("a null byte", "a\0b"), ("no such folder", "nowhere")):
        says = {"": "data.root: found an empty path"}.get(root, "cannot be listed|found no data set")
        yield Case(f"folder: {title}", lambda f, m, root=root: lambda: data.find_records(root), says)
    for field, options in {
        "data.seed": {"seed": -1},
        "data.folds": {"folds": 9},
        "data.split": {"scheme": "x"},
    }.items():

        def prepare(folder: Path, made: object, options: dict = options) -> Callable:
            records = data.find_records(plain(folder / "set"))
            return lambda: data.split_records(records, **({"folds": 2} | options))

        yield Case(f"folder: {field} out of range", prepare, f"{field}: found ")


def without_rights(name: str) -> Callable:
    """Takes the right to read a file or folder; from root, who may read all, it is taken in Python."""

    def prepare(folder: Path, made: object) -> Callable:
        root = plain(folder / "set")

        def denied(original: Callable) -> Callable:
            def opened(path: object, *args: object, **options: object) -> object:
                if str(path) == str(root / name):
                    raise PermissionError(13, "Permission denied", str(path))
                return original(path, *args, **options)

            return opened

        def action() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(builtins, "open", denied(builtins.open))
                patch.setattr(io, "open", denied(io.open))
                patch.setattr(os, "listdir", denied(os.listdir))
                all_samples(root)

        return action

    return prepare


# ---- configuration ----

NUMBERS = {
    f"{table.name}.{f.name}": get_type_hints(table.default_factory)[f.name]
    for table in fields(Config)
    for f in fields(table.default_factory)
    if get_type_hints(table.default_factory)[f.name] in (int, float)
}


def a_toml(title: str, content: str | bytes, says: str) -> Case:
    return Case(f"TOML: {title}", toml_of(content), rf"a\.toml: .*{says}")


def toml_of(content: str | bytes) -> Callable:
    def prepare(folder: Path, made: object) -> Callable:
        (folder / "a.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return lambda: config.load(folder / "a.toml")

    return prepare


def configurations() -> Iterator[Case]:
    for title, content in {
        "cut in a table": "[train",
        "cut in a string": '[data]\nroot = "x',
        "cut in a value": "[train]\nepochs =",
        "a key twice": "[train]\nepochs = 1\nepochs = 2",
        "a table twice": "[train]\n[train]\n",
        "YAML": "train:\n  epochs: 3\n",
        "JSON": '{"train": {"epochs": 3}}',
        "not UTF-8": b'[data]\nroot = "\xff"',
        "UTF-16": "[train]\n".encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf[train]\n",
        "null bytes": b"\0" * 100,
        "a number of 5000 digits": f"[train]\nepochs = {'9' * 5000}",
        "a thousand brackets": f"[train]\nepochs = {'[' * 1000}",
        "a safetensors file": b"\x08\0\0\0\0\0\0\0{}      ",
    }.items():
        yield a_toml(title, content, "not a readable TOML file")
    for title, content, says in (
        ("a typo in a table", "[trian]\nepochs = 3", r"unknown table \[trian\]; did you mean train"),
        ("a typo in a key", "[train]\nepoch = 3", "unknown key train.epoch; did you mean train.epochs"),
        ("a key of another table", "[data]\nepochs = 3", "unknown key data.epochs"),
        ("upper case", "[Train]\nepochs = 3", r"unknown table \[Train\]"),
        ("a key without table", "epochs = 3", r"unknown table \[epochs\]"),
        ("a table in a table", "[train.epochs]\nx = 3", "train.epochs: found .*expected a whole number"),
        ("a list of tables", "[[train]]\nepochs = 3", "expected a table"),
    ):
        yield a_toml(title, content, says)
    for name, kind in NUMBERS.items():
        table, _, key = name.partition(".")
        wrong = {"text": "'3'", "a list": "[3]", "true": "true"} | ({"a fraction": "1.5"} if kind is int else {})
        for what, value in wrong.items():
            says = rf"{re.escape(name)}: found .*expected a( whole)? number"
            yield a_toml(f"{name} is {what}", f"[{table}]\n{key} = {value}", says)
        if not name.endswith(".seed"):
            bad = ["-1000", str(10**30)] if kind is int else ["-1000.0", "nan", "inf", str(10**400)]
            for value in bad:
                says = rf"^{re.escape(name)}: found .*expected "
                prepare = toml_of(f"[{table}]\n{key} = {value}")
                yield Case(f"TOML: {name} is {value[:9]}", prepare, says)
    for title, text, says in (
        ("without a value", "train.epochs", "override: found 'train.epochs', expected table.key=value"),
        ("without a table", "epochs=3", "override: found 'epochs=3', expected table.key=value"),
        ("a typo", "train.epoch=3", "command line: unknown key train.epoch; did you mean train.epochs"),
        ("a typo in the table", "trian.epochs=3", "command line: unknown table .trian"),
        ("a word for a number", "train.epochs=many", "command line: train.epochs: found 'many'"),
        ("an empty number", "train.epochs=", "command line: train.epochs: found ''"),
        ("two lines", "train.epochs=1\nx=2", "command line: train.epochs: found '1.nx=2'"),
        ("5000 digits", f"train.epochs={'9' * 5000}", "command line: train.epochs: found '999"),
        ("a choice", "model.head=sma", "command line: model.head: found 'sma', expected one of"),
        ("a pattern", "model.pattern=(", "model.pattern: found '.', expected a regular expression"),
    ):
        yield Case(f"override: {title}", lambda f, m, text=text: lambda: config.override({}, [text]), says)
    for title, name, says in (("missing", "none.toml", "none.toml: no such"), ("a folder", "", "not a readable TOML")):
        yield Case(f"TOML: {title}", lambda f, m, name=name: lambda: config.load(f / name), says)


# ---- weights, runs, exports ----


@dataclass(frozen=True)
class Made:
    """A run as training left it, its export, and its parts."""

    run: Path
    export: Path
    config: Config
    base: object
    net: object
    weights: dict
    metadata: dict

    def copy(self, folder: Path) -> Path:
        """The run again, to be damaged; the files are links until `damage` writes one."""
        shutil.copytree(self.run, folder / "run", copy_function=os.link)
        return folder / "run"

    def fresh(self) -> tuple:
        """A model to be refused things, its optimizer and averages."""
        weights = self.net.trainable()
        return weights, {k: p.detach().clone() for k, p in weights.items()}, torch.optim.AdamW(weights.values())


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Made:
    out = tmp_path_factory.mktemp("made")
    tables = {name: dict(values) for name, values in TINY.items()}
    tables["data"]["root"] = str(folder)
    settings = config.override(tables, ["train.epochs=1"])
    train(settings, out / "run")
    export(out / "run", out / "export.safetensors")
    net, _, base, _ = checkpoint.open_run(out / "run")
    weights, metadata = checkpoint.read_tensors(out / "run/adapter.safetensors")
    return Made(out / "run", out / "export.safetensors", settings, base, net, weights, metadata)


def damage(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """A file of tensors with `change(tensors, metadata)` applied."""
    tensors, metadata = checkpoint.read_tensors(path)
    change(tensors, metadata)
    path.unlink()
    checkpoint.write_tensors(path, tensors, metadata)


def first(tensors: dict, prefix: str = "") -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix) and tensors[name].ndim > 0)


def changes(prefix: str = "") -> dict[str, Callable]:
    """What can be wrong with the tensors of a file that is whole."""

    def to(value: Callable) -> Callable:
        def change(tensors: dict, _: dict) -> None:
            tensors[name] = value(tensors[name := first(tensors, prefix)])

        return change

    return {
        "a tensor missing": lambda t, _: t.pop(first(t, prefix)),
        "a tensor too many": lambda t, _: t.update(other=torch.zeros(3)),
        "a tensor renamed": lambda t, _: t.update(other=t.pop(first(t, prefix))),
        "another shape": to(lambda tensor: torch.cat([tensor, tensor])),
        "no values": to(lambda tensor: tensor[:0]),
        "NaN": to(lambda tensor: tensor * float("nan")),
        "infinity": to(lambda tensor: tensor + float("inf")),
        "whole numbers": to(lambda tensor: tensor.long()),
        "nothing": lambda t, _: t.clear(),
    }


def metadata_changes() -> dict[str, Callable]:
    return {
        "another kind": lambda _, m: m.update(kind="merged"),
        "no kind": lambda _, m: m.pop("kind"),
        "a kind that is a list": lambda _, m: m.update(kind=["adapter"]),
        "no base": lambda _, m: m.pop("base"),
        "another base": lambda _, m: m["base"].update(sha256="0" * 64),
        "a base that is text": lambda _, m: m.update(base="x"),
        "a base without source": lambda _, m: m["base"].pop("source"),
        "a base that is null": lambda _, m: m["base"].update(sha256=None),
        "no configuration": lambda _, m: m.pop("config"),
    }


def raw_metadata(path: Path, text: str | None) -> None:
    tensors, _ = checkpoint.read_tensors(path)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"} | ({} if text is None else {"nucsam": text}))


BYTES = {
    "empty": lambda whole: b"",
    "cut in the header": lambda whole: whole[:30],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole[:-1],
    "with a header of 2^62 bytes": lambda whole: struct.pack("<Q", 2**62) + whole[8:],
    "text": lambda whole: b"no tensors",
}
TEXTS = {"is missing": None, "is no JSON": "{", "is a list": "[]", "is a number": "3", "is nested": "[" * 100_000}


def damaged(kind: str, file: str, act: Callable[[Path, Made], Callable], also: str = "") -> Iterator[Case]:
    """Cases of the same damages to a file of a copy of the run, which `act` then takes."""

    def case(title: str, change: Callable[[Path], object]) -> Case:
        def prepare(folder: Path, made: Made) -> Callable:
            change((run := made.copy(folder)) / file)
            return act(run, made)

        return Case(f"{kind}: {title}", prepare, rf"{re.escape(file)}\b.*{also}")

    for title, cut in BYTES.items():
        yield case(title, lambda path, cut=cut: damage(path, cut(path.read_bytes())))
    for title, text in TEXTS.items():
        yield case(f"metadata {title}", lambda path, text=text: raw_metadata(path, text))
    of_kind = changes("image_encoder." if kind == "base" else "weights." if kind == "state" else "")
    for title, change in of_kind.items():
        yield case(title, lambda path, change=change: rewrite(path, change))


def untouched(made: Made, weights: dict, action: Callable) -> Callable:
    """The action, after which the weights must be what they were, whether it raised or not."""

    def checked() -> None:
        before = {name: p.detach().clone() for name, p in weights.items()}
        try:
            action()
        finally:
            assert all(torch.equal(before[name], p) for name, p in weights.items())

    return checked


def take_adapter(run: Path, made: Made) -> Callable:
    path = run / "adapter.safetensors"
    return untouched(made, made.net.trainable(), lambda: checkpoint.load_adapter(path, made.net, made.base))


def take_state(run: Path, made: Made) -> Callable:
    weights, average, optimizer = made.fresh()
    return untouched(made, weights, Run(run, made.config, made.base, weights, average, optimizer).restore)


def take_progress(run: Path, made: Made) -> Callable:
    """As take_state, where the tensors fit, and are put, before what is not a tensor is looked at."""
    weights, average, optimizer = made.fresh()
    return Run(run, made.config, made.base, weights, average, optimizer).restore


def weights_and_runs() -> Iterator[Case]:
    yield from damaged("adapter", "adapter.safetensors", take_adapter)
    yield from damaged("state", "state/last.safetensors", take_state, "delete it to start the run anew")
    yield from damaged("base", "base.safetensors", lambda run, made: lambda: checkpoint.open_run(run))

    def altered(title: str, file: str, change: Callable, act: Callable, says: str) -> Case:
        def prepare(folder: Path, made: Made) -> Callable:
            rewrite((run := made.copy(folder)) / file, change)
            return act(run, made)

        return Case(title, prepare, rf"{re.escape(file)}: {says}")

    for title, change in metadata_changes().items():
        yield altered(f"adapter: {title}", "adapter.safetensors", change, take_adapter, "")
    state, anew = "state/last.safetensors", "; delete it to start the run anew"
    for title, change, says in (
        (
            "another kind",
            lambda _, m: m.update(kind="adapter"),
            f"found a file of kind 'adapter', expected 'state'{anew}",
        ),
        ("no kind", lambda _, m: m.pop("kind"), f"found a file of kind None, expected 'state'{anew}"),
        ("no progress", lambda _, m: m.pop("progress"), f"found no progress of a run{anew}"),
        ("steps in words", lambda _, m: m["progress"].update(step="many"), f"found no progress of a run{anew}"),
        ("other progress", lambda _, m: m["progress"].update(other=1), f"found no progress of a run{anew}"),
        (
            "optimizer without a moment",
            lambda t, _: t.pop(first(t, "optimizer.")),
            f"does not fit this run: 1 .*{anew}",
        ),
        ("optimizer of another shape", changes("optimizer.")["another shape"], f"does not fit this run: 1 .*{anew}"),
        ("an entry no optimizer has", lambda t, _: t.update({"optimizer.x": torch.zeros(1)}), f"does not fit.*{anew}"),
        ("no running average", lambda t, _: [t.pop(k) for k in [*t] if k[0] == "a"], f"does not fit.*{anew}"),
    ):
        act = take_progress if "no progress" in says else take_state
        yield altered(f"state: {title}", state, change, act, says)

    def of(title: str, take: Callable[[Path, Made], object], says: str) -> Case:
        return Case(title, lambda folder, made: lambda: take(folder, made), says)

    def run_file(name: str) -> Callable:
        return lambda folder, made: load_base(made.run / name)

    yield of("base: an adapter", run_file("adapter.safetensors"), r"adapter.safetensors does not fit MobileSAM")
    yield of("base: a resumable state", run_file("state/last.safetensors"), r"last.safetensors does not fit MobileSAM")
    yield of("base: a configuration", run_file("config.toml"), r"config.toml is not a whole checkpoint")
    yield of("base: a folder", run_file("state"), "model.weights: no such file")
    yield of("base: a file that is not there", run_file("none.pt"), "model.weights: no such file")
    yield of("base: an empty name", lambda f, m: load_base(""), "model.weights: no such file")

    def adapter(name: str) -> Callable:
        return lambda folder, made: checkpoint.load_adapter(made.run / name, made.net, made.base)

    yield of("adapter: a base", adapter("base.safetensors"), "base.safetensors: found a file of kind 'base'")
    yield of("adapter: a state", adapter("state/last.safetensors"), "last.safetensors: found a file of kind 'state'")
    yield of(
        "adapter: an export", adapter("../export.safetensors"), "export.safetensors: found a file of kind 'merged'"
    )
    yield of("adapter: a configuration", adapter("config.toml"), "config.toml: not a readable safetensors file")
    yield of("adapter: a folder", adapter("state"), "state: not a readable safetensors file")
    for model in (Model(width=64), Model(width=32, rank=8), Model(width=32, train="full"), Model(head="sam")):
        name = f"{model.width} {model.rank} {model.train} {model.head}"

        def other(folder: Path, made: Made, model: Model = model) -> None:
            net = build(model, made.base, seed=0)
            checkpoint.load_adapter(made.run / "adapter.safetensors", net, made.base)

        yield of(f"adapter: of another model {name}", other, "adapter.safetensors: weights do not fit the model")

    def other_base(folder: Path, made: Made) -> None:
        base = load_base("none", seed=9)
        checkpoint.load_adapter(made.run / "adapter.safetensors", build(made.config.model, base, seed=0), base)

    yield of("adapter: of another base", other_base, "adapter.safetensors: trained on the base")
    yield from torch_files()
    yield from exports()
    yield from directories()


def torch_files() -> Iterator[Case]:
    """Bases in torch's own format."""

    def saved_as(content: Callable[[dict], object]) -> Callable:
        def prepare(folder: Path, made: Made) -> Callable:
            torch.save(content(dict(made.base.state)), folder / "base.pt")
            return lambda: load_base(folder / "base.pt")

        return prepare

    name = "image_encoder.neck.0.weight"
    for title, content, says in (
        ("in a dict", lambda s: {"model": s}, "base.pt holds a dict under 'model'"),
        ("a list", lambda s: [*s.values()][:3], "base.pt holds a list"),
        ("a tensor", lambda s: s[name], "base.pt holds a Tensor"),
        ("numbers for names", lambda s: {3: s[name]}, "base.pt holds a tensor under 3"),
        ("an epoch beside", lambda s: s | {"epoch": 3}, "base.pt holds a int under 'epoch'"),
        ("sparse", lambda s: s | {name: s[name].to_sparse()}, f"base.pt holds a tensor without .* '{name}'"),
        ("without values", lambda s: s | {name: s[name].to("meta")}, f"base.pt holds a tensor without .* '{name}'"),
        ("NaN", lambda s: s | {name: s[name] * float("nan")}, f"base.pt: found NaN or infinity in 1 tensors: {name}"),
        (
            "whole numbers",
            lambda s: s | {name: s[name].long()},
            f"base.pt does not fit MobileSAM.*of another type: {name}",
        ),
        (
            "turned",
            lambda s: s | {name: s[name].transpose(0, 1)},
            f"base.pt does not fit MobileSAM.*of another shape: {name}",
        ),
        ("no tensors", lambda s: {}, "base.pt does not fit MobileSAM.*missing"),
        (
            "with a prefix",
            lambda s: {f"module.{k}": v for k, v in s.items()},
            "base.pt does not fit MobileSAM.*missing",
        ),
        ("with a head", lambda s: s | {"head.x": s[name]}, r"base.pt does not fit MobileSAM.*unexpected: head\.x"),
    ):
        yield Case(f"base.pt: {title}", saved_as(content), says)
    for title, cut in BYTES.items():

        def prepare(folder: Path, made: Made, cut: Callable = cut) -> Callable:
            torch.save(dict(made.base.state), folder / "whole.pt")
            (folder / "base.pt").write_bytes(cut((folder / "whole.pt").read_bytes()))
            return lambda: load_base(folder / "base.pt")

        if "header of" not in title:
            yield Case(f"base.pt: {title}", prepare, "base.pt is not a whole checkpoint")


def exports() -> Iterator[Case]:
    """An export as a base, and what the command refuses to write."""

    def start_from(change: Callable, width: int = 32) -> Callable:
        def prepare(folder: Path, made: Made) -> Callable:
            shutil.copy(made.export, folder / "export.safetensors")
            rewrite(folder / "export.safetensors", change)
            model = replace(made.config.model, weights=str(folder / "export.safetensors"), width=width)

            def action() -> None:
                base = checkpoint.run_base(folder, replace(made.config, model=model))
                build(model, base, seed=0)

            return action

        return prepare

    head = changes("head.")
    for title in ("a tensor missing", "a tensor renamed", "another shape", "NaN"):
        yield Case(f"export as base: head with {title}", start_from(head[title]), "export.safetensors")
    foreign = lambda t, _: t.update({"head.other.weight": torch.zeros(3)})  # noqa: E731
    yield Case(
        "export as base: a foreign head", start_from(foreign), "export.safetensors: found another head: 1 .*other"
    )
    yield Case(
        "export as base: another width",
        start_from(lambda t, m: None, 64),
        "export.safetensors: found another head: 90 .*model.width = 64",
    )
    yield Case("export as base: whole (legal)", start_from(lambda t, m: None), None)

    def command(*arguments: str, change: Callable[[Path], object] = lambda folder: None) -> Callable:
        def prepare(folder: Path, made: Made) -> Callable:
            made.copy(folder)
            change(folder)
            return lambda: nucsam("export", folder / "run", *(text.format(folder) for text in arguments))

        return prepare

    for title, says, prepare in (
        ("a format", "--format: found 'onxx'", command("--out", "{}/x.pt", "--format", "onxx")),
        ("into a file that is there", "config.toml: exists; --force", command("--out", "{}/run/config.toml")),
        ("into a folder", "state: found a folder", command("--out", "{}/run/state", "--force")),
        ("under a file", "config.toml: cannot be made", command("--out", "{}/run/config.toml/x.pt")),
        (
            "with scores that are cut",
            "scores.json: not JSON",
            command("--out", "{}/x.safetensors", change=lambda f: damage(f / "run/scores.json", b"{")),
        ),
        (
            "with scores of something else",
            "scores.json: found no headline",
            command("--out", "{}/x.safetensors", change=lambda f: damage(f / "run/scores.json", b"{}")),
        ),
    ):
        yield Case(f"export: {title}", prepare, says)


def directories() -> Iterator[Case]:
    """Runs of which a file is missing or damaged."""

    def take(change: Callable[[Path], object], act: Callable[[Path], object]) -> Callable:
        def prepare(folder: Path, made: Made) -> Callable:
            change(run := made.copy(folder))
            return lambda: act(run)

        return prepare

    def evaluated(run: Path) -> None:
        nucsam("evaluate", run)

    for name in ("config.toml", "adapter.safetensors", "base.safetensors"):
        prepare = take(lambda run, name=name: (run / name).unlink(), evaluated)
        yield Case(f"run: without {name}", prepare, re.escape(name))

        def as_folder(run: Path, name: str = name) -> None:
            (run / name).unlink()
            (run / name).mkdir()

        yield Case(f"run: {name} is a folder", take(as_folder, evaluated), re.escape(name))

    def edit(before: str, after: str) -> Callable:
        def change(run: Path) -> None:
            text = (run / "config.toml").read_text()
            assert before in text
            damage(run / "config.toml", text.replace(before, after).encode())

        return change

    for title, change, says in (
        ("cut config.toml", lambda run: damage(run / "config.toml", b"[data"), "config.toml: not a readable TOML"),
        ("another rank", edit("rank = 4", "rank = 2"), "adapter.safetensors: weights do not fit"),
        (
            "another alpha",
            edit("alpha = 4.0", "alpha = 8.0"),
            "adapter.safetensors: trained otherwise.*alpha: 4.0 -> 8.0",
        ),
        ("another width", edit("width = 32", "width = 64"), "adapter.safetensors: weights do not fit"),
        ("another head", edit('head = "instance"', 'head = "sam"'), "adapter.safetensors: weights do not fit"),
        ("a key of another version", edit("rank = 4", "rang = 4"), "config.toml: unknown key model.rang"),
        ("data that have moved", edit('root = "', 'root = "/nowhere'), "nowhere.*found no data set"),
    ):
        yield Case(f"run: {title}", take(change, evaluated), says)
    yield Case("run: an empty folder", lambda f, m: lambda: nucsam("evaluate", f), "found no config.toml")
    yield Case("run: a file", lambda f, m: lambda: nucsam("evaluate", m.export), "found no config.toml")


# ---- scoring ----


def scoring() -> Iterator[Case]:
    def folders_of(change: Callable[[Path], object], *options: str) -> Callable:
        def prepare(folder: Path, made: object) -> Callable:
            for kind in ("truth", "pred"):
                (folder / kind).mkdir()
                for stem in "ab":
                    (folder / kind / f"{stem}.tif").write_bytes(encoded(IDS, ".tif"))
            change(folder)
            texts = [text.format(folder) for text in options]
            return lambda: nucsam("evaluate", "--truth", folder / "truth", "--pred", folder / "pred", *texts)

        return prepare

    def pred(array: np.ndarray) -> Callable:
        return lambda folder: (folder / "pred/b.tif").write_bytes(encoded(array, ".tif"))

    nothing = lambda folder: None  # noqa: E731
    for title, says, prepare in (
        ("a prediction of another size", r"pred/b\.tif against .*different shapes", folders_of(pred(IDS[:50]))),
        ("a prediction of floats", r"pred/b\.tif: found float", folders_of(pred(IDS / 2))),
        ("a negative prediction", r"pred/b\.tif: found ids", folders_of(pred(-IDS.astype(np.int32)))),
        ("a stack", r"pred/b\.tif: cannot be read", folders_of(pred(np.stack([IDS] * 5)))),
        ("an empty file", r"pred/b\.tif: cannot be read", folders_of(lambda f: (f / "pred/b.tif").write_bytes(b""))),
        ("no predictions", "found no .tif", folders_of(lambda f: [p.unlink() for p in f.glob("pred/*")])),
        ("no folder", "expected a folder", folders_of(lambda f: shutil.rmtree(f / "pred"))),
        ("a file clash", "several files for one image", folders_of(lambda f: (f / "pred/b.png").touch())),
        (
            "other names",
            "has the stem",
            folders_of(lambda f: [p.rename(p.with_stem(p.stem * 2)) for p in f.glob("p*/*")]),
        ),
        ("a protocol", "protocol: found 'x'", folders_of(nothing, "--protocol", "x")),
        ("a threshold", "expected iou from 0 to 1", folders_of(nothing, "--iou", "50")),
        ("a threshold that is NaN", "expected iou from 0 to 1", folders_of(nothing, "--iou", "nan")),
        ("a ring", "no negative", folders_of(nothing, "--zone", "-1")),
        ("an organ pattern", "organ: found '.', expected a regular", folders_of(nothing, "--organ", "(")),
        ("processes", "workers: found -1", folders_of(nothing, "--workers", "-1")),
        ("a JSON folder not there", "s.json: .*No such file.*unharmed", folders_of(nothing, "--json", "{}/no/s.json")),
        ("a CSV file that is a folder", "pred: .*s a directory.*unharmed", folders_of(nothing, "--csv", "{}/pred")),
    ):
        yield Case(f"evaluate: {title}", prepare, says)
    for title, arguments, says in (
        ("no configuration", ["train", "none.toml"], "none.toml: no such"),
        ("two configurations", ["train", "a.toml", "b.toml"], "found 2 configurations"),
        ("a typo", ["train", "train.epoch=3"], "did you mean train.epochs"),
        ("a typo in an option", ["train", "--rezume"], "--rezume"),
        ("a word for a number", ["synth", "x", "--images", "many"], "--images"),
        ("an unknown command", ["trian"], "trian"),
        ("no data", ["train", "data.root=nowhere", "--out", "run"], "nowhere.*found no data set"),
        ("an empty data folder", ["train", "data.root=", "--out", "run"], "data.root: found an empty path"),
        ("a layout", ["inspect", ".", "--layout", "x"], "data.layout: found 'x'"),
        ("a group", ["inspect", ".", "--group", "("], "data.group: found '.', expected a regular"),
    ):
        yield Case(f"command: {title}", lambda f, m, a=arguments: lambda: nucsam(*a), says)


def nucsam(*arguments: object) -> None:
    """A command line; what it says on standard error, where its status is 2, as a ValueError."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        status = cli.run([str(argument) for argument in arguments])
    assert status == 2, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue() and err.getvalue().count("nucsam: ") <= 1
    raise ValueError(err.getvalue())


# ---- the test ----

CASES = [
    *cut_files(),
    *odd_images(),
    *odd_labels(),
    *folders(),
    *configurations(),
    *weights_and_runs(),
    *scoring(),
]


def seen(folder: Path) -> dict[str, tuple]:
    """What is in a folder: kinds, sizes, times of writing, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        s = path.lstat()
        found[str(path)] = (s.st_mode, s.st_size if path.is_file() else 0, s.st_mtime_ns if path.is_file() else 0)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    act = case.prepare(tmp_path, made)
    before = seen(tmp_path)
    if case.says is None:
        act()
    else:
        with pytest.raises(ValueError) as caught:
            act()
        assert re.search(case.says, str(caught.value), re.DOTALL), str(caught.value)
    assert seen(tmp_path) == before


def test_number_of_cases():
    refused = [case for case in CASES if case.says is not None]
    assert len(refused) >= 200 and len(CASES) - len(refused) >= 20
    names = [case.name for case in CASES]
    assert [name for name in names if names.count(name) > 1] == []


# ---- nothing is unpickled ----


class Malicious:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def malicious(marker: Path) -> dict[str, bytes]:
    """The same pickle bare, in torch's two formats, among tensors, and as an object array."""
    code = Malicious(marker)
    torch.save(code, zipped := io.BytesIO())
    torch.save(code, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    torch.save({"image_encoder.x": torch.zeros(3), "y": code}, among := io.BytesIO())
    np.save(array := io.BytesIO(), np.array([[code]], object), allow_pickle=True)
    files = {"zipped": zipped, "legacy": legacy, "among tensors": among, "array": array}
    return {"bare": pickle.dumps(code, 2)} | {name: file.getvalue() for name, file in files.items()}


WAYS = {  # what a user can hand us: the name of the file, and what takes it
    "base.pt": lambda path, made: load_base(path),
    "base.safetensors": lambda path, made: load_base(path),
    "base without suffix": lambda path, made: load_base(path),
    "label.npy": lambda path, made: images.read_label(path),
    "label.tif": lambda path, made: images.read_label(path),
    "label.png": lambda path, made: images.read_label(path),
    "image.png": lambda path, made: images.read_image(path),
    "vague.npy": lambda path, made: evaluate.read_vague(path),
    "adapter.safetensors": lambda path, made: checkpoint.load_adapter(path, made.net, made.base),
    "config.toml": lambda path, made: config.load(path),
    "run/adapter.safetensors": lambda path, made: checkpoint.open_run(path.parent),
    "run/base.safetensors": lambda path, made: checkpoint.open_run(path.parent),
    "run/config.toml": lambda path, made: checkpoint.open_run(path.parent),
    "run/scores.json": lambda path, made: export(path.parent, path.parent.parent / "out.safetensors"),
    "run/state/last.safetensors": lambda path, made: take_state(path.parents[1], made)(),
    "run by --resume": lambda path, made: train(made.config, path, resume=True),
}


@pytest.mark.parametrize("form", ["bare", "zipped", "legacy", "among tensors", "array"])
def test_no_file_is_unpickled(made, tmp_path, form):
    marker = tmp_path / "marker"
    content = malicious(marker)[form]
    run = made.copy(tmp_path)
    for way, take in WAYS.items():
        path = tmp_path / way
        if way == "run by --resume":
            path = run
            damage(run / "state/last.safetensors", content)
        elif way.startswith("run/"):
            shutil.rmtree(run)
            damage(made.copy(tmp_path) / way.removeprefix("run/"), content)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            take(path, made)
        assert path.name in str(caught.value) or "last.safetensors" in str(caught.value), way
        assert not marker.exists(), way
    assert len(WAYS) == 16


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


# ---- a run goes on without what it can do without ----


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "scores.json"])
@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_run_goes_on_without_its_reports(made, tmp_path, name, content):
    run = made.copy(tmp_path)
    whole = (run / name).read_bytes()
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    train(made.config, run, resume=True)
    if name == "metrics.jsonl":  # is written at the end of an epoch, and this run has none left
        assert (run / name).exists() == (content is not None)
    else:
        assert json.loads((run / name).read_text()).keys() == json.loads(whole).keys()
    assert not list(run.rglob(".*"))


def test_without_its_state_a_run_begins_anew(made, tmp_path):
    run = made.copy(tmp_path)
    (run / "state/last.safetensors").unlink()
    train(made.config, run, resume=True)
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, made.run)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert len(lines[0]) == 1


def test_scores_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    evaluate.write_json(path, {"a": 1})
    whole = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"s\.json: .*No space.*unharmed"):
        evaluate.write_json(path, {"a": 2})
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_progress_of_scoring_is_not_on_standard_output(capfd):
    assert list(evaluate._each(str, [1, 2], 1, "Scoring", True)) == ["1", "2"]
    assert capfd.readouterr() == ("", "")
