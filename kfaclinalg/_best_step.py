"""The step of Algorithm 2 that lowers the exact quadratic model most, of one for each γ (Sections 6.4, 6.6, 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import chain
from operator import add, mul
from typing import Any, NamedTuple, TypeAlias

from . import _backends
from ._backends import Array
from .quadratic import fit_quadratic, inner_products

Matrices: TypeAlias = tuple[Any, ...]  # one (m, n) array a layer


class Model(NamedTuple):
    """M(δ) - M(0) = ½ δᵀ (F + (λ + η) I) δ + ∇hᵀ δ."""

    curvature_gram: Callable[[Sequence[Matrices]], Any]  # of directions d_i, (J d_i)ᵀ F_R (J d_j)
    gradient: Matrices
    damping: float  # λ + η


class Step(NamedTuple):
    """The best update for one γ."""

    gamma: float
    inverse: Any
    update: Matrices  # δ = α Δ + μ δ0
    alpha: float
    mu: float
    change: float  # M(δ) - M(0)
    norm: float  # ‖δ‖


def best_step(
    model: Model, candidates: dict[float, tuple[Any, Matrices]], last: tuple[Matrices, ...], beside: Iterable[Any]
) -> tuple[Step, list[float]]:
    """The step with the lowest M(δ) of the candidates, γ: (inverse, Δ), with δ0 in `last` where there is one.

    And the values of what is `beside`: the device is waited for once.
    """
    directions = [*(Delta for _, Delta in candidates.values()), *last]
    F = _backends.widest(model.curvature_gram(directions))  # one call for all, so that J δ0 is computed once
    D, slopes = inner_products(directions, directions), inner_products(directions, [model.gradient])[:, 0]
    pairs = [[i, *range(len(candidates), len(directions))] for i in range(len(candidates))]  # of Δ and δ0
    fits = []
    for pair in pairs:
        D_pair = _backends.picked(D, pair)
        fit = fit_quadratic(_backends.picked(F, pair), D_pair, _backends.picked(slopes, pair), model.damping)
        c = fit.coefficients
        fits.append([fit.change, c @ D_pair @ c, *(c[j] for j in range(len(pair)))])
    read = iter(_backends.values(*chain(*fits), *beside))
    known = [[next(read) for _ in fit] for fit in fits]
    best = min(range(len(fits)), key=lambda i: known[i][0] if math.isfinite(known[i][0]) else math.inf)
    change, square, *coefficients = known[best]
    layers = zip(*(directions[j] for j in pairs[best]), strict=True)
    update = tuple(reduce(add, map(mul, coefficients, layer)) for layer in layers)
    gamma, (inverse, _) = list(candidates.items())[best]
    alpha, mu, *_ = *coefficients, 0.0
    return Step(gamma, inverse, update, alpha, mu, change, math.sqrt(abs(square))), list(read)


def square_of(weights: Matrices) -> Array:
    """‖W‖² of all layers."""
    return inner_products([weights], [weights])[0, 0]
