"""Slides of scanners, in the forms that OpenSlide takes for theirs."""

import json
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid
from test_predict import Colour, discs, matches, predictor

from nucsam.cli import run_command
from nucsam.data import geojson, slides
from nucsam.data.images import open_image, read_image, read_label, read_mpp
from nucsam.data.slides import ScannerWindows, TiffWindows, one_file_each
from nucsam.errors import UserError
from nucsam.predict import images as predict_images
from nucsam.predict.images import find_image_files

SIDE = 420
IMAGE, IDS = discs(SIDE)
SMALL = IMAGE.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).mean((1, 3)).astype(np.uint8)


def write_aperio(path, image=IMAGE, small=SMALL, mpp="0.25", *, side_images=True, **options):
    """The pages of an SVS: baseline, thumbnail, a level, label and macro."""
    text = f"Aperio Image Library v12\r\n{SIDE}x{SIDE} (64x64) JPEG/RGB|AppMag = 40|MPP = {mpp}"
    options = {"photometric": "rgb", "metadata": None, "compression": "zlib"} | options
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, tile=(64, 64), description=text, **options)
        if side_images:
            tiff.write(IMAGE[::3, ::3].copy(), description=text, **options)
        tiff.write(small, tile=(64, 64), description=text, **options)
        if side_images:
            # without descriptions: https://github.com/DigitalSlideArchive/ImageDePHI/issues/141
            tiff.write(IMAGE[:90, :80].copy(), subfiletype=1, **options)
            tiff.write(np.tile(IMAGE, (1, 2, 1)), subfiletype=9, **options)
    return path


