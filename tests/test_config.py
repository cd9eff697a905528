import math
import os
import re
import string
import tomllib
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nucsam.config import (
    Config,
    Data,
    Model,
    Train,
    compiled,
    conflicts,
    differences,
    load_config,
    override,
    setting_rows,
    to_toml,
)
from nucsam.errors import UserError
from nucsam.files import write_text
from nucsam.folds.jobs import variants

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = {path.stem for path in CONFIGS.glob("*.toml")}
SPECIAL = "\t\n\r\x07\x7f\"\\'"  # half of the characters, so that a few examples meet them all
TEXT = st.text(st.sampled_from(SPECIAL) | st.characters(exclude_categories=["Cs"]), max_size=30)
FIELDS = [
    (f"{table.name}.{field.name}", get_type_hints(table.default_factory)[field.name], field)
    for table in fields(Config)
    for field in fields(table.default_factory)
]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return path


def one_value(name: str, value: object) -> dict:
    table, key = name.split(".")
    return {table: {key: value}}


# Files


def test_defaults_are_the_empty_file(tmp_path):
    assert load_config(written(tmp_path, "")) == Config()
    assert load_config(written(tmp_path, "[train]\n")) == Config()


def test_a_file_is_a_difference_from_the_defaults(tmp_path):
    text = '[data]\nfold = 3\nroot = "x"\n[train]\nepochs = 7\nlr_head = 1\n'
    config = load_config(written(tmp_path, text))
    assert config == Config(data=Data(fold=3, root="x"), train=Train(epochs=7, lr_head=1.0))
    assert type(config.train.lr_head) is float


@settings(max_examples=60, deadline=None)
@given(
    root=TEXT,
    group=TEXT.map(re.escape),
    fold=st.sampled_from([0, 4, "all"]),
    rate=st.floats(1e-12, 1e12),
    scale=st.floats(1e-3, 1.0),
    flag=st.booleans(),
    seed=st.integers(0, 2**60),
)
def test_a_configuration_survives_its_file(
    tmp_path_factory, root, group, fold, rate, scale, flag, seed
):
    config = Config(
        data=Data(root=root, group=group, fold=fold, seed=seed % 2**32),
        augment=replace(Config().augment, scale_min=scale, d4=flag),
        train=Train(lr_adapter=rate, checkpoint=flag, seed=seed),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_file_names_every_setting():
    names = [
        f"{table}.{key}"
        for table, values in tomllib.loads(to_toml(Config())).items()
        for key in values
    ]
    assert names == [name for name, *_ in FIELDS] == list(Config().flat())


def test_the_shipped_configurations_load():
    shipped = {stem: load_config(CONFIGS / f"{stem}.toml") for stem in SHIPPED}
    report = shipped["report"]
    assert (report.model.head, report.model.rank, report.model.alpha) == ("sam", 4, 16.0)
    assert (report.train.epochs, report.train.batch, report.train.lr_adapter) == (30, 4, 1e-4)
    assert (report.train.schedule, report.train.precision) == ("step", "fp16")
    assert (report.data.select, report.train.best) == ("test", "dice")
    assert (report.data.split, report.data.seed) == ("official", 19)
    assert shipped["nuinsseg"].data.select == "inner"
    assert shipped["quickstart"].model.weights == "none"


@pytest.mark.parametrize("stem", sorted(SHIPPED))
def test_a_shipped_configuration_sets_no_default(stem):
    """What a file sets to its default is noise, and hides what it changes."""
    tables = tomllib.loads((CONFIGS / f"{stem}.toml").read_text(encoding="utf-8"))
    config = load_config(CONFIGS / f"{stem}.toml")
    changed = differences(Config(), config).keys()
    assert changed
    assert changed <= {f"{table}.{key}" for table, values in tables.items() for key in values}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_file_of_an_editor_on_windows_is_read(tmp_path, ends):
    (tmp_path / "a.toml").write_bytes(f"\ufeff[data]{ends}folds = 4{ends}".encode())
    assert load_config(tmp_path / "a.toml").data.folds == 4


def test_a_folder_for_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: ")):
        load_config(tmp_path)


def test_a_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().train.epochs = 3


# Overrides


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.epochs=7", "train.epochs", 7),
        ("train.lr_head=3e-3", "train.lr_head", 3e-3),
        ("train.lr_head=1", "train.lr_head", 1.0),
        ("augment.d4=false", "augment.d4", False),
        ("model.head=sam", "model.head", "sam"),
        ("model.head='sam'", "model.head", "sam"),
        ('model.head="sam"', "model.head", "sam"),
        ("data.root=data/my images", "data.root", "data/my images"),
        ("data.root='data/my images'", "data.root", "data/my images"),
        ("data.root=/a=b/c", "data.root", "/a=b/c"),
        ("data.root=", "data.root", ""),
        ("data.root='7'", "data.root", "7"),
        ("data.root=1\nx=2", "data.root", "1\nx=2"),
        (r"data.group=^(.*)_\d+$", "data.group", r"^(.*)_\d+$"),
        (r"data.group='^(.*)_\d+$'", "data.group", r"^(.*)_\d+$"),
        (r'data.group="^(.*)_\\d+$"', "data.group", r"^(.*)_\d+$"),
        ("data.fold=all", "data.fold", "all"),
        ("data.fold=2", "data.fold", 2),
        (" train.epochs = 7 ", "train.epochs", 7),
    ],
)
def test_an_override_sets_one_value(text, name, value):
    config = override({}, [text])
    assert config == Config.from_dict(one_value(name, value))
    assert type(config.flat()[name]) is type(value)
    assert len(differences(Config(), config)) == (value != Config().flat()[name])


