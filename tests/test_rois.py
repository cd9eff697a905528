"""ImageJ ROIs, Aperio XML, and images that are annotated in part."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from roifile import ROI_SUBTYPE, ROI_TYPE, ImagejRoi, roiwrite
from test_data import ramp
from test_geojson import drawing, multi, polygon, square

from nucsam.config import Data
from nucsam.data import images
from nucsam.data.folders import Record, find_records
from nucsam.data.rois import SUFFIXES
from nucsam.data.samples import Crops, Samples, by_region, read_nuclei, read_outlines, read_sample
from nucsam.data.splits import find_split
from nucsam.data.summary import draw_examples, inspect_folder
from nucsam.errors import UserError
from nucsam.score.metrics import PROTOCOLS, protocol_named, score_maps
from nucsam.score.pairs import Pair, score_folders, score_pair

SIDE = 100


def pixels(path: Path, side: int = SIDE) -> list[int]:
    """Pixels of each nucleus of a file, in the order of ids."""
    return np.bincount(read_nuclei(path, (side, side))[0].ravel())[1:].tolist()


# ---- ImageJ ----


def roi(kind: ROI_TYPE, box: tuple[int, int, int, int], name: str = "", **more) -> ImagejRoi:
    left, top, right, bottom = box
    made = ImagejRoi(roitype=kind, left=left, top=top, right=right, bottom=bottom, name=name)
    for attribute, value in more.items():
        setattr(made, attribute, value)
    return made


def traced(points: list[tuple[float, float]], name: str = "") -> ImagejRoi:
    return ImagejRoi.frompoints(np.array(points), name=name)


def test_a_set_of_rois_is_a_label_map(tmp_path):
    """Traced at corners of pixels and between them, ovals, rectangles; marks are no nuclei."""
    rois = [
        traced([(2, 3), (12, 3), (12, 8), (2, 8)], "0005-0007"),
        traced([(20.25, 20.25), (30.25, 20.25), (30.25, 30.25), (20.25, 30.25)], "half"),
        roi(ROI_TYPE.RECT, (40, 40, 46, 47), "box"),
        roi(ROI_TYPE.OVAL, (60, 60, 80, 70), "round"),
        roi(ROI_TYPE.LINE, (0, 0, 9, 9), "ruler"),
        roi(ROI_TYPE.RECT, (0, 0, 90, 90), "text", subtype=ROI_SUBTYPE.TEXT),
    ]
    roiwrite(tmp_path / "a.zip", rois)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("__MACOSX/._0005-0007.roi", b"\0" * 99)
        archive.writestr("notes.txt", "who drew this")
    with pytest.warns(UserWarning, match="1 line ROI, 1 rect ROI"):
        found = pixels(tmp_path / "a.zip")
    assert found[:3] == [50, 100, 42]
    assert found[3] == pytest.approx(np.pi * 10 * 5, abs=6)
    rois[0].tofile(tmp_path / "a.roi")
    assert pixels(tmp_path / "a.roi") == [50]


def test_a_composite_roi_keeps_its_hole(tmp_path):
    """read-roi issue 9: a composite ROI was read as its bounding box."""
    path = []
    for ring in (square(10, 10, 20), square(15, 15, 5)):
        path += [0, *ring[0], *(value for point in ring[1:4] for value in (1, *point)), 4]
    composite = roi(ROI_TYPE.RECT, (10, 10, 30, 30), "ring", multi_coordinates=np.float32(path))
    composite.shape_roi_size = len(path)
    composite.tofile(tmp_path / "a.roi")
    assert pixels(tmp_path / "a.roi") == [400 - 25]


def test_nuclei_of_a_set_may_lie_one_over_the_other(tmp_path):
    """As in NuInsSeg: the later one covers the earlier one. Around several, it is a region."""
    under, over = square(10, 10, 20), square(15, 15, 10)
    roiwrite(tmp_path / "a.zip", [traced(under[:-1], "a"), traced(over[:-1], "b")])
    assert pixels(tmp_path / "a.zip") == [300, 100]
    frame, other = square(5, 5, 60), square(40, 40, 5)
    roiwrite(tmp_path / "b.zip", [traced(r[:-1], str(r)) for r in (frame, over, other)])
    with pytest.warns(UserWarning, match="1 roi around others"):
        assert pixels(tmp_path / "b.zip") == [100, 25]


# ---- Aperio ----


def aperio(folder: Path, *layers: str) -> Path:
    path = folder / "a.xml"
    path.write_text(f'<Annotations MicronsPerPixel="0.25">{"".join(layers)}</Annotations>')
    return path


def layer(regions: str, name: str = "", attribute: str = "Description", value: str = "") -> str:
    about = f'<Attributes><Attribute Name="{attribute}" Id="0" Value="{value}"/></Attributes>'
    return f'<Annotation Id="1" Name="{name}">{about}<Regions>{regions}</Regions></Annotation>'


def region(points: list[tuple[float, float]], kind: int = 0, text: str = "", cut: int = 0) -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    about = f'Type="{kind}" Text="{text}" NegativeROA="{cut}"'
    return f"<Region {about}><Vertices>{vertices}</Vertices></Region>"


def test_aperio_regions_of_every_type(tmp_path):
    """Open and closed outlines; an ellipse by two corners (MITOS_WSI_CCMCT issue 2); no rulers."""
    ring = square(10, 10, 10)
    kinds = region(ring[:-1]) + region(square(40, 10, 5)) + region([(60, 60), (80, 70)], 2)
    kinds += region([(0, 60), (8, 66)], 1) + region([(0, 0), (9, 9)], 4) + region([(1, 1), (9, 9)])
    with pytest.warns(UserWarning, match="2 region without an area"):
        found = pixels(aperio(tmp_path, layer(kinds)))
    assert found[:2] == [100, 25] and found[3] == 48
    assert found[2] == pytest.approx(np.pi * 10 * 5, abs=10)


def test_aperio_layers_name_classes(tmp_path):
    """By name, by description, as MoNuSAC by the name of an attribute, and by a region's text."""
    nucleus, frame = region(square(20, 20, 10)), region(square(0, 0, 50))
    for drawn in (
        layer(frame, "Region 1"),
        layer(frame, value="Region"),
        layer(region(square(0, 0, 50), text="region of interest")),
    ):
        label, rest, _ = read_nuclei(aperio(tmp_path, drawn, layer(nucleus)), (SIDE, SIDE))
        assert (label > 0).sum() == 100 and (~rest).sum() == pytest.approx(2500, abs=100)
    unsure = layer(frame, attribute="Ambiguous"), layer(region(square(0, 0, 50), cut=1))
    for drawn in unsure:
        label, rest, _ = read_nuclei(aperio(tmp_path, drawn, layer(nucleus)), (SIDE, SIDE))
        assert label.max() == 1 and rest.sum() == pytest.approx(2500, abs=100)


