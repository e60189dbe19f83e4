"""What concerns one member of a batch and not its neighbours: symmetry, and NaN where it failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._typing import Array, ArrayT
from .door import NAN, Backend, backend_of, namespace_of

UNCERTAIN = 4  # eigenvalues below so many eps of the largest have no certain sign


def symmetrised(M: ArrayT) -> ArrayT:
    """(M + Mᵀ)/2, exactly symmetric."""
    half = 0.5 * M  # halved first: the sum of two large entries may overflow
    return half + half.mT


def kept(good: Array, x: Array, core: int = 2) -> Array:
    """x, its last `core` dimensions NaN where `good` (...) is false."""
    return namespace_of(x).where(good[(..., *(None,) * core)], x, NAN)


def per_member(x: Any, core: int = 2) -> Any:
    """A scalar of each member (...) with `core` dimensions more, to meet its array; a Python number as it is."""
    return x if isinstance(x, float) else x[(..., *(None,) * core)]


def reciprocal(eigenvalues: Array) -> Array:
    """1 / eigenvalues (..., m, n) of a matrix, the whole member NaN where it is not positive definite.

    The eigenvalues are known to a few eps of the largest: what is smaller than that has no certain sign.
    """
    b = backend_of(eigenvalues)
    if 0 in eigenvalues.shape[-2:]:
        return eigenvalues  # the largest of none
    smallest, largest = (f(eigenvalues, axis=(-2, -1), keepdims=True) for f in (b.xp.min, b.xp.max))
    definite = smallest > UNCERTAIN * b.eps * largest  # of either sign: not where the largest is negative
    return 1 / b.xp.where(definite, eigenvalues, NAN)


def noise(eps: float, n: int) -> float:
    """What rounding leaves of a pivot, or of 1 / (M⁻¹)_jj, relative to M_jj, where a matrix M of n rows is singular.

    The pivot of a row that depends on others is of this size, of either sign: what is not larger is not definite.
    """
    return (8 + n**0.5) * eps if n > 1 else 0.0


def each_member(b: Backend, f: Callable[[Array], tuple[Array, ...]], M: Array) -> tuple[Array, ...]:
    """f(M); where the backend throws a whole batch away for one failure, member by member, NaN for those that fail."""
    try:
        return tuple(f(M))
    except (np.linalg.LinAlgError, RuntimeError):
        if M.ndim == 2:
            return tuple(NAN * x for x in f(b.eye(M.shape[-1])))
        members = [each_member(b, f, M[i, ...]) for i in range(M.shape[0])]
        return tuple(b.xp.stack(x) for x in zip(*members, strict=True))


def verified(L: Array, M: Array) -> Array:
    """L, NaN for a member that is not the Cholesky factor of symmetric M.

    The squared norms of the rows of L are the diagonal of M, which no partial factor, NaN or infinity meets.
    """
    b = backend_of(M)
    xp, d = b.xp, b.xp.linalg.diagonal(M)
    d = xp.where(xp.isfinite(d), d, NAN)  # NumPy would warn of infinity - infinity
    tolerance = (M.shape[-1] + 8) * b.eps
    accepted = xp.abs(xp.sum(L * L, axis=-1) - d) <= tolerance * xp.abs(d)
    return kept(xp.all(accepted & has_pivots(L, d), axis=-1), L)


def has_pivots(L: Array, d: Array) -> Array:
    """Whether each pivot of L, the Cholesky factor of a matrix with the diagonal d, is more than rounding."""
    b = backend_of(L)
    pivots = b.xp.linalg.diagonal(L)
    return (pivots > 0) & (pivots * pivots > noise(b.eps, L.shape[-1]) * d)


def proper_inverse(K: Array, X: Array) -> Array:
    """X, NaN for a member where it or K is not finite, or K is singular to working precision: 4 eps ‖K‖ ‖X‖ >= 1."""
    b = backend_of(K)
    xp, limit = b.xp, UNCERTAIN * b.eps
    finite = xp.all(xp.isfinite(K) & xp.isfinite(X), axis=(-2, -1))
    K, Y = (xp.where(finite[..., None, None], M, 0.0) for M in (K, X))
    return kept(finite & (limit * xp.linalg.matrix_norm(K) * xp.linalg.matrix_norm(Y) < 1), X)


def definite_inverse(M: Array, X: Array) -> Array:
    """X = M⁻¹, NaN for a member that is singular to working precision: where `noise` M_jj X_jj >= 1.

    1 / (M_jj X_jj) is what the other rows leave unexplained of row j, the pivot if it came last.
    """
    b = backend_of(X)
    d, x = (b.xp.linalg.diagonal(Y) for Y in (M, X))
    return kept(b.xp.all(noise(b.eps, X.shape[-1]) * d * x < 1, axis=-1), X)
