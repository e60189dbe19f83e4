"""Factored Tikhonov damping (Section 6.3).

Adding (λ + η) I to A ⊗ G would break the Kronecker structure. With γ in the place of √(λ + η),

    (A + π γ I) ⊗ (G + γ/π I) = A ⊗ G + γ² I ⊗ I + (π γ I ⊗ G + γ/π A ⊗ I)

keeps it, and π is chosen to make the norm of what is too much, the bracket, small.
"""

from __future__ import annotations

import math

from . import _backends, _checks
from ._backends import Array, Scalar
from ._sides import Side, SideLike, batch_of, resolve_sides, side
from .factors import LayerFactors

NORMS = ("trace", "frobenius", "spectral")


def tikhonov_pi(layer: LayerFactors, /, *, norm: str = "trace") -> Array:
    """π = √(‖A ⊗ I‖ / ‖I ⊗ G‖), an array of the batch's shape; 1 where a factor is zero (Section 6.3).

    "trace" compares the mean eigenvalues tr(A)/n and tr(G)/m, "frobenius" the root mean squares ‖A‖_F/√n and
    ‖G‖_F/√m, "spectral" the largest ones (the eigenvalues of both). n + m, 4 (n² + m²) and about 4/3 (n³ + m³)
    flops.

    Raises:
        TypeError, ValueError: A or G is not a square array of one namespace, dtype and device; an unknown norm.

    >>> import numpy as np
    >>> float(tikhonov_pi(LayerFactors(4 * np.eye(3), np.eye(2))))
    2.0
    """
    _check(layer, norm)
    return _pi(layer.A, layer.G, norm=norm)


def factored_tikhonov(layer: LayerFactors, gamma: Scalar, /, *, norm: str = "trace") -> LayerFactors:
    """(A + π γ I, G + γ/π I) (eqn 7). γ is a number or an array that broadcasts with the batch.

    γ is the strength in each *factor*: their product adds γ² to the curvature itself, so γ = √(λ + η) at the start.
    n² + m² flops, and those of π.

    Raises:
        TypeError, ValueError: as for `tikhonov_pi`; or γ is negative, NaN or infinite.

    >>> import numpy as np
    >>> factored_tikhonov(LayerFactors(4 * np.eye(1), np.eye(1)), 0.5)
    LayerFactors(A=array([[5.]]), G=array([[1.25]]))
    """
    return LayerFactors(*(side(M).shifted(shift) for M, shift in zip(layer, _shifts(layer, gamma, norm), strict=True)))


def _shifts(layer: LayerFactors, gamma: Scalar, norm: str) -> tuple[Array, Array]:
    """π γ and γ/π."""
    b = _check(layer, norm)
    gamma = _backends.scalar(b, "gamma", gamma, A=batch_of(layer.A), G=batch_of(layer.G))
    return _split(layer.A, layer.G, gamma, norm=norm)


def _check(layer: LayerFactors, norm: str) -> _backends.Backend:
    _checks.check_choice("norm", norm, NORMS)
    _checks.check_class("layer", layer, LayerFactors)
    return resolve_sides(A=layer.A, G=layer.G)


@_backends.formula
def _split(A: SideLike, G: SideLike, gamma: Scalar, *, norm: str) -> tuple[Array, Array]:
    pi = _pi(A, G, norm=norm)
    return pi * gamma, gamma / pi


@_backends.formula
def _pi(A: SideLike, G: SideLike, *, norm: str) -> Array:
    """√a/√g, not √(a/g): the quotient of two extreme sizes may leave the range."""
    a, g = _size(side(A), norm), _size(side(G), norm)
    xp = _backends.namespace_of(a)
    zero = xp.minimum(a, g) == 0
    pi = xp.sqrt(xp.where(zero, 1.0, a)) / xp.sqrt(xp.where(zero, 1.0, g))
    return xp.where((pi > 0) & (pi < math.inf), pi, _backends.NAN)


def _size(M: Side, norm: str) -> Array:
    n = M.shape[-1]
    if norm == "trace" or n == 0:
        return M.trace() / max(n, 1)
    dense = M.to_dense()
    xp = _backends.namespace_of(dense)
    if norm == "spectral":
        return xp.max(xp.abs(_backends.eigvalsh(dense)), axis=-1)
    largest = xp.max(xp.abs(dense), axis=(-2, -1), keepdims=True)
    scale = xp.where((largest > 0) & xp.isfinite(largest), largest, 1.0)  # squares of extreme entries leave the range
    return scale[..., 0, 0] * (xp.linalg.matrix_norm(dense / scale) / n**0.5)
