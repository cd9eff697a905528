import math
import string
import tomllib
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucsam.config import Config, Data, Model, Train, differences, load, override, to_toml

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = {"nuinsseg", "quickstart", "report", "standin"}
PRINTABLE = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=30)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return path


def message(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


# Round trip


def test_defaults_are_the_empty_file(tmp_path):
    assert load(written(tmp_path, "")) == Config()
    assert load(written(tmp_path, "[train]\n")) == Config()


def test_file_is_a_difference_from_the_defaults(tmp_path):
    found = load(written(tmp_path, '[data]\nfold = 3\nroot = "x"\n[train]\nepochs = 7\nlr_head = 1\n'))
    assert found == Config(data=Data(fold=3, root="x"), train=Train(epochs=7, lr_head=1.0))
    assert type(found.train.lr_head) is float


@settings(max_examples=60, deadline=None)
@given(
    root=PRINTABLE,
    group=PRINTABLE,
    fold=st.sampled_from([0, 4, "all"]),
    rate=st.floats(1e-12, 1e12),
    scale=st.floats(1e-3, 1.0),
    flag=st.booleans(),
    seed=st.integers(-(2**60), 2**60),
)
def test_round_trip(tmp_path_factory, root, group, fold, rate, scale, flag, seed):
    config = Config(
        data=Data(root=root, group=group, fold=fold, seed=seed),
        augment=replace(Config().augment, scale_min=scale, d4=flag),
        train=Train(lr_adapter=rate, checkpoint=flag, seed=seed),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize("root", ["tab\there", "line\nbreak", 'quote"d', "back\\slash", "naïve 核", "'"])
def test_round_trip_of_odd_paths(tmp_path, root):
    config = Config(data=Data(root=root))
    assert load(written(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize("root", ["return\rhere", "bell\x07", "delete\x7f"])
def test_round_trip_of_control_characters(tmp_path, root):
    config = Config(data=Data(root=root))
    assert load(written(tmp_path, to_toml(config))) == config


def test_toml_names_every_field():
    text, config = to_toml(Config()), Config()
    names = [f"{f.name} = " for section in fields(config) for f in fields(getattr(config, section.name))]
    assert len(names) == sum(map(len, config.to_dict().values())) > 50
    assert [line.partition("= ")[0] + "= " for line in text.splitlines() if "=" in line] == names


def test_shipped_configurations_load():
    paths = sorted(CONFIGS.glob("*.toml"))
    assert {path.stem for path in paths} == SHIPPED
    loaded = {path.stem: load(path) for path in paths}
    assert all(config != Config() for config in loaded.values())  # each says something
    report = loaded["report"]
    assert (report.model.head, report.model.rank, report.model.alpha) == ("sam", 4, 16.0)
    assert (report.train.epochs, report.train.batch, report.train.lr_adapter) == (30, 4, 1e-4)
    assert (report.train.schedule, report.train.precision, report.train.best) == ("step", "fp16", "dice")
    assert (report.data.split, report.data.seed, report.data.select) == ("official", 19, "test")
    assert loaded["nuinsseg"].data.select == "inner"
    assert loaded["quickstart"].model.weights == "none"


@pytest.mark.parametrize("stem", sorted(SHIPPED))
def test_shipped_configurations_are_differences(stem):
    """What a file sets to its default already is noise, and hides what it changes."""
    tables = tomllib.loads((CONFIGS / f"{stem}.toml").read_text(encoding="utf-8"))
    set_here = {f"{table}.{key}" for table, values in tables.items() for key in values}
    changed = {line.partition(":")[0] for line in differences(Config(), load(CONFIGS / f"{stem}.toml"))}
    assert changed <= set_here
    assert len(set_here) >= 3


def test_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().train.epochs = 3


# Overrides


@pytest.mark.parametrize(
    ("text", "table", "key", "value"),
    [
        ("train.epochs=7", "train", "epochs", 7),
        ("train.lr_head=3e-3", "train", "lr_head", 3e-3),
        ("train.lr_head=1", "train", "lr_head", 1.0),
        ("augment.d4=false", "augment", "d4", False),
        ("model.head=sam", "model", "head", "sam"),
        ("model.head='sam'", "model", "head", "sam"),
        ('model.head="sam"', "model", "head", "sam"),
        ("data.root=data/my images", "data", "root", "data/my images"),
        ("data.root='data/my images'", "data", "root", "data/my images"),
        ("data.root=/a=b/c", "data", "root", "/a=b/c"),
        ("data.root=", "data", "root", ""),
        ("data.root='7'", "data", "root", "7"),
        (r"data.group=^(.*)_\d+$", "data", "group", r"^(.*)_\d+$"),
        (r"data.group='^(.*)_\d+$'", "data", "group", r"^(.*)_\d+$"),
        (r'data.group="^(.*)_\\d+$"', "data", "group", r"^(.*)_\d+$"),
        ("data.fold=all", "data", "fold", "all"),
        ("data.fold=2", "data", "fold", 2),
        (" train.epochs = 7 ", "train", "epochs", 7),
    ],
)
def test_override(text, table, key, value):
    found = override({}, [text])
    assert getattr(getattr(found, table), key) == value
    assert type(getattr(getattr(found, table), key)) is type(value)
    assert len(differences(Config(), found)) == (value != getattr(getattr(Config(), table), key))


def test_overrides_go_over_the_file_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, "[train]\nepochs = 7\nbatch = 2\n")
    found = load(path, ["train.epochs=8", "data.fold=1", "train.epochs=9"])
    assert found == Config(data=Data(fold=1), train=Train(epochs=9, batch=2))


def test_override_leaves_its_tables_alone():
    tables = {"train": {"epochs": 7}}
    assert override(tables, ["train.epochs=9", "model.rank=2"]).train.epochs == 9
    assert tables == {"train": {"epochs": 7}}


@pytest.mark.parametrize("text", ["train.epochs", "epochs=3", "train.=3", "=3", ""])
def test_override_of_another_shape(text):
    assert (
        message(override, {}, [text])
        == f"override: found {text!r}, expected table.key=value, such as data.root=my_folder or train.epochs=10"
    )


# Errors name the field, what was found and what was expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[trian]\nepochs = 3", ["unknown table [trian]", "did you mean train?"]),
        ("[train]\nepoch = 3", ["unknown key train.epoch", "did you mean train.epochs?"]),
        ("[model]\nwidht = 64", ["unknown key model.widht", "did you mean model.width?"]),
        ("[zzz]\n", ["unknown table [zzz]", "known: data, augment, model, loss, instances, train"]),
        ("[loss]\nzzz = 3", ["unknown key loss.zzz", "known: cross_entropy, "]),
        ("train = 3", ["found train = 3", "expected a table [train]"]),
        ("[train]\nepochs = 3.0", ["train.epochs", "found 3.0 (float)", "expected a whole number"]),
        ("[train]\nepochs = true", ["train.epochs", "found True (bool)", "expected a whole number"]),
        ("[train]\nlr_head = 'x'", ["train.lr_head", "found 'x' (str)", "expected a number"]),
        ("[train]\nlr_head = true", ["train.lr_head", "found True (bool)", "expected a number"]),
        ("[augment]\nd4 = 1", ["augment.d4", "found 1 (int)", "expected true or false"]),
        ("[data]\nroot = 3", ["data.root", "found 3 (int)", "expected a string"]),
        ("[data]\nroot = ['x']", ["data.root", "found ['x'] (list)", "expected a string"]),
        ("[data]\nfold = 1.0", ["data.fold", "found 1.0 (float)", "expected a whole number"]),
        ("[data]\nfold = 'al'", ["data.fold", "found 'al'", "'all'"]),
        ("[model]\nhead = 'sma'", ["model.head", "found 'sma'", "expected one of 'instance', 'sam'", "mean sam?"]),
        ("[train]\nbest = 1", ["train.best", "found 1", "expected one of 'dice', 'aji', 'pq'"]),
    ],
)
def test_wrong_names_types_and_choices(tmp_path, text, parts):
    path = written(tmp_path, text)
    found = message(load, path)
    assert found.startswith(f"{path}: ")
    assert [part for part in parts if part not in found] == []


def test_error_of_an_override_is_the_command_lines(tmp_path):
    path = written(tmp_path, "[train]\nepochs = 7\n")
    found = message(load, path, ["train.epoch=3"])
    assert found == "command line: unknown key train.epoch; did you mean train.epochs?"
    assert message(load, written(tmp_path, "[train]\nepoch = 7\n"), ["train.batch=3"]).startswith(str(path))


RANGES = [
    *((f"data.{k}", [0, -1], "at least 1") for k in ("crop",)),
    ("data.folds", [1, 0], "at least 2"),
    ("data.inner", [0.0, 0.51, -0.1, math.nan], "over 0, at most 0.5"),
    ("data.scale", [0.0, -2.0, math.nan], "a positive number"),
    *((f"data.{k}", [-1.0], "0 or more") for k in ("mpp", "memory")),
    ("data.workers", [-1], "0 or more"),
    *((f"augment.{k}", [0.0, -1.0], "a positive number") for k in ("scale_min", "scale_max")),
    *((f"augment.{k}", [-0.1, 1.1, math.nan], "a probability") for k in ("stain", "blur", "noise")),
    *((f"augment.{k}", [-0.1], "0 or more") for k in ("stain_scale", "stain_bias", "blur_sigma", "noise_sigma")),
    ("model.rank", [0, -4], "at least 1"),
    ("model.alpha", [0.0, -1.0], "a positive number"),
    ("model.width", [0, 100, -32], "multiple of 32"),
    *((f"loss.{k}", [-1.0], "0 or more") for k in ("cross_entropy", "boundary", "tversky", "distance", "dice")),
    *((f"instances.{k}", [0.0, 1.0], "between 0 and 1") for k in ("foreground", "seed_rise")),
    ("instances.confidence", [1.0, -0.1], "0 up to but not 1"),
    ("instances.area", [-1], "0 or more"),
    *(
        (f"train.{k}", [0, -1], "at least 1")
        for k in ("epochs", "batch", "accumulate", "step_epochs", "validate_every")
    ),
    *((f"train.{k}", [0.0, -1.0], "a positive number") for k in ("lr_adapter", "lr_head", "clip", "gamma")),
    *((f"train.{k}", [1.0, -0.1], "0 up to but not 1") for k in ("warmup", "ema")),
    *((f"train.{k}", [-1.0], "0 or more") for k in ("weight_decay", "save_minutes")),
]


@pytest.mark.parametrize(("name", "values", "expected"), RANGES, ids=[name for name, *_ in RANGES])
def test_ranges(name, values, expected):
    table, key = name.split(".")
    for value in values:
        found = message(Config.from_dict, {table: {key: value}})
        assert found.startswith(f"{name}: found {value!r}, expected ")
        assert expected in found


def test_every_number_but_seeds_has_a_range():
    """A new field without a rule shows here."""
    free = {"data.fold", "data.seed", "train.seed"}  # fold: a rule of its own, with data.folds
    numbers = {
        f"{section.name}.{f.name}"
        for section in fields(Config)
        for f in fields(section.default_factory)
        if get_type_hints(section.default_factory)[f.name] in (int, float)
    }
    assert numbers - {name for name, *_ in RANGES} <= free


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({"data": {"fold": 5}}, "data.fold: found 5, expected 0 to 4 or 'all'"),
        ({"data": {"fold": -1}}, "data.fold: found -1, expected 0 to 4 or 'all'"),
        ({"data": {"fold": 2, "folds": 2}}, "data.fold: found 2, expected 0 to 1 or 'all'"),
        ({"data": {"fold": "all", "select": "test"}}, "data.select: found 'test' with data.fold = 'all'"),
        ({"data": {"crop": 100, "scale": 1.0}}, "data.crop * data.scale: found 100 * 1 = 100 model px"),
        ({"data": {"crop": 33, "scale": 1.5}}, "data.crop * data.scale: found 33 * 1.5 = 49.5 model px"),
        ({"augment": {"scale_min": 2.0}}, "augment.scale_max: found 1.3, expected at least "),
        ({"train": {"epochs": 4}}, "train.validate_every: found 5, expected at most train.epochs = 4"),
    ],
)
def test_values_that_do_not_go_together(tables, name):
    assert message(Config.from_dict, tables).startswith(name)


