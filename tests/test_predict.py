"""Images of any size and scale to maps and nuclei, with models whose maps are known."""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import shapely.geometry
import tifffile
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import nn

from nucsam.config import Instances, Model
from nucsam.errors import UserError
from nucsam.model.heads import InstanceHead
from nucsam.model.instances import Nuclei
from nucsam.model.network import build_model
from nucsam.predict.predictor import Predictor
from nucsam.predict.pytorch import TorchPredictor
from nucsam.predict.tiles import grid

SCALES = [1.0, 1.5, 2.0]


class Fake(nn.Module):
    """Maps are the image's red and green at its resolution; instances are the red, as ids.

    It insists on what the encoder insists on, and notes the batches it sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def local(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :2]

    def forward(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        assert images.dtype == torch.float32
        assert -0.01 < images.min() <= images.max() < 255.01
        assert not torch.is_grad_enabled()
        H, W = images.shape[2:]
        assert H % 32 == W % 32 == 0
        assert min(H, W) >= 64
        self.seen.append(tuple(images.shape))
        maps = self.local(images)
        if maps.shape[2:] == size:
            return maps
        return F.interpolate(maps.float(), size=size, mode="bilinear", antialias=True)

    def probabilities(self, maps: torch.Tensor) -> torch.Tensor:
        return maps

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        assert maps.dtype == np.float32
        return np.rint(maps[0]).astype(np.int32)


class Blur(Fake):
    """A local model that is the same everywhere, with a reach of 4 model px."""

    def local(self, images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.pad(images[:, :2], (4, 4, 4, 4), mode="replicate"), 9, stride=1)


def predictor(model: nn.Module | None = None, scale: float = 1.0, **arguments) -> Predictor:
    arguments = {"scale": scale, "instances": Instances(), "tile": 512, "overlap": 24} | arguments
    return TorchPredictor(model or Fake(), **arguments)


class HalfPredictor(TorchPredictor):
    """Its maps are in half precision, as those that leave a GPU."""

    def maps(self, *arguments) -> np.ndarray:
        return super().maps(*arguments).astype(np.float16)


def maps_of(predictor: Predictor, images: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Dense maps float32 (C, H, W) of images, in order."""
    one_window = replace(predictor, core=2**31)
    return (
        tiles.stitch(*part) for tiles, *part in one_window._stream(map(one_window.grid, images))
    )


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image: to magnify and shrink it again changes little."""
    generator = torch.Generator().manual_seed(seed)
    small = 40 + 160 * torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    size = 16 * small.shape[2], 16 * small.shape[3]
    image = F.interpolate(small, size=size, mode="bicubic")[0, :, :height, :width]
    return image.clamp(0, 255).permute(1, 2, 0).byte().numpy()


def red_green(image: np.ndarray) -> np.ndarray:
    return image[..., :2].transpose(2, 0, 1).astype(np.float32)


# ---- tiles ----


@pytest.mark.parametrize("scale", SCALES)
@settings(max_examples=15, deadline=None)
@given(height=st.integers(16, 300), width=st.integers(16, 300))
def test_maps_are_the_images_at_any_size_and_scale(scale, height, width):
    image = picture(height, width)
    before = image.copy()
    (maps,) = maps_of(predictor(scale=scale, tile=128), [image])
    np.testing.assert_array_equal(image, before)
    assert maps.dtype == np.float32
    assert maps.shape == (2, height, width)
    np.testing.assert_allclose(maps, red_green(image), atol=1e-3 if scale == 1 else 8.0)
    assert np.abs(maps - red_green(image)).mean() < 1.0


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_is_shifted(scale):
    """A ramp, magnified and shrunk, stays where it is: half a pixel more would be 2 grey levels."""
    y, x = np.mgrid[:60, :60]
    image = np.stack([4 * y, 4 * x, 0 * x], -1).astype(np.uint8)
    (maps,) = maps_of(predictor(scale=scale, tile=64, overlap=0), [image])
    np.testing.assert_allclose(maps[:, 4:-4, 4:-4], red_green(image)[:, 4:-4, 4:-4], atol=0.2)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(300, 128), (128, 300), (257, 411), (130, 129)])
def test_tiles_equal_the_whole_for_a_local_model(scale, size):
    """But for the few px where the blur reaches over a tile's border, and fades out."""
    image = picture(*size, seed=1)
    (tiled,) = maps_of(predictor(Blur(), scale, tile=128, overlap=48), [image])
    model = Blur()
    (whole,) = maps_of(predictor(model, scale, tile=512, overlap=48), [image])
    assert len(model.seen) == 1
    assert tiled.shape == whole.shape == (2, *size)
    # At the image's border the whole has its mirror where a tile has nothing
    error = np.abs(tiled - whole)[:, 8:-8, 8:-8]
    between = scale == 1.5  # tiles begin between two model px
    assert error.max() <= (3.0 if between else 1.0)
    assert error.mean() < (0.3 if between else 0.05)
    assert np.abs(whole - red_green(image)).max() > 3.0  # the blur does something


