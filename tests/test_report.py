"""The report page: outcomes, gallery, contents of the page, and the page in a browser."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from nucsam.cli import run_command
from nucsam.config import load_config, to_toml
from nucsam.data import find_records
from nucsam.errors import UserError
from nucsam.report import facts, gallery
from nucsam.report.page import command_line, finish, without_folders, write_report
from nucsam.score.metrics import protocol_named, score_maps

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = """<img src=x onerror=alert(1)> & "q" 'é' $x$ --> ]]>"""


# ---- outcomes ----


def slow_outcomes(labels, others, both, other, lonely):
    """The definitions word by word: `both` outranks `other`, and both outrank a match."""
    masks = {i: labels == i for i in np.unique(labels[labels > 0])}
    partners = [others == j for j in np.unique(others[others > 0])]

    def holds_several(mask, parts):
        return sum(2 * (mask & part).sum() > part.sum() for part in parts) > 1

    result = {}
    for i, a in masks.items():
        matched = any((a & b).sum() > 0.5 * (a | b).sum() for b in partners)
        holders = [b for b in partners if 2 * (a & b).sum() > a.sum()]
        shared = any(holds_several(b, masks.values()) for b in holders)
        result[i] = both if holds_several(a, partners) else "matched" if matched else lonely
        if shared and result[i] != both:
            result[i] = other
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_outcomes_equal_the_definitions(seed):
    rng = np.random.default_rng(seed)
    truth = 5 * rng.integers(0, 4, (4, 4)).repeat(2, 0).repeat(4, 1)[:8, :8]
    pred = 5 * rng.integers(0, 4, (4, 4)).repeat(4, 0).repeat(2, 1)[:8, :8]
    score = score_maps(truth, pred, protocol="plain")
    of_truth, of_pred = score.outcomes()
    assert of_truth == slow_outcomes(truth, pred, "split", "merged", "missed")
    assert of_pred == slow_outcomes(pred, truth, "merged", "split", "false")
    assert list(of_truth.values()).count("split") == score.splits
    assert list(of_pred.values()).count("merged") == score.merges


# ---- gallery ----


def test_outlines_lie_on_the_edge_of_the_nucleus():
    label = np.zeros((20, 30), int)
    label[5:15, 0:20], label[5:15, 20:30], label[0:2, 0:2], label[18:20, 0:2] = 3, 5, 9, 9
    lines = gallery.outlines(label)
    assert {number: len(pieces) for number, pieces in lines.items()} == {3: 1, 5: 1, 9: 2}
    assert lines[3][0].min(0).tolist() == [0, 5] and lines[3][0].max(0).tolist() == [20, 15]
    x, y = lines[3][0].T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(200, rel=0.03)
    assert gallery.outlines(np.zeros((5, 5), int)) == {}
    (pixel,) = gallery.outlines(np.eye(1, dtype=int))[1]
    assert np.ptp(pixel, 0).tolist() == [1, 1] and len({*map(tuple, pixel.tolist())}) == 4


def test_layers_leave_out_what_is_not_scored():
    label = np.zeros((20, 30), int)
    label[2:12, 2:12], label[2:12, 15:25], label[15, 15] = 1, 2, 3
    layers = gallery.layers(label, {2: "false", 1: "matched"}, 2.0)
    assert [*layers] == ["matched", "false"] and layers["matched"]["marks"] == ""
    assert layers["matched"]["count"] == layers["false"]["count"] == 1
    assert layers["false"]["marks"].startswith("M20.0 7.0m 0.0 -2.2l")
    assert layers["false"]["lines"].count("M") == layers["false"]["lines"].count("z") == 1


@pytest.mark.parametrize(
    "n, expected",
    [
        (0, {}),
        (1, {1: "worst"}),
        (2, {1: "worst", 2: "best"}),
        (3, {1: "worst", 2: "median", 3: "best"}),
        (8, {1: "worst", 4: "median", 8: "best"}),
        (9, {1: "worst", 2: "worst", 4: "median", 5: "median", 8: "best", 9: "best"}),
    ],
)
def test_picks(n, expected):
    order = np.random.default_rng(0).permutation(n)
    rows = [{"name": f"{k:02}", "aji": k // 2, "n_truth": 1, "n_pred": 1} for k in order]
    picked = gallery.picks(rows)
    assert {rank: kind for kind, rank, _ in picked} == expected
    assert [row["name"] for *_, row in picked] == [f"{rank - 1:02}" for rank in expected]
    blank = {"name": "", "aji": 0, "n_truth": 0, "n_pred": 0}
    assert gallery.picks([blank, *rows]) == (picked if n else [("worst", 1, blank)])
    assert gallery.picks([blank, *rows], every=True)[-1][2] is blank


def test_a_picture_is_predicted_at_the_magnification_of_its_image(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    image, label = np.full((64, 64, 3), 200, np.uint8), np.eye(64, dtype=np.uint8)
    cm = {"resolution": (1e4 / 0.4, 1e4 / 0.4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "images" / "a.tif", image, photometric="rgb", **cm)
    tifffile.imwrite(tmp_path / "labels" / "a.tif", label)
    asked = []

    def predict(image, *, mpp):
        asked.append(mpp)
        return np.zeros(image.shape[:2], np.int32)

    scores = {"scores": [{"protocol": asdict(protocol_named("plain"))}]}
    row = {"name": "a", "aji": 0.0, "run": SimpleNamespace(scores=scores)}
    (record,) = find_records(tmp_path)
    gallery.picture(row, SimpleNamespace(predict=predict), record)
    assert asked == [pytest.approx(0.4)]


# ---- the page ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A cross-validation with folds 0 and 1 of 3, its page and that of fold 0."""
    from nucsam.train.loop import fit

    out = tmp_path_factory.mktemp("cross")
    changes = ["model.width=64", "augment.stain=0", "train.batch=1", "train.lr_head=0.02"]
    for fold in (0, 1):
        run = out / f"fold{fold}"
        fit(tiny(f"data.fold={fold}", *changes, "train.epochs=4"), run)
    for folder in (out / "fold0", out):
        assert finish(folder) == f"report: {folder / 'report.html'}"
    return out


