"""The model as an ONNX graph: images in, probabilities out, any batch and size.

Arrays are (B, channels, H, W).
"""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucsam.model.heads import SamHead
from nucsam.model.network import Nucsam

TOLERANCE = 1e-3  # of a probability; a right graph is off by about 1e-6, a wrong one by far more


class Graph(nn.Module):
    """Turns images into probabilities. The resizing between the two scales is part of the graph.

    Images are float32 (B, 3, H, W), RGB in 0..255, H and W multiples of `multiple` px. The maps are
    float32 (B, C, H, W) in 0..1, one for each of `names`. `model.instances.from_depth` takes those
    of the instance head, `from_foreground` that of the sam head.

    Args:
        net: the model, LoRA merged.
        scale: model px per image px.
    """

    def __init__(self, net: Nucsam, scale: float) -> None:
        super().__init__()
        ratio = Fraction(scale).limit_denominator(1000)
        self.net = net
        self.multiple = 32 * ratio.denominator // math.gcd(ratio.numerator, 32 * ratio.denominator)
        self.model_px = round(self.multiple * ratio)
        sam = isinstance(net.head, SamHead)
        self.names = ("foreground",) if sam else ("foreground", "depth")
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[2:]
        if self.model_px != self.multiple:
            sides = [side // self.multiple * self.model_px for side in size]
            image = F.interpolate(image, size=sides, mode="bilinear")
        return self.net.probabilities(self.net(image, size))


def write_graph(path: Path, graph: Graph, metadata: dict[str, Any]) -> float:
    """Write a graph, and compare onnxruntime with PyTorch over two batches.

    Args:
        path: the file. Its metadata are `maps`, `multiple`, and `nucsam`, a JSON document.
        graph: the graph.
        metadata: what `nucsam` is to hold.

    Returns:
        The largest difference of a probability.

    Raises:
        RuntimeError: the difference is over `TOLERANCE`.
    """
    least = -(-64 // graph.model_px)  # in units of `multiple`: the encoder takes 64 px and more
    rows, columns = (torch.export.Dim(name, min=least, max=2048) for name in ("rows", "columns"))
    batch = torch.export.Dim("batch", max=4096)
    shape = {0: batch, 2: graph.multiple * rows, 3: graph.multiple * columns}
    small = _random_images(graph, 1, least, least + 1)
    large = _random_images(graph, 2, least + 3, least + 2)
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (large,),
            input_names=["image"],
            output_names=["maps"],
            dynamic_shapes={"image": shape},
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # torch notes the paths of the source files there
    entries = {"maps": ",".join(graph.names), "multiple": str(graph.multiple)}
    program.model.metadata_props.update(entries | {"nucsam": json.dumps(metadata)})
    program.save(path, external_data=False)
    difference = max(_difference(path, graph, images) for images in (small, large))
    if not difference <= TOLERANCE:  # NaN too
        raise RuntimeError(
            f"onnxruntime and PyTorch differ by {difference:.2g}, expected at most {TOLERANCE:g}"
        )
    return difference


def _random_images(graph: Graph, batch: int, rows: int, columns: int) -> Tensor:
    """Images of rows x columns multiples."""
    size = graph.multiple * rows, graph.multiple * columns
    return 255 * torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _difference(path: Path, graph: Graph, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (maps,) = session.run(None, {"image": images.numpy()})
    expected = graph(images)
    assert maps.shape == expected.shape
    return float((torch.from_numpy(maps) - expected).abs().max())
