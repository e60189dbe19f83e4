"""The inverse and the determinant of U diag(s) Uᵀ + diag(d), by its columns: arrays beneath `low_rank`.

With W = D^(-½) U |S|^½ and J = sign(S),

    M = D^½ (I + W J Wᵀ) D^½,    (I + W J Wᵀ)⁻¹ = I - T J Tᵀ,    M⁻¹ = D⁻¹ - (D^(-½) T) J (D^(-½) T)ᵀ,

with a T (n, k) for which there are two methods. Both take the positive J first. What they factorise is then
positive definite as long as M is, and the product of their squared pivots is det(I + W J Wᵀ). Scaling by D^½ leaves
each entry (i, j) of M⁻¹ an error relative to (d_i d_j)^(-½), and not to the largest 1/d.
"""

from __future__ import annotations

from typing import NamedTuple

from . import _backends
from ._backends import Array


class Factorisation(NamedTuple):
    """M⁻¹ = diag(1/d) - (D^(-½) T) J (D^(-½) T)ᵀ and log det M; all NaN for a member that is not positive definite."""

    d: Array  # (..., n)
    T: Array  # (..., n, k)
    J: Array  # (..., k)
    logdet: Array  # (...)


def inverse(U: Array, s: Array, d: Array, method: str) -> tuple[Array, Array, Array]:
    """U, s and d of the inverse, which is of the same form."""
    b = _backends.backend_of(U)
    d, T, J, _ = factorise(b, U, s, d, method)
    return T / b.xp.sqrt(d)[..., None], -J, 1 / d


def logdet(U: Array, s: Array, d: Array) -> Array:
    """log det M (...)."""
    return factorise(_backends.backend_of(U), U, s, d, "woodbury").logdet


@_backends.in_full_precision
def factorise(b: _backends.Backend, U: Array, s: Array, d: Array, method: str) -> Factorisation:
    """By one of METHODS, for U (..., n, k), s (..., k) and d (..., n). 14 n k² flops."""
    xp, (n, k) = b.xp, U.shape[-2:]
    # An infinity meets NaN before it meets a zero: NumPy would warn of their product.
    proper = xp.all(xp.isfinite(d) & (d > 0), axis=-1) & xp.all(xp.isfinite(s), axis=-1)
    proper = (proper & xp.all(xp.isfinite(U), axis=(-2, -1)))[..., None]
    d, s = xp.where(proper, d, _backends.NAN), xp.where(proper, s, _backends.NAN)
    W = U * xp.sqrt(xp.abs(s))[..., None, :] / xp.sqrt(d)[..., None]
    if method == "sherman-morrison":  # of the positive s first
        order = xp.argsort(s, axis=-1, descending=True)
        s = xp.take_along_axis(s, order, axis=-1)
        W = xp.take_along_axis(W, xp.broadcast_to(order[..., None, :], W.shape), axis=-1)
    J = xp.where(s > 0, 1.0, xp.where(s < 0, -1.0, s))  # not xp.sign: torch's `vmap` does not take array-api-compat's
    T, pivots = METHODS[method](b, W, J) if k else (W, s)
    # What is rounded in a pivot 1 - wᵀ y is a few eps (1 + ‖w‖ ‖y‖), with ‖y‖ <= 1 where M is definite, and what the
    # one step of refinement leaves of y; in a diagonal entry of I - T J Tᵀ, a few eps. Less has no certain sign.
    size = xp.sum(W * W, axis=-2)
    noise = xp.where(J < 0, (8 + n**0.5) * b.eps * (1 + xp.sqrt(size) + b.eps * size * size), 0.0)
    remaining = 1 - xp.sum(T * T * J[..., None, :], axis=-1)
    definite = xp.all(pivots > noise, axis=-1)
    logdet = xp.sum(xp.log(d), axis=-1) + xp.sum(xp.log(xp.where(definite[..., None], pivots, _backends.NAN)), axis=-1)
    known = definite & xp.all(remaining > (8 + k**0.5) * b.eps, axis=-1)
    d, T = xp.where(known[..., None], d, _backends.NAN), xp.where(known[..., None, None], T, _backends.NAN)
    return Factorisation(d, T, J, xp.where(definite, logdet, _backends.NAN))


def _woodbury(b: _backends.Backend, W: Array, J: Array) -> tuple[Array, Array]:
    """With P and N the columns of positive and of other J, zero elsewhere,

        (I + P Pᵀ)⁻¹ = I - T₁ T₁ᵀ                        with T₁ = P L⁻ᵀ,  L Lᵀ = I + Pᵀ P
        (I + P Pᵀ - N Nᵀ)⁻¹ = I - T₁ T₁ᵀ + T₂ T₂ᵀ       with T₂ = Y K⁻ᵀ,  Y = (I - T₁ T₁ᵀ) N,  K Kᵀ = I - Nᵀ Y

    (Woodbury 1950, twice). T₁ has the columns of P alone and T₂ those of N, so that their sum holds both. Definite J
    needs no pivoting, and K exists if and only if M is positive definite: its Cholesky factorisation decides that.
    Where N is large and nearly in the range of P, I - Nᵀ Y cancels: Y has one step of refinement.
    """
    xp, I = b.xp, b.eye(W.shape[-1])
    plus = J[..., None, :] > 0
    P, N = xp.where(plus, W, 0.0), xp.where(plus, 0.0, W)
    L = _backends.cholesky(I + P.mT @ P)
    T = _backends.forward_substitution(L, P.mT).mT
    Y = N - T @ (T.mT @ N)
    R = N - Y - P @ (P.mT @ Y)
    Y = Y + R - T @ (T.mT @ R)
    K = _backends.cholesky(I - _backends.symmetrised(N.mT @ Y))
    pivots = xp.linalg.diagonal(L) * xp.linalg.diagonal(K)  # one of the two is 1
    return T + _backends.forward_substitution(K, Y.mT).mT, pivots * pivots


def _sherman_morrison(b: _backends.Backend, W: Array, J: Array) -> tuple[Array, Array]:
    """(C + j w wᵀ)⁻¹ = C⁻¹ - j t tᵀ / c with t = C⁻¹ w and c = 1 + j wᵀ t (Sherman & Morrison 1950), one column w of W
    after the other, C⁻¹ = I - T J Tᵀ of those before it. t is refined as Y is in `_woodbury`.
    """
    xp, T, pivots = b.xp, W[..., :0], []
    for i in range(W.shape[-1]):
        V, w, S = W[..., :i], W[..., i : i + 1], J[..., :i, None]
        t = w - T @ (S * (T.mT @ w))
        r = w - t - V @ (S * (V.mT @ t))
        t = t + r - T @ (S * (T.mT @ r))
        c = 1 + J[..., i : i + 1, None] * (w.mT @ t)
        c = xp.where(c > 0, c, _backends.NAN)
        pivots.append(c[..., 0])
        T = xp.concat([T, t / xp.sqrt(c)], axis=-1)
    return T, xp.concat(pivots, axis=-1)


METHODS = {"woodbury": _woodbury, "sherman-morrison": _sherman_morrison}
