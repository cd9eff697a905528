"""What the encoders share: normalised pixels, the form of their maps, recomputed blocks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nucsam.errors import UserError

# The normalised images (B, 3, H, W), then each map (B, C, H / stride, W / stride) of the encoder,
# in the order of its `maps`.
Features = tuple[Tensor, ...]

MULTIPLE = 32  # model px that the sides of an encoder's images are multiples of


class Pixels(nn.Module):
    """RGB 0..255 -> (RGB - mean) / std, channel by channel. The defaults are SAM's."""

    def __init__(
        self,
        mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        std: tuple[float, float, float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W), in channels-last memory.

        Raises:
            UserError: H or W is no multiple of `MULTIPLE`.
        """
        height, width = images.shape[2:]
        if height % MULTIPLE or width % MULTIPLE:
            raise UserError(
                f"images: found {height} x {width} px, expected multiples of {MULTIPLE} px"
            )
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)


def run_block(
    function: Callable[[nn.Module, Tensor], Tensor], block: nn.Module, x: Tensor, recompute: bool
) -> Tensor:
    """`function(block, x)`; with `recompute`, the backward pass computes its activations again."""
    if recompute:
        return checkpoint(function, block, x, use_reentrant=False, preserve_rng_state=False)
    return function(block, x)
