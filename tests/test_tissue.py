"""Glass is skipped, tissue is not."""

import json

import numpy as np
import pytest
import tifffile
from test_predict import Colour, discs, predictor
from test_writers import same_nuclei

from nucsam.data.images import open_image
from nucsam.predict import images as predict_images
from nucsam.predict.tissue import CELL, darkness, find_tissue, is_glass

GLASS = 236


def glass(height, width, seed=0):
    noise = np.random.default_rng(seed).normal(GLASS, 2, (height, width, 3))
    return noise.round().clip(0, 255).astype(np.uint8)


def pyramid(path, image):
    """A tiled TIFF with levels at 1/4 and 1/16."""
    with tifffile.TiffWriter(path) as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
        file.write(image, subifds=2, **options)
        for shrink in (4, 16):
            h, w = (side // shrink * shrink for side in image.shape[:2])
            blocks = image[:h, :w].reshape(h // shrink, shrink, w // shrink, shrink, 3)
            file.write(blocks.mean((1, 3)).round().astype(np.uint8), subfiletype=1, **options)
    return open_image(path)


def test_darkness_is_of_the_lowest_channel():
    pixels = np.uint8([[[255, 255, 255], [200, 255, 250], [10, 30, 20]]])
    assert darkness(pixels).tolist() == [[0, 55, 245]]


@pytest.mark.parametrize("whole", [False, True])
def test_a_pale_nucleus_alone_on_the_glass_is_tissue(tmp_path, whole):
    """30 px in area, the smallest that is kept, and as pale as any of four public sets."""
    image = glass(1100, 1300)
    image[692:698, 900:905] = (200, 213, 230)
    slide = pyramid(tmp_path / "a.tif", image) if not whole else image
    tissue = find_tissue(slide, whole=whole)
    assert tissue.cells.shape == (18, 21)
    rows, columns = np.nonzero(tissue.cells)
    assert (rows.min(), rows.max()) == (692 // CELL - 1, 697 // CELL + 1)
    assert (columns.min(), columns.max()) == (900 // CELL - 1, 904 // CELL + 1)
    assert tissue.meets((slice(640, 700), slice(830, 900)))
    assert not tissue.meets((slice(0, 512), slice(0, 512)))
    assert is_glass(image[:512, :512], tissue.limit)
    assert not is_glass(image[512:1024, 512:1024], tissue.limit)


def test_holes_are_tissue_and_a_tile_of_glass_in_one_is_glass(tmp_path):
    image = glass(1280, 1280)
    image[200:1000, 200:1000] = (225, 190, 215)
    image[360:840, 360:840] = glass(480, 480)
    tissue = find_tissue(pyramid(tmp_path / "a.tif", image))
    assert tissue.cells[200 // CELL : 1000 // CELL, 200 // CELL : 1000 // CELL].all()
    assert tissue.meets((slice(400, 800), slice(400, 800)))
    assert is_glass(image[400:800, 400:800], tissue.limit)
    assert not tissue.cells[-1].any()


def test_without_a_pyramid_all_is_looked_at(tmp_path):
    assert find_tissue(glass(200, 130)).cells.all()
    assert not find_tissue(glass(200, 130), whole=True).cells.any()


def test_glass_is_not_run_and_no_nucleus_is_lost(tmp_path):
    """The nuclei of the discs are the same, with a fifth of the tiles."""
    image = np.full((1500, 1500, 3), 255, np.uint8)
    image[..., 0] = 254  # what `Colour` takes for background, as bright as glass
    image[448:1008, 192:752] = discs(560)[0]
    slide = pyramid(tmp_path / "a.tif", image)

    class OnGlass(Colour):
        """Glass is background."""

        def forward(self, images, size):
            white = (images > 250).all(1, keepdim=True).expand(-1, 3, -1, -1)
            background = images.new_tensor([0.0, 255.0, 0.0]).view(1, 3, 1, 1)
            return super().forward(images.where(~white, background), size)

    labels, runs = [], []
    for tissue in (None, find_tissue(slide)):
        p = predictor(OnGlass(), tile=128, overlap=16, core=300, margin=64)
        tiles = p.grid(slide, tissue=tissue)
        whole = np.zeros(image.shape[:2], np.int32)
        for _, window, nuclei in p.extract([tiles]):
            place = whole[window.outer]
            np.copyto(place, nuclei.label + whole.max() * (nuclei.label > 0), where=place == 0)
        labels.append(whole)
        runs.append(tiles.run)
        assert tiles.run == p.tiles_done
    assert labels[0].max() > 300 and same_nuclei(*labels)
    assert runs[1] < 0.3 * runs[0]


def test_the_mask_is_a_file(tmp_path, monkeypatch):
    image = glass(400, 300)
    image[70:330, 60:270] = (180, 120, 190)
    image[190:200, 64:128] = GLASS
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    (tmp_path / "out").mkdir()
    files = {name: tmp_path / "out" / f"a.{name}" for name in ("labels", "tissue")}
    small = predictor(Colour(), tile=128)
    batch = predict_images.Batch(small, {tmp_path / "a.tif": files}, tmp_path / "out")
    assert batch.run() == 0
    (feature,) = json.loads(files["tissue"].read_text())["features"]
    assert feature["properties"]["classification"] == {"name": "Tissue"}
    (((ring,),)) = feature["geometry"]["coordinates"]
    assert np.array(ring).min(0).tolist() == [0, 0] and np.array(ring).max(0).tolist() == [300, 400]
