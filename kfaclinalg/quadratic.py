"""The exact quadratic model M(δ) = ½ δᵀ(F + (λ+η) I)δ + ∇hᵀδ + h along a few directions (Sections 6.4, 6.5 and 7)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from numbers import Real
from operator import add
from typing import Any, NamedTuple

from . import _backends, _checks
from ._backends import ArrayT, Scalar, Scalars

PARALLEL = 1e-10  # 1 - cos² below which a direction adds nothing to those before it


class QuadraticFit(NamedTuple):
    """The best coefficients (..., k) of the directions, and change = M(δ) - M(0) <= 0 (...).

    >>> QuadraticFit(coefficients=(0.5,), change=-0.5).change
    -0.5
    """

    coefficients: Any
    change: Any


@_backends.in_double
def fit_quadratic(curvature_gram: ArrayT, direction_gram: ArrayT, slopes: ArrayT, damping: Scalar, /) -> QuadraticFit:
    """The c that minimises M(Σ c_j d_j), for directions d_j of which only inner products are needed.

    k = 1 is the rescaling of Section 6.4, c = (α,); k = 2 with the last update as the second direction is the
    momentum of Section 7, c = (α, μ). A direction that is zero, or parallel to those before it, gets 0, which is
    still a minimiser. A NaN or infinity gives NaN. About 2 k³ flops.

    Args:
        curvature_gram: (..., k, k), d_iᵀ F d_j with the exact F.
        direction_gram: (..., k, k), d_iᵀ d_j.
        slopes: (..., k), ∇hᵀ d_j.
        damping: λ + η, what is added to the curvature itself.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices differ; negative damping.

    >>> import numpy as np
    >>> fit = fit_quadratic(np.asarray([[3.0]]), np.asarray([[1.0]]), np.asarray([-2.0]), 1.0)
    >>> float(fit.coefficients[0]), float(fit.change)
    (0.5, -0.5)
    """
    grams = {"curvature_gram": curvature_gram, "direction_gram": direction_gram}
    b = _backends.resolve(**grams, slopes=slopes)
    _checks.check_square(**grams)
    k = curvature_gram.shape[-1]
    _backends.operand(b, "direction_gram", direction_gram, (k, k))
    _backends.operand(b, "slopes", slopes, (k,))
    batches = {name: gram.shape[:-2] for name, gram in grams.items()}
    lam = _backends.scalar(b, "damping", damping, **batches, slopes=slopes.shape[:-1])
    F, D, v = map(_backends.widest, (curvature_gram, direction_gram, slopes))
    Q = _backends.symmetrised(F + _backends.per_member(lam if isinstance(lam, float) else _backends.widest(lam)) * D)
    finite = b.xp.all(b.xp.isfinite(Q), axis=(-2, -1)) & b.xp.all(b.xp.isfinite(v), axis=-1)
    Q = _backends.kept(finite, Q)  # the whole member is NaN then
    fit = _line_searches(b, Q, v, max(PARALLEL, 10 * k * b.eps))
    return QuadraticFit(*(_backends.narrowed(x, b.dtype) for x in fit))


@_backends.in_double
def inner_products(directions: Sequence[Sequence[Any]], others: Sequence[Sequence[Any]], /) -> Any:
    """The matrix of Σ_layers <d_i, e_j>, for directions d_i and others e_j of one matrix a layer.

    It accumulates in float64 where the device has it, in JAX also where that is switched off: in float32 the changes of
    the loss late in training drown in the rounding of the sum. Two flops for an entry of each pair.

    >>> import numpy as np
    >>> d, e = (np.ones((2, 2)), np.ones((1, 3))), (np.ones((2, 2)), np.zeros((1, 3)))
    >>> inner_products([d], [d, e])
    array([[7., 4.]])
    """
    ds = _named("directions", directions)
    es = ds if others is directions else _named("others", others)
    b = _backends.resolve(**{name: X for d in (*ds, *es) for name, X in d.items()})
    expected = [tuple(X.shape) for X in ds[0].values()]
    for e in (*ds, *es):
        if (came := [tuple(X.shape) for X in e.values()]) != expected:
            raise ValueError(f"{next(iter(e))}, ... have shapes {came}, expected {expected}, those of directions[0]")

    def product(d: Iterable[Any], e: Iterable[Any]) -> Any:
        return reduce(add, (b.xp.sum(X * Y, dtype=b.widest) for X, Y in zip(d, e, strict=True)))

    rows: list[list[Any]] = []
    for i, d in enumerate(ds):
        known = [row[i] for row in rows] if ds is es else []  # a Gram matrix is symmetric
        rows.append([*known, *(product(d.values(), e.values()) for e in es[len(known) :])])
    return b.xp.stack([b.xp.stack(row) for row in rows])


def _named(name: str, directions: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The matrices of each direction, under their names in a message."""
    each = (_checks.items(f"{name}[{i}]", d) for i, d in enumerate(_checks.items(name, directions)))
    return [{f"{name}[{i}][{j}]": X for j, X in enumerate(d)} for i, d in enumerate(each)]


