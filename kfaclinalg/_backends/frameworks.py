"""The bodies of routines that torch, JAX, CuPy and NumPy have of their own."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from .._checks import common_batch
from .._typing import Scalar
from .door import NAN, backend_of
from .members import definite_inverse, has_pivots, kept, noise, per_member, proper_inverse, symmetrised, verified

Tensor: TypeAlias = Any  # torch's, JAX's, CuPy's or NumPy's


def shifted_by_torch(M: Tensor, shift: Scalar) -> Tensor:
    """M + shift I, one pass over M."""
    import torch

    d = torch.diagonal(M, dim1=-2, dim2=-1) + per_member(shift, 1)
    return torch.diagonal_scatter(torch.broadcast_to(M, (*d.shape, d.shape[-1])), d, dim1=-2, dim2=-1)


def _damped(M: Tensor, shift: Scalar) -> Tensor:
    return M if isinstance(shift, float) and shift == 0 else shifted_by_torch(M, shift)


def cholesky_by_torch(M: Tensor, shift: Scalar = 0.0) -> Tensor:
    """L with L Lᵀ = M + shift I. On a CPU LAPACK flags a partial factor; NaN and infinity reach the diagonal of L."""
    import torch

    M = symmetrised(_damped(M, shift))
    L, info = torch.linalg.cholesky_ex(M)
    if not M.is_cpu:
        return verified(L, M)
    pivots: Any = torch.diagonal(L, dim1=-2, dim2=-1)
    accepted = (info == 0) & (pivots < math.inf).logical_and(has_pivots(L, torch.diagonal(M, dim1=-2, dim2=-1))).all(-1)
    return L.masked_fill(~accepted[..., None, None], NAN)


def inverse_by_torch(M: Tensor, shift: Scalar = 0.0) -> Tensor:
    """(M + shift I)⁻¹ by the two routines that torch has for it."""
    M = _damped(M, shift)
    return definite_inverse(M, inverse_of_factor_by_torch(cholesky_by_torch(M)))


def inverse_of_factor_by_torch(L: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹, exactly symmetric."""
    import torch

    X: Tensor = torch.cholesky_inverse(L)
    return X if L.is_cpu else symmetrised(X)  # a GPU solves for the columns of I


def solve_by_torch(M: Tensor, X: Tensor) -> Tensor:
    """M⁻¹ X."""
    import torch

    return torch.cholesky_solve(X, cholesky_by_torch(M))


def forward_by_numpy(L: Tensor, X: Tensor) -> Tensor:
    """L⁻¹ X of a batch; an error where the pivots of a member underflow."""
    return np.linalg.solve(np.tril(L), X)


def back_by_numpy(L: Tensor, X: Tensor) -> Tensor:
    """L⁻ᵀ X of a batch; an error where the pivots of a member underflow."""
    return np.linalg.solve(np.tril(L).mT, X)


def forward_by_torch(L: Tensor, X: Tensor) -> Tensor:
    """L⁻¹ X."""
    import torch

    return torch.linalg.solve_triangular(L, X, upper=False)


def back_by_torch(L: Tensor, X: Tensor) -> Tensor:
    """L⁻ᵀ X."""
    import torch

    return torch.linalg.solve_triangular(L.mT, X, upper=True)


def forward_by_jax(L: Tensor, X: Tensor) -> Tensor:
    """L⁻¹ X."""
    from jax.lax.linalg import triangular_solve

    return triangular_solve(*_alike(L, X), left_side=True, lower=True)


def back_by_jax(L: Tensor, X: Tensor) -> Tensor:
    """L⁻ᵀ X."""
    from jax.lax.linalg import triangular_solve

    return triangular_solve(*_alike(L, X), left_side=True, lower=True, transpose_a=True)


def inverse_by_jax(M: Tensor, shift: Scalar = 0.0) -> Tensor:
    """(M + shift I)⁻¹, exactly symmetric.

    In few equations, which XLA compiles in a third of the time: of a failure L is all NaN, and 1 / X_jj is at most the
    pivot L_jj², so that one test serves.
    """
    from jax.lax.linalg import cholesky, triangular_solve

    b, n = backend_of(M), M.shape[-1]
    L = cholesky(symmetrised(M + per_member(shift) * b.eye(n)), symmetrize_input=False)
    K = triangular_solve(*_alike(L, b.eye(n)), left_side=True, lower=True)
    X, d = K.mT @ K, _diagonal(M) + per_member(shift, 1)
    definite = noise(b.eps, n) * d * _diagonal(X) < 1
    return symmetrised(kept(_sum(definite.astype(X.dtype)) == n, X))


def trace_by_jax(M: Tensor) -> Tensor:
    """tr M, of a slice: no pass over M."""
    return _sum(_diagonal(M))


def _sum(x: Tensor) -> Tensor:
    """Σ x (...) as a product, which XLA compiles in less time than a reduction."""
    from jax.numpy import matmul, ones

    return matmul(x, ones(x.shape[-1], x.dtype), precision="highest")


def _diagonal(M: Tensor) -> Tensor:
    """As one equation: jax.numpy's own, and a slice with a stride, gather by indices that are computed first."""
    from jax.lax import slice_in_dim

    n = M.shape[-1]
    return slice_in_dim(M.reshape(*M.shape[:-2], n * n), 0, n * n, n + 1, axis=-1)


def forward_by_cupy(L: Tensor, X: Tensor) -> Tensor:
    """L⁻¹ X."""
    from cupyx.scipy.linalg import solve_triangular

    return solve_triangular(*_alike(L, X), lower=True)


def back_by_cupy(L: Tensor, X: Tensor) -> Tensor:
    """L⁻ᵀ X."""
    from cupyx.scipy.linalg import solve_triangular

    return solve_triangular(*_alike(L, X), lower=True, trans="T")


def general_inverse_by_torch(K: Tensor) -> Tensor:
    """K⁻¹."""
    import torch

    return proper_inverse(K, torch.linalg.inv_ex(K).inverse)


def completed_by_torch(X: Tensor) -> Tensor:
    """Orthogonal E (..., n, n) whose first columns span those of X."""
    import torch

    E = torch.linalg.qr(X, mode="complete")[0]
    if X.requires_grad:
        # torch differentiates the Q of a square matrix only. What the other columns of that are is free: let them be
        # constants to start with.
        E = torch.linalg.qr(torch.cat([X, E[..., X.shape[-1] :].detach()], dim=-1))[0]
    return E


def _alike(L: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the batch of both: cupyx and JAX take no other, or guess whether X is a batch of vectors."""
    b = backend_of(L)
    batch = common_batch(L.shape[:-2], X.shape[:-2])
    return b.xp.broadcast_to(L, (*batch, *L.shape[-2:])), b.xp.broadcast_to(X, (*batch, *X.shape[-2:]))