@pytest.fixture
def one(finished, tmp_path):
    return shutil.copytree(finished / "fold0", tmp_path / "one")


class Page(HTMLParser):
    """What a test asks of a page: its source, its tags with attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.source = [], "", path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data + " "

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def values(self, *keys):
        return [tag[key] for _, tag in self.tags for key in keys if key in tag]


@pytest.fixture
def no_charts(monkeypatch):
    """For tests that read the words of a page: its charts take most of its time."""
    monkeypatch.setattr("nucsam.report.page.run_charts", lambda runs: {})


def written(folder, **options):
    paths = write_report(folder, **options)
    assert paths == [folder / "report.html"] and not list(folder.rglob("*.partial"))
    return Page(paths[0])


def read_scores(run):
    return json.loads((run / "scores.json").read_text())


def change_config(run, table, **values):
    config = load_config(run / "config.toml")
    changed = replace(config, **{table: replace(getattr(config, table), **values)})
    (run / "config.toml").write_text(to_toml(changed))


def test_the_page_shows_scores_and_how_they_were_made(finished):
    scores = read_scores(finished / "fold0")
    environment = json.loads((finished / "fold0" / "environment.json").read_text())
    lines = (finished / "fold0" / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    page = Page(finished / "fold0" / "report.html")
    images = scores["scores"][0]["images"]
    assert len(images) == 4 and page.count("article") == 3
    seconds, speeds, memory = (
        [epoch[key] for epoch in epochs] for key in ("seconds", "images_per_second", "memory_gib")
    )
    cost = sum(seconds) / 60, np.median(speeds), max(memory)
    for words in (
        *(f"{100 * value:.1f}" for value in scores["headline"].values()),
        *(image["name"] for image in images),
        f"epoch {scores['epoch']}; chosen by AJI on the inner split",
        "none (random, seed 0), SHA-256 " + environment["base_sha256"][:12],
        "1 (train.seed = 0); the spread over seeds is not known",
        "KFold, 3 folds, fold 0, seed 19",
        "{train} train, {inner} inner, {test} test".format(**environment["images"]),
        "{parameters_trainable:,} of {parameters:,}".format(**environment),
        "{:.1f} min, {:.3g} images/s, {:.1f} GiB".format(*cost),
        "model.width: 128 -> 64",
        "base weights are random",
    ):
        assert words in page.text, words
    for words in ("predicted again", "no pictures", "unfinished", "flatter", "interval"):
        assert words not in page.text, words


def test_the_page_is_whole_and_loads_nothing(finished):
    page = Page(finished / "fold0" / "report.html")
    ids = page.values("id")
    targets = re.findall(r"""(?:href="|url\()#([^")]+)""", page.source)
    targets += page.values("aria-labelledby", "for")
    assert len(targets) > 50 and set(targets) <= set(ids) and len(set(ids)) == len(ids)
    urls = page.values("src", "href", "xlink:href")
    assert all(url.startswith(("#", "data:")) for url in urls)
    assert "url(http" not in page.source and "@import" not in page.source
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(b - a for a, b in pairwise(levels)) == 1
    pictures = [tag["aria-label"] for _, tag in page.tags if tag.get("role") == "img"]
    assert len(pictures) >= 3 + 6 and min(map(len, pictures)) > 20
    assert not re.search("#[0-9a-f]{6}", " ".join(page.values("style")))  # both themes


def test_every_image_is_in_the_gallery_on_demand(one, no_charts):
    page = written(one, every_image=True)
    names = {image["name"] for image in read_scores(one)["scores"][0]["images"]}
    assert page.count("article") == len(names) == 4 and "--every-image" not in page.text
    assert "--every-image" in written(one).text


def test_a_path_goes_with_all_its_folders():
    """Also where a private place is only the beginning of the path."""
    for path in ("/home/ann/.cache/nucsam/base.pt", "/home/Anna M/set/a.png", "/data/x/a.png"):
        places = [Path("/home/ann/runs"), Path("/home/Anna M/runs")]
        assert without_folders(f"base {path}, kept", places) == f"base {Path(path).name}, kept"


@pytest.mark.parametrize(
    "text",
    [
        r"image_encoder\..*\.(attn\.(qkv|proj)|mlp\.(fc|lin)[12])",
        r"image_encoder\\..*\\.(attn\\.(qkv|proj)|mlp\\.(fc|lin)[12])",
        r"^(\w+)-\d+_\d+",
        r"^(TCGA-\\w\\w-\\w{4})",
    ],
)
def test_a_pattern_is_no_path(text):
    assert without_folders(f"pattern = '{text}'") == f"pattern = '{text}'"


def test_a_path_of_windows_goes_too():
    escaped = r"C:\\Users\\ann\\a.png"
    for path in (r"C:\Users\ann\a.png", escaped, "C:/Users/ann/a.png", r"~\ann\a.png"):
        assert without_folders(f"base {path}, kept") == "base a.png, kept"


@pytest.mark.parametrize(
    "words, line",
    [
        (["/opt/Anna M/bin/nucsam", "train", "data.group=^(.*)_1$"], None),
        (["/opt/nucsam/nucsam/train/__main__.py", "a b"], "python -m nucsam.train 'a b'"),
        (["C:\\lib\\nucsam\\__main__.py", "train"], "python -m nucsam train"),
        (["/opt/other/__main__.py"], "__main__.py"),
    ],
)
def test_the_command_is_that_of_a_shell(words, line):
    assert command_line(words) == (line or "nucsam train 'data.group=^(.*)_1$'")


def test_a_page_says_that_training_bettered_nothing(one, no_charts):
    assert "kept epoch 0" not in written(one).text
    (one / "scores.json").write_text(json.dumps(read_scores(one) | {"epoch": 0}))
    assert "This run kept epoch 0: on the inner split no epoch scored better" in written(one).text


def test_an_environment_without_what_the_page_needs_is_named(one, no_charts):
    file = one / "environment.json"
    facts = json.loads(file.read_text())
    for wrong in ({k: v for k, v in facts.items() if k != "device"}, facts | {"device": 3}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"environment\.json.* device.*remove it"):
            write_report(one)
    file.unlink()
    assert "How it was made" in written(one).text


def test_a_page_names_no_folder_of_this_machine(one, folder, tmp_path, no_charts):
    """The data lie in a folder with a space, and a notice names the base weights' file."""
    change_config(one, "data", root="/home/Anna M/slides/set")
    change_config(one, "model", weights=str(tmp_path / "base.pt"))
    environment = json.loads((one / "environment.json").read_text())
    environment["command"] = ["/home/Anna M/bin/nucsam", "train"]
    (one / "environment.json").write_text(json.dumps(environment))
    page = written(one)
    assert "no pictures: " in page.text and "nucsam train" in page.text
    assert "-> 'set'" in page.text and "-> 'base.pt'" in page.text
    for text in ("/home", "Anna", str(tmp_path), str(folder.parent)):
        assert text not in page.source