def _line_searches(b: _backends.Backend, Q: Any, slopes: Any, parallel: float) -> QuadraticFit:
    """The minimiser of ½ cᵀQc + slopesᵀc, by Gauss-Jordan elimination of Q c = -slopes.

    A pivot is the curvature along what is left of a direction beside those before it: each step is a line search.
    """
    xp, k = b.xp, slopes.shape[-1]
    rows = [[*(Q[..., i, j] for j in range(k)), -slopes[..., i]] for i in range(k)]
    change = xp.sum(slopes[..., :0], axis=-1)
    for j in range(k):
        dropped = rows[j][j] <= parallel * Q[..., j, j]
        pivot = xp.where(dropped, math.inf, rows[j][j])  # what is divided by it is 0
        step = [x / pivot for x in rows[j]]
        change = change - 0.5 * step[-1] * rows[j][-1]
        rows = [[x - row[j] * y for x, y in zip(row, step, strict=True)] for row in rows]
        rows[j] = step
    return QuadraticFit(xp.stack([row[-1] for row in rows], axis=-1) if k else slopes, change)


@_backends.in_double
def reduction_ratio(loss_before: Scalars, loss_after: Scalars, change: Scalars, /) -> Scalars:
    """ρ = (h(θ+δ) - h(θ)) / (M(δ) - M(0)): 1 where the model predicts the loss exactly (Section 6.5). NaN where the
    model predicts no change. Of numbers a number; where one is an array (...), an array.

    Raises:
        TypeError, ValueError: neither numbers nor arrays of one namespace, dtype and device.

    >>> reduction_ratio(10.0, 7.0, -4.0)
    0.75
    """
    h, after, M = _scalars(loss_before=loss_before, loss_after=loss_after, change=change)
    if isinstance(M, float):
        return (after - h) / M if M else math.nan
    xp = _backends.namespace_of(M)
    return xp.where(M == 0, math.nan, (after - h) / xp.where(M == 0, 1.0, M))


@_backends.in_double
def levenberg_marquardt(damping: Scalars, ratio: Scalars, /, *, omega: Scalars) -> Scalars:
    """The next λ: omega * damping where ρ > 3/4, damping / omega where ρ < 1/4 or is NaN (Section 6.5).

    Of numbers a number; where one is an array (...), an array, whose values are not looked at.

    Raises:
        TypeError, ValueError: as for `reduction_ratio`; damping is negative or infinite, or omega is not in (0, 1].

    >>> [levenberg_marquardt(1.0, ratio, omega=0.5) for ratio in (0.9, 0.5, 0.1, float("nan"))]
    [0.5, 1.0, 2.0, 2.0]
    """
    if isinstance(damping, Real):
        _checks.nonnegative("damping", damping)
    if isinstance(omega, Real):
        _checks.fraction("omega", omega, "(0, 1]")
    lam, rho, omega1 = _scalars(damping=damping, ratio=ratio, omega=omega)
    if isinstance(rho, float):
        return omega1 * lam if rho > 0.75 else lam if rho >= 0.25 else lam / omega1
    xp = _backends.namespace_of(rho)
    return xp.where(rho > 0.75, omega1 * lam, xp.where(rho >= 0.25, lam, lam / omega1))


def _scalars(**xs: Any) -> list[Any]:
    """All of them floats or, where one is an array, all of them arrays of its backend."""
    arrays = {name: x for name, x in xs.items() if not isinstance(x, Real)}
    if not arrays:
        return [_checks.number(name, x) for name, x in xs.items()]
    b = _backends.resolve(**arrays)
    _checks.check_batches(**{name: tuple(x.shape) for name, x in arrays.items()})
    return [x if name in arrays else b.zeros() + _checks.number(name, x) for name, x in xs.items()]
