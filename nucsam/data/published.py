"""Public data sets as they are published: where their files lie, and how to read what is special.

nuinsseg:  ORGAN/tissue images, ORGAN/label masks modify           (doi 10.1038/s41597-024-03117-2)
pannuke:   Fold 1/images/fold1/images.npy, Fold 1/masks/fold1/masks.npy         (arXiv 2003.10778)
monuseg:   Tissue Images/NAME.tif, Annotations/NAME.xml          (doi 10.1109/TMI.2019.2947628)
consep:    Train/Images/NAME.png, Train/Labels/NAME.mat        (doi 10.1016/j.media.2019.101563)
lizard:    Lizard_Images1/NAME.png, Lizard_Labels/Labels/NAME.mat              (arXiv 2108.11195)
cryonuseg: tissue images/NAME.tif, Annotator 1 (biologist)/label masks modify/NAME.tif
                                                       (doi 10.1016/j.compbiomed.2021.104349)
tnbc:      Slide_01/NAME.png, GT_01/NAME.png                 (doi 10.1109/TMI.2018.2865709)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nucsam.data.slides import check_size
from nucsam.errors import UserError, reading

# Folders below one that has images, as regular expressions. A sub-folder with a digit in its name
# is a patient: no split separates its images. Any other sub-folder is an organ.
KINDS = "images?|labels?|masks?|annotations?|vague"
ORGAN = rf"(?P<organ>(?!(?:{KINDS})$)\D+)"
PATIENT = r"(?P<group>.*\d.*)"


@dataclass(frozen=True)
class Layout:
    """Where a data set has its folders, as regular expressions of their paths below its root.

    Folders of images, labels and vague areas whose groups `organ` and `group` are equal belong
    together. Case does not matter.

    Args:
        images, labels, vague: the folders, the best first.
        suffixes: of the labels; empty: every kind that nucsam reads.
        ranked: take the label of the best folder. Else a label map and an outline are a problem.
        organ: regular expression on the stem whose first group is the organ.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    vague: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    ranked: bool = True
    organ: str = ""


def _with_subfolders(*names: str) -> tuple[str, ...]:
    forms = ("{0}", "{0}/{1}", "{0}/{2}", "{0}/{1}/{2}", "{2}/{0}")
    return tuple(form.format(name, ORGAN, PATIENT) for name in names for form in forms)


_FLAT = ("", ORGAN, PATIENT, f"{ORGAN}/{PATIENT}")

LAYOUTS = {  # in the order in which they are tried
    "nuinsseg": Layout(
        images=("(?P<organ>.+)/tissue images",),
        labels=(
            "(?P<organ>.+)/label masks modify",
            "(?P<organ>.+)/label masks",
            "(?P<organ>.+)/image?j_zips",
        ),
        vague=(
            "(?P<organ>.+)/vague areas/mask binary",
            "(?P<organ>.+)/vague areas/mask binary_vague",
        ),
    ),
    "pannuke": Layout((), ()),  # stack_images
    "monuseg": Layout(("tissue images", ""), ("annotations", ""), suffixes=(".xml",)),
    "consep": Layout(("(?:train|test)/images",), ("(?:train|test)/labels",), suffixes=(".mat",)),
    "lizard": Layout(
        images=(r"lizard_images\d", r"lizard_images\d/lizard_images\d"),
        labels=("lizard_labels/labels", "lizard_labels/lizard_labels/labels"),
        suffixes=(".mat",),
    ),
    "cryonuseg": Layout(
        images=("tissue images",),
        labels=(
            r"annotator 1 \(biologist\)/label masks modify",
            "annotator 1.*/label masks modify",
            "annotator 1.*/annotator 1.*/label masks modify",
        ),
        organ=r"^Human_(\D+)_\d+$",
    ),
    "tnbc": Layout((r"slide_(?P<group>\d+)",), (r"gt_(?P<group>\d+)",)),
    "plain": Layout(
        images=_with_subfolders("images?"),
        labels=_with_subfolders("labels?", "masks?", "annotations?"),
        vague=_with_subfolders("vague"),
        ranked=False,
    ),
    "flat": Layout(_FLAT, (*_FLAT, "labels?", "masks?", "annotations?"), ranked=False),
}


