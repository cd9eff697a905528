import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nucsam.augment import DRAWS, augment, window
from nucsam.config import Augment

NONE = Augment(d4=False, scale_min=1.0, scale_max=1.0, stain=0.0, blur=0.0, noise=0.0)
D4 = replace(NONE, d4=True)
GEOMETRY = replace(Augment(), stain=0.0, blur=0.0, noise=0.0)
STEP = 3.0  # grey levels per px of `maps`' ramps
HAEMATOXYLIN, EOSIN = torch.tensor([0.65, 0.70, 0.29]), torch.tensor([0.07, 0.99, 0.11])


def uniform(images: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(images, DRAWS, generator=torch.Generator().manual_seed(seed))


def maps(side: int, images: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Red and green tell a pixel's row and column, its label is row * side + column + 1, and half of them count."""
    assert STEP * (side - 1) <= 255
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels = y * side + x + 1
    image = torch.stack([STEP * y, STEP * x, labels % 256]).to(torch.uint8)
    counted = torch.rand(side, side, generator=torch.Generator().manual_seed(1)) < 0.5
    return tuple(t.expand(images, *t.shape).clone() for t in (image, labels, counted))


def pictures(images: int, side: int, low: int = 0, high: int = 256, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(low, high, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (images, side, side), dtype=torch.int32, generator=generator)
    return image, labels, labels != 3


def seen(images: torch.Tensor) -> torch.Tensor:
    """Row and column of the window that each pixel of augmented ramps shows, (B, 2, h, w) px."""
    return images[:, :2] / STEP


def named(labels: torch.Tensor, side: int) -> torch.Tensor:
    """Row and column of the window that each label names."""
    return torch.stack([(labels - 1) // side, (labels - 1) % side], dim=1).float()


def symmetries(t: torch.Tensor) -> list[torch.Tensor]:
    """The eight of the square, of the last two dimensions."""
    return [s.rot90(k, (-2, -1)) for s in (t, t.flip(-1)) for k in range(4)]


def test_nothing_asked_gives_the_exact_window():
    image, labels, counted = maps(64, 2)
    images, out, kept = augment(image, labels, counted, uniform(2), crop=64, scale=1.0, config=NONE)
    assert (images.dtype, out.dtype, kept.dtype) == (torch.float32, torch.int64, torch.bool)
    torch.testing.assert_close(images, image.float(), atol=0.01, rtol=0)
    assert torch.equal(out, labels)
    assert torch.equal(kept, counted)
    assert 0.4 < counted.float().mean() < 0.6


def test_nothing_asked_gives_a_crop_of_a_larger_window():
    image, labels, counted = maps(80, 40)
    images, out, kept = augment(image, labels, counted, uniform(40), crop=64, scale=1.0, config=NONE)
    starts = named(out, 80)[:, :, 0, 0].long()
    assert len({tuple(s) for s in starts.tolist()}) > 30
    assert starts.min() <= 1
    assert starts.max() in (15, 16)
    for (y, x), label, keep in zip(starts.tolist(), out, kept):
        assert torch.equal(label, labels[0, y : y + 64, x : x + 64])
        assert torch.equal(keep, counted[0, y : y + 64, x : x + 64])
    torch.testing.assert_close(seen(images), named(out, 80), atol=0.51, rtol=0)


def test_d4_gives_the_eight_symmetries_and_moves_all_maps_together():
    image, labels, counted = maps(48, 64)
    images, out, kept = augment(image, labels, counted, uniform(64), crop=48, scale=1.0, config=D4)
    found = []
    for one, label, keep in zip(images, out, kept):
        same = [k for k, s in enumerate(symmetries(labels[0])) if torch.equal(s, label)]
        assert len(same) == 1
        torch.testing.assert_close(one, symmetries(image[0])[same[0]].float(), atol=0.01, rtol=0)
        assert torch.equal(keep, symmetries(counted[0])[same[0]])
        found += same
    assert set(found) == set(range(8))
    assert max(found.count(k) for k in range(8)) <= 20  # 8 on average


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 1.5, 2.0]), margin=st.integers(0, 9))
def test_image_and_label_stay_aligned(seed, scale, margin):
    """What an image pixel shows and what the label there names are the same place, to half a px of rounding."""
    crop, side = 32, window(32, GEOMETRY) + margin
    images, labels, counted = augment(*maps(side, 4), uniform(4, seed), crop=crop, scale=scale, config=GEOMETRY)
    model = round(crop * scale)
    assert images.shape == (4, 3, model, model)
    assert labels.shape == counted.shape == (4, crop, crop)
    # The mean of the model pixels that cover an image pixel is what its centre shows
    places = F.interpolate(seen(images), size=(crop, crop), mode="area")
    if scale == 1.5:  # 3 model px cover 2 image px: compare those
        places = F.avg_pool2d(seen(images), 3)
        names = F.avg_pool2d(named(labels, side), 2)
    else:
        names = named(labels, side)
    torch.testing.assert_close(places[..., 1:-1, 1:-1], names[..., 1:-1, 1:-1], atol=0.51, rtol=0)
    assert torch.equal(counted, maps(side)[2].flatten()[labels - 1])


def test_shift_of_a_pixel_would_be_seen():
    """Negative control of the test above."""
    side = window(32, GEOMETRY)
    images, labels, _ = augment(*maps(side, 4), uniform(4), crop=32, scale=1.0, config=GEOMETRY)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        torch.testing.assert_close(seen(images), named(labels, side).roll(1, 2), atol=0.51, rtol=0)


@pytest.mark.parametrize("scale", [1.5, 2.0])
def test_scaled_images_are_those_of_prediction(scale):
    image, labels, counted = pictures(2, 64)
    images, out, _ = augment(image, labels, counted, uniform(2), crop=64, scale=scale, config=NONE)
    expected = F.interpolate(image.float(), scale_factor=scale, mode="bilinear")
    torch.testing.assert_close(images, expected, atol=0.02, rtol=0)
    assert torch.equal(out, labels.long())


@pytest.mark.parametrize("magnification", [0.5, 0.7, 1.0, 1.3, 2.0])
def test_area_of_a_nucleus_goes_with_the_square_of_the_magnification(magnification):
    config = replace(NONE, scale_min=magnification, scale_max=magnification)
    side = window(96, config)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    middle, radius = (side - 1) / 2, 20
    labels = (((y - middle) ** 2 + (x - middle) ** 2) < radius**2).int()[None]
    image = (200 * labels[:, None]).expand(1, 3, -1, -1).to(torch.uint8)
    images, out, _ = augment(image, labels, labels >= 0, torch.full((1, DRAWS), 0.5), crop=96, scale=1.0, config=config)
    expected = math.pi * (radius * magnification) ** 2
    assert out.sum().item() == pytest.approx(expected, rel=0.05)
    assert images[0, 0].sum().item() / 200 == pytest.approx(expected, rel=0.05)


def test_magnification_is_drawn_log_uniformly():
    side = window(32, GEOMETRY)
    images, _, _ = augment(*maps(side, 400), uniform(400), crop=32, scale=1.0, config=GEOMETRY)
    inner = seen(images)[:, :, 2:-2, 2:-2]
    steps = (inner[:, :, 1:, 1:] - inner[:, :, :-1, :-1]).abs().mean((1, 2, 3))  # window px per crop px
    logs = -steps.log()
    low, high = math.log(0.7), math.log(1.3)
    assert low - 0.01 < logs.min() < low + 0.02
    assert high - 0.02 < logs.max() < high + 0.01
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(logs.quantile(quarters), low + (high - low) * quarters, atol=0.05, rtol=0)


def replicated(side: int, crop: int, config: Augment, draws: torch.Tensor) -> float:
    """How far the crop's outermost pixel centres lie outside the window's pixels, px."""
    images, _, _ = augment(*maps(side, len(draws)), draws, crop=crop, scale=1.0, config=config)
    inner = seen(images)[:, :, 4:-4, 4:-4].double()
    n = inner.shape[-1]
    down, right = ((inner[:, :, -1:, :1] - inner[:, :, :1, :1]), (inner[:, :, :1, -1:] - inner[:, :, :1, :1]))
    corners = [inner[:, :, :1, :1] + a / (n - 1) * down + b / (n - 1) * right for a in (-4, n + 3) for b in (-4, n + 3)]
    corners = torch.cat(corners)
    return max(-corners.min().item(), corners.max().item() - (side - 1), 0.0)


@pytest.mark.parametrize("crop", [24, 32, 33])
@pytest.mark.parametrize("limits", [(0.5, 0.5), (0.7, 1.3), (0.9, 1.1), (1.0, 1.0), (1.0, 2.0), (1.2, 1.5)])
def test_window_holds_every_crop(crop, limits):
    config = replace(D4, scale_min=limits[0], scale_max=limits[1])
    extremes = torch.tensor([0.0, 0.5, 1 - 2**-24])
    draws = torch.cartesian_prod(*[extremes] * 6)  # flips, turn, zoom, shifts
    draws = torch.cat([draws, torch.zeros(len(draws), DRAWS - 6)], dim=1)
    side = window(crop, config)
    assert side == math.ceil(crop / min(limits[0], 1))
    # A magnified crop at the window's edge begins within half a px of its first pixel's centre: no further
    assert replicated(side, crop, config, draws) < 0.5
    assert replicated(side - 6, crop, replace(config, scale_max=config.scale_min), draws) > 0.5 or limits[0] > 1


def strong() -> Augment:
    return Augment(stain=0.7, stain_scale=0.5, stain_bias=0.3, blur=0.5, noise=0.5, noise_sigma=30.0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_batch_changes_nothing(scale):
    """An image alone is the image in a batch, bit for bit."""
    side, config = window(64, Augment()), strong()
    batch, draws = pictures(9, side), uniform(9)
    together = augment(*batch, draws, crop=64, scale=scale, config=config)
    order = torch.tensor([5, 0, 7])
    apart = [
        augment(*(t[i : i + 1] for t in batch), draws[i : i + 1], crop=64, scale=scale, config=config) for i in range(9)
    ]
    some = augment(*(t[order] for t in batch), draws[order], crop=64, scale=scale, config=config)
    for k in range(3):
        assert torch.equal(together[k], torch.cat([one[k] for one in apart]))
        assert torch.equal(together[k][order], some[k])
    assert not torch.equal(together[0][0], together[0][1])


def test_same_draws_same_images_and_other_draws_others():
    batch = pictures(4, window(32, strong()))
    first = augment(*batch, uniform(4), crop=32, scale=1.0, config=strong())
    torch.rand(7)  # global random numbers have no part in it
    again = augment(*batch, uniform(4), crop=32, scale=1.0, config=strong())
    other = augment(*batch, uniform(4, seed=9), crop=32, scale=1.0, config=strong())
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], other[0]))


