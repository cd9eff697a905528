"""Folders of label maps from any tool -> rows, aggregates, tables, files."""

import csv
import json
import math
import os
import subprocess
import sys
from io import StringIO
from statistics import mean, stdev

import numpy as np
import pytest
import tifffile
from PIL import Image
from rich.console import Console

from nucsam.data import geojson
from nucsam.errors import UserError
from nucsam.files import to_json
from nucsam.score import tables
from nucsam.score.metrics import METRICS, PROTOCOLS, score_maps
from nucsam.score.pairs import find_pairs, protocols_for, remarks, score_folders

PLAIN = PROTOCOLS["plain"]


def maps(seed, n=6, side=64):
    """n squares of 100 px; predicted, all are shifted, the first is lost and a small one is new."""
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
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels)


@pytest.fixture
def folders(tmp_path):
    """Four images of two organs, each of its own type; one has no prediction, one no truth."""
    names = ("human liver_1", "human liver_2", "mouse fat_1", "mouse fat_2")
    scenes = {name: maps(seed, 4 + 2 * seed) for seed, name in enumerate(names)}
    for (name, (truth, pred)), suffix in zip(scenes.items(), (".tif", ".png", ".npy", ".tiff")):
        write(tmp_path / "truth" / name.split("_")[0] / f"{name}.tif", truth)
        write(tmp_path / "pred" / f"{name}{suffix}", pred)
    write(tmp_path / "truth" / "mouse fat" / "mouse fat_3.tif", maps(9)[0])
    write(tmp_path / "pred" / "other.png", maps(9)[1])
    (tmp_path / "pred" / "notes.txt").write_text("not a label map")
    return tmp_path, scenes


def score(root, **options):
    return score_folders(root / "truth", root / "pred", **options)


def text(*shown, width=200):
    console = Console(file=StringIO(), width=width)
    console.print(*shown)
    return console.file.getvalue()


def test_folders_are_scored_by_stem(folders):
    root, scenes = folders
    results = score(root)
    assert (results["missing"], results["extra"]) == (["mouse fat_3"], ["other"])
    missing, extra = remarks(results)
    assert "1 true" in missing and missing.endswith("4 images that are: mouse fat_3")
    assert "1 predictions" in extra and extra.endswith("4 images that are: other")
    (result,) = results["scores"]
    assert [row["name"] for row in result["images"]] == sorted(scenes)
    for row in result["images"]:
        found = score_maps(*scenes[row["name"]])
        described = {"name": row["name"], "organ": row["name"].split("_")[0], "warnings": []}
        outcomes = row.pop("outcomes")
        assert row == described | found.as_dict()
        assert (outcomes["missed"], outcomes["false"], outcomes["split"]) == (1, 0, 0)
        assert found.n_truth == sum(outcomes.values()) - outcomes["false"]
        assert (found.fn, found.fp) == (1, 0)  # the small one is removed


def test_the_pictures_that_prediction_writes_are_no_label_maps(folders):
    root, _ = folders
    (root / "pred" / "overlays").mkdir()
    for path in list((root / "pred").glob("*.tif")):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(
            root / "pred" / "overlays" / f"{path.stem}.png"
        )
    assert score(root)["extra"] == ["other"]


def test_outlines_alone_are_truths_beside_which_no_other_file_is_one(tmp_path):
    truth, pred = maps(0)
    for folder in ("outlines", "both", "pred"):
        (tmp_path / folder).mkdir()
    tifffile.imwrite(tmp_path / "pred" / "a.tif", pred)
    tifffile.imwrite(tmp_path / "both" / "a.tif", truth)
    (tmp_path / "both" / "predict.json").write_text("{}")
    geojson.write_geojson(
        tmp_path / "outlines" / "a.geojson", geojson.features(geojson.geometries(truth))
    )
    expected = score_maps(truth, pred).aji
    for folder in ("outlines", "both"):
        result = score_folders(tmp_path / folder, tmp_path / "pred")
        assert result["missing"] == []
        assert result["scores"][0]["images"][0]["aji"] == pytest.approx(expected)


