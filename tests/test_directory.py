"""A run directory: may a run start there, is it finished, how do several runs compare."""

import os

import pytest
from conftest import whole_scores

from nucsam.config import Config, override
from nucsam.errors import UserError
from nucsam.run.directory import RunDirectory, RunRecord, read_runs

SCORES = whole_scores()


def config(*overrides: str) -> Config:
    return override({}, ["train.epochs=5", *overrides])


def write_run(path, settings: Config, epochs: int = 0, scores: dict | None = None) -> RunDirectory:
    run = RunDirectory(path)
    run.prepare(settings, {})
    if epochs:
        run.write_metrics([{"epoch": k, "loss": 1 / k} for k in range(1, epochs + 1)])
    if scores:
        run.write_scores(scores)
    return run


def test_what_is_written_is_read(tmp_path):
    run = write_run(tmp_path / "run", config(), 5, SCORES)
    facts = {"nucsam": "1", "python": "3", "platform": "x", "device": "CPU", "precision": "no"}
    facts |= {"base": "x", "base_sha256": "0", "processes": 1, "parameters": 2}
    facts |= {"parameters_trainable": 1, "packages": {}, "images": {"train": 1}, "command": ["x"]}
    run.write_environment(facts)
    assert run.read_config() == config()
    assert run.read_metrics()[:2] == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    assert run.read_environment() == facts
    assert run.read_scores(config()) == SCORES
    record = RunRecord.read(run.path)
    assert record.environment == facts
    assert record.rows == [{**SCORES["scores"][0]["images"][0], "fold": 0, "run": record}]


def test_undefined_scores_are_written_as_null(tmp_path):
    headline = {"dice": 0.5, "aji": float("nan"), "pq": 0.5}
    run = write_run(tmp_path, config(), 5, whole_scores(headline=headline))
    assert run.read_scores(config())["headline"] == {"dice": 0.5, "aji": None, "pq": 0.5}


def test_before_the_first_epoch_there_is_nothing_to_read(tmp_path):
    run = write_run(tmp_path, config())
    assert (run.read_metrics(), run.read_environment(), run.read_scores(config())) == ([], {}, None)
    assert run.epochs_done() == 0


@pytest.mark.parametrize(
    ("epochs", "scores", "finished"),
    [(5, SCORES, True), (5, None, False), (4, SCORES, False), (0, SCORES, False)],
)
def test_finished_means_all_epochs_and_scores(tmp_path, epochs, scores, finished):
    run = write_run(tmp_path, config(), epochs, scores)
    assert run.is_finished(config()) == finished
    assert run.read_scores(config()) == (scores if finished else None)
    assert RunRecord.read(run.path).scores == (scores if finished else None)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("epoch",), "3"),
        (("epoch",), 10**400),
        (("headline", "aji"), 1e300),
        (("headline",), []),
        (("base",), {"source": None}),
        (("scores",), []),
        (("scores", 0, "images", 0, "n_truth"), -1),
        (("scores", 0, "images", 0, "outcomes"), {"missed": 1}),
        (("scores", 0, "summary", "organs"), {"liver": {"images": 1}}),
        (("split",), 3),
    ],
)
def test_scores_of_another_form_are_named(tmp_path, place, value):
    scores = whole_scores()
    *outer, last = place
    inside = scores
    for key in outer:
        inside = inside[key]
    inside[last] = value
    run = write_run(tmp_path, config(), 5, scores)
    with pytest.raises(UserError, match=r"scores\.json"):
        run.read_scores(config())


def test_scores_of_another_split_are_refused(tmp_path):
    run = write_run(tmp_path, config(), 5, whole_scores(split={"fold": 0, "seed": 19}))
    assert run.read_scores(config())["split"] == {"fold": 0, "seed": 19}
    with pytest.raises(UserError, match=r"data\.fold: 0 -> 1"):
        run.read_scores(config("data.fold=1"))


def test_one_process_holds_a_run_directory(tmp_path):
    run = RunDirectory(tmp_path / "a" / "run")
    with run.claim():
        refused = pytest.raises(UserError, match=rf"a/run: process {os.getpid()} .* trains")
        with refused, RunDirectory(run.path).claim():
            raise AssertionError
        assert run.path.is_dir()
    assert not (tmp_path / "a").exists()  # no run has begun
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(UserError, match=r"file.*: expected a folder"),
            RunDirectory(path).claim(),
        ):
            raise AssertionError
    with run.claim():
        run.prepare(config(), {})
    with run.claim():
        assert run.exists()