def test_a_cross_validation_and_its_variants(finished, tmp_path, no_charts):
    out = shutil.copytree(finished, tmp_path / "cv")
    page = Page(out / "report.html")
    assert "has 2 of 3 folds so far" in page.text
    scores = [read_scores(out / f"fold{k}")["headline"]["aji"] for k in (0, 1)]
    assert f"{50 * sum(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}" in page.text
    assert len(page.values("data-organ")) == 8
    assert {*page.values("href")} >= {"fold0/report.html", "fold1/report.html"}
    for fold in (0, 1):  # the same runs as a second variant, better by 10 points
        run = shutil.copytree(out / f"fold{fold}", out / "train.lr_head-0.03" / f"fold{fold}")
        change_config(run, "train", lr_head=0.03)
        better = read_scores(run)
        better["headline"]["aji"] += 0.1
        (run / "scores.json").write_text(json.dumps(better))
    page = written(out)
    assert re.search(r"2 variants\..* train\.lr_head=0\.03 ,", page.text)
    assert f"{50 * sum(scores) + 10:.1f} ± " in page.text
    assert len(page.values("data-organ")) == 8  # those of one variant


def test_runs_on_all_images_miss_no_fold(one, tmp_path, no_charts):
    out = tmp_path / "seeds"
    for seed in (0, 1):
        run = shutil.copytree(one, out / f"seed{seed}")
        change_config(run, "data", fold="all")
        change_config(run, "train", seed=seed)
        scores = read_scores(run)
        scores["images_of"] = "inner"
        scores["split"]["fold"] = "all"
        (run / "scores.json").write_text(json.dumps(scores))
    page = written(out)
    assert "folds so far" not in page.text and "1 of 3" not in page.text
    assert "Percent: the mean over images. Weights kept" in page.text


