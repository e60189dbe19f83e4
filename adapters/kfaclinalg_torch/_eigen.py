"""EKFAC: K-FAC's eigenvectors, with the variances that the gradients really have along them (George et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import KroneckerBasis

from ._checkpoint import check, is_matrix
from ._discovery import Layer
from ._inverses import Build, Inverses
from ._modules import Dense
from ._statistics import Statistic, over_processes, several_processes

BUFFER = 2**22  # entries of the gradients of single examples at once


class EigenInverses(Inverses):
    """(Q_A ⊗ Q_G) diag(S + damping)⁻¹ (Q_A ⊗ Q_G)ᵀ in the eigenvectors of A and G.

    S is the moving average of the squared gradients of the examples in that basis. It starts as the product of the
    eigenvalues; where the basis changes it becomes the diagonal of the same matrix in the new one. Normalisations,
    embeddings and tied weights keep the product.
    """

    keeps_uses = True

    def __init__(self, build: Build, layers: Sequence[Layer]) -> None:
        super().__init__(build)
        self.blocks = {layer.name: block for layer in layers if (block := layer.dense) is not None}
        self.squares: dict[str, Tensor] = {}

    def observe(self, statistic: Statistic, scale: float, decay: float, damping: float) -> None:
        for name, block in self.blocks.items():
            if name in self.squares and (block in statistic.blocks or several_processes()):
                K = self.inverses[name]
                squares = scale**2 * squared_gradients(statistic, block, K.K_A, K.K_B)
                (squares,), (N,) = over_processes([squares], [statistic.examples])
                if not N:
                    continue
                S = torch.lerp(squares / N, self.squares[name], decay)
                # squares of squares overflow before A and G do
                self.squares[name] = torch.where(torch.isfinite(squares.sum()), S, self.squares[name])
                self.inverses[name] = KroneckerBasis(K.K_A, K.K_B, 1 / (self.squares[name] + damping))

    def state(self) -> dict[str, Any]:
        return super().state() | {"squares": self.squares}

    def check(self, state: Any, weights: Mapping[str, Tensor]) -> None:
        super().check(state, weights)
        for name, S in state["squares"].items():
            fits = name in state["inverses"] and is_matrix(S, *weights[name].shape)
            check(fits, f"the squares of {name!r} do not fit")

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.squares = state["squares"]

    def _finished(self, name: str, K: Any, damping: float) -> Any:
        if not isinstance(K, KroneckerBasis) or name not in self.blocks:
            return K
        if name in self.squares:
            old = self.inverses[name]
            R_A, R_G = (old.K_A.mT @ K.K_A).square(), (old.K_B.mT @ K.K_B).square()
            S = R_G.mT @ self.squares[name] @ R_A
        else:
            weights: Any = K.weights
            S = (1 / weights - damping).clamp(min=0.0)
        self.squares[name] = S
        return KroneckerBasis(K.K_A, K.K_B, 1 / (S + damping))


def squared_gradients(statistic: Statistic, block: Dense, K_A: Tensor, K_G: Tensor) -> Tensor:
    """Σ (K_Gᵀ ∇W K_A)² over the examples, elementwise, ∇W being the gradient of one example: (..., m, n)."""
    total = K_A.new_zeros(*K_A.shape[:-2], K_G.shape[-1], K_A.shape[-1])
    for pairs in statistic.uses.values():
        rows, slopes = [], []
        for use, g in (pair for pair in pairs if pair[0].block is block):
            N, (x, s) = use.examples(), use.pair(g, statistic.dtype)
            rows.append(block.inputs(x, N))
            slopes.append(block.outputs(x, s, N))
        if not rows:
            continue
        a, g = torch.cat(rows, dim=1), torch.cat(slopes, dim=1)  # of all positions that an example's gradient sums
        if statistic.sharing[block.name] == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
        total = total + _summed_squares(_projected(a, K_A), _projected(g, K_G))
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
