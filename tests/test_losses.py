"""Losses: values by hand, uncounted pixels without influence, and images that do not mix."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucsam.model import losses

log = math.log
ALL = torch.ones(1, 2, 2, dtype=torch.bool)
# One 2 x 2 image: hits 0.5 + 0.25, all probability 1.75, two true pixels.
PROBABILITY = torch.tensor([[[0.5, 0.25], [1.0, 0.0]]])
FOREGROUND = torch.tensor([[[True, True], [False, False]]])
HALF = torch.tensor([[[True, False], [True, False]]])  # counts 0.5 (true) and 1.0 (false) of it


def close(loss: Tensor, expected: float) -> None:
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx([expected], rel=1e-5, abs=1e-7)


# Values by hand


def test_cross_entropy():
    # softmax of (0, 0, log 2) is (1/4, 1/4, 1/2)
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 2] = log(2)
    classes = torch.tensor([[[0, 1], [2, 2]]])
    weights = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    close(losses.cross_entropy(logits, classes, ALL), (2 * log(4) + 2 * log(2)) / 4)
    close(losses.cross_entropy(logits, classes, weights), (4 * log(4) + 4 * log(2)) / 8)
    close(losses.cross_entropy(logits, classes, HALF * weights), (log(4) + 2 * log(2)) / 3)


def test_focal_cross_entropy():
    # softmax of (0, 0, log 2) is (1/4, 1/4, 1/2)
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 2] = log(2)
    classes = torch.tensor([[[0, 1], [2, 2]]])
    expected = (2 * log(4) * (3 / 4) ** 2 + 2 * log(2) * (1 / 2) ** 2) / 4
    close(losses.cross_entropy(logits, classes, ALL, focal=2.0), expected)


def test_binary_cross_entropy():
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2
    logits = torch.tensor([[[log(3), log(3)], [0.0, 0.0]]])
    truth = torch.tensor([[[True, False], [True, False]]])
    close(losses.binary_cross_entropy(logits, truth, ALL), (log(4 / 3) + log(4) + 2 * log(2)) / 4)
    close(losses.binary_cross_entropy(logits, truth, HALF), (log(4 / 3) + log(2)) / 2)


def test_dice():
    close(losses.dice(PROBABILITY, FOREGROUND, ALL), 1 - (2 * 0.75 + 1) / (1.75 + 2 + 1))
    close(losses.dice(PROBABILITY, FOREGROUND, HALF), 1 - (2 * 0.5 + 1) / (1.5 + 1 + 1))
    close(losses.dice(FOREGROUND.float(), FOREGROUND, ALL), 0.0)
    close(losses.dice((~FOREGROUND).float(), FOREGROUND, ALL), 1 - 1 / 5)


def test_focal_tversky():
    cellvit = {"alpha": 0.7, "beta": 0.3}
    # All pixels: hits 0.75, missed 1.25, false 1. The counted half: 0.5, 0.5 and 1.
    tversky = 1.75 / (0.75 + 0.7 * 1.25 + 0.3 * 1 + 1)
    close(losses.focal_tversky(PROBABILITY, FOREGROUND, ALL, **cellvit), (1 - tversky) ** 0.75)
    tversky = 1.5 / (0.5 + 0.7 * 0.5 + 0.3 * 1 + 1)
    close(losses.focal_tversky(PROBABILITY, FOREGROUND, HALF, **cellvit), (1 - tversky) ** 0.75)
    # Two missed pixels, two false ones.
    missed = losses.focal_tversky(0 * PROBABILITY, FOREGROUND, ALL, **cellvit)
    false = losses.focal_tversky(FOREGROUND.float(), ~ALL, ALL, **cellvit)
    close(missed, (1 - 1 / 2.4) ** 0.75)
    close(false, (1 - 1 / 1.6) ** 0.75)
    # With equal weights and gamma 1 it is the Dice loss, but for the smoothing.
    dice = losses.focal_tversky(PROBABILITY, FOREGROUND, ALL, alpha=0.5, beta=0.5, gamma=1.0)
    close(dice, 1 - (2 * 0.75 + 2) / (1.75 + 2 + 2))


def test_lovasz():
    # Errors of all pixels: 1 (false), 0.75 and 0.5 (missed), 0. The Jaccard losses where the
    # first, two, three are wrong: 1 - 2/3, 1 - 1/3, 1. Of the counted half: 1 and 0.5.
    close(losses.lovasz(PROBABILITY, FOREGROUND, ALL), 1 / 3 * 1 + 1 / 3 * 0.75 + 1 / 3 * 0.5)
    close(losses.lovasz(PROBABILITY, FOREGROUND, HALF), 1 / 2 * 1 + 1 / 2 * 0.5)
    close(losses.lovasz(FOREGROUND.float(), FOREGROUND, ALL), 0.0)
    weights = torch.tensor([[[1.0, 1.0], [0.5, 1.0]]])  # errors 0.75, 0.5 and 0.5 of a false one
    expected = 1 / 2 * 0.75 + 1 / 2 * 0.5
    close(losses.lovasz(PROBABILITY, FOREGROUND, weights), expected)
    # Of maps in 0/1 it is the Jaccard loss: one hit, one missed, one false.
    sure = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    close(losses.lovasz(sure, FOREGROUND, ALL), 1 - 1 / 3)


def test_absolute_is_a_mean_by_weight():
    maps = torch.tensor([[[0.5, 4.0], [0.0, -3.0]]])
    targets, weights = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 1.0], [0.0, 2.0]]])
    close(losses.absolute(maps, targets, ALL.float()), (0.5 + 4 + 0 + 3) / 4)
    close(losses.absolute(maps, targets, HALF.float()), (0.5 + 0) / 2)
    close(losses.absolute(maps + 7, targets + 7, weights), (1.5 + 4 + 6) / 6)


# Every loss, of raw maps (B, 4, H, W), truth (B, H, W) in 0, 1, 2, and counted (B, H, W)

LOSSES = {
    "cross_entropy": lambda maps, truth, counted: losses.cross_entropy(
        maps[:, :3], truth, counted * torch.where(truth == 2, 2.0, 1.0)
    ),
    "binary_cross_entropy": lambda maps, truth, counted: losses.binary_cross_entropy(
        maps[:, 0], truth > 0, counted
    ),
    "dice": lambda maps, truth, counted: losses.dice(maps[:, 0].sigmoid(), truth > 0, counted),
    "focal_tversky": lambda maps, truth, counted: losses.focal_tversky(
        maps[:, 0].sigmoid(), truth > 0, counted, alpha=0.7, beta=0.3
    ),
    "focal_cross_entropy": lambda maps, truth, counted: losses.cross_entropy(
        maps[:, :3], truth, counted.float(), focal=2.0
    ),
    "lovasz": lambda maps, truth, counted: losses.lovasz(maps[:, 0].sigmoid(), truth > 0, counted),
    "absolute": lambda maps, truth, counted: losses.absolute(
        maps[:, 3].sigmoid(), truth / 2, counted * torch.where(truth > 0, 3.0, 1.0)
    ),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
seeds = st.integers(0, 10**6)


def batch(seed: int, images: int = 3, side: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = 2 * torch.randn(images, 4, side, side, generator=generator)
    truth = torch.randint(0, 3, (images, side, side), generator=generator)
    counted = torch.rand(images, side, side, generator=generator) < 0.7
    return maps.requires_grad_(), truth, counted


@each_loss
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_only_counted_pixels_have_influence(loss, seed):
    maps, truth, counted = batch(seed)
    other, other_truth, _ = batch(seed + 1)
    changed = torch.where(counted[:, None], maps, other).detach().requires_grad_()
    changed_truth = torch.where(counted, truth, other_truth)
    values, same = loss(maps, truth, counted), loss(changed, changed_truth, counted)
    assert values.shape == (3,)
    assert torch.equal(values, same)
    values.sum().backward()
    same.sum().backward()
    assert torch.equal(maps.grad, changed.grad)
    influential = maps.grad.ne(0).any(1)
    if loss is LOSSES["lovasz"]:  # pixels of less error than all missed ones have none
        assert influential.any() and not influential[~counted].any()
    else:
        assert torch.equal(influential, counted)
    everywhere = torch.ones_like(counted)  # negative control
    assert (loss(maps, truth, everywhere) != loss(changed, changed_truth, everywhere)).any()


@each_loss
def test_an_image_without_counted_pixels_is_zero(loss):
    maps, truth, counted = batch(1)
    counted[1] = False
    values = loss(maps, truth, counted)
    assert values[1].item() == pytest.approx(0, abs=1e-4)  # the focal power keeps its floor
    assert values[0] > 0.01 < values[2]
    values.sum().backward()
    assert maps.grad.isfinite().all()
    assert maps.grad[1].eq(0).all()
    assert maps.grad[0].ne(0).any()


def _focal(probability: Tensor) -> float:
    """Mean focal loss of power 2 of pixels whose true class has these probabilities."""
    return (-((1 - probability) ** 2) * probability.log()).mean().item()


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_nuclei(name):
    maps, truth, counted = batch(2)
    truth[1] = 0
    counted[1] = True
    values = LOSSES[name](maps, truth, counted)
    values.sum().backward()
    p = maps[1, 0].detach().sigmoid().sum().item()
    expected = {
        "cross_entropy": -maps[1, :3].log_softmax(0)[0].mean().item(),
        "binary_cross_entropy": F.softplus(maps[1, 0]).mean().item(),
        "dice": p / (p + 1),
        "focal_cross_entropy": _focal(maps[1, :3].detach().softmax(0)[0]),
        "lovasz": maps[1, 0].sigmoid().max().item(),
        "focal_tversky": (0.3 * p / (0.3 * p + 1)) ** 0.75,
        "absolute": maps[1, 3].sigmoid().mean().item(),
    }
    assert values[1].item() == pytest.approx(expected[name], rel=1e-5)
    assert values.isfinite().all() and maps.grad.isfinite().all()
    assert maps.grad[1].ne(0).any()


@each_loss
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_sure_predictions_are_finite(loss, size):
    """Also a perfect one, at which the focal power has no gradient."""
    maps, truth, counted = batch(3)
    for t in (truth, torch.zeros_like(truth), torch.ones_like(truth)):
        sure = torch.full_like(maps, size).requires_grad_()
        values = loss(sure, t, counted)
        values.sum().backward()
        assert values.isfinite().all()
        assert sure.grad.isfinite().all()


@each_loss
@settings(max_examples=15, deadline=None)
@given(seed=seeds, cut=st.integers(1, 3))
def test_a_batch_equals_its_parts(loss, seed, cut):
    """N processes equal one process with the N-fold batch."""
    maps, truth, counted = batch(seed, images=4)
    counted[0, :4] = False  # images with very different counts of pixels
    whole = loss(maps, truth, counted)
    halves = [loss(maps[s], truth[s], counted[s]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(whole, torch.cat(halves))
    (gradient,) = torch.autograd.grad(whole.mean(), maps)
    (expected,) = torch.autograd.grad(sum(half.sum() / 4 for half in halves), maps)
    torch.testing.assert_close(gradient, expected)


@each_loss
def test_half_precision_sums_do_not_overflow(loss):
    """A 512 x 512 image has more pixels than float16 has numbers."""
    maps, truth, counted = batch(4, images=1, side=512)
    half, expected = loss(maps.half(), truth, counted), loss(maps, truth, counted)
    torch.testing.assert_close(half, expected, rtol=2e-3, atol=0, check_dtype=False)