def test_tiles_without_overlap_show_their_borders():
    """Negative control of the test above."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    whole, bare, faded = (
        next(maps_of(predictor(Blur(), tile=tile, overlap=overlap), [image]))
        for tile, overlap in ((512, 48), (128, 0), (128, 48))
    )
    assert np.abs(bare - whole).mean() > 5 * np.abs(faded - whole).mean() > 0


SIZES = [(64, 64), (200, 100), (16, 40), (64, 64), (64, 64), (300, 70), (64, 65), (129, 129)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
def test_order_is_kept_and_grouping_changes_nothing(batch):
    images = [picture(*size, seed=k) for k, size in enumerate(SIZES)]
    model = Fake()
    labels = list(predictor(model, tile=64, overlap=16, batch=batch).predict_many(images))
    for image, label in zip(images, labels, strict=True):
        np.testing.assert_array_equal(label, image[..., 0])
    tiles = [len(grid(h, 64, 16, 1.0)[0]) * len(grid(w, 64, 16, 1.0)[0]) for h, w in SIZES]
    assert max(shape[0] for shape in model.seen) <= batch
    assert sum(shape[0] for shape in model.seen) == sum(tiles)
    grouped, single = (
        list(maps_of(predictor(Blur(), 2.0, tile=64, overlap=16, batch=b), images))
        for b in (batch, 1)
    )
    for maps, same in zip(grouped, single, strict=True):
        np.testing.assert_array_equal(maps, same)


def test_tiles_of_one_size_share_a_batch():
    model = Fake()
    images = [picture(128, 128), picture(64, 64), picture(64, 64)]
    list(maps_of(predictor(model, tile=64, overlap=0, batch=4), images))
    assert model.seen == [(4, 3, 64, 64), (2, 3, 64, 64)]


def test_images_are_read_as_they_are_needed():
    read = []

    def stream():
        for k in range(30):
            read.append(k)
            yield picture(64, 64, seed=k)

    labels = predictor(batch=4).predict_many(stream())
    np.testing.assert_array_equal(next(labels), picture(64, 64)[..., 0])
    assert len(read) < 20  # two batches, and what threads have begun
    assert len(list(labels)) == 29
    assert read == list(range(30))
    assert list(predictor().predict_many([])) == []


def test_small_images_are_mirrored_and_not_blackened():
    class Mean(Fake):
        def local(self, images):
            return images[:, :2].mean((2, 3), keepdim=True).expand(-1, -1, *images.shape[2:])

    image = np.full((20, 30, 3), 200, np.uint8)
    (maps,) = maps_of(predictor(Mean(), 2.0), [image])
    np.testing.assert_allclose(maps, 200.0, atol=1e-3)


@pytest.mark.parametrize(
    ("crop", "scale"),
    [(64, 0.5), (80, 0.4), (300, 1.92), (96, 1 / 3), (100, 1.28), (500, 2.048), (1000, 1.376)],
)
@pytest.mark.parametrize("size", [(64, 64), (1000, 64), (64, 1400), (2100, 70)])
def test_every_scale_that_can_train_can_predict(crop, scale, size):
    """Whatever `data.crop * data.scale` allows, tiles are multiples of 32 model px."""
    assert crop * scale % 32 == 0
    image = np.full((*size, 3), 100, np.uint8)
    (maps,) = maps_of(predictor(scale=scale, tile=1024), [image])
    np.testing.assert_allclose(maps, np.full((2, *size), 100.0), atol=1e-3)


@pytest.mark.parametrize("scale", [0.6, 1.1, 2.0, 2.3])
@pytest.mark.parametrize("size", [64, 100, 300])
def test_tiles_have_the_asked_scale(scale, size):
    model = Fake()
    p = predictor(model, scale, tile=256)
    list(maps_of(p, [picture(size, size)]))
    side = p.grid(picture(size, size)).sides[0]
    assert model.seen[0][2] / side == pytest.approx(scale, rel=0.01)


def test_forward_pass_runs_in_the_asked_precision():
    class Product(Fake):
        def local(self, images):
            product = F.conv2d(images, torch.eye(2, 3)[:, :, None, None])
            self.dtype = product.dtype
            return product

    model = Product()
    (maps,) = maps_of(predictor(model, 2.0, autocast=torch.bfloat16), [picture(64, 64)])
    assert model.dtype == torch.bfloat16
    assert maps.dtype == np.float32
    (exact,) = maps_of(predictor(model, 2.0), [picture(64, 64)])
    assert model.dtype == torch.float32
    assert 0 < np.abs(maps - exact).max() <= 1.0


@pytest.mark.parametrize(
    "shape, dtype",
    [((64, 64), "uint8"), ((64, 64, 4), "uint8"), ((64, 64, 3), "float32"), ((0, 9, 3), "uint8")],
)
def test_what_is_no_image(shape, dtype):
    with pytest.raises(UserError, match=f"image: found {dtype}"):
        predictor().predict(np.zeros(shape, dtype))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_cannot_become_an_array(mode):
    closed = Image.new(mode, (64, 64))
    closed.close()
    tensor = torch.zeros(64, 64, 3, requires_grad=True)
    for image, found in (
        (closed, "Image .*closed"),
        (tensor, "Tensor .*grad"),
        (torch.zeros(64, 64, 3, device="meta"), "Tensor .*meta"),
        ([[0], []], "list"),
    ):
        with pytest.raises(UserError, match=rf"image: found {found}.*, expected uint8 \(H, W, 3\)"):
            predictor().predict(image)


def test_one_image_where_a_list_is_expected():
    for image, kind in (("a.png", "str"), (Image.new("RGB", (64, 64)), "Image")):
        with pytest.raises(UserError, match=f"images: found one {kind}, expected a list"):
            list(predictor().predict_many(image))


@pytest.mark.parametrize("mpp", ["0.25", 9.0, float("nan"), [0.25]])
def test_what_is_no_number_of_microns(mpp):
    found = f"mpp: found {mpp!r}, expected 0.05 to 4".replace("9.0", "9")
    with pytest.raises(UserError, match=re.escape(found)):
        predictor().predict(picture(64, 64), mpp=mpp)


# ---- windows ----


class Colour(Blur):
    """The instance head's watershed: red is the logit of foreground, green of shallowness."""

    def forward(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        red, green = (super().forward(images, size) / 16 - 8).unbind(1)
        return torch.stack([0 * red, red, red - 20, -green], 1)

    def probabilities(self, maps: torch.Tensor) -> torch.Tensor:
        return InstanceHead.probabilities(None, maps)

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        return InstanceHead.instances(None, maps, config)


def discs(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image for `Colour` of discs of 7 to 14 px radius, many of which touch; and their ids."""
    rng = np.random.default_rng(seed)
    label, image = np.zeros((size, size), np.int32), np.zeros((size, size, 3), np.uint8)
    image[..., 1] = 255
    for n, (row, column) in enumerate(np.ndindex(size // 28, size // 28), 1):
        y, x = 28 * np.array([row, column]) + 14 + rng.integers(-4, 5, 2)
        radius = rng.uniform(7, 14)
        place = np.s_[max(0, y - 14) : y + 15, max(0, x - 14) : x + 15]
        py, px = np.ogrid[:size, :size]
        distance = np.hypot(py[place[0]] - y, px[:, place[1]] - x) / radius
        inside = (distance < 1) & (label[place] == 0)
        label[place][inside] = n
        image[place][inside, 0] = 255
        image[place][inside, 1] = 255 * distance[inside]
    return image, label


class Sharp(Colour):
    local = Fake.local


def pale(nuclei: int) -> np.ndarray:
    """An image for `Sharp`: squares of 12 px, probability 0.8, in rims of 2 px of 0.45."""
    image = np.full((64 * nuclei, 64, 3), 128, np.uint8)  # a flat depth
    image[..., 0] = 0
    for top in range(24, 64 * nuclei, 64):
        image[top : top + 16, 24:40, 0] = 125
        image[top + 2 : top + 14, 26:38, 0] = 150
    return image


@pytest.mark.parametrize(
    ("nuclei", "certainty", "side"), [(10, 0.9, 16), (10, 0.79, 12), (10, 0.0, 12), (9, 0.9, 12)]
)
def test_an_image_of_less_than_the_usual_certainty_has_lower_thresholds(nuclei, certainty, side):
    """If enough nuclei tell how certain the model is."""
    p = predictor(Sharp(), tile=1024, certainty=certainty)
    label = p.predict(pale(nuclei))
    assert np.bincount(label.ravel())[1:].tolist() == [side**2] * nuclei
    table = p.predict_nuclei(pale(nuclei))
    confidence = (144 * 0.798 + (side**2 - 144) * 0.453) / side**2
    assert table["confidence"] == pytest.approx([confidence] * nuclei, abs=2e-3)


def test_each_window_has_its_own_certainty():
    """A pale part of a slide is not judged by the rest."""
    image = np.concatenate([pale(10), pale(10)])
    image[640:, :, 0][image[640:, :, 0] == 150] = 255
    p = predictor(Sharp(), tile=1024, core=640, margin=0, certainty=0.9)
    sides = np.bincount(p.predict(image).ravel())[1:] ** 0.5
    assert sorted(sides) == [12] * 10 + [16] * 10


def matches(label: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of each nucleus of `label` with the one of `other` that it overlaps most."""
    both = np.stack([label, other])[:, (label > 0) & (other > 0)]
    pairs, counts = np.unique(both, axis=1, return_counts=True)
    areas, others = np.bincount(label.ravel()), np.bincount(other.ravel())
    best = np.zeros(len(areas))
    np.maximum.at(best, pairs[0], counts / (areas[pairs[0]] + others[pairs[1]] - counts))
    return best[1:]


@pytest.fixture(scope="module")
def field():
    """An image of 1250 px, and its nuclei as one tile and one window: nearly all discs."""
    image, truth = discs(1250)
    model = Colour()
    whole = predictor(model, tile=1280, core=1280).predict(image)
    assert len(model.seen) == 1
    assert whole.max() > 1000
    assert (matches(truth, whole) > 0.5).mean() > 0.95
    return image, whole


@pytest.mark.parametrize("make", [TorchPredictor, HalfPredictor])
@pytest.mark.parametrize("tile, overlap, core", [(1280, 0, 300), (256, 32, 300)])
def test_tiled_equals_untiled(field, tile, overlap, core, make):
    """In windows, and in tiles and windows, every nucleus comes out once, and whole."""
    image, whole = field
    sizes = {"tile": tile, "overlap": overlap, "core": core, "margin": 64}
    label = make(Colour(), scale=1.0, instances=Instances(), **sizes).predict(image)
    assert label.max() == len(np.unique(label)) - 1 == whole.max()
    if tile == 1280 and make is TorchPredictor:  # one tile: the dense maps are the same
        assert (matches(whole, label) == 1).all()
    assert (matches(whole, label) > 0.9).all()
    assert (matches(label, whole) > 0.9).all()


def test_windows_without_margins_cut_nuclei():
    """Negative control of the test above."""
    image, _ = discs(600)
    whole, cut = (
        predictor(Colour(), tile=600, core=core, margin=0).predict(image) for core in (600, 150)
    )
    assert cut.max() > whole.max() + 15
    assert (matches(whole, cut) < 0.9).sum() > 40


@pytest.mark.parametrize("tile, overlap, core", [(256, 32, 600), (256, 32, 150), (190, 64, 211)])
def test_tiles_are_run_once_whatever_the_windows(tile, overlap, core):
    model = Colour()
    p = predictor(model, tile=tile, overlap=overlap, core=core, margin=40)
    assert p.predict(discs(600)[0]).any()
    count = len(grid(600, tile, overlap, 1.0)[0]) ** 2
    assert sum(shape[0] for shape in model.seen) == p.tiles_done == count


def test_a_net_in_windows_is_the_net_in_one(base):
    """MobileSAM's encoder and the head: the maps of each window are those of the whole."""
    net = build_model(Model(width=32), base, seed=0).eval()
    image = picture(230, 300)
    arguments = {"tile": 96, "overlap": 16, "batch": 2}
    (whole,) = maps_of(predictor(net, **arguments), [image])
    parts = predictor(net, core=100, margin=30, **arguments)
    tiles = parts.grid(image)
    assert len(tiles.windows) == 9
    for _, k, taken in parts._stream([tiles]):
        same = whole[:, *tiles.windows[k].outer]
        np.testing.assert_allclose(tiles.stitch(k, taken), same, atol=1e-3 * whole.std())


# ---- one call ----


def test_an_array_a_file_and_a_pillow_image_are_predicted_alike(tmp_path):
    image, _ = discs(100)
    expected = predictor(Colour()).predict(image)
    assert expected.max() > 5
    Image.fromarray(image).save(tmp_path / "a.png")
    alpha = Image.fromarray(np.dstack([image, image[..., 0]]))
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), alpha):
        np.testing.assert_array_equal(predictor(Colour()).predict(same), expected)
    converted = Image.fromarray(image).convert("YCbCr")
    rgb = np.asarray(converted.convert("RGB"))
    np.testing.assert_array_equal(predictor().predict(converted), predictor().predict(rgb))
    with pytest.raises(UserError, match="image: found a Pillow image of mode LAB"):
        predictor().predict(Image.fromarray(image, mode="LAB"))
    grey = predictor().predict(Image.fromarray(image[..., 0]))
    np.testing.assert_array_equal(grey, image[..., 0])
    with pytest.raises(UserError, match=r"b\.png"):
        predictor().predict(tmp_path / "b.png")
    with pytest.raises(UserError, match="image: found uint16"):
        predictor().predict(Image.fromarray(np.zeros((64, 64), np.uint16)))


