import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nucsam.config import Augment
from nucsam.data.augment import augment, window
from nucsam.data.samples import DRAWS

NONE = Augment(d4=False, scale_min=1.0, scale_max=1.0, stain=0.0, blur=0.0, noise=0.0)
D4 = replace(NONE, d4=True)
GEOMETRY = replace(Augment(), stain=0.0, blur=0.0, noise=0.0)
STRONG = Augment(
    stain=0.7, stain_scale=0.5, stain_bias=0.3, stain_mix=0.2, blur=0.5, noise=0.5, noise_sigma=30.0
)
STEP = 3.0  # grey levels per px of `maps`' ramps
HAEMATOXYLIN, EOSIN = torch.tensor([0.65, 0.70, 0.29]), torch.tensor([0.07, 0.99, 0.11])
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def uniform(images: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(images, DRAWS, generator=torch.Generator().manual_seed(seed))


def augmented(
    batch: Batch, config: Augment, *, crop: int = 0, scale: float = 1.0, seed: int = 0
) -> Batch:
    """Augment with draws of a seed; the crop is as large as the window by default."""
    side, draws = batch[0].shape[-1], uniform(len(batch[0]), seed)
    return augment(*batch, draws, crop=crop or side, scale=scale, config=config)


def maps(side: int, images: int = 1) -> Batch:
    """Red and green give a pixel's row and column, its label is row * side + column + 1."""
    assert STEP * (side - 1) <= 255
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels = y * side + x + 1
    image = torch.stack([STEP * y, STEP * x, labels % 256]).to(torch.uint8)
    counted = torch.rand(side, side, generator=torch.Generator().manual_seed(1)) < 0.5
    return tuple(t.expand(images, *t.shape).clone() for t in (image, labels, counted))


def pictures(images: int, side: int, low: int = 0, high: int = 256, seed: int = 2) -> Batch:
    options = {"generator": torch.Generator().manual_seed(seed)}
    image = torch.randint(low, high, (images, 3, side, side), dtype=torch.uint8, **options)
    labels = torch.randint(0, 5, (images, side, side), dtype=torch.int32, **options)
    return image, labels, labels != 3


def flat(image: torch.Tensor, side: int = 32) -> Batch:
    """Images (B, 3) of one colour each, without nuclei."""
    labels = torch.zeros(len(image), side, side, dtype=torch.int32)
    return image[:, :, None, None].expand(-1, -1, side, side), labels, labels == 0


def seen(images: torch.Tensor) -> torch.Tensor:
    """Row and column of the window that each pixel of augmented ramps shows, (B, 2, h, w) px."""
    return images[:, :2] / STEP


def named(labels: torch.Tensor, side: int) -> torch.Tensor:
    """Row and column of the window that each label names."""
    return torch.stack([(labels - 1) // side, (labels - 1) % side], dim=1).float()


# Geometry


def test_nothing_asked_gives_a_crop_of_a_larger_window():
    batch = maps(80, 40)
    images, labels, counted = augmented(batch, NONE, crop=64)
    starts = named(labels, 80)[:, :, 0, 0].long()
    assert len({tuple(start) for start in starts.tolist()}) > 30
    assert starts.min() <= 1
    assert starts.max() in (15, 16)
    for (y, x), label, counts in zip(starts.tolist(), labels, counted):
        assert torch.equal(label, batch[1][0, y : y + 64, x : x + 64])
        assert torch.equal(counts, batch[2][0, y : y + 64, x : x + 64])
    torch.testing.assert_close(seen(images), named(labels, 80), atol=0.51, rtol=0)


def symmetries(t: torch.Tensor) -> list[torch.Tensor]:
    """The eight of the square, of the last two dimensions."""
    return [s.rot90(k, (-2, -1)) for s in (t, t.flip(-1)) for k in range(4)]


def test_d4_gives_the_eight_symmetries_and_moves_all_maps_together():
    batch = maps(48, 64)
    image_of, label_of, counted_of = (symmetries(t[0]) for t in batch)
    shown = []
    for image, label, counts in zip(*augmented(batch, D4)):
        (number,) = (k for k, turned in enumerate(label_of) if torch.equal(turned, label))
        torch.testing.assert_close(image, image_of[number].float(), atol=0.01, rtol=0)
        assert torch.equal(counts, counted_of[number])
        shown.append(number)
    assert set(shown) == set(range(8))
    assert max(map(shown.count, range(8))) <= 20  # 8 on average


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 1.5, 2.0]), margin=st.integers(0, 9))
def test_image_and_label_stay_aligned(seed, scale, margin):
    """An image pixel shows the place that the label there names, to half a px of rounding."""
    crop, side = 32, window(32, GEOMETRY) + margin
    images, labels, counted = augmented(maps(side, 4), GEOMETRY, crop=crop, scale=scale, seed=seed)
    model = round(crop * scale)
    assert images.shape == (4, 3, model, model)
    assert labels.shape == counted.shape == (4, crop, crop)
    # the mean of the model pixels that cover an image pixel is what its centre shows
    places, names = F.interpolate(seen(images), size=(crop, crop), mode="area"), named(labels, side)
    if scale == 1.5:  # 3 model px cover 2 image px: compare those
        places, names = F.avg_pool2d(seen(images), 3), F.avg_pool2d(names, 2)
    torch.testing.assert_close(places[..., 1:-1, 1:-1], names[..., 1:-1, 1:-1], atol=0.51, rtol=0)
    assert torch.equal(counted, maps(side)[2].flatten()[labels - 1])


