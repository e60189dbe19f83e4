"""The step of Algorithm 2 that lowers the exact quadratic model most, of one for each γ (Sections 6.4, 6.6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add, mul
from typing import Any, NamedTuple, TypeAlias

from . import _backends, _value
from ._backends import Array, Scalars
from .quadratic import fit_quadratic, inner_products

Matrices: TypeAlias = tuple[Any, ...]  # one (m, n) array a layer


class Model(NamedTuple):
    """M(δ) - M(0) = ½ δᵀ (F + (λ + η) I) δ + ∇hᵀ δ."""

    curvature_gram: Callable[[Sequence[Matrices]], Any]  # of directions d_i, (J d_i)ᵀ F_R (J d_j)
    gradient: Matrices
    damping: Scalars  # λ + η


class Candidate(NamedTuple):
    """What one γ proposes."""

    gamma: Scalars
    inverse: Any
    direction: Matrices  # Δ


class Step(NamedTuple):
    """The best step along Δ and δ0, whose coefficients and what it does are 0-d arrays."""

    candidate: Candidate
    coefficients: Array  # α, or α and μ
    change: Array  # M(δ) - M(0)
    square: Array  # ‖δ‖²


def best_step(model: Model, candidates: Sequence[Candidate], last: Sequence[Matrices]) -> tuple[Step, Matrices]:
    """The step with the lowest M(δ), and its δ = α Δ + μ δ0, with δ0 in `last` where there is one."""
    directions, count = [*(c.direction for c in candidates), *last], len(candidates)
    F = _backends.widest(model.curvature_gram(directions))  # one call for all, so that J δ0 is computed once
    D, slopes = inner_products(directions, directions), inner_products(directions, [model.gradient])[:, 0]
    pairs = [[i, *range(count, len(directions))] for i in range(count)]  # of Δ and δ0
    F, D, slopes = (_backends.picked(x, pairs) for x in (F, D, slopes))
    fits = fit_quadratic(F, D, slopes, model.damping)
    rows = [[x[i, ...] for x in (*fits, D)] for i in range(count)]
    steps = (Step(one, c, change, c @ D_i @ c) for one, (c, change, D_i) in zip(candidates, rows, strict=True))
    step = reduce(_lower, steps)
    narrow = _backends.narrowed(step.coefficients, model.gradient[0].dtype)
    coefficients = [narrow[j] for j in range(len(pairs[0]))]
    layers = zip(step.candidate.direction, *last, strict=True)
    return step, tuple(reduce(add, map(mul, coefficients, layer)) for layer in layers)


def square_of(weights: Matrices) -> Array:
    """‖W‖² of all layers."""
    return inner_products([weights], [weights])[0, 0]


def _lower(one: Step, other: Step) -> Step:
    """The one that lowers M(δ) more; what is not finite does not."""
    changes = (_backends.where(_backends.is_finite(x.change), x.change, math.inf) for x in (other, one))
    return _value.where(next(changes) < next(changes), other, one)
