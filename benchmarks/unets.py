"""The six U-Nets of the NuInsSeg paper (Mahbod et al. 2024, Scientific Data 11:295).

Widths, up-sampling and maps follow the authors' code
(github.com/masih4/dual_decoder_nuclei_segmentation). The gates follow Oktay 2018, the shortcuts He
2016. These choices differ from the authors', in the baselines' favour where the budget is short:

- BatchNorm in place of dropout.
- Dice and cross-entropy of one weight.
- The depth is scaled to 1 in each nucleus, its loss is weighted by 5, and its maxima are smoothed
  more.
- The second stage sees the foreground of the first beside the image.

The rest is nucsam's: augmentation, AdamW, schedule, averaged weights, scoring. A net has the
methods that `nucsam.fit` needs:

    nucsam.fit(config, out, build=partial(unets.build, "deep"))
    nucsam.fit(config, out, build=partial(unets.build, "deep", start=RUN / "adapter.safetensors"))

The nets see the image at its own resolution (data.scale = 1), sides multiples of 16 px.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucsam.config import Instances, Loss, Model
from nucsam.model import instances, losses, targets
from nucsam.model.heads import Block, Norm
from nucsam.model.weights import Base
from nucsam.run import checkpoint

MEAN, STD = (178.0, 135.0, 175.0), 50.0  # grey levels of H&E, roughly: BatchNorm does the rest
# Px of smoothing, and px around a maximum of the predicted depth without a larger value. They are
# the best on true maps of training and stand-in images, and on predicted maps, where 1 and 3 lose
# 20 PQ. The defaults of `from_foreground`, 2 and 5, were chosen in the same way.
SIGMA, REACH = 3.0, 7
# Weight of the depth's loss. At the published 1 it is a twentieth of the others, and learns late.
DEPTH = 5.0


@dataclass(frozen=True)
class Plan:
    """The differences between the nets."""

    widths: tuple[int, ...]  # channels at strides 1, 2, 4, 8, 16
    millions: float  # of parameters, as published
    bottom: int = 0  # channels of the second convolution at stride 16; 0 = as the first
    attention: bool = False  # gated skips; up-sampling by interpolation and 3 x 3 convolution
    residual: bool = False
    distance: str = ""  # "decoder": a second decoder for the distance map; "net": a second net


NARROW, WIDE = (16, 32, 64, 128, 256), (32, 64, 128, 256, 512)
NETS = {
    "shallow": Plan(NARROW, 1.9),
    "deep": Plan(WIDE, 7.7),
    "attention": Plan(NARROW, 2.3, attention=True),
    "residual-attention": Plan(NARROW, 2.4, attention=True, residual=True),
    "two-stage": Plan(NARROW, 3.9, distance="net"),
    "dual-decoder": Plan(NARROW, 3.5, bottom=512, distance="decoder"),
}


class Pair(nn.Module):
    """Two convolutions; with a shortcut a residual block (He 2016)."""

    def __init__(self, inputs: int, width: int, outputs: int, residual: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Block(inputs, width), nn.Sequential(*[*Block(width, outputs)][:2])
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return F.relu(y if self.shortcut is None else y + self.shortcut(x))


class Gate(nn.Module):
    """Additive attention: the weight of each pixel of a skip (Oktay 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.of_skip = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), Norm(channels))
        self.of_signal = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), Norm(channels))
        self.weigh = nn.Sequential(nn.Conv2d(channels, 1, 1, bias=False), Norm(1), nn.Sigmoid())

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        return skip * self.weigh(F.relu(self.of_skip(skip) + self.of_signal(signal)))


class Up(nn.Module):
    """From one stride to the next finer one, with its skip."""

    def __init__(self, inputs: int, outputs: int, plan: Plan) -> None:
        super().__init__()
        interpolated = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), Block(inputs, outputs)
        )
        self.up = (
            interpolated if plan.attention else nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        )
        self.gate = Gate(outputs) if plan.attention else None
        self.block = Pair(2 * outputs, outputs, outputs, plan.residual)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        return self.block(torch.cat([x, skip if self.gate is None else self.gate(skip, x)], dim=1))


