"""Factored Tikhonov damping (Section 6.3).

Adding (λ + η) I to A ⊗ G would break the Kronecker structure. With γ in the place of √(λ + η),

    (A + π γ I) ⊗ (G + γ/π I) = A ⊗ G + γ² I ⊗ I + (π γ I ⊗ G + γ/π A ⊗ I)

keeps it, and π is chosen to make the norm of what is too much, the bracket, small.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from . import _array, _host, _side
from ._typing import Scalar
from .factors import LayerFactors

NORMS = ("trace", "frobenius", "spectral")


def tikhonov_pi(layer: LayerFactors, /, *, norm: str = "trace", blas: str = "auto") -> Any:
    """π = √(‖A ⊗ I‖ / ‖I ⊗ G‖), an array of the batch's shape; 1 where a factor is zero (Section 6.3).

    "trace" compares the mean eigenvalues tr(A)/n and tr(G)/m, "frobenius" the root mean squares ‖A‖_F/√n and
    ‖G‖_F/√m, "spectral" the largest ones (an eigendecomposition of both). n + m, 2 (n² + m²) and about 4 (n³ + m³)
    flops. `blas` is as in `Kronecker.apply`.

    Raises:
        TypeError, ValueError: A or G is not a square array of one namespace, dtype and device; an unknown norm.

    >>> import numpy as np
    >>> float(tikhonov_pi(LayerFactors(4 * np.eye(3), np.eye(2))))
    2.0
    """
    return _pi(_checked(layer, norm), blas, norm, *layer)


def factored_tikhonov(
    layer: LayerFactors, gamma: Scalar, /, *, norm: str = "trace", blas: str = "auto"
) -> LayerFactors:
    """(A + π γ I, G + γ/π I) (eqn 7). γ is a number or an array that broadcasts with the batch.

    γ is the strength in each *factor*: their product adds γ² to the curvature itself, so γ = √(λ + η) at the start.
    n² + m² flops, and those of π, which `blas` is for.

    Raises:
        TypeError, ValueError: as for `tikhonov_pi`; or γ is negative, NaN or infinite.

    >>> import numpy as np
    >>> factored_tikhonov(LayerFactors(4 * np.eye(1), np.eye(1)), 0.5)
    LayerFactors(A=array([[5.]]), G=array([[1.25]]))
    """
    gamma = _array.nonnegative("gamma", gamma)
    b = _checked(layer, norm)
    return _damped(b, gamma, _pi(b, blas, norm, *layer), *layer)


def damped_inverses(layer: LayerFactors, gamma: Scalar, norm: str, method: str, blas: str) -> Any:
    """Those of `factored_tikhonov(layer, gamma)`. Where both factors are single and dense, all of it in one place."""
    gamma = _array.nonnegative("gamma", gamma)
    b = _checked(layer, norm)

    def in_steps(blas: str, gamma: Any, *sides: Any) -> Any:
        return _side.inverses(b, method, blas, *_damped(b, gamma, _pi(b, blas, norm, *sides), *sides))

    if not isinstance(gamma, float) or _side.are_structured(*layer):  # one of a batch of dampings, perhaps
        return in_steps(blas, gamma, *layer)
    made = _host.run(b, blas, _HOST[method, norm], partial(in_steps, "native"), gamma, *layer)
    return [_side.as_inverse(M, method) for M in made]


def _host_inverses(inverse: Any, norm: str, gamma: float, A: Any, G: Any) -> tuple[Any, ...]:
    return tuple(map(inverse, (A, G), _shifts(gamma, _host_pi(norm, A, G))))


_HOST = {(m, norm): partial(_host_inverses, f, norm) for m, f in _side.INVERSES.items() for norm in NORMS}


def _damped(b: _array.Backend, gamma: Any, pi: Any, *sides: Any) -> LayerFactors:
    return LayerFactors(*map(partial(_side.shifted, b), sides, _shifts(gamma, pi)))


def _shifts(gamma: Any, pi: Any) -> tuple[Any, Any]:
    """What eqn 7 adds to the diagonals of A and G."""
    return gamma * pi, gamma / pi


def _pi(b: _array.Backend, blas: str, norm: str, A: Any, G: Any) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    if _side.are_structured(A, G):
        return _quotient(b, norm, A, G)
    return _host.run(b, blas, _HOST_PI[norm], partial(_quotient, b, norm), A, G)


def _host_pi(norm: str, A: Any, G: Any) -> Any:
    return _quotient(_array.resolve(A=A), norm, A, G)


_HOST_PI = {norm: partial(_host_pi, norm) for norm in NORMS}


def _quotient(b: _array.Backend, norm: str, A: Any, G: Any) -> Any:
    """√a/√g, not √(a/g): the quotient of two extreme sizes may leave the range."""
    a, g = _size(b, A, norm), _size(b, G, norm)
    if b.kind == "numpy" and a.ndim == g.ndim == 0:  # numbers: the same by Python's branches
        finite = math.isfinite(a) and math.isfinite(g)
        return b.dtype.type(1 if 0 in (a, g) else b.xp.sqrt(a) / b.xp.sqrt(g) if finite else _array.NAN)
    a, g = (b.xp.where(b.xp.isfinite(size), size, _array.NAN) for size in (a, g))
    zero = (a == 0) | (g == 0)
    return b.xp.sqrt(b.xp.where(zero, 1.0, a)) / b.xp.sqrt(b.xp.where(zero, 1.0, g))


def _checked(layer: LayerFactors, norm: str) -> _array.Backend:
    _array.check_choice("norm", norm, NORMS)
    b = _side.resolve(A=layer.A, G=layer.G)
    _side.check(A=layer.A, G=layer.G)
    return b


def _size(b: _array.Backend, M: Any, norm: str) -> Any:
    n = M.shape[-1]
    if norm == "trace" or n == 0:
        return _side.trace(b, M) / max(n, 1)
    if norm == "frobenius":
        return b.xp.linalg.matrix_norm(_side.dense(M)) / n**0.5
    return b.xp.max(b.xp.abs(_side.eigh(b, "native", M)[0]), axis=-1)
