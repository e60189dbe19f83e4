"""The records of Algorithm 2: what is due in an iteration, what the next one needs, and what the reader is told.

The numbers in them are Python's, or 0-d arrays where an iteration is compiled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import _guards
from ._backends import Scalars
from ._best_step import Matrices
from .factors import Factors
from .options import KFACOptions

NUMBERS = ("damping", "gamma", "curvature_fraction", "ceiling")  # of a state


class Schedule(NamedTuple):
    """What iteration k does beside its step: Python's booleans, static where it is compiled.

    >>> Schedule.at(20, KFACOptions())
    Schedule(refresh=True, sweep=True, adapt=True)
    """

    refresh: bool  # the inverse (every T3, and in the first three)
    sweep: bool  # three γ in the place of one (every T2)
    adapt: bool  # λ (every T1)

    @classmethod
    def at(cls, k: Any, options: KFACOptions) -> Schedule:
        """That of iteration k; of an array, arrays, to choose by."""
        periods = options.inverse_period, options.gamma_period, options.damping_period
        refresh, sweep, adapt = (k % period == 0 for period in periods)
        return cls(refresh | (k <= 3), sweep, adapt)


class KFACState(NamedTuple):
    """What the next step needs."""

    iteration: Scalars  # k of the last step that was taken
    damping: Scalars  # λ
    gamma: Scalars  # γ
    factors: Factors | None = None  # the moving averages
    inverse: Any = None  # of the curvature, as last refreshed
    update: Matrices | None = None  # δ0
    curvature_fraction: Scalars = 1.0  # τ2 of the next problem
    ceiling: Scalars = math.inf  # what refused steps may raise λ to
    fitted: Any = None  # what the inverse is made of, where that changes between refreshes

    @classmethod
    def start(cls, options: KFACOptions) -> KFACState:
        """That of a run without a step.

        Raises:
            TypeError, ValueError: a wrong option.
        """
        eta = options.checked().weight_decay
        damping = max(options.damping, eta)
        first = cls(0, damping, math.sqrt(damping + eta), ceiling=_guards.RISE * damping)
        return first._replace(curvature_fraction=options.curvature_fraction)


class StepInfo(NamedTuple):
    """What happened in one step, for the reader."""

    loss: Scalars  # h(θ) before it, weight decay included
    damping: Scalars  # λ that it was taken with
    gamma: Scalars  # γ that it was taken with
    alpha: Scalars  # α, of the proposal
    mu: Scalars  # μ, of the last update
    change: Scalars  # M(δ) - M(0)
    ratio: Scalars  # ρ; NaN where λ is not adapted to it
    update_norm: Scalars  # ‖δ‖
    refreshed: Any  # whether the inverse was
    refused: Any  # why the step was not taken, or ""; of a compiled iteration the number of the reason, or 0