def test_inputs_stay_as_they_were():
    batch, draws = pictures(4, window(32, strong())), uniform(4)
    before = [t.clone() for t in (*batch, draws)]
    augment(*batch, draws, crop=32, scale=1.0, config=strong())
    assert all(torch.equal(a, b) for a, b in zip(before, (*batch, draws)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0, 250]), high=st.sampled_from([2, 256]))
def test_values_are_grey_levels(seed, low, high):
    image, labels, counted = pictures(4, window(32, strong()), low, max(low + 1, high), seed)
    images, _, _ = augment(image, labels, counted, uniform(4, seed), crop=32, scale=1.0, config=strong())
    assert images.isfinite().all()
    assert 0 <= images.min() <= images.max() <= 255


# Stain


def density(images: torch.Tensor) -> torch.Tensor:
    return -torch.log((images.double() + 1) / 256)


def flat(colour: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image = (256 * torch.exp(-colour) - 1).round().to(torch.uint8).view(1, 3, 1, 1).expand(images, 3, 32, 32)
    labels = torch.zeros(images, 32, 32, dtype=torch.int32)
    return image, labels, labels == 0


def test_stain_without_factors_is_the_identity():
    image, labels, counted = pictures(3, 32)
    config = replace(NONE, stain=1.0, stain_scale=0.0, stain_bias=0.0)
    images, _, _ = augment(image, labels, counted, uniform(3), crop=32, scale=1.0, config=config)
    torch.testing.assert_close(images, image.float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("stain", [HAEMATOXYLIN, EOSIN])
def test_a_pure_stain_is_only_scaled(stain):
    """Beer and Lambert: all three densities by one factor, within 1 -+ stain_scale."""
    config = replace(NONE, stain=1.0, stain_scale=0.3, stain_bias=0.0)
    batch = flat(0.8 * stain, 50)
    images, _, _ = augment(*batch, uniform(50), crop=32, scale=1.0, config=config)
    before, after = density(batch[0][:, :, 0, 0]), density(images[:, :, 0, 0])
    factor = (before * after).sum(1) / before.square().sum(1)
    torch.testing.assert_close(after, factor[:, None] * before, atol=0.02, rtol=0)  # the uint8 colour is rounded
    assert 0.69 < factor.min() < 0.8
    assert 1.2 < factor.max() < 1.31


def test_two_stains_are_scaled_apart():
    config = replace(NONE, stain=1.0, stain_scale=0.3, stain_bias=0.0)
    images, _, _ = augment(*flat(0.6 * HAEMATOXYLIN + 0.6 * EOSIN, 50), uniform(50), crop=32, scale=1.0, config=config)
    stains = torch.stack([HAEMATOXYLIN, EOSIN], 1).double()
    amounts = torch.linalg.lstsq(stains, density(images[:, :, 0, 0]).T).solution / 0.6
    assert ((amounts > 0.67) & (amounts < 1.33)).all()
    assert torch.corrcoef(amounts)[0, 1].abs() < 0.5


def test_bias_adds_one_density_everywhere():
    config = replace(NONE, stain=1.0, stain_scale=0.0, stain_bias=0.1)
    image, labels, counted = pictures(20, 32, 60, 180)
    images, _, _ = augment(image, labels, counted, uniform(20), crop=32, scale=1.0, config=config)
    added = density(images) - density(image)
    mean = added.mean((2, 3), keepdim=True)
    torch.testing.assert_close(added, mean.expand_as(added), atol=1e-3, rtol=0)
    assert 0.02 < mean.abs().max() < 0.1 * (0.70 + 0.99 + 0.57)
    assert (mean.flatten(1).std(0) > 0.01).all()


# Blur and noise: chosen images only


@pytest.mark.parametrize("name", ["stain", "blur", "noise"])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probability_chooses_images(name, probability):
    image, labels, counted = pictures(200, 24, 60, 180)
    config = replace(Augment(d4=False, scale_min=1, scale_max=1, stain=0, blur=0, noise=0), **{name: probability})
    if name == "blur":
        config = replace(config, blur_sigma=3.0)
    images, out, kept = augment(image, labels, counted, uniform(200), crop=24, scale=1.0, config=config)
    change = (images - image.float()).abs().amax((1, 2, 3))
    changed = change > 0.02
    assert changed.float().mean().item() == pytest.approx(probability, abs=0.12)
    assert torch.equal(out, labels.long())
    assert torch.equal(kept, counted)


def test_blur_is_a_gaussian_mean():
    image, labels, counted = pictures(30, 48, 0, 256)
    config = replace(NONE, blur=1.0, blur_sigma=2.0)
    images, _, _ = augment(image, labels, counted, uniform(30), crop=48, scale=1.0, config=config)
    before, after = image.float()[..., 8:-8, 8:-8], images[..., 8:-8, 8:-8]
    torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)), atol=6.0, rtol=0)
    kept = (after.std((2, 3)) / before.std((2, 3))).mean(1)  # of white noise: 1 / (2 sigma sqrt(pi))
    assert kept.min().item() == pytest.approx(1 / (2 * 2.0 * math.sqrt(math.pi)), rel=0.25)
    assert (kept < 1.01).all()
    constant = torch.full_like(image, 77)
    images, _, _ = augment(constant, labels, counted, uniform(30), crop=48, scale=1.0, config=config)
    torch.testing.assert_close(images, constant.float(), atol=0.01, rtol=0)


def test_noise_has_the_asked_size_and_is_new_in_each_image():
    labels = torch.zeros(60, 48, 48, dtype=torch.int32)
    image = torch.full((60, 3, 48, 48), 128, dtype=torch.uint8)
    config = replace(NONE, noise=1.0, noise_sigma=20.0)
    images, _, _ = augment(image, labels, labels == 0, uniform(60), crop=48, scale=1.0, config=config)
    noise = (images - 128).flatten(1)
    size = noise.std(1)
    assert 0 < size.min() < 2
    assert 18 < size.max() < 20.5
    assert (noise.mean(1).abs() < 4 * size / math.sqrt(noise.shape[1]) + 1e-3).all()
    alike = torch.corrcoef(noise) - torch.eye(60)
    assert alike.abs().max() < 0.1
    channels = torch.corrcoef(images[size.argmax()].flatten(1)) - torch.eye(3)
    assert channels.abs().max() < 0.1


def test_data_set_draws_as_many_numbers_as_the_augmentation_reads():
    from nucsam import augment, data

    assert data.DRAWS == augment.DRAWS
