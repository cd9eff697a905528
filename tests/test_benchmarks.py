"""The benchmark scripts on settings of seconds: they run, and their last line is JSON with what they promise."""

import json
import sys
import weakref
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch._dynamo.testing import CompileCounter

from nucsam.encoder import Encoder
from nucsam.lora import LoRALinear
from nucsam.metrics import PROTOCOLS, score

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench
import data
import inference
import instances
import metrics
import scaling
import stock
import train_step

COMMON = {
    "benchmark",
    "device",
    "batch",
    "image_size",
    "dtype",
    "repeat",
    "machine",
    "cores",
    "load",
    "date",
    "versions",
}
SMALL = ["--device", "cpu", "--batch", "1", "--threads", "1", "--repeat", "1"]
TIMES = {"ms", "ms_min", "ms_max", "images_per_second"}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a script's main with SMALL and more on small images; its document, which its file holds too."""
    monkeypatch.setattr(bench.Machine, "ceiling", lambda _: {"tflops": 0.1, "gb_per_s": 10.0})
    monkeypatch.setattr(data, "SIDE", 96)
    monkeypatch.setattr(train_step, "SIDE", 96)
    monkeypatch.setattr(train_step, "IMAGES", 2)
    monkeypatch.setattr(inference, "PERIOD", 512)

    def call(script, *arguments):
        script.main([*SMALL, *arguments, "--json", str(tmp_path / "out.json")])
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document == json.loads((tmp_path / "out.json").read_text())
        assert document["benchmark"] == script.__name__
        assert document.keys() >= COMMON
        return document

    return call


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU, taken for a GPU by what asks `Machine.cuda`."""
    init = bench.Machine.__init__

    def pretend(self, args):
        init(self, args)
        self.cuda, self.clock = True, "ms"

    monkeypatch.setattr(bench.Machine, "__init__", pretend)
    monkeypatch.setattr(bench.Machine, "synchronize", lambda _: None)
    monkeypatch.setattr(bench.Machine, "peak_mib", lambda _, call: 0.0 * bool(call()))
    monkeypatch.setattr(bench, "_gpu", lambda: "a GPU")


# ---- what they share ----


class Counted:
    """A call that says how often it was called, and with what."""

    def __init__(self):
        self.numbers = []

    def __call__(self, number):
        self.numbers.append(number)


@pytest.fixture
def machine():
    return bench.Machine(bench.parse(bench.parser(""), SMALL))


def test_turns_are_taken_and_the_first_is_not_counted(machine, monkeypatch):
    ticks = iter(np.cumsum([0, 100.0, 0, 100, 0, 1, 0, 4, 0, 3, 0, 6]).tolist())  # start and end: a, b; a, b; a, b
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    a, b = Counted(), Counted()
    rows = machine.turns({"a": a, "b": b}, 2, steps=2)
    assert a.numbers == b.numbers == [0, 1, 2]
    assert [rows[name][key] for name in "ab" for key in ("ms", "ms_min", "ms_max")] == [
        1000,
        500,
        1500,
        2500,
        2000,
        3000,
    ]
    assert rows["a"].keys() == {"ms", "ms_min", "ms_max", "cpu_ms"}


def test_a_call_may_start_and_stop_its_clock(machine, monkeypatch):
    seconds = [0.0, 0.0]  # wall, CPU
    monkeypatch.setattr(bench.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(bench.time, "process_time", lambda: seconds[1])
    monkeypatch.setattr(bench, "_children_seconds", lambda: 0.0)

    def work(wall, cpu):
        seconds[0] += wall
        seconds[1] += cpu

    def call(_):
        work(100, 50)
        machine.start()
        work(4, 2)
        machine.stop()
        work(1000, 500)

    found = machine.turns({"whole": lambda _: work(3, 1), "part": call}, 3)
    assert [found[name][key] for name in ("whole", "part") for key in ("ms", "cpu_ms")] == [3000, 1000, 4000, 2000]


def test_peak_is_that_of_the_call(machine):
    assert machine.peak_mib(lambda: np.ones(40 * 2**17)) == pytest.approx(40, abs=5)
    assert machine.peak_mib(lambda: None) < 5


def test_ceilings_are_those_of_a_machine(machine):
    found = machine.ceiling()
    assert 1e-3 < found["tflops"] < 100
    assert 0.1 < found["gb_per_s"] < 1e4


@pytest.mark.parametrize("groups", [1, 8])
def test_flops_of_a_convolution(groups):
    """Multiplications and additions by hand; a backward pass is two more of the forward one."""
    conv, x = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False), torch.randn(2, 8, 12, 10, requires_grad=True)
    forward = 2 * (2 * 12 * 10 * 16) * (9 * 8 // groups)
    assert bench.flops(lambda: conv(x)) == forward
    assert bench.flops(lambda: conv(x).sum().backward()) == 3 * forward
    conv.requires_grad_(False)
    assert bench.flops(lambda: conv(x).sum().backward()) == 2 * forward


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--dtype", "fp16", "--dtype fp16: a CPU would compute in fp32"),
        ("--device", "tpu", "found 'tpu', expected auto, cpu, cuda or cuda:N"),
        ("--device", "cuda:64", "so no cuda:64; expected cpu"),
        ("--batch", "0", "--batch: found 0, expected at least 1"),
        ("--threads", "two", "--threads: invalid integer value: 'two'"),
        ("--image-size", "100", "--image-size: found 100, expected at least 64, a multiple of 32"),
        ("--json", "none/such.json", "--json: found no folder none, expected the file in one that is there"),
    ],
)
def test_mistakes_are_named_before_anything_is_timed(capsys, option, value, message):
    with pytest.raises(SystemExit):
        bench.parse(bench.parser(""), ["--device", "cpu", option, value])
    assert message in " ".join(capsys.readouterr().err.split())


def test_flops_of_lora():
    layer, x = LoRALinear(nn.Linear(16, 32), rank=4, alpha=4.0), torch.randn(2, 5, 16)
    assert bench.flops(lambda: layer(x)) == 2 * 10 * (16 * 32 + 4 * (16 + 32))


def test_the_stock_encoder_runs_at_any_size(base):
    """Beside ours, which tests/test_encoder.py holds against the package's own forward."""
    images = torch.rand(1, 3, 96, 96) * 255
    own = Encoder(stock.stock_sam(base, 1024).image_encoder)
    with torch.no_grad():
        found = stock.embed(stock.stock_sam(base, 96), images)
        assert found.shape == (1, 256, 6, 6)
        assert torch.allclose(found, own.embed(own(images)), atol=1e-4)


