"""Guards beyond the paper: which step is refused, how far λ and γ rise then, and which ρ is rounding.

Its numbers are Python's, or 0-d arrays that are not looked at.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from . import _backends
from ._backends import Array, Scalars, where
from ._sides import side
from ._value import leaves
from .factors import Factors, LayerFactors

REASONS = (
    "",
    "the loss is not finite",
    "the statistics are not finite",
    "the update is not finite",
    "the loss after the step is not finite",
    "the step raises the loss",
)
NO_UPDATE, NO_LOSS_AFTER, NO_GAIN = 3, 4, 5
RISE = 1e2  # up to how many times the λ of the last step that was taken refused ones may raise it
NOISE = 16  # how many eps of what it changes a change must exceed


def are_finite(statistics: Factors) -> Array:
    """Whether all that the statistics hold is finite, a 0-d array."""
    return _backends.all_finite(list(leaves(statistics)))


def fault(*sound: Any) -> Scalars:
    """Why the step cannot be taken, a place in REASONS, of whether each does not hold; the first that does."""
    why: Scalars = 0.0
    for i, holds in reversed(list(enumerate(sound, 1))):
        why = where(holds, why, float(i))
    return why


def raised(damping: Scalars, omega1: float, ceiling: Scalars, why: Scalars) -> Scalars:
    """λ / ω1, up to the ceiling: what the batch is at fault for no λ cures. The loss after a step it does."""
    more = damping / omega1
    return where(why >= NO_LOSS_AFTER, more, at_least(damping, at_most(ceiling, more)))


def strengths(factors: Factors) -> tuple[Array, Array]:
    """Where λ = 0 and γ² = 0 begin to rise, and where γ² ends: √eps and 1/√eps of the largest mean eigenvalue."""
    b = _backends.backend_of(next(leaves(factors)))
    size = _backends.widest(reduce(at_least, map(_mean_eigenvalue, factors.layers)))
    return b.eps**0.5 * size, size / b.eps**0.5


def is_noise(change: Scalars, square: Scalars, loss: Scalars, of_weights: Scalars, eps: float) -> Any:
    """Whether M(δ) - M(0) is below the rounding of the loss, or ‖δ‖² below that of the weights' own."""
    return (abs(change) <= NOISE * eps * abs(loss)) | (abs(square) <= (NOISE * eps) ** 2 * of_weights)


def is_bearable(rise: Scalars, loss: Scalars) -> Any:
    """Whether h(θ + δ) - h(θ) is at most |h(θ)|: a lesser rise is left to λ, as in the paper."""
    return rise <= abs(loss)


def at_least(low: Scalars, x: Scalars) -> Scalars:
    return where(x < low, low, x)


def at_most(high: Scalars, x: Scalars) -> Scalars:
    return where(x > high, high, x)


def _mean_eigenvalue(layer: LayerFactors) -> Array:
    """tr(A) tr(G) / (n m), the largest of a batch."""
    a, g = (side(M).trace() / M.shape[-1] for M in layer)
    return _backends.namespace_of(a).max(abs(a * g))
