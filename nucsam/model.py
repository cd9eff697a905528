"""The model: builds, loads and freezes. The one place that knows which parameters train."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from nucsam import lora
from nucsam.base import Base, build_sam, state_sha256
from nucsam.config import Instances, Loss, Model
from nucsam.encoder import Encoder
from nucsam.head import Block, InstanceHead, SamHead

# Modules of the mask decoder that a foreground map without prompts never reaches: they get no gradient.
_UNREACHED = (
    "mask_decoder.iou_prediction_head",
    *(f"mask_decoder.output_hypernetworks_mlps.{i}" for i in (1, 2, 3)),
)


class Nucsam(nn.Module):
    """MobileSAM's encoder, with LoRA where the configuration says so, and a head.

    Parameter names of the MobileSAM part are the stock ones (`image_encoder.*`, and `prompt_encoder.*`,
    `mask_decoder.*` with the sam head); the instance head's begin with `head.`.
    """

    def __init__(self, config: Model, checkpoint: bool = False) -> None:
        super().__init__()
        sam = build_sam()
        self.image_encoder = Encoder(sam.image_encoder, checkpoint=checkpoint, moving=config.norms == "moving")
        if config.head == "sam":
            self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
            self.head = SamHead(self.prompt_encoder, self.mask_decoder)
        else:
            self.head = InstanceHead(config.width)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """RGB float images (B, 3, h, w), 0..255, multiples of 32 model px -> dense maps (B, C, *size), image px."""
        features = self.image_encoder(images)
        if isinstance(self.head, SamHead):
            features = self.image_encoder.embed(features)
        return self.head(features, size)

    def loss(self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss) -> dict[str, Tensor]:
        """The head's weighted loss terms, each (B,): see `nucsam.head`."""
        return self.head.loss(maps, labels, counted, n, weights)

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Maps (C, H, W) of one image -> label map int32 (H, W)."""
        return self.head.instances(maps, config)

    def fold(self) -> "Nucsam":
        """The model itself, in eval mode, to predict alone: LoRA is merged, and the norms of its head are folded."""
        lora.merge(self)
        for part in self.modules():
            if isinstance(part, Block):
                part.fold()
        return self

    def trainable(self) -> dict[str, Tensor]:
        """What training changes, by name: the parameters that train, and the statistics of BatchNorms that move."""
        moving = ("head.", "image_encoder.") if self.image_encoder.moving else ("head.",)
        statistics = {
            name: buffer
            for name, buffer in self.named_buffers()
            if name.startswith(moving) and name.endswith(("running_mean", "running_var"))
        }
        return {name: p for name, p in self.named_parameters() if p.requires_grad} | statistics


def build(config: Model, base: Base, *, seed: int, checkpoint: bool = False) -> Nucsam:
    """The model of a configuration on base weights; head and adapters are drawn from `seed`.

    A base that is a nucsam export brings its head, which must have the configured shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        model = Nucsam(config, checkpoint)
        wanted = model.state_dict()
        extra = base.extra if config.head == "instance" else {}
        own, given = (
            {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("head.")}
            for tensors in (wanted, extra)
        )
        if given and (odd := sorted({name for name, _ in own.items() ^ given.items()})):
            raise ValueError(
                f"{base.source}: found another head: {len(odd)} tensors differ from those of model.width = "
                f"{config.width}, such as {odd[0]}: found {given.get(odd[0])}, expected {own.get(odd[0])}"
            )
        state = {name: tensor for name, tensor in {**base.state, **extra}.items() if name in wanted}
        missing, _ = model.load_state_dict(state, strict=False)
        assert all(name.startswith("head.") for name in missing), missing  # load_base has checked the MobileSAM part
        if config.train == "lora":
            lora.inject(model, config.pattern, rank=config.rank, alpha=config.alpha)
    _freeze(model, config)
    return model


def calibrated(base: Base, images: Tensor) -> Base:
    """A random base with its BatchNorm statistics taken from RGB float images (B, 3, H, W), 0..255.

    BatchNorms are pinned in training, and a fresh one's mean 0 and variance 1 are not those of its input.
    """
    sam = build_sam()
    sam.load_state_dict(base.state)
    encoder = Encoder(sam.image_encoder, moving=True)
    update_bn([images], encoder)
    state = base.state | {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return replace(base, state=state, sha256=state_sha256(state))


def _freeze(model: Nucsam, config: Model) -> None:
    def trains(name: str) -> bool:
        if name.startswith("head."):
            return True
        if name.startswith((*_UNREACHED, "prompt_encoder.")):
            return False
        if config.train == "lora":
            return ".lora_" in name
        if name.startswith("image_encoder."):
            reached = config.head == "sam" or not name.startswith("image_encoder.neck.")
            return config.train == "full" and reached
        return True  # the sam head's mask decoder

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
