"""Does skipping glass lose nuclei?

    python benchmarks/tissue.py FOLDER... [--tiles 64 128 256 512] [--pale 0 0.25] [--json FILE]

Each annotated image of the data sets is laid on a canvas of glass, so that it has edges, and each
`--pale` mixes that share of glass into it. The canvas is cut into tiles from a random corner. A
tile is skipped as `nucsam predict` skips it: the mask of tissue does not meet it, or no square of 4
px in it is darker than glass. A nucleus is lost if one of its pixels lies in a skipped tile. The
script prints a table, and one JSON line last. --device, --batch, --image-size, --dtype, --repeat
and --threads change nothing.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench
from slide import GLASS

from nucsam.data.folders import find_records
from nucsam.data.images import read_image, read_label
from nucsam.predict.tissue import Tissue, find_tissue, is_glass

EDGE = 256  # px of glass around an image


def on_glass(image: np.ndarray, pale: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3) with a share `pale` of glass in it, and glass around."""
    shape = image.shape[0] + 2 * EDGE, image.shape[1] + 2 * EDGE, 3
    canvas = rng.normal(GLASS, 2, shape)
    inside = canvas[EDGE:-EDGE, EDGE:-EDGE]
    inside[:] = pale * inside + (1 - pale) * image
    return canvas.round().clip(0, 255).astype(np.uint8)


def skipped(canvas: np.ndarray, tissue: Tissue, tile: int, corner: Sequence[int]) -> np.ndarray:
    """Bool (rows, columns): the tiles of the canvas, from a corner, that are not predicted."""
    starts = [range(c, side, tile) for c, side in zip(corner, canvas.shape)]
    result = np.zeros(tuple(map(len, starts)), bool)
    for (row, y), (column, x) in product(*map(enumerate, starts)):
        place = slice(y, y + tile), slice(x, x + tile)
        result[row, column] = not tissue.meets(place) or is_glass(canvas[place], tissue.limit)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="annotated images")
    parser.add_argument("--tiles", type=bench.integer(), nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--pale", type=float, nargs="+", default=[0.0, 0.25])
    args = bench.parse(parser, arguments)
    rng, rows = np.random.default_rng(0), {}
    for folder, pale in product(args.folders, args.pale):
        counts = {"images": 0, "nuclei": 0, "lost": 0, "tiles": 0, "skipped": 0}
        for record in find_records(Path(folder)):
            canvas = on_glass(read_image(record.image), pale, rng)
            tissue = find_tissue(canvas, whole=True)
            label = np.pad(read_label(record.label), EDGE)
            lost: set[int] = set()
            for tile in args.tiles:
                corner = rng.integers(0, EDGE, 2)
                glass = skipped(canvas, tissue, tile, corner)
                covered = np.kron(glass, np.ones((tile, tile), bool))
                part = label[corner[0] :, corner[1] :]
                lost |= set(np.unique(part[covered[: part.shape[0], : part.shape[1]]])) - {0}
                counts["tiles"] += glass.size
                counts["skipped"] += int(glass.sum())
            counts["images"] += 1
            counts["nuclei"] += len(np.unique(label)) - 1
            counts["lost"] += len(lost)
        rows[f"{Path(folder).name}, {pale:.0%} glass mixed in"] = counts
    title = f"nuclei lost at the edges of tissue, tiles of {', '.join(map(str, args.tiles))} px"
    Console(width=110).print(
        bench.table(
            title, {name: {k: f"{v:,}" for k, v in row.items()} for name, row in rows.items()}
        )
    )
    document = {"benchmark": "tissue", **bench.options(args), **bench.host(args).about()}
    bench.finish(document | {"results": rows}, args.json)


if __name__ == "__main__":
    main()