def test_several_processes_change_nothing(folders):
    assert to_json(score(folders[0], workers=2)) == to_json(score(folders[0], workers=1))


def test_aggregates(folders):
    root, scenes = folders
    (result,) = score(root, protocol="plain")["scores"]
    scores = [score_maps(*scenes[name], protocol="plain") for name in sorted(scenes)]
    summary = result["summary"]
    assert (summary["images"], summary["nuclei"], summary["predicted"]) == (4, 28, 28)
    for metric in METRICS:
        values = [getattr(s, metric) for s in scores]
        weighted = sum(v * s.n_truth for v, s in zip(values, scores)) / 28
        assert summary["mean"][metric] == pytest.approx(mean(values))
        assert summary["std"][metric] == pytest.approx(stdev(values))
        assert summary["weighted"][metric] == pytest.approx(weighted)
    inter, union = sum(s.aji_inter for s in scores), sum(s.aji_union for s in scores)
    iou_sum, objects = sum(s.iou_sum for s in scores), sum(s.n_truth + s.n_pred for s in scores)
    assert summary["pooled"]["aji"] == pytest.approx(inter / union)
    assert summary["pooled"]["pq"] == pytest.approx(2 * iou_sum / objects)
    assert summary["pooled"]["pq"] != pytest.approx(summary["mean"]["pq"], abs=1e-6)
    assert list(summary["organs"]) == ["human liver", "mouse fat"]
    liver = summary["organs"]["human liver"]
    assert liver["images"] == 2
    assert liver["mean"]["pq"] == pytest.approx(mean(s.pq for s in scores[:2]))
    assert tables.means(result["images"])["aji"] == summary["mean"]["aji"]


def test_bootstrap_interval_covers_as_it_says():
    rng = np.random.default_rng(1)
    template = tables.image_row("a", "", score_maps(*maps(0), protocol="plain"))
    rows = [{**template, **dict.fromkeys(METRICS, float(v))} for v in rng.normal(0.5, 0.1, 400)]
    summary = tables.summarise(rows, PLAIN)
    half = 1.96 * summary["std"]["pq"] / math.sqrt(400)
    assert summary["low"]["pq"] == pytest.approx(summary["mean"]["pq"] - half, abs=0.15 * half)
    assert summary["high"]["pq"] == pytest.approx(summary["mean"]["pq"] + half, abs=0.15 * half)
    assert tables.summarise(rows, PLAIN) == summary
    assert summary["organs"] == {}
    assert math.isnan(tables.summarise(rows[:1], PLAIN)["std"]["pq"])
    few, enough = (tables.summarise(rows[:n], PLAIN) for n in (5, 6))
    assert math.isnan(few["low"]["pq"]) and math.isnan(few["high"]["dice"])
    assert enough["low"]["pq"] < enough["mean"]["pq"] < enough["high"]["pq"]


def test_mean_over_folds():
    folds = [{"aji": 0.5, "pq": 0.1}, {"aji": 0.6, "pq": None}, {"aji": 0.7, "pq": 0.3}]
    found = tables.over_folds(folds)
    assert (found["mean"]["aji"], found["std"]["aji"]) == pytest.approx((0.6, 0.1))
    nothing = [found["mean"]["pq"], found["std"]["pq"], tables.over_folds(folds[:1])["std"]["aji"]]
    nothing += [
        tables.over_folds([])[kind][metric] for kind in ("mean", "std") for metric in METRICS
    ]
    assert all(math.isnan(value) for value in nothing)
    assert tables.over_folds(folds[:1])["mean"] == folds[0]


def test_percent():
    assert (tables.percent(0.12345), tables.percent(0.12345, 2)) == ("12.3", "12.35")
    assert tables.percent(None) == tables.percent(math.nan) == "–"


