"""Configuration: frozen dataclasses, one section per TOML table, and `table.key=value` overrides.

A TOML file is a difference from the defaults below. Unknown keys, wrong types and values out of range are a
ValueError that names the field, what was found and what was expected.
"""

import difflib
import json
import math
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Data:
    root: str = "data/NuInsSeg"  # folder of images and label maps
    layout: Literal["auto", "nuinsseg", "plain"] = "auto"
    split: Literal["official", "organ"] = "official"  # official: NuInsSeg's KFold; organ: stratified by organ
    folds: int = 5
    fold: int | Literal["all"] = 0  # test fold; "all" trains the model to keep, on everything but the inner split
    group: str = ""  # regular expression on the file stem; images of one group (first capture) never part
    select: Literal["inner", "test"] = "inner"  # split that chooses the best epoch; "test" only to compare with papers
    inner: float = 0.15  # part of the training images cut off as the inner validation split
    seed: int = 19  # of the folds
    crop: int = 512  # side of a training crop, image px
    scale: float = 2.0  # model px per image px
    mpp: float = 0.0  # microns per image px; 0 = read from the TIFF tags, else unknown
    workers: int = 2  # loader processes; 0 = the training process itself
    memory: float = 16.0  # GiB of decoded images kept in memory; a larger data set is read as needed


@dataclass(frozen=True)
class Augment:
    d4: bool = True  # the eight flips and quarter turns
    scale_min: float = 0.7  # magnification, drawn log-uniformly
    scale_max: float = 1.3
    stain: float = 1.0  # probability of HED stain augmentation
    stain_scale: float = 0.3  # each stain times 1 + U(-s, s)
    stain_bias: float = 0.1  # each stain plus U(-b, b), natural optical density
    blur: float = 0.15  # probability
    blur_sigma: float = 1.0  # largest Gaussian sigma, model px
    noise: float = 0.15  # probability
    noise_sigma: float = 8.0  # largest standard deviation, grey levels of 255


@dataclass(frozen=True)
class Model:
    weights: str = (
        "auto"  # "auto" (published mobile_sam.pt), a path (.pt, .safetensors, nucsam export) or "none" (random)
    )
    head: Literal["instance", "sam"] = "instance"
    train: Literal["lora", "full", "head"] = "lora"
    norms: Literal["pinned", "moving"] = "pinned"  # BatchNorm statistics; moving: to learn a base from random
    rank: int = 4
    alpha: float = 4.0  # LoRA scale = alpha / rank
    pattern: str = (
        r"image_encoder\..*\.attn\.(qkv|proj)"  # regular expression on the names of linear layers that get LoRA
    )
    width: int = 128  # channels of the instance head at stride 16


@dataclass(frozen=True)
class Loss:
    cross_entropy: float = 1.0  # instance: classes background, inside, boundary; sam: foreground
    boundary: float = 2.0  # weight of a boundary pixel in the cross-entropy, 1 for the others
    tversky: float = 1.0  # focal Tversky on the foreground (instance head)
    distance: float = 4.0  # absolute error of the depth in the nucleus (instance head)
    dice: float = 1.0  # soft Dice on the foreground (sam head)


@dataclass(frozen=True)
class Instances:
    foreground: float = 0.5  # probability from which a pixel is nucleus
    seed_rise: float = 0.15  # a seed is so much deeper than the pass to a deeper one, 0..1 (instance head)
    confidence: float = 0.7  # nuclei of a lower mean foreground probability are dropped
    area: int = 30  # and smaller ones, image px


