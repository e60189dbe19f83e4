"""Factorisations that the array-API standard lacks or leaves open, the same on every backend.

The standard body stands first or last, a backend's own routine is a short branch. Every function gives NaN for the
batch members on which it fails, raises nothing and, eigenvalues excepted, does not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.linalg import eigh as scipy_eigh
from scipy.linalg import lapack

from ._array import NAN, Backend


def symmetrised(M: Any) -> Any:
    half = 0.5 * M  # halved first: the sum of two large entries may overflow
    return half + half.mT


def kron(b: Backend, A: Any, B: Any) -> Any:
    """The matrix A ⊗ B (..., p r, q s) for A (..., p, q) and B (..., r, s)."""
    dense = A[..., :, None, :, None] * B[..., None, :, None, :]
    *batch, p, r, q, s = dense.shape
    return b.xp.reshape(dense, (*batch, p * r, q * s))


def cholesky(b: Backend, M: Any) -> Any:
    """Lower triangular L with L Lᵀ = M for symmetric M, all NaN for a member that is not positive definite.

    LAPACK flags a partial factor, and a NaN or an infinity in M reaches the diagonal of L. Elsewhere a failure is an
    exception, a flag, or nothing at all: a partial factor and silence. One test serves there: the squared norms of the
    rows of L are the diagonal of M, which no partial factor, NaN or infinity meets.
    """
    xp = b.xp
    if b.kind == "numpy" and M.ndim == 2:
        L, info = _lapack(b, "potrf")(M.T, lower=True, clean=True)  # M.T: in the order that LAPACK reads
        return L if info == 0 and np.isfinite(np.diagonal(L)).all() else np.full_like(L, NAN)
    if b.kind == "torch":
        import torch

        L, info = torch.linalg.cholesky_ex(M)
        if M.is_cpu:
            accepted = (info == 0) & (xp.linalg.diagonal(L) < math.inf).all(-1)
            return L.masked_fill(~accepted[..., None, None], NAN)
    else:
        (L,) = _each_member(b, lambda M: (xp.linalg.cholesky(M),), M)
    d = xp.linalg.diagonal(M)
    d = xp.where(xp.isfinite(d), d, NAN)  # NumPy would warn of infinity - infinity
    tolerance = (M.shape[-1] + 8) * b.eps
    accepted = (xp.abs(xp.sum(L * L, axis=-1) - d) <= tolerance * xp.abs(d)) & (xp.linalg.diagonal(L) > 0)
    return xp.where(xp.all(accepted, axis=-1)[..., None, None], L, NAN)


def forward_substitution(b: Backend, L: Any, X: Any) -> Any:
    """Y with L Y = X, for lower triangular L."""
    return _substitution(b, L, X) if b.kind == "other" else _solve_triangular(b, L, X, "N")


def back_substitution(b: Backend, L: Any, X: Any) -> Any:
    """Y with Lᵀ Y = X, for lower triangular L."""
    if b.kind != "other":
        return _solve_triangular(b, L, X, "T")
    return b.xp.flip(_substitution(b, b.xp.flip(L.mT, axis=(-2, -1)), b.xp.flip(X, axis=-2)), axis=-2)


def _solve_triangular(b: Backend, L: Any, X: Any, trans: str) -> Any:
    if b.kind == "numpy":
        if L.ndim == X.ndim == 2 and X.size:
            return _lapack(b, "trtrs")(L, X, lower=True, trans=trans == "T")[0]
        low = np.tril(L)
        return np.linalg.solve(low.mT if trans == "T" else low, X)
    if b.kind == "torch":
        import torch

        return torch.linalg.solve_triangular(L.mT if trans == "T" else L, X, upper=trans == "T")
    # cupyx and jax guess from the dimensions whether X is a batch of vectors: equal batch shapes leave no doubt
    batch = np.broadcast_shapes(L.shape[:-2], X.shape[:-2])
    L, X = (b.xp.broadcast_to(M, (*batch, *M.shape[-2:])) for M in (L, X))
    if b.kind == "cupy":
        from cupyx.scipy.linalg import solve_triangular
    else:
        from jax.scipy.linalg import solve_triangular
    return solve_triangular(L, X, lower=True, trans=trans)


def _substitution(b: Backend, L: Any, X: Any) -> Any:
    """Forward substitution in standard calls, by halves: two half-sized solves and one product."""
    n = L.shape[-1]
    if n <= 1:
        return X / b.xp.sum(L, axis=-1, keepdims=True)  # the entry, or of none a row that no X has
    h = n // 2
    top = _substitution(b, L[..., :h, :h], X[..., :h, :])
    bottom = _substitution(b, L[..., h:, h:], X[..., h:, :] - L[..., h:, :h] @ top)
    return b.xp.concat([b.xp.broadcast_to(top, bottom.shape[:-2] + top.shape[-2:]), bottom], axis=-2)


def cholesky_inverse(b: Backend, L: Any) -> Any:
    """(L Lᵀ)⁻¹, exactly symmetric."""
    if b.kind == "torch":
        import torch

        return torch.cholesky_inverse(L)
    K = forward_substitution(b, L, b.eye(L.shape[-1]))
    return symmetrised(K.mT @ K)


def general_inverse(b: Backend, K: Any) -> Any:
    """K⁻¹ for any square K, NaN for a member that is singular."""
    xp = b.xp
    if b.kind == "torch":
        import torch

        X = torch.linalg.inv_ex(K).inverse
    else:
        (X,) = _each_member(b, lambda K: (xp.linalg.inv(K),), K)
    proper = xp.all(xp.isfinite(K) & xp.isfinite(X), axis=(-2, -1))
    return xp.where(proper[..., None, None], X, NAN)


def left_singular(b: Backend, R: Any) -> tuple[Any, Any]:
    """E orthogonal (..., n, n) and s (..., n) in [0, 1] with R Rᵀ = E diag(s) Eᵀ, for R (..., n, k) with ‖R‖ <= 1.

    By the smaller of the two Gram matrices: R Rᵀ of a wide layer is of low rank, with hundreds of eigenvalues that are
    zero up to rounding, on which float32 routines have been seen not to converge.
    """
    xp, (n, k) = b.xp, R.shape[-2:]
    if n <= k:
        s, E = eigh(b, symmetrised(R @ R.mT))
    else:
        s, F = eigh(b, symmetrised(R.mT @ R))
        s, F = xp.flip(s, axis=-1), xp.flip(F, axis=-1)  # largest first: rounding tilts a column by eps over its length
        finite = xp.all(xp.isfinite(s), axis=-1)[..., None, None]
        E = xp.where(finite, _completed(b, xp.where(finite, R @ F, 1.0)), NAN)  # R F has orthogonal columns
        s = xp.concat([s, xp.zeros((*s.shape[:-1], n - k), dtype=b.dtype, device=b.device)], axis=-1)
    return E, xp.clip(s, 0.0, 1.0)


def _completed(b: Backend, X: Any) -> Any:
    """Orthogonal E (..., n, n) whose first k columns span those of X (..., n, k)."""
    E = b.xp.linalg.qr(X, mode="complete")[0]
    if b.kind == "torch" and X.requires_grad:
        # torch differentiates the Q of a square matrix only. What the other columns of that are is free: let them be
        # constants to start with.
        E = b.xp.linalg.qr(b.xp.concat([X, E[..., X.shape[-1] :].detach()], axis=-1))[0]
    return E


def eigh(b: Backend, M: Any) -> tuple[Any, Any]:
    """Eigenvalues and eigenvectors of symmetric M, NaN for a member that has a NaN or infinity or does not converge.

    Such a member is replaced by I first: what LAPACK and cuSOLVER do with it depends on the size and the version.
    """
    xp, n = b.xp, M.shape[-1]
    finite = xp.all(xp.isfinite(M), axis=(-2, -1))[..., None, None]
    evd = b.kind == "numpy" and M.ndim == 2
    decompose = partial(scipy_eigh, driver="evd", check_finite=False) if evd else xp.linalg.eigh
    w, Q = _each_member(b, decompose, xp.where(finite, M, b.eye(n)))
    return xp.where(finite[..., 0], w, NAN), xp.where(finite, Q, NAN)


def log_abs_det(b: Backend, K: Any) -> Any:
    """log|det K| (...) for any square K, NaN for a member that is singular."""
    xp = b.xp
    finite = xp.all(xp.isfinite(K), axis=(-2, -1))
    log = xp.linalg.slogdet(xp.where(finite[..., None, None], K, b.eye(K.shape[-1])))[1]
    return xp.where(finite & xp.isfinite(log), log, NAN)


def reciprocal(b: Backend, eigenvalues: Any) -> Any:
    """1 / eigenvalues (..., m, n) of a matrix, the whole member NaN where it is not positive definite.

    The eigenvalues are known to eps of the largest: what is smaller than that has no certain sign.
    """
    xp = b.xp
    if 0 in eigenvalues.shape[-2:]:
        return eigenvalues  # the largest of none
    smallest, largest = (f(eigenvalues, axis=(-2, -1), keepdims=True) for f in (xp.min, xp.max))
    definite = smallest > b.eps * largest  # of either sign: not where the largest is negative
    return 1 / xp.where(definite, eigenvalues, NAN)


def _each_member(b: Backend, f: Callable[[Any], tuple[Any, ...]], M: Any) -> tuple[Any, ...]:
    """f(M); where the backend throws a whole batch away for one failure, member by member, NaN for those that fail."""
    try:
        return tuple(f(M))
    except (np.linalg.LinAlgError, RuntimeError):
        if M.ndim == 2:
            return tuple(NAN * x for x in f(b.eye(M.shape[-1])))
        members = [_each_member(b, f, M[i, ...]) for i in range(M.shape[0])]
        return tuple(b.xp.stack(x) for x in zip(*members, strict=True))


def _lapack(b: Backend, routine: str) -> Any:
    return getattr(lapack, ("s" if b.dtype == np.float32 else "d") + routine)