def test_empty_images_are_left_out_in_plain_and_counted(tmp_path):
    truth, pred = maps(0)
    images = {"full": (truth, pred), "empty": (truth * 0, pred * 0), "lost": (truth, pred * 0)}
    for name, pair in images.items():
        for folder, labels in zip(("truth", "pred"), pair):
            write(tmp_path / folder / f"{name}.tif", labels)
    for protocol, of_empty in (("plain", []), ("nuinsseg", [1]), ("nuceval", [1])):
        (result,) = score(tmp_path, protocol=protocol)["scores"]
        dice = score_maps(truth, pred, protocol=protocol).dice
        assert result["summary"]["both_empty"] == 1
        assert result["summary"]["mean"]["dice"] == pytest.approx(mean([dice, 0, *of_empty]))
        assert "both maps empty in 1 of 3 images" in text(tables.summary_table(result))


def test_vague_areas_show_a_second_table(folders):
    root, scenes = folders
    vague = np.zeros((64, 64, 3), np.uint8)
    vague[:32] = 255
    known = list(scenes)[:3]  # not every image has vague areas
    for name in known:
        write(root / "vague" / f"{name}.png", vague)
    results = score(root, vague=root / "vague")
    official, without = results["scores"]
    names = [result["protocol"]["name"] for result in results["scores"]]
    assert names == ["nuinsseg", "nuinsseg-no-vague"]
    for row, other in zip(official["images"], without["images"]):
        truth, pred = scenes[row["name"]]
        own = vague[..., 0] if row["name"] in known else None
        found = score_maps(truth, pred, vague=own, protocol="nuinsseg-no-vague")
        assert row["counts"] == score_maps(truth, pred).as_dict()["counts"]
        assert other["counts"] == found.as_dict()["counts"]
    assert official["images"][0]["counts"] != without["images"][0]["counts"]
    (only,) = score(root, vague=root / "vague", protocol="nuceval")["scores"]
    assert only["protocol"]["name"] == "nuceval"


def test_rules_can_be_changed_and_say_so(folders):
    (result,) = score(folders[0], iou=0.7, strict=False)["scores"]
    assert result["rules"].startswith("nuinsseg (changed): match at IoU >= 0.7, ")
    (zoned,) = protocols_for("nuceval", zone_width=1)
    assert (zoned.zone_width, zoned.strict, zoned.iou) == (1, True, 0.5)
    assert protocols_for("plain", vague=True) == [PLAIN]


def test_masks_are_reported_and_can_be_labelled(tmp_path):
    truth, pred = maps(1, 6)
    write(tmp_path / "truth" / "a.tif", truth)
    write(tmp_path / "pred" / "a.png", ((pred > 0) * 255).astype(np.uint8))
    results, labelled = score(tmp_path), score(tmp_path, connected=True)
    (warning,) = results["warnings"]
    assert warning.startswith("a: prediction") and remarks(results) == [warning]
    assert labelled["warnings"] == []
    pq = [scores["scores"][0]["summary"]["mean"]["pq"] for scores in (results, labelled)]
    assert pq[1] > pq[0] + 0.3


def test_every_bad_file_is_named(folders):
    root, _ = folders
    write(root / "pred" / "human liver_1.tif", np.full((64, 64), 0.5, np.float32))
    write(root / "pred" / "mouse fat_1.npy", np.zeros((10, 64), np.uint8))
    (root / "pred" / "mouse fat_2.tiff").write_bytes(b"II*\0")
    with pytest.raises(UserError, match="3 problem") as error:
        score(root, workers=2)
    for name in ("human liver_1.tif", "mouse fat_1.npy against", "mouse fat_2.tiff"):
        assert name in str(error.value)


def test_organs_that_share_a_stem(tmp_path):
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    for organ in ("liver", "fat"):
        write(truth / organ / "1.tif", maps(0)[0])
        write(pred / organ / "1.tif", maps(0)[1])
    pairs, missing, extra = find_pairs(truth, pred)
    assert [(p.name, p.organ) for p in pairs] == [("fat_1", "fat"), ("liver_1", "liver")]
    assert missing == extra == []
    (pred / "fat" / "1.tif").unlink()  # the other is unambiguous there, but not in the truth
    pairs, missing, extra = find_pairs(truth, pred, pred)
    assert [(p.name, p.vague) for p in pairs] == [("liver_1", pred / "liver" / "1.tif")]
    assert (missing, extra) == (["fat_1"], [])


