"""LoRA for linear layers (Hu et al., 2021, arXiv 2106.09685).

An adapted layer keeps `weight` and `bias` under the names of its base. So a base checkpoint loads
into an adapted model unchanged, and merged weights go back under the same names.

A layer is always adapted whole. TinyViT's `attn.qkv` interleaves its rows by head: q, k and v of
head 0, then of head 1. No slice of its rows is "the q rows".
"""

import math
import re

import torch.nn.functional as F
from torch import Tensor, nn

from nucsam.errors import UserError
from nucsam.files import shortened
from nucsam.model.frozen import autocast_type, derived


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: y = x Wᵀ + b + (alpha / rank) · x Aᵀ Bᵀ.

    `lora_A` (rank, in) is drawn as `nn.Linear` draws its weight, from the global generator.
    `lora_B` (out, rank) is zero, so a new layer equals its base bit for bit. The layer shares
    `weight` and `bias` with its base. The caller decides which parameters train.

    Args:
        base: layer to adapt.
        rank: inner dimension of the update, at least 1.
        alpha: numerator of the update's scale, alpha / rank.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float) -> None:
        # On the meta device the weight that `base.weight` replaces takes no memory.
        super().__init__(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        self.weight = base.weight
        self.bias = base.bias
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features)
        rows = rows.to(autocast_type(rows))  # once for both products
        y = F.linear(rows, *derived(self, (self.weight, self.bias)))
        down = F.linear(rows, self.lora_A)
        # In place: no gradient needs y, so the update costs neither a map nor a pass over y.
        # Autocast does not cast the operands of in-place operations, so this line does.
        y.addmm_(down, self.lora_B.t().to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) · B A, (out, in), computed in float64 and returned in W's dtype."""
        update = self.lora_B.detach().double() @ self.lora_A.detach().double()
        return (self.weight.detach().double() + self.scale * update).to(self.weight.dtype)


def inject(module: nn.Module, pattern: str, *, rank: int, alpha: float) -> list[str]:
    """Adapt, in place, each linear layer of `module` whose dotted name matches `pattern`.

    Layers that are adapted already stay as they are.

    Args:
        module: model to change.
        pattern: regular expression, searched anywhere in the name. For example,
            `attn\\.(qkv|proj)$` finds `layers.1.blocks.0.attn.qkv`.
        rank, alpha: as in `LoRALinear`.

    Returns:
        The names of the layers that it adapted, in the order of the model.

    Raises:
        UserError: no linear layer matches.
    """
    linears = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    names = [name for name in linears if re.search(pattern, name)]
    if not names:
        raise UserError(
            f"pattern: found {pattern!r}, which matches no linear layer, expected one that does; "
            f"the linear layers are {shortened(list(linears))}"
        )
    for name in names:
        module.set_submodule(name, LoRALinear(linears[name], rank=rank, alpha=alpha))
    return names


def merge(module: nn.Module) -> None:
    """Replace, in place, each adapted layer by a plain linear layer with the merged weight.

    The merged weights do not train. The module computes the same, to rounding.
    """
    adapted = {n: layer for n, layer in module.named_modules() if isinstance(layer, LoRALinear)}
    for name, layer in adapted.items():
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        linear.bias = layer.bias
        module.set_submodule(name, linear.train(layer.training))
