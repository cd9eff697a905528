"""A child of `slide.py`: predict a slide with stored maps in place of the network.

    PYTHONPATH=CHECKOUT python slide_host.py SLIDE FOLDER OUT FORMATS

CHECKOUT is this repository or commit 6bdc1a4, whose interface is another. FOLDER holds `kinds.npy`,
the number of each tile's tissue image (-1 = glass), and `maps.npy`, the foreground and depth of
each tissue image, (N, 2, 512, 512). The last line is JSON: CPU seconds of the host, without those
spent on copying stored maps; peak RssAnon, MiB; tiles that were run; nuclei.
"""

import json
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console

TILE = 512  # px: side of a tissue image
slide, folder, out = map(Path, sys.argv[1:4])
formats = sys.argv[4].split(",")
kinds, maps = np.load(folder / "kinds.npy"), np.load(folder / "maps.npy")
spent = {"copying": 0.0, "rss": 0}
lock = threading.Lock()


def stored(tiles, key):
    """The maps (C, h, w) of a tile."""
    began = time.thread_time()
    y, x = (starts[n] for starts, n in zip(tiles.starts, key))
    h, w = tiles.sides
    result = np.zeros((maps.shape[1], h, w), np.float32) + glass[:, None, None]
    for row in range(y // TILE, min(-(-(y + h) // TILE), len(kinds))):
        for column in range(x // TILE, min(-(-(x + w) // TILE), len(kinds))):
            if kinds[row, column] >= 0:
                top, left = max(y, row * TILE), max(x, column * TILE)
                bottom, right = min(y + h, (row + 1) * TILE), min(x + w, (column + 1) * TILE)
                part = maps[kinds[row, column]][:, top - row * TILE : bottom - row * TILE]
                part = part[:, :, left - column * TILE : right - column * TILE]
                result[:, top - y : bottom - y, left - x : right - x] = part
    with lock:
        spent["copying"] += time.thread_time() - began
    return result


def watch():
    """Note the peak of the anonymous memory."""
    while True:
        text = Path("/proc/self/status").read_text()
        spent["rss"] = max(spent["rss"], int(text.split("RssAnon:")[1].split()[0]))
        time.sleep(0.02)


def now():
    """The batch of this checkout: run() -> (status, tiles, nuclei)."""
    from nucsam.config import Config
    from nucsam.console import PlainConsole
    from nucsam.model.instances import from_depth
    from nucsam.predict import images, writers
    from nucsam.predict.predictor import Predictor

    class Stored(Predictor):
        def _run(self, group):
            np.stack([tile for *_, tile in group])  # what a device would get
            return [(tiles, key, stored(tiles, key)) for tiles, key, _ in group]

        def nuclei(self, maps, config):
            return from_depth(*maps, config)

    predictor = Stored(scale=1.0, tile=TILE, overlap=16, instances=Config().instances)
    files = {slide: writers.output_files(out, "a", formats)}
    batch = images.Batch(predictor, files, out, 0.25, force=True)
    batch.console = PlainConsole(quiet=True)

    def run():
        status = batch.run()
        return status, predictor.tiles_done, batch.outcomes[slide].get("nuclei", 0)

    return run


def before():
    """As `now`, of commit 6bdc1a4. Its network gives logits of three classes and of the depth."""
    global maps, glass
    from nucsam.head import InstanceHead

    from nucsam import batch as batches
    from nucsam import outputs
    from nucsam.config import Config
    from nucsam.predict import Predictor

    foreground, depth = np.clip(np.moveaxis(maps, 1, 0), 1e-3, 1 - 1e-3)
    zero = np.zeros_like(foreground)
    logits = [-np.log(foreground / (1 - foreground)), zero, zero - 50, np.log(depth / (1 - depth))]
    maps, glass = np.stack(logits, 1), np.float32([6, -6, -6, -6])

    class Stored(Predictor):
        def _run(self, group):
            np.stack([tile for *_, tile in group])
            self.tiles_done += len(group)
            for tiles, key, _ in group:
                tiles.add(key, stored(tiles, key))

    options = {"scale": 1.0, "tile": TILE, "overlap": 16, "instances": Config().instances}
    predictor = Stored(InstanceHead(128), **options)
    batch = batches.Batch(predictor, {slide: outputs.files(out, "a", formats)}, 0.25, None)
    batch.console = Console(quiet=True)

    def run():
        return batch.run({}, out / "predict.json", True), predictor.tiles_done, batch.nuclei

    return run


glass = np.zeros(2, np.float32)
run = before() if find_spec("nucsam.batch") else now()
out.mkdir(exist_ok=True)
threading.Thread(target=watch, daemon=True).start()
began, wall = time.process_time(), time.perf_counter()
status, tiles, nuclei = run()
cpu, wall = time.process_time() - began - spent["copying"], time.perf_counter() - wall
document = {"status": status, "cpu_s": cpu, "wall_s": wall, "tiles": tiles, "nuclei": nuclei}
print(json.dumps(document | {"rss_anon_mib": spent["rss"] / 1024}))