class Encoder(nn.Module):
    """Images -> features at strides 1, 2, 4, 8, 16."""

    def __init__(self, inputs: int, plan: Plan) -> None:
        super().__init__()
        outputs = [*plan.widths[:-1], plan.bottom or plan.widths[-1]]
        sizes = zip([inputs, *plan.widths[:-1]], plan.widths, outputs)
        self.blocks = nn.ModuleList(Pair(*size, plan.residual) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [self.blocks[0](x)]
        for block in self.blocks[1:]:
            features.append(block(F.max_pool2d(features[-1], 2)))
        return features


class Decoder(nn.Module):
    """Features -> one map."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        inputs = (plan.bottom or plan.widths[-1], *plan.widths[-2:0:-1])
        self.ups = nn.ModuleList(Up(i, o, plan) for i, o in zip(inputs, plan.widths[-2::-1]))
        self.out = nn.Conv2d(plan.widths[0], 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x, *skips = reversed(features)
        for up, skip in zip(self.ups, skips, strict=True):
            x = up(x, skip)
        return self.out(x)


class Unet(nn.Module):
    """One of `NETS`.

    Maps (B, C, H, W): a foreground logit. A net with a distance map adds the depth in the nucleus:
    about 0 at its boundary and outside, 1 at its deepest pixel.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.encoder, self.foreground = Encoder(3, plan), Decoder(plan)
        self.second = Encoder(4, plan) if plan.distance == "net" else None
        self.depth = Decoder(plan) if plan.distance else None
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for decoder in filter(None, (self.foreground, self.depth)):
            nn.init.normal_(decoder.out.weight, std=0.1)  # maps begin near 0, not at several units

    def forward(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """RGB float images (B, 3, h, w), 0..255, multiples of 16 px -> maps (B, C, *size)."""
        x = ((images - self.mean) / STD).contiguous(memory_format=torch.channels_last)
        features = self.encoder(x)
        maps = [self.foreground(features)]
        if self.second is not None:
            # The second stage sees the foreground; no gradient of it reaches the first stage.
            features = self.second(torch.cat([x, maps[0].detach().sigmoid()], dim=1))
        if self.depth is not None:
            maps.append(self.depth(features))
        x = torch.cat(maps, dim=1).contiguous()
        return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear")

    def loss(
        self, maps: Tensor, labels: Tensor, counted: Tensor, n: int, weights: Loss
    ) -> dict[str, Tensor]:
        """Dice and cross-entropy on the foreground, squared error on the depth.

        Args:
            maps: (B, C, H, W).
            labels: label maps (B, H, W).
            counted: bool (B, H, W), the pixels that count.
            n: largest id in `labels`.
            weights: of the terms.

        Returns:
            Weighted terms, each (B,).
        """
        logits, nucleus = maps[:, 0], labels > 0
        cross_entropy = losses.binary_cross_entropy(logits, nucleus, counted)
        terms = {
            "cross_entropy": weights.cross_entropy * cross_entropy,
            "dice": weights.dice * losses.dice(logits.sigmoid(), nucleus, counted),
        }
        if self.depth is not None:
            depth = targets.depth(labels, targets.classes(labels), n, counted)
            square = (maps[:, 1] - depth).square() * counted
            mean = square.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
            terms["depth"] = DEPTH * mean
        return terms

    def probabilities(self, maps: Tensor) -> Tensor:
        """Maps (B, C, H, W) with a probability in place of the logit."""
        return torch.cat([maps[:, :1].sigmoid(), maps[:, 1:]], dim=1)

    def instances(self, maps: np.ndarray, config: Instances) -> np.ndarray:
        """Probabilities (C, H, W) of one image -> label map int32 (H, W), 0 = background."""
        foreground = maps[0]
        if self.depth is None:
            return instances.from_foreground(foreground, config)
        return instances.from_foreground(foreground, config, maps[1], sigma=SIGMA, reach=REACH)

    def fold(self) -> "Unet":
        """For prediction only: nothing is merged or folded."""
        return self.requires_grad_(False)

    def trainable(self) -> dict[str, Tensor]:
        """All that training changes, by name: the parameters, and the statistics of BatchNorms.

        The statistics have no gradient, so the optimizer skips them. They are averaged, saved and
        restored with their weights.
        """
        statistics = {name: b for name, b in self.named_buffers() if name != "mean"}
        return dict(self.named_parameters()) | statistics


def build(
    name: str,
    config: Model,
    base: Base,
    *,
    seed: int,
    checkpoint: bool = False,
    start: Path | None = None,
) -> Unet:
    """The net `name` of `NETS`, as `fit` builds its model.

    Args:
        name: key of `NETS`.
        config: of MobileSAM; not used.
        base: of MobileSAM; not used.
        seed: of the random weights.
        checkpoint: not used.
        start: adapter file of a run of the same net; its weights replace the random ones.

    Raises:
        UserError: `start` is no such file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Unet(NETS[name])
    if start is not None:
        load(net, start)
    return net


def load(net: Unet, path: Path) -> None:
    """Load the adapter file of a run of the same net.

    Raises:
        UserError: the file is of another net.
    """
    weights, _ = checkpoint.read_tensors(path)
    checkpoint.put_weights(net, weights, path)
