"""A run directory: may a run start there, is it finished, how do several runs compare."""

import pytest

from nucsam.config import Config, override
from nucsam.errors import UserError
from nucsam.run.directory import RunDirectory, RunRecord, read_runs

SCORES = {"headline": {"dice": 0.5}, "scores": [{"images": [{"name": "a", "organ": "b", "x": 1}]}]}


def config(*overrides: str) -> Config:
    return override({}, ["train.epochs=5", *overrides])


def write_run(path, settings: Config, epochs: int = 0, scores: dict | None = None) -> RunDirectory:
    run = RunDirectory(path)
    run.prepare(settings)
    if epochs:
        run.write_metrics([{"epoch": k, "loss": 1 / k} for k in range(1, epochs + 1)])
    if scores:
        run.write_scores(scores)
    return run


def test_what_is_written_is_read(tmp_path):
    run = write_run(tmp_path / "run", config(), 2, SCORES)
    run.write_environment({"device": "CPU"})
    assert run.read_config() == config()
    assert run.read_metrics() == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    assert run.read_environment() == {"device": "CPU"}
    assert run.read_scores() == SCORES
    record = RunRecord.read(run.path)
    assert record.rows == [{"name": "a", "organ": "b", "x": 1, "fold": 0, "run": record}]


def test_undefined_scores_are_written_as_null(tmp_path):
    run = write_run(tmp_path, config(), 5, {"headline": {"aji": float("nan")}})
    assert run.read_scores() == {"headline": {"aji": None}}


def test_before_the_first_epoch_there_is_nothing_to_read(tmp_path):
    run = write_run(tmp_path, config())
    assert (run.read_metrics(), run.read_environment(), run.read_scores()) == ([], {}, None)
    assert run.epochs_done() == 0


@pytest.mark.parametrize(
    ("epochs", "scores", "finished"),
    [(5, SCORES, True), (5, None, False), (4, SCORES, False), (0, SCORES, False)],
)
def test_finished_means_all_epochs_and_scores(tmp_path, epochs, scores, finished):
    assert write_run(tmp_path, config(), epochs, scores).is_finished(config()) == finished


def test_preparing_clears_partial_files_and_nothing_else(tmp_path):
    run = write_run(tmp_path, config(), 1)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".last.safetensors.7.partial").write_text("half")
    run.prepare(config())
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "config.toml",
        "metrics.jsonl",
        "state",
    ]


def test_a_run_starts_in_an_empty_folder_and_resumes_with_its_own_settings(tmp_path):
    run = RunDirectory(tmp_path)
    run.check(config(), resume=False)
    (tmp_path / ".config.toml.3.partial").write_text("of a killed process")
    run.check(config(), resume=False)
    run.prepare(config())
    run.check(config(), resume=True)
    run.check(config("data.workers=7", "train.save_minutes=1"), resume=True)  # may change
    with pytest.raises(UserError, match=str(tmp_path)):
        run.check(config(), resume=False)
    with pytest.raises(UserError, match=r"config\.toml.*train\.batch: 4 -> 8"):
        run.check(config("train.batch=8"), resume=True)


def test_runs_are_sorted_by_value_and_fold_and_named_by_what_differs(tmp_path):
    for rank in (16, 4):
        for fold in (1, 0):
            settings = config(f"model.rank={rank}", f"data.fold={fold}", f"data.workers={rank}")
            write_run(tmp_path / f"rank{rank}" / f"fold{fold}", settings)
    assert [(run.variant, run.name) for run in read_runs(tmp_path)] == [
        ("model.rank=4", "fold 0"),
        ("model.rank=4", "fold 1"),
        ("model.rank=16", "fold 0"),
        ("model.rank=16", "fold 1"),
    ]
    (alone,) = read_runs(tmp_path / "rank4" / "fold0")
    assert (alone.variant, alone.name) == ("", "fold 0")
