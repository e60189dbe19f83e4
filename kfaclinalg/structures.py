"""What the curvature of a network is taken to be: the values of `structure`, each with its own constants.

A structure makes of the averaged factors what is `fitted` to them in a refresh, and of that an `inverse` for each γ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from . import _checks, _network
from ._backends import Scalar
from .blocks import BlockDiagonal, BlockTridiagonalInverse
from .curvature import block_diagonal_inverse, block_tridiagonal_inverse, low_rank_inverse
from .damping import NORMS
from .factors import Factors, LayerFactors
from .spectral import Eigen, is_dense


class Structure(Protocol):
    """A form of the inverse curvature. Where it is `observed`, squared gradients change it in every step."""

    linked: bool  #: whether it takes the cross moments of neighbouring layers
    observes: bool  #: whether it takes the squares of the gradients in its own basis

    def fitted(self, factors: Factors, old: Any, /) -> Any:
        """What a refresh makes of the averages; `old` is the result of the refresh before, or None."""

    def inverse(self, fitted: Any, gamma: Scalar, /) -> Any:
        """The inverse curvature, damped by γ, or γ² = λ + η where the damping is exact."""


class _Plain:
    linked = observes = False

    def fitted(self, factors: Factors, old: Any, /) -> Any:
        return factors


@dataclass(frozen=True)
class Factored(_Plain):
    """F̆⁻¹ with the blocks (A + π γ I)⁻¹ ⊗ (G + γ/π I)⁻¹: `block_diagonal_inverse` (Sections 4.2 and 6.3).

    >>> import numpy as np
    >>> one = Factors((LayerFactors(np.eye(1), np.eye(1)),))
    >>> Factored().inverse(one, 1.0) @ (np.eye(1),)
    (array([[0.25]]),)
    """

    norm: str = "trace"  #: of π
    method: str = "explicit"  #: as in `Kronecker.inverse`

    def __post_init__(self) -> None:
        _checks.check_choice("norm", self.norm, NORMS)

    def inverse(self, fitted: Factors, gamma: Scalar, /) -> BlockDiagonal:
        return block_diagonal_inverse(fitted, gamma, norm=self.norm, method=self.method)


@dataclass(frozen=True)
class Tridiagonal(_Plain):
    """F̂⁻¹ = Ξᵀ Λ Ξ: `block_tridiagonal_inverse` (Section 4.3).

    >>> import numpy as np
    >>> from kfaclinalg import Link
    >>> one = np.eye(1)
    >>> factors = Factors((LayerFactors(one, one),) * 2, (Link(0.5 * one, one),))
    >>> Tridiagonal().inverse(factors, 0.0).apply((one, 0 * one))[0]
    array([[1.33333333]])
    """

    norm: str = "trace"  #: of π
    linked = True

    def __post_init__(self) -> None:
        _checks.check_choice("norm", self.norm, NORMS)

    def inverse(self, fitted: Factors, gamma: Scalar, /) -> BlockTridiagonalInverse:
        """Of the layers that the links join, the first ones; the others are block-diagonal beside them."""
        length = len(fitted.links) + 1
        chain = block_tridiagonal_inverse(fitted._replace(layers=fitted.layers[:length]), gamma, norm=self.norm)
        if length == len(fitted.layers):
            return chain
        others = block_diagonal_inverse(Factors(fitted.layers[length:]), gamma, norm=self.norm)
        return BlockTridiagonalInverse(chain.Psi_A, chain.Psi_G, (*chain.Lambda, *others.blocks))


@dataclass(frozen=True)
class LowRank(_Plain):
    """`Factored`, of rank_k(A) and rank_k(G - diag G) + diag G: `low_rank_inverse`.

    A layer with a side that is diagonal keeps both sides as they are.

    >>> import numpy as np
    >>> one = Factors((LayerFactors(np.diag([8.0, 1.0]), np.eye(1)),))
    >>> (LowRank(1).inverse(one, 0.5) @ (np.ones((1, 2)),))[0].round(6)
    array([[0.088889, 0.8     ]])
    """

    rank: int
    norm: str = "trace"  #: of π

    def __post_init__(self) -> None:
        _checks.integer("rank", self.rank, 1)
        _checks.check_choice("norm", self.norm, NORMS)

    def inverse(self, fitted: Factors, gamma: Scalar, /) -> BlockDiagonal:
        def of(layer: LayerFactors) -> Any:
            one = Factors((layer,))
            if not is_dense(layer):
                return block_diagonal_inverse(one, gamma, norm=self.norm)
            return low_rank_inverse(one, gamma, rank=self.rank, norm=self.norm)

        return BlockDiagonal(tuple(of(layer).blocks[0] for layer in _network.layers(fitted).values()))


SHORT: dict[str, Any] = {"block-diagonal": Factored, "block-tridiagonal": Tridiagonal, "eigen": Eigen}


def structure_of(structure: Any, norm: str = "trace") -> Any:
    """The value that a short form stands for, with this norm of π; a value stays itself.

    Raises:
        TypeError, ValueError: an unknown short form, no structure, or a norm beside a structure that has its own.
    """
    if isinstance(structure, str):
        _checks.check_choice("structure", structure, SHORT)
        return _short(structure, norm)
    missing = [name for name in ("linked", "observes", "fitted", "inverse") if not hasattr(structure, name)]
    if missing or isinstance(structure, type):
        raise TypeError(f"structure is {structure!r}, expected one of {', '.join(map(repr, SHORT))} or a `Structure`")
    if norm != "trace":
        raise ValueError(f"pi_norm is {norm!r} beside structure {structure!r}, which has a norm of its own")
    return structure


@cache
def _short(name: str, norm: str) -> Any:
    """One value for all that ask, several times in each step."""
    return SHORT[name](norm)
