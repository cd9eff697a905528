"""The report page: what became of each nucleus, what is said of the numbers, what is on the page, and in a browser."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
pytest.importorskip("jinja2", reason="the extra `report` is not installed")

from nucsam import charts, gallery, report, results
from nucsam.cli import run as run_command
from nucsam.config import load, to_toml
from nucsam.metrics import OUTCOMES, score

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """<img src=x onerror=alert(1)> & "q" 'é' $x$ --> ]]>"""


# ---- split, merged, matched, missed, false ----


def test_outcomes_by_hand():
    truth, pred = np.zeros((2, 12, 30), int)
    truth[1:5, 1:7], pred[1:5, 1:6] = 1, 11  # matched
    truth[1:5, 10:14] = 2  # missed
    pred[1:5, 16:20] = 13  # false
    truth[7:11, 1:9], pred[7:11, 1:4], pred[7:11, 5:9] = 4, 14, 15  # split
    truth[7:11, 12:16], truth[7:11, 16:20], pred[7:11, 12:20] = 5, 6, 16  # merged
    truth[7:11, 22:30], pred[7:11, 22:29], pred[7:9, 29] = 7, 17, 18  # split although paired, at 28 of 32 px
    found = score(truth, pred, protocol="plain")
    of_truth, of_pred = found.outcomes()
    assert of_truth == {1: "matched", 2: "missed", 4: "split", 5: "merged", 6: "merged", 7: "split"}
    assert of_pred == {
        11: "matched",
        13: "false",
        14: "split",
        15: "split",
        16: "merged",
        17: "split",
        18: "split",
    }
    assert (found.splits, found.merges) == (2, 1)
    assert found.split_pairs.tolist() == [[4, 14], [4, 15], [7, 17], [7, 18]]
    assert found.merged_pairs.tolist() == [[5, 16], [6, 16]]
    renamed = score(truth * 2**30, pred + (pred > 0) * 2**40, protocol="plain").outcomes()  # ids beyond the fast path
    assert {i // 2**30: name for i, name in renamed[0].items()} == of_truth
    assert {i - 2**40: name for i, name in renamed[1].items()} == of_pred


def test_half_is_not_most():
    truth, pred = np.zeros((2, 4, 8), int)
    truth[:, :4], pred[:2, 2:6], pred[2:, 2:6] = 1, 1, 2  # the halves of both predictions
    assert score(truth, pred, protocol="plain").outcomes() == ({1: "missed"}, {1: "false", 2: "false"})


def slow_outcomes(truth, pred, iou):
    """The definitions word by word."""
    ids = [np.unique(labels[labels > 0]).tolist() for labels in (truth, pred)]
    share = {(t, p): np.count_nonzero((truth == t) & (pred == p)) for t in ids[0] for p in ids[1]}
    area = [{i: np.count_nonzero(labels == i) for i in own} for labels, own in zip((truth, pred), ids)]
    held = {t: [p for p in ids[1] if 2 * share[t, p] > area[1][p]] for t in ids[0]}
    holds = {p: [t for t in ids[0] if 2 * share[t, p] > area[0][t]] for p in ids[1]}
    splits = {t: ps for t, ps in held.items() if len(ps) > 1}
    merges = {p: ts for p, ts in holds.items() if len(ts) > 1}
    pairs = [(t, p) for (t, p), n in share.items() if n > iou * (area[0][t] + area[1][p] - n)]
    of_truth, of_pred = {}, {}
    for t in ids[0]:
        merged = any(t in ts for ts in merges.values())
        paired = any(t == pair[0] for pair in pairs)
        of_truth[t] = "split" if t in splits else "merged" if merged else "matched" if paired else "missed"
    for p in ids[1]:
        split = any(p in ps for ps in splits.values())
        paired = any(p == pair[1] for pair in pairs)
        of_pred[p] = "merged" if p in merges else "split" if split else "matched" if paired else "false"
    return of_truth, of_pred


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_outcomes_equal_the_definitions(seed):
    rng = np.random.default_rng(seed)
    truth, pred = (5 * rng.integers(0, 4, (4, 4)).repeat(n, 0).repeat(m, 1)[:8, :8] for n, m in ((2, 4), (4, 2)))
    found = score(truth, pred, protocol="plain")
    assert found.outcomes() == slow_outcomes(truth, pred, 0.5)
    names = [*found.outcomes()[0].values()], [*found.outcomes()[1].values()]
    assert names[0].count("split") == found.splits and names[1].count("merged") == found.merges
    assert set(names[0] + names[1]) <= set(OUTCOMES)


# ---- outlines ----


def area(line):
    x, y = line.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_outlines_lie_on_the_edge_of_the_nucleus():
    label = np.zeros((20, 30), int)
    label[5:15, 0:20], label[5:15, 20:30], label[0:2, 0:2], label[18:20, 0:2] = 3, 5, 9, 9
    found = gallery.outlines(label)
    assert {number: len(lines) for number, lines in found.items()} == {3: 1, 5: 1, 9: 2}  # 9 is in two pieces
    assert found[3][0].min(0).tolist() == [0, 5] and found[3][0].max(0).tolist() == [20, 15]  # x, y
    assert area(found[3][0]) == pytest.approx(200, rel=0.03) and area(found[5][0]) == pytest.approx(100, rel=0.03)
    assert gallery.outlines(np.zeros((5, 5), int)) == {}


def test_layers_leave_out_what_is_not_scored():
    label = np.zeros((20, 30), int)
    label[2:12, 2:12], label[2:12, 15:25], label[15, 15] = 1, 2, 3
    found = gallery.layers(label, {1: "matched", 2: "false"}, 2.0)
    assert {name: layer["count"] for name, layer in found.items()} == {"matched": 1, "false": 1}
    assert found["matched"]["marks"] == "" and found["false"]["marks"].startswith("M20.0 7.0m 0.0 -2.2l")
    assert found["false"]["lines"].count("M") == found["false"]["lines"].count("z") == 1


# ---- choice and sentences ----


def row(name, aji, organ="liver", **counts):
    counts = {"fn": 0, "fp": 0, "merges": 0, "splits": 0} | counts
    numbers = {"n_truth": 50, "n_pred": 50, "dq": 0.6, "sq": 0.7, "dice": 0.8, "pq": 0.4}
    return {"name": name, "organ": organ, "aji": aji, "counts": counts, **numbers}


@pytest.mark.parametrize(
    "n, expected",
    [
        (0, []),
        (1, [("worst", 1)]),
        (2, [("worst", 1), ("best", 2)]),
        (3, [("worst", 1), ("median", 2), ("best", 3)]),
        (8, [("worst", 1), ("median", 4), ("best", 8)]),
        (9, [("worst", 1), ("worst", 2), ("median", 4), ("median", 5), ("best", 8), ("best", 9)]),
        (12, [("worst", 1), ("worst", 2), ("median", 6), ("median", 7), ("best", 11), ("best", 12)]),
    ],
)
def test_picks(n, expected):
    rows = [row(f"{k:02}", k / 20) for k in np.random.default_rng(0).permutation(n)]
    found = gallery.picks([*rows, row("undefined", None)])
    assert [(kind, rank) for kind, rank, _ in found] == expected
    assert [r["name"] for *_, r in found] == [f"{rank - 1:02}" for _, rank in expected]


@pytest.fixture
def says(finished):
    """The findings of a run with the given rows, and lines of metrics."""

    def tell(rows, lines=()):
        trained = results.read(finished / "fold0")[0]
        stand_in = replace(trained, lines=list(lines), scores={"scores": [{"images": rows}]} if rows else None)
        return [found["text"] for found in results.findings([stand_in], {})]

    return tell


def test_findings(says):
    rows = [row("a", 0.2, fn=20, fp=2, merges=9), row("b", 0.4, fn=4, splits=1), row("c", 0.9, "skin", merges=1)]
    rows[0]["n_pred"] = 20
    assert says(rows) == [
        "The worst organ is liver: mean AJI 30.0 (2 images), 90.0 over the images of the others.",
        "24 of 150 true nuclei (16 %) have no match, nor have 2 of 120 predicted ones (2 %): "
        "misses outweigh false nuclei.",
        "Predictions that merge two or more nuclei: 10; nuclei that are split: 1. This is under-segmentation, where "
        "nuclei touch. Most merges: 9 in liver, 9 in a.",
        "120 nuclei are predicted for 150 true ones: 20 % too few.",
        "Mean DQ is 60.0 and SQ 70.0: finding nuclei (DQ) costs more than drawing them.",
        "The worst image is a with AJI 20.0; the median is 40.0.",
    ]
    rows = [row("a", 0.2, fn=9, fp=10, splits=9) | {"n_pred": 100, "dq": 0.9}]
    assert says(rows) == [
        "9 of 50 true nuclei (18 %) have no match, nor have 10 of 100 predicted ones (10 %): "
        "misses and false nuclei weigh about the same.",
        "Predictions that merge two or more nuclei: 0; nuclei that are split: 9. This is over-segmentation. "
        "Most splits: 9 in a.",
        "100 nuclei are predicted for 50 true ones: 100 % too many.",
        "Mean DQ is 90.0 and SQ 70.0: drawing nuclei (SQ) costs more than finding them.",
        "The worst image is a with AJI 20.0; the median is 20.0.",
    ]


@pytest.mark.parametrize(
    "values, expected",
    [
        (
            [(1, 0.2), (10, 0.3)],
            ["The last epoch, 10, is the best (AJI 30.0 on the inner split): longer training may help."],
        ),
        ([(1, 0.2), (9, 0.3), (10, 0.2)], []),
        (
            [(4, 0.5), (10, 0.3)],
            ["The best epoch is 4 of 10 (AJI 50.0 on the inner split): what came later did not help."],
        ),
        (
            [(0, 0.5), (10, 0.3)],
            [
                "The best epoch is 0 of 10 (AJI 50.0 on the inner split): what came later did not help.",
                "Training made it worse: 50.0 at epoch 0, 30.0 at the end.",
            ],
        ),
        ([(1, 0.2)], []),
    ],
)
def test_findings_of_the_training(says, values, expected):
    assert says([], [{"epoch": epoch, "aji": aji} for epoch, aji in values]) == expected


# ---- the page ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A cross-validation with folds 0 and 1 of 3, and the pages that training makes."""
    from nucsam.train import train

    out = tmp_path_factory.mktemp("cross")
    for fold in (0, 1):
        learns = (
            "model.width=64",
            "augment.stain=0",
            "train.batch=1",
            "train.lr_head=0.02",
            "train.epochs=4",
        )  # in so few steps
        train(tiny(f"data.fold={fold}", *learns), out / f"fold{fold}")
    assert report.finish(out) == f"report: {out / 'report.html'}"
    return out