def test_scores_that_flatter_are_marked(one, no_charts):
    change_config(one, "data", select="test")
    scores = read_scores(one) | {"images_of": "inner"}
    scores["split"]["select"] = "test"
    (one / "scores.json").write_text(json.dumps(scores))
    text = written(one).text
    assert "test images chose" in text and "no test images" in text
    assert text.count("flatter the model") == 2


def test_an_interval_needs_six_images(one, no_charts):
    scores = read_scores(one)
    scored = scores["scores"][0]
    scored["images"] += [{**image, "name": image["name"] + "x"} for image in scored["images"]]
    limits = dict.fromkeys(scored["summary"]["mean"], 0.25)
    scored["summary"] |= {"low": limits, "high": limits}
    (one / "scores.json").write_text(json.dumps(scores))
    assert written(one).text.count("95 % interval 25.0 to 25.0") == 3


def test_the_table_counts_nuclei_as_the_captions_do(finished):
    images = read_scores(finished / "fold0")["scores"][0]["images"]
    page = Page(finished / "fold0" / "report.html")
    for image in images:
        counts = {name: n for name, n in image["outcomes"].items() if n}
        false = counts.pop("false", 0)
        assert sum(counts.values()) == image["n_truth"] and false <= image["n_pred"]
        numbers = [image["outcomes"][name] for name in ("missed", "false", "split", "merged")]
        numbers = f"{image['n_truth']} {image['n_pred']} {' '.join(map(str, numbers))}"
        assert numbers in page.text
        if f"AJI {100 * image['aji']:.1f}," in page.text:  # it has a picture
            truth = ", ".join(f"{n} {name}" for name, n in counts.items())
            assert f"truth {truth}" in page.text


