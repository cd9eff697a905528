"""H&E-like images with exact nucleus labels, for the quickstart and the tests.

Everything is painted as stain concentrations and turned into colour by the Beer-Lambert law, with stain
vectors and strengths drawn per image. Labels do not follow from brightness: red blood cells are dark and no
nuclei, some nuclei are paler than the stroma, and some touch or overlap.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

# Optical density of hematoxylin and eosin in red, green and blue (the reference of Macenko et al. 2009)
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])

KINDS = ("tissue images", "label masks modify", "vague areas/mask binary")

# organ: (nuclei per 100x100 px, mean radius in px, share of the area that is empty glass)
ORGANS = {
    "human bladder": (8.0, 8.0, 0.10),
    "human kidney": (11.0, 7.5, 0.15),
    "human salivory gland": (7.0, 9.0, 0.05),
    "mouse fat (white and brown)_subscapula": (3.0, 6.5, 0.45),
    "mouse liver": (4.5, 11.0, 0.03),
    "mouse spleen": (16.0, 6.0, 0.02),
}


def _field(rng: np.random.Generator, size: int, sigma: float | tuple[float, float]) -> np.ndarray:
    """Smooth noise (size, size) with mean 0 and standard deviation 1."""
    field = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return (field - field.mean()) / field.std()


def _shape(rng: np.random.Generator, size: int, centre: np.ndarray, radius: float, rough: float) -> tuple:
    """A window of the image and, at its pixels, the distance to the centre in units of an irregular
    ellipse."""
    low = np.clip(np.floor(centre - 2 * radius), 0, size - 1).astype(int)
    high = np.clip(np.ceil(centre + 2 * radius), 1, size).astype(int)
    window = tuple(map(slice, low, high))
    y, x = np.mgrid[window] - centre[:, None, None]
    turn, long = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1, 1.9))
    u, v = (np.cos(turn) * x + np.sin(turn) * y) / long, (np.cos(turn) * y - np.sin(turn) * x) * long
    angle = np.arctan2(v, u)
    edge = 1 + sum(rng.normal(0, rough) * np.cos(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5))
    return window, np.hypot(u, v) / (radius * edge)


def _stroma(rng: np.random.Generator, size: int, glass: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concentrations of hematoxylin and eosin without nuclei, and a mask of the tissue."""
    y, x = np.mgrid[:size, :size]
    turn, spacing = rng.uniform(0, np.pi), rng.uniform(5, 11)
    phase = (np.cos(turn) * x + np.sin(turn) * y) / spacing + 1.8 * _field(rng, size, 22)
    fibres = np.sin(2 * phase + 0.8 * _field(rng, size, 4)) * (0.6 + 0.4 * _field(rng, size, 10))
    eosin = 0.40 + 0.07 * fibres + 0.08 * _field(rng, size, 14) + 0.05 * _field(rng, size, 2)
    hematoxylin = rng.uniform(0.08, 0.2) + 0.05 * _field(rng, size, 12) + 0.03 * _field(rng, size, 2.5)
    holes = _field(rng, size, 14)
    tissue = holes < np.quantile(holes, 1 - glass)
    eosin[~tissue], hematoxylin[~tissue] = 0.03, 0.01
    return hematoxylin.clip(0), eosin.clip(0.02), tissue


def _distractors(rng: np.random.Generator, hematoxylin, eosin, tissue) -> None:
    size = len(tissue)
    for _ in range(rng.poisson(1.2 * size**2 / 1e4)):  # red blood cells
        window, away = _shape(rng, size, rng.uniform(0, size, 2), rng.uniform(4, 6), 0.03)
        cell = away < 1
        eosin[window][cell] = 0.9 + 0.35 * away[cell] ** 2
        hematoxylin[window][cell] = 0.12
    for _ in range(rng.poisson(2.5 * size**2 / 1e4)):  # pale blobs: mucin, cytoplasm, nuclei far out of focus
        window, away = _shape(rng, size, rng.uniform(0, size, 2), rng.uniform(6, 16), 0.1)
        hematoxylin[window] += rng.uniform(0.1, 0.4) * np.exp(-((away / 0.8) ** 4)) * tissue[window]


def _vague_area(rng: np.random.Generator, hematoxylin, label, vague, radius: float, tone: float) -> None:
    size, blurred = len(label), np.zeros(label.shape)
    middle, reach = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.08, 0.16) * size
    window, away = _shape(rng, size, middle, reach, 0.05)
    vague[window] = away < 1
    for _ in range(rng.integers(3, 7)):
        part, near = _shape(rng, size, middle + rng.uniform(-0.5, 0.5, 2) * reach, radius, 0.05)
        blurred[part] = np.maximum(blurred[part], tone * (near < 1))
    hematoxylin += gaussian_filter(blurred, 2.5) * vague * (label == 0)


