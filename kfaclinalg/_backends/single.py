"""The bodies of routines for single NumPy matrices, by SciPy's BLAS and LAPACK in place. What fails is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from operator import matmul
from typing import Any

import numpy as np
from scipy.linalg import blas, lapack

from .door import NAN
from .members import UNCERTAIN, noise
from .processor import is_intel
from .triangles import BLOCK, Matrix, cleaned, eps, lower_half, mirrored, nan, of_dtype


def product(*Ms: Matrix) -> Matrix:
    """M_1 M_2 ..., from the left."""
    return reduce(matmul, Ms)


def moment(x: Matrix) -> Matrix:
    """xᵀx / N for x (N, n), exactly symmetric."""
    return mirrored(_rank_n(x, 1 / len(x)))


def updated_moment(C: Matrix, x: Matrix, decay: float) -> Matrix:
    """decay C + (1 - decay) xᵀx / N, exactly symmetric, for symmetric C."""
    X = np.multiply(C.T, decay, order="F")
    return mirrored(_rank_n(x, (1 - decay) / len(x), beta=1, c=X, overwrite_c=1))


def _rank_n(x: Matrix, alpha: float, **options: Any) -> Matrix:
    """alpha xᵀx, the lower triangle, added to c where there is one."""
    a, trans = (x, 1) if x.flags.f_contiguous else (x.T, 0)  # in the order that BLAS reads
    return of_dtype(blas, x, "syrk")(alpha, a, trans=trans, lower=1, **options)


def cholesky(M: Matrix, shift: Matrix | float = 0.0) -> Matrix:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I."""
    L = factor(M, shift)
    return np.full_like(M, NAN) if L is None else cleaned(L)


def potrf(X: Matrix) -> tuple[Matrix, int]:
    """Lower L, with anything above it, in the place of X, which lies in LAPACK's order; 0 if there is one."""
    L, info = of_dtype(lapack, X, "potrf")(X, lower=1, clean=0, overwrite_a=1)
    return L, info


def potri(L: Matrix) -> Matrix:
    """(L Lᵀ)⁻¹, exactly symmetric, in the place of L."""
    if is_intel() or len(L) <= BLOCK:
        return mirrored(of_dtype(lapack, L, "potri")(L, lower=1, overwrite_c=1)[0])
    invert_by_halves(L)  # faster on AMD's processors from the smallest sizes up, slower on Intel's
    return mirrored(of_dtype(lapack, L, "lauum")(L, lower=1, overwrite_c=1)[0])


def factor(M: Matrix, shift: Matrix | float = 0.0, potrf: Callable[..., Any] = potrf) -> Matrix | None:
    """Lower L with L Lᵀ = (M + Mᵀ)/2 + shift I, with anything above it; None where there is none."""
    L, d = _factor(M, shift, potrf)
    return L if L is not None and (L.diagonal() ** 2 > noise(eps(M), len(M)) * d).all() else None


def _factor(M: Matrix, shift: Matrix | float, potrf: Callable[..., Any]) -> tuple[Matrix | None, Matrix]:
    """L, finite, whose pivots may be noise, and the diagonal of M + shift I."""
    X, d = lower_half(M), M.diagonal() + shift
    X.ravel("K")[:: len(X) + 1] = d  # a view: X is contiguous
    L, info = potrf(X)
    return (None if info or not math.isfinite(L.trace()) else L), d


def forward_substitution(L: Matrix, X: Matrix) -> Matrix:
    """L⁻¹ X."""
    return of_dtype(lapack, L, "trtrs")(L, X, lower=True)[0]


def back_substitution(L: Matrix, X: Matrix) -> Matrix:
    """L⁻ᵀ X."""
    return of_dtype(lapack, L, "trtrs")(L, X, lower=True, trans=1)[0]