def test_overrides_go_over_the_file_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, "[train]\nepochs = 7\nbatch = 2\n")
    config = load_config(path, ["train.epochs=8", "data.fold=1", "train.epochs=9"])
    assert config == Config(data=Data(fold=1), train=Train(epochs=9, batch=2))


def test_an_override_leaves_its_tables_alone():
    tables = {"train": {"epochs": 7}}
    assert override(tables, ["train.epochs=9", "model.rank=2"]).train.epochs == 9
    assert tables == {"train": {"epochs": 7}}


def test_epochs_are_refused_beside_presentations():
    tables = {"train": {"presentations": 1000, "epochs": 12}}
    assert override(tables, ["model.rank=2"]).train.epochs == 12  # as a run's file holds both
    with pytest.raises(UserError, match=r"^train\.epochs: found it beside train\.presentations"):
        override(tables, ["train.epochs=20"])
    assert override(tables, ["train.epochs=20", "train.presentations=0"]).train.epochs == 20
    with pytest.raises(UserError, match=r"^train\.epochs: found it beside train\.presentations"):
        variants(override(tables, []), ["train.epochs=[5, 50]"])


def test_the_side_of_a_model_input_is_rounded_before_it_is_checked():
    for crop, scale in ((200, 1.12), (1600, 1.1)):  # 224.00000000000003 and 1760.0000000000002
        assert override({}, [f"data.crop={crop}", f"data.scale={scale}"]).data.crop == crop


def test_epochs_of_the_same_presentations_are_no_conflict():
    runs = [
        Config(train=Train(epochs=epochs, presentations=seen))
        for epochs, seen in ((9, 0), (10, 0), (9, 800), (10, 800), (10, 900))
    ]
    none, other, first, second, longer = runs
    assert conflicts(first, second) == {}
    assert len(conflicts(none, other)) == 1 and len(conflicts(first, longer)) == 2


@pytest.mark.parametrize("text", ["train.epochs", "epochs=3", "train.=3", "=3", ""])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(UserError, match=f"^override: found {text!r}"):
        override({}, [text])


def test_an_error_names_the_file_or_the_command_line(tmp_path):
    path = written(tmp_path, "[train]\nepoch = 7\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*train.epoch"):
        load_config(path, ["train.batch=3"])
    with pytest.raises(UserError, match=r"^command line: .*train.epoch"):
        load_config(written(tmp_path, "[train]\nepochs = 7\n"), ["train.epoch=3"])


@given(st.text(string.printable, max_size=20))
def test_any_override_is_a_configuration_or_a_user_error(text):
    try:
        config = override({}, ["data.group=" + text])
    except UserError as error:
        assert "data.group" in str(error)
    else:
        assert isinstance(config.data.group, str)