def test_a_pillow_image_is_turned_and_converted_as_its_file_is(tmp_path, monkeypatch):
    image = discs(100)[0][:, :70]
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "turned.png", exif=tag)
    Image.fromarray(image).convert("CMYK").save(tmp_path / "print.jpg")
    for name, shape in (("turned.png", (70, 100)), ("print.jpg", (100, 70))):
        label = predictor().predict(tmp_path / name)
        assert label.shape == shape
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(predictor().predict(opened), label)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(predictor().predict("~/print.jpg"), label)


def test_a_files_microns_set_the_scale_and_the_table(tmp_path):
    tags = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", discs(100)[0], **tags)
    p = predictor(Colour(), mpp=0.25)
    table = p.predict_nuclei(tmp_path / "a.tif")
    assert p.model.seen[-1][2] == 224  # at least twice 100 px, a multiple of 32
    np.testing.assert_allclose(table["area_um2"], table["area_px"] / 4)
    assert "area_um2" not in p.predict_nuclei(discs(100)[0])
    assert p.predict_nuclei(tmp_path / "a.tif", mpp=0.25)["area_um2"].sum() > 0
    assert p.model.seen[-1][2] == 128


def test_a_table_of_nuclei():
    """In windows, the confidence of each nucleus is the mean of the stitched foreground."""
    image, p = discs(400)[0], predictor(Colour(), tile=128, core=150, margin=40)
    table, label = p.predict_nuclei(image), p.predict(image)
    ((foreground, _),) = maps_of(p, [image])
    n = label.max()
    assert table["id"].tolist() == list(range(1, n + 1)) and n > 100
    means = ndimage.mean(foreground, label, table["id"])
    np.testing.assert_allclose(table["confidence"], means, atol=1e-4)
    assert 0.7 < table["confidence"].min() < table["confidence"].max() < 1
    areas = [shapely.geometry.shape(outline).area for outline in table["outline"]]
    np.testing.assert_array_equal(areas, np.bincount(label.ravel())[1:])
    empty = predictor(Colour()).predict_nuclei(np.zeros((64, 64, 3), np.uint8))
    assert all(len(column) == 0 for column in empty.values())
    assert empty.keys() == table.keys()


