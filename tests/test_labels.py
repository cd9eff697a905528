"""Is a label map a map of instances?"""

import json
import re

import numpy as np
import pytest
import tifffile

from nucsam.cli import run_command
from nucsam.data.labels import components, not_instances
from nucsam.data.samples import Samples
from nucsam.data.splits import find_split
from nucsam.data.summary import inspect_folder
from nucsam.score.pairs import remarks, score_folders


def nuclei(count, side=200):
    """Squares of 6 px, 3 px apart, with ids 1, 2, ..."""
    label = np.zeros((side, side), np.uint16)
    for k in range(count):
        y, x = 9 * (k // 21), 9 * (k % 21)
        label[y : y + 6, x : x + 6] = k + 1
    return label


MANY = nuclei(300)


@pytest.mark.parametrize(
    "label, says",
    [
        (MANY, ""),
        (MANY * 0, ""),
        (MANY == 7, ""),  # one nucleus
        (MANY.astype(np.int64) * 2**40, ""),
        (MANY > 0, "a binary mask: 300 separate components share the value 1"),
        ((MANY > 0) * np.uint8(255), "a binary mask: 300 separate components share the value 255"),
        (np.where(MANY, 127 * (1 + MANY % 2), 0), "a map of classes: 300 .* share 2 values"),
        (np.where(MANY, 1 + MANY % 5, 0), "a map of classes: 300 separate components share 5 v"),
        (np.minimum(MANY, 255).astype(np.uint8), "a clipped map: 46 .* its largest value, 255"),
        (np.minimum(nuclei(256), 255), ""),  # one nucleus in two pieces
        (np.where(nuclei(5) > 3, 3, nuclei(5)), ""),  # three nuclei, one of them in three pieces
    ],
)
def test_what_a_label_map_seems_to_be(label, says):
    assert re.fullmatch(says + ("" if not says else ".*"), not_instances(label))


def test_components_of_each_value():
    label = np.array([[7, 7, 0, 2], [0, 0, 7, 2], [5, 0, 0, 2]])
    assert components(label).tolist() == [[1, 1, 0, 2], [0, 0, 3, 2], [4, 0, 0, 2]]


@pytest.fixture
def classes(folder, tmp_path):
    """The tiny data set with values 127 and 254 in place of ids."""
    for image in folder.glob("*/tissue images/*.png"):
        label = tifffile.imread(image.parents[1] / "label masks modify" / f"{image.stem}.tif")
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
        values = np.where(label, 127 * (1 + label % 2), 0).astype(np.uint8)
        tifffile.imwrite(tmp_path / "labels" / f"{image.stem}.tif", values)
    return tmp_path


def test_a_map_of_classes_is_remarked_on_wherever_labels_are_read(classes, tiny, capsys):
    sheet = ["--sheet", str(classes / "sheet.png"), "--json"]
    assert run_command(["inspect", str(classes), *sheet]) == 1
    summary = json.loads(capsys.readouterr().out)
    bad = summary["bad"]
    assert summary["rows"][-1]["images"] == 12  # they are counted as they are
    assert "a map of classes" in " ".join(bad)
    assert all("data.connected" in text for text in bad)
    labels = classes / "labels"
    results = score_folders(labels, labels, workers=1)
    assert "truth: found a map of classes" in " ".join(remarks(results))
    assert run_command(["inspect", str(classes), "--connected", *sheet]) == 0
    nuclei = json.loads(capsys.readouterr().out)["rows"][-1]["nuclei"]
    assert all(record.connected for record in inspect_folder(classes, connected=True)[1])
    records, _ = find_split(tiny(f"data.root={classes}", "data.connected=true").data)
    samples = Samples(records)
    assert sum(samples[i].label.max() for i in range(12)) == nuclei
    labelled = score_folders(labels, labels, workers=1, connected=True, protocol="plain")
    assert labelled["scores"][0]["summary"]["mean"]["pq"] == 1 and not remarks(labelled)