def inverse(
    M: Matrix,
    shift: Matrix | float = 0.0,
    potrf: Callable[..., Any] = potrf,
    potri: Callable[..., Any] = potri,
) -> Matrix:
    """((M + Mᵀ)/2 + shift I)⁻¹, exactly symmetric.

    (M⁻¹)_jj is the squared length of a column of L⁻¹, at least 1 / L_jj²: what it shows to be definite has its pivots.
    """
    L, d = _factor(M, shift, potrf)
    if L is None:
        return np.full_like(M, NAN)
    X = potri(L)
    return X if noise(eps(M), len(M)) * (d * X.diagonal()).max() < 1 else np.full_like(M, NAN)


def invert_by_halves(L: Matrix) -> None:
    """L⁻¹ in the place of lower L: all products are of matrices, which few of those of `trtri` are."""
    n, h = len(L), len(L) // 2
    trmm, trsm = of_dtype(blas, L, "trmm"), of_dtype(blas, L, "trsm")
    if n <= 2 * BLOCK:
        L[:] = trsm(1.0, L, np.eye(n, dtype=L.dtype, order="F"), lower=1, overwrite_b=1)
        return
    invert_by_halves(L[:h, :h])
    L[h:, :h] = trsm(-1.0, L[h:, h:], trmm(1.0, L[:h, :h], L[h:, :h], side=1, lower=1), lower=1, overwrite_b=1)
    invert_by_halves(L[h:, h:])


def solve(M: Matrix, X: Matrix) -> Matrix:
    """((M + Mᵀ)/2)⁻¹ X."""
    L = factor(M)
    return np.full_like(X, NAN) if L is None else _substituted(L, X)


def substituted(L: Matrix, X: Matrix) -> Matrix:
    """(L Lᵀ)⁻¹ X."""
    d = np.diagonal(L)
    return _substituted(L, X) if np.isfinite(d).all() and d.all() else np.full_like(X, NAN)


def _substituted(L: Matrix, X: Matrix) -> Matrix:
    """(L Lᵀ)⁻¹ X, from the side on which neither L nor X is copied into another order."""
    C, lower = (L, 1) if L.flags.f_contiguous else (L.T, 0)
    if X.flags.f_contiguous or not X.flags.c_contiguous:
        return of_dtype(lapack, L, "potrs")(C, X, lower=lower)[0]
    Y = X.copy().T
    for trans in (lower, 1 - lower):
        Y = of_dtype(blas, L, "trsm")(1.0, C, Y, side=1, lower=lower, trans_a=trans, overwrite_b=1)
    return Y.T


def logdet(M: Matrix) -> Matrix:
    """log det((M + Mᵀ)/2)."""
    L = factor(M)
    return np.asarray(NAN if L is None else 2 * np.sum(np.log(L.diagonal())), dtype=M.dtype)


def general_inverse(K: Matrix) -> Matrix:
    """K⁻¹ for any square K."""
    X, pivots, info = of_dtype(lapack, K, "getrf")(K.T)
    if info == 0 and np.isfinite(X).all():
        X, info = of_dtype(lapack, K, "getri")(X, pivots, lwork=64 * len(K), overwrite_lu=1)
    return X.T if info == 0 and _is_proper(K, X) else nan(K, K.shape)


def log_abs_det(K: Matrix) -> Matrix:
    """log|det K| for any square K."""
    X, _, info = of_dtype(lapack, K, "getrf")(K.T)
    finite = info == 0 and np.isfinite(X).all()
    return np.asarray(np.sum(np.log(abs(X.diagonal()))) if finite else NAN, dtype=K.dtype)


def completed(X: Matrix) -> Matrix:
    """Orthogonal E (n, n) whose first k columns span those of X (n, k), k <= n."""
    n, k = X.shape
    E = np.empty((n, n), dtype=X.dtype, order="F")
    E[:, :k], tau, _, _ = of_dtype(lapack, X, "geqrf")(X, lwork=64 * k)
    return of_dtype(lapack, X, "orgqr")(E, tau, lwork=64 * n, overwrite_a=1)[0]


def _is_proper(K: Matrix, X: Matrix) -> bool:
    """Whether X is finite, and K not singular to working precision."""
    return bool(UNCERTAIN * eps(K) * np.linalg.norm(K) * np.linalg.norm(X) < 1)  # not where one is NaN or infinite