# ---- magnification ----


@pytest.mark.parametrize(
    "mpp, scale, tile", [(0.25, 2.0, 128), (0.5, 4.0, 64), (0.125, 1.0, 256), (None, 2.0, 128)]
)
def test_microns_per_px_set_the_scale(mpp, scale, tile):
    """Half the magnification: twice the model px per image px, in tiles of the same model px."""
    areas = []

    class Notes(Fake):
        def instances(self, maps, config):
            areas.append(config.area)
            return super().instances(maps, config)

    model = Notes()
    p = predictor(model, 2.0, tile=128, mpp=0.25)
    tiles = p.grid(picture(tile, tile), mpp=mpp)
    assert (tiles.scale, tiles.sides) == (scale, (tile, tile))
    p.predict(picture(tile, tile), mpp=mpp)
    assert {shape[2:] for shape in model.seen} == {(256, 256)}
    # The smallest nucleus is 30 px of the images trained on; half of 15 is rounded to 8
    assert areas == [{2.0: 30, 4.0: 8, 1.0: 120}[scale]]


def test_windows_of_a_large_ratio_grow_by_their_margins_alone():
    image = np.zeros((6000, 6000, 3), np.uint8)
    sides = {}
    for ratio in (0.5, 1, 2, 8):
        tiles = predictor(ratio=ratio, core=1000, margin=100).grid(image)
        sides[ratio] = max(w.outer[0].stop - w.outer[0].start for w in tiles.windows)
    assert sides == {0.5: 600, 1: 1200, 2: 1400, 8: 3800}  # and not 2,400 and 6,000


