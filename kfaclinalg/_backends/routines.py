"""The routines of one matrix, the same on every backend.

Below the name of a routine stands its body in the array API's terms, above it whose own body another backend takes.
All give NaN for the batch members on which they fail, raise nothing and, eigenvalues excepted, do not wait for the
device. What should be symmetric (..., n, n) is taken as (M + Mᵀ)/2.
"""

from __future__ import annotations

from functools import reduce
from operator import matmul

from .._typing import Array, Scalar
from . import frameworks, in_place, single, spectra
from .door import NAN, backend_of, namespace_of
from .home import routine, torch_lacks_it
from .members import UNCERTAIN, definite_inverse, each_member, kept, per_member, proper_inverse, symmetrised, verified


@routine(single=single.product)
def product(*Ms: Array) -> Array:
    """M_1 M_2 ..., from the left."""
    return reduce(matmul, Ms)


@routine(single=single.moment, rule=torch_lacks_it)
def moment(x: Array) -> Array:
    """xᵀx / N for x (..., N, n), exactly symmetric."""
    return symmetrised((x.mT @ x) / x.shape[-2])  # BLAS does not promise that xᵀx is symmetric bit for bit


@routine(single=single.updated_moment, rule=torch_lacks_it)
def updated_moment(C: Array, x: Array, decay: Scalar) -> Array:
    """decay C + (1 - decay) xᵀx / N for symmetric C, exactly symmetric if C is."""
    return decay * C + (1 - decay) * moment(x)


@routine(torch=frameworks.shifted_by_torch)
def shifted(M: Array, shift: Scalar) -> Array:
    """M + shift I for a shift (...)."""
    return M + per_member(shift) * backend_of(M).eye(M.shape[-1])


def damped(M: Array, shift: Scalar) -> Array:
    """M + shift I, M itself where there is no shift."""
    return M if isinstance(shift, float) and shift == 0 else shifted(M, shift)


@routine(single=single.cholesky, in_place=in_place.cholesky, torch=frameworks.cholesky_by_torch)
def cholesky(M: Array, shift: Scalar = 0.0) -> Array:
    """Lower triangular L with L Lᵀ = M + shift I, all NaN for a member that is not positive definite.

    A failure is an exception, a flag, or nothing at all: a partial factor and silence. One test serves.
    """
    b, M = backend_of(M), symmetrised(damped(M, shift))
    (L,) = each_member(b, lambda M: (b.xp.linalg.cholesky(M),), M)
    return verified(L, M)


@routine(
    single=single.forward_substitution,
    numpy=frameworks.forward_by_numpy,
    torch=frameworks.forward_by_torch,
    jax=frameworks.forward_by_jax,
    cupy=frameworks.forward_by_cupy,
)
def forward_substitution(L: Array, X: Array) -> Array:
    """L⁻¹ X for lower triangular L, by halves: two half-sized solves and one product."""
    b, n = backend_of(L), L.shape[-1]
    if n <= 1:
        return X / b.xp.sum(L, axis=-1, keepdims=True)  # the entry, or of none a row that no X has
    h = n // 2
    top = forward_substitution(L[..., :h, :h], X[..., :h, :])
    bottom = forward_substitution(L[..., h:, h:], X[..., h:, :] - L[..., h:, :h] @ top)
    return b.xp.concat([b.xp.broadcast_to(top, bottom.shape[:-2] + top.shape[-2:]), bottom], axis=-2)


@routine(
    single=single.back_substitution,
    numpy=frameworks.back_by_numpy,
    torch=frameworks.back_by_torch,
    jax=frameworks.back_by_jax,
    cupy=frameworks.back_by_cupy,
)
def back_substitution(L: Array, X: Array) -> Array:
    """L⁻ᵀ X for lower triangular L."""
    xp = namespace_of(L)
    return xp.flip(forward_substitution(xp.flip(L.mT, axis=(-2, -1)), xp.flip(X, axis=-2)), axis=-2)


@routine(single=single.substituted)
def substituted(L: Array, X: Array) -> Array:
    """(L Lᵀ)⁻¹ X for lower triangular L, NaN for a member of L that is singular."""
    L = nonsingular(L)
    return back_substitution(L, forward_substitution(L, X))


def nonsingular(L: Array) -> Array:
    """L, NaN for a member that has a zero on its diagonal, or what is not finite."""
    xp = namespace_of(L)
    d = xp.linalg.diagonal(L)
    return kept(xp.all((d != 0) & xp.isfinite(d), axis=-1), L)


