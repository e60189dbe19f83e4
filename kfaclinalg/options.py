"""The constants of Algorithm 2, each with the paper's symbol and section."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import _checks
from .damping import NORMS
from .structures import structure_of

MOMENTA = ("quadratic-model", "none")


class KFACOptions(NamedTuple):
    """The constants of the paper, each with its symbol and section.

    >>> KFACOptions(damping_period=2, damping_decay=0.5).omega1
    0.25
    """

    structure: Any = "block-diagonal"  # F̆ (4.2); "block-tridiagonal": F̂ (4.3); "eigen": EKFAC; or a `Structure`
    damping: float = 1.0  # λ at the start (6.5; the paper: 150)
    weight_decay: float = 1e-5  # η (6.1)
    momentum: str = "quadratic-model"  # (α, μ) (7), or "none": α alone (6.4)
    damping_period: int = 5  # T1, steps from one change of λ to the next (6.5)
    damping_decay: float = 0.95  # of λ in a step; ω1 = damping_decay**T1 (6.5)
    gamma_period: int = 20  # T2, steps from one choice of γ to the next (6.6)
    gamma_decay: float = math.sqrt(0.95)  # of γ in a step; ω2 = gamma_decay**T2 (6.6)
    inverse_period: int = 20  # T3, steps from one inverse to the next (8)
    statistics_fraction: float = 1 / 8  # τ1 = |S1| / |S'|, the part of the batch for A and G (8)
    curvature_fraction: float = 1 / 4  # τ2 = |S2| / |S'|, that for M (8), at the start: `KFACState` has it later
    averaging_maximum: float = 0.95  # bound of ε (5)
    pi_norm: str = "trace"  # the norm of π (6.3)
    chunk_size: int | None = None  # examples at once (13); None: all
    generator: Any = None  # the adapter's source of the sampled targets and subsets

    def checked(self) -> KFACOptions:
        """Itself; a TypeError or ValueError says which option is wrong and why."""
        for name, known in (("momentum", MOMENTA), ("pi_norm", NORMS)):
            _checks.check_choice(name, getattr(self, name), known)
        _ = self.structure_value
        for name in ("damping", "weight_decay"):
            _checks.nonnegative(name, getattr(self, name))
        for name in ("damping_decay", "gamma_decay", "statistics_fraction", "curvature_fraction"):
            _checks.fraction(name, getattr(self, name), "(0, 1]")
        _checks.fraction("averaging_maximum", self.averaging_maximum, "[0, 1)")
        for name in ("damping_period", "gamma_period", "inverse_period"):
            _checks.integer(name, getattr(self, name), 1)
        if self.chunk_size is not None:
            _checks.integer("chunk_size", self.chunk_size, 1)
        if self.gamma_period % self.inverse_period:
            raise ValueError(
                f"inverse_period is {self.inverse_period}, expected a divisor of gamma_period = {self.gamma_period}"
            )
        return self

    @property
    def structure_value(self) -> Any:
        """The `Structure` that a short form stands for."""
        return structure_of(self.structure, self.pi_norm)

    @property
    def omega1(self) -> float:
        return self.damping_decay**self.damping_period

    @property
    def omega2(self) -> float:
        return self.gamma_decay**self.gamma_period