def test_a_model_that_learnt_nothing_is_said_to(one, no_charts):
    scores = read_scores(one)
    scores["scores"][0]["summary"]["predicted"] = 0
    (one / "scores.json").write_text(json.dumps(scores))
    text = written(one).text
    assert (
        "learnt nothing: it predicts no nucleus in the 4 test images. It has taken 20 opt" in text
    )
    assert "train.epochs=300 would take" in text


# ---- findings ----


def image_of(organ, aji, **outcomes):
    counts = {"missed": 0, "false": 0, "split": 0, "merged": 0} | outcomes
    row = {"name": f"{organ}{aji}", "organ": organ, "aji": aji, "n_truth": 50, "n_pred": 50}
    return row | {"outcomes": counts}


def texts(describe, rows):
    return [finding.text for finding in describe(rows)]


def test_the_worst_organ_differs_by_more_than_chance():
    rng = np.random.default_rng(0)
    organs = [f"organ {k}" for k in range(20)]
    alike = [image_of(organ, aji) for organ in organs for aji in rng.normal(0.6, 0.1, 4)]
    assert texts(facts._worst_organ, alike) == []  # some organ is the worst, but by chance
    worse = alike + [image_of("fat", aji) for aji in (0.3, 0.35, 0.4, 0.3)]
    (text,) = texts(facts._worst_organ, worse)
    assert text.startswith("The worst organ is fat with a mean AJI of 33.8 (4 images); ")
    blank = [row | {"organ": "blank", "aji": 0.0, "n_truth": 0, "n_pred": 0} for row in alike[:4]]
    assert texts(facts._worst_organ, alike + blank) == []
    few = [image_of("fat", 0.1), image_of("fat", 0.1), image_of("liver", 0.9)]
    assert texts(facts._worst_organ, few) == []


def test_a_finding_needs_a_difference_beyond_noise():
    assert facts.differs([1, 2, 1, 2, 1, 2]) and facts.differs([-1, -2, -1, -2, -1, -2])
    assert not facts.differs([1, 2, 1, 2, 1])  # too few images
    assert not facts.differs([9, -8, 9, -8, 9, -8]) and not facts.differs([0] * 6)
    more = [image_of("a", 0.5, missed=9 + k % 2, false=2, merged=8, split=k % 2) for k in range(6)]
    (text,) = texts(facts._matches, more)
    assert text == (
        "57 of 300 true nuclei (19 %) are missed, and 12 of 300 predicted ones (4 %) are false: "
        "more nuclei are missed than are false."
    )
    assert "under-segmentation" in texts(facts._touching, more)[0]
    noisy = [image_of("a", 0.5, missed=9 * (k % 2), false=8 - 8 * (k % 2)) for k in range(6)]
    assert texts(facts._matches, noisy)[0].endswith("(8 %) are false.")
    assert texts(facts._touching, noisy) == []


def test_an_unfinished_run_shows_what_there_is(one):
    (one / "scores.json").unlink()
    page = written(one)
    assert "unfinished: 4 of 4 epochs" in page.text and "none yet; chosen by" in page.text
    assert "All images" not in page.text and "Training loss" in page.text
    for name in ("metrics.jsonl", "environment.json", "adapter.safetensors"):
        (one / name).unlink()
    page = written(one)
    assert "unfinished: 0 of 4 epochs" in page.text and "No epoch is done" in page.text