def test_values_at_the_limits_are_taken():
    tables = {
        "data": {"fold": 4, "crop": 64, "scale": 1.5, "mpp": 0, "workers": 0, "memory": 0, "inner": 0.5},
        "augment": {"stain": 0, "blur": 1, "scale_min": 1.3},
        "model": {"rank": 1, "width": 32},
        "instances": {"area": 0},
        "train": {"epochs": 5, "batch": 1, "ema": 0, "warmup": 0, "weight_decay": 0},
    }
    found = Config.from_dict(tables).to_dict()
    assert {t: {k: found[t][k] for k in keys} for t, keys in tables.items()} == tables


def test_every_choice_is_taken():
    choices = [
        (section.name, f.name, option)
        for section in fields(Config)
        for f in fields(section.default_factory)
        if get_origin(hint := get_type_hints(section.default_factory)[f.name]) is Literal
        for option in get_args(hint)
    ]
    assert len(choices) == 23
    for table, key, option in choices:
        values = {key: option} | ({"train": "full"} if option == "moving" else {})
        assert getattr(getattr(Config.from_dict({table: values}), table), key) == option


@pytest.mark.parametrize("tables", [{"model": {"train": "lora"}}, {"train": {"checkpoint": True}}])
def test_norms_move_only_where_their_statistics_are_kept(tables):
    tables = {"model": {"train": "full"}} | tables
    tables["model"] = tables["model"] | {"norms": "moving"}
    with pytest.raises(ValueError, match=r"model.norms: found .moving.*expected .full. and false"):
        Config.from_dict(tables)