# ---- train_step.py ----


def test_train_step(run):
    ways = ["nucsam", "full", *(["plain", "tuned", "report"] if train_step.peft else [])]
    document = run(train_step, "--image-size", "64", "--steps", "1", "--workers", "0", "1")
    assert set(document["trained"]) == set(ways)
    assert document["trained"]["full"] > 5 * document["trained"]["nucsam"]
    for stage in ("encoder", "step", "pipeline"):
        assert set(document[stage]) == set(ways)
        assert set(document["ratios"][stage]) == set(ways) - {"nucsam"}
        for row in document[stage].values():
            assert row.keys() >= TIMES | {"peak_mib", "saved_mib", "cpu_s_per_image", "flops", "tflops_per_s"}
            assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
    memory, averaged = document["memory_mib"], ("nucsam", "full")
    for name, trained in document["trained"].items():
        of = memory[name]
        assert of["gradients"] == pytest.approx(4 * trained / 2**20)
        assert of["optimizer"] == pytest.approx(8 * trained / 2**20, rel=0.01)  # two moments, and counters
        assert of["average"] == pytest.approx(
            4 * trained / 2**20 if name in averaged else 0, rel=0.01
        )  # and the norms'
        assert of["held"] == pytest.approx(
            sum(of[key] for key in ("weights", "optimizer", "average", "peak_of_a_step"))
        )
        assert of["activations"] == document["step"][name]["saved_mib"] == document["pipeline"][name]["saved_mib"]
        assert (
            document["encoder"][name]["flops"] < document["step"][name]["flops"] <= document["pipeline"][name]["flops"]
        )
    profile = document["profile_ms_per_image"]
    parts = {
        "encoder, frozen part",
        "encoder, adapted part",
        "head",
        "targets",
        "augmentation",
        "optimizer",
        "transfer",
    }
    assert profile["nucsam"].keys() >= parts
    assert profile["nucsam"]["encoder, frozen part"] > 0
    assert profile["full"]["encoder, frozen part"] == 0
    peers = {"plain", "tuned"} & set(ways)
    assert set(document["bars"]) == {f"encoder, speed >= 1.2, saved <= 0.75 of {peer}" for peer in peers}