@pytest.fixture(scope="module")
def net(finished):
    from nucsam.checkpoint import open_run

    return open_run(finished / "fold0")[0]


@pytest.fixture
def one(finished, tmp_path):
    return shutil.copytree(finished / "fold0", tmp_path / "one")


class Page(HTMLParser):
    """What a test asks of a page: its tags with attributes, its ids and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [own["id"] for _, own in self.tags if "id" in own]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)


def made(folder, **options):
    paths = report.write(folder, **options)
    assert paths[0] == folder / "report.html" and not list(folder.rglob("*.partial"))
    return Page(paths[0])


def test_training_made_the_page(finished):
    scores = json.loads((finished / "fold0" / "scores.json").read_text())
    environment = json.loads((finished / "fold0" / "environment.json").read_text())
    page = Page(finished / "fold0" / "report.html")
    assert all(f"{100 * scores['headline'][name]:.1f}" in page.text for name in ("dice", "aji", "pq"))
    images = scores["scores"][0]["images"]
    assert len(images) == 4 and all(r["name"] in page.text for r in images)
    assert sum(tag == "article" for tag, _ in page.tags) == 3
    for words in (
        "Random base weights: the scores say nothing about MobileSAM.",
        f"epoch {scores['epoch']}; chosen by AJI on the inner split",
        "Base weights: none (random, seed 0), SHA-256",
        "Seeds: 1 (train.seed = 0); the spread over seeds is not known",
        "official, 3 folds, fold 0, seed 19",
        "{parameters_trainable:,} of {parameters:,}".format_map(environment),
        "model.width: 128 -> 64",
    ):
        assert words in page.text, words
    assert "Predicted again" not in page.text  # the contours are those of the scores
    assert "No pictures" not in page.text


def test_the_page_is_whole_and_asks_for_nothing(finished):
    page = made(finished / "fold0")
    assert len(page.ids) > 50 and len(set(page.ids)) == len(page.ids)
    targets = re.findall(r"""(?:href="|url\()#([^")]+)""", page.source)
    targets += [own[key] for _, own in page.tags for key in ("aria-labelledby", "for") if key in own]
    assert len(targets) > 50 and set(targets) <= set(page.ids)
    loaded = [own.get(key) for _, own in page.tags for key in ("src", "href", "xlink:href") if own.get(key)]
    assert [url[:20] for url in loaded if not url.startswith(("#", "data:"))] == []
    assert "url(http" not in page.source and "@import" not in page.source
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(b - a for a, b in pairwise(levels)) == 1
    pictures = [own for tag, own in page.tags if own.get("role") == "img"]
    assert len(pictures) >= 3 + 7 and all(len(own["aria-label"]) > 20 for own in pictures)
    assert all(not re.search("#[0-9a-f]{6}", own.get("style", "")) for _, own in page.tags)  # both themes


def test_a_cross_validation(finished, net, tmp_path):
    out = shutil.copytree(finished, tmp_path / "cv")
    page = Page(out / "report.html")
    assert "The cross-validation has 2 of 3 folds so far." in page.text
    scores = [json.loads((out / f"fold{k}" / "scores.json").read_text())["headline"]["aji"] for k in (0, 1)]
    assert f"{50 * sum(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f}" in page.text
    assert sum(tag == "tr" and "data-organ" in own for tag, own in page.tags) == 8
    assert {own.get("href") for tag, own in page.tags if tag == "a"} >= {"fold0/report.html", "fold1/report.html"}
    for fold in (0, 1):  # a grid: the same runs as those of another rate, better by 10 points
        run = shutil.copytree(out / f"fold{fold}", out / "train.lr_head-0.03" / f"fold{fold}")
        config = load(run / "config.toml")
        (run / "config.toml").write_text(to_toml(replace(config, train=replace(config.train, lr_head=0.03))))
        text = json.loads((run / "scores.json").read_text())
        text["headline"]["aji"] += 0.1
        (run / "scores.json").write_text(json.dumps(text))
    page = made(out, net=net)
    assert "2 variants. Details below are of train.lr_head=0.03 , whose mean test AJI is the highest" in page.text
    assert [found["variant"] for found in map(report.summary, ([r] for r in results.read(out)))] == [
        "train.lr_head=0.02",
        "train.lr_head=0.02",
        "train.lr_head=0.03",
        "train.lr_head=0.03",
    ]
    assert sum(tag == "tr" and "data-organ" in own for tag, own in page.tags) == 8  # one variant's


def test_an_epoch_chosen_on_the_test_images_is_said(one, net):
    config = load(one / "config.toml")
    (one / "config.toml").write_text(to_toml(replace(config, data=replace(config.data, select="test"))))
    assert "The epoch was chosen on the test images: these scores flatter the model." in made(one, net=net).text


def test_an_unfinished_run_says_what_is_missing(one, tmp_path):
    (one / "scores.json").unlink()
    page = made(one)
    assert "This run is unfinished: 4 of 4 epochs, no scores.json." in page.text
    assert "All images" not in page.text and "Training loss" in page.text
    for name in ("metrics.jsonl", "environment.json", "adapter.safetensors"):
        (one / name).unlink()
    page = made(one)
    assert "0 of 4 epochs" in page.text and "No epoch is done yet" in page.text
    assert f"No pictures: {one / 'adapter.safetensors'}: no such file" in page.text


def test_moved_images(one, net, folder, tmp_path):
    config = load(one / "config.toml")
    (one / "config.toml").write_text(to_toml(replace(config, data=replace(config.data, root=str(tmp_path / "gone")))))
    page = made(one, net=net)
    assert f"No pictures: {tmp_path / 'gone'}: found no data set" in page.text
    assert f"nucsam report {one} --data FOLDER" in page.text and "All images" in page.text
    page = made(one, net=net, root=str(folder))
    assert "No pictures" not in page.text and sum(tag == "article" for tag, _ in page.tags) == 3
    other = shutil.copytree(folder, tmp_path / "other")
    for path in [*other.glob("*/tissue images/*"), *other.glob("*/label masks modify/*"), *other.glob("*/vague*/*/*")]:
        path.rename(path.with_stem("x" + path.stem))
    assert "found no image" in made(one, net=net, root=str(other)).text


def test_other_weights_than_those_scored_are_said(one, net):
    text = (one / "scores.json").read_text()
    (one / "scores.json").write_text(re.sub(r'"aji": 0\.\d+', '"aji": 0.87654', text))
    assert "Predicted again, this image has AJI" in made(one, net=net).text


@pytest.fixture
def hostile(one, folder, tmp_path):
    """A run whose images and organs have names of markup, and the folder of its images."""
    data = shutil.copytree(folder, tmp_path / "data")
    scores = json.loads((one / "scores.json").read_text())
    for scored in scores["scores"]:
        for r in scored["images"]:
            for path in data.rglob(f"{r['name']}.*"):
                path.rename(path.with_stem(path.stem + HOSTILE))
            r["name"] += HOSTILE
            r["organ"] += HOSTILE
    (one / "scores.json").write_text(json.dumps(scores))
    return one, data


def test_names_are_text(hostile, net):
    page = made(hostile[0], net=net, root=str(hostile[1]))
    assert "No pictures" not in page.text and sum(tag == "article" for tag, _ in page.tags) == 3
    assert not any(tag == "img" or "onerror" in own for tag, own in page.tags)
    assert page.text.count(HOSTILE) > 10


def test_names_of_any_bytes(one, net):
    scores = json.loads((one / "scores.json").read_text())
    for r in scores["scores"][0]["images"]:
        r["organ"] = "liver\udcff"
    (one / "scores.json").write_text(json.dumps(scores))
    assert "liver?" in made(one, net=net).text


def test_what_is_no_run(one, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found no config\.toml in it or in its sub-folders"):
        report.write(tmp_path / "empty")
    (one / "scores.json").write_text("[]")
    with pytest.raises(ValueError, match=r"scores\.json: found a list, expected a dict"):
        report.write(one)
    (one / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json: not JSON"):
        report.write(one)


def test_the_end_of_a_training_never_fails(one, monkeypatch):
    assert report.finish(one) == f"report: {one / 'report.html'}"
    (one / "scores.json").write_text('{"scores": []}')
    assert report.finish(one).endswith(f"; nucsam report {one} tries again")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    said = report.finish(one)
    assert "pip install 'nucsam[report]'" in said and "tries again" not in said
    with pytest.raises(RuntimeError, match="found no matplotlib and no jinja2"):
        report.write(one)


def test_the_command_writes_figures(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "cv")
    assert run_command(["report", str(out), "--figures", str(tmp_path / "figures")]) == 0
    written = capsys.readouterr().out.split()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    drawn = ["loss", "rate", "validation", "organs-dice", "organs-aji", "organs-pq", "folds", "network"]
    pictures = {"worst-rank1.png", "median-rank4.png", "best-rank8.png", "samples.png"}
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("svg", "png")} | pictures
    assert written == [str(out / "report.html"), *written[1:]] and len(written) == 1 + len(names)
    assert all((tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in names if name.endswith("png"))
    assert run_command(["report", str(tmp_path / "figures")]) == 2
    assert "expected a run of nucsam train" in capsys.readouterr().err


# ---- charts ----


def test_parts_of_the_network(base):
    from nucsam.config import Model
    from nucsam.model import build

    pattern = r"attn\.(qkv|proj)$|self_attn\.q_proj"
    for head, last in (("instance", "head"), ("sam", "mask_decoder")):
        net = build(Model(weights="none", head=head, pattern=pattern), base, seed=0)
        found = charts.parts(net)
        assert [part.name for part in found][-1] == last
        unused = net.image_encoder.neck if head == "instance" else torch.nn.Module()
        every = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in unused.parameters())
        assert sum(part.parameters for part in found) == every
        assert sum(part.trained for part in found) == sum(p.numel() for p in net.parameters() if p.requires_grad)
        stage = next(part for part in found if part.name == "image_encoder.layers.1")
        qkv, proj = 4 * (128 + 3 * 128), 4 * (128 + 128)
        layers = [("attn.qkv", qkv), ("attn.proj", proj), ("mlp.fc1", 0), ("mlp.fc2", 0)]
        assert stage.blocks == {"blocks.0": layers, "blocks.1": layers}
        drawn = charts.svg(charts.network(net, pattern), "network", 'says <&"')
        assert drawn.count(f"attn.qkv +{qkv:,}<") == 2 and 'aria-label="says &lt;&amp;&quot;"' in drawn
        assert (".q_proj +2,048<" in drawn) == (head == "sam")


def test_a_chart_takes_the_colours_of_the_page_and_its_own_ids():
    figure = charts.organs({"a $x$ <b>": [0.1, 0.3], "c": [0.5]}, "AJI by organ")
    a, b = (charts.svg(figure, name, "says") for name in ("a", "b"))
    assert "a $x$ &lt;b&gt;" in a and ">20.0<" in a and ">50.0<" in a
    assert not re.search("#[0-9a-f]{6}", a) and "var(--s1)" in a
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in (a, b)]
    assert len(ids[0]) > 10 and not ids[0] & ids[1]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("found no Chromium (apt-get install chromium): the page was not tried in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: page not tried")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a page; afterwards it must have asked for nothing and complained of nothing."""
    wrong, contexts = [], []

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def column(page, number):
    return page.eval_on_selector_all("#table tbody tr", f"rows => rows.map(row => row.cells[{number}].innerText)")


