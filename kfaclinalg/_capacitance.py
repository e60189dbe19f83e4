"""M = U diag(s) Uᵀ + diag(d) where all of s and d is seen to be positive: by one Cholesky factor (Woodbury 1950).

With V = D^(-½) U and R Rᵀ = S⁻¹ + Vᵀ V, the capacitance matrix, M⁻¹ = D⁻¹ - D^(-½) V (R Rᵀ)⁻¹ Vᵀ D^(-½) and det M =
det D det S det(R Rᵀ). One matrix at a time, and values decide what is done: where they may not,
`_woodbury` takes over.
"""

from __future__ import annotations

from typing import NamedTuple

from . import _backends
from ._backends import Array, product

REFINEMENTS = 3


class Whitened(NamedTuple):
    """What the inverse, a solution and the determinant begin with."""

    V: Array  # D^(-½) U
    R: Array  # lower, R Rᵀ = S⁻¹ + Vᵀ V
    root: Array  # D^½ (n, 1)
    doubt: bool  # whether an entry of the diagonal of D^½ M⁻¹ D^½ may be noise


def applies(U: Array, s: Array, d: Array) -> bool:
    """Whether it is one matrix, whose values may be read, with positive s and d."""
    single = (U.ndim, s.ndim, d.ndim) == (2, 1, 1) and 0 not in U.shape
    return single and _backends.may_read(U, s, d) and bool(_are_positive(s, d))


@_backends.formula
def _are_positive(s: Array, d: Array) -> Array:
    xp = _backends.namespace_of(s)
    return (xp.min(s) > 0) & (xp.min(d) > 0) & (xp.max(d) < float("inf"))


def whitened(U: Array, s: Array, d: Array) -> Whitened:
    """The diagonal of D^½ M⁻¹ D^½ is at least 1/‖I + S^½ Vᵀ V S^½‖: noise below half of that leaves no doubt."""
    b = _backends.backend_of(U)
    root = b.xp.sqrt(d)[:, None]
    V = U / root
    R, doubt = _factor(product(V.mT, V), s)
    return Whitened(V, R, root, bool(doubt))


@_backends.formula
def _factor(C: Array, s: Array) -> tuple[Array, Array]:
    """R for C = Vᵀ V, and the doubt."""
    b, k = _backends.backend_of(C), s.shape[0]
    scale = b.xp.sqrt(s)[:, None]
    G = b.eye(k) + scale * C * scale.mT
    return _backends.cholesky(G) / scale, ~(b.xp.linalg.matrix_norm(G) * noise(b, k) < 0.5)


def noise(b: _backends.Backend, k: int) -> float:
    """What is rounded in a diagonal entry of I - T J Tᵀ for T (n, k)."""
    return (8 + k**0.5) * b.eps


def inverse(U: Array, s: Array, d: Array) -> tuple[Array, Array, Array]:
    """U, s and d of M⁻¹ = diag(1/d) - T Tᵀ."""
    b, k = _backends.backend_of(U), s.shape[0]
    V, R, root, doubt = whitened(U, s, d)
    T = _backends.forward_substitution(R, V.mT).mT
    known = not doubt or bool(b.xp.all(1 - b.xp.sum(T * T, axis=-1) > noise(b, k)))
    lost = 1.0 if known else _backends.NAN
    return T / (lost * root), b.xp.full((k,), -1.0, dtype=b.dtype, device=b.device), 1 / (lost * d)


@_backends.formula
def solve(U: Array, s: Array, d: Array, X: Array) -> Array | None:
    """M⁻¹ X = Z for X (n, r), None where the inverse could be NaN.

    It is C in Z = D^(-½) (D^(-½) X - V C), C = S Vᵀ (D^½ Z), that is refined: its residual takes half of the products
    of that of Z.
    """
    b = _backends.backend_of(U)
    V, R, root, doubt = whitened(U, s, d)
    if doubt:
        return None
    Z, C = X / d[:, None], b.zeros(s.shape[0], X.shape[-1])
    for i in range(1 + REFINEMENTS):
        change = _backends.substituted(R, product(V.mT, root * Z) - C / s[:, None])
        step = product(V, change) / root
        C, Z = C + change, Z - step
        if i and is_refined(b, step, Z):
            break
    return Z


def is_refined(b: _backends.Backend, step: Array, Z: Array) -> bool:
    """Whether what the next step would change in each column is below its rounding. It reads values."""
    change, size = (b.xp.max(b.xp.abs(Y), axis=-2) for Y in (step, Z))
    return bool(b.xp.all(change <= 0.1 * b.eps**0.5 * size))


@_backends.formula
def logdet(U: Array, s: Array, d: Array) -> Array:
    """log det M."""
    xp = _backends.namespace_of(U)
    _, R, root, _ = whitened(U, s, d)
    return 2 * (xp.sum(xp.log(root)) + xp.sum(xp.log(xp.linalg.diagonal(R) * xp.sqrt(s))))
