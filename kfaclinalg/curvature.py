"""From the factors of a network and a damping strength to its inverse curvature (Sections 4.2, 4.3 and 6.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from . import _backends, _checks, _network
from ._backends import Scalar
from ._sides import ROUTINES, inverses, resolve_sides, side
from ._value import rebuilt
from .blocks import BlockDiagonal, BlockTridiagonalInverse
from .damping import _shifts, factored_tikhonov
from .factors import Factors, LayerFactors
from .kronecker import Kronecker, shifted_inverse
from .kronecker_basis import KroneckerBasis
from .kronecker_eigen import eigendecompositions
from .low_rank import LowRankPlusDiagonal, low_rank, low_rank_plus_diagonal

T = TypeVar("T")
Gamma = Any  # a `Scalar`, or a tuple of one for each layer


def block_diagonal_inverse(
    factors: Factors, gamma: Gamma, /, *, norm: str = "trace", method: str = "explicit"
) -> BlockDiagonal:
    """F̆⁻¹ with the blocks (A_i + π_i γ I)⁻¹ ⊗ (G_i + γ/π_i I)⁻¹ (Sections 4.2 and 6.3). Links are not used.

    γ is a number, or a tuple of one for each layer. `method` is as in `Kronecker.inverse`. About Σ n_i³ + m_i³ flops. A
    layer whose damped factors are not positive definite becomes NaN, the others do not.

    Raises:
        TypeError, ValueError: as for `factored_tikhonov`, or no layers.

    >>> import numpy as np
    >>> from kfaclinalg import LayerFactors
    >>> factors = Factors((LayerFactors(A=np.eye(2), G=3 * np.eye(1)),))
    >>> (block_diagonal_inverse(factors, 0.0) @ (np.asarray([[6.0, 3.0]]),))[0]
    array([[2., 1.]])
    """
    _checks.check_choice("method", method, ROUTINES)
    layers = _with_gammas(factors, gamma)
    shifts = (x for at, M, g in layers for x in _checks.named(at, _shifts, M, g, norm))
    inverted = inverses((M for _, layer, _ in layers for M in layer), shifts, method)
    return BlockDiagonal(tuple(rebuilt(Kronecker, pair) for pair in _pairs(inverted)))


def block_tridiagonal_inverse(factors: Factors, gamma: Gamma, /, *, norm: str = "trace") -> BlockTridiagonalInverse:
    """F̂⁻¹ = Ξᵀ Λ Ξ, for the F̂ that agrees with F̃ on the tridiagonal blocks and has a block-tridiagonal inverse (4.3).

    γ, a number or a tuple of one for each layer, damps their factors, never the links, which are of the same samples. A
    layer that is not positive definite, by itself or given the next, becomes NaN. About Σ 15 (n_i³ + m_i³) flops.

    Raises:
        TypeError, ValueError: as for `factored_tikhonov`; or there is not one link fewer than layers, or one of them
            does not fit its layers.

    >>> import numpy as np
    >>> from kfaclinalg import LayerFactors, Link
    >>> one = np.eye(1)
    >>> factors = Factors((LayerFactors(one, one),) * 2, (Link(0.5 * one, one),))
    >>> (block_tridiagonal_inverse(factors, 0.0) @ (one, 0 * one))[0]
    array([[1.33333333]])
    """
    layers = list(_damped(factors, gamma, norm))
    _network.check_links(layers, factors.links)
    # Layer i given layer i+1, with X the link of one side and L Lᵀ = A_{i+1}: Ψ = X A_{i+1}⁻¹, and
    #     Σ_{i|i+1} = A_i ⊗ G_i - Ψ^A A_{i+1} Ψ^Aᵀ ⊗ Ψ^G G_{i+1} Ψ^Gᵀ,
    # whose second factors are Y Yᵀ with Y = X L⁻ᵀ. In the basis K = L_i⁻ᵀ E of R Rᵀ = E diag(s) Eᵀ, R = L_i⁻¹ Y, it is
    # I ⊗ I - diag(s_A) ⊗ diag(s_G) (Appendix B).
    sides = [
        side
        for (lower, upper), link in zip(pairwise(layers), factors.links, strict=True)
        for side in zip(lower, upper, link, strict=True)
    ]
    Psi_A, Psi_G, Lambda = [], [], []
    for (Psi, K_A, s_A), (Phi, K_G, s_G) in _pairs(_backends.each(_backends.conditional, sides)):
        Psi_A.append(Psi)
        Psi_G.append(Phi)
        weights = _backends.reciprocal(1 - s_G[..., :, None] * s_A[..., None, :])
        Lambda.append(rebuilt(KroneckerBasis, (K_A, K_G, weights)))
    return BlockTridiagonalInverse(tuple(Psi_A), tuple(Psi_G), (*Lambda, Kronecker(*layers[-1]).inverse()))


def exactly_damped_inverse(factors: Factors, damping: Scalar, /) -> BlockDiagonal:
    """The blocks (A_i ⊗ G_i + damping I)⁻¹ exactly, without the factored approximation (eqn 6). Links are not used.

    `damping` is λ + η, what is added to the curvature itself: γ² of the factored form. About Σ 9 (n_i³ + m_i³) flops.

    Raises:
        TypeError, ValueError: as for `Kronecker.shifted_inverse`, or no layers.

    >>> import numpy as np
    >>> from kfaclinalg import LayerFactors
    >>> factors = Factors((LayerFactors(A=np.eye(1), G=3 * np.eye(1)),))
    >>> (exactly_damped_inverse(factors, 1.0) @ (np.ones((1, 1)),))[0]
    array([[0.25]])
    """
    layers = _network.layers(factors)
    shifts = [_checks.named(at, _shift, layer, damping) for at, layer in layers.items()]
    blocks = zip(eigendecompositions([(layer.A, layer.G) for layer in layers.values()]), shifts, strict=True)
    return BlockDiagonal(tuple(shifted_inverse(eigen, shift) for eigen, shift in blocks))


def low_rank_inverse(
    factors: Factors,
    gamma: Scalar,
    /,
    *,
    rank: int,
    norm: str = "trace",
    start: BlockDiagonal | None = None,
) -> BlockDiagonal:
    """`block_diagonal_inverse` with A <- rank_k(A) and G <- rank_k(G - diag G) + diag G. Links are not used.

    The blocks are `Kronecker` products of `LowRankPlusDiagonal` inverses, in O(k (n_i + m_i)) memory. `low_rank` takes
    about Σ 16 k (n_i² + m_i²) flops, and Σ 14 k² (n_i + m_i) invert. An earlier result of this function as `start`, for
    factors that have changed little since, leaves a smaller error. A side smaller than the rank is kept whole. A layer
    whose truncated G is not positive definite when damped becomes NaN.

    Raises:
        TypeError, ValueError: as for `factored_tikhonov` and `low_rank`; or no layers, or `start` is not of this form.

    >>> import numpy as np
    >>> from kfaclinalg import LayerFactors
    >>> factors = Factors((LayerFactors(A=np.diag([8.0, 1.0]), G=np.eye(1)),))
    >>> (low_rank_inverse(factors, 0.5, rank=1) @ (np.ones((1, 2)),))[0].round(6)
    array([[0.088889, 0.8     ]])
    """
    layers = _network.layers(factors)
    _checks.integer("rank", rank, 0)
    truncated = []
    for (at, layer), starts in zip(layers.items(), _starts(start, len(layers)), strict=True):
        truncated.append(_checks.named(at, _truncated, layer, rank, *starts))
    return block_diagonal_inverse(Factors(tuple(truncated)), gamma, norm=norm)


def _starts(start: BlockDiagonal | None, layers: int) -> list[tuple[Any, Any]]:
    if start is None:
        return [(None, None)] * layers
    sides: list[tuple[Any, Any]] = [
        (block.A, block.B) for block in getattr(start, "blocks", ()) if isinstance(block, Kronecker)
    ]
    if len(sides) != layers or not all(isinstance(M, LowRankPlusDiagonal) for pair in sides for M in pair):
        raise TypeError(f"start is {start!r}, expected an earlier result for {layers} layers")
    return [(_spanned(A), _spanned(B)) for A, B in sides]


def _truncated(layer: LayerFactors, rank: int, A_start: Any, G_start: Any) -> LayerFactors:
    resolve_sides(A=layer.A, G=layer.G)
    n, m = (side(M).shape[0] for M in layer)
    A = low_rank(layer.A, min(rank, n), start=A_start)
    return LayerFactors(A, low_rank_plus_diagonal(layer.G, min(rank, m), start=G_start))


def _spanned(M: LowRankPlusDiagonal) -> LowRankPlusDiagonal:
    """What `low_rank` can begin with, from an inverse M: its U spans D⁻¹ times what the factor's own U spanned."""
    return LowRankPlusDiagonal(M.U / M.d[..., None], M.s, M.d)


def _damped(factors: Factors, gamma: Gamma, norm: str) -> Iterator[LayerFactors]:
    return (_checks.named(at, factored_tikhonov, M, g, norm=norm) for at, M, g in _with_gammas(factors, gamma))


def _with_gammas(factors: Factors, gamma: Gamma) -> list[tuple[str, LayerFactors, Scalar]]:
    """Each layer by its place, and its γ."""
    layers = _network.layers(factors)
    gammas = gamma if isinstance(gamma, tuple) else (gamma,) * len(layers)
    if len(gammas) != len(layers):
        raise ValueError(f"gamma has {len(gammas)} entries, expected a number or one for each of {len(layers)} layers")
    return [(at, M, g) for (at, M), g in zip(layers.items(), gammas, strict=True)]


def _shift(layer: LayerFactors, damping: Scalar) -> Scalar:
    b = resolve_sides(A=layer.A, G=layer.G)
    return _backends.scalar(b, "damping", damping, **{name: side(M).batch_shape for name, M in layer._asdict().items()})


def _pairs(of_sides: Sequence[T]) -> Iterator[tuple[T, T]]:
    """What belongs to the A and to the G of each layer."""
    return zip(of_sides[::2], of_sides[1::2], strict=True)
