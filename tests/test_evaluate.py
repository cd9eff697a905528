"""Folders of label maps from any tool -> rows, aggregates, tables, files."""

import csv
import json
import math
import subprocess
import sys
from io import StringIO
from statistics import mean, stdev

import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console

from nucsam import evaluate, geojson
from nucsam.metrics import METRICS, PROTOCOLS, score

PLAIN = PROTOCOLS["plain"]


def maps(seed, n=6, side=64):
    """Truth with n squares of 100 px, and a prediction that shifts all, loses the first and adds a small one."""
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros((2, side, side), np.uint16)
    for name, place in enumerate(rng.permutation((side // 16) ** 2)[:n], 1):
        y, x = 16 * (place // (side // 16)), 16 * (place % (side // 16))
        truth[y + 2 : y + 12, x + 2 : x + 12] = name
        shift = rng.integers(0, 4)
        pred[y + 2 : y + 12, x + 2 + shift : x + 12 + shift] = 10 * name if name > 1 else 0
    pred[0, :30] = 999
    return truth, pred


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".png":
        Image.fromarray(labels.astype(np.uint16)).save(path)
    else:
        tifffile.imwrite(path, labels)


@pytest.fixture
def folders(tmp_path):
    """Four images of two organs, each tool's own file type, one prediction missing and one too many."""
    scenes = {
        f"{organ}_{k}": maps(seed, 4 + 2 * seed)
        for seed, (organ, k) in enumerate([("human liver", 1), ("human liver", 2), ("mouse fat", 1), ("mouse fat", 2)])
    }
    for (name, (truth, pred)), suffix in zip(scenes.items(), (".tif", ".png", ".npy", ".tiff")):
        write(tmp_path / "truth" / name.split("_")[0] / f"{name}.tif", truth)
        write(tmp_path / "pred" / f"{name}{suffix}", pred)
    write(tmp_path / "truth" / "mouse fat" / "mouse fat_3.tif", maps(9)[0])
    write(tmp_path / "pred" / "other.png", maps(9)[1])
    (tmp_path / "pred" / "notes.txt").write_text("not a label map")
    return tmp_path, scenes


def text(*tables, width=200):
    console = Console(file=StringIO(), width=width)
    console.print(*tables)
    return console.file.getvalue()


def test_folders_are_scored_by_stem(folders):
    root, scenes = folders
    results = evaluate.score_folders(root / "truth", root / "pred", progress=False)
    assert (results["missing"], results["extra"], results["warnings"]) == (["mouse fat_3"], ["other"], [])
    assert evaluate.remarks(results) == [
        "1 true label maps without a prediction are not scored, beside 4 images that are: mouse fat_3",
        "1 predictions without a true label map are not scored, beside 4 images that are: other",
    ]
    (result,) = results["scores"]
    assert [r["name"] for r in result["images"]] == sorted(scenes) and len(scenes) == 4
    for r in result["images"]:
        found = score(*scenes[r["name"]])
        assert r == {"name": r["name"], "organ": r["name"].split("_")[0], "warnings": [], **found.as_dict()}
        assert (found.fn, found.fp) == (1, 0)  # the small one is removed


def test_several_processes_change_nothing(folders):
    root, _ = folders
    one = evaluate.score_folders(root / "truth", root / "pred", workers=1, progress=False)
    assert evaluate.score_folders(root / "truth", root / "pred", workers=2, progress=False) == one


def test_aggregates(folders):
    root, scenes = folders
    (result,) = evaluate.score_folders(root / "truth", root / "pred", protocol="plain", progress=False)["scores"]
    scores = [score(*scenes[name], protocol="plain") for name in sorted(scenes)]
    summary = result["summary"]
    assert (summary["images"], summary["nuclei"], summary["predicted"]) == (4, 28, 28)
    for metric in METRICS:
        values = [getattr(s, metric) for s in scores]
        assert summary["mean"][metric] == pytest.approx(mean(values))
        assert summary["std"][metric] == pytest.approx(stdev(values))
        weighted = sum(v * s.n_truth for v, s in zip(values, scores)) / 28
        assert summary["weighted"][metric] == pytest.approx(weighted)
        assert min(values) - 1e-9 <= summary["low"][metric] <= summary["high"][metric] <= max(values) + 1e-9
    inter, union = sum(s.aji_inter for s in scores), sum(s.aji_union for s in scores)
    assert summary["pooled"]["aji"] == pytest.approx(inter / union)
    counts = [sum(getattr(s, c) for s in scores) for c in ("tp", "fp", "fn")]
    iou_sum = sum(s.iou_sum for s in scores)
    assert summary["pooled"]["pq"] == pytest.approx(2 * iou_sum / (2 * counts[0] + counts[1] + counts[2]))
    assert summary["pooled"]["pq"] != pytest.approx(summary["mean"]["pq"], abs=1e-6)
    assert list(summary["organs"]) == ["human liver", "mouse fat"]
    liver = summary["organs"]["human liver"]
    assert liver["images"] == 2
    assert liver["mean"]["pq"] == pytest.approx(mean(s.pq for s in scores[:2]))
    assert evaluate.means(result["images"])["aji"] == summary["mean"]["aji"]


def test_bootstrap_interval_covers_as_it_says():
    rng = np.random.default_rng(1)
    truth, pred = maps(0)
    template = evaluate.row("a", "", score(truth, pred, protocol="plain"))
    rows = [{**template, **dict.fromkeys(METRICS, float(v))} for v in rng.normal(0.5, 0.1, 400)]
    summary = evaluate.summarise(rows, PLAIN)
    half = 1.96 * summary["std"]["pq"] / math.sqrt(400)
    assert summary["low"]["pq"] == pytest.approx(summary["mean"]["pq"] - half, abs=0.15 * half)
    assert summary["high"]["pq"] == pytest.approx(summary["mean"]["pq"] + half, abs=0.15 * half)
    assert evaluate.summarise(rows, PLAIN) == summary


def test_empty_images_are_left_out_in_plain_and_counted(tmp_path):
    truth, pred = maps(0)
    for name, t, p in (("full", truth, pred), ("empty", truth * 0, pred * 0), ("lost", truth, pred * 0)):
        write(tmp_path / "t" / f"{name}.tif", t)
        write(tmp_path / "p" / f"{name}.tif", p)
    expected = score(truth, pred, protocol="plain").dice
    for protocol, dice in (("plain", expected / 2), ("nuinsseg", None), ("nuceval", None)):
        (result,) = evaluate.score_folders(tmp_path / "t", tmp_path / "p", protocol=protocol, progress=False)["scores"]
        summary = result["summary"]
        assert summary["both_empty"] == 1
        assert "both maps empty in 1 of 3 images" in text(evaluate.summary_table(result))
        own = score(truth, pred, protocol=protocol).dice
        assert summary["mean"]["dice"] == pytest.approx(dice or (own + 1 + 0) / 3)


def test_vague_areas_show_a_second_table(folders):
    root, scenes = folders
    vague = np.zeros((64, 64, 3), np.uint8)
    vague[:32] = 255
    (root / "vague").mkdir()
    for name in list(scenes)[:3]:  # not every image has vague areas
        Image.fromarray(vague).save(root / "vague" / f"{name}.png")
    results = evaluate.score_folders(root / "truth", root / "pred", vague=root / "vague", progress=False)
    official, without = results["scores"]
    assert [r["protocol"]["name"] for r in results["scores"]] == ["nuinsseg", "nuinsseg-no-vague"]
    for r, s in zip(official["images"], without["images"]):
        truth, pred = scenes[r["name"]]
        own = vague[..., 0] if r["name"] in list(scenes)[:3] else None
        assert r["counts"] == score(truth, pred).as_dict()["counts"]
        assert s["counts"] == score(truth, pred, vague=own, protocol="nuinsseg-no-vague").as_dict()["counts"]
    assert official["images"][0]["counts"] != without["images"][0]["counts"]
    one = evaluate.score_folders(
        root / "truth", root / "pred", vague=root / "vague", protocol="nuceval", progress=False
    )
    assert [r["protocol"]["name"] for r in one["scores"]] == ["nuceval"]


def test_rules_can_be_changed_and_say_so(folders):
    root, _ = folders
    results = evaluate.score_folders(
        root / "truth", root / "pred", protocol="nuinsseg", iou=0.7, at_least=True, progress=False
    )
    (result,) = results["scores"]
    assert result["rules"].startswith("nuinsseg (changed): match at IoU >= 0.7, predictions under 50 px removed")
    (zoned,) = evaluate.protocols_for("nuceval", zone=1)
    assert (zoned.zone_width, zoned.strict, zoned.iou) == (1, True, 0.5)
    assert evaluate.protocols_for("plain", vague=True) == [PLAIN]


def test_masks_are_reported_and_can_be_labelled(folders):
    root, scenes = folders
    for name, (_, pred) in scenes.items():
        for path in (root / "pred").glob(f"{name}.*"):
            path.unlink()
        write(root / "pred" / f"{name}.png", (pred > 0) * 255)
    results = evaluate.score_folders(root / "truth", root / "pred", progress=False)
    assert len(results["warnings"]) == 4
    assert results["warnings"][0].startswith("human liver_1: prediction is a 0/255 mask with ")
    labelled = evaluate.score_folders(root / "truth", root / "pred", connected=True, progress=False)
    assert labelled["warnings"] == []
    assert labelled["scores"][0]["summary"]["mean"]["pq"] > results["scores"][0]["summary"]["mean"]["pq"] + 0.3


def test_every_bad_file_is_named(folders):
    root, _ = folders
    write(root / "pred" / "human liver_1.tif", np.zeros((64, 64), np.float32))
    write(root / "pred" / "mouse fat_1.npy", np.zeros((10, 64), np.uint8))
    (root / "pred" / "mouse fat_2.tiff").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match="3 of 4 images cannot be scored") as error:
        evaluate.score_folders(root / "truth", root / "pred", workers=2, progress=False)
    message = str(error.value)
    assert "human liver_1.tif: found float32" in message
    assert "mouse fat_1.npy against" in message and "different shapes: truth (64, 64), prediction (10, 64)" in message
    assert "mouse fat_2.tiff" in message


def test_bad_folders_are_refused(folders, tmp_path):
    root, _ = folders
    with pytest.raises(ValueError, match="nowhere: expected a folder"):
        evaluate.find_pairs(root / "nowhere", root / "pred")
    (root / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: found no .tif"):
        evaluate.find_pairs(root / "truth", root / "none")
    write(root / "none" / "else.tif", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"has the stem.*found else, expected human liver_1, human liver_2"):
        evaluate.find_pairs(root / "truth", root / "none")
    write(root / "none" / "else.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"several files for one image: .*else.png, .*else.tif"):
        evaluate.find_pairs(root / "none", root / "pred")


def test_organs(folders):
    root, _ = folders
    for organ in ("liver", "fat"):  # the same stem in two organs
        write(root / "nested" / "t" / organ / "1.tif", maps(0)[0])
        write(root / "nested" / "p" / organ / "1.tif", maps(0)[1])
    pairs, missing, extra = evaluate.find_pairs(root / "nested" / "t", root / "nested" / "p")
    assert [(p.name, p.organ) for p in pairs] == [("fat_1", "fat"), ("liver_1", "liver")]
    assert missing == extra == []
    (root / "nested" / "p" / "fat" / "1.tif").unlink()  # what is left is unambiguous there, but not in the truth
    pairs, missing, extra = evaluate.find_pairs(root / "nested" / "t", root / "nested" / "p", root / "nested" / "p")
    assert [(p.name, p.vague.name) for p in pairs] == [("liver_1", "1.tif")]
    assert (missing, extra) == (["fat_1"], [])
    pairs, *_ = evaluate.find_pairs(root / "truth", root / "pred", organ=r"^\w+ (\w+)_")
    assert [p.organ for p in pairs] == ["liver", "liver", "fat", "fat"]


def test_a_data_set_is_a_truth(tmp_path):
    truth, pred = maps(0)
    for organ in ("human liver", "mouse fat"):
        place = tmp_path / "set" / organ
        for folder in ("tissue images", "label masks modify", "vague areas/mask binary"):
            (place / folder).mkdir(parents=True)
        stem = organ.replace(" ", "_") + "_01"
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(place / "tissue images" / f"{stem}.png")
        tifffile.imwrite(place / "label masks modify" / f"{stem}.tif", truth)
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(place / "vague areas/mask binary" / f"{stem}.png")
        write(tmp_path / "pred" / f"{stem}.tif", pred)
    results = evaluate.score_folders(tmp_path / "set", tmp_path / "pred", progress=False)
    assert [r["organ"] for r in results["scores"][0]["images"]] == ["human liver", "mouse fat"]
    assert len(results["scores"]) == 2  # vague areas are known


def test_annotations_are_a_truth(tmp_path):
    truth, pred = maps(0)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "annotations").mkdir()
    geojson.write(tmp_path / "annotations" / "a.geojson", geojson.features(truth))
    write(tmp_path / "pred" / "a.tif", pred)
    (result,) = evaluate.score_folders(tmp_path, tmp_path / "pred", protocol="plain", progress=False)["scores"]
    assert result["images"][0]["aji"] == score(truth, pred, protocol="plain").aji > 0.2


def test_tables_name_the_protocol(folders):
    root, _ = folders
    (result,) = evaluate.score_folders(root / "truth", root / "pred", progress=False)["scores"]
    tables = ((evaluate.summary_table(result), evaluate.COLUMNS), (evaluate.organ_table(result), evaluate.MAIN))
    for table, metrics in tables:
        shown = text(table)
        assert "nuinsseg: match at IoU > 0.5, predictions under 50 px removed" in shown
        assert "both maps empty in 0 of 4 images" in shown
        assert all(evaluate.COLUMNS[metric] in shown for metric in metrics)
        assert f"{100 * result['summary']['mean']['aji']:.1f}" in shown
        narrow = text(table, width=80)
        assert max(map(len, narrow.splitlines())) <= 80
        assert f"{100 * result['summary']['mean']['aji']:.1f}" in narrow  # not broken over two lines
    assert all(name in text(evaluate.summary_table(result)) for name in evaluate.AGGREGATES.values())
    assert "mouse fat" in text(evaluate.organ_table(result))


def test_json_and_csv(folders, tmp_path):
    root, _ = folders
    write(root / "pred" / "empty.tif", np.zeros((9, 9), np.uint8))
    write(root / "truth" / "empty.tif", np.zeros((9, 9), np.uint8))
    results = evaluate.score_folders(root / "truth", root / "pred", protocol="plain", progress=False)
    evaluate.write_json(tmp_path / "a.json", results)
    evaluate.write_csv(tmp_path / "a.csv", results)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    (again,) = read["scores"]
    assert again["images"][0]["name"] == "empty" and again["images"][0]["pq"] is None
    assert (read["missing"], read["extra"]) == (["mouse fat_3"], ["other"])
    # rows read back give the same summary
    assert evaluate.summarise(again["images"], PLAIN)["pooled"] == results["scores"][0]["summary"]["pooled"]
    assert evaluate.means(again["images"]) == results["scores"][0]["summary"]["mean"]
    with (tmp_path / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5
    assert lines[0]["pq"] == "" and lines[0]["n_truth"] == "0"
    assert float(lines[1]["aji"]) == results["scores"][0]["images"][1]["aji"]
    assert {line["protocol"] for line in lines} == {"plain"}


def test_needs_no_torch():
    code = "import sys, nucsam.evaluate, nucsam.metrics; assert not {'torch', 'scipy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
