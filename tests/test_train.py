"""The training loop: what it writes, and that it repeats and resumes bit for bit."""

import itertools
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import same_tensors
from safetensors.torch import load_file

from nucsam.config import Data, Train, load_config, to_toml
from nucsam.data.draw import write_png
from nucsam.data.images import read_image
from nucsam.data.samples import by_nuclei, is_resampled
from nucsam.data.splits import find_split
from nucsam.data.synthetic import write_dataset
from nucsam.errors import UserError
from nucsam.export.merged import export_run
from nucsam.folds.runner import cross_validate
from nucsam.model import network
from nucsam.run import checkpoint
from nucsam.run.directory import RunDirectory
from nucsam.score.runs import score_run, scores_sentence
from nucsam.train import loop
from nucsam.train import training as training_module
from nucsam.train.loop import fit, rate
from nucsam.train.progress import epoch_speed, print_start
from nucsam.train.signals import StopSignals
from nucsam.train.training import Training, magnification


def history(run):
    """metrics.jsonl without its times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("seconds", "images_per_second", "memory_gib"):
            line.pop(key, None)
    return lines


def same(a, b):
    a, b = load_file(a), load_file(b)
    return len(a) > 10 and same_tensors(a, b)


@pytest.fixture(scope="module")
def once(tmp_path_factory, tiny):
    """A finished run and its configuration."""
    few_steps = ("model.width=64", "augment.stain=0", "train.batch=1", "train.lr_head=0.005")
    config = tiny("train.epochs=3", *few_steps)
    run = tmp_path_factory.mktemp("runs") / "once"
    return run, config, fit(config, run)


def test_run_directory_explains_itself(once):
    run, config, scores = once
    names = "config.toml environment.json images.json .lock metrics.jsonl scores.json state"
    weights = {"adapter.safetensors", "base.safetensors"}
    assert {path.name for path in run.iterdir()} == {*names.split()} | weights
    assert load_config(run / "config.toml") == config
    assert [line["epoch"] for line in history(run)] == [1, 2, 3]
    rates = [0.005 * rate(step, 15, 5, config.train) for step in (4, 9, 14)]
    assert [line["lr"] for line in history(run)] == rates  # of the last step of each epoch
    environment = json.loads((run / "environment.json").read_text())
    assert environment["images"] == {"train": 5, "inner": 3, "test": 4}
    assert environment["parameters_trainable"] == sum(
        t.numel()
        for name, t in load_file(run / "adapter.safetensors").items()
        if "running_" not in name
    )
    assert len(scores["scores"][0]["images"]) == 4


def test_best_epoch_is_the_one_kept(once):
    run, _, scores = once
    best = max(history(run), key=lambda line: line["aji"])
    assert scores["epoch"] == best["epoch"]
    _, _, _, metadata = checkpoint.open_run(run)
    assert metadata["selected"]["aji"] == best["aji"]
    assert metadata["selected"]["on"] == "inner"


def test_of_equal_epochs_the_first_is_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", lambda _: {"dice": 0.5, "aji": 0.5, "pq": 0.5})
    assert fit(tiny(), tmp_path / "run")["epoch"] == 1


def test_evaluate_repeats_the_scores_of_training(once):
    run, _, scores = once
    again = score_run(run)
    assert again["headline"] == scores["headline"]
    assert json.loads((run / "scores.json").read_text())["headline"] == scores["headline"]


def test_untrained_scores_differ_and_are_not_written(once):
    run, _, scores = once
    before = (run / "scores.json").read_bytes()
    untrained = score_run(run, untrained=True)
    assert untrained["untrained"] and untrained["headline"] != scores["headline"]
    assert (run / "scores.json").read_bytes() == before


def test_same_seed_same_run_bit_for_bit(once, tmp_path):
    run, config, _ = once
    fit(config, tmp_path / "again")
    assert same(run / "adapter.safetensors", tmp_path / "again" / "adapter.safetensors")
    assert history(run) == history(tmp_path / "again")


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resumed_run_equals_uninterrupted_bit_for_bit(once, tmp_path, monkeypatch, stop):
    """Told to end at step `stop` (steps 5 and 10 end epochs), then resumed."""
    run, config, _ = once
    out = tmp_path / "run"
    steps = itertools.count(1)
    monkeypatch.setattr(StopSignals, "agreed", lambda *_: (next(steps) == stop, False))
    with pytest.raises(SystemExit) as exit:
        fit(config, out)
    assert exit.value.code == 143
    assert not (out / "scores.json").exists()
    monkeypatch.undo()
    fit(config, out, resume=True)
    assert same(run / "adapter.safetensors", out / "adapter.safetensors")
    assert same(run / "state" / "last.safetensors", out / "state" / "last.safetensors")
    assert history(run) == history(out)


def test_resuming_within_an_epoch_skips_every_accumulated_batch(tiny, tmp_path, monkeypatch):
    config = tiny("train.epochs=1", "train.batch=1", "train.accumulate=2")
    fit(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopSignals, "agreed", lambda *_: (True, False))
        fit(config, tmp_path / "run")
    fit(config, tmp_path / "run", resume=True)
    states = [tmp_path / name / "state" / "last.safetensors" for name in ("whole", "run")]
    assert same(*states)
    assert history(tmp_path / "whole") == history(tmp_path / "run")


def test_the_state_is_saved_every_save_minutes_and_around_a_validation(tiny, tmp_path, monkeypatch):
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    saved = []

    def step(*arguments, step=loop.step):
        clock.seconds += 30.2
        step(*arguments)

    def save(training, save=Training.save):
        saved.append(training.progress.step)
        save(training)

    for module in ("loop", "training"):
        monkeypatch.setattr(f"nucsam.train.{module}.time", clock)
    monkeypatch.setattr(loop, "step", step)
    monkeypatch.setattr(Training, "save", save)
    fit(tiny("train.batch=1", "train.epochs=1", "train.save_minutes=1"), tmp_path / "run")
    assert saved == [2, 4, 5, 5]  # before the validation, and after it


def test_an_epoch_that_was_interrupted_counts_all_its_time(tiny, tmp_path, monkeypatch):
    clock = SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)

    def step(*arguments, step=loop.step):
        clock.seconds += 30.0
        step(*arguments)

    for module in ("loop", "training"):
        monkeypatch.setattr(f"nucsam.train.{module}.time", clock)
    monkeypatch.setattr(loop, "step", step)
    config, run = tiny("train.batch=1", "train.epochs=2"), tmp_path / "run"
    stops = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StopSignals, "agreed", lambda *_: (next(stops) == 2, False))
        fit(config, run)
    clock.seconds += 1e6
    fit(config, run, resume=True)
    lines = RunDirectory(run).read_metrics()
    assert [line["seconds"] for line in lines] == [150.0, 150.0]  # 5 steps each
    assert [line["images_per_second"] for line in lines] == [round(1 / 30, 3)] * 2


def test_the_average_follows_the_first_steps_faster(tiny, tmp_path, monkeypatch):
    decays = []
    monkeypatch.setattr(loop, "_update_average", lambda *arguments: decays.append(arguments[2]))
    fit(tiny("train.batch=1", "train.epochs=1", "train.ema=0.3"), tmp_path / "run")
    assert decays == [2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # of 5 images


def test_an_fp16_step_that_overflows_changes_nothing(tiny, tmp_path, monkeypatch):
    training = Training(tiny(), tmp_path / "run", resume=False, build=network.build_model)
    training.net.train()
    accelerator = training.accelerator
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "native_amp", True)
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    training.optimizer = AcceleratedOptimizer(
        training.optimizer.optimizer, device_placement=False, scaler=scaler
    )
    accelerator._optimizers = [training.optimizer]
    batch = next(iter(training.loader))

    def changed():
        """Kinds of tensors that a step changes: statistics, weights, and the averages of both."""
        tensors = [training.weights, training.average]
        before = [{name: tensor.clone() for name, tensor in kind.items()} for kind in tensors]
        loop.step(training, iter([batch]))
        return {
            (number, training.weights[name].requires_grad)
            for number, kind in enumerate(tensors)
            for name, tensor in kind.items()
            if not tensor.equal(before[number][name])
        }

    assert changed() == set()
    assert scaler.get_scale() == 2.0**126
    scaler.update(16.0)
    assert changed() == {(0, True), (0, False), (1, True), (1, False)}


def test_processes_with_gpus_ask_each_other_for_signals_only_where_they_wait(
    tiny, tmp_path, monkeypatch
):
    waits = []
    monkeypatch.setattr(loop, "CHECK_STEPS", 2)

    def agreed(_self, _accelerator, _due=False, wait=True):
        waits.append(wait)
        return False, False

    monkeypatch.setattr(StopSignals, "agreed", agreed)
    fit(tiny("train.batch=1", "train.epochs=1"), tmp_path / "run")
    steps = [False, True, False, True, True]  # of 5, the last of which ends an epoch
    assert waits == [*steps, True]
    monkeypatch.undo()
    requests = []

    def reduce(request, _):
        requests.append(request.tolist())
        return request + torch.tensor([1.0, 0.0])  # another process got the signal

    gpus = SimpleNamespace(num_processes=2, device=torch.device("cuda"), reduce=reduce)
    with StopSignals() as stop:
        assert stop.agreed(gpus, due=True, wait=False) == (False, False)
        assert not requests
        gpus.device = torch.device("cpu")
        assert stop.agreed(gpus, due=True, wait=False) == (True, True)
        assert stop.agreed(gpus) == (True, False)
    assert requests == [[0.0, 1.0], [0.0, 0.0]]


def test_the_losses_of_all_processes_are_saved(tiny, tmp_path, monkeypatch):
    training = Training(tiny(), tmp_path / "run", resume=False, build=network.build_model)
    training.add_losses({"depth": torch.tensor([1.0, 2.0])})
    means = {"mean": lambda total: 1.5 * total}  # another process has twice the loss
    monkeypatch.setattr(training.accelerator, "reduce", lambda total, kind: means[kind](total))
    training.save()
    _, metadata = checkpoint.read_tensors(training.run.state_file)
    assert metadata["progress"]["sums"] == {"depth": 4.5}


def test_auto_is_the_fast_precision_unless_a_launcher_or_the_run_says_another(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training_module, "half_type", lambda _: torch.bfloat16)
    run = RunDirectory(tmp_path)
    assert training_module._precision("auto", False, run) == "bf16"
    assert training_module._precision("fp32", False, run) == "no"
    run.write_environment({"precision": "no"})  # it began where nothing else was fast
    assert training_module._precision("auto", False, run) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert training_module._precision("auto", False, run) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION: found 'fp8', expected fp16,"):
        training_module._precision("auto", False, run)

    numbers = {"parameters_trainable": 1, "parameters": 2, "processes": 1, "epochs": 1, "steps": 9}
    numbers |= {"threads": 1, "loader_processes": 0, "idle_cores": 2}
    facts = {"images": {"train": 9}, "base": "a.pt", "precision": "bf16", **numbers}
    print_start(facts, torch.device("cuda"), "auto")
    assert "on the GPU in bf16 (train.precision=auto)" in capsys.readouterr().out


def test_a_finished_run_takes_more_epochs(tiny, tmp_path, capsys):
    short, longer, run = tiny("train.epochs=1"), tiny("train.epochs=3"), tmp_path / "run"
    fit(short, run)
    first = history(run)
    fit(longer, run, resume=True)
    with pytest.raises(UserError, match=r"train\.epochs: 3 -> 1"):
        fit(short, run, resume=True)
    assert "1 -> 3" in capsys.readouterr().out
    assert history(run)[:1] == first and [line["epoch"] for line in history(run)] == [1, 2, 3]
    assert RunDirectory(run).read_scores(load_config(run / "config.toml"))["epoch"] in (1, 2, 3)
    RunDirectory(run).prepare(tiny("train.epochs=4"), {})
    assert not (run / "scores.json").exists()  # they are not those of four epochs


def test_training_works_in_a_thread(tiny, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(fit, tiny("train.epochs=1"), tmp_path / "run").result()
    assert scores["epoch"] == 1


def test_a_loader_without_shared_memory_says_what_helps(tiny, tmp_path, monkeypatch):
    def step(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is ...")

    monkeypatch.setattr(loop, "step", step)
    with pytest.raises(UserError, match=r"data\.workers=0.*--shm-size"):
        fit(tiny("data.workers=1"), tmp_path / "run")
    with pytest.raises(RuntimeError, match="pid 7"):  # without loaders it is a bug
        fit(tiny(), tmp_path / "other")


def test_the_magnification_of_a_run(recwarn):
    def of(data, *mpps):
        return magnification(data, mpps, [0.0] * len(mpps), range(len(mpps)))

    assert of(Data(), None, None) == (None, [1, 1])
    mpp, ratios = of(Data(), 0.25, None, 0.251)
    assert mpp == pytest.approx(0.2505) and ratios == [mpp / 0.25, 1, mpp / 0.251]
    assert of(Data(mpp=0.3)) == (0.3, []) and not recwarn
    with pytest.warns(UserWarning, match=r"0\.25 to 0\.5 .* resample them to 0\.5"):
        assert of(Data(mpp=0.5), 0.25, 0.5) == (0.5, [2, 1])
    with pytest.raises(UserError, match=r"data\.root: .*0\.001"):
        of(Data(), 0.25, 0.25, 0.001)


def test_images_of_nearly_one_resolution_do_not_count_as_resampled():
    _, ratios = magnification(Data(mpp=0.25), [0.25, 0.251, 0.249], [0.0] * 3, range(3))
    assert len({*ratios}) == 3 and not any(map(is_resampled, ratios))
    assert is_resampled(2.0) and is_resampled(by_nuclei(100 * math.exp(0.1), 100))


def test_the_magnification_of_a_run_by_its_nuclei():
    data = Data(nucleus_area=100)

    def of(mpps, areas, train=(0, 1)):
        return magnification(data, mpps, areas, train)

    twice = by_nuclei(400, 100)
    assert twice == pytest.approx(2, rel=0.03)
    assert of([None, None], [400, 0]) == (None, [twice, 1])
    # an image with too few nuclei goes by its microns per px, as in prediction
    assert of([0.25, 0.5], [400, 0]) == (0.25 * twice, [twice, 0.25 * twice / 0.5])
    # the labels of a test image do not count for the run
    assert of([0.25] * 3, [400, 400, 100])[0] == of([0.25] * 3, [400, 400, 900])[0] == 0.25 * twice
    with pytest.raises(UserError, match=r"data\.root: .*0\.001"):
        of([0.25, 0.001], [400, 400])


def test_out_of_memory_says_what_helps(tiny, tmp_path, monkeypatch):
    def loss(self, *_):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr(network.Nucsam, "loss", loss)
    with pytest.raises(UserError, match=r"train\.batch=2 train\.accumulate=2"):
        fit(tiny("train.batch=4"), tmp_path / "run")


def test_loss_that_is_not_finite_stops_and_saves_nothing(tiny, tmp_path, monkeypatch):
    def loss(self, maps, *_):
        return {"broken": maps.flatten(1).sum(1) * float("nan")}

    monkeypatch.setattr(network.Nucsam, "loss", loss)
    with pytest.raises(UserError, match=r"broken.*step 3"):
        fit(tiny(), tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_accumulation_equals_a_larger_batch(tiny, tmp_path):
    """With the sam head: the BatchNorms of the instance head see the images of one forward pass."""
    fit(tiny("model.head=sam", "train.batch=6", "train.epochs=1"), tmp_path / "one")
    fit(
        tiny("model.head=sam", "train.batch=2", "train.accumulate=3", "train.epochs=1"),
        tmp_path / "three",
    )
    one, three = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "three"))
    assert max(float((one[name] - three[name]).abs().max()) for name in one) < 1e-5


def test_an_export_is_a_base_whose_epoch_0_is_scored(once, tmp_path, capsys):
    run, _, _ = once
    export_run(run, tmp_path / "merged.safetensors")
    changes = ("train.lr_head=3.0", "train.clip=100.0", "train.epochs=1")
    config = load_config(
        run / "config.toml", [f"model.weights={tmp_path / 'merged.safetensors'}", *changes]
    )
    scores = fit(config, tmp_path / "worse")
    lines = history(tmp_path / "worse")
    assert lines[0]["epoch"] == 0 and lines[0]["step"] == 0
    assert lines[0]["aji"] == pytest.approx(max(line["aji"] for line in history(run)), abs=1e-3)
    assert lines[-1]["aji"] < lines[0]["aji"]  # a rate of 3 breaks the model
    assert scores["epoch"] == 0
    assert "training made it worse" in capsys.readouterr().out


def test_an_export_of_the_sam_head_is_a_base_whose_epoch_0_is_scored(tiny, tmp_path):
    fit(tiny("model.head=sam", "train.epochs=1"), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "merged.safetensors")
    weights = f"model.weights={tmp_path / 'merged.safetensors'}"
    for head, first in (("sam", 0), ("instance", 1)):  # the other one is not a trained head
        fit(tiny(f"model.head={head}", "train.epochs=1", weights), tmp_path / head)
        assert history(tmp_path / head)[0]["epoch"] == first


def test_speed_is_images_by_seconds():
    assert epoch_speed(torch.device("cpu"), 2.0, 10)["images_per_second"] == 5.0
    assert epoch_speed(torch.device("cpu"), 0.0, 10)["images_per_second"] > 0  # a coarse clock


def test_undefined_scores_are_a_dash():
    headline = {"dice": 0.5, "aji": math.nan, "pq": None}
    scores = {"images_of": "test", "untrained": True, "headline": headline}
    assert scores_sentence(scores) == "untrained model, test images: DICE 50.0, AJI –, PQ –"


def test_all_trains_on_everything_but_the_inner_split(tiny, tmp_path):
    scores = fit(
        tiny("data.fold=all", "train.epochs=1", "train.validate_every=5"), tmp_path / "run"
    )
    images = json.loads((tmp_path / "run" / "environment.json").read_text())["images"]
    assert images == {"train": 8, "inner": 4, "test": 0}
    assert scores["images_of"] == "inner"


def test_a_folder_of_its_own_is_tested(tiny, folder, tmp_path):
    """Its images take no part in training; those with a name of the other folder get another."""
    other = tmp_path / "test"
    write_dataset(other, images=2, size=96, seed=9)
    apart = tiny("data.fold=all", f"data.test={other}", "train.epochs=1")
    records, split = find_split(apart.data)
    names = [records[i].name for i in split.test]
    assert len(names) == 2 and all(name.startswith("test_") for name in names)
    assert {records[i].image.parents[2] for i in split.train + split.inner} == {folder}
    scores = fit(apart, tmp_path / "run")
    images = json.loads((tmp_path / "run" / "environment.json").read_text())["images"]
    assert images == {"train": 8, "inner": 4, "test": 2}
    assert scores["images_of"] == "test"
    assert [row["name"] for row in scores["scores"][0]["images"]] == names
    assert score_run(tmp_path / "run")["headline"] == pytest.approx(scores["headline"])
    with pytest.raises(UserError, match=r"^data\.test: found 12 image"):
        fit(tiny("data.fold=all", f"data.test={folder}", "train.epochs=1"), tmp_path / "same")
    copies = shutil.copytree(folder, tmp_path / "relabelled")  # by a second annotator
    for path in copies.glob("*/label masks modify/*.tif"):
        label = tifffile.imread(path)
        tifffile.imwrite(path, np.where(label == label.max(), 0, label))
    with pytest.raises(UserError, match=r"^data\.test: found \d+ image.* a copy of "):
        fit(tiny("data.fold=all", f"data.test={copies}", "train.epochs=1"), tmp_path / "same")
    with pytest.raises(UserError, match=r"^data\.test: found .* with data\.fold = 0"):
        tiny(f"data.test={folder}")
    (tmp_path / "apart.toml").write_text(to_toml(apart))
    with pytest.raises(UserError, match=r"^data\.test: found .*, expected none; nucsam train"):
        cross_validate(tmp_path / "apart.toml", [], tmp_path / "folds")


@pytest.mark.parametrize("mode", ["full", "head"])
def test_other_ways_to_train(tiny, tmp_path, mode):
    fit(tiny(f"model.train={mode}", "train.epochs=1", "model.head=sam"), tmp_path / "run")
    names = load_file(tmp_path / "run" / "adapter.safetensors").keys()
    assert any(name.startswith("mask_decoder.") for name in names)
    assert any(name.startswith("image_encoder.") for name in names) == (mode == "full")


def test_nuclei_of_one_size_are_trained_on(tiny, tmp_path):
    config = tiny("data.nucleus_area=300")
    training = Training(config, tmp_path / "run", resume=False, build=network.build_model)
    samples, crops = training.samples, training.loader.dataset
    expected = magnification(config.data, samples.mpps, samples.areas, training.train)
    assert (training.mpp, crops.ratios) == expected
    assert training.mpp is None and len({*crops.ratios}) > 1


def test_microns_per_px_and_the_precision_that_a_cpu_has_are_kept(tiny, tmp_path):
    with pytest.warns(UserWarning, match=r"train\.precision"):
        fit(tiny("train.precision=fp16", "data.mpp=0.25", "train.epochs=1"), tmp_path / "run")
    assert checkpoint.read_tensors(tmp_path / "run" / "adapter.safetensors")[1]["mpp"] == 0.25
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "no"


@pytest.mark.filterwarnings("ignore")
def test_training_learns(tiny, tmp_path):
    schedule = ["train.epochs=12", "train.validate_every=12", "train.lr_head=0.01"]
    fit(tiny("model.width=64", *schedule), tmp_path / "run")
    losses = [line["loss"] for line in history(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


def test_cosine_rate_warms_up_and_ends_near_zero():
    t = Train(warmup=0.1)
    rates = [rate(step, 100, 10, t) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_step_rate_drops_by_gamma_every_step_epochs():
    t = Train(schedule="step", step_epochs=2, gamma=0.1)
    assert [rate(step, 60, 10, t) for step in (0, 19, 20, 39, 40)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_images_without_a_nucleus_do_not_train_and_choose_with_a_warning(
    tiny, folder, tmp_path, capsys
):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    config = tiny(f"data.root={copy}")
    records, split = find_split(config.data)
    masks = []
    for image in (records[i].image for i in split.train):
        masks.append(image.parents[1] / "vague areas" / "mask binary" / f"{image.stem}.png")
        masks[-1].parent.mkdir(parents=True, exist_ok=True)
        write_png(masks[-1], np.full_like(read_image(image)[..., 0], 255))
    with pytest.raises(UserError, match=r"no nucleus outside the vague areas .* to train on"):
        fit(config, tmp_path / "run")
    for mask in masks:
        mask.unlink()
    for i in split.inner:
        tifffile.imwrite(records[i].label, 0 * tifffile.imread(records[i].label))
    assert not (tmp_path / "run").exists() and "choose the epoch" not in capsys.readouterr().out
    scores = fit(config, tmp_path / "run")
    shown = " ".join(capsys.readouterr().out.split())
    assert "to choose the epoch by. AJI is 0 there, so the first epoch" in shown
    assert scores["epoch"] == 1


def test_a_compiled_training_is_one_graph_and_takes_the_same_step(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    ways, losses = [], []
    for compiled in ("false", "true"):
        config = tiny(f"train.compile={compiled}")
        run = Training(config, tmp_path / compiled, resume=False, build=network.build_model)
        run.net.train()
        start = {name: weight.detach().clone() for name, weight in run.weights.items()}
        torch._dynamo.utils.counters.clear()
        loop.step(run, iter(run.loader))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (compiled == "true")
        ways.append(torch.cat([(run.weights[name] - start[name]).flatten() for name in start]))
        losses.append({name: float(total) for name, total in run.loss_sums.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Adam amplifies the rounding errors of gradients near 0.
    assert (ways[0] - ways[1]).norm() < 0.03 * ways[0].norm()


def test_a_training_leaves_the_threads_of_its_process_as_they_were(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(training_module, "idle_cores", lambda: 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        fit(tiny("train.epochs=1"), tmp_path / "run")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