def test_table_in_a_browser(finished, visit):
    page = visit(finished / "fold0" / "report.html")
    scores = json.loads((finished / "fold0" / "scores.json").read_text())["scores"][0]["images"]
    assert column(page, 3) == [f"{100 * aji:.1f}" for aji in sorted(r["aji"] for r in scores)]
    page.click("#table th:nth-child(1) button")
    assert column(page, 0) == sorted(r["name"] for r in scores)
    page.click("#table th:nth-child(1) button")
    assert column(page, 0) == sorted((r["name"] for r in scores), reverse=True)
    assert page.get_attribute("#table th:nth-child(1)", "aria-sort") == "descending"
    page.focus("#table th:nth-child(8) button")
    page.keyboard.press("Enter")
    assert column(page, 7) == [str(n) for n in sorted(r["n_truth"] for r in scores)]  # as numbers
    assert page.eval_on_selector_all("#table [aria-sort]", "found => found.length") == 1
    name = scores[0]["name"]
    page.focus("#words")
    page.keyboard.type(name.upper())
    assert page.inner_text("#count") == "1 of 4 images"
    assert [row.is_visible() for row in page.query_selector_all("#table tbody tr")].count(True) == 1
    page.fill("#words", "no such name")
    assert page.inner_text("#count") == "0 of 4 images"
    page.fill("#words", "")
    page.select_option("#organ", scores[0]["organ"])
    assert page.inner_text("#count") == f"{sum(r['organ'] == scores[0]['organ'] for r in scores)} of 4 images"


