"""Public sets in miniature, made after their published descriptions without the reader's help."""

import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_array

from nucsam.data.folders import find_records, scan_folder
from nucsam.data.images import read_image
from nucsam.data.published import read_instances
from nucsam.data.samples import Samples, read_sample
from nucsam.data.summary import draw_examples, inspect_folder
from nucsam.errors import UserError

SIDE = 256


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (SIDE, SIDE, 3), np.uint8)


def squares(*ids: int) -> np.ndarray:
    """A map of squares of 20 px, 30 px apart, with these ids."""
    label = np.zeros((SIDE, SIDE), np.int32)
    for number, value in enumerate(ids):
        label[10:30, 10 + 30 * number : 30 + 30 * number] = value
    return label


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    elif path.suffix == ".mat":
        savemat(path, {"inst_map": array})
    else:
        Image.fromarray(array).save(path)


def monuseg(root: Path) -> None:
    """Kumar et al. 2017, 2020: `Tissue Images` and `Annotations` in Aperio's XML, a Region for each
    nucleus. https://monuseg.grand-challenge.org/Data/"""
    corners = [
        [(10 + 30 * k + dx, 10 + dy) for dx, dy in ((0, 0), (20, 0), (20, 20), (0, 20))]
        for k in range(3)
    ]
    regions = "".join(
        f'<Region Id="{number}"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in square)
        + "</Vertices></Region>"
        for number, square in enumerate(corners, 1)
    )
    for name in ("TCGA-A7-A13E-01Z-00-DX1", "TCGA-18-5592-01Z-00-DX1"):
        save(root / "Tissue Images" / f"{name}.tif", picture(1))
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        text = f'<Annotations><Annotation Id="1"><Regions>{regions}</Regions></Annotation>'
        path.write_text(text + "</Annotations>")


def pannuke(root: Path) -> None:
    """Gamper et al., arXiv 2003.10778, and the README of each fold: images (N, 256, 256, 3) and
    masks (N, 256, 256, 6) of float64, a channel for each of five classes with ids, and background;
    types.npy names the tissue."""
    for fold in (1, 2):
        masks = np.zeros((2, SIDE, SIDE, 6))
        masks[0, ..., 0], masks[0, ..., 4] = squares(0, 4), squares(8, 0, 9)
        masks[1, ..., 2] = squares(300, 301, 302)
        masks[..., 5] = masks[..., :5].sum(-1) == 0
        for kind in ("images", "masks"):
            (root / f"Fold {fold}" / kind / f"fold{fold}").mkdir(parents=True)
        images = np.stack([picture(2), picture(3)]).astype(np.float64)
        folder = root / f"Fold {fold}" / "images" / f"fold{fold}"
        np.save(folder / "images.npy", images)
        np.save(folder / "types.npy", np.array(["Breast", "Bile-duct"]))
        np.save(root / f"Fold {fold}" / "masks" / f"fold{fold}" / "masks.npy", masks)


def consep(root: Path) -> None:
    """Graham et al. 2019, README of the set: Train and Test with Images, Labels and Overlay;
    `inst_map` in each .mat. https://github.com/vqdang/hover_net#datasets"""
    for part, name in (("Train", "train_1"), ("Test", "test_1")):
        save(root / part / "Images" / f"{name}.png", picture(4))
        save(root / part / "Overlay" / f"{name}.png", picture(5))
        save(root / part / "Labels" / f"{name}.mat", squares(1, 2, 9).astype(np.float64))


def lizard(root: Path, wrapped: bool = False) -> None:
    """Graham et al., arXiv 2108.11195, README of the set: `inst_map`, id, class, bbox, centroid. At
    Kaggle (aadimator/lizard-dataset) each folder lies in one of its name."""
    for number, name in ((1, "consep_1"), (2, "pannuke_3")):
        below = f"lizard_images{number}/" if wrapped else ""
        save(root / f"{below}Lizard_Images{number}" / f"{name}.png", picture(6))
        below = "lizard_labels/" if wrapped else ""
        save(root / f"{below}Lizard_Labels" / "Labels" / f"{name}.mat", squares(3, 4, 7))
    (root / below / "Lizard_Labels" / "info.csv").write_text("Filename,Source,Split")


def cryonuseg(root: Path) -> None:
    """Mahbod et al. 2021: 30 images of 10 organs, two annotators, one of them twice; at Kaggle
    (ipateam/segmentation-of-nuclei-in-cryosectioned-he-images)."""
    second = "Annotator 1 (biologist second round of manual marks up)"
    for name in ("Human_AdrenalGland_01", "Human_Larynx_03"):
        save(root / "tissue images" / f"{name}.tif", picture(7))
        for folder, ids in (
            ("Annotator 1 (biologist)", (1, 2, 3)),
            (f"{second}/{second}", (1, 2)),
            ("Annotator 2 (bioinformatician)/Annotator 2 (bioinformatician)", (1,)),
        ):
            label = squares(*ids).astype(np.uint16)
            save(root / folder / "label masks modify" / f"{name}.tif", label)
            save(root / folder / "mask binary" / f"{name}.png", (label > 0).astype(np.uint8) * 255)


def tnbc(root: Path) -> None:
    """Naylor et al. 2019, Zenodo record 1175282: 11 patients, Slide_01/01_1.png with a mask of
    separate nuclei GT_01/01_1.png."""
    for patient in ("01", "11"):
        for number in (1, 2):
            save(root / f"Slide_{patient}" / f"{patient}_{number}.png", picture(8))
            mask = (squares(1, 1, 1) * 255).astype(np.uint8)
            save(root / f"GT_{patient}" / f"{patient}_{number}.png", mask)