def test_moved_images(one, folder, tmp_path, no_charts):
    change_config(one, "data", root=str(tmp_path / "gone"))
    page = written(one)
    assert "no pictures: gone: " in page.text and "All images" in page.text
    assert f"nucsam report {one.name} --data FOLDER" in page.text
    page = written(one, root=str(folder))
    assert "no pictures" not in page.text and page.count("article") == 3
    other = shutil.copytree(folder, tmp_path / "other")
    for path in [p for p in other.rglob("*") if p.is_file()]:
        path.rename(path.with_stem("x" + path.stem))
    before = (one / "report.html").read_text()
    for asked in ({"root": str(other)}, {"every_image": True}):
        with pytest.raises(UserError, match=f"If the images have moved, run nucsam report {one}"):
            write_report(one, **asked)
        assert (one / "report.html").read_text() == before


def test_images_without_a_nucleus_are_counted(one, no_charts):
    scores = json.loads((one / "scores.json").read_text())
    scores["scores"][0]["images"][0] |= {"n_truth": 0, "n_pred": 0}
    (one / "scores.json").write_text(json.dumps(scores))
    assert "In 1 of 4 images neither map has a nucleus." in written(one).text


def test_weights_that_are_not_those_scored_are_marked(one, no_charts):
    text = (one / "scores.json").read_text()
    (one / "scores.json").write_text(re.sub(r'"aji": 0\.\d+', '"aji": 0.87654', text))
    assert "predicted again" in written(one).text


