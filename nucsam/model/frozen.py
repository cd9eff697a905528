"""Tensors derived from frozen weights, computed once a run."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def autocast_type(x: Tensor) -> torch.dtype:
    """The type in which autocast computes products of x; its own where autocast is off."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def derived(
    owner: nn.Module,
    sources: Sequence[Tensor | None],
    make: Callable[[], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor | None, ...]:
    """`make()` in the type of autocast, computed again only after a source has changed.

    Where a source trains, and in a graph for the compiler, it is computed each time and not cast.

    Args:
        owner: module that keeps the result, outside of its state dict. It keeps one result.
        sources: all tensors that the result depends on; None where a layer has no bias.
        make: computes the result from `sources`; None = the result is the sources.
    """
    tensors = [source for source in sources if source is not None]
    if torch.compiler.is_compiling() or any(tensor.requires_grad for tensor in tensors):
        return make() if make else tuple(sources)
    dtype = autocast_type(tensors[0])
    # A change in place raises `_version`. No new tensor takes the id of a kept one.
    key = dtype, [(id(t), t._version, t.dtype, t.device) for t in tensors]
    kept = getattr(owner, "_derived", None)
    if kept is None or kept[0] != key:
        with torch.no_grad():
            made = make() if make else sources
        result = tuple(t if t is None else t.to(dtype) for t in made)
        kept = owner._derived = key, tensors, result
    return kept[2]
