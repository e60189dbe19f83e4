"""Single matrices of torch's CPU that stay in torch, by its own LAPACK in place: results in new memory cost up to twice
as much. What fails is NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import single
from .home import torch_lacks_it
from .triangles import Matrix, cleaned, lower_half, mirrored, nan

CROWDED = 512  # columns a multiple of that long lie in few lines of a cache, and drive each other out
SPARE = 8
SMALL = 512  # up to here OpenBLAS factors in 0.3 to 0.8 of MKL's time, on processors of Intel's with AVX2 and AVX-512


def cholesky(M: Matrix, shift: Matrix | float = 0.0) -> Matrix:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I."""
    L = single.factor(M, shift, potrf)
    return nan(M, M.shape) if L is None else cleaned(L)


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


def eigh(M: Matrix) -> tuple[Matrix, Matrix]:
    """w and Q with (M + Mᵀ)/2 = Q diag(w) Qᵀ."""
    return _eigh(lower_half(M))


def eigvalsh(M: Matrix) -> Matrix:
    """The eigenvalues of (M + Mᵀ)/2."""
    return _eigvalsh(lower_half(M))


def pencil(M: Matrix, N: Matrix) -> tuple[Matrix, Matrix]:
    """K and s with Kᵀ M K = I and Kᵀ N K = diag(s), for M positive definite and N symmetric."""
    L = cholesky(M)
    s, E = _eigh(_whitened(L, N))
    return _substituted(L.T, E, left=True), s


def pencil_values(M: Matrix, N: Matrix) -> Matrix:
    """s alone."""
    return _eigvalsh(_whitened(cholesky(M), N))


def _whitened(L: Matrix, N: Matrix) -> Matrix:
    """L⁻¹ N L⁻ᵀ."""
    return _substituted(L.T, _substituted(L, mirrored(lower_half(N)).T, left=True), left=False)


def _substituted(L: Matrix, X: Matrix, *, left: bool) -> Matrix:
    """L⁻¹ X, or X L⁻¹, for triangular L, in the place of X, which lies in LAPACK's order."""
    import torch

    out = torch.from_numpy(X)
    torch.linalg.solve_triangular(torch.from_numpy(L), out, upper=L.flags.c_contiguous, left=left, out=out)
    return X


def _eigh(X: Matrix) -> tuple[Matrix, Matrix]:
    import torch

    found = _converged(torch.linalg.eigh, X)
    return (nan(X, X.shape[:1]), nan(X, X.shape)) if found is None else (found[0].numpy(), found[1].numpy())


def _eigvalsh(X: Matrix) -> Matrix:
    import torch

    found = _converged(torch.linalg.eigvalsh, X)
    return nan(X, X.shape[:1]) if found is None else found.numpy()


def _converged(f: Callable[..., Any], X: Matrix) -> Any:
    """f of the symmetric matrix with the lower triangle of X, None where it fails."""
    import torch

    try:
        return f(torch.from_numpy(X)) if np.isfinite(X).all() else None
    except RuntimeError:  # torch.linalg.LinAlgError: it does not converge
        return None


def potrf(X: Matrix) -> tuple[Matrix, int]:
    """Lower L, with anything above it, in the place of X, which lies in LAPACK's order; 0 if there is one."""
    if len(X) <= SMALL and torch_lacks_it():
        return single.potrf(X)
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
