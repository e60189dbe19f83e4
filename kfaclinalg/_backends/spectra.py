"""The eigenvalues of single NumPy matrices, by SciPy's LAPACK in place. What fails is NaN."""

from __future__ import annotations

import numpy as np
from scipy.linalg import blas, lapack

from .members import UNCERTAIN, noise
from .triangles import Matrix, eps, lower_half, mirrored, nan, of_dtype


def eigh(M: Matrix) -> tuple[Matrix, Matrix]:
    """w and Q with (M + Mᵀ)/2 = Q diag(w) Qᵀ."""
    return _syevd(lower_half(M))


def eigvalsh(M: Matrix) -> Matrix:
    """The eigenvalues of (M + Mᵀ)/2."""
    X = lower_half(M)
    if np.isfinite(X).all():
        w, _, info = of_dtype(lapack, X, "syevd")(X, compute_v=0, lower=1, overwrite_a=1)
        if info == 0:
            return w
    return nan(X, X.shape[:1])


def inverse_root(M: Matrix, p: float) -> Matrix:
    """((M + Mᵀ)/2)^(-1/p), exactly symmetric."""
    w, Q = eigh(M)
    if not w[0] > UNCERTAIN * eps(M) * w[-1]:
        return nan(M, M.shape)
    return mirrored(of_dtype(blas, M, "syrk")(1.0, Q * w ** (-0.5 / p), lower=1))


def pencil(M: Matrix, N: Matrix) -> tuple[Matrix, Matrix]:
    """K and s with Kᵀ M K = I and Kᵀ N K = diag(s), for M positive definite and N symmetric."""
    s, K = _sygvd(M, N, "V")
    return (K, s) if np.isfinite(s).all() else (nan(M, M.shape), nan(M, M.shape[:1]))


def pencil_values(M: Matrix, N: Matrix) -> Matrix:
    """s alone."""
    return _sygvd(M, N, "N")[0]


def _sygvd(M: Matrix, N: Matrix, jobz: str) -> tuple[Matrix, Matrix]:
    """s and K, if `jobz` is "V"; s is NaN where there are none."""
    X, Y = np.asfortranarray(lower_half(M)), lower_half(N)
    if np.isfinite(X).all() and np.isfinite(Y).all():
        d = X.diagonal().copy()
        s, K, info = of_dtype(lapack, M, "sygvd")(Y, X, uplo="L", jobz=jobz, overwrite_a=1, overwrite_b=1)
        if info == 0 and (X.diagonal() ** 2 > noise(eps(M), len(M)) * d).all():  # X is the Cholesky factor by now
            return s, K
    return nan(M, M.shape[:1]), Y


def _syevd(X: Matrix) -> tuple[Matrix, Matrix]:
    """Eigenvalues and eigenvectors of the symmetric matrix with the lower triangle of X, in the place of X."""
    if np.isfinite(X).all():
        w, Q, info = of_dtype(lapack, X, "syevd")(X, lower=1, overwrite_a=1)
        if info == 0:
            return w, Q
    return nan(X, X.shape[:1]), nan(X, X.shape)