def test_names_are_text(one, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    scores = read_scores(one)
    for row in [row for scored in scores["scores"] for row in scored["images"]]:
        for path in data.rglob(f"{row['name']}.*"):
            path.rename(path.with_stem(path.stem + HOSTILE))
        row["name"] += HOSTILE
        row["organ"] += HOSTILE + "\udcff"
    (one / "scores.json").write_text(json.dumps(scores))
    page = written(one, root=str(data))
    assert "no pictures" not in page.text and page.count("article") == 3
    assert page.count("img") == 0 and not page.values("onerror")
    assert page.text.count(HOSTILE) > 10 and HOSTILE + "\\udcff" in page.text


def test_the_end_of_a_training_never_fails(one):
    (one / "scores.json").write_text('{"scores": []}')
    assert f"nucsam report {one}" in finish(one)
    code = "import sys; sys.modules['matplotlib'] = None; from pathlib import Path"
    code += f"; from nucsam.report.page import finish; print(finish(Path({str(one)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" in done.stdout
    assert "pip install 'nucsam[report]'" in done.stdout


def test_the_command_writes_figures(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "cv")
    assert run_command(["report", str(out), "--figures", str(tmp_path / "figures")]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    charts = ["folds", "loss", "rate", "validation", "organs-dice", "organs-aji", "organs-pq"]
    pictures = {"worst-rank1.png", "median-rank4.png", "best-rank8.png"}
    kinds = ("pdf", "png", "svg")
    assert names == {f"{name}.{kind}" for name in charts for kind in kinds} | pictures
    paths = capsys.readouterr().out.split()
    assert paths[0] == str(out / "report.html")
    assert {*paths[1:]} == {str(tmp_path / "figures" / name) for name in names}
    pngs = [(tmp_path / "figures" / name).read_bytes() for name in names if name.endswith("png")]
    assert all(content.startswith(b"\x89PNG") for content in pngs)
    assert run_command(["report", str(tmp_path / "figures")]) == 2


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("found no Chromium (apt-get install chromium): the page was not tried in it")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def visit(browser):
    """Opens a page, which must load nothing and report no error."""
    problems, urls = [], []

    def open_page(path, width=1280, **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert problems == [] and all(url.startswith(("file:", "data:")) for url in urls)


def test_the_table_sorts_and_filters(finished, visit):
    page = visit(finished / "fold0" / "report.html")
    images = read_scores(finished / "fold0")["scores"][0]["images"]
    names = sorted(image["name"] for image in images)

    def cells(number):
        return page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()

    assert cells(4) == [f"{100 * aji:.1f}" for aji in sorted(image["aji"] for image in images)]
    page.click("#table th:nth-child(1) button")
    assert cells(1) == names
    page.click("#table th:nth-child(1) button")
    assert cells(1) == names[::-1]
    page.focus("#table th:nth-child(8) button")
    page.keyboard.press("Enter")
    assert cells(8) == [str(n) for n in sorted(image["n_truth"] for image in images)]
    assert page.locator("#table [aria-sort]").count() == 1
    for words, count in ((names[0].upper(), 1), ("no such name", 0), ("", 4)):
        page.fill("#words", words)
        assert page.inner_text("#count") == f"{count} of 4 images"
        assert page.locator("#table tbody tr:visible").count() == count
    organs = [image["organ"] for image in images]
    page.select_option("#organ", organs[0])
    assert page.inner_text("#count") == f"{organs.count(organs[0])} of 4 images"


def test_outlines_are_switched_on_and_off(finished, visit):
    page = visit(finished / "fold0" / "report.html")

    def visible(selector):
        return page.locator(f"#gallery .viewer {selector}:visible").count() > 0

    assert visible("g.truth g.missed")
    page.click(".switches input[value=missed]")
    assert not visible("g.truth g.missed") and visible("g.truth")
    page.keyboard.press("Space")
    assert visible("g.truth g.missed")
    page.click(".switches label:has(input[value=truth])")
    assert not visible("g.truth") and visible("image")


def test_pictures_zoom_and_move(finished, visit):
    page = visit(finished / "fold0" / "report.html")
    viewer = page.locator("#image-0 .viewer")

    def view(number=0):
        box = page.get_attribute(f"#image-{number} .viewer svg", "viewBox")
        return [float(x) for x in box.split()]

    whole = view()
    assert whole == [0, 0, 96, 96]
    page.click("#image-0 button[aria-label='Zoom in']")
    assert view() == pytest.approx([16, 16, 64, 64]) and view(1) == whole
    assert page.inner_text("#image-0 output") == "1.5×"
    viewer.press("ArrowLeft")
    assert view() == pytest.approx([16 - 64 / 5, 16, 64, 64])
    viewer.press("ArrowLeft")
    viewer.press("ArrowLeft")
    assert view() == pytest.approx([0, 16, 64, 64])  # no further than the image
    viewer.press("0")
    viewer.hover()
    page.mouse.wheel(0, -100)
    assert view() == whole  # the wheel alone scrolls the page
    viewer.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('#image-0 output').textContent === '1.3×'")
    box, before = viewer.bounding_box(), view()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 170, box["y"] + 200)
    page.mouse.up()
    assert view()[0] == pytest.approx(before[0] + 30 / box["width"] * 76.8, abs=0.1)
    page.click("#image-0 button[data-zoom='0']")
    assert view() == whole


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen_in_both_themes(finished, visit, width):
    grounds = set()
    for scheme in ("light", "dark"):
        page = visit(finished / "report.html", width, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        style = "getComputedStyle(document.body)"
        text, ground = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        light, dark = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in (text, ground))
        assert abs(light - dark) > 450
        assert page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill") == text
        grounds.add(ground)
    assert len(grounds) == 2


@pytest.mark.parametrize("width", [360, 430])
def test_a_phone_shows_the_scores_without_scrolling(finished, visit, width):
    page = visit(finished / "report.html", width)
    for section in ("#organs", "#images", "#compare"):
        for label in ("Dice", "AJI", "PQ"):
            heading = page.locator(f"{section} thead th", has_text=re.compile(f"^{label}$")).first
            box = heading.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, (section, label)


def test_every_control_is_reached_by_keyboard(finished, visit):
    page = visit(finished / "fold0" / "report.html")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    controls = "[...document.querySelectorAll('a[href], button, input, select, summary, .viewer')]"
    wanted = page.evaluate(f"{controls}.length")
    reached = set()
    for _ in range(2 * wanted):
        page.keyboard.press("Tab")
        number = page.evaluate(f"{controls}.indexOf(document.activeElement)")
        reached.add(number)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert number < 0 or outline != "none"
    assert len(reached - {-1}) == wanted > 30