def test_files_that_cannot_be_read(tmp_path):
    assert message(load, tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: no such configuration file"
    assert message(load, tmp_path).startswith(f"{tmp_path}: not a readable TOML file")
    assert message(load, written(tmp_path, "[train\n")).startswith(f"{tmp_path / 'a.toml'}: not a readable TOML file")
    (tmp_path / "b.toml").write_bytes(b'[data]\nroot = "\xff"\n')
    assert message(load, tmp_path / "b.toml").startswith(f"{tmp_path / 'b.toml'}: not a readable TOML file")


# Differences


def test_differences():
    a = Config()
    b = replace(a, train=replace(a.train, epochs=7), model=Model(head="sam"), data=Data(fold="all"))
    assert differences(a, a) == []
    assert differences(a, b) == [
        "data.fold: 0 -> 'all'",
        "model.head: 'instance' -> 'sam'",
        "train.epochs: 100 -> 7",
    ]
    assert differences(b, a) == [
        "data.fold: 'all' -> 0",
        "model.head: 'sam' -> 'instance'",
        "train.epochs: 7 -> 100",
    ]


@given(st.text(string.printable, max_size=20))
def test_any_override_is_a_configuration_or_a_value_error(text):
    try:
        found = override({}, ["data.group=" + text])
    except ValueError as error:
        assert "data.group" in str(error)
    else:
        assert isinstance(found.data.group, str)
