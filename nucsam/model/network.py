"""The model: encoder and head on base weights. Only this file decides which parameters train."""

from dataclasses import replace

import numpy as np
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from nucsam.config import Instances, Loss, Model
from nucsam.errors import UserError
from nucsam.model import lora
from nucsam.model.bases import BASES
from nucsam.model.encoder import Encoder
from nucsam.model.heads import Block, InstanceHead, Norm, SamHead
from nucsam.model.vit import ViT
from nucsam.model.weights import Base, build_sam, misfit, seeded, state_sha256

# Parts of SAM without a gradient: a foreground map without prompts does not depend on them.
_UNREACHED = (
    "prompt_encoder.",
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.output_hypernetworks_mlps.1.",
    "mask_decoder.output_hypernetworks_mlps.2.",
    "mask_decoder.output_hypernetworks_mlps.3.",
)


FAMILIES = {"tiny_vit": Encoder, "vit": ViT}  # `Published.family` -> what runs its weights


def build_encoder(name: str, sam: nn.Module, **options: bool) -> Encoder | ViT:
    """The encoder `name` of `BASES`, on the weights of its stock model.

    Args:
        name: a value of `model.encoder`.
        sam: of `build_sam`; the encoder takes over modules of its `image_encoder`.
        options: `checkpoint` and `moving`, as in `Encoder`.
    """
    base = BASES[name]
    return FAMILIES[base.family](sam.image_encoder, **base.options, **options)


class Nucsam(nn.Module):
    """An encoder of `BASES` and a head; `build_model` adds weights and LoRA.

    The parameters of the base have their stock names: `image_encoder.*`, and with the sam head
    `prompt_encoder.*` and `mask_decoder.*`. Those of the instance head begin with `head.`.
    """

    def __init__(self, config: Model, checkpoint: bool = False) -> None:
        super().__init__()
        sam = build_sam(encoder=config.encoder)
        moving = config.norms == "moving"
        self.image_encoder = build_encoder(
            config.encoder, sam, checkpoint=checkpoint, moving=moving
        )
        if config.head == "sam":
            self.prompt_encoder = sam.prompt_encoder
            self.mask_decoder = sam.mask_decoder
            self.head = SamHead(self.prompt_encoder, self.mask_decoder)
        else:
            self.head = InstanceHead(config.width, self.image_encoder.maps, config.finest)
        self.adapt(config.adapt)

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Dense maps of images.

        Args:
            images: RGB float (B, 3, h, w), 0..255; h and w multiples of 32 model px.
            size: rows and columns of the maps, image px.

        Returns:
            Logits (B, C, *size) of the head.
        """
        features = self.image_encoder(images)
        if isinstance(self.head, SamHead):
            features = self.image_encoder.embed(features)
        return self.head(features, size)

    def loss(
        self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss
    ) -> dict[str, Tensor]:
        """The head's weighted loss terms, each (B,), as `InstanceHead.loss`."""
        return self.head.loss(maps, labels, counted, n, weights)

    def probabilities(self, maps: Tensor) -> Tensor:
        """Logits (B, C, H, W) -> what nuclei are made of, (B, 1 or 2, H, W), 0..1."""
        return self.head.probabilities(maps)

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Probabilities (C, H, W) of one image -> label map int32 (H, W), 0 = background."""
        return self.head.instances(maps, config)

    def adapt(self, share: float) -> None:
        """Set the share, 0..1, of an image's own statistics in the norms of the instance head."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.adapt = share

    def fold(self) -> "Nucsam":
        """Make the model fast, for prediction only: merge LoRA, fold the head's norms, freeze.

        Returns:
            The model itself; it must be in eval mode.
        """
        lora.merge(self)
        for module in self.modules():
            if isinstance(module, Block):
                module.fold()
        return self.requires_grad_(False)

    def trainable(self) -> dict[str, Tensor]:
        """What training changes, by name: parameters that train, and statistics of moving norms."""
        moving = ("head.", "image_encoder.") if self.image_encoder.moving else ("head.",)
        weights = {name: p for name, p in self.named_parameters() if p.requires_grad}
        buffers = {name: b for name, b in self.named_buffers() if name.startswith(moving)}
        return weights | {name: b for name, b in buffers.items() if ".running_" in name}


def build_model(config: Model, base: Base, *, seed: int, checkpoint: bool = False) -> Nucsam:
    """The model of a configuration on base weights.

    A base that is a nucsam export brings its head.

    Args:
        config: table `model`.
        base: weights of the encoder, and of the head if it is an export.
        seed: the head and the adapters are drawn from it.
        checkpoint: as in `Encoder`.

    Raises:
        UserError: the head of the base has another shape; no layer matches `config.pattern`, or
            none that trains.
    """
    with seeded(seed):
        model = Nucsam(config, checkpoint)
        _put_base(model, base, config)
        if config.train == "lora":
            pattern = config.pattern or BASES[config.encoder].pattern
            lora.inject(model, pattern, rank=config.rank, alpha=config.alpha)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trains(name, config))
    if not model.trainable():
        found = f"found {config.pattern!r}, which matches only layers that do not train"
        raise UserError(f"model.pattern: {found}, expected layers of the encoder")
    return model


def _put_base(model: Nucsam, base: Base, config: Model) -> None:
    """Load the base's weights, and its head where it has one and the model has a place for it."""
    expected = model.state_dict()
    head = {name: tensor for name, tensor in expected.items() if name.startswith("head.")}
    if head and base.extra and (problem := misfit(base.extra, head)):
        settings = f"model.width = {config.width} and model.finest = {config.finest}"
        raise UserError(
            f"{base.source}: found another head, expected that of {settings}: {problem}"
        )
    tensors = base.state | base.extra
    tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    missing, _ = model.load_state_dict(tensors, strict=False)
    assert head.keys() >= set(missing)  # load_base has checked the base's part


def _trains(name: str, config: Model) -> bool:
    """Whether training changes a parameter."""
    if name.startswith("head."):
        return True
    if name.startswith(_UNREACHED):
        return False
    if config.train == "lora":
        return ".lora_" in name
    if name.startswith("mask_decoder."):
        return True
    if name.startswith("image_encoder.neck.") and config.head == "instance":
        return False  # the instance head takes the maps before the neck
    return config.train == "full"


def calibrated(base: Base, images: Tensor) -> Base:
    """A random base with the BatchNorm statistics of some images.

    Training leaves pinned BatchNorms alone, and mean 0 and variance 1 are not those of their input.

    Args:
        base: random weights.
        images: RGB float (B, 3, H, W), 0..255.
    """
    sam = build_sam(encoder=base.encoder)
    sam.load_state_dict(base.state)
    encoder = build_encoder(base.encoder, sam, moving=True)
    update_bn([images], encoder)
    calibration = {f"image_encoder.{name}": t for name, t in encoder.state_dict().items()}
    state = base.state | calibration
    return replace(base, state=state, sha256=state_sha256(state))
