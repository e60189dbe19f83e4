"""Whole operations on single matrices of a CPU, by SciPy's LAPACK in place: what `_host.run` takes from `spd` upwards.

What fails is NaN, as on the ways of `_linalg`. Triangles are read and written below; matrices lie in LAPACK's order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import blas, lapack

from ._array import NAN
from ._blas import BLOCK, cleaned, lower_half, mirrored, routine


def cholesky(M: Any, shift: Any = 0.0) -> Any:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I, with anything above it; None where there is none."""
    X = lower_half(M)
    if shift:
        X.ravel("K")[:: len(X) + 1] += shift
    L, info = routine(lapack, M, "potrf")(X, lower=1, clean=0, overwrite_a=1)
    return L if info == 0 and math.isfinite(L.trace()) else None


def factor(M: Any, shift: Any = 0.0) -> Any:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I."""
    L = cholesky(M, shift)
    return np.full_like(M, NAN) if L is None else cleaned(L)


def inverse(M: Any, shift: Any = 0.0) -> Any:
    """((M + Mᵀ)/2 + shift I)⁻¹, exactly symmetric."""
    L = cholesky(M, shift)
    if L is None:
        return np.full_like(M, NAN)
    if len(L) <= BLOCK:
        return mirrored(routine(lapack, L, "potri")(L, lower=1, overwrite_c=1)[0])
    _invert(L)
    return mirrored(routine(lapack, L, "lauum")(L, lower=1, overwrite_c=1)[0])


def _invert(L: Any) -> None:
    """L⁻¹ in the place of lower L, by halves: all products are of matrices, which few of those of `trtri` are."""
    n, h = len(L), len(L) // 2
    trmm, trsm = routine(blas, L, "trmm"), routine(blas, L, "trsm")
    if n <= 2 * BLOCK:
        L[:] = trsm(1.0, L, np.eye(n, dtype=L.dtype, order="F"), lower=1, overwrite_b=1)
        return
    _invert(L[:h, :h])
    L[h:, :h] = trsm(-1.0, L[h:, h:], trmm(1.0, L[:h, :h], L[h:, :h], side=1, lower=1), lower=1, overwrite_b=1)
    _invert(L[h:, h:])


def solve(M: Any, X: Any) -> Any:
    """((M + Mᵀ)/2)⁻¹ X."""
    L = cholesky(M)
    return np.full_like(X, NAN) if L is None else _substituted(L, X)


def substituted(L: Any, X: Any) -> Any:
    """(L Lᵀ)⁻¹ X."""
    d = np.diagonal(L)
    return _substituted(L, X) if np.isfinite(d).all() and d.all() else np.full_like(X, NAN)


def _substituted(L: Any, X: Any) -> Any:
    """(L Lᵀ)⁻¹ X, from the side on which neither L nor X is copied into another order."""
    C, lower = (L, 1) if L.flags.f_contiguous else (L.T, 0)
    if X.flags.f_contiguous or not X.flags.c_contiguous:
        return routine(lapack, L, "potrs")(C, X, lower=lower)[0]
    Y = X.copy().T
    for trans in (lower, 1 - lower):
        Y = routine(blas, L, "trsm")(1.0, C, Y, side=1, lower=lower, trans_a=trans, overwrite_b=1)
    return Y.T


def logdet(M: Any) -> Any:
    """log det((M + Mᵀ)/2)."""
    L = cholesky(M)
    return np.asarray(NAN if L is None else 2 * np.sum(np.log(L.diagonal())), dtype=M.dtype)


def eigh(M: Any) -> tuple[Any, Any]:
    """w and Q with (M + Mᵀ)/2 = Q diag(w) Qᵀ."""
    return _syevd(lower_half(M))


def inverse_root(p: float, M: Any) -> Any:
    """((M + Mᵀ)/2)^(-1/p), exactly symmetric."""
    w, Q = eigh(M)
    if not (w > 0).all():
        return _nan(M, M.shape)
    return mirrored(routine(blas, M, "syrk")(1.0, Q * w ** (-0.5 / p), lower=1))


def pencil(M: Any, N: Any) -> tuple[Any, Any]:
    """K and s with Kᵀ M K = I and Kᵀ N K = diag(s), for M positive definite and N symmetric."""
    X, Y = lower_half(M), lower_half(N)
    if not (np.isfinite(X).all() and np.isfinite(Y).all()):
        return _nan(M, M.shape), _nan(M, M.shape[:1])
    s, K, info = routine(lapack, M, "sygvd")(Y, X, uplo="L", overwrite_a=1, overwrite_b=1)
    return (K, s) if info == 0 and np.isfinite(s).all() else (_nan(M, M.shape), _nan(M, M.shape[:1]))


def conditional(M: Any, above: Any, X: Any) -> tuple[Any, Any, Any]:
    """Psi = X above⁻¹, and K and s with Kᵀ M K = I and Kᵀ (Psi above Psiᵀ) K = diag(s), for a link X (n, k)."""
    n, k = X.shape
    L, L_above = cholesky(M), cholesky(above)
    failed = _nan(M, (n, n)), _nan(M, (n,))
    if L_above is None:
        return _nan(M, (n, k)), *failed
    trtrs, trsm, syrk = routine(lapack, M, "trtrs"), routine(blas, M, "trsm"), routine(blas, M, "syrk")
    Y_T = trtrs(L_above, X.T, lower=1)[0]
    Psi = trtrs(L_above, Y_T, lower=1, trans=1)[0].T
    if L is None or not np.isfinite(Y_T).all():
        return Psi, *failed
    R_T = trsm(1.0, L, Y_T, side=1, lower=1, trans_a=1, overwrite_b=1)
    s, E = _syevd(syrk(1.0, R_T, trans=int(n <= k), lower=1))  # of the smaller Gram matrix
    if n > k and np.isfinite(s).all():
        # largest first: rounding tilts a column by eps over its length
        s, E = np.append(s[::-1], np.zeros(n - k, s.dtype)), _completed(R_T.T @ E[:, ::-1])
    return Psi, trtrs(L, E, lower=1, trans=1, overwrite_b=1)[0], np.clip(s, 0.0, 1.0)


def general_inverse(K: Any) -> Any:
    """K⁻¹ for any square K."""
    X, pivots, info = routine(lapack, K, "getrf")(K.T)
    if info == 0 and np.isfinite(X).all():
        X, info = routine(lapack, K, "getri")(X, pivots, lwork=64 * len(K), overwrite_lu=1)
    return X.T if info == 0 and np.isfinite(X).all() else _nan(K, K.shape)


def log_abs_det(K: Any) -> Any:
    """log|det K| for any square K."""
    X, _, info = routine(lapack, K, "getrf")(K.T)
    finite = info == 0 and np.isfinite(X).all()
    return np.asarray(np.sum(np.log(abs(X.diagonal()))) if finite else NAN, dtype=K.dtype)


def _completed(X: Any) -> Any:
    """Orthogonal E (n, n) whose first k columns span those of X (n, k), k <= n."""
    n, k = X.shape
    E = np.empty((n, n), dtype=X.dtype, order="F")
    E[:, :k], tau, _, _ = routine(lapack, X, "geqrf")(X, lwork=64 * k)
    return routine(lapack, X, "orgqr")(E, tau, lwork=64 * n, overwrite_a=1)[0]


def _syevd(X: Any) -> tuple[Any, Any]:
    """Eigenvalues and eigenvectors of the symmetric matrix with the lower triangle of X, in the place of X."""
    if np.isfinite(X).all():
        w, Q, info = routine(lapack, X, "syevd")(X, lower=1, overwrite_a=1)
        if info == 0:
            return w, Q
    return _nan(X, X.shape[:1]), _nan(X, X.shape)


def _nan(like: Any, shape: tuple[int, ...]) -> Any:
    return np.full(shape, NAN, dtype=like.dtype)