@routine(torch=frameworks.inverse_of_factor_by_torch)
def inverse_of_factor(L: Array) -> Array:
    """(L Lᵀ)⁻¹, exactly symmetric."""
    K = forward_substitution(L, backend_of(L).eye(L.shape[-1]))
    return symmetrised(K.mT @ K)


@routine(
    single=single.inverse,
    in_place=in_place.inverse,
    torch=frameworks.inverse_by_torch,
    jax=frameworks.inverse_by_jax,
)
def inverse(M: Array, shift: Scalar = 0.0) -> Array:
    """(M + shift I)⁻¹, exactly symmetric."""
    return definite_inverse(damped(M, shift), inverse_of_factor(cholesky(M, shift)))


@routine(single=single.solve, in_place=in_place.solve, torch=frameworks.solve_by_torch)
def solve(M: Array, X: Array) -> Array:
    """M⁻¹ X."""
    L = cholesky(M)
    return back_substitution(L, forward_substitution(L, X))


@routine(single=spectra.inverse_root)
def inverse_root(M: Array, p: float) -> Array:
    """M^(-1/p), exactly symmetric."""
    if M.shape[-1] == 0:
        return M
    w, Q = eigh(M)
    b = backend_of(M)
    positive = w[..., 0] > UNCERTAIN * b.eps * w[..., -1]  # of either sign
    K = Q * kept(positive, w, 1)[..., None, :] ** (-0.5 / p)
    return symmetrised(K @ K.mT)


@routine(jax=frameworks.trace_by_jax)
def trace(M: Array) -> Array:
    """tr M (...)."""
    return namespace_of(M).linalg.trace(M)


@routine(single=single.logdet)
def logdet(M: Array) -> Array:
    """log det M (...)."""
    xp = namespace_of(M)
    return 2 * xp.sum(xp.log(xp.linalg.diagonal(cholesky(M))), axis=-1)


@routine(single=spectra.eigh, in_place=in_place.eigh)
def eigh(M: Array) -> tuple[Array, Array]:
    """Eigenvalues and eigenvectors, NaN for a member that has a NaN or infinity or does not converge.

    Such a member is replaced by I first: what LAPACK and cuSOLVER do with it depends on the size and the version.
    """
    b, M = backend_of(M), symmetrised(M)
    finite = b.xp.all(b.xp.isfinite(M), axis=(-2, -1))
    w, Q = each_member(b, b.xp.linalg.eigh, b.xp.where(finite[..., None, None], M, b.eye(M.shape[-1])))
    return kept(finite, w, 1), kept(finite, Q)


@routine(single=spectra.eigvalsh, in_place=in_place.eigvalsh)
def eigvalsh(M: Array) -> Array:
    """The eigenvalues alone, NaN as in `eigh`."""
    b, M = backend_of(M), symmetrised(M)
    finite = b.xp.all(b.xp.isfinite(M), axis=(-2, -1))
    safe = b.xp.where(finite[..., None, None], M, b.eye(M.shape[-1]))
    (w,) = each_member(b, lambda M: (b.xp.linalg.eigvalsh(M),), safe)
    return kept(finite, w, 1)


@routine(single=single.general_inverse, torch=frameworks.general_inverse_by_torch)
def general_inverse(K: Array) -> Array:
    """K⁻¹ for any square K, NaN for a member that is singular."""
    b = backend_of(K)
    (X,) = each_member(b, lambda K: (b.xp.linalg.inv(K),), K)
    return proper_inverse(K, X)


@routine(single=single.log_abs_det)
def log_abs_det(K: Array) -> Array:
    """log|det K| (...) for any square K, NaN for a member that is singular."""
    b = backend_of(K)
    finite = b.xp.all(b.xp.isfinite(K), axis=(-2, -1))
    log = b.xp.linalg.slogdet(b.xp.where(finite[..., None, None], K, b.eye(K.shape[-1])))[1]
    return b.xp.where(finite & b.xp.isfinite(log), log, NAN)


def kron(A: Array, B: Array) -> Array:
    """The matrix A ⊗ B (..., p r, q s) for A (..., p, q) and B (..., r, s)."""
    dense = A[..., :, None, :, None] * B[..., None, :, None, :]
    *batch, p, r, q, s = dense.shape
    return namespace_of(dense).reshape(dense, (*batch, p * r, q * s))
