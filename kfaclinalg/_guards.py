"""Guards beyond the paper: which step is refused, how far λ and γ rise then, and which ρ is rounding."""

from __future__ import annotations

import math

from . import _backends
from ._backends import Array
from ._sides import side
from ._value import leaves
from .factors import Factors, LayerFactors

NO_UPDATE, NO_LOSS_AFTER = "the update is not finite", "the loss after the step is not finite"
RISE = 1e2  # up to how many times the λ of the last step that was taken refused ones may raise it
NOISE = 16  # how many eps of what it changes a change must exceed


def are_finite(statistics: Factors) -> Array:
    """Whether all that the statistics hold is finite, a 0-d array."""
    return _backends.all_finite(list(leaves(statistics)))


def refusal(loss: float, finite: float, change: float, norm: float) -> str:
    """Why the step cannot be taken, or "": `finite` says whether the statistics are."""
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not finite:
        return "the statistics are not finite"
    return "" if math.isfinite(change) and math.isfinite(norm) else NO_UPDATE


def raised(damping: float, omega1: float, ceiling: float, refused: str) -> float:
    """λ / ω1, up to the ceiling: what the batch is at fault for no λ cures. The loss after a step it does."""
    return damping / omega1 if refused == NO_LOSS_AFTER else max(damping, min(damping / omega1, ceiling))


def strengths(factors: Factors) -> tuple[float, float]:
    """Where λ = 0 and γ² = 0 begin to rise, and where γ² ends: √eps and 1/√eps of the largest mean eigenvalue."""
    root = _backends.backend_of(next(leaves(factors))).eps ** 0.5
    size = max(map(_mean_eigenvalue, factors.layers))
    return root * size, size / root


def is_noise(change: float, norm: float, loss: float, size: float, eps: float) -> bool:
    """Whether M(δ) - M(0) is below the rounding of the loss, or ‖δ‖ below that of the weights, of norm `size`."""
    return abs(change) <= NOISE * eps * abs(loss) or norm <= NOISE * eps * size


def _mean_eigenvalue(layer: LayerFactors) -> float:
    """tr(A) tr(G) / (n m), the largest of a batch."""
    a, g = (side(M).trace() / M.shape[-1] for M in layer)
    return float(_backends.namespace_of(a).max(abs(a * g)))
