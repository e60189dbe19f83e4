"""Quadratic forms vec(U_i)ᵀ M vec(V_j) of batches U (p, ..., m, n) and V (q, ..., m, n), or an `OuterProduct`.

Outer products stay factored where that takes fewer flops. The dimensions between are those of a batch of operators.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any, TypeAlias

from . import _backends, _checks
from ._backends import Array
from ._sides import SideLike, batch_of, between, side, transposed
from ._value import rebuilt
from .outer_product import OuterProduct

Matrices: TypeAlias = "Array | OuterProduct"


def operands(
    operator: Any, b: _backends.Backend, U: Matrices, V: Matrices, batches: dict[str, tuple[int, ...]]
) -> tuple[Matrices, Matrices]:
    """Both in the operator's dtype, after the checks that they fit it and each other."""
    X, Y = (_checked(operator.shape, b, name, W, batches) for name, W in (("U", U), ("V", V)))
    _checks.check_batches(**batches, U=_batch_of(X), V=_batch_of(Y))
    return X, Y


def _checked(
    shape: tuple[int, int], b: _backends.Backend, name: str, W: Matrices, batches: dict[str, tuple[int, ...]]
) -> Matrices:
    if isinstance(W, OuterProduct):
        sides = zip("LR", (W.L, W.R), shape, strict=True)
        made: Matrices = rebuilt(OuterProduct, [_backends.operand(b, f"{name}.{k}", x, (n, "r")) for k, x, n in sides])
    else:
        made = _backends.operand(b, name, W, shape)
    if len(_batch_of(made)) < max(map(len, batches.values())) or not _leads(made):
        m, n = shape
        expected = f"(p, {'..., ' if any(batches.values()) else ''}{m}, {n})"
        came = tuple(W.L.shape) if isinstance(W, OuterProduct) else tuple(W.shape)
        raise ValueError(f"{name} has shape {came}, expected {expected}, the first dimension counting the matrices")
    return made


def _leads(W: Matrices) -> bool:
    """Whether a dimension counts the matrices."""
    return all(x.ndim > 2 for x in ((W.L, W.R) if isinstance(W, OuterProduct) else (W,)))


def _batch_of(W: Matrices) -> tuple[int, ...]:
    """What is between the first and the last two dimensions."""
    return tuple((W.L if isinstance(W, OuterProduct) else W).shape[1:-2])


def turned(B: SideLike, V: Matrices, A: SideLike) -> Matrices:
    """B V Aᵀ; of L Rᵀ it is (B L)(A R)ᵀ."""
    if not isinstance(V, OuterProduct):
        return between(B, V, A)
    return rebuilt(OuterProduct, (_columns_turned(B, V.L), _columns_turned(A, V.R)))


def in_basis(K_A: SideLike, K_B: SideLike, weights: Array, U: Matrices, V: Matrices) -> Array:
    """Σ weights ∘ (K_Bᵀ U_i K_A) ∘ (K_Bᵀ V_j K_A)."""
    X, Y = (turned(transposed(K_B), W, transposed(K_A)) for W in (U, V))
    return inner(X, weights * _dense(Y))


def inner(U: Matrices, V: Matrices) -> Array:
    """The matrix (..., p, q) of the sums Σ U_i ∘ V_j."""
    if isinstance(U, OuterProduct) and isinstance(V, OuterProduct) and _factored_pays(U, V):
        return _of_factors(U, V)
    x, y = (_flat(_dense(W)) for W in (U, V))
    return _backends.product(x, y.mT)


def summed(grams: dict[str, Array]) -> Array:
    """The sum of those of the layers, which must count as many matrices."""
    first = next(iter(grams.values()))
    for at, x in grams.items():
        if x.shape[-2:] != first.shape[-2:]:
            came, expected = (tuple(y.shape[-2:]) for y in (x, first))
            raise ValueError(f"{at}: U and V hold {came} matrices, expected {expected}, as for the first layer")
    return reduce(add, grams.values())


def narrowed(x: Array, V: Matrices) -> Array:
    """x in the dtype of what the caller gave."""
    return _backends.narrowed(x, V.L.dtype if isinstance(V, OuterProduct) else V.dtype)


def _factored_pays(U: OuterProduct, V: OuterProduct) -> bool:
    """Whether p q r s inner products of vectors take fewer flops than to form both and to multiply them."""
    (p, r), (q, s) = ((W.L.shape[0], W.L.shape[-1]) for W in (U, V))
    m, n = V.shape
    return p * q * r * s * (m + n) < m * n * (p * r + q * s + p * q)


def _of_factors(U: OuterProduct, V: OuterProduct) -> Array:
    """Σ_{ρσ} (l_iρᵀ l_jσ)(r_iρᵀ r_jσ)."""
    xp = _backends.namespace_of(U.L)
    products = [_backends.product(_flat(x.mT, 2), _flat(y.mT, 2).mT) for x, y in ((U.L, V.L), (U.R, V.R))]
    (p, r), (q, s) = ((W.L.shape[0], W.L.shape[-1]) for W in (U, V))
    both = products[0] * products[1]
    return xp.sum(xp.reshape(both, (*both.shape[:-2], p, r, q, s)), axis=(-3, -1))


def _flat(x: Array, core: int = 1) -> Array:
    """(p, ..., m, n) as (..., p, m n), or for a core of two as (..., p m, n)."""
    xp = _backends.namespace_of(x)
    x = xp.permute_dims(x, (*range(1, x.ndim - 2), 0, x.ndim - 2, x.ndim - 1))  # vmap of torch has no moveaxis
    *batch, p, m, n = x.shape
    return xp.reshape(x, (*batch, p, m * n) if core == 1 else (*batch, p * m, n))


def _columns_turned(M: SideLike, L: Array) -> Array:
    """M L for L (p, ..., m, r): a single product where M is a single matrix."""
    if batch_of(M) or L.ndim > 3:
        return side(M).apply(L)
    xp = _backends.namespace_of(L)
    p, m, r = L.shape
    return xp.reshape(side(M).apply_right(xp.reshape(L.mT, (p * r, m))), (p, r, m)).mT


def _dense(V: Matrices) -> Array:
    return V.to_dense() if isinstance(V, OuterProduct) else V