@dataclass(frozen=True)
class Train:
    epochs: int = 100
    batch: int = 4  # images per process and forward pass
    accumulate: int = 1  # forward passes per optimizer step; the instance head's BatchNorms see one at a time
    lr_adapter: float = 5e-4  # encoder: LoRA, or everything in "full"
    lr_head: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    schedule: Literal["cosine", "step"] = "cosine"
    warmup: float = 0.05  # part of all steps (cosine)
    step_epochs: int = 10  # StepLR: epochs between drops
    gamma: float = 0.1  # StepLR: factor of a drop
    ema: float = 0.99  # decay of the averaged weights that are validated and kept; 0 = off
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # auto: as the launch file says
    checkpoint: bool = False  # recompute encoder blocks in the backward pass: less memory, slower
    validate_every: int = 5  # epochs
    best: Literal["dice", "aji", "pq"] = "aji"  # mean over the selecting images that chooses the best epoch
    save_minutes: float = 5.0  # time between resumable states within an epoch; each validation saves too
    seed: int = 0
    log_with: str = ""  # an Accelerate tracker: tensorboard, wandb, ...


@dataclass(frozen=True)
class Config:
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    instances: Instances = field(default_factory=Instances)
    train: Train = field(default_factory=Train)

    def __post_init__(self) -> None:
        for expected, (holds, names) in _RULES.items():
            for name in names.split():
                section, key = name.split(".")
                value = getattr(getattr(self, section), key)
                if not holds(value):
                    raise ValueError(f"{name}: found {value!r}, expected {expected}")
                if value > (most := 2**31 - 1 if isinstance(value, int) else sys.float_info.max):
                    raise ValueError(f"{name}: found {value!r}, expected at most {most}")
        data, augment, train, pattern = self.data, self.augment, self.train, self.model.pattern
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"model.pattern: found {pattern!r}, expected a regular expression ({error})") from None
        if isinstance(data.fold, int) and not 0 <= data.fold < data.folds:
            raise ValueError(f"data.fold: found {data.fold}, expected 0 to {data.folds - 1} or 'all'")
        if data.fold == "all" and data.select == "test":
            raise ValueError(
                "data.select: found 'test' with data.fold = 'all', which has no test images; expected 'inner'"
            )
        if (data.crop * data.scale) % 32:
            raise ValueError(
                f"data.crop * data.scale: found {data.crop} * {data.scale:g} = {data.crop * data.scale:g} model px, "
                "expected a multiple of 32"
            )
        if self.model.norms == "moving" and (self.model.train != "full" or train.checkpoint):
            raise ValueError(
                f"model.norms: found 'moving' with model.train = {self.model.train!r}, train.checkpoint = "
                f"{str(train.checkpoint).lower()}; expected 'full' and false"
            )
        if augment.scale_max < augment.scale_min:
            raise ValueError(
                f"augment.scale_max: found {augment.scale_max}, expected at least {augment.scale_min} as scale_min"
            )
        if train.validate_every > train.epochs:
            raise ValueError(
                f"train.validate_every: found {train.validate_every}, expected at most train.epochs = {train.epochs}"
            )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, as written to config.toml."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """`table.key` -> value of every field."""
        return {f"{table}.{key}": value for table, keys in asdict(self).items() for key, value in keys.items()}

    @classmethod
    def from_dict(cls, tables: dict[str, Any], source: str = "configuration") -> "Config":
        """Defaults with the values of nested `tables`; `source` is named in errors."""
        sections, built = get_type_hints(cls), {}
        for table, values in tables.items():
            if table not in sections:
                raise ValueError(f"{source}: unknown table [{table}]{_nearest(table, sections)}")
            if not isinstance(values, dict):
                raise ValueError(f"{source}: found {table} = {values!r}, expected a table [{table}]")
            hints = get_type_hints(sections[table])
            checked = {}
            for key, value in values.items():
                if key not in hints:
                    raise ValueError(f"{source}: unknown key {table}.{key}{_nearest(key, hints, table + '.')}")
                checked[key] = _checked(f"{source}: {table}.{key}", value, hints[key])
            built[table] = sections[table](**checked)
        return cls(**built)


MAY_CHANGE = ("data.root:", "data.workers:", "data.memory:", "train.save_minutes:", "train.log_with:")  # on --resume
_RULES = {  # what is expected: its test, and the fields it holds for
    "at least 1": (
        lambda v: v >= 1,
        "data.crop model.rank train.epochs train.batch train.accumulate train.step_epochs train.validate_every",
    ),
    "at least 2": (lambda v: v >= 2, "data.folds"),
    "0 or more": (
        lambda v: v >= 0,
        "data.mpp data.workers data.memory "
        "augment.stain_scale augment.stain_bias augment.blur_sigma augment.noise_sigma "
        "loss.cross_entropy loss.boundary loss.tversky loss.distance loss.dice instances.area "
        "train.weight_decay train.save_minutes",
    ),
    "a positive number": (
        lambda v: v > 0,
        "data.scale augment.scale_min augment.scale_max model.alpha "
        "train.lr_adapter train.lr_head train.clip train.gamma",
    ),
    "a probability from 0 to 1": (lambda v: 0 <= v <= 1, "augment.stain augment.blur augment.noise"),
    "a number between 0 and 1": (lambda v: 0 < v < 1, "instances.foreground instances.seed_rise"),
    "a fraction over 0, at most 0.5": (lambda v: 0 < v <= 0.5, "data.inner"),
    "0 up to but not 1": (lambda v: 0 <= v < 1, "train.warmup train.ema instances.confidence"),
    "a positive multiple of 32": (lambda v: v > 0 and v % 32 == 0, "model.width"),
}


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a TOML file and apply `table.key=value` overrides (values in TOML's notation; bare words are strings)."""
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such configuration file") from None
    except (ValueError, RecursionError, OSError) as error:  # ValueError: not TOML, not UTF-8, or a number too long
        raise ValueError(f"{path}: not a readable TOML file: {error}") from None
    return override(tables, overrides, source=str(path))


