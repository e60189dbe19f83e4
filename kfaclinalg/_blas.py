"""SciPy's BLAS on single matrices of a CPU, where one half of a symmetric matrix stands for the whole.

Triangles are read and written below; results lie in the order of LAPACK.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from scipy.linalg import blas

# Rows at once where a matrix meets its transpose. A copy of a block is read by columns, not the matrix itself: columns
# of a matrix whose size is a power of two lie in few lines of a cache, and drive each other out.
BLOCK = 80


def moment(x: Any) -> Any:
    """xᵀx / N for x (N, n), exactly symmetric."""
    return mirrored(_rank_n(x, 1 / len(x)))


def updated(decay: float, C: Any, x: Any) -> Any:
    """decay C + (1 - decay) xᵀx / N, exactly symmetric, for symmetric C."""
    X = np.multiply(C.T, decay, order="F")
    return mirrored(_rank_n(x, (1 - decay) / len(x), beta=1, c=X, overwrite_c=1))


def _rank_n(x: Any, alpha: float, **options: Any) -> Any:
    """alpha xᵀx, the lower triangle, added to c where there is one."""
    a, trans = (x, 1) if x.flags.f_contiguous else (x.T, 0)  # in the order that BLAS reads
    return routine(blas, x, "syrk")(alpha, a, trans=trans, lower=1, **options)


def lower_half(M: Any) -> Any:
    """A copy in LAPACK's order whose lower triangle is that of (M + Mᵀ)/2, with anything above it."""
    X = 0.5 * M  # halved first: the sum of two large entries may overflow
    if len(M) <= BLOCK:
        return np.add(X, X.T, order="F")
    for i in range(0, len(M), BLOCK):
        columns = slice(i, i + BLOCK)
        X[:i, columns] += X[columns, :i].copy().T
        X[columns, columns] += X[columns, columns].T.copy()
    return X.T


def mirrored(X: Any) -> Any:
    """The symmetric matrix whose lower triangle is that of X, in the place of X."""
    Y = X.T  # its rows lie together
    for i in range(0, len(Y), BLOCK):
        rows, others = slice(i, i + BLOCK), slice(i + BLOCK, None)
        square = Y[rows, rows]
        np.copyto(square.T, square.copy(), where=_above(len(square)))
        Y[others, rows] = Y[rows, others].copy().T
    return Y


def cleaned(L: Any) -> Any:
    """L, in its place, with zeros above the diagonal: LAPACK's wrappers write them by rows, which lie apart."""
    for i in range(0, len(L), BLOCK):
        columns = slice(i, i + BLOCK)
        square = L[columns, columns]
        np.copyto(square, 0, where=_above(len(square)))
        L[:i, columns] = 0
    return L


@lru_cache
def _above(n: int) -> Any:
    return ~np.tri(n, dtype=bool)


def routine(library: Any, x: Any, name: str) -> Any:
    return getattr(library, {"f": "s", "d": "d"}[x.dtype.char] + name)
