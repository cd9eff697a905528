"""Published results on NuInsSeg, and what a reader must know to compare with them."""

from collections.abc import Collection

# Five-fold results on NuInsSeg
PUBLISHED = (  # model, parameters, Dice, AJI, PQ in percent, source
    ("Shallow U-Net", "1.9 M", "78.8", "50.5", "42.7", "NuInsSeg paper"),
    ("Deep U-Net", "7.7 M", "79.7", "49.4", "40.4", "NuInsSeg paper"),
    ("Attention U-Net", "2.3 M", "80.5", "45.7", "36.4", "NuInsSeg paper"),
    ("Residual Attention U-Net", "2.4 M", "81.4", "46.2", "36.9", "NuInsSeg paper"),
    ("Two-stage U-Net", "3.9 M", "76.6", "52.8", "47.2", "NuInsSeg paper"),
    ("Dual Decoder U-Net", "3.5 M", "79.4", "55.9", "51.3", "NuInsSeg paper"),
    ("HoVer-Net (simplified)", "", "80.29", "57.50", "53.40", "NucEval, arXiv 2605.03144"),
    ("HoVer-NeXt", "", "82.59", "58.45", "54.17", "NucEval"),
    ("CellViT (ViT-256)", "", "81.92", "60.03", "56.44", "NucEval"),
    ("MobileSAM + LoRA, as reported", "2.1 M", "67.4", "42.3", "39.8", "a student report"),
)

CAVEATS = (
    "Published rows are for NuInsSeg (official split, 665 images) and comparable only on it: "
    "U-Nets from its paper, HoVer-Net, HoVer-NeXt and CellViT from NucEval, "
    "MobileSAM + LoRA from a student report.",
    "The U-Nets and HoVer-NeXt chose their best epoch on the fold they report.",
    "CellViT and HoVer-NeXt folds use seed 42, the paper's use 19.",
    "The report's published code trains 4,182,404 parameters and scores masks turned to 0/1: "
    "its row is as reported.",
)


def is_nuinsseg(images: Collection[int], organs: Collection[str]) -> bool:
    """Whether runs used all of NuInsSeg: its 665 images, in organ folders named as its 31 are.

    A fold tests 133 images, which are of more than 20 organs.

    Args:
        images: how many images each variant has.
        organs: of the images scored so far.
    """
    named = all(organ.startswith(("human ", "mouse ")) for organ in organs)
    return set(images) == {665} and 20 < len(organs) <= 31 and named