def make_image(size: int, seed: int | Sequence[int], *, organ: str = "human bladder") -> tuple[np.ndarray, ...]:
    """An image uint8 (size, size, 3), its label int32 (size, size) and its vague areas bool (size, size).

    Nuclei are 8 to 40 px across; where two overlap, the later covers the earlier. Ids may have gaps. Vague
    areas hold blurred nuclei without a label. About one image in twenty has no nuclei.
    """
    rng = np.random.default_rng(seed)
    density, mean_radius, glass = ORGANS[organ]
    hematoxylin, eosin, tissue = _stroma(rng, size, glass)
    label, vague = np.zeros((size, size), np.int32), np.zeros((size, size), bool)
    chromatin = 1 + 0.16 * _field(rng, size, 1.2) + 0.14 * _field(rng, size, 2.5)

    _distractors(rng, hematoxylin, eosin, tissue)
    count = 0 if rng.random() < 0.05 else rng.poisson(density * rng.uniform(0.6, 1.4) * size**2 / 1e4)
    placed: list[tuple[np.ndarray, float]] = []
    strength, contrast = rng.uniform(0.65, 1.2), rng.uniform(0.15, 0.4)
    for _ in range(count):
        radius = float(np.clip(mean_radius * rng.lognormal(0, 0.25), 4, 14))
        centre = rng.uniform(0, size, 2)
        if placed and rng.random() < 0.45:  # beside another, to touch or overlap it
            other, reach = placed[rng.integers(len(placed))]
            turn, reach = rng.uniform(0, 2 * np.pi), (reach + radius) * rng.uniform(0.75, 1.05)
            centre = other + reach * np.array([np.sin(turn), np.cos(turn)])
        window, away = _shape(rng, size, centre, radius, 0.05)
        inside = away < 1
        if inside.sum() < 40 or (label[window][inside] > 0).mean() > 0.25 or not tissue[window][inside].any():
            continue
        placed.append((centre, radius))
        label[window][inside] = len(placed)
        tone = strength * rng.lognormal(0, contrast)
        rim = 1 + rng.uniform(-0.1, 0.5) * (away[inside] ** 4 - 0.35)  # open chromatin has a dark membrane
        hematoxylin[window][inside] = tone * rim * chromatin[window][inside]
        eosin[window][inside] = rng.uniform(0.1, 0.35)
        for _ in range(rng.integers(0, 3)):  # nucleoli
            spot = centre + rng.uniform(-0.4, 0.4, 2) * radius
            part, near = _shape(rng, size, spot, 0.16 * radius + 0.5, 0)
            hematoxylin[part] += 0.35 * tone * (near < 1) * (label[part] == len(placed))

    if rng.random() < 0.35:
        _vague_area(rng, hematoxylin, label, vague, mean_radius, 0.5 * strength)
    stains = STAINS * rng.uniform(0.9, 1.1, STAINS.shape) * rng.uniform(0.75, 1.25, (2, 1))
    sharp = rng.uniform(0.5, 1.1)
    density_map = gaussian_filter(np.stack([hematoxylin, eosin], -1), (sharp, sharp, 0)) @ stains
    image = rng.uniform(232, 250) * rng.uniform(0.98, 1.0, 3) * np.exp(-1.15 * density_map)
    image += rng.normal(0, rng.uniform(1.5, 5), image.shape)
    return image.clip(0, 255).round().astype(np.uint8), label, vague


def write_dataset(out: str | Path, *, images: int, size: int, seed: int) -> None:
    """Writes `images` images in NuInsSeg's layout into the folder `out`, the organs of ORGANS in turn.

    The same arguments give the same pixels. Ids have gaps, as in the original. `out` appears whole or not at
    all. Raises ValueError if `out` is there and not an empty folder.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: found files there, expected a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synth-", dir=out.parent) as partial:
        root = Path(partial) / "data"
        root.mkdir()
        for number in range(images):
            organ = list(ORGANS)[number % len(ORGANS)]
            image, label, vague = make_image(size, (seed, number), organ=organ)
            steps = np.random.default_rng((seed, number, 1)).integers(1, 4, label.max() + 1)
            ids = (np.cumsum(steps) - steps[0]).astype(np.uint16)
            name = f"{organ.split(' (')[0].replace(' ', '_')}_{number // len(ORGANS) + 1}"
            folders = [root / organ / kind for kind in KINDS]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folders[0] / f"{name}.png")
            tifffile.imwrite(folders[1] / f"{name}.tif", ids[label], compression="zlib")
            Image.fromarray(vague.astype(np.uint8) * 255).save(folders[2] / f"{name}.png")
        root.replace(out)
