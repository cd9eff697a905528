"""H&E-like images with exact nucleus labels, for the quickstart and the tests.

Concentrations of the two stains are painted and turned into colour by the Beer-Lambert law; stain
vectors and strengths are drawn per image. Brightness does not give the labels away: red blood cells
are dark, some nuclei are paler than the stroma, and some touch or overlap.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from nucsam.data.draw import write_png
from nucsam.data.images import write_label
from nucsam.data.samples import MIN_SIDE
from nucsam.errors import UserError
from nucsam.files import make_folder

# Optical density of hematoxylin and eosin in R, G, B (the reference of Macenko et al. 2009)
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


def write_dataset(out: str | Path, *, images: int, size: int, seed: int) -> None:
    """Write a data set in NuInsSeg's layout, with the organs of ORGANS in turn.

    The same arguments give the same pixels. Ids have gaps, as in the original.

    Args:
        out: a new folder, which appears whole or not at all, or an empty one.
        images: number of images, at least 1.
        size: side of an image, at least MIN_SIDE px.
        seed: any integer >= 0.

    Raises:
        UserError: a number is out of range, or `out` is a file, or a folder that is not empty.
    """
    for name, value, least in (("images", images, 1), ("size", size, MIN_SIDE), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name}: found {value}, expected at least {least}")
    out = Path(out)
    empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not empty:
        raise UserError(f"{out}: found files there, expected a new or empty folder")
    make_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=".synth-", dir=out if empty else out.parent) as partial:
        root = Path(partial) / "data"
        root.mkdir()
        for number in range(images):
            organ = list(ORGANS)[number % len(ORGANS)]
            name = f"{organ.split(' (')[0].replace(' ', '_')}_{number // len(ORGANS) + 1}"
            image, label, vague = make_image(size, (seed, number), organ=organ)
            steps = np.random.default_rng((seed, number, 1)).integers(1, 4, label.max() + 1)
            ids = np.cumsum(steps) - steps[0]
            folders = [root / organ / kind for kind in KINDS]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            write_png(folders[0] / f"{name}.png", image)
            write_label(folders[1] / f"{name}.tif", ids[label])
            write_png(folders[2] / f"{name}.png", vague.astype(np.uint8) * 255)
        if empty:  # it stays, because it may be where a shell is
            for folder in root.iterdir():
                folder.replace(out / folder.name)
        else:
            root.replace(out)


def make_image(size: int, seed: int | Sequence[int], *, organ: str) -> tuple[np.ndarray, ...]:
    """Make an image with its label and vague areas.

    Nuclei are 8 to 40 px across; where two overlap, the later covers the earlier. About one image
    in twenty has none. Vague areas hold blurred nuclei without a label.

    Args:
        size: side of the image, px.
        seed: as in `numpy.random.default_rng`.
        organ: a key of ORGANS.

    Returns:
        image uint8, label int32 with possible gaps, vague bool: all (size, size), image with RGB.
    """
    rng = np.random.default_rng(seed)
    density, radius, glass = ORGANS[organ]
    tissue = _Tissue(size, rng, glass)
    tissue.add_distractors()
    count = 0
    if rng.random() >= 0.05:
        count = rng.poisson(density * rng.uniform(0.6, 1.4) * size**2 / 1e4)
    strength, contrast = rng.uniform(0.65, 1.2), rng.uniform(0.15, 0.4)
    for _ in range(count):
        tissue.add_nucleus(radius, strength, contrast)
    if rng.random() < 0.35:
        tissue.add_vague_area(radius, 0.5 * strength)
    return tissue.colours(), tissue.label, tissue.vague


class _Tissue:
    """A square of tissue as concentrations of hematoxylin and eosin, with its nuclei.

    Every draw comes from one generator, so that the order of the calls is part of the seed.
    """

    def __init__(self, size: int, rng: np.random.Generator, glass: float) -> None:
        """Paint the stroma, with empty glass on a share `glass` of the area."""
        self.size = size
        self.rng = rng
        self.label = np.zeros((size, size), np.int32)
        self.vague = np.zeros((size, size), bool)
        self.placed: list[tuple[np.ndarray, float]] = []  # centre and radius of each nucleus
        y, x = np.mgrid[:size, :size]
        turn, spacing = rng.uniform(0, np.pi), rng.uniform(5, 11)
        phase = (np.cos(turn) * x + np.sin(turn) * y) / spacing + 1.8 * self.noise(22)
        fibres = np.sin(2 * phase + 0.8 * self.noise(4)) * (0.6 + 0.4 * self.noise(10))
        eosin = 0.40 + 0.07 * fibres + 0.08 * self.noise(14) + 0.05 * self.noise(2)
        hematoxylin = rng.uniform(0.08, 0.2) + 0.05 * self.noise(12) + 0.03 * self.noise(2.5)
        holes = self.noise(14)
        self.solid = holes < np.quantile(holes, 1 - glass)
        self.eosin = np.where(self.solid, eosin, 0.03).clip(0.02)
        self.hematoxylin = np.where(self.solid, hematoxylin, 0.01).clip(0)
        self.chromatin = 1 + 0.16 * self.noise(1.2) + 0.14 * self.noise(2.5)

    def noise(self, sigma: float) -> np.ndarray:
        """Smooth noise (size, size) of mean 0 and standard deviation 1."""
        field = gaussian_filter(self.rng.standard_normal(self.label.shape), sigma, mode="wrap")
        return (field - field.mean()) / field.std()

    def blob(self, centre: np.ndarray, radius: float, rough: float) -> tuple:
        """A window of the image, and its pixels' distance from the centre: 1 on the blob's edge."""
        rng = self.rng
        low = np.clip(np.floor(centre - 2 * radius), 0, self.size - 1).astype(int)
        high = np.clip(np.ceil(centre + 2 * radius), 1, self.size).astype(int)
        window = tuple(map(slice, low, high))
        y, x = np.mgrid[window] - centre[:, None, None]
        turn, long = rng.uniform(0, np.pi), np.sqrt(rng.uniform(1, 1.9))
        u = (np.cos(turn) * x + np.sin(turn) * y) / long
        v = (np.cos(turn) * y - np.sin(turn) * x) * long
        angle = np.arctan2(v, u)
        waves = [rng.normal(0, rough) * np.cos(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5)]
        return window, np.hypot(u, v) / (radius * (1 + sum(waves)))

    def add_distractors(self) -> None:
        """Add red blood cells, and pale blobs like mucin, cytoplasm and nuclei out of focus."""
        rng, size = self.rng, self.size
        for _ in range(rng.poisson(1.2 * size**2 / 1e4)):
            window, away = self.blob(rng.uniform(0, size, 2), rng.uniform(4, 6), 0.03)
            cell = away < 1
            self.eosin[window][cell] = 0.9 + 0.35 * away[cell] ** 2
            self.hematoxylin[window][cell] = 0.12
        for _ in range(rng.poisson(2.5 * size**2 / 1e4)):
            window, away = self.blob(rng.uniform(0, size, 2), rng.uniform(6, 16), 0.1)
            amount = rng.uniform(0.1, 0.4) * np.exp(-((away / 0.8) ** 4))
            self.hematoxylin[window] += amount * self.solid[window]

    def add_nucleus(self, mean_radius: float, strength: float, contrast: float) -> None:
        """Add a nucleus, unless it is cut small, covers much of others, or lies on glass."""
        radius = float(np.clip(mean_radius * self.rng.lognormal(0, 0.25), 4, 14))
        centre = self.rng.uniform(0, self.size, 2)
        if self.placed and self.rng.random() < 0.45:  # beside another, to touch or overlap it
            neighbour, reach = self.placed[self.rng.integers(len(self.placed))]
            turn = self.rng.uniform(0, 2 * np.pi)
            reach = (reach + radius) * self.rng.uniform(0.75, 1.05)
            centre = neighbour + reach * np.array([np.sin(turn), np.cos(turn)])
        window, away = self.blob(centre, radius, 0.05)
        inside = away < 1
        covered = self.label[window][inside] > 0
        if len(covered) < 40 or covered.mean() > 0.25 or not self.solid[window][inside].any():
            return
        self.placed.append((centre, radius))
        self.label[window][inside] = len(self.placed)
        tone = strength * self.rng.lognormal(0, contrast)
        rim = 1 + self.rng.uniform(-0.1, 0.5) * (away[inside] ** 4 - 0.35)  # a dark membrane
        self.hematoxylin[window][inside] = tone * rim * self.chromatin[window][inside]
        self.eosin[window][inside] = self.rng.uniform(0.1, 0.35)
        for _ in range(self.rng.integers(0, 3)):
            spot = centre + self.rng.uniform(-0.4, 0.4, 2) * radius
            part, near = self.blob(spot, 0.16 * radius + 0.5, 0)
            nucleolus = (near < 1) * (self.label[part] == len(self.placed))
            self.hematoxylin[part] += 0.35 * tone * nucleolus

    def add_vague_area(self, radius: float, tone: float) -> None:
        """Add a vague area with blurred nuclei, which have no label."""
        rng, size = self.rng, self.size
        centre = rng.uniform(0.2, 0.8, 2) * size
        reach = rng.uniform(0.08, 0.16) * size
        window, away = self.blob(centre, reach, 0.05)
        self.vague[window] = away < 1
        blurred = np.zeros((size, size))
        for _ in range(rng.integers(3, 7)):
            part, near = self.blob(centre + rng.uniform(-0.5, 0.5, 2) * reach, radius, 0.05)
            blurred[part] = np.maximum(blurred[part], tone * (near < 1))
        self.hematoxylin += gaussian_filter(blurred, 2.5) * self.vague * (self.label == 0)

    def colours(self) -> np.ndarray:
        """The image uint8 (size, size, 3), by the Beer-Lambert law, with camera noise."""
        rng = self.rng
        stains = STAINS * rng.uniform(0.9, 1.1, STAINS.shape) * rng.uniform(0.75, 1.25, (2, 1))
        blur = rng.uniform(0.5, 1.1)
        amounts = np.stack([self.hematoxylin, self.eosin], -1)
        density = gaussian_filter(amounts, (blur, blur, 0)) @ stains
        image = rng.uniform(232, 250) * rng.uniform(0.98, 1.0, 3) * np.exp(-1.15 * density)
        image += rng.normal(0, rng.uniform(1.5, 5), image.shape)
        return image.clip(0, 255).round().astype(np.uint8)