def override(tables: dict[str, Any], overrides: list[str] | tuple[str, ...], source: str = "configuration") -> Config:
    """The configuration of nested `tables` with `table.key=value` strings on top."""
    Config.from_dict(tables, source)  # an error in the file is the file's, not the command line's
    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise ValueError(
                f"override: found {text!r}, expected table.key=value, such as data.root=my_folder or train.epochs=10"
            )
        values[f"{table}.{key}"] = _parse(value)
    return changed(tables, values, "command line" if overrides else source)


def changed(tables: dict[str, Any], values: Mapping[str, Any], source: str) -> Config:
    """The configuration of nested `tables` with {"table.key": value} on top."""
    tables = {table: dict(own) for table, own in tables.items()}
    for name, value in values.items():
        table, key = name.split(".", 1)
        tables.setdefault(table, {})[key] = value
    return Config.from_dict(tables, source)


def read_json(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON document that is a dict; a ValueError names `source` where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{source}: found a {type(found).__name__}, expected a dict")
    return found


def to_toml(config: Config) -> str:
    """The whole configuration as TOML text; `load` of it gives an equal Config."""
    lines = []
    for table, values in config.to_dict().items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def differences(a: Config, b: Config) -> list[str]:
    """`table.key: a's value -> b's value` for every field that differs."""
    new = b.flat()
    return [f"{name}: {value!r} -> {new[name]!r}" for name, value in a.flat().items() if value != new[name]]


def _parse(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text.strip()}")
    except (ValueError, RecursionError):  # ValueError: not TOML, or a number too long
        return text.strip()
    return found["value"] if len(found) == 1 else text.strip()  # a text of several lines may hold several keys


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # else JSON's strings are TOML's
    return repr(value)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if value not in options:
            nearest = _nearest(str(value), [str(o) for o in options])
            raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, options))}{nearest}")
        return value
    if get_origin(hint) in (Union, UnionType):
        kind, literal = get_args(hint)
        return _checked(name, value, literal if isinstance(value, str) else kind)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1024 else math.inf if value > 0 else -math.inf
    if type(value) is not hint:
        raise ValueError(f"{name}: found {value!r} ({type(value).__name__}), expected {_KINDS[hint]}")
    return value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _nearest(name: str, names: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(names)}"
