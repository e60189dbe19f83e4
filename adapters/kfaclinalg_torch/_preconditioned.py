"""The gradients of a model's parameters, preconditioned in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Kronecker

from ._inverses import Inverses
from ._layer import Layer
from ._outer import outer_gradient


def precondition(
    layers: Sequence[Layer],
    inverses: Inverses,
    seen: Mapping[Any, Any],
    dtype: torch.dtype,
    length: float | None,
    clip: tuple[float, float] | None,
    seed: int,
) -> None:
    """Every ∇W becomes G⁻¹ ∇W A⁻¹; `seen` is what the loss's backward pass showed of the blocks.

    `length` is then the root mean square of each. `clip` are κ and lr: the whole update is multiplied by
    min(1, √(κ / Σ lr² |⟨V, U⟩|)).
    """
    ready = {layer.name: layer for layer in layers if all(map(_is_trained, layer.parameters))}
    Vs = ((name, _gradient_of(layer, inverses, seen, dtype, seed)) for name, layer in ready.items())
    agreement: Any = 0.0
    changed = []
    for name, U in inverses.apply(Vs):
        parts = ready[name].parts(_gradient, U if length is None else of_length(U, length))
        if clip is not None:
            agreement = agreement + torch.stack([(g * u).sum() for g, u in parts]).sum().abs()
        for g, u in parts:
            g.copy_(u)
            changed.append(g)
    if clip is not None and changed:
        torch._foreach_mul_(changed, clipping(clip, agreement))


def clipping(clip: tuple[float, float], agreement: Tensor) -> Tensor:
    """min(1, √(κ / (lr² Σ |⟨V, U⟩|))), 1 where there is nothing to limit."""
    kappa, lr = clip
    length = lr**2 * agreement
    return torch.where(length == 0, 1.0, torch.sqrt(kappa / length).clamp(max=1.0))


def _gradient_of(layer: Layer, inverses: Inverses, seen: Mapping[Any, Any], dtype: torch.dtype, seed: int) -> Any:
    """∇W (m, n), as the `OuterProduct` of the batch's own g and a where it is that and has an inverse for it."""
    block, V = layer.dense, layer.matrix(_gradient)
    if block is not None and isinstance(inverses.inverses.get(layer.name), Kronecker):
        uses = seen.get(block)
        if uses and (outer := outer_gradient(block, uses, V, seed)):
            return outer
    return V.to(dtype)


def of_length(U: Tensor, length: float) -> Tensor:
    """U with this root mean square; zero stays zero."""
    norm = torch.linalg.vector_norm(U, dtype=torch.float64)  # squares may leave float32's range
    return U * (length * U.numel() ** 0.5 / torch.where(norm == 0, 1.0, norm))


def _is_trained(parameter: Tensor) -> bool:
    """Whether it has a gradient, and was not frozen since."""
    return parameter.grad is not None and parameter.requires_grad


def _gradient(parameter: Tensor) -> Any:
    return parameter.grad