def test_shift_of_a_pixel_would_be_seen():
    """Negative control of the test above."""
    side = window(32, GEOMETRY)
    images, labels, _ = augmented(maps(side, 4), GEOMETRY, crop=32)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        torch.testing.assert_close(seen(images), named(labels, side).roll(1, 2), atol=0.51, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_scaled_images_are_those_of_prediction(scale):
    batch = pictures(2, 64)
    images, labels, counted = augmented(batch, NONE, scale=scale)
    expected = F.interpolate(batch[0].float(), scale_factor=scale, mode="bilinear")
    torch.testing.assert_close(images, expected, atol=0.01 * scale, rtol=0)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, batch[1].long())
    assert torch.equal(counted, batch[2])


@pytest.mark.parametrize("magnification", [0.5, 0.7, 1.0, 1.3, 2.0])
def test_area_of_a_nucleus_goes_with_the_square_of_the_magnification(magnification):
    config = replace(NONE, scale_min=magnification, scale_max=magnification)
    side, radius = window(96, config), 20
    from_middle = torch.arange(side) - (side - 1) / 2
    label = (from_middle**2 + from_middle[:, None] ** 2 < radius**2).int()[None]
    image = (200 * label[:, None]).expand(1, 3, -1, -1).to(torch.uint8)
    centred = torch.full((1, DRAWS), 0.5)
    images, labels, _ = augment(
        image, label, label >= 0, centred, crop=96, scale=1.0, config=config
    )
    expected = math.pi * (radius * magnification) ** 2
    assert labels.sum().item() == pytest.approx(expected, rel=0.05)
    assert images[0, 0].sum().item() / 200 == pytest.approx(expected, rel=0.05)


def test_magnification_is_drawn_log_uniformly():
    images, _, _ = augmented(maps(window(32, GEOMETRY), 400), GEOMETRY, crop=32)
    inner = seen(images)[:, :, 2:-2, 2:-2]
    steps = (inner[:, :, 1:, 1:] - inner[:, :, :-1, :-1]).abs()  # window px per crop px
    logs = -steps.mean((1, 2, 3)).log()
    low, high = math.log(0.7), math.log(1.3)
    assert low - 0.01 < logs.min() < low + 0.02
    assert high - 0.02 < logs.max() < high + 0.01
    quarters = torch.tensor([0.25, 0.5, 0.75])
    expected = low + (high - low) * quarters
    torch.testing.assert_close(logs.quantile(quarters), expected, atol=0.05, rtol=0)


def overhang(side: int, crop: int, config: Augment, draws: torch.Tensor) -> float:
    """How far the crop's outermost pixel centres lie outside the window's pixels, px."""
    images, _, _ = augment(*maps(side, len(draws)), draws, crop=crop, scale=1.0, config=config)
    inner = seen(images)[:, :, 4:-4, 4:-4].double()  # no replicated border: extrapolate from here
    n = inner.shape[-1]
    corner = inner[:, :, :1, :1]
    down, right = inner[:, :, -1:, :1] - corner, inner[:, :, :1, -1:] - corner
    ends = [-4 / (n - 1), (n + 3) / (n - 1)]
    corners = torch.cat([corner + a * down + b * right for a in ends for b in ends])
    return max(-corners.min().item(), corners.max().item() - (side - 1), 0.0)