@pytest.mark.parametrize("text", ["many", "'3'", "[3]", "true", "", "1\nx=2", "9" * 5000])
def test_what_is_no_number_is_named(text):
    with pytest.raises(UserError, match=r"train\.epochs: "):
        override({}, [f"train.epochs={text}"])


# Names and types


@pytest.mark.parametrize(
    ("text", "wrong", "known"),
    [
        ("[zzz]\n", "[zzz]", "data, augment, model, loss, instances, train"),
        ("[loss]\nzzz = 3", "loss.zzz", "cross_entropy, boundary"),
    ],
)
def test_a_wrong_name_meets_all_names_where_none_is_near(tmp_path, text, wrong, known):
    with pytest.raises(UserError, match=f"{re.escape(wrong)}.*{known}"):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[train]\nepochs = 3.0", "train.epochs"),
        ("[train]\nlr_head = 'x'", "train.lr_head"),
        ("[train]\nlr_head = true", "train.lr_head"),
        ("[augment]\nd4 = 1", "augment.d4"),
        ("[data]\nroot = 3", "data.root"),
        ("[data]\nroot = ['x']", "data.root"),
        ("[data]\nfold = 1.0", "data.fold"),
        ("[data]\nfold = 'al'", "data.fold"),
        ("[train]\nbest = 1", "train.best"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, text, name):
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{name}"):
        load_config(path)


# Rules

REFUSED = {
    "data.crop model.rank train.epochs train.batch train.accumulate train.step_epochs "
    "train.validate_every": [0, -1, 2**31],
    "data.folds": [1, 0],
    "data.images data.workers instances.area train.presentations": [-1],
    "data.seed": [-1, 2**32],
    "train.seed": [-1, 2**64],
    "model.width": [0, 100, -32],
    "model.finest": [0, 3, 4],
    "data.mpp data.nucleus_area data.memory augment.stain_scale augment.stain_bias "
    "augment.stain_mix augment.blur_sigma augment.noise_sigma loss.cross_entropy loss.boundary "
    "loss.focal loss.tversky loss.lovasz loss.distance loss.dice train.weight_decay "
    "train.save_minutes": [-0.1, math.inf],
    "data.scale augment.scale_min augment.scale_max model.alpha train.lr_adapter train.lr_head "
    "train.clip train.gamma loss.tversky_power": [0.0, -1.0, math.nan, 10**400],
    "data.inner": [0.0, 0.51, -0.1, math.nan],
    "augment.stain augment.blur augment.noise model.adapt": [-0.1, 1.1, math.nan],
    "loss.unlabelled": [0.0, 1.1, math.nan],
    "instances.foreground instances.seed_rise loss.tversky_misses": [0.0, 1.0],
    "instances.confidence train.warmup train.ema": [1.0, -0.1],
    "data.group model.pattern": ["(", "a{99999999999}"],
}
CASES = {name: values for names, values in REFUSED.items() for name in names.split()}


@pytest.mark.parametrize("name", CASES)
def test_a_value_out_of_range_is_refused(name):
    for value in CASES[name]:
        with pytest.raises(UserError, match=f"^{name}: found "):
            Config.from_dict(one_value(name, value))


def test_every_number_has_a_rule_and_a_case():
    ruled = {name for name, _, field in FIELDS if field.metadata["rule"]}
    assert {name for name, kind, _ in FIELDS if kind in (int, float)} <= ruled == set(CASES)


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({"data": {"fold": 5}}, "data.fold"),
        ({"data": {"fold": -1}}, "data.fold"),
        ({"data": {"fold": 2, "folds": 2}}, "data.fold"),
        ({"data": {"fold": "all", "select": "test"}}, "data.select"),
        ({"data": {"mpp": 0.25, "nucleus_area": 430.0}}, "data.nucleus_area"),
        ({"data": {"crop": 100, "scale": 1.0}}, "data.crop * data.scale"),
        ({"data": {"crop": 33, "scale": 1.5}}, "data.crop * data.scale"),
        ({"augment": {"scale_min": 2.0}}, "augment.scale_max"),
        ({"model": {"train": "lora", "norms": "moving"}}, "model.norms"),
        ({"model": {"head": "sam", "adapt": 0.1}}, "model.adapt"),
        ({"model": {"train": "full", "norms": "moving"}, "train": {"checkpoint": True}}, "model"),
    ],
)
def test_values_that_do_not_go_together_are_refused(tables, name):
    with pytest.raises(UserError, match=f"^{re.escape(name)}"):
        Config.from_dict(tables)