def image(**changes):
    return {"organ": "liver", "group": "g", "part": "train", "sha256": "0" * 64} | changes


def test_other_images_are_named(tmp_path):
    run = RunDirectory(tmp_path)
    images = {name: image() for name in "abc"}
    with pytest.raises(UserError, match=r"added: a, b, c$"):  # of a run that has lost its file
        run.check_images(images, "data")
    run.prepare(config(), images)
    run.check_images(images, "data")
    changed = {"b": image(sha256="1" * 64), "c": image(part="test", group="h"), "d": image()}
    with pytest.raises(UserError, match="data: ") as error:
        run.check_images(changed, "data")
    for text in ("added: d", "removed: a", "labels: b", "group: c", "split: c"):
        assert text in str(error.value)


def test_preparing_clears_partial_files_and_nothing_else(tmp_path):
    run = write_run(tmp_path, config(), 1)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".last.safetensors.999999999.partial").write_text("half")
    alive = tmp_path / f".report.html.{os.getppid()}.partial"
    alive.write_text("half")
    run.prepare(config(), {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        alive.name,
        "config.toml",
        "images.json",
        "metrics.jsonl",
        "state",
    ]


def test_a_run_starts_in_an_empty_folder_and_resumes_with_its_own_settings(tmp_path):
    run = RunDirectory(tmp_path)
    run.check(config(), resume=False)
    for name in (".config.toml.3.partial", run.images_file.name):
        (tmp_path / name).write_text("of a killed process")
    run.check(config(), resume=False)
    run.prepare(config(), {})
    run.check(config(), resume=True)
    run.check(config("data.workers=7", "train.save_minutes=1"), resume=True)  # may change
    with pytest.raises(UserError, match=str(tmp_path)):
        run.check(config(), resume=False)
    with pytest.raises(UserError, match=r"config\.toml.*train\.batch: 4 -> 8"):
        run.check(config("train.batch=8"), resume=True)


def test_runs_are_sorted_by_value_and_fold_and_named_by_what_differs(tmp_path):
    for rank in (16, 4):
        for fold in ("all", 1, 0):
            settings = config(f"model.rank={rank}", f"data.fold={fold}", f"data.workers={rank}")
            write_run(tmp_path / f"rank{rank}" / f"fold{fold}", settings)
    assert [(run.variant, run.name) for run in read_runs(tmp_path)] == [
        ("model.rank=4", "fold 0"),
        ("model.rank=4", "fold 1"),
        ("model.rank=16", "fold 0"),
        ("model.rank=16", "fold 1"),
    ]
    for only in ("fold0", "foldall"):
        (alone,) = read_runs(tmp_path / "rank4" / only)
        assert (alone.variant, alone.name) == ("", f"fold {only.removeprefix('fold')}")


def test_another_data_set_is_another_variant(tmp_path):
    for root, sha in (("data", "0"), ("other", "1"), ("moved", "0")):
        for fold in (0, 1) if root == "data" else (2,) if root == "moved" else (0,):
            run = RunDirectory(tmp_path / f"{root}{fold}")
            entry = {"organ": "", "group": "", "part": "train", "sha256": sha}
            run.prepare(config(f"data.root={root}", f"data.fold={fold}"), {"a": entry})
    variants = {run.folder.name: run.variant for run in read_runs(tmp_path)}
    assert variants["data0"] == variants["data1"] == "data.root=data"
    assert variants["other0"] == "data.root=other"


def test_moved_images_make_no_variant_and_a_fold_comes_once(tmp_path):
    for fold in (0, 1):
        write_run(tmp_path / f"fold{fold}", config(f"data.root={fold}", f"data.fold={fold}"))
    assert [run.variant for run in read_runs(tmp_path)] == ["", ""]
    write_run(tmp_path / "again", config("data.fold=1"))
    with pytest.raises(UserError, match=r"again.*fold1|fold1.*again"):
        read_runs(tmp_path)


def test_epochs_that_follow_from_presentations_make_no_variant(tmp_path):
    for number in (1000, 2000):
        for fold in (0, 1):  # of different numbers of images
            epochs = f"train.epochs={number // (7 + fold)}"
            presentations = f"train.presentations={number}"
            tables = config(f"data.fold={fold}", epochs).to_dict()
            tables["train"]["presentations"] = number
            write_run(tmp_path / presentations / f"fold{fold}", Config.from_dict(tables))
    variants = [run.variant for run in read_runs(tmp_path)]
    assert variants == 2 * ["train.presentations=1000"] + 2 * ["train.presentations=2000"]
