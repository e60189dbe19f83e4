"""The structures in the eigenvectors of A and G, in which damping is exact and costs no new factorisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _backends, _checks, _network
from ._backends import Array, Scalar
from .blocks import BlockDiagonal
from .curvature import block_diagonal_inverse
from .damping import NORMS
from .factors import Factors, LayerFactors
from .kronecker import Kronecker
from .kronecker_eigen import KroneckerEigen
from .low_rank import Diagonal, LowRankPlusDiagonal


@dataclass(frozen=True)
class Exact:
    """(A ⊗ G + γ² I)⁻¹ (eqn 6), without the factored approximation of the damping.

    A and G are moments: what rounding leaves below zero of their eigenvalues is zero. A layer with a side that is
    diagonal, whose eigenvectors would be dense, is `Factored`.

    >>> import numpy as np
    >>> one = Factors((LayerFactors(np.eye(1), np.eye(1)),))
    >>> Exact().inverse(Exact().fitted(one, None), 1.0) @ (np.eye(1),)
    (array([[0.5]]),)
    """

    norm: str = "trace"  #: of π, for layers with a diagonal side
    linked = observes = False

    def __post_init__(self) -> None:
        _checks.check_choice("norm", self.norm, NORMS)

    def fitted(self, factors: Factors, old: Any, /) -> tuple[Any, ...]:
        """A ⊗ G of each layer as a `KroneckerEigen`."""
        return tuple(spectrum(layer) if is_dense(layer) else layer for layer in _network.layers(factors).values())

    def inverse(self, fitted: tuple[Any, ...], gamma: Scalar, /) -> BlockDiagonal:
        def of(F: Any) -> Any:
            if isinstance(F, LayerFactors):
                return block_diagonal_inverse(Factors((F,)), gamma, norm=self.norm).blocks[0]
            return F.shifted(gamma**2).inverse()  # no eigenvalue is less than γ²

        return BlockDiagonal(tuple(map(of, fitted)))


@dataclass(frozen=True)
class Eigen(Exact):
    """EKFAC (George et al. 2018): `Exact` with the second moments of the gradients along K-FAC's eigenvectors.

    s is the moving average of the squared gradients of the examples in the basis Q_A ⊗ Q_G. It starts as the product of
    the eigenvalues; where the basis changes it becomes the diagonal of the same matrix in the new one.

    >>> import numpy as np
    >>> fitted = Eigen().fitted(Factors((LayerFactors(np.eye(1), np.eye(1)),)), None)
    >>> fitted = Eigen().observed(fitted, [np.asarray([[3.0]])], decay=0.5)
    >>> Eigen().inverse(fitted, 0.0) @ (np.eye(1),)
    (array([[0.5]]),)
    """

    observes = True

    def fitted(self, factors: Factors, old: Any, /) -> tuple[Any, ...]:
        new = super().fitted(factors, None)
        return new if old is None else tuple(map(_turned, new, old))

    def observed(self, fitted: tuple[Any, ...], squares: Sequence[Any], /, *, decay: Scalar) -> tuple[Any, ...]:
        """decay * s + (1 - decay) * squares, mean squares of the gradients in the bases; None leaves a layer alone."""

        def of(F: Any, S: Array | None) -> Any:
            if S is None or isinstance(F, LayerFactors):
                return F
            xp = _backends.namespace_of(S)
            finite = xp.isfinite(xp.sum(S))  # squares of squares overflow before A and G do
            return F.map(lambda s: xp.where(finite, decay * s + (1 - decay) * S, s))

        return tuple(of(F, S) for F, S in zip(fitted, squares, strict=True))


def is_dense(layer: LayerFactors) -> bool:
    return not any(isinstance(M, Diagonal | LowRankPlusDiagonal) for M in layer)


def spectrum(layer: LayerFactors) -> KroneckerEigen:
    """A ⊗ G of moments: what rounding leaves below zero is zero."""
    return Kronecker(layer.A, layer.G).eigh().map(lambda s: _backends.namespace_of(s).where(s < 0, 0.0, s))


def _turned(new: Any, old: Any) -> Any:
    """The new basis with the diagonal, in it, of the old matrix."""
    if isinstance(new, LayerFactors):
        return new
    R_A, R_G = old.Q_A.mT @ new.Q_A, old.Q_B.mT @ new.Q_B
    return new.map(lambda s: (R_G * R_G).mT @ old.eigenvalues @ (R_A * R_A))