def test_ids_have_no_gap_where_a_nucleus_of_another_window_hides_one():
    p = predictor(core=4, margin=4)
    image = np.zeros((8, 4, 3), np.uint8)
    tiles = p.grid(image)
    first, second = tiles.windows
    hides, hidden = np.zeros((8, 4), np.int32), np.zeros((8, 4), np.int32)
    hides[:6], hidden[2:4], hidden[6:] = 1, 1, 2
    parts = [
        (first, Nuclei(hides, np.array([0.9]))),
        (second, Nuclei(hidden, np.array([0.8, 0.7]))),
    ]
    p.extract = lambda _: ((tiles, *part) for part in parts)
    (nuclei,) = p.nuclei_many([image], [None])
    assert np.unique(nuclei.label).tolist() == [1, 2] and nuclei.confidence.tolist() == [0.9, 0.7]


def test_a_ratio_goes_before_microns_per_px():
    tiles = predictor(Fake(), 2.0, tile=128, mpp=0.25, ratio=2.0).grid(picture(256, 256), mpp=0.5)
    assert (tiles.scale, tiles.sides) == (1.0, (256, 256))


@pytest.mark.parametrize(
    "wanted, found", [(1.01, 1.0), (0.6, 0.6), (1.6, 1.6), (0.2, 1 / 3), (9.0, 3.0)]
)
def test_the_nuclei_of_a_first_look_set_the_scale(wanted, found):
    """An image `wanted` times as large as those trained on, as far as its first look can tell."""
    image = discs(400)[0]
    median = np.median(np.bincount(predictor(Colour()).predict(image).ravel())[1:])
    p = predictor(Colour(), nucleus_area=median / wanted**2)
    assert p.grid(image).scale == pytest.approx(1 / found, rel=0.026 if 0.5 < wanted < 2 else 1e-6)
    known = replace(p, mpp=0.25).grid(image, mpp=0.2)  # looked at in 1.25 times the size
    assert 1 / known.scale == pytest.approx(np.clip(wanted, 1.25 / 3, 1.25 * 3), rel=0.1)
    large = np.kron(image[:280, :280], np.ones((4, 4, 1), np.uint8))
    farthest = replace(p, ratio=4.0, nucleus_area=1.0).grid(large)
    assert farthest.scale == 1 / 8  # and not 3 times 4
    few = image.copy()
    few[84:] = few[:, 84:] = (0, 255, 0)  # nine nuclei are left
    assert p.grid(few).scale == 1