def test_gallery_in_a_browser(finished, visit):
    page = visit(finished / "fold0" / "report.html")

    def shown(selector):
        return {element.is_visible() for element in page.query_selector_all(f"#gallery .viewer {selector}")}

    assert shown("g.truth g.missed") == {True}
    page.click(".switches input[value=missed]")
    assert shown("g.truth g.missed") == {False} and True in shown("g.truth")
    page.focus(".switches input[value=missed]")
    page.keyboard.press("Space")
    assert shown("g.truth g.missed") == {True}
    page.click(".switches label:has(input[value=truth])")
    assert shown("g.truth") == {False} and shown("image") == {True}

    def view():
        return [float(x) for x in page.get_attribute("#image-0 .viewer svg", "viewBox").split()]

    whole = view()
    assert whole == [0, 0, 96, 96]
    page.click("#image-0 button[aria-label='Zoom in']")
    assert view() == pytest.approx([16, 16, 64, 64]) and page.inner_text("#image-0 output") == "1.5×"
    assert float(page.get_attribute("#image-1 .viewer svg", "viewBox").split()[2]) == 96
    page.focus("#image-0 .viewer")
    page.keyboard.press("ArrowLeft")
    assert view() == pytest.approx([16 - 64 / 5, 16, 64, 64])
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
    assert view()[0] == 0  # no further than the image
    page.keyboard.press("0")
    assert view() == whole
    page.hover("#image-0 .viewer")
    page.mouse.wheel(0, -100)
    assert view() == whole  # scrolls the page
    page.hover("#image-0 .viewer")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('#image-0 output').textContent === '1.3×'")
    box = page.locator("#image-0 .viewer").bounding_box()
    before = view()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 170, box["y"] + 200)
    page.mouse.up()
    assert view()[0] == pytest.approx(before[0] + 30 / box["width"] * 76.8, abs=0.1)  # the picture follows the hand
    page.click("#image-0 button[data-zoom='0']")
    assert view() == whole


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_screen_in_both_themes(finished, visit, width):
    seen = {}
    for scheme in ("light", "dark"):
        screen = {"width": width, "height": 800}
        page = visit(finished / "report.html", viewport=screen, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        text, ground = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (text, ground)]
        assert abs(light[0] - light[1]) > 450
        seen[scheme] = ground
        chart = page.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
        assert chart == text  # the charts take on the page's colours
    assert seen["light"] != seen["dark"]


def test_every_control_is_reached_by_keyboard(finished, visit):
    page = visit(finished / "fold0" / "report.html")
    wanted = page.eval_on_selector_all("a[href], button, input, select, summary, .viewer", "all => all.length")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    reached, invisible = set(), 0
    for _ in range(4 * wanted):
        page.keyboard.press("Tab")
        number, outline = page.evaluate(
            "() => { const a = document.activeElement; return ["
            "[...document.querySelectorAll('a[href], button, input, select, summary, .viewer')].indexOf(a),"
            "getComputedStyle(a).outlineStyle] }"
        )
        if number in reached:
            break
        if number >= 0:
            reached.add(number)
            invisible += outline == "none"
    assert len(reached) == wanted > 30 and invisible == 0


def test_hostile_names_in_a_browser(hostile, net, visit):
    report.write(hostile[0], net=net, root=str(hostile[1]))
    page = visit(hostile[0] / "report.html")
    assert page.query_selector("img") is None and HOSTILE in page.inner_text("#image-0 h3")
    page.fill("#words", '<IMG src=x & "q"')
    assert page.inner_text("#count") == "4 of 4 images"