def write_dicom(path, image, mpp, series, tile=64):
    """One level of a slide as tiled DICOM."""
    height, width = image.shape[:2]
    rows, columns = -(-height // tile), -(-width // tile)
    canvas = np.full((rows * tile, columns * tile, 3), 255, np.uint8)
    canvas[:height, :width] = image
    tiles = canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
    level = Dataset()
    level.file_meta = FileMetaDataset()
    level.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    level.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    level.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    level.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    level.SOPInstanceUID = level.file_meta.MediaStorageSOPInstanceUID
    level.StudyInstanceUID, level.SeriesInstanceUID = f"{series}.1", series
    level.Modality, level.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    level.Rows = level.Columns = tile
    level.TotalPixelMatrixRows, level.TotalPixelMatrixColumns = height, width
    level.NumberOfFrames, level.DimensionOrganizationType = rows * columns, "TILED_FULL"
    level.SamplesPerPixel, level.PlanarConfiguration = 3, 0
    level.PhotometricInterpretation = "RGB"
    level.BitsAllocated = level.BitsStored = 8
    level.HighBit, level.PixelRepresentation = 7, 0
    measures, groups, path_of_light = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    groups.PixelMeasuresSequence = [measures]
    path_of_light.OpticalPathIdentifier = "0"
    level.SharedFunctionalGroupsSequence = [groups]
    level.OpticalPathSequence, level.NumberOfOpticalPaths = [path_of_light], 1
    level.PixelData = tiles.tobytes()
    level.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def svs(tmp_path):
    return write_aperio(tmp_path / "slide.svs")


@pytest.fixture
def dicom(tmp_path):
    """A folder with the two levels of a slide."""
    folder = tmp_path / "dicom"
    folder.mkdir()
    series = generate_uid()
    write_dicom(folder / "b.dcm", IMAGE, 0.25, series)
    return write_dicom(folder / "a.dcm", SMALL, 0.5, series)  # the first file is not the largest


# ---- pixels ----


def test_openslide_takes_the_files_of_these_tests_for_slides(svs, dicom):
    for path, vendor in ((svs, "aperio"), (dicom, "dicom")):
        slide = openslide.OpenSlide(path)
        assert slide.properties["openslide.vendor"] == vendor
        assert slide.level_dimensions == ((SIDE, SIDE), (SIDE // 2, SIDE // 2))
        assert float(slide.properties["openslide.mpp-x"]) == 0.25


@pytest.mark.parametrize("form", ["svs", "dicom"])
def test_a_slide_is_read_by_windows_with_its_levels(form, request):
    path = request.getfixturevalue(form)
    slide = open_image(path)
    assert isinstance(slide, TiffWindows if form == "svs" else ScannerWindows)
    assert slide.shape == (SIDE, SIDE, 3) and slide.sizes == [(SIDE, SIDE), (SIDE // 2, SIDE // 2)]
    np.testing.assert_array_equal(slide[50:300, 100:999], IMAGE[50:300, 100:])
    np.testing.assert_array_equal(read_image(path), IMAGE)
    assert slide[0:0, 5:9].shape == (0, 4, 3)
    assert read_mpp(path) == 0.25


def test_tifffile_and_openslide_agree_on_aperio(svs):
    whole = openslide.OpenSlide(svs).read_region((0, 0), 0, (SIDE, SIDE))
    np.testing.assert_array_equal(np.asarray(whole)[..., :3], read_image(svs))


def test_a_label_is_missing_or_thumbnails_are(tmp_path):
    """https://github.com/cgohlke/tifffile/pull/144: a slide whose label was removed."""
    slide = open_image(write_aperio(tmp_path / "a.tif", side_images=False))
    np.testing.assert_array_equal(slide[0:SIDE, 0:SIDE], IMAGE)


def test_focal_planes_are_refused_by_name(tmp_path):
    """https://github.com/cgohlke/tifffile/issues/193."""
    write_aperio(tmp_path / "z.svs", small=IMAGE)
    with pytest.raises(UserError, match=r"z\.svs: found a stack"):
        open_image(tmp_path / "z.svs")


def test_aperio_jpeg_2000_stores_ycbcr_unmarked(tmp_path):
    stored = [np.asarray(Image.fromarray(image).convert("YCbCr")) for image in (IMAGE, SMALL)]
    path = write_aperio(tmp_path / "a.svs", *stored, side_images=False, compression=33003)
    expected = np.asarray(Image.fromarray(stored[0], "YCbCr").convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize(
    ("scale", "level"), [(2.0, 0), (1.0, 0), (0.56, 0), (0.55, 1), (0.5, 1), (0.1, 1)]
)
def test_no_level_is_much_coarser_than_asked(svs, scale, level):
    assert open_image(svs).level(scale) == level


def test_a_resampled_window_has_the_edges_of_the_window(tmp_path):
    """A ramp stays a ramp, also between the px of a level."""
    y, x = np.mgrid[:SIDE, :SIDE]
    ramp = np.stack([y // 2, x // 2, y * 0], -1).astype(np.uint8)
    path = write_aperio(tmp_path / "a.svs", ramp, ramp[::2, ::2].copy())
    part = open_image(path).resampled(1, slice(101, 301), slice(60, 260), (50, 50))
    np.testing.assert_allclose(part[5:-5, 9, 0], (103 + 4 * np.arange(5, 45)) / 2, atol=1.5)
    np.testing.assert_allclose(part[9, 5:-5, 1], (62 + 4 * np.arange(5, 45)) / 2, atol=1.5)


# ---- a scanner's canvas ----


class Canvas(openslide.ImageSlide):
    """A canvas like those of MRXS: transparent where nothing was scanned."""

    @property
    def properties(self):
        bounds = {"x": 30, "y": 50, "width": 100, "height": 80}
        return {f"openslide.bounds-{name}": str(px) for name, px in bounds.items()}


@pytest.fixture
def canvas(monkeypatch):
    pixels = np.zeros((200, 300, 4), np.uint8)
    pixels[60:110, 40:90] = [10, 20, 30, 255]
    pixels[110:130, 90:130] = [0, 0, 0, 128]
    slide = Canvas(Image.fromarray(pixels))
    monkeypatch.setattr(slides, "open_slide", lambda path: slide)
    return ScannerWindows(Path("a.mrxs"))


def test_the_canvas_is_cut_to_what_was_scanned(canvas):
    """Annotations are in this frame: https://github.com/NKI-AI/dlup/issues/160."""
    assert canvas.shape == (80, 100, 3)
    assert (canvas[10:60, 10:60] == [10, 20, 30]).all()


def test_transparent_pixels_are_white(canvas):
    """Black tiles: https://github.com/openslide/openslide/issues/443."""
    assert (canvas[0:10, 0:100] == 255).all()
    assert (canvas[60:80, 60:100] == 127).all()


# ---- files ----


def test_a_dicom_slide_of_many_files_is_one_slide(dicom, svs):
    other = write_dicom(dicom.with_name("c.dcm"), SMALL, 0.5, generate_uid())
    beside = sorted(dicom.parent.iterdir())
    assert one_file_each([*beside, svs]) == [dicom, other, svs]
    assert find_image_files(beside) == find_image_files([dicom.parent])  # named one by one


@pytest.mark.parametrize("suffix", slides.SCANNERS)
def test_without_openslide_the_message_says_what_to_install(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "openslide", None)
    (tmp_path / f"a{suffix}").touch()
    with pytest.raises(UserError, match=rf"a\{suffix}: .*pip install 'nucsam\[slides\]'"):
        open_image(tmp_path / f"a{suffix}")


def test_what_openslide_cannot_read_is_named(tmp_path):
    for name in ("a.mrxs", "b.dcm"):
        (tmp_path / name).write_text("no slide")
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name)


# ---- prediction ----


def predict(path, out, monkeypatch, mpp):
    def load(model, **options):
        return predictor(Colour(), tile=128, core=150, margin=40, mpp=mpp)

    monkeypatch.setattr(predict_images, "load", load)
    arguments = ["predict", "model", path, "--out", out, "--formats", "labels,geojson"]
    return run_command([*map(str, arguments)])


@pytest.mark.parametrize("form", ["svs", "dicom"])
def test_a_slide_becomes_geojson(form, request, tmp_path, monkeypatch):
    path, out = request.getfixturevalue(form), tmp_path / "out"
    assert predict(path.parent if form == "dicom" else path, out, monkeypatch, 0.25) == 0
    label = read_label(out / f"{path.stem}.tif")
    assert np.median(matches(IDS, label)) > 0.9
    features = json.loads((out / f"{path.stem}.geojson").read_text())
    features = features["features"] if isinstance(features, dict) else features
    assert len(features) == label.max() > 150
    drawn = geojson.read(out / f"{path.stem}.geojson", (SIDE, SIDE))
    assert np.median(matches(label, drawn)) > 0.95


def test_a_model_of_half_the_magnification_reads_the_smaller_level(tmp_path, monkeypatch):
    """Here the full resolution is black. The results are in its px all the same."""
    path = write_aperio(tmp_path / "slide.svs", IMAGE * 0)
    assert predict(path, tmp_path / "out", monkeypatch, 0.5) == 0
    label = read_label(tmp_path / "out" / "slide.tif")
    model = predictor(Colour(), tile=128, core=150, margin=40, mpp=0.5)
    from_full_resolution = model.predict(IMAGE, mpp=0.25)
    assert label.shape == (SIDE, SIDE)
    assert np.median(matches(from_full_resolution, label)) > 0.8


def test_a_patch_and_a_coarser_level_of_a_slide_share_no_batch(tmp_path):
    """Tiles of as many pixels, of which one covers twice the px of its image."""
    image = discs(512)[0]
    patch = image.reshape(256, 2, 256, 2, 3).mean((1, 3)).astype(np.uint8)
    slide = TiffWindows(write_aperio(tmp_path / "a.svs", image, patch))
    alone, together = (
        list(
            predictor(Colour(), scale=0.5, tile=512, batch=batch).nuclei_many(
                [patch, slide], [None] * 2
            )
        )
        for batch in (1, 2)
    )
    for one, two in zip(alone, together, strict=True):
        assert one.label.max() > 5
        np.testing.assert_array_equal(one.label, two.label)
