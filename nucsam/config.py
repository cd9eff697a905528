"""Configuration: a frozen dataclass for each TOML table, and `table.key=value` overrides.

Each setting stands with its default, its meaning and unit, and the rule that its value must keep.
A TOML file holds only what differs from the defaults. An error names the setting, what was found
and what was expected.
"""

import difflib
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from nucsam.errors import UserError

Rule = Callable[[Any], str]  # value -> what was expected instead, "" where the value is fine


def number(expected: str, holds: Callable[[float], bool]) -> Rule:
    """A rule for a finite number: `holds` must be true of it; integers must fit in 32 bits."""

    def rule(value: float) -> str:
        most = 2**31 - 1 if isinstance(value, int) else sys.float_info.max
        if not holds(value):
            return expected
        return "" if value <= most else f"at most {most}"

    return rule


def at_least(least: int) -> Rule:
    """A rule for numbers with a lower limit only."""
    return number(f"at least {least}", lambda value: value >= least)


def seed_below(end: int) -> Rule:
    """A rule for seeds, which may be larger than other numbers."""
    return lambda value: "" if 0 <= value < end else f"0 to {end - 1}"


def between(least: float, most: float) -> Rule:
    """A rule for numbers between two limits, both included."""
    return number(f"a number from {least:g} to {most:g}", lambda value: least <= value <= most)


LONGEST = 200  # characters of a regular expression
MOST_CHOICES = 6  # repeats and choices in it, whose lengths multiply


def regular_expression(pattern: str) -> str:
    """The rule of a setting that holds a regular expression.

    Python's `re` has no time limit, so a pattern whose time can grow exponentially is refused.
    """
    if len(pattern) > LONGEST:
        return f"a regular expression of at most {LONGEST} characters"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # OverflowError: a huge repetition
        return f"a regular expression: {error}"
    if problem := _slow(pattern):
        return f"a regular expression without {problem}, which could take for ever"
    return ""


def _slow(pattern: str) -> str:
    """What makes a regular expression slow; "" where nothing does."""
    choices = 0
    for name, repeated in _operations(re._parser.parse(pattern)):
        if name.startswith("GROUPREF"):
            return "a back-reference"
        if name in ("BRANCH", "REPEAT"):
            choices += 1
            if repeated:
                kind = "choice" if name == "BRANCH" else "repeat"
                return f"a {kind} inside a repeat"
    return f"over {MOST_CHOICES} repeats and choices" if choices > MOST_CHOICES else ""


