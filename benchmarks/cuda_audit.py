"""What does a training step ask of a GPU? Answered without one.

    python benchmarks/cuda_audit.py [--batch 4] [--image-size 1024] [--heads instance sam]
        [--train lora full] [--dtypes fp16 bf16 fp32] [--forward] [--json FILE]

The real step of nucsam/train/loop.py runs under the real Accelerate. Tensors on the GPU are
PyTorch's fake tensors: they have a shape and a device, no values. Tensors on the CPU are real. The
script counts, in the second step:

- syncs: places where the host waits for the GPU: a blocking copy, a copy from memory that is not
  pinned, `.item()`, `nonzero`, an index by a mask or by a tensor on the CPU.
- launches: operations on the GPU that are no views.
- GiB: their inputs and outputs. A fused kernel counts them once.

A tensor on the wrong device raises an error, as on a GPU. PyTorch's backward pass looks for a
driver, so a step runs in a child process with a stub of one, which needs a C++ compiler and a CUDA
build of PyTorch. With `--forward` the backward pass is left out, and neither is needed.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed
import bench

from nucsam.config import Config
from nucsam.data import augment
from nucsam.data.samples import DRAWS
from nucsam.model.network import Nucsam, build_model
from nucsam.model.weights import Base, load_base
from nucsam.predict.pytorch import TorchPredictor
from nucsam.run.checkpoint import Progress
from nucsam.train.loop import step
from nucsam.train.training import Training, make_optimizer

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda:0")
PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "fp32": "no"}  # Accelerate's names
NUCLEI = 40  # a random id in each pixel
aten = torch.ops.aten
# Operations whose result has a size that only the GPU knows, or that fill the host's memory.
_UNKNOWN_SIZE = (
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
)
_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_ALLOCATIONS = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "alias", "_to_copy")
# A driver without devices, and as many devices as the autograd engine may ask for.
_STUB = """
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0; *active = 0; return 0;
}
static int count = 0;
extern "C" void set_device_count(int n) { count = n; }
namespace c10 { namespace cuda {
    signed char device_count() noexcept { return count; }
    signed char device_count_ensure_non_zero() { return count; }
} }
"""


_CUDNN = torch._C._ConvBackend.Cudnn


def _layout(x: Tensor, weight: Tensor, _: Any) -> torch.memory_format:
    """The memory format of a convolution's result with cuDNN."""
    formats = {torch._prims_common.suggest_memory_format(tensor) for tensor in (x, weight)}
    last = torch.channels_last in formats
    return torch.channels_last if last else torch.contiguous_format


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's memory-efficient kernel, which it would choose on a GPU for a bias."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        attn_mask = None if attn_mask is None else attn_mask.to(dtype)
    if attn_mask is not None:
        keys = attn_mask.shape[-1]
        if attn_mask.stride(-2) % 8:  # the kernel reads a bias in lines of 8
            attn_mask = nn.functional.pad(attn_mask, (0, -keys % 8))[..., :keys]
        attn_mask = attn_mask.expand(*q.shape[:3], keys)
    with_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, with_sums, 0.0, False, scale=scale)[0]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _place() -> str:
    """The line of nucsam that runs now; during the backward pass, that of its call."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT / "nucsam"):
            return f"{path.relative_to(ROOT / 'nucsam')}:{frame.lineno}"
    return "outside nucsam"


@dataclass
class Counts:
    """What was asked of the GPU."""

    syncs: Counter[str] = field(default_factory=Counter)  # by what waits, and where
    launches: int = 0
    bytes: int = 0


class FakeGpu(TorchDispatchMode):
    """Context in which a GPU seems to be there. Its tensors have no values, those of the CPU do.

    An operation on tensors of both raises RuntimeError, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.counts = Counts()
        self._pinned: dict[int, Tensor] = {}  # by address; held, so that no other gets the address

    def __enter__(self) -> "FakeGpu":
        self._stack = ExitStack()
        self._stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", bool))
        self._stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        self._stack.enter_context(patch.object(Tensor, "pin_memory", lambda x: self.pin(x)))
        self._stack.enter_context(patch("torch.cuda.current_stream", lambda *_: self))
        for place in ("torch.optim.optimizer", "torch.utils._foreach_utils"):  # as on real tensors
            types = patch(f"{place}._foreach_supported_types", [Tensor, nn.Parameter, FakeTensor])
            self._stack.enter_context(types)
        backend = patch("torch._C._select_conv_backend", lambda *_, **__: _CUDNN)
        layout = patch("torch._C._conv_determine_backend_memory_format", _layout)
        attention = patch("torch.nn.functional.scaled_dot_product_attention", _attention)
        for change in (backend, layout, attention, self.fake):
            self._stack.enter_context(change)
        augment._noise_table.cache_clear()  # holds no fake tensor, now or later
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        augment._noise_table.cache_clear()
        self._stack.__exit__(*error)

    def synchronize(self) -> None:
        """Of the stream: the host waits for all of it."""
        self.counts.syncs[f"synchronize at {_place()}"] += 1

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory, from where the GPU copies while the host goes on."""
        tensor = tensor.clone()
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def moved(self, module: nn.Module) -> nn.Module:
        """The module with its parameters and buffers on the GPU."""
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    moved = nn.Parameter(self._on_gpu(p.detach()), requires_grad=p.requires_grad)
                    part._parameters[name] = moved
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self._on_gpu(buffer)
        return module

    def _on_gpu(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for the device of a tensor
            return func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in inputs if isinstance(x, FakeTensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if not on_gpu and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if wait := self._wait(func, args, kwargs):
            self.counts.syncs[f"{wait} at {_place()}"] += 1
        if on_gpu and (result := self._on_host(func, args, kwargs)) is not None:
            return result
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._count(func, args, on_gpu, outputs)
        return result

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _wait(self, func: Any, args: Any, kwargs: Any) -> str:
        """Why the host waits for the GPU in this operation; "" where it does not."""
        if func in (aten.nonzero.default, aten._local_scalar_dense.default, *_UNKNOWN_SIZE):
            return func.overloadpacket.__name__
        if func is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            return self._wait_of_copy(args[0], target, kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            return self._wait_of_copy(args[1], args[0].device, len(args) > 2 and args[2])
        if func in _INDEX:
            indices = [index for index in args[1] if index is not None]
            if any(map(_is_mask, indices)):
                return "index by a mask"
            if any(not isinstance(index, FakeTensor) for index in indices):
                return "index on the CPU"
        return ""

    def _wait_of_copy(self, source: Tensor, target: torch.device, unblocked: bool | None) -> str:
        if source.device.type == target.type:
            return ""
        if not unblocked:
            return f"blocking copy from {source.device.type} to {target.type}"
        pinned = source.device.type == "cuda" or source.untyped_storage().data_ptr() in self._pinned
        return "" if pinned else "copy from memory that is not pinned"

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the host gets of the GPU: zeros. None where nothing comes to the host."""
        source = args[0]
        if func is aten._local_scalar_dense.default:
            return 0.0 if source.is_floating_point() else 0
        if func is aten.nonzero.default:
            return torch.zeros(1, source.ndim, dtype=torch.long, device=GPU)
        if func is aten.index.Tensor and any(i is not None and _is_mask(i) for i in args[1]):
            return source.new_empty(1)
        if func is aten._to_copy.default and torch.device(kwargs.get("device", GPU)).type == "cpu":
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return None

    def _count(self, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        copied = name == "_to_copy" and bool(inputs)
        if func.is_view or (name.startswith(_ALLOCATIONS) and not copied):
            return
        self.counts.launches += 1
        self.counts.bytes += _bytes(inputs) + _bytes(outputs)


@contextmanager
def fake_accelerator(precision: str) -> Iterator[Accelerator]:
    """Accelerate on the fake GPU, in a precision of PRECISIONS."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("ACCELERATE_")}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).device = GPU
    try:
        with patch.dict(os.environ, environment, clear=True):
            yield Accelerator(cpu=True, mixed_precision=PRECISIONS[precision])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@cache
def base() -> Base:
    """Random base weights."""
    return load_base("none")


class Audit:
    """A training and a prediction on the fake GPU, to be used within `FakeGpu`.

    Args:
        gpu: the context.
        accelerator: of `fake_accelerator`.
        config: settings of the training.
        backward: whether the backward pass runs; otherwise every gradient is zero.
        blocks: of each stage of the encoder; None = all. One asks for all kinds of operations.
    """

    def __init__(
        self,
        gpu: FakeGpu,
        accelerator: Accelerator,
        config: Config,
        *,
        backward: bool,
        blocks: int | None = None,
    ) -> None:
        self.gpu = gpu
        self.config = config
        self.blocks = blocks
        self.net = gpu.moved(self._build().train())
        training = self.training = Training.__new__(Training)  # without images and files
        training.config = config
        training.accelerator = accelerator
        training.net = self.net
        training.ddp = accelerator.prepare_model(self.net, device_placement=False)
        training.weights = self.net.trainable()
        training.average = {name: p.detach().clone() for name, p in training.weights.items()}
        optimizer = make_optimizer(training.weights, config.train)
        training.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
        training.batches = argparse.Namespace(steps=100)
        training.progress = Progress()
        training.loss_sums = {}
        augment._noise_table(GPU)  # goes to the GPU once
        self._backward = accelerator.backward
        accelerator.backward = self._with_driver if backward else self._zero_gradients

    def _build(self) -> Nucsam:
        net = build_model(self.config.model, base(), seed=0)
        for stage in net.image_encoder.layers:
            stage.blocks = stage.blocks[: self.blocks]
        return net

    def _with_driver(self, loss: Tensor) -> None:
        """In a child of `run_with_driver`: the backward pass, which asks for devices."""
        driver = ctypes.CDLL(os.environ["LD_PRELOAD"])
        driver.set_device_count(64)
        self._backward(loss)
        driver.set_device_count(0)

    def _zero_gradients(self, loss: Tensor) -> None:
        scaler = self.training.accelerator.scaler
        scaled = loss if scaler is None else scaler.scale(loss)
        assert scaled.requires_grad
        for p in self.training.weights.values():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    def batch(self) -> dict[str, Tensor]:
        """A micro-batch in pinned memory, as the loader gives it; every augmentation is drawn."""
        d, t = self.config.data, self.config.train
        side = augment.window(d.crop, self.config.augment)
        tensors = {
            "image": torch.randint(256, (t.batch, 3, side, side), dtype=torch.uint8),
            "label": torch.randint(NUCLEI + 1, (t.batch, side, side), dtype=torch.int32),
            "counted": torch.ones(t.batch, side, side, dtype=torch.bool),
            "draws": torch.full((t.batch, DRAWS), 1e-3),
        }
        return {name: self.gpu.pin(tensor) for name, tensor in tensors.items()}

    def step(self) -> Counts:
        """What a training step asks of the GPU. The first one also makes the optimizer's state."""
        batches = [self.batch() for _ in range(self.config.train.accumulate)]
        self.gpu.counts = Counts()
        step(self.training, iter(batches))
        return self.gpu.counts

    def prediction(self) -> Counts:
        """What the prediction of a batch of tiles asks of the GPU."""
        d = self.config.data
        side = round(d.crop * d.scale)
        options = {"scale": d.scale, "instances": self.config.instances, "tile": d.crop}
        model = TorchPredictor(self.gpu.moved(self._build().eval().fold()), overlap=0, **options)
        pixels = torch.zeros(self.config.train.batch, d.crop, d.crop, 3, dtype=torch.uint8).numpy()
        self.gpu.counts = Counts()
        maps = model.maps(pixels, (side, side), (d.crop, d.crop))
        assert maps.shape[2:] == (d.crop, d.crop)
        return self.gpu.counts


def settings(head: str, train: str, batch: int, side: int) -> Config:
    """The defaults with a head, what trains, a batch, and the side of a crop in model px."""
    config = Config()
    return replace(
        config,
        data=replace(config.data, crop=round(side / config.data.scale)),
        model=replace(config.model, weights="none", head=head, train=train),
        train=replace(config.train, batch=batch),
    )


def missing() -> str:
    """Why the backward pass cannot run here; "" where it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not torch.version.cuda or sys.platform != "linux":
        return "needs a CUDA build of PyTorch on Linux"
    return "" if shutil.which("g++") else "needs g++"


def run_with_driver(command: list[str], **options: Any) -> subprocess.CompletedProcess:
    """Run Python with a stub of a driver, with which the backward pass works on fake tensors."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        build = ["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c++", "-"]
        subprocess.run([*build, "-o", str(library)], input=_STUB, text=True, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "CUDA_MODULE_LOADING": "LAZY"}
        return subprocess.run([sys.executable, *command], env=environment, **options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=1024, help="side in model px")
    parser.add_argument("--heads", nargs="+", default=["instance", "sam"])
    parser.add_argument("--train", nargs="+", default=["lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    driver = "libcuda" in os.environ.get("LD_PRELOAD", "")
    if not args.forward and not driver:
        if reason := missing():
            raise SystemExit(f"the backward pass {reason}; --forward leaves it out")
        raise SystemExit(run_with_driver([__file__, *(arguments or sys.argv[1:])]).returncode)
    rows, places = {}, Counter()
    for dtype, head, train in product(args.dtypes, args.heads, args.train):
        config = settings(head, train, args.batch, args.image_size)
        with FakeGpu() as gpu, fake_accelerator(dtype) as accelerator:
            audit = Audit(gpu, accelerator, config, backward=not args.forward)
            audit.step()
            counts = audit.step()
        syncs = sum(counts.syncs.values())
        row = {"syncs": syncs, "launches": counts.launches, "GiB": counts.bytes / 2**30}
        rows[f"{dtype}, {head}, {train}"] = row
        places |= counts.syncs
    Console().print(bench.table("A training step on a GPU", rows))
    for place, count in sorted(places.items()):
        print(f"{count} x {place}")
    document = {"benchmark": "cuda_audit", "options": bench.options(args), "results": rows}
    bench.finish(document | {"syncs": dict(places), "torch": torch.__version__}, args.json)
    if driver:
        sys.stdout.flush()
        os._exit(0)  # threads of the autograd engine may abort at exit


if __name__ == "__main__":
    main()