def test_a_first_look_that_cannot_be_read_is_told():
    class Torn(np.ndarray):
        def __getitem__(self, place):
            raise OSError("cut off")

    p = predictor(Colour(), nucleus_area=100.0)
    with pytest.raises(OSError, match="cut off"):
        p.grid(discs(90)[0].view(Torn))


def test_a_first_look_at_a_large_image_takes_few_windows():
    looks = []

    class Looks(TorchPredictor):
        def extract(self, images):
            return super().extract(looks.append(len(tiles.windows)) or tiles for tiles in images)

    options = {"scale": 1.0, "instances": Instances(), "tile": 512, "overlap": 24}
    p = Looks(Colour(), nucleus_area=200.0, core=100, margin=20, **options)
    tiles = p.grid(discs(500)[0])  # as small as the core, and as many windows as for its ratio
    assert looks == [4] and len(tiles.windows) > 4
    p.predict(discs(90)[0])
    assert looks == [4, 1, 1]  # the look, then the prediction


@pytest.mark.parametrize("ratio, legal", [(8, True), (0.125, True), (8.1, False), (0.12, False)])
def test_magnifications_far_from_the_training_are_refused(ratio, legal):
    p = predictor(mpp=ratio)
    if legal:
        assert p.grid(picture(64, 64), mpp=1.0).scale == 1 / ratio
    else:
        with pytest.raises(UserError, match=f"mpp, scale: found {ratio}"):
            p.grid(picture(64, 64), mpp=1.0)