def test_values_at_the_limits_are_taken():
    tables = {
        "data": {"fold": 4, "crop": 64, "scale": 1.5, "inner": 0.5, "seed": 2**32 - 1},
        "augment": {"stain": 0, "blur": 1, "scale_min": 1.3},
        "model": {"rank": 1, "width": 32},
        "instances": {"area": 0, "confidence": 0},
        "train": {"epochs": 5, "batch": 2**31 - 1, "ema": 0, "warmup": 0, "seed": 2**64 - 1},
    }
    tables["data"] |= {"mpp": 0, "workers": 0, "memory": 0}
    tables["train"] |= {"weight_decay": 0, "save_minutes": 0, "accumulate": 1}
    config = Config.from_dict(tables).to_dict()
    assert {t: {k: config[t][k] for k in keys} for t, keys in tables.items()} == tables


def test_every_choice_is_taken():
    for name, kind, _ in FIELDS:
        for option in get_args(kind) if get_origin(kind) is Literal else ():
            tables = one_value(name, option)
            if option == "moving":
                tables["model"]["train"] = "full"
            assert Config.from_dict(tables).flat()[name] == option


def test_settings_are_found_by_a_word_and_show_what_a_file_changes():
    config = load_config(CONFIGS / "quickstart.toml")
    rows = {name: rest for name, *rest in setting_rows(config)}
    assert list(rows) == [name for name, *_ in FIELDS] and all(text for *_, text in rows.values())
    assert rows["train.lr_head"][:2] == ["0.001", "0.003"] and rows["train.seed"][1] == ""
    assert "image px" in rows["data.crop"][2] and "dice, aji, pq" in rows["train.best"][2]
    assert [name for name, *_ in setting_rows(config, "GiB")] == ["data.memory"]
    with pytest.raises(UserError, match=r"train[.]epochs"):
        setting_rows(config, "train.epoch ")


def test_differences_name_old_and_new_values():
    a = Config()
    b = replace(a, train=replace(a.train, epochs=7), model=Model(head="sam"), data=Data(fold="all"))
    assert differences(a, a) == {}
    assert list(differences(a, b).values()) == [
        "data.fold: 0 -> 'all'",
        "model.head: 'instance' -> 'sam'",
        "train.epochs: 100 -> 7",
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|ab)*c",
        r"(\w+)\1",
        "(?P<x>a)?(?(x)b|c)",
        "(?:a?){30}b",
        "(?=(a+)*)",
        ".*" * 7,
        ".?" * 7,
        r"(\w|.)" * 7,
        "a" * 201,
    ],
)
def test_a_regular_expression_that_could_hang_is_refused(pattern):
    with pytest.raises(UserError, match=r"data\.group"):
        Config.from_dict({"data": {"group": pattern}})
    with pytest.raises(UserError, match="organ"):
        compiled("organ", pattern)


@pytest.mark.parametrize(
    "pattern", [r"^(.*?)_x\d+_y\d{4}-\d{2}-\d{2}", r"(patient\d+)?", "(ab)+", "a|b+"]
)
def test_a_usual_regular_expression_is_taken(pattern):
    assert compiled("organ", pattern).pattern == pattern


def test_a_folder_whose_name_is_not_utf8_comes_back(tmp_path):
    config = override({}, [f"data.root={os.fsdecode(bytes([99, 0xE9]))}"])
    write_text(tmp_path / "config.toml", to_toml(config))
    assert load_config(tmp_path / "config.toml") == config


def test_a_blur_wider_than_a_crop_is_refused():
    with pytest.raises(UserError, match=r"augment\.blur_sigma: found 25"):
        override({}, ["augment.blur_sigma=25", "data.crop=32", "data.scale=1"])
    override({}, ["augment.blur_sigma=25", "data.crop=32", "data.scale=1", "augment.blur=0"])
