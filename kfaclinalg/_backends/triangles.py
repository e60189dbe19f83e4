"""Triangles of single matrices on a CPU: one half of a symmetric matrix stands for the whole, and is read below.

Results lie in the order of LAPACK.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .door import NAN

Matrix: TypeAlias = NDArray[np.floating[Any]]

# Rows at once where a matrix meets its transpose. A copy of a block is read by columns, not the matrix itself: columns
# of a matrix whose size is a power of two lie in few lines of a cache, and drive each other out.
BLOCK = 80


def lower_half(M: Matrix) -> Matrix:
    """A copy in LAPACK's order whose lower triangle is that of (M + Mᵀ)/2, with anything above it."""
    X = 0.5 * M  # halved first: the sum of two large entries may overflow
    if len(M) <= BLOCK:
        return np.add(X, X.T, order="F")
    for i in range(0, len(M), BLOCK):
        columns = slice(i, i + BLOCK)
        X[:i, columns] += X[columns, :i].copy().T
        X[columns, columns] += X[columns, columns].T.copy()
    return X.T


def mirrored(X: Matrix) -> Matrix:
    """The symmetric matrix whose lower triangle is that of X, in the place of X."""
    Y = X.T  # its rows lie together
    for i in range(0, len(Y), BLOCK):
        rows, others = slice(i, i + BLOCK), slice(i + BLOCK, None)
        square = Y[rows, rows]
        np.copyto(square.T, square.copy(), where=_above(len(square)))
        Y[others, rows] = Y[rows, others].copy().T
    return Y


def cleaned(L: Matrix) -> Matrix:
    """L, in its place, with zeros above the diagonal: LAPACK's wrappers write them by rows, which lie apart."""
    for i in range(0, len(L), BLOCK):
        columns = slice(i, i + BLOCK)
        square = L[columns, columns]
        np.copyto(square, 0, where=_above(len(square)))
        L[:i, columns] = 0
    return L


@lru_cache
def _above(n: int) -> Matrix:
    return ~np.tri(n, dtype=bool)


def of_dtype(library: ModuleType, x: Matrix, name: str) -> Callable[..., Any]:
    """BLAS's or LAPACK's routine of this name for the dtype of x."""
    return getattr(library, {"f": "s", "d": "d"}[x.dtype.char] + name)


def eps(M: Matrix) -> float:
    return float(np.finfo(M.dtype).eps)


def nan(like: Matrix, shape: tuple[int, ...]) -> Matrix:
    return np.full(shape, NAN, dtype=like.dtype)