# ---- test-time augmentation ----


class Slope(Fake):
    """Maps that depend on the direction: red, and the difference to the pixel on the left."""

    def local(self, images):
        red = images[:, :1]
        return torch.cat([red, red - red.roll(1, 3)], 1)


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (150, 70)])
def test_flips_and_turns_are_undone(size):
    """Of a model without directions the mean is the map itself; a direction averages out."""
    image = picture(*size)
    np.testing.assert_array_equal(predictor(tta=True, tile=64).predict(image), image[..., 0])
    plain, mean = (
        next(maps_of(predictor(Slope(), tta=tta, tile=512), [image])) for tta in (False, True)
    )
    np.testing.assert_allclose(mean[0], plain[0], atol=1e-3)
    inner = np.s_[2:-2, 2:-2]
    red = image[..., 0].astype(float)
    around = sum(np.roll(red, step, axis) for step in (1, -1) for axis in (0, 1))
    np.testing.assert_allclose(mean[1][inner], (red - around / 4)[inner], atol=1e-3)
    assert np.abs(plain[1] - mean[1])[inner].max() > 2


def test_eight_different_views():
    views = set()

    class Notes(Fake):
        def local(self, images):
            views.add(images.numpy().tobytes())
            return super().local(images)

    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    predictor(Notes(), tta=True).predict(noise)
    assert len(views) == 8


@pytest.mark.parametrize("image", [np.zeros((70, 80, 3)), np.zeros((0, 0, 3), np.uint8), None])
def test_each_of_many_images_is_checked_as_one_is(image):
    good = discs(80)[0]
    with pytest.raises(UserError, match="image: found"):
        list(predictor(Colour()).predict_many([good, image, good]))


def test_each_of_many_images_needs_its_number():
    found = predictor(Colour()).predict_many([discs(80)[0]] * 3, [None, None])
    with pytest.raises(UserError, match="mpps: found fewer"):
        list(found)