def imagej_rectangle(left: int) -> bytes:
    """An ImageJ ROI of 20 px a side at row 10, as ij/io/RoiEncoder.java writes a rectangle."""
    header = struct.pack(">4shBxhhhhh", b"Iout", 228, 1, 10, left, 30, left + 20, 0)
    return header.ljust(128, b"\0")


def nuinsseg(root: Path) -> None:
    """Mahbod et al. 2024, and https://github.com/masih4/NuInsSeg: a folder for each organ with
    `tissue images`, `Imagj_zips`, `label masks modify` and more; here the ROIs alone."""
    import zipfile

    for organ in ("human bladder", "mouse fat (white and brown)_subscapula"):
        name = organ.replace(" ", "_") + "_01"
        save(root / organ / "tissue images" / f"{name}.png", picture(9))
        (root / organ / "Imagj_zips").mkdir()
        with zipfile.ZipFile(root / organ / "Imagj_zips" / f"{name}.zip", "w") as file:
            for number in range(3):
                file.writestr(f"{number}.roi", imagej_rectangle(10 + 30 * number))


SETS = {
    "monuseg": (monuseg, 2, {""}, 2),
    "pannuke": (pannuke, 4, {"Breast", "Bile-duct"}, 4),
    "consep": (consep, 2, {""}, 2),
    "lizard": (lizard, 2, {""}, 2),
    "cryonuseg": (cryonuseg, 2, {"AdrenalGland", "Larynx"}, 2),
    "tnbc": (tnbc, 4, {""}, 2),
    "nuinsseg": (nuinsseg, 2, {"human bladder", "mouse fat (white and brown)_subscapula"}, 2),
}


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_as_it_is_published(tmp_path, name):
    build, images, organs, groups = SETS[name]
    build(tmp_path)
    assert scan_folder(tmp_path).layout == name
    records = find_records(tmp_path)
    assert records == find_records(tmp_path, layout=name)
    assert (len(records), {r.organ for r in records}) == (images, organs)
    assert len({r.group for r in records}) == groups
    samples = Samples(records)
    for sample in map(samples.__getitem__, range(images)):
        assert np.array_equal(sample.label, squares(1, 2, 3)) or name == "pannuke"
        assert np.array_equal(sample.label > 0, squares(1, 1, 1) > 0)
        assert sample.label.max() == 3
    summary, examples = inspect_folder(tmp_path)
    assert summary["bad"] == [] and summary["rows"][-1]["nuclei"] == 3 * images
    draw_examples(examples, tmp_path / "sheet.png")


def test_pictures_of_a_stack_keep_their_pixels(tmp_path):
    pannuke(tmp_path)
    first = find_records(tmp_path)[0]
    assert np.array_equal(read_image(first.image), picture(2))
    assert {r.group for r in find_records(tmp_path, group=r"^(fold\d)")} == {"fold1", "fold2"}
    fold = find_records(tmp_path / "Fold 2")
    assert [record.name for record in fold] == ["fold2_0000", "fold2_0001"]


def test_monusegs_test_data_lie_flat(tmp_path):
    monuseg(tmp_path)
    for path in [*tmp_path.glob("*/*.*")]:
        path.rename(tmp_path / path.name)
    assert scan_folder(tmp_path).layout == "monuseg"
    assert read_sample(find_records(tmp_path)[0]).label.max() == 3


def test_lizard_of_kaggle_is_read(tmp_path):
    lizard(tmp_path, wrapped=True)
    assert [r.name for r in find_records(tmp_path)] == ["consep_1", "pannuke_3"]


def test_a_mat_file_of_ones_own_is_a_label(tmp_path):  # vqdang/hover_net issue 123
    save(tmp_path / "images" / "a.png", picture(0))
    save(tmp_path / "labels" / "a.mat", squares(5, 6))
    assert read_sample(find_records(tmp_path)[0]).label.max() == 2


def test_a_huge_mat_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    save(tmp_path / "a.mat", np.zeros((4, 5), np.int32))
    monkeypatch.setattr("nucsam.data.slides.MOST", 19)
    monkeypatch.setattr("scipy.io.loadmat", lambda *_, **__: pytest.fail("read whole"))
    with pytest.raises(UserError, match=r"a\.mat"):
        read_instances(tmp_path / "a.mat")


def test_a_sparse_mat_is_read(tmp_path):
    savemat(tmp_path / "a.mat", {"inst_map": csc_array(squares(5, 6).astype(float))})
    np.testing.assert_array_equal(read_instances(tmp_path / "a.mat"), squares(5, 6))


ODD_MATS = {
    "cell": np.array([np.eye(2), np.eye(3)], object),
    "struct": {"a": 1},
    "string": "labels",
    "empty": np.zeros((0, 0)),
    "complex": squares(1) * 1j,
}


@pytest.mark.parametrize("content", ["text", "no inst_map", "fractions", "HDF5", *ODD_MATS])
def test_a_bad_mat_file_is_named(tmp_path, content):
    save(tmp_path / "images" / "a.png", picture(0))
    path = tmp_path / "labels" / "a.mat"
    save(path, squares(1) / 2)
    if content == "no inst_map":
        savemat(path, {"label": squares(1)})
    elif content in ODD_MATS:
        savemat(path, {"inst_map": ODD_MATS[content]})
    elif content in ("text", "HDF5"):
        header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
        path.write_bytes(b"MATLAB" if content == "text" else header + bytes(512))
    with pytest.raises(UserError, match=r"labels/a\.mat: "):
        read_sample(find_records(tmp_path)[0])


def test_stacks_of_other_lengths_are_named(tmp_path):
    pannuke(tmp_path)
    path = tmp_path / "Fold 1" / "masks" / "fold1" / "masks.npy"
    np.save(path, np.load(path)[:1])
    with pytest.raises(UserError, match=r"masks\.npy: found 1 entries, expected 2"):
        find_records(tmp_path)
