"""Single matrices of torch's CPU that stay in torch, by its own LAPACK in place: results in new memory cost up to twice
as much. What fails is NaN."""

from __future__ import annotations

import numpy as np

from . import single
from .triangles import Matrix, nan

CROWDED = 512  # columns a multiple of that long lie in few lines of a cache, and drive each other out
SPARE = 8


def cholesky(M: Matrix, shift: Matrix | float = 0.0) -> Matrix:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I."""
    L = single.factor(M, shift, potrf)
    return nan(M, M.shape) if L is None else L


def inverse(M: Matrix, shift: Matrix | float = 0.0) -> Matrix:
    """((M + Mᵀ)/2 + shift I)⁻¹, exactly symmetric.

    That of diag(M, M_11, M_11, ...) where the columns of M would be crowded, as definite as M: a third faster.
    """
    n = len(M)
    if n % CROWDED:
        return single.inverse(M, shift, potrf, potri)
    wider = np.zeros((n + SPARE, n + SPARE), dtype=M.dtype)
    wider[:n, :n] = M
    np.fill_diagonal(wider[n:, n:], M[0, 0])
    return single.inverse(wider, shift, potrf, potri)[:n, :n].copy()


def solve(M: Matrix, X: Matrix) -> Matrix:
    """((M + Mᵀ)/2)⁻¹ X."""
    import torch

    L = single.factor(M, 0.0, potrf)
    return nan(X, X.shape) if L is None else torch.cholesky_solve(torch.from_numpy(X), torch.from_numpy(L)).numpy()


def potrf(X: Matrix) -> tuple[Matrix, int]:
    """Lower L, with zeros above it, in the place of X, which lies in LAPACK's order; 0 if there is one."""
    import torch

    L = torch.from_numpy(X)
    info = L.new_empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(L, out=(L, info))
    return X, int(info)


def potri(L: Matrix) -> Matrix:
    """(L Lᵀ)⁻¹, exactly symmetric, in the place of L."""
    import torch

    X = torch.from_numpy(L)
    return torch.cholesky_inverse(X, out=X).numpy()