@pytest.mark.parametrize("crop", [24, 32, 33])
@pytest.mark.parametrize(
    "low, high", [(0.5, 0.5), (0.7, 1.3), (0.9, 1.1), (1.0, 1.0), (1.0, 2.0), (1.2, 1.5)]
)
def test_window_holds_every_crop(crop, low, high):
    config = replace(D4, scale_min=low, scale_max=high)
    extremes = torch.tensor([0.0, 0.5, 1 - 2**-24])
    draws = torch.cartesian_prod(*[extremes] * 6)  # flips, turn, zoom, shifts
    draws = torch.cat([draws, torch.zeros(len(draws), DRAWS - 6)], dim=1)
    side = window(crop, config)
    assert side == math.ceil(crop / min(low, 1))
    # a magnified crop at the window's edge begins within half a px of its first pixel's centre
    assert overhang(side, crop, config, draws) < 0.5
    if low <= 1:
        assert overhang(side - 6, crop, replace(config, scale_max=low), draws) > 0.5


# The batch


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_batch_changes_nothing(scale):
    """An image alone is the image in a batch, bit for bit."""
    tensors = (*pictures(9, window(64, STRONG)), uniform(9))

    def run(chosen: list[int]) -> Batch:
        return augment(*(t[chosen] for t in tensors), crop=64, scale=scale, config=STRONG)

    together, order = run(list(range(9))), [5, 0, 7]
    apart, some = zip(*(run([k]) for k in range(9))), run(order)
    for all_of_one_kind, alone, few in zip(together, apart, some):
        assert torch.equal(all_of_one_kind, torch.cat(alone))
        assert torch.equal(all_of_one_kind[order], few)
    assert not torch.equal(together[0][0], together[0][1])


def test_only_the_draws_matter_and_inputs_stay():
    tensors = (*pictures(4, window(32, STRONG)), uniform(4))
    before = [t.clone() for t in tensors]
    first = augment(*tensors, crop=32, scale=1.0, config=STRONG)
    torch.rand(7)  # global random numbers have no part in it
    again = augment(*tensors, crop=32, scale=1.0, config=STRONG)
    other = augmented(tensors[:3], STRONG, crop=32, seed=9)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first[0], other[0]))
    assert all(map(torch.equal, before, tensors))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0, 250]), high=st.sampled_from([2, 256]))
def test_values_are_grey_levels(seed, low, high):
    batch = pictures(4, window(32, STRONG), low, max(low + 1, high), seed)
    images, _, _ = augmented(batch, STRONG, crop=32, seed=seed)
    assert images.isfinite().all()
    assert 0 <= images.min() <= images.max() <= 255


@pytest.mark.parametrize("name", ["stain", "blur", "noise"])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probability_chooses_images(name, probability):
    batch = pictures(200, 24, 60, 180)
    config = replace(NONE, blur_sigma=3.0 if name == "blur" else 1.0, **{name: probability})
    images, labels, counted = augmented(batch, config)
    changed = (images - batch[0].float()).abs().amax((1, 2, 3)) > 0.02
    assert changed.float().mean().item() == pytest.approx(probability, abs=0.12)
    assert torch.equal(labels, batch[1].long())
    assert torch.equal(counted, batch[2])


# Stain, blur, noise


def density(images: torch.Tensor) -> torch.Tensor:
    return -torch.log((images.double() + 1) / 256)


def stained(colour: torch.Tensor, images: int) -> Batch:
    """Flat images of an optical density (3,)."""
    return flat((256 * torch.exp(-colour) - 1).round().to(torch.uint8).expand(images, 3))