VERTEX = "<Region><Vertex {}/></Region>"
VERTEX = f"<Annotations><Annotation><Regions>{VERTEX}</Regions></Annotation></Annotations>"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.xml", "<Annotations><Annotation>"),
        ("a.xml", "<ASAP_Annotations><Annotations/></ASAP_Annotations>"),
        ("a.xml", VERTEX.format('X="1"')),
        ("a.xml", VERTEX.format('X="1e99" Y="2"')),
        ("a.roi", "Iout of order"),
        ("a.roi", ""),
        ("a.zip", "PK but no zip"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        pixels(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pipe_or_a_missing_file_is_refused_at_once(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    for name in (f"pipe{suffix}", f"none{suffix}"):
        with pytest.raises(UserError, match=name):
            read_outlines(tmp_path / name)


# ---- partly annotated images ----

NUCLEI = [polygon(square(x, y, 10)) for x, y in ((20, 20), (45, 20), (80, 80))]


def dataset(root: Path, *parts: dict, stem: str = "a", side: int = SIDE) -> Path:
    for folder in ("images", "annotations"):
        (root / folder).mkdir(exist_ok=True)
    tifffile.imwrite(root / "images" / f"{stem}.tif", ramp(side, side), photometric="rgb")
    (root / "annotations" / f"{stem}.geojson").write_text(json.dumps(parts))
    return root


def test_the_outside_of_a_region_is_unsure(tmp_path):
    """A nucleus over the border keeps all its pixels; one outside is no nucleus to learn."""
    root = dataset(tmp_path, *map(drawing, NUCLEI), drawing(polygon(square(0, 0, 50)), name="ROI"))
    (record,) = find_records(root)
    with pytest.warns(UserWarning, match="1 annotation around others"):
        plain = read_sample(record)
    assert plain.label.max() == 3 and plain.vague is None and not plain.partly_annotated
    (record,) = by_region([record], "ROI")
    sample = read_sample(record)
    assert np.bincount(sample.label.ravel())[1:].tolist() == [100, 100]
    expected = np.ones((SIDE, SIDE), bool)
    expected[:50, :50] = False
    assert np.array_equal(sample.vague, expected) and sample.partly_annotated
    assert (sample.counted(sample.label) > 0).sum() == 150
    item = Crops(Samples([record]), window=SIDE, seed=0)[0, 0]
    assert np.array_equal(item["counted"].numpy(), ~expected)


def test_crops_of_a_large_image_lie_on_its_regions(tmp_path):
    """One uniform place in four meets the region; 16 tries leave one crop in 65 without."""
    region = drawing(polygon(square(500, 300, 40)), name="Region*")
    root = dataset(tmp_path, region, drawing(polygon(square(510, 310, 9))), side=700)
    crops = Crops(Samples(find_records(root)), window=200, seed=0)
    met = [bool(crops[epoch, 0]["counted"].any()) for epoch in range(60)]
    assert 55 < sum(met) <= 60


def test_ignored_areas_and_masks_add_up(tmp_path):
    root = dataset(
        tmp_path, drawing(NUCLEI[0]), drawing(polygon(square(60, 0, 40)), name="Ignore*")
    )
    (tmp_path / "vague").mkdir()
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[90:] = 255
    tifffile.imwrite(tmp_path / "vague" / "a.tif", mask)
    sample = read_sample(find_records(root)[0])
    assert sample.vague.sum() == 1600 + 1000 and sample.label.max() == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_protocol_counts_the_outside(tmp_path, protocol):
    """Predictions outside of the regions cost nothing, and truth there earns nothing."""
    inside = drawing(polygon(square(0, 0, 60)), name="Region*")
    root = dataset(tmp_path, inside, *map(drawing, NUCLEI))
    pred = np.zeros((SIDE, SIDE), np.uint16)
    pred[20:30, 20:30], pred[20:30, 45:55], pred[70:75, 5:95] = 1, 2, 3
    tifffile.imwrite(tmp_path / "pred.tif", pred)
    files = root / "annotations" / "a.geojson", tmp_path / "pred.tif"
    (row,) = score_pair(Pair("a", "", *files, None), [protocol_named(protocol)])
    assert (row["aji"], row["pq"], row["n_truth"]) == (1, 1, 2)


def test_a_mask_beside_regions_counts_alike_in_training_and_in_folders(tmp_path):
    """The nucleus that the mask covers is missed, and costs nothing."""
    inside = drawing(polygon(square(0, 0, 60)), name="Region*")
    root = dataset(tmp_path, inside, *map(drawing, NUCLEI))
    (tmp_path / "vague").mkdir()
    mask, pred = np.zeros((2, SIDE, SIDE), np.uint8)
    mask[15:35, 15:35] = 255
    tifffile.imwrite(tmp_path / "vague" / "a.tif", mask)
    pred[20:30, 45:55] = 1
    (tmp_path / "pred").mkdir()
    tifffile.imwrite(tmp_path / "pred" / "a.tif", pred)
    scores = score_folders(root, tmp_path / "pred", workers=1, protocol="plain")["scores"]
    sample = read_sample(find_records(root)[0])
    truth, pred = sample.counted(sample.label), sample.counted(pred)
    assert scores[0]["images"][0]["aji"] == score_maps(truth, pred, protocol="plain").aji == 1


def test_a_mask_of_a_slide_holds_stored_values_and_has_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "WHOLE", 1000)
    root = dataset(tmp_path, drawing(polygon(square(100, 100, 80)), name="Region*"), side=300)
    (tmp_path / "vague").mkdir()
    mask = np.zeros((300, 300), np.uint8)
    mask[100:180, 100:140] = 255
    vague = tmp_path / "vague" / "a.tif"
    tifffile.imwrite(vague, mask, photometric="miniswhite")
    (record,) = by_region(find_records(root))
    assert (~read_sample(record).vague).sum() == 80 * 40
    tifffile.imwrite(vague, mask[:260])
    with pytest.raises(UserError, match=r"vague/a\.tif"):
        read_sample(record)


def test_regions_of_a_slide_are_a_training_set(tmp_path, monkeypatch):
    """Three rectangles, one of them in two parts; each is read alone, with 64 px around it."""
    monkeypatch.setattr(images, "WHOLE", 1000)
    places = [(100, 100, 80), (400, 300, 60)], [(500, 600, 100)]
    regions = [drawing(multi(*group), name="Region*") for group in places]
    nuclei = [drawing(polygon(square(x + 5, y + 5, 9))) for group in places for x, y, _ in group]
    root = dataset(tmp_path, *regions, *nuclei, side=700)
    read_whole = images.read_image
    monkeypatch.setattr("nucsam.data.samples.read_image", lambda _: pytest.fail("read whole"))
    (record,) = find_records(root)
    records = by_region([record])
    assert [r.name for r in records] == ["a_region1", "a_region2", "a_region3"]
    samples = [read_sample(r) for r in records]
    assert [s.label.shape for s in samples] == [(208, 208), (188, 188), (164, 228)]
    for sample, (x, y, side) in zip(samples, [*places[0], *places[1]]):
        left, top = x - 64, y - 64
        expected = read_whole(record.image)[top : top + side + 128, left : left + side + 128]
        assert np.array_equal(sample.image, expected)
        assert (~sample.vague).sum() == side * side and not sample.vague[64, 64]
        assert sample.label[69:78, 69:78].all() and (sample.label > 0).sum() == 81
    records, split = find_split(Data(root=str(root), folds=3, layout="plain"))
    assert len(split.train) == len(split.inner) == len(split.test) == 1
    summary, examples = inspect_folder(root)
    assert summary["rows"][-1]["nuclei"] == 3 and not summary["bad"]
    draw_examples(examples, tmp_path / "sheet.png")
    dataset(root, *regions, *nuclei, stem="b", side=700)
    groups = [r.group for r in by_region(find_records(root))]
    assert groups == ["/a"] * 3 + ["/b"] * 3  # two slides: no region of one helps on another


def test_a_region_off_the_image_is_refused(tmp_path):
    off = drawing(polygon(square(500, 500, 50)), name="Region*")
    (record,) = find_records(dataset(tmp_path, off, drawing(NUCLEI[0])))
    with pytest.raises(UserError, match=r"a\.geojson"):
        read_sample(record)
    for suffix in SUFFIXES:
        path = tmp_path / f"none{suffix}"
        with pytest.raises(UserError, match=path.name):
            read_sample(Record("a", "", record.image, path, None, ""))
