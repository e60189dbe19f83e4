"""The squares of the gradients along the eigenvectors of A and G, of which EKFAC's diagonal is the mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kfaclinalg import Diagonal, KroneckerEigen, LayerFactors

from ._blocks import Dense
from ._layer import Layer
from ._rows import rows_of
from ._statistics import Statistic
from ._use import Use

BUFFER = 2**22  # entries of the gradients of single examples at once


def mean_squares(
    statistic: Statistic, layer: Layer, F: Any, moments: LayerFactors | None, scale: float
) -> Tensor | None:
    """The mean over the examples of (Q_Gᵀ ∇W Q_A)², elementwise, ∇W being the gradient of one: (..., m, n).

    Where the examples are not seen one at a time (normalisations, tied weights) it is what A ⊗ G says of it. None
    without a basis F, or without examples.
    """
    if not isinstance(F, KroneckerEigen):
        return None
    if layer.dense is None:
        assert moments is not None
        a, g = (((M @ K) * K).sum(-2) for M, K in zip(moments, (F.Q_A, F.Q_B), strict=True))
        return g[..., :, None] * a[..., None, :]
    summed = squared_gradients(statistic, layer.dense, F.Q_A, F.Q_B)
    squares = scale**2 * (F.eigenvalues.new_zeros(F.eigenvalues.shape) if summed is None else summed)  # type: ignore[attr-defined]
    (squares,), (N,) = statistic.team.sums([squares], [statistic.examples], "the squares of the gradients")
    return squares / N if N else None


def squared_gradients(statistic: Statistic, block: Dense, Q_A: Any, Q_G: Any) -> Tensor | None:
    """Σ (Q_Gᵀ ∇W Q_A)² over the examples, elementwise, ∇W being the gradient of one example: (..., m, n).

    The gradients of examples with one position each are never formed: of g aᵀ it is (Q_Gᵀ g)² ((Q_Aᵀ a)²)ᵀ.
    """
    total: Any = None
    for draws in by_pass(statistic):
        turned = Turned(block, Q_A)
        alone: Any = None  # Σ of the squares of g over the draws, of examples with one position each
        for pairs in draws:
            if (rows := rows_of(statistic, block, pairs, turned)) is None:
                continue
            rows = rows.reduced() if statistic.sharing[block.name] == "reduce" else rows
            a, g = turned.rows(rows.a), projected(rows.g, Q_G)
            if a.shape[-2] == 1:
                alone = _plus(alone, g[..., 0, :].square())
            else:
                total = _plus(total, _summed_squares(a, g))
        if alone is not None:
            total = _with_product(total, alone.mT, a[..., 0, :].square())
    return total


class Turned:
    """The inputs of a pass along the eigenvectors of A: of each use once, for all draws of the targets.

    Where W is one matrix they come turned, so that no column of ones need be put beside them; otherwise they are turned
    as rows.
    """

    def __init__(self, block: Dense, Q: Any) -> None:
        self.block, self.Q = block, Q
        self._early = len(block.shape) == 2 and isinstance(Q, Tensor)
        self._known: dict[int, Tensor] = {}

    def __call__(self, use: Use, x: Tensor, N: int) -> Tensor:
        if id(use) not in self._known:
            self._known[id(use)] = self.block.projected(x, N, self.Q) if self._early else self.block.inputs(x, N)
        return self._known[id(use)]

    def rows(self, a: Tensor) -> Tensor:
        return a if self._early else projected(a, self.Q)


def projected(x: Tensor, Q: Any) -> Tensor:
    """x Q for rows x (N, R, ..., n): (..., N, R, n); the identity is a `Diagonal`."""
    if isinstance(Q, Diagonal):
        return x
    return x @ Q if Q.ndim == 2 else x.movedim(2, 0) @ Q[:, None]


def by_pass(statistic: Statistic) -> Iterable[list[Any]]:
    """What each pass showed, by the draws of its targets."""
    passes: dict[int, list[Any]] = {}
    for (number, _), pairs in statistic.uses.items():
        passes.setdefault(number, []).append(pairs)
    return passes.values()


def _plus(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x.add_(y)


def _with_product(total: Tensor | None, X: Tensor, Y: Tensor) -> Tensor:
    """X Y, added to what there is in its place."""
    if total is None:
        return X @ Y
    return total.addmm_(X, Y) if X.ndim == 2 else total.add_(X @ Y)


def _summed_squares(a: Tensor, g: Tensor) -> Any:
    at_once = max(1, BUFFER // (a.shape[-1] * g.shape[-1]))
    chunks = zip(a.split(at_once, -3), g.split(at_once, -3), strict=True)
    return sum((g.mT @ a).square().sum(-3) for a, g in chunks)
