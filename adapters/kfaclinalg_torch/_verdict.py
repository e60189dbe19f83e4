"""Which modules a first pass has shown to be something else than their rule says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._blocks import Block
from ._discovery import Found, Site
from ._entries import Entries
from ._layer import Layer
from ._once import still


def disagreement(site: Site, module: nn.Module, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Why the module is not what its rule says, of the output of its own pass, or None for that; "" where it is."""
    with torch.no_grad(), still(module):
        try:
            came = output if output is not None else type(module).forward(module, *args, **kwargs)
            if agree(came, site.rule.formula(module, *args, **kwargs)):  # type: ignore[misc]
                return ""
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            pass
    return f"the forward pass of this {type(module).__name__} is one of its own"


def misjudged(
    others: Mapping[nn.Module, str], called: set[Block], found: Found, outputs: Tensor | None
) -> dict[Layer, str]:
    """The layers that a first pass, which gave these outputs, has shown to be none, and why.

    `others` are modules that do something else than their rule says; of the blocks that are not among those `called`
    the weights may be used without it. Where the outputs are not known the gradients tell.
    """
    reasons = {block: why for module, why in others.items() for block in found.sites[module].blocks}
    gone = {layer: reasons[block] for layer in found.layers for block in layer.blocks if block in reasons}
    shown = {p for block in called for p in block.parameters}
    silent = [
        layer
        for layer in found.layers
        if layer not in gone and layer.parameters[0] not in shown and not isinstance(layer.blocks[0], Entries)
    ]
    if silent:
        parameters = [layer.parameters[0] for layer in silent]
        slopes: Any = [p.grad for p in parameters]
        if outputs is not None:
            slopes = torch.autograd.grad(outputs.sum(), parameters, retain_graph=True, allow_unused=True)
        used = (layer for layer, g in zip(silent, slopes, strict=True) if g is not None)
        gone |= dict.fromkeys(used, "its weights are used without a call of the module")
    return gone


def agree(came: Any, expected: Any) -> bool:
    """Whether two results are the same to rounding, NaN and infinities too."""
    pairs = zip(tree_leaves(came), tree_leaves(expected), strict=True)
    return all(_is_close(x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point())


def _is_close(x: Tensor, y: Tensor) -> bool:
    eps = torch.finfo(x.dtype).eps
    if x.shape != y.shape:
        return False
    finite, norm = y.isfinite(), torch.linalg.vector_norm
    if not torch.equal(x.isfinite(), finite):
        return False
    x, y = (torch.where(finite, M, 0.0).double() for M in (x, y))
    return bool(norm(x - y) <= 16 * eps * norm(y))
