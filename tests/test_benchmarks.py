"""The benchmark scripts on settings of seconds, and what could mislead in their numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nucsam.model import targets
from nucsam.model.encoder import Encoder

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench
import data
import encoders
import gpu_tables
import inference
import instances
import metrics
import roofline
import scaling
import slide
import stock
import tissue
import train_step
import writing

SMALL = ["--device", "cpu", "--batch", "1", "--threads", "1", "--repeat", "1"]
COMMON = {"benchmark", "device", "batch", "image_size", "dtype", "machine", "date", "versions"}
SCRIPTS = {  # arguments; keys of the document beside the common ones
    train_step: "--image-size 64 --steps 1 --workers 0 --ways nucsam plain report; pipeline goals",
    data: "--image-size 64 --images 4 --workers 0 --ways nucsam; results met",
    metrics: "--image-size 96 --peers; results goals",
    instances: "--image-size 96 --nuclei 9; results ratios met",
    inference: "--image-size 64 --scale 0.25 --size 300 --images 1 --sample 1; results ratios",
    writing: "--before= --nuclei 9 --memory 9; results memory met",
    encoders: "--image-size 64 --encoders mobile_sam; rows",
    slide: "--side 1024 --stored --against=; mp_tissue results",
    scaling: "--only image-size nuclei data --sides 64 --nuclei 5 --counts 2 4; exponents",
}


def numbers(value):
    """All numbers in nested dicts and lists."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [number for item in items for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_last_line_is_a_document(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.Machine, "ceiling", lambda _: {"tflops": 0.1, "gb_per_s": 10.0})
    monkeypatch.setattr(data, "SIDE", 96)
    monkeypatch.setattr(train_step, "SIDE", 96)
    monkeypatch.setattr(train_step, "IMAGES", 2)
    monkeypatch.setattr(inference, "PERIOD", 512)
    monkeypatch.setattr(slide, "FORMATS", "labels,csv")
    monkeypatch.setattr(writing, "SIDE", 96)
    monkeypatch.setattr(writing, "TABLES", ["geojson", "csv", "parquet"])

    arguments, keys = (text.split() for text in SCRIPTS[script].split(";"))
    script.main([*SMALL, *arguments, "--json", str(tmp_path / "out.json")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line + "\n" == (tmp_path / "out.json").read_text()
    document = json.loads(line)
    assert document["benchmark"] == script.__name__
    assert document.keys() >= COMMON | {*keys}
    assert np.isfinite(numbers(document)).all()
    assert len(numbers(document.get("results", document))) > 10
    if script is train_step:
        assert bool(document["checks"]) == bool(train_step.peft)
    elif script is instances:
        assert all(row["aji"] > 0.8 for row in document["results"]["9"].values())
    elif script is inference:
        assert document["results"]["tiled"]["tiles"] == 4  # of 256 px cover 300 px


def test_nuclei_lost_with_the_glass_are_counted(folder, capsys, monkeypatch):
    for lost in (False, True):
        if lost:  # all is taken for glass
            monkeypatch.setattr(tissue, "is_glass", lambda *_: True)
        tissue.main([str(folder), *SMALL, "--tiles", "64", "--pale", "0"])
        (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"].values()
        assert row["images"] == 12 and 0 < row["skipped"] <= row["tiles"]
        assert row["lost"] == (row["nuclei"] if lost else 0) and row["nuclei"] > 50


def test_a_turn_counts_between_start_and_stop_and_not_the_first(monkeypatch):
    machine = bench.Machine(bench.parse(bench.parser(""), SMALL))
    seconds = [0.0, 0.0]  # wall, CPU
    monkeypatch.setattr(bench.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(bench.time, "process_time", lambda: seconds[1])
    monkeypatch.setattr(bench, "_children_seconds", lambda: 0.0)

    def work(wall, cpu):
        seconds[:] = seconds[0] + wall, seconds[1] + cpu

    def part(turn):
        work(100, 50)
        machine.start()
        work((99, 2, 4, 6)[turn], 2)
        machine.stop()
        work(1000, 500)

    rows = machine.turns({"whole": lambda _: work(3, 1), "part": part}, 3, steps=2)
    assert rows["whole"] == {"ms": 1500, "ms_min": 1500, "ms_max": 1500, "cpu_ms": 500}
    assert rows["part"] == {"ms": 2000, "ms_min": 1000, "ms_max": 3000, "cpu_ms": 1000}


@pytest.mark.parametrize("groups", [1, 8])
def test_flops_of_a_convolution(groups):
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 12, 10, requires_grad=True)
    forward = 2 * (2 * 12 * 10 * 16) * (9 * 8 // groups)  # multiplications and additions
    assert bench.flops(lambda: conv(x)) == forward
    assert bench.flops(lambda: conv(x).sum().backward()) == 3 * forward


def test_the_stock_encoder_equals_ours_at_another_size(base):
    images = torch.rand(1, 3, 96, 96) * 255
    encoder = Encoder(stock.stock_sam(base, 1024).image_encoder)
    with torch.no_grad():
        embedding = stock.embed(stock.stock_sam(base, 96), images)
        assert torch.allclose(embedding, encoder.embed(encoder(images)), atol=1e-4)


def test_the_plain_way_has_the_targets_of_nucsam():
    labels = instances.scene(96, 12)
    batch = torch.from_numpy(labels)[None].long()
    classes = targets.classes(batch)
    counted = np.random.default_rng(0).random(labels.shape) < 0.9
    plain_classes, plain_depth = train_step.plain_targets(labels, counted)
    assert np.array_equal(plain_classes, classes[0])
    counted = torch.from_numpy(counted)[None]
    depth = targets.depth(batch, classes, int(labels.max()), counted)[0]
    assert np.allclose(plain_depth, depth, atol=1e-4)


def test_an_operation_takes_the_longer_of_its_two_times_on_a_gpu():
    """A product of 4096 x 4096 in fp16, a sum of as many numbers in fp32, and a free view."""
    n = 4096
    with roofline.Roofline() as gpu:
        half, single = (
            torch.empty(n, n, dtype=t, device="cuda") for t in (torch.half, torch.float)
        )
        assert gpu.peak == n * n * (2 + 4)
        product = half @ half.t()
        expected = {name: 2 * n**3 / peak for name, (peak, _, _) in roofline.PEAKS.items()}
        assert gpu.seconds == pytest.approx(expected)
        gpu.restart()
        del product
        total = single + single
        expected = {name: 12 * n * n / width for name, (_, _, width) in roofline.PEAKS.items()}
        assert gpu.seconds == pytest.approx(expected)
        assert gpu.launches == 1
        assert gpu.peak == total.nbytes + n * n * (2 + 4)


def test_the_tables_of_a_gpu_say_what_is_not_measured_yet(tmp_path, capsys):
    speeds = {"nucsam": {"images_per_second": 123.0}}
    document = {
        "machine": "H100",
        "versions": {"torch": "2"},
        "step": speeds,
        "pipeline": speeds,
        "ratios": {"pipeline": {"plain": {"speed": 1.5}}},
        "memory_mib": {"nucsam": {"held": 9.0, "reserved": 5120.0}},
    }
    (tmp_path / "step-4-fp16.json").write_text(json.dumps(document))
    gpu_tables.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "Machine: H100; torch 2" in lines
    assert "| batch 4, fp16 | 123 | 123 | 1.5 |  | 5 |" in lines
    assert f"| batch 16, bf16 | {' | '.join(['not measured yet'] * 5)} |" in lines