def stack_images(root: Path) -> Iterator[tuple[str, str, Path, Path]]:
    """Name, organ, image and label of each image of PanNuke's folds in or below `root`.

    The path of image 7 of a stack is `images.npy/0007`.

    Raises:
        UserError: a fold has no masks, or a file is no array.
    """
    for images in sorted([*root.glob("images/*/images.npy"), *root.glob("*/images/*/images.npy")]):
        fold = images.parent.name
        masks = images.parents[2] / "masks" / fold / "masks.npy"
        organs = images.with_name("types.npy")
        count = len(_array(images))
        names = _array(organs).tolist() if organs.is_file() else [""] * count
        for path, found in ((masks, len(_array(masks))), (organs, len(names))):
            if found != count:
                raise UserError(f"{path}: found {found} entries, expected {count} as in {images}")
        for number, organ in enumerate(names):
            place = f"{number:04d}"
            yield f"{fold}_{place}", str(organ), images / place, masks / place


def _array(path: Path) -> np.ndarray:
    with reading(path, "a NumPy array"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def is_split_mask(path: Path) -> bool:
    """Whether a label file is one of TNBC's masks: each connected component is a nucleus."""
    return bool(re.fullmatch(r"GT_\d+", path.parent.name))


def is_slice(path: Path) -> bool:
    """Whether a path is an image of a .npy stack, `STACK.npy/NUMBER`."""
    return path.parent.suffix == ".npy"


def read_picture(path: Path) -> np.ndarray:
    """A slice of a stack (N, H, W, 3) of whole numbers 0 to 255 as uint8 (H, W, 3).

    Raises:
        UserError: the stack cannot be read, or has other values or another shape.
    """
    pixels = _read_slice(path)
    whole = pixels.astype(np.uint8)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not np.array_equal(whole, pixels):
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise UserError(f"{path}: found {found}, expected whole numbers 0 to 255 in (H, W, 3)")
    return whole


def _read_slice(path: Path) -> np.ndarray:
    return np.array(_array(path.parent)[int(path.name)])


def read_instances(path: Path) -> np.ndarray | None:
    """The instances of a label file that only a public data set has; None for any other path.

    Args:
        path: a slice of PanNuke's masks, whose last channel is the background; or a .mat file with
            `inst_map` (CoNSeP, Lizard, HoVer-Net).

    Returns:
        Integer ids (H, W), 0 = background.

    Raises:
        UserError: the file cannot be read or has no `inst_map`.
    """
    if is_slice(path):
        masks = _read_slice(path).astype(np.int32)
        label = np.zeros(masks.shape[:2], np.int32)
        for channel in np.moveaxis(masks[..., :-1], -1, 0):  # a class each
            free = (channel > 0) & (label == 0)
            label[free] = channel[free] + label.max()
        return label
    if path.suffix.lower() == ".mat":
        return _read_mat(path)
    return None


def _read_mat(path: Path) -> np.ndarray:
    from scipy.io import loadmat, whosmat
    from scipy.sparse import issparse

    with reading(path, "a whole .mat file; convert it to TIFF"):
        shapes = {name: shape for name, shape, _ in whosmat(path)}  # takes no memory
        if "inst_map" not in shapes:
            raise UserError("found no inst_map, expected one id per nucleus in it")
        check_size(path, shapes["inst_map"])
        label = loadmat(path, variable_names=["inst_map"])["inst_map"]
        if issparse(label):
            label = label.toarray()
    ids = np.rint(label).astype(np.int32) if label.dtype.kind in "buif" else np.zeros(0, np.int32)
    if ids.ndim != 2 or not ids.size or not np.array_equal(ids, label) or ids.min() < 0:
        found = f"inst_map of {label.dtype} of shape {label.shape}"
        raise UserError(f"{path}: found {found}, expected integer ids (H, W)")
    return ids