def test_train_step_compiled(run, monkeypatch):
    """The graphs are those of the compiler, run as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    document = run(train_step, "--image-size", "64", "--steps", "1", "--workers", "0", "--ways", "nucsam", "--compile")
    assert counter.frame_count >= 2  # encoder and head
    assert document["step"]["nucsam"]["saved_mib"] > 0


def test_the_report_trains_lora_on_the_forty_live_layers(base):
    pytest.importorskip("peft")
    encoder = train_step.ReportEncoder(stock.stock_sam(base, 64))
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 80
    assert all("lora_" in name for name in trained)
    encoder(torch.rand(1, 3, 64, 64) * 255).neck.square().sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if "lora_B" in name)


def test_the_frozen_part_ends_where_the_first_weight_trains():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    net.requires_grad_(False)
    net[1][1].requires_grad_(True)
    net[2].requires_grad_(True)
    assert train_step.first_trained(net) is net[1][1]


def test_what_does_not_fit_is_left_out_and_freed(monkeypatch):
    class Way:
        def __init__(self, large):
            self.large = large

        def trial(self):
            activations.append(weakref.ref(kept := torch.zeros(1)))
            if self.large:
                raise torch.OutOfMemoryError
            return len(kept)

    activations, left, ways = [], [], {"a": Way(True), "b": Way(False), "c": Way(True)}
    large = [weakref.ref(ways[name]) for name in "ac"]
    # An emptied cache gives back what is free by then.
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append((large[len(left)](), activations[-1]())))
    assert train_step.those_that_fit(ways, Way.trial) == {"b": 1}
    assert list(ways) == ["b"]
    assert left == [(None, None)] * 2


def test_none_that_fits_is_a_message(run, monkeypatch):
    def trial(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_step, "trial", trial)
    with pytest.raises(SystemExit, match="found none of nucsam, full that is installed and fits"):
        run(train_step, "--image-size", "64", "--ways", "nucsam", "full")


def test_a_turn_of_the_pipeline_counts_a_loader_under_way(monkeypatch):
    """Of two workers: a step for each before the clock starts, and two batches each that are only drained."""

    class Loader:
        num_workers, batch_sampler = 2, data.EpochBatches([0], batch=1)

        def __iter__(self):
            for number in range(9):
                events.append(f"load {number}")
                yield number

    args = bench.parse(bench.parser(""), SMALL)
    args.steps, events = 3, []
    bench_of_three = train_step.Bench(args, train_step.Config())
    for name in ("start", "stop"):
        monkeypatch.setattr(bench_of_three, name, lambda name=name: events.append(name))
    monkeypatch.setattr(bench_of_three, "step", lambda _, number: events.append(f"step {number}"))
    bench_of_three.epoch(None, Loader(), 7)
    assert Loader.batch_sampler.epoch == 7
    first, counted = ([word for n in part for word in (f"load {n}", f"step {n}")] for part in (range(2), range(2, 5)))
    assert events == [*first, "start", *counted, "stop", *(f"load {number}" for number in range(5, 9))]
    way = Namespace(data=range(4))
    assert [len(bench_of_three.loader(way, workers)) for workers in (0, 2)] == [3, 9]


ENCODER = "encoder, speed >= 1.2, saved <= 0.75 of plain"
BARS = {
    ("cpu", 256, "fp32", 1): {ENCODER: False},
    ("cpu", 512, "bf16", 4): {ENCODER: False, "pipeline, speed >= 1.5 of plain": True},
    ("cuda:0", 1024, "fp16", 4): {"pipeline, speed >= 3 of plain": False, "nucsam within 6 GiB": True},
    ("cuda:0", 1024, "bf16", 4): {"nucsam within 6 GiB": True},
    ("cuda:0", 1024, "fp16", 16): {},
}


@pytest.mark.parametrize("made", BARS)
def test_bars_of_a_device_size_dtype_and_batch(made):
    ratios = {"encoder": {"speed": 1.3, "saved": 0.8}, "step": {"speed": 2.0}, "pipeline": {"speed": 2.0}}
    document = dict(zip(("device", "image_size", "dtype", "batch"), made))
    document |= {"compile": False, "ratios": {stage: {"plain": of} for stage, of in ratios.items()}}
    document |= {"memory_mib": {"nucsam": {"held": 6000}}}
    assert train_step.bars(document) == BARS[made]
    document["memory_mib"]["nucsam"]["reserved"] = 6145  # what the allocator took counts, where it is known
    assert not train_step.bars(document).get("nucsam within 6 GiB", False)
    document["ratios"] = {stage: {} for stage in ratios}
    assert not [bar for bar in train_step.bars(document) if "speed" in bar]


@pytest.mark.parametrize(
    "option, message",
    [
        (["--steps", "0"], "--steps: found 0, expected at least 1"),
        (["--workers", "0", "-1"], "--workers: found -1, expected at least 0"),
        (["--memory-cap", "-1"], "--memory-cap: found -1, expected at least 0"),
        (["--config", "none.toml"], "--config: none.toml: no such configuration file"),
        (["--config", "configs/report.toml"], "--config: found model.train, model.head = ('lora', 'sam')"),
        (["--snapshot", "none/such.pickle"], "--snapshot: found no folder none"),
    ],
)
def test_mistakes_of_a_training_step_are_named(option, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit):
        train_step.main(["--device", "cpu", *option])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", [["--memory-cap", "15"], ["--snapshot", "x.pickle"]])
def test_options_of_a_gpu_are_refused_on_a_cpu(option, capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--device", "cpu", *option])
    assert "expected cuda" in capsys.readouterr().err


# ---- data.py ----


def test_data(run):
    document = run(data, "--image-size", "64", "--images", "4", "--workers", "0", "--ways", "nucsam")
    assert list(document["results"]) == ["nucsam 0"]
    row = document["results"]["nucsam 0"]
    assert row.keys() == {"loader", "first", "later"}
    assert all(0 <= of["waits"] <= 1 and of["images"] == 4 for of in row.values())
    assert row["loader"]["waits"] > row["later"]["waits"]  # without a step there is nothing but waiting
    assert row["loader"]["images_per_second"] > row["later"]["images_per_second"]
    assert document["decode_s"] > 0
    assert document["decode_mib"] >= 4 * 5 * 96**2 / 2**20  # RGB and uint16 labels


def test_a_data_set_of_links(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DISTINCT", 2)
    monkeypatch.setattr(data, "SIDE", 64)
    records = data.make_records(tmp_path / "set", 5)
    assert len(records) == 5
    assert len({record.image.read_bytes() for record in records}) == 2


# ---- metrics.py ----


def test_metrics(run):
    document = run(metrics, "--image-size", "96", "--peers")
    found = document["results"]["96"]
    assert set(found) == {"floor", "nucsam score", "nucsam dice"}
    assert all(row.keys() >= TIMES | {"calls", "peak_mb"} and row["calls"] >= 5 for row in found.values())
    assert document["bars"] == []  # none is of this size
    times = {"floor": 1, "nucsam score": 19, "stardist": 200}
    bars = metrics.bars({"1024": {name: {"ms": ms} for name, ms in times.items()}})
    assert [(bar["met"], round(bar["measured"], 2)) for bar in bars] == [(True, 10.53), (True, 19.0)]


# ---- instances.py ----


def test_instances(run):
    document = run(instances, "--image-size", "128", "--nuclei", "4", "30")
    assert set(document["results"]) == set(document["met"]) == {"4", "30"}
    for n, found in document["results"].items():
        assert set(found) == {"ours", "hover", "micro-sam"}
        for row in found.values():
            assert row.keys() >= TIMES | {"peak_mib", "part_of_copy"}
            assert row["truth"] == int(n)
            assert row["aji"] > 0.8
    assert set(document["ratios"]["30"]) == {"hover", "micro-sam"}


def test_the_peers_split_what_touches():
    """Two discs that touch: one component, two nuclei for all ways."""
    y, x = np.mgrid[:64, :64]
    labels = ((y - 32) ** 2 + (x - 20) ** 2 <= 100) + 2 * ((y - 32) ** 2 + (x - 41) ** 2 <= 100)
    maps = instances.maps_of(labels.astype(np.int32))
    for name, way in instances.WAYS.items():
        found = score(labels.astype(np.int32), way(maps).astype(np.int32), protocol=PROTOCOLS["plain"])
        assert found.pq > 0.85, name
    parts, _ = ndimage.label(maps["foreground"] > 0.5)
    assert parts[32, 20] == parts[32, 41] > 0  # negative control: without depth they are one


def test_offsets_go_from_minus_one_to_one():
    labels = np.zeros((20, 30), np.int32)
    labels[4:9, 10:21] = 3
    down, across, centre = instances.offsets(labels)
    assert across[6, 10:21].tolist() == pytest.approx(np.linspace(-1, 1, 11).tolist())
    assert down[4:9, 12].tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert (across[labels == 0] == 0).all()
    assert centre[6, 10:21].tolist() == pytest.approx((np.abs(np.arange(-5, 6)) / np.hypot(5, 2)).tolist())
    assert (centre[labels == 0] == 1).all()


# ---- inference.py ----


def test_inference(run):
    document = run(
        inference, "--image-size", "64", "--scale", "0.25", "--size", "300", "--images", "1", "--sample", "1"
    )
    assert set(document["results"]) == {"stock 64", "tiled", "images"}
    assert set(document["ratios"]) == {"tiled", "images"}
    for name in ("tiled", "images"):
        row = document["results"][name]
        assert row.keys() >= TIMES | {"peak_mib", "mp_per_second", "times_stock_of_tiles"}
        assert row["seconds_in"].keys() == {"encoder", "head", "nuclei", "reading", "writing"}
        assert row["nuclei"] > 20  # the maps are those that the image shows, not those of random weights
    rows = document["results"]
    assert rows["tiled"]["tiles"] == 4  # 300 px by tiles of 256 px
    bare, spent = rows["stock 64"]["cpu_ms"] / (rows["stock 64"]["tiles"] * 256**2), rows["tiled"]["cpu_ms"]
    assert document["clock"] == "cpu_ms"
    assert rows["tiled"]["times_stock"] == pytest.approx(spent / (bare * 300**2))
    assert rows["tiled"]["times_stock_of_tiles"] == pytest.approx(spent / (bare * 4 * 256**2))


def test_inference_beside_the_stock_encoder_at_its_best(run):
    """Images of 512 px in one tile beside stock at 256 px; larger ones beside the faster of that and 224 px."""
    document = run(
        inference, "--image-size", "256", "--scale", "0.5", "--size", "600", "--images", "1", "--sample", "1"
    )
    rows = document["results"]
    assert set(rows) == {"stock 224", "stock 256", "tiled", "images"}
    bare = {side: rows[f"stock {side}"]["cpu_ms"] / side**2 for side in (224, 256)}
    assert rows["images"]["times_stock"] == pytest.approx(rows["images"]["cpu_ms"] / (bare[256] * 256**2))
    assert rows["tiled"]["times_stock"] == pytest.approx(rows["tiled"]["cpu_ms"] / (min(bare.values()) * 300**2))


def test_inference_as_on_a_gpu(run, as_on_a_gpu):
    document = run(inference, "--image-size", "64", "--scale", "0.25", "--size", "0", "--images", "2", "--sample", "1")
    row, bare = (document["results"][name] for name in ("images", "stock 64"))
    assert document["clock"] == "ms" and min(row["without_nuclei_ms"], row["watched_ms"]) > 0
    times = (row["ms"] / row["model_px"]) / (bare["ms"] / bare["model_px"])
    assert row["times_stock_of_tiles"] == pytest.approx(times)
    assert sum(row["seconds_in"].values()) < 2e-3 * row["watched_ms"]


def test_what_is_shown_is_what_the_picture_holds():
    """A picture's maps as logits: their probabilities are its channels."""
    images = torch.full((1, 3, 32, 32), 0.0)
    images[:, 0], images[:, 1], images[:, 2] = 0.9 * 255, 0.25 * 255, 0.5 * 255
    maps = inference.shown(nn.Identity(), (images, (16, 16)), torch.zeros(1))
    assert maps.shape == (1, 4, 16, 16)
    background, inside, boundary = maps[0, :3, 4, 4].softmax(0).tolist()
    assert [1 - background, boundary] == pytest.approx([0.9, 0], abs=1e-4)
    assert inside == pytest.approx(0.9, abs=1e-4)
    assert maps[0, 3, 4, 4].sigmoid().item() == pytest.approx(0.25, abs=1e-4)


# ---- scaling.py ----


def test_scaling(run, tmp_path):
    sizes = ["--sides", "64", "96", "--nuclei", "5", "8", "--counts", "2", "4", "--plot", str(tmp_path)]
    document = run(scaling, "--only", "image-size", "nuclei", "data", *sizes)
    assert set(document["results"]) == set(document["exponents"]) == {"image-size", "nuclei", "data"}
    assert set(document["results"]["image-size"]["training step, ms"]) == {"64", "96"}
    assert document["exponents"]["data"]["decoded, MiB"] == pytest.approx(1.0)
    plots = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in plots] == [f"scaling-{name}.png" for name in ("data", "image-size", "nuclei")]
    assert all(1000 < path.stat().st_size < 100_000 for path in plots)


def test_exponent():
    assert scaling.exponent({1: 3.0, 2: 12.0, 4: 48.0}) == pytest.approx(2.0)
    assert np.isnan(scaling.exponent({5: 1.0}))


def test_a_run_that_fails_is_told(tmp_path):
    args = bench.parse(bench.parser(""), SMALL)
    with pytest.raises(SystemExit, match="ended with status 2"):
        scaling.launch(args, 1, "json.tool", ["--no-such-option"], tmp_path / "out")