@pytest.mark.parametrize("stain", [HAEMATOXYLIN, EOSIN])
def test_a_pure_stain_is_only_scaled(stain):
    """Beer and Lambert: all three densities by one factor, within 1 -+ stain_scale."""
    batch = stained(0.8 * stain, 50)
    images, _, _ = augmented(batch, replace(NONE, stain=1.0, stain_scale=0.3, stain_bias=0.0))
    before, after = density(batch[0][:, :, 0, 0]), density(images[:, :, 0, 0])
    factor = (before * after).sum(1) / before.square().sum(1)
    expected = factor[:, None] * before
    torch.testing.assert_close(after, expected, atol=0.02, rtol=0)  # the uint8 colour is rounded
    assert 0.69 < factor.min() < 0.8
    assert 1.2 < factor.max() < 1.31


def test_two_stains_are_scaled_apart():
    batch = stained(0.6 * HAEMATOXYLIN + 0.6 * EOSIN, 50)
    images, _, _ = augmented(batch, replace(NONE, stain=1.0, stain_scale=0.3, stain_bias=0.0))
    stains = torch.stack([HAEMATOXYLIN, EOSIN], 1).double()
    amounts = torch.linalg.lstsq(stains, density(images[:, :, 0, 0]).T).solution / 0.6
    assert ((amounts > 0.67) & (amounts < 1.33)).all()
    assert torch.corrcoef(amounts)[0, 1].abs() < 0.5


def test_bias_adds_one_density_everywhere():
    batch = pictures(20, 32, 60, 180)
    images, _, _ = augmented(batch, replace(NONE, stain=1.0, stain_scale=0.0, stain_bias=0.1))
    added = density(images) - density(batch[0])
    mean = added.mean((2, 3), keepdim=True)
    torch.testing.assert_close(added, mean.expand_as(added), atol=1e-3, rtol=0)
    assert 0.02 < mean.abs().max() < 0.1 * (0.70 + 0.99 + 0.57)
    assert (mean.flatten(1).std(0) > 0.01).all()


def test_mix_gives_each_stain_another_colour_and_leaves_glass_white():
    config = replace(NONE, stain=1.0, stain_scale=0.0, stain_bias=0.0, stain_mix=0.2)
    for stain in (HAEMATOXYLIN, EOSIN):
        batch = stained(0.8 * stain, 100)
        images, _, _ = augmented(batch, config)
        change = (density(images[:, :, 0, 0]) - density(batch[0][:, :, 0, 0])) / 0.8
        assert (change.abs() < 0.21).all()  # the uint8 colour is rounded
        assert (change.abs().amax(0) > 0.17).all()
        assert (torch.corrcoef(change.T) - torch.eye(3)).abs().max() < 0.3  # R, G and B apart
    glass = flat(torch.full((100, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(augmented(glass, config)[0], glass[0].float(), atol=1e-2, rtol=0)


def test_blur_is_a_gaussian_mean():
    batch, config = pictures(30, 48), replace(NONE, blur=1.0, blur_sigma=2.0)
    before = batch[0].float()[..., 8:-8, 8:-8]
    after = augmented(batch, config)[0][..., 8:-8, 8:-8]
    torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)), atol=6.0, rtol=0)
    left = (after.std((2, 3)) / before.std((2, 3))).mean(1)
    # of white noise 1 / (2 sigma sqrt(pi)) is left
    assert left.min().item() == pytest.approx(1 / (2 * 2.0 * math.sqrt(math.pi)), rel=0.25)
    assert (left < 1.01).all()
    grey = flat(torch.full((30, 3), 77, dtype=torch.uint8))
    torch.testing.assert_close(augmented(grey, config)[0], grey[0].float(), atol=0.01, rtol=0)


def test_noise_has_the_asked_size_and_is_new_in_each_image():
    batch = flat(torch.full((60, 3), 128, dtype=torch.uint8), side=48)
    images, _, _ = augmented(batch, replace(NONE, noise=1.0, noise_sigma=20.0))
    noise = (images - 128).flatten(1)
    size = noise.std(1)
    assert 0 < size.min() < 2
    assert 18 < size.max() < 20.5
    assert (noise.mean(1).abs() < 4 * size / math.sqrt(noise.shape[1]) + 1e-3).all()
    for planes in (noise, images[size.argmax()].flatten(1)):  # images; channels of one image
        assert (torch.corrcoef(planes) - torch.eye(len(planes))).abs().max() < 0.1
