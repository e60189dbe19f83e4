"""The squares of the gradients along the eigenvectors of A and G, of which EKFAC's diagonal is the mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kfaclinalg import KroneckerBasis, LayerFactors

from ._blocks import Dense
from ._layer import Layer
from ._processes import over_processes
from ._rows import rows_of
from ._statistics import Statistic

BUFFER = 2**22  # entries of the gradients of single examples at once


def mean_squares(statistic: Statistic, layer: Layer, F: Any, moments: LayerFactors, scale: float) -> Tensor | None:
    """The mean over the examples of (K_Gᵀ ∇W K_A)², elementwise, ∇W being the gradient of one: (..., m, n).

    Where the examples are not seen one at a time (normalisations, tied weights) it is what A ⊗ G says of it. None
    without a basis F, or without examples.
    """
    if not isinstance(F, KroneckerBasis):
        return None
    if layer.dense is None:
        a, g = (((M @ K) * K).sum(-2) for M, K in zip(moments, (F.K_A, F.K_B), strict=True))
        return g[..., :, None] * a[..., None, :]
    squares = scale**2 * squared_gradients(statistic, layer.dense, F.K_A, F.K_B)  # type: ignore[arg-type]
    (squares,), (N,) = over_processes([squares], [statistic.examples])
    return squares / N if N else None


def squared_gradients(statistic: Statistic, block: Dense, K_A: Tensor, K_G: Tensor) -> Tensor:
    """Σ (K_Gᵀ ∇W K_A)² over the examples, elementwise, ∇W being the gradient of one example: (..., m, n)."""
    total = K_A.new_zeros(*K_A.shape[:-2], K_G.shape[-1], K_A.shape[-1])
    for pairs in statistic.uses.values():
        if (rows := rows_of(statistic, block, pairs)) is not None:  # of all positions that an example's gradient sums
            rows = rows.reduced() if statistic.sharing[block.name] == "reduce" else rows
            total = total + _summed_squares(_projected(rows.a, K_A), _projected(rows.g, K_G))
    return total


def _projected(x: Tensor, K: Tensor) -> Tensor:
    """x K for rows x (N, R, ..., n): (..., N, R, n)."""
    return x @ K if K.ndim == 2 else x.movedim(2, 0) @ K[:, None]


def _summed_squares(a: Tensor, g: Tensor) -> Tensor:
    if a.shape[-2] == 1:
        return g[..., 0, :].square().mT @ a[..., 0, :].square()
    at_once = max(1, BUFFER // (a.shape[-1] * g.shape[-1]))
    chunks = zip(a.split(at_once, -3), g.split(at_once, -3), strict=True)
    return sum((g.mT @ a).square().sum(-3) for a, g in chunks)
