"""Routines of two matrices and their link: the generalised eigenproblem, and a Gaussian given its neighbour."""

from __future__ import annotations

from .._typing import Array
from . import frameworks, in_place, single, spectra
from .door import backend_of, namespace_of
from .home import in_full_precision, routine, several_calls
from .members import kept, symmetrised
from .routines import back_substitution, cholesky, eigh, eigvalsh, forward_substitution


@routine(single=spectra.pencil, in_place=in_place.pencil, rule=several_calls)
def pencil(M: Array, N: Array) -> tuple[Array, Array]:
    """K and s with Kᵀ M K = I and Kᵀ N K = diag(s), for M positive definite and N symmetric.

    With M = L Lᵀ and L⁻¹ N L⁻ᵀ = E diag(s) Eᵀ, K = L⁻ᵀ E.
    """
    L = cholesky(M)
    half = forward_substitution(L, symmetrised(N))  # L⁻¹ N
    s, E = eigh(forward_substitution(L, half.mT))  # L⁻¹ N L⁻ᵀ
    return back_substitution(L, E), s


@routine(single=spectra.pencil_values, in_place=in_place.pencil_values, rule=several_calls)
def pencil_values(M: Array, N: Array) -> Array:
    """s alone."""
    L = cholesky(M)
    half = forward_substitution(L, symmetrised(N))
    return eigvalsh(forward_substitution(L, half.mT))


@in_full_precision
def conditional(M: Array, above: Array, X: Array) -> tuple[Array, Array, Array]:
    """Psi = X above⁻¹, and K and s with Kᵀ M K = I and Kᵀ (Psi above Psiᵀ) K = diag(s), for a link X (..., n, k).

    With M = L Lᵀ, above = L' L'ᵀ and R = L⁻¹ X L'⁻ᵀ, R Rᵀ = E diag(s) Eᵀ and K = L⁻ᵀ E.
    """
    L, L_above = cholesky(M), cholesky(above)
    Y_T = forward_substitution(L_above, X.mT)
    E, s = left_singular(forward_substitution(L, Y_T.mT))
    return back_substitution(L_above, Y_T).mT, back_substitution(L, E), s


def left_singular(R: Array) -> tuple[Array, Array]:
    """E orthogonal (..., n, n) and s (..., n), none below 0, with R Rᵀ = E diag(s) Eᵀ, for R (..., n, k).

    By the smaller of the two Gram matrices: R Rᵀ of a wide layer is of low rank, with hundreds of eigenvalues that are
    zero up to rounding, on which float32 routines have been seen not to converge.
    """
    b, (n, k) = backend_of(R), R.shape[-2:]
    xp = b.xp
    if n <= k:
        s, E = eigh(R @ R.mT)
    else:
        s, F = eigh(R.mT @ R)
        s, F = xp.flip(s, axis=-1), xp.flip(F, axis=-1)  # largest first: rounding tilts a column by eps over its length
        finite = xp.all(xp.isfinite(s), axis=-1)
        E = kept(finite, completed(xp.where(finite[..., None, None], R @ F, 1.0)))  # R F has orthogonal columns
        s = xp.concat([s, b.zeros(*s.shape[:-1], n - k)], axis=-1)
    return E, xp.where(s < 0, 0.0, s)


@routine(single=single.completed, torch=frameworks.completed_by_torch)
def completed(X: Array) -> Array:
    """Orthogonal E (..., n, n) whose first k columns span those of X (..., n, k)."""
    return namespace_of(X).linalg.qr(X, mode="complete")[0]