def test_a_stem_in_another_organ_is_another_image(tmp_path):
    """Of predictions and of vague areas; tools may name the folders of organs otherwise."""
    for organ, numbers in (("liver", "123"), ("kidney", "45")):
        for number in numbers:
            write(tmp_path / "truth" / organ / f"{number}.tif", maps(int(number))[0])
    for file in ("liver/1", "liver/2", "kidney/3", "kidney/4"):
        write(tmp_path / "pred" / f"{file}.tif", maps(int(file[-1]))[0])
    write(tmp_path / "vague" / "kidney" / "1.png", np.full((64, 64), 255, np.uint8))
    write(tmp_path / "vague" / "liver" / "2.png", np.full((64, 64), 255, np.uint8))
    vague = tmp_path / "vague"
    pairs, missing, extra = find_pairs(tmp_path / "truth", tmp_path / "pred", vague)
    assert [pair.name for pair in pairs] == ["1", "2", "4"]
    assert [pair.vague and pair.vague.stem for pair in pairs] == [None, "2", None]
    assert (missing, extra) == (["5", "liver_3"], ["kidney_3"])
    write(tmp_path / "pred" / "kidney" / "1.tif", maps(1)[1])  # now two predictions are called 1
    pairs, missing, _ = find_pairs(tmp_path / "truth", tmp_path / "pred", vague)
    assert [pair.pred.parent.name for pair in pairs] == ["liver", "liver", "kidney"]
    (tmp_path / "pred" / "kidney" / "1.tif").unlink()
    (tmp_path / "pred" / "liver").rename(tmp_path / "pred" / "Leber")
    (tmp_path / "pred" / "kidney").rename(tmp_path / "pred" / "Niere")
    pairs, missing, extra = find_pairs(tmp_path / "truth", tmp_path / "pred")
    assert [pair.name for pair in pairs] == ["1", "2", "3", "4"]


def test_of_results_of_a_prediction_the_label_maps_are_the_truth(tmp_path):
    truth, _ = maps(0)
    for folder in ("first", "second"):
        write(tmp_path / folder / "a.tif", truth)
        (tmp_path / folder / "predict.json").write_text("{}")
        for name in ("a.geojson", "a.geojson.gz", "a.tissue.geojson", "a.csv"):
            (tmp_path / folder / name).write_text("no label map")
    (pair,), *others = find_pairs(tmp_path / "first", tmp_path / "second")
    assert (pair.truth.name, pair.pred.name, others) == ("a.tif", "a.tif", [[], []])
    for name in ("a.tif", "a.geojson.gz"):
        (tmp_path / "first" / name).unlink()
    (pair,), *others = find_pairs(tmp_path / "first", tmp_path / "second")
    assert (pair.truth.name, pair.pred.name, others) == ("a.geojson", "a.tif", [[], []])


def test_an_organ_is_found_in_the_name(folders):
    root, _ = folders
    for pattern in (r"^\w+ (\w+)_", r"(?<= )\w+(?=_)"):
        pairs, *_ = find_pairs(root / "truth", root / "pred", organ=pattern)
        assert [pair.organ for pair in pairs] == ["liver", "liver", "fat", "fat"]
    pairs, *_ = find_pairs(root / "truth", root / "pred", organ="no such")
    assert pairs[0].organ == "human liver"


def test_a_data_set_is_a_truth(tmp_path):
    truth, pred = maps(0)
    for organ in ("human liver", "mouse fat"):
        place, stem = tmp_path / "truth" / organ, organ.replace(" ", "_") + "_01"
        write(place / "tissue images" / f"{stem}.png", np.full((64, 64, 3), 200, np.uint8))
        write(place / "label masks modify" / f"{stem}.tif", truth)
        write(place / "vague areas/mask binary" / f"{stem}.png", np.zeros((64, 64), np.uint8))
        write(tmp_path / "pred" / f"{stem}.tif", pred)
    official, without = score(tmp_path)["scores"]  # vague areas are known
    assert [row["organ"] for row in official["images"]] == ["human liver", "mouse fat"]
    assert without["protocol"]["name"] == "nuinsseg-no-vague"


