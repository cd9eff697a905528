"""The starter as it comes with nucsam, and the script that trains and measures it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nucsam
from nucsam.download import file_checksum
from nucsam.files import write_text
from nucsam.model.network import build_model
from nucsam.names import STARTER_FILE
from nucsam.run.checkpoint import put_weights, read_tensors
from nucsam.run.metadata import check_metadata

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
import starter

CARD = STARTER_FILE.with_suffix(".md")


def test_the_starter_is_small_and_fits_mobile_sam(base):
    stored = load_file(STARTER_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in stored.values()) <= 1.4e6
    assert STARTER_FILE.stat().st_size < 3e6
    weights, metadata = read_tensors(STARTER_FILE, "adapter")
    config = check_metadata(STARTER_FILE, metadata)
    put_weights(build_model(config.model, base, seed=0), weights, STARTER_FILE)


def test_the_starter_and_its_card_agree():
    _, metadata = read_tensors(STARTER_FILE, "adapter")
    data = metadata["config"]["data"]
    assert (metadata["data"], data["fold"], data["select"]) == ("dsb2018-stained", "all", "inner")
    assert metadata["base"]["source"] == "mobile_sam.pt"
    card = CARD.read_text(encoding="utf-8")
    assert file_checksum(STARTER_FILE).removeprefix("sha256:") in card
    assert metadata["base"]["sha256"] in card
    assert f"epoch {metadata['selected']['epoch']} " in card
    assert "?" not in card  # every score is filled in


def test_the_script_trains_scores_and_draws(published, folder, tiny, tmp_path, monkeypatch, capsys):
    """With settings of seconds, and the children of the curve in this process."""
    write_text(tmp_path / "tiny.toml", nucsam.config.to_toml(tiny("model.weights=auto")))
    monkeypatch.setattr(starter, "CONFIG", tmp_path / "tiny.toml")
    monkeypatch.setattr(starter, "GROUP", "")

    def run_jobs(jobs, common, out):
        (out / ".locks").mkdir()
        for job in jobs:
            nucsam.fit(job.config, job.run)

    monkeypatch.setattr("nucsam.folds.runner.run_jobs", run_jobs)
    out = tmp_path / "runs"
    starter.main(["train", str(folder), "--out", str(out), "data.fold=all", "train.epochs=1"])
    assert read_tensors(out / starter.FILE, "adapter")[1]["data"] == "set"
    starter.main(["score", str(folder), "--out", str(out)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["scores"]["set"]["images"] == 12

    few = ["--images", "4", "--seeds", "1", "--presentations", "8", "--only", "starter"]
    starter.main(["curve", str(folder), "--out", str(out), *few])
    *_, line = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["missing"] == ["MobileSAM, 4 images, seed 1"]
    trained, untrained = document["rows"]
    assert (trained["images"], trained["of_them"]["train"], trained["epochs"]) == (4, 2, 4)
    assert (untrained["start"], untrained["images"]) == ("starter", 0)
    cells = r"\| 4 \| starter \| 1 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|"
    assert re.search(cells, (out / "curve.md").read_text())
    assert (out / "starter-curve.png").is_file()
