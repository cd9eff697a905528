"""The model as an ONNX graph: images in, probabilities out, any batch and size."""

import importlib.util
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucsam.head import SamHead
from nucsam.model import Nucsam

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of a probability; a right graph is off by about 1e-6, a wrong one by far more


class Graph(nn.Module):
    """Images float32 (B, 3, H, W), RGB in 0..255, H and W multiples of `multiple` image px -> maps (B, C, H, W), 0..1.

    The maps are those of `names`. Those of the instance head are what `nucsam.instances.from_depth` takes, that of
    the sam head what `from_foreground` takes. scale: model px per image px; the resizing is part of the graph.
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
        maps = self.net(image, size)
        if len(self.names) == 1:
            return maps.sigmoid()
        return torch.cat([1 - maps[:, :3].softmax(1)[:, :1], maps[:, 3:].sigmoid()], dim=1)


def check_packages() -> None:
    """ValueError where a package of the `onnx` extra is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--format onnx: {', '.join(missing)} not installed; pip install 'nucsam[onnx]' brings them")


def write(path: Path, graph: Graph, metadata: dict[str, Any]) -> float:
    """Write a graph to `path`, and return its largest difference from PyTorch over two batches.

    The file's metadata: `maps`, `multiple`, and `nucsam`, a JSON document of `metadata`. RuntimeError where onnxruntime
    gives anything else than PyTorch by over TOLERANCE.
    """
    least = -(-64 // graph.model_px)  # in units of `multiple`: the encoder takes 64 px and more
    rows, columns = (torch.export.Dim(name, min=least, max=2048) for name in ("rows", "columns"))
    shape = {0: torch.export.Dim("batch", max=4096), 2: graph.multiple * rows, 3: graph.multiple * columns}
    sizes = (1, least, least + 1), (2, least + 3, least + 2)
    first, second = (
        255 * torch.rand(b, 3, graph.multiple * h, graph.multiple * w, generator=torch.Generator().manual_seed(b))
        for b, h, w in sizes
    )
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            (second,),
            input_names=["image"],
            output_names=["maps"],
            dynamic_shapes={"image": shape},
            dynamo=True,
            verbose=False,
        )
    props = {"maps": ",".join(graph.names), "multiple": str(graph.multiple), "nucsam": json.dumps(metadata)}
    program.model.metadata_props.update(props)
    program.save(path, external_data=False)
    difference = max(_difference(path, graph, images) for images in (first, second))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"onnxruntime and PyTorch differ by {difference:.2g}, expected at most {TOLERANCE:g}")
    return difference


@torch.no_grad()
def _difference(path: Path, graph: Graph, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": images.numpy()})
    expected = graph(images)
    assert found.shape == expected.shape
    return float((torch.from_numpy(found) - expected).abs().max())