def _operations(parsed: Any, repeated: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each operation of a parsed pattern, and whether it stands inside a repeat.

    `?` is a repeat, but what stands inside it is not repeated by it.
    """
    if not isinstance(parsed, re._parser.SubPattern):
        for part in parsed if isinstance(parsed, tuple | list) else ():
            yield from _operations(part, repeated)
        return
    for operation, argument in parsed:
        name = str(operation)
        if is_repeat := name.endswith("_REPEAT"):
            name = "REPEAT" if argument[0] < argument[1] else "COPIES"
        yield name, repeated
        yield from _operations(argument, repeated or (is_repeat and argument[1] > 1))


def compiled(name: str, pattern: str) -> re.Pattern[str]:
    """The argument `name`, compiled.

    Raises:
        UserError: it is no regular expression.
    """
    if expected := regular_expression(pattern):
        raise UserError(f"{name}: found {pattern!r}, expected {expected}")
    return re.compile(pattern)


POSITIVE = number("a positive number", lambda value: value > 0)
PROBABILITY = number("a probability from 0 to 1", lambda value: 0 <= value <= 1)
INSIDE = number("a number between 0 and 1", lambda value: 0 < value < 1)
BELOW_ONE = number("at least 0 and below 1", lambda value: 0 <= value < 1)
UP_TO_ONE = number("a number over 0, at most 1", lambda value: 0 < value <= 1)
UP_TO_HALF = number("a fraction over 0, at most 0.5", lambda value: 0 < value <= 0.5)
FINEST = number("1 or 2", lambda value: value in (1, 2))
WIDTH = number("a positive multiple of 32, at most 4096", lambda v: v in range(32, 4097, 32))


def setting(default: Any, text: str, rule: Rule | None = None) -> Any:
    """A field of a section: its default, its meaning with its unit, and the rule of its value."""
    return field(default=default, metadata={"text": text, "rule": rule})


PublicSet = Literal["nuinsseg", "pannuke", "monuseg", "consep", "lizard", "cryonuseg", "tnbc"]


@dataclass(frozen=True)
class Data:
    """[data]: the images and how they are split."""

    root: str = setting("data/NuInsSeg", "folder of images and label maps; ~ is the home folder")
    test: str = setting("", "folder of the test images, if they lie apart; needs fold = all")
    layout: Literal["auto", PublicSet, "plain", "flat"] = setting(
        "auto", "how the folder is arranged; auto detects it"
    )
    split: Literal["official", "organ", "leave-one-out"] = setting(
        "official", "NuInsSeg's KFold; by organ: stratified; leave-one-out: an organ a fold"
    )
    folds: int = setting(5, "number of folds", at_least(2))
    fold: int | Literal["all"] = setting(0, 'test fold; "all" leaves none out: a model to keep')
    group: str = setting("", "images whose stems share a match stay together", regular_expression)
    connected: bool = setting(False, "for masks: each connected component of a label is a nucleus")
    region_class: str = setting("", "class of outlines of annotated regions, beside Region*")
    select: Literal["inner", "test"] = setting("inner", "split that chooses the epoch")
    images: int = setting(0, "images outside the test fold that are used; 0: all", at_least(0))
    inner: float = setting(0.15, "share of the training images in the inner split", UP_TO_HALF)
    seed: int = setting(19, "of the folds", seed_below(2**32))
    crop: int = setting(512, "side of a training crop, image px", between(1, 2**15))
    scale: float = setting(2.0, "model px per image px", between(1 / 64, 64))
    mpp: float = setting(0.0, "microns per px to resample images to; 0: their median", at_least(0))
    nucleus_area: float = setting(
        0.0, "median nucleus area, px, that each image is resampled to; 0: not at all", at_least(0)
    )
    workers: int = setting(2, "most loader processes for a GPU; a CPU has none", at_least(0))
    memory: float = setting(16.0, "GiB of decoded images kept in memory", at_least(0))


@dataclass(frozen=True)
class Augment:
    """[augment]: random changes of a training crop."""

    d4: bool = setting(True, "the eight flips and quarter turns")
    scale_min: float = setting(0.7, "smallest magnification, drawn log-uniformly", POSITIVE)
    scale_max: float = setting(1.3, "largest magnification", POSITIVE)
    stain: float = setting(1.0, "probability of HED stain augmentation", PROBABILITY)
    stain_scale: float = setting(0.3, "s: each stain times 1 + U(-s, s)", at_least(0))
    stain_bias: float = setting(0.1, "b: each stain plus U(-b, b), optical density", at_least(0))
    stain_mix: float = setting(
        0.0, "m: each stain's density in R, G and B plus U(-m, m): other hues", at_least(0)
    )
    blur: float = setting(0.15, "probability of a Gaussian blur", PROBABILITY)
    blur_sigma: float = setting(1.0, "largest Gaussian sigma, model px", at_least(0))
    noise: float = setting(0.15, "probability of Gaussian noise", PROBABILITY)
    noise_sigma: float = setting(8.0, "largest standard deviation, grey levels", at_least(0))


@dataclass(frozen=True)
class Model:
    """[model]: the network, and which of its parts train."""

    encoder: Literal[
        "mobile_sam", "tiny_sam", "lite_medsam", "sam_vit_b", "efficient_sam_ti", "efficient_sam_s"
    ] = setting("mobile_sam", "the network whose weights are fine-tuned")
    weights: str = setting(
        "auto",
        "auto: the encoder's published file; none: random; starter; hf:USER/NAME; else a file, "
        "such as an export",
    )
    head: Literal["instance", "sam"] = setting("instance", "sam: SAM's mask decoder")
    train: Literal["lora", "full", "head"] = setting("lora", "what trains beside the head")
    norms: Literal["pinned", "moving"] = setting("pinned", "BatchNorm; moving: train = full only")
    rank: int = setting(4, "rank of LoRA's matrices", between(1, 4096))
    alpha: float = setting(4.0, "LoRA's scale is alpha / rank", POSITIVE)
    pattern: str = setting("", "layers that get LoRA; empty: the encoder's own", regular_expression)
    width: int = setting(128, "channels of the instance head at stride 16", WIDTH)
    finest: int = setting(2, "finest stride of the instance head, model px", FINEST)
    adapt: float = setting(
        0.0,
        "share of an image's own statistics in the head's norms, when predicting",
        between(0, 1),
    )


@dataclass(frozen=True)
class Loss:
    """[loss]: the weights of its terms, their powers, and the weights of kinds of pixels."""

    cross_entropy: float = setting(1.0, "weight; classes inside, boundary, background", at_least(0))
    boundary: float = setting(
        1.0, "weight of a boundary pixel in cross_entropy; others 1 (instance head)", at_least(0)
    )
    focal: float = setting(
        0.0, "focal power of the cross entropy (instance head); 0 = none", at_least(0)
    )
    tversky: float = setting(1.0, "weight; focal Tversky, foreground (instance head)", at_least(0))
    # A missed pixel costs as much as a false one: with CellViT's 0.7 crowded nuclei swell.
    tversky_misses: float = setting(
        0.5, "weight of missed pixels in the Tversky index; false ones have the rest", INSIDE
    )
    tversky_power: float = setting(
        0.75, "focal power of the Tversky loss; 1 = none, with misses of 0.5 soft Dice", POSITIVE
    )
    lovasz: float = setting(0.0, "weight; Lovász-softmax, foreground (instance head)", at_least(0))
    distance: float = setting(4.0, "weight; depth's absolute error (instance head)", at_least(0))
    dice: float = setting(1.0, "weight; soft Dice, foreground (sam head)", at_least(0))
    unlabelled: float = setting(
        1.0,
        "weight of pixels of probability over 0.9, over 8 px from any label (instance head)",
        UP_TO_ONE,
    )


@dataclass(frozen=True)
class Instances:
    """[instances]: how dense maps become nuclei."""

    foreground: float = setting(0.5, "probability from which a pixel is nucleus", INSIDE)
    seed_rise: float = setting(0.15, "h of the h-maxima: a seed's height above its saddle", INSIDE)
    confidence: float = setting(0.7, "least mean foreground probability of a nucleus", BELOW_ONE)
    area: int = setting(30, "least area of a nucleus, px as trained", at_least(0))
    lenient: bool = setting(
        True, "lower foreground and confidence for images that the model is less certain of"
    )


@dataclass(frozen=True)
class Train:
    """[train]: the training loop."""

    epochs: int = setting(100, "passes over the training images", at_least(1))
    presentations: int = setting(
        0, "images that a run sees, repeats counted; sets epochs; 0: epochs decides", at_least(0)
    )
    batch: int = setting(4, "images per process and forward pass", at_least(1))
    # The instance head's BatchNorms see one forward pass at a time.
    accumulate: int = setting(1, "forward passes per optimizer step", at_least(1))
    lr_adapter: float = setting(5e-4, "peak rate of LoRA, or of the whole encoder", POSITIVE)
    lr_head: float = setting(1e-3, "peak rate of the head", POSITIVE)
    weight_decay: float = setting(0.01, "AdamW's; norms and biases do not decay", at_least(0))
    clip: float = setting(1.0, "largest gradient norm", POSITIVE)
    schedule: Literal["cosine", "step"] = setting("cosine", "of the learning rate")
    warmup: float = setting(0.05, "share of all steps (cosine)", BELOW_ONE)
    step_epochs: int = setting(10, "epochs between drops (step)", at_least(1))
    gamma: float = setting(0.1, "factor of a drop (step)", POSITIVE)
    ema: float = setting(0.99, "decay of the averaged weights that are kept; 0: off", BELOW_ONE)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = setting(
        "auto", "auto: the launch file's, or the device's fastest"
    )
    checkpoint: bool = setting(False, "recompute encoder blocks: less memory, slower")
    compile: bool = setting(False, "torch.compile: the first step takes minutes")
    validate_every: int = setting(5, "epochs; the last one is always validated", at_least(1))
    best: Literal["dice", "aji", "pq"] = setting("aji", "mean that chooses the epoch")
    save_minutes: float = setting(5.0, "minutes between saved states in an epoch", at_least(0))
    seed: int = setting(0, "of weights, crops and augmentation", seed_below(2**64))
    log_with: str = setting("", "an Accelerate tracker: tensorboard, wandb, ...")


@dataclass(frozen=True)
class Config:
    """All settings. Making one checks every rule.

    Raises:
        UserError: a value breaks its rule, or two values do not go together.
    """

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    instances: Instances = field(default_factory=Instances)
    train: Train = field(default_factory=Train)

    def __post_init__(self) -> None:
        for name, value in self.flat().items():
            rule = SETTINGS[name].metadata["rule"]
            if rule and (expected := rule(value)):
                raise UserError(f"{name}: found {value!r}, expected {expected}")
        _check_pairs(self)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Nested plain values, as config.toml holds them."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """`table.key` -> value of every setting."""
        tables = asdict(self).items()
        return {f"{table}.{key}": value for table, keys in tables for key, value in keys.items()}

    @classmethod
    def from_dict(cls, tables: dict[str, Any], source: str = "configuration") -> "Config":
        """The defaults with the values of nested tables on top.

        Args:
            tables: {"table": {"key": value}}.
            source: where the tables come from, for messages.

        Raises:
            UserError: a table or key is unknown, or a value has another type or breaks a rule.
        """
        sections = {table.name: table.type for table in fields(cls)}
        built = {}
        for table, values in tables.items():
            if table not in sections:
                raise UserError(f"{source}: unknown table [{table}]{_nearest(table, sections)}")
            if not isinstance(values, dict):
                raise UserError(f"{source}: found {table} = {values!r}, expected a table [{table}]")
            kinds = {key.name: key.type for key in fields(sections[table])}
            typed = {}
            for key, value in values.items():
                if key not in kinds:
                    near = _nearest(key, kinds, f"{table}.")
                    raise UserError(f"{source}: unknown key {table}.{key}{near}")
                typed[key] = _typed(f"{source}: {table}.{key}", value, kinds[key])
            built[table] = sections[table](**typed)
        return cls(**built)


SETTINGS = {  # "table.key" -> its field
    f"{table.name}.{key.name}": key for table in fields(Config) for key in fields(table.type)
}


def _check_pairs(config: Config) -> None:
    """Check the rules between settings."""
    data, augment, model, train = config.data, config.augment, config.model, config.train
    if data.fold != "all" and not 0 <= data.fold < data.folds:
        raise UserError(f"data.fold: found {data.fold}, expected 0 to {data.folds - 1} or 'all'")
    if data.test and data.fold != "all":
        found = f"found {data.test!r} with data.fold = {data.fold}"
        raise UserError(f"data.test: {found}, expected data.fold = 'all'")
    if data.nucleus_area and data.mpp:
        found = f"found {data.nucleus_area:g} with data.mpp = {data.mpp:g}"
        raise UserError(f"data.nucleus_area: {found}; both set the magnification, expected one")
    if data.fold == "all" and data.select == "test":
        raise UserError("data.select: found 'test' with data.fold = 'all', expected 'inner'")
    side = round(data.crop * data.scale, 6)
    if side % 32:
        raise UserError(f"data.crop * data.scale: found {side:g} px, expected a multiple of 32")
    if model.head == "sam" and model.encoder.startswith("efficient_sam"):
        found = f"found 'sam' with model.encoder = {model.encoder!r}"
        raise UserError(f"model.head: {found}, whose decoder is another, expected 'instance'")
    if model.adapt and model.head == "sam":
        found = f"found {model.adapt:g} with model.head = 'sam', which has no norms that adapt"
        raise UserError(f"model.adapt: {found}, expected 0")
    if model.norms == "moving" and (model.train != "full" or train.checkpoint):
        settings = "model.train = 'full' and train.checkpoint = false"
        raise UserError(f"model.norms: found 'moving', expected it only with {settings}")
    if augment.blur and math.ceil(3 * augment.blur_sigma) >= side:
        found = f"found {augment.blur_sigma:g} with crops of {side:g} model px"
        raise UserError(f"augment.blur_sigma: {found}, expected less than a third of their side")
    low, high = augment.scale_min, augment.scale_max
    if high < low:
        raise UserError(f"augment.scale_max: found {high}, expected at least scale_min = {low}")


# What a resumed run may change.
MAY_CHANGE = (
    *("data.root", "data.test", "data.workers", "data.memory"),
    *("train.save_minutes", "train.log_with"),
)


# The settings of [data] that decide which image trains, chooses the epoch, or is tested.
SPLIT = ("layout", "split", "folds", "fold", "group", "select", "images", "inner", "seed")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply overrides.

    Args:
        path: the file, which holds differences from the defaults.
        overrides: `table.key=value`. A setting that holds a string takes the value as it is, or
            in TOML's quotes; any other one takes TOML's notation.

    Raises:
        UserError: the file cannot be read, or the configuration is not valid.
    """
    path = Path(path)
    try:
        # Editors on Windows write a mark at the beginning.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        if text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            raise ValueError("found UTF-16, expected UTF-8")
        tables = tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None
    return override(tables, overrides, source=str(path))


def override(
    tables: dict[str, Any], overrides: Sequence[str], source: str = "configuration"
) -> Config:
    """The configuration of nested tables with `table.key=value` strings on top.

    Raises:
        UserError: an override has another form, or the configuration is not valid.
    """
    Config.from_dict(tables, source)  # so that an error names the file, not the command line
    values = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            example = "such as data.root=my_folder or train.epochs=10"
            expected = f"expected an existing folder, or table.key=value, {example}"
            raise UserError(f"override: found {text!r}, {expected}")
        parsed, name = parse_value(value), f"{table}.{key}"
        if name in SETTINGS and isinstance(SETTINGS[name].default, str):
            parsed = parsed if isinstance(parsed, str) else value.strip()  # such as 2024-05-01
        values[name] = parsed
    config = changed(tables, values, "command line" if overrides else source)
    check_effect(values, config)
    return config


def check_effect(names: Container[str], config: Config) -> None:
    """Raise a UserError if one of the settings that were named has no effect in `config`."""
    if "train.epochs" in names and config.train.presentations:
        found = f"found it beside train.presentations = {config.train.presentations}"
        raise UserError(f"train.epochs: {found}, which sets it; train.presentations=0 stops that")


def changed(tables: dict[str, Any], values: Mapping[str, Any], source: str) -> Config:
    """The configuration of nested tables with {"table.key": value} on top."""
    tables = {table: dict(section) for table, section in tables.items()}
    for name, value in values.items():
        table, key = name.split(".", 1)
        tables.setdefault(table, {})[key] = value
    return Config.from_dict(tables, source)


def to_toml(config: Config) -> str:
    """The whole configuration as TOML text; `load_config` of it gives an equal Config."""
    lines = []
    for table, values in config.to_dict().items():
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def setting_rows(config: Config, word: str = "") -> list[tuple[str, ...]]:
    """Settings with a word in name or meaning: name, default, changed value, meaning.

    Raises:
        UserError: no setting does.
    """
    values, rows = config.flat(), []
    for name, key in SETTINGS.items():
        text = key.metadata["text"]
        value = _toml(values[name]) if values[name] != key.default else ""
        if get_origin(key.type) is Literal:
            text += f" ({', '.join(get_args(key.type))})"
        if word.lower() in f"{name} {text}".lower():
            rows.append((name, _toml(key.default), value, text))
    if not rows:
        raise UserError(f"{word}: no setting has it{_nearest(word, values)}")
    return rows


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Name -> "name: old value -> new value", of each name in `new` whose value differs."""
    both = [(name, old.get(name), value) for name, value in new.items()]
    return {n: f"{n}: {before!r} -> {after!r}" for n, before, after in both if before != after}


def differences(a: Config, b: Config) -> dict[str, str]:
    """Name -> "table.key: a's value -> b's value", of every setting that differs."""
    return changes(a.flat(), b.flat())


def conflicts(a: Config, b: Config, *free: str) -> dict[str, str]:
    """The `differences` of all settings but MAY_CHANGE and `free`.

    Different epochs are no difference if both follow from the same `train.presentations`.
    """
    allowed = (*MAY_CHANGE, *free)
    if a.train.presentations and a.train.presentations == b.train.presentations:
        allowed += ("train.epochs",)
    return {name: text for name, text in differences(a, b).items() if name not in allowed}


def parse_value(text: str) -> Any:
    """The value of an override: TOML where the text is one TOML value, else the text itself."""
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text  # several lines may hold several keys


def _toml(value: Any) -> str:
    # JSON writes these values as TOML does, except that TOML escapes the delete character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value, checked against its field's type; a whole number becomes a float where asked."""
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if value not in options:
            near = _nearest(str(value), options)
            listed = ", ".join(map(repr, options))
            raise UserError(f"{name}: found {value!r}, expected one of {listed}{near}")
        return value
    if get_args(hint):  # int | Literal["all"]
        kind, literal = get_args(hint)
        return _typed(name, value, literal if isinstance(value, str) else kind)
    if hint is float and type(value) is int:
        value = float(str(value))  # by its text, because float(10**400) raises OverflowError
    if type(value) is not hint:
        found = f"{value!r} ({type(value).__name__})"
        raise UserError(f"{name}: found {found}, expected {_KINDS[hint]}")
    return value


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def _nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known: {', '.join(names)}"
