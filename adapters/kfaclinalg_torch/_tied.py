"""The curvature of weights that several layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, LayerFactors


def combined(layers: Sequence[LayerFactors]) -> LayerFactors:
    """The A ⊗ G with the partial traces of Σ A_i ⊗ G_i: exact for one layer, and for proportional ones.

    A = Σ tr(G_i) A_i / Σ tr(A_i) tr(G_i) and G = Σ tr(A_i) G_i.
    """
    if len(layers) == 1:
        return layers[0]
    traces = [(A.trace(), G.trace()) for A, G in layers]
    total = torch.stack([a * g for a, g in traces]).sum().clamp(min=torch.finfo(torch.float32).tiny)
    A = _sum([(g / total, layer.A) for (_, g), layer in zip(traces, layers, strict=True)])
    return LayerFactors(A, _sum([(a, layer.G) for (a, _), layer in zip(traces, layers, strict=True)]))


def _sum(terms: Sequence[tuple[Tensor, Any]]) -> Any:
    """Σ c M; the diagonal of it where one of them is a `Diagonal`."""
    if any(isinstance(M, Diagonal) for _, M in terms):
        return Diagonal(torch.stack([c * M.diagonal() for c, M in terms]).sum(0))
    return torch.stack([c * M for c, M in terms]).sum(0)
