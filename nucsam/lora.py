"""LoRA (Hu et al., 2021, arXiv 2106.09685) for `nn.Linear`, in place and under the base's key names.

A `LoRALinear` is the linear layer it replaces plus `lora_A` and `lora_B`, so a base checkpoint loads unchanged
and the merged weights go back under the same keys. Layers are adapted whole: the rows of TinyViT's `attn.qkv`
are q, k and v of head 0, then of head 1, and so on, so that no slice of them is "the q rows".
"""

import math
import re

import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: y = x Wᵀ + b + (alpha / rank) · x Aᵀ Bᵀ.

    Takes over `base.weight` and `base.bias` (the same parameters, not copies). `lora_A` is (rank, in) and drawn
    from the global generator, `lora_B` is (out, rank) and zero, so that a new layer equals its base bit for bit.
    Which of the parameters train is the caller's decision.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, rank))
        self.reset_adapter()
        self.train(base.training)

    def reset_adapter(self) -> None:
        """Kaiming-uniform A, as `nn.Linear` draws its weight, and zero B."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.reshape(-1, self.in_features)
        y = F.linear(rows, self.weight, self.bias)
        down = F.linear(rows, self.lora_A)
        # In place, since neither product needs y for its gradient: the update costs no new map and no pass over y.
        # Autocast leaves in-place operations alone, hence the cast.
        y.addmm_(down, self.lora_B.t().to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)

    def merged_weight(self) -> Tensor:
        """W + (alpha / rank) · B A, (out, in), summed in float64 and given in W's dtype."""
        delta = self.lora_B.detach().double() @ self.lora_A.detach().double()
        return (self.weight.detach().double() + self.scale * delta).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"


def inject(module: nn.Module, pattern: str, *, rank: int, alpha: float) -> list[str]:
    """Adapts, in place, each `nn.Linear` of `module` whose dotted name matches, and returns their names in order.

    `pattern` is a regular expression looked for anywhere in the name (`re.search`: anchor it where that matters):
    `attn\\.(qkv|proj)$` finds `layers.1.blocks.0.attn.qkv`. Layers that are adapted already stay as they are.
    A pattern that matches no linear layer, or a rank below 1, is a ValueError.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be at least 1, found {rank}")
    linears = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not isinstance(child, LoRALinear)
    }
    try:
        chosen = [name for name in linears if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"the LoRA pattern {pattern!r} is no regular expression: {error}") from None
    if not chosen:
        raise ValueError(f"the LoRA pattern {pattern!r} matches none of the linear layers {_shortened(list(linears))}")
    for name in chosen:
        module.set_submodule(name, LoRALinear(linears[name], rank=rank, alpha=alpha))
    return chosen


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The `lora_A` and `lora_B` of every adapted layer, under their names in `module`; no copies."""
    return {
        f"{name}.{part}": getattr(child, part).detach()
        for name, child in _adapted(module)
        for part in ("lora_A", "lora_B")
    }


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with the updates added to the weights, under the base's keys. `module` is unchanged."""
    adapters = adapter_state_dict(module)
    state = {key: value for key, value in module.state_dict().items() if key not in adapters}
    return state | {f"{name}.weight": child.merged_weight() for name, child in _adapted(module)}


def merge(module: nn.Module) -> None:
    """Puts, in place, plain linear layers with the merged weights where `module` is adapted: it computes the same."""
    for name, child in _adapted(module):
        linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(child.merged_weight(), requires_grad=False), child.bias
        module.set_submodule(name, linear.train(child.training))


def _adapted(module: nn.Module) -> list[tuple[str, LoRALinear]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)]


def _shortened(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
