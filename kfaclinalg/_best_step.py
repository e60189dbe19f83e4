"""The step of Algorithm 2 that lowers M(δ) most, of one for each γ (Sections 6.4, 6.6 and 7).

M(δ) - M(0) = ½ δᵀ (F + (λ + η) I) δ + ∇hᵀ δ is the exact quadratic model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add, mul
from typing import Any, NamedTuple, TypeAlias

from . import _backends, _value
from ._backends import Array, Scalars
from .quadratic import fit_quadratic, inner_products

Matrices: TypeAlias = tuple[Any, ...]  # one (m, n) array a layer


class Candidate(NamedTuple):
    """What one γ proposes."""

    gamma: Scalars
    inverse: Any
    direction: Matrices  # Δ


class Step(NamedTuple):
    """The best step along Δ and δ0, whose coefficients and what it does are 0-d arrays."""

    candidate: Candidate
    coefficients: Any  # α and μ
    change: Array  # M(δ) - M(0)
    square: Array  # ‖δ‖²


@_backends.in_double
def best_step(
    F: Array, gradient: Matrices, damping: Scalars, candidates: Sequence[Candidate], last: Sequence[Matrices]
) -> tuple[Step, Matrices]:
    """The step with the lowest M(δ), and its δ = α Δ + μ δ0, with δ0 in `last` where there is one.

    F holds (J d_i)ᵀ F_R (J d_j) of the Δ of all candidates and δ0, and `damping` is λ + η.
    """
    directions, count = [*(c.direction for c in candidates), *last], len(candidates)
    F = _backends.widest(F)
    damping = _backends.beside(_backends.backend_of(F), damping)
    D, slopes = inner_products(directions, directions), inner_products(directions, [gradient])[:, 0]
    pairs = [[i, *range(count, len(directions))] for i in range(count)]  # of Δ and δ0
    F, D, slopes = (_backends.picked(x, pairs) for x in (F, D, slopes))
    fits = fit_quadratic(F, D, slopes, damping)
    rows = [[x[i, ...] for x in (*fits, D)] for i in range(count)]
    steps = (Step(one, c, change, c @ D_i @ c) for one, (c, change, D_i) in zip(candidates, rows, strict=True))
    step = reduce(_lower, steps)
    c = [step.coefficients[j] for j in range(len(pairs[0]))]
    narrow = [_backends.narrowed(x, gradient[0].dtype) for x in c]
    layers = zip(step.candidate.direction, *last, strict=True)
    update = tuple(reduce(add, map(mul, narrow, layer)) for layer in layers)
    return step._replace(coefficients=(*c, 0.0)[:2]), update


def square_of(weights: Matrices) -> Array:
    """‖W‖² of all layers, squared in float64: a late step changes it by less than the squares are rounded to."""
    wide = tuple(map(_backends.widest, weights))
    return inner_products([wide], [wide])[0, 0]


def _lower(one: Step, other: Step) -> Step:
    """The one that lowers M(δ) more; what is not finite does not."""
    changes = (_backends.where(_backends.is_finite(x.change), x.change, math.inf) for x in (other, one))
    return _value.where(next(changes) < next(changes), other, one)
