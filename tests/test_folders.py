"""Folders as laboratories have them: each test makes one, most after a public report."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from nucsam.cli import run_command
from nucsam.config import override
from nucsam.data.folders import describe_records, find_records, list_folder, scan_folder
from nucsam.data.samples import read_sample
from nucsam.errors import UserError
from nucsam.predict.images import find_image_files
from nucsam.score.pairs import find_pairs

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8)
IDS = np.zeros((64, 80), np.uint16)
IDS[5:15, 5:15], IDS[30:40, 10:30] = 2, 7


def make(root: Path, pictures: str = "", labels: str = "", others: str = "") -> Path:
    """Files by their names: colour images, label maps, and files of a word."""
    for names, content in ((pictures, PICTURE), (labels, IDS), (others, None)):
        for name in names.split("|") if names else ():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.write_text("[]")
            elif ".tif" in path.name:
                tifffile.imwrite(path, content)
            else:
                Image.fromarray(content).save(path)
    return root


def pairs_of(root: Path) -> dict[str, str]:
    """Image -> label of the records, as paths below the root."""
    records = find_records(root)
    for record in records:
        assert read_sample(record).label.max() == 2
    return {str(r.image.relative_to(root)): str(r.label.relative_to(root)) for r in records}


TILE = "A [x=0,y=512,w=512,h=512]"  # as QuPath's TileExporter names it
PAIRS = {
    "folder of masks": ("images/a.png", "masks/a.tif"),
    "folders in capitals": ("Images/a.png", "Labels/a.tif"),  # vqdang/hover_net issue 61
    "one image and one mask": ("image/a.png", "mask/a.tif"),
    "labels before masks": ("images/a.png", "labels/a.tif|masks/a.png"),
    "QuPath script of StarDist": ("images/a.tif", "masks/a.tif"),  # extras/, stardist 0.7.0
    "masks below the images": ("i1.tif", "masks/i1_mask.tif"),  # MouseLand/cellpose issue 1064
    "flat": ("img_0.tif", "img_0_masks.tif"),  # MouseLand/cellpose issue 667
    "both with an end": ("a_image.tiff", "a_masks.tiff"),  # MouseLand/cellpose issue 396
    "Cellpose": ("a.png", "a_cp_masks.png"),
    "segmentation": ("a.jpg", "a_seg.tif"),
    "hyphen": ("a.png", "a-labels.png"),
    "flat, QuPath's tiles": (f"{TILE}.tif", f"{TILE}-labelled.tif"),  # its TileExporter.java
    "OME": ("images/a.ome.tif", "labels/a.tif"),
    "OME twice": ("images/a.ome.tiff", "labels/a.ome.tif"),
    "exact stem first": ("images/a_mask.png", "labels/a_mask.tif|labels/a.tif"),
    "flat, exact end first": ("a_seg.png", "a_seg_mask.png"),
    "NFD": (f"images/{unicodedata.normalize('NFD', 'é')}.png", "labels/é_masks.tif"),
}


@pytest.mark.filterwarnings("ignore:.*1 labels without an image")
@pytest.mark.parametrize("picture, labels", PAIRS.values(), ids=PAIRS)
def test_an_image_finds_its_label(tmp_path, picture, labels):
    assert pairs_of(make(tmp_path, picture, labels)) == {picture: labels.split("|")[0]}


def test_one_line_says_what_is_taken(tmp_path):
    make(tmp_path, "images/a.png|images/b.png", "labels/a_cp_masks.tif|labels/b_cp_masks.tif")
    assert describe_records(find_records(tmp_path)) == "2 images; labels: labels/NAME_cp_masks.tif"
    make(tmp_path, "images/P1/c.png", "masks/P1/c.png")
    assert describe_records(find_records(tmp_path)) == (
        "3 images; labels: labels/NAME_cp_masks.tif (2), P1/NAME.png (1)"
    )


@pytest.mark.parametrize(
    "form",
    [
        "images/{}/{}.png|labels/{}/{}.tif",
        "{}/images/{}.png|{}/labels/{}.tif",
        "{}/{}.png|{}/{}_mask.tif",
    ],
)
def test_a_subfolder_with_a_digit_is_a_patient(tmp_path, form):
    patients = ("TCGA-A7-A13E", "2024-05-01")
    for patient in patients:
        for name in "ab":
            make(tmp_path, *form.format(patient, name, patient, name).split("|"))
    records = find_records(tmp_path)
    assert [r.group for r in records] == ["2024-05-01"] * 2 + ["TCGA-A7-A13E"] * 2
    assert {r.organ for r in records} == {""}
    assert [r.name for r in records] == [f"{p}_{n}" for p in sorted(patients) for n in "ab"]
    assert {r.group for r in find_records(tmp_path, group="[ab]$")} == {"a", "b"}


def test_a_subfolder_without_a_digit_is_an_organ(tmp_path):
    make(
        tmp_path,
        "images/liver/P1/a.png|images/brain/a.png",
        "masks/liver/P1/a.png|masks/brain/a.png",
    )
    records = find_records(tmp_path)
    assert [(r.organ, r.group, r.name) for r in records] == [
        ("brain", "brain/a", "brain_a"),
        ("liver", "P1", "liver_P1_a"),
    ]


@pytest.mark.parametrize(
    ("near", "word"),
    [
        ("labels/a.npz", "convert to TIFF"),
        ("labels/a_seg.npy", "Cellpose"),  # MouseLand/cellpose issue 1124: a pickle
        ("labels/a.jpg", "swap"),
        ("labels/a_mask0.tif", "one map"),  # vqdang/hover_net issue 209: a file for each nucleus
    ],
)
def test_what_lies_near_is_named(tmp_path, near, word):
    make(tmp_path, "images/a.png|images/b.png", "labels/b.tif", near)
    with pytest.raises(UserError, match=rf"images/a\.png: .*{Path(near).name}.*{word}"):
        find_records(tmp_path)
    if "_mask0" not in near:
        make(tmp_path, labels="labels/a.tif")
        with pytest.warns(UserWarning, match=rf"1 .*{word}.*{Path(near).name}"):
            assert len(find_records(tmp_path)) == 2


def test_an_image_that_no_reader_takes_is_named(tmp_path):
    make(tmp_path, "images/a.png", "labels/a.tif|labels/b.tif", "images/b.jp2")
    assert [record.name for record in scan_folder(tmp_path).records] == ["a"]
    assert re.search(r"images: convert to TIFF; first: .*b\.jp2", scan_folder(tmp_path).remarks[0])


def test_flat_pictures_without_a_label_are_told(tmp_path):
    make(tmp_path, "a.png|contact_sheet.png|a_flows.tif", "a_masks.png", "a_cp_outlines.txt")
    with pytest.warns(UserWarning, match="2 images without a label, not used"):
        assert len(find_records(tmp_path)) == 1


def test_a_folder_of_cellposes_own_files_is_told_what_to_do(tmp_path):
    make(tmp_path, "B3_8.tif", "", "B3_8_seg.npy")  # MouseLand/cellpose issue 1124
    with pytest.raises(UserError, match=r"(?s)found no data set.*Cellpose.*B3_8_seg\.npy"):
        find_records(tmp_path)


def test_swapped_folders_are_recognised(tmp_path):
    make(tmp_path, "labels/a.png", "images/a.png")
    (record,) = find_records(tmp_path)
    with pytest.raises(UserError, match=r"labels/a\.png: .*images/a\.png; swap the folders"):
        read_sample(record)


@pytest.mark.parametrize("truth, pred", [("x_mask", "x"), ("x", "x_cp_masks"), ("x_gt", "x_seg")])
def test_evaluation_pairs_stems_of_masks(tmp_path, truth, pred):
    make(tmp_path, labels=f"t/{truth}.tif|p/{pred}.png|p/y.png")
    pairs, missing, extra = find_pairs(tmp_path / "t", tmp_path / "p")
    assert [(pair.truth.stem, pair.pred.stem) for pair in pairs] == [(truth, pred)]
    assert (missing, extra) == ([], ["y"])


def test_evaluation_scores_a_prediction_once(tmp_path):
    make(tmp_path, labels="t/x_mask.tif|t/x_seg.tif|p/x.tif")
    with pytest.raises(UserError, match=r"x_seg\.tif: found .*x_mask\.tif for x\.tif too"):
        find_pairs(tmp_path / "t", tmp_path / "p")


@pytest.mark.parametrize("suffix", ["tif", "TIF"])
def test_a_map_beside_an_outline_is_a_problem_whatever_its_suffix(tmp_path, suffix):
    make(tmp_path, "images/a.png", "labels/a.tif")
    (tmp_path / "labels" / "a.tif").rename(tmp_path / "labels" / f"a.{suffix}")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.geojson").write_text("[]")
    with pytest.raises(UserError, match=r"annotations/a\.geojson: found .*expected one of them"):
        find_records(tmp_path)


def test_evaluation_takes_the_exact_stem_first(tmp_path):
    make(tmp_path, labels="t/x_mask.tif|p/x.tif|p/x_mask.tif|p/x_seg.tif")
    pairs, *_ = find_pairs(tmp_path / "t", tmp_path / "p")
    assert [pair.pred.stem for pair in pairs] == ["x_mask"]


# hydra issue 1163: 1_1_1 was read as 111; fedbiomed issue 1869: 0001 as 1
@pytest.mark.parametrize("name", ["1_1_1", "0001", "2024-05-01", "1e5", "true", "[a]", "a.toml"])
def test_a_folder_of_any_name_is_a_root(name):
    assert override({}, [f"data.root={name}"]).data.root == name
    assert override({}, [f"data.root='{name}'"]).data.root == name
    assert override({}, [f"data.group={name}"]).data.group == name


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path, "mine/images/a.png", "mine/labels/a.tif")
    assert [r.name for r in find_records("~/mine")] == ["a"]
    with pytest.raises(UserError, match="~nobody-of-that-name"):
        find_records("~nobody-of-that-name/x")


# nf-core/sopa issue 10, MouseLand/cellpose issue 24: containers whose folders cannot be written
def test_inspection_needs_no_folder_to_write_in(tmp_path, monkeypatch, capsys):
    make(tmp_path, "images/a.png", "labels/a.tif")
    monkeypatch.chdir("/proc")
    for path in (tmp_path / "images", tmp_path):
        path.chmod(0o555)
    assert run_command(["inspect", str(tmp_path), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["rows"][0]["nuclei"] == 2
    assert "no contact sheet: " in output.err
    assert run_command(["inspect", str(tmp_path), "--sheet", "/proc/sheet.png", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["rows"][0]["nuclei"] == 2


def test_a_summary_fits_80_columns_in_whole_words(tmp_path, monkeypatch, capsys):
    organ = "mouse fat (white and brown)_subscapula"
    for number, name in enumerate("abc"):
        place = f"images/{organ}/P{number // 2}/{name}.tif"
        make(tmp_path, place, place.replace("images", "labels"))
        size = (64 + number, 90 - number)
        tifffile.imwrite(
            tmp_path / place,
            np.resize(PICTURE, (*size, 3)),
            resolution=(4e4, 4e4),
            resolutionunit=3,
        )
        label = np.zeros(size, np.uint16)
        label[4:20, 4:20], label[30:50, 30:50] = 1, 2
        tifffile.imwrite(tmp_path / place.replace("images", "labels"), label)
    make(tmp_path, f"vague/{organ}/P0/a.png")
    Image.fromarray(np.resize(PICTURE, (64, 90, 3))).save(tmp_path / f"vague/{organ}/P0/a.png")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert run_command(["inspect", "."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    for word in ("brown)_subscapula", "groups", "88x66", "90x64,", "sizes", "vague", "nuclei"):
        assert word in words
    assert "all" not in words  # one organ, one row


def test_paths_of_any_script_are_read(tmp_path):
    """OpenCV opens none of them: https://github.com/MouseLand/cellpose/issues/1150.

    macOS unpacks a name as NFD, a hyphen as it is:
    https://github.com/llmsresearch/paperbanana/pull/240.
    """
    names = [unicodedata.normalize(form, "Präparat\u20111 Ⅱ") for form in ("NFD", "NFC")]
    root = make(tmp_path / "Københavns 一个", f"images/{names[0]}.tif", f"labels/{names[1]}.tif")
    assert pairs_of(root) == {f"images/{names[0]}.tif": f"labels/{names[1]}.tif"}
    pairs, missing, extra = find_pairs(root, root / "labels")
    assert [pair.name for pair in pairs] == [names[1]] and not missing + extra


def test_slides_of_a_folder_are_found_and_what_to_do_is_said(tmp_path):
    """An .mrxs lies beside its folder: https://github.com/ratschlab/HistoPlexer/issues/6.

    "Cannot find a plugin": https://github.com/TIO-IKIM/CellViT-plus-plus/issues/7.
    """
    make(tmp_path, others="in/a.mrxs|in/a/Slidedat.ini|in/a/Data0000.dat|cases/p1/b.ndpi|c.vsi")
    assert find_image_files([tmp_path / "in"]) == [tmp_path / "in" / "a.mrxs"]
    with pytest.raises(UserError) as error:
        find_image_files([tmp_path / "cases", tmp_path / "c.vsi"])
    first, second = str(error.value).splitlines()
    assert "cases: " in first and "p1" in first
    assert "c.vsi: found .vsi" in second and "convert it to TIFF" in second


@pytest.mark.parametrize("layout", ["plain", "flat"])
def test_a_layout_without_its_folders_is_named(tmp_path, layout):
    with pytest.raises(UserError, match=f"layout {layout}"):
        scan_folder(tmp_path, layout)


def test_what_a_system_keeps_at_the_root_of_a_disk_is_hidden(tmp_path):
    for name in ("lost+found", "$RECYCLE.BIN", ".Trash-0", "liver"):
        (tmp_path / name).mkdir()
    assert list_folder(tmp_path) == [tmp_path / "liver"]


def test_a_contact_sheet_never_lies_among_the_images(tmp_path, monkeypatch, capsys):
    root = make(tmp_path / "set", "img_0.tif", "img_0_masks.tif")
    before = sorted(root.rglob("*"))
    monkeypatch.chdir(root)
    assert run_command(["inspect", "."]) == 0
    assert "no contact sheet" in capsys.readouterr().out
    assert sorted(root.rglob("*")) == before
