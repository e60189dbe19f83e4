"""Factored Tikhonov damping (Section 6.3).

Adding (λ + η) I to A ⊗ G would break the Kronecker structure. With γ in the place of √(λ + η),

    (A + π γ I) ⊗ (G + γ/π I) = A ⊗ G + γ² I ⊗ I + (π γ I ⊗ G + γ/π A ⊗ I)

keeps it, and π is chosen to make the norm of what is too much, the bracket, small.
"""

from __future__ import annotations

from typing import Any

from . import _array, _side
from ._typing import Scalar
from .factors import LayerFactors

NORMS = ("trace", "frobenius", "spectral")


def tikhonov_pi(layer: LayerFactors, /, *, norm: str = "trace") -> Any:
    """π = √(‖A ⊗ I‖ / ‖I ⊗ G‖), an array of the batch's shape; 1 where a factor is zero (Section 6.3).

    "trace" compares the mean eigenvalues tr(A)/n and tr(G)/m, "frobenius" the root mean squares ‖A‖_F/√n and
    ‖G‖_F/√m, "spectral" the largest ones (an eigendecomposition of both). n + m, 2 (n² + m²) and about 4 (n³ + m³)
    flops.

    Raises:
        TypeError, ValueError: A or G is not a square array of one namespace, dtype and device; an unknown norm.

    >>> import numpy as np
    >>> float(tikhonov_pi(LayerFactors(4 * np.eye(3), np.eye(2))))
    2.0
    """
    _array.check_choice("norm", norm, NORMS)
    b = _side.resolve(A=layer.A, G=layer.G)
    _side.check(A=layer.A, G=layer.G)
    sizes = (_size(b, M, norm) for M in layer)
    a, g = (b.xp.where(b.xp.isfinite(size), size, _array.NAN) for size in sizes)
    zero = (a == 0) | (g == 0)
    # √a/√g, not √(a/g): the quotient of two extreme sizes may leave the range
    return b.xp.sqrt(b.xp.where(zero, 1.0, a)) / b.xp.sqrt(b.xp.where(zero, 1.0, g))


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
    b = _side.resolve(A=layer.A, G=layer.G)
    return LayerFactors(*(_side.shifted(b, M, shift) for M, shift in _shifts(layer, gamma, norm)))


def _shifts(layer: LayerFactors, gamma: Scalar, norm: str) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """A with π γ and G with γ/π, what eqn 7 adds to its diagonal."""
    gamma = _array.nonnegative("gamma", gamma)
    pi = tikhonov_pi(layer, norm=norm)
    return (layer.A, gamma * pi), (layer.G, gamma / pi)


def _size(b: _array.Backend, M: Any, norm: str) -> Any:
    n = M.shape[-1]
    if norm == "trace" or n == 0:
        return _side.trace(b, M) / max(n, 1)
    if norm == "frobenius":
        return b.xp.linalg.matrix_norm(_side.dense(M)) / n**0.5
    return b.xp.max(b.xp.abs(_side.eigh(b, "native", M)[0]), axis=-1)
