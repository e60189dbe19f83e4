"""What the numbers of a step decide: whether it is taken, and the λ and τ2 of the next (Section 6.5, and guards)."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from . import _backends, _guards, _value
from ._backends import Scalars, where
from ._best_step import Matrices
from ._guards import at_least, at_most
from .factors import Factors
from .options import KFACOptions
from .quadratic import levenberg_marquardt, reduction_ratio
from .records import NUMBERS, KFACState, Schedule, StepInfo

MISLED = 0.5  # a guard beyond the paper: below this ρ the model that S2 gives is not trusted, and τ2 doubles


class Measured(NamedTuple):
    """The numbers of a step: 0-d arrays or, once they are read, Python's."""

    loss: Scalars  # h before it, weight decay included
    finite: Any  # whether the statistics are
    gamma: Scalars
    alpha: Scalars
    mu: Scalars
    change: Scalars  # M(δ) - M(0)
    square: Scalars  # ‖δ‖²
    of_weights: Scalars  # ‖W‖²
    after: Scalars  # the loss after it


Before: TypeAlias = tuple[Matrices, KFACState]


class Attempt(NamedTuple):
    """A step that may yet be refused."""

    weights: Matrices
    state: KFACState  # but for its numbers
    statistics: Factors


@_backends.in_double
def verdict(
    attempt: Attempt, m: Measured, old: Before, options: KFACOptions, due: Schedule
) -> tuple[Matrices, KFACState, StepInfo]:
    """The weights and the state after the attempt, or `old` and more damping; no value of an array is looked at."""
    (weights, state), b, is_finite = old, _backends.backend_of(old[0][0]), _backends.is_finite
    state = state._replace(**{name: _backends.beside(b, getattr(state, name)) for name in NUMBERS})
    update_is = is_finite(m.change) & is_finite(m.square)
    noise = _guards.is_noise(m.change, m.square, m.loss, m.of_weights, b.eps)
    bearable = noise | _guards.is_bearable(m.after - m.loss, m.loss)
    why = _guards.fault(is_finite(m.loss), m.finite, update_is, is_finite(m.after), bearable)
    ratio, damping, tau2 = _backends.NAN, state.damping, state.curvature_fraction
    if due.adapt:
        ratio = reduction_ratio(m.loss, m.after, m.change)
        damping, tau2 = _adapted(ratio, noise, state, options)

    def taken() -> Before:
        numbers = {"damping": damping, "gamma": m.gamma, "curvature_fraction": tau2}
        return attempt.weights, attempt.state._replace(**numbers, ceiling=_guards.RISE * damping)

    def refused() -> Before:
        return weights, _more_damped(state, options, why, due.refresh, attempt.statistics)

    step = m.alpha, m.mu, m.change
    alpha, mu, change, norm = (where(why == 0, x, 0.0) for x in (*step, abs(m.square) ** 0.5))
    refreshed = (why == 0) & due.refresh
    info = StepInfo(m.loss, state.damping, m.gamma, alpha, mu, change, ratio, norm, refreshed, why)
    return *_value.chosen(why == 0, taken, refused), info


def _adapted(ratio: Scalars, noise: Any, state: KFACState, options: KFACOptions) -> tuple[Scalars, Scalars]:
    """λ and τ2. Where ρ is rounding λ goes back to where it was raised from."""
    lowered = at_least(options.omega1 * state.damping, at_most(options.damping, state.damping))
    damping = where(noise, lowered, levenberg_marquardt(state.damping, ratio, omega=options.omega1))
    tau2 = where(noise | (ratio >= MISLED), state.curvature_fraction, _more_examples(state))
    return at_least(options.weight_decay, damping), tau2  # λ >= η is a guard


def _more_examples(state: KFACState) -> Scalars:
    return at_most(1.0, 2 * state.curvature_fraction)


def _more_damped(
    state: KFACState, options: KFACOptions, why: Scalars, refreshed: bool, statistics: Factors
) -> KFACState:
    """The state with a larger λ, a larger γ where a new inverse may be at fault, a larger τ2 where the model was."""
    damping, gamma = _guards.raised(state.damping, options.omega1, state.ceiling, why), state.gamma
    least, largest = _guards.strengths(statistics)
    higher = at_least(gamma, at_most(largest**0.5, gamma / options.omega2)) if refreshed else gamma
    higher = where(gamma == 0, least**0.5, higher)  # 0 does not rise
    of_update = why == _guards.NO_UPDATE
    damping = where((damping == 0) & (why >= _guards.NO_UPDATE), least, damping)
    tau2 = where(why == _guards.NO_GAIN, _more_examples(state), state.curvature_fraction)
    return state._replace(damping=damping, gamma=where(of_update, higher, gamma), curvature_fraction=tau2)