def test_annotations_are_a_truth(tmp_path):
    truth, pred = maps(0)
    write(tmp_path / "truth" / "images" / "a.png", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "truth" / "annotations").mkdir()
    outlines = geojson.features(geojson.geometries(truth))
    geojson.write_geojson(tmp_path / "truth" / "annotations" / "a.geojson", outlines)
    write(tmp_path / "pred" / "a.tif", pred)
    (result,) = score(tmp_path, protocol="plain")["scores"]
    assert result["images"][0]["aji"] == score_maps(truth, pred, protocol="plain").aji > 0.2


def test_tables_name_the_protocol_and_fit_a_terminal(folders):
    (result,) = score(folders[0])["scores"]
    summary, liver = result["summary"], result["summary"]["organs"]["human liver"]
    whole, organs = tables.summary_table(result), tables.organ_table(result)
    for table, metrics in ((whole, tables.COLUMNS), (organs, tables.MAIN)):
        wide, narrow = text(table), text(table, width=80)
        assert max(map(len, narrow.splitlines())) <= 80
        titles = " ".join(tables.COLUMNS[metric] for metric in metrics)
        numbers = " ".join(tables.percent(summary["mean"][metric]) for metric in metrics)
        for shown in (wide, narrow):  # nothing is broken over two lines
            words = " ".join(shown.split())
            assert all(part in words for part in (result["rules"], titles, numbers))
            assert "both maps empty in 0 of 4 images" in words
    words = " ".join(text(whole, organs).split())
    assert all(name in words for name in tables.AGGREGATES.values())
    assert "28 nuclei, 24 predicted" in words
    assert f"human liver 2 10 {tables.percent(liver['mean']['dice'])}" in words


def test_json_and_csv(folders, tmp_path):
    root, _ = folders
    for folder in ("truth", "pred"):
        write(root / folder / "empty.tif", np.zeros((9, 9), np.uint8))
    results = score(root, protocol="plain")
    tables.write_json(tmp_path / "a.json", results)
    tables.write_csv(tmp_path / "a.csv", results)
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    (again,) = read["scores"]
    assert again["images"][0]["name"] == "empty" and again["images"][0]["pq"] is None
    assert (read["missing"], read["extra"]) == (["mouse fat_3"], ["other"])
    # rows that are read back give the same summary
    summary = results["scores"][0]["summary"]
    assert tables.summarise(again["images"], PLAIN)["pooled"] == summary["pooled"]
    assert tables.means(again["images"]) == summary["mean"]
    with (tmp_path / "a.csv").open(newline="") as file:
        empty, first, *rest = csv.DictReader(file)
    image = results["scores"][0]["images"][1]
    assert len(rest) == 3
    assert (empty["pq"], empty["n_truth"], empty["protocol"]) == ("", "0", "plain")
    assert (first["name"], first["organ"]) == ("human liver_1", "human liver")
    assert (float(first["aji"]), float(first["ap75"])) == (image["aji"], image["ap"][5])
    assert int(first["aji_union"]) == image["counts"]["aji_union"] and "ap_tp" not in first


def test_scoring_loads_no_torch():
    code = "import sys, nucsam.score.pairs; assert not {'torch', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scores_are_shown_and_written_on_a_terminal_without_their_characters(folders, tmp_path):
    root, _ = folders
    command = [sys.executable, "-m", "nucsam", "evaluate", "--truth", root / "truth"]
    command += ["--pred", root / "pred", "--json", tmp_path / "a.json"]
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, env=ascii, capture_output=True, text=True)
    assert shown.returncode == 0 and "human liver" in shown.stdout
    assert json.loads((tmp_path / "a.json").read_text())["missing"] == ["mouse fat_3"]
