"""The constants of Algorithm 2, each with the paper's symbol and section."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .curvature import STRUCTURES
from .damping import NORMS

MOMENTA = ("quadratic-model", "none")


class KFACOptions(NamedTuple):
    """The constants of the paper; the comment gives the symbol and the section.

    >>> KFACOptions(damping_period=2, damping_decay=0.5).omega1
    0.25
    """

    structure: str = "block-diagonal"  # F̆ (4.2), or "block-tridiagonal", F̂ (4.3)
    damping: float = 1.0  # λ at the start (6.5; the paper: 150)
    weight_decay: float = 1e-5  # η (6.1)
    momentum: str = "quadratic-model"  # (α, μ) (7), or "none": α alone (6.4)
    damping_period: int = 5  # T1 (6.5)
    damping_decay: float = 0.95  # ω1 = damping_decay**T1 (6.5)
    gamma_period: int = 20  # T2 (6.6)
    gamma_decay: float = math.sqrt(0.95)  # ω2 = gamma_decay**T2 (6.6)
    inverse_period: int = 20  # T3 (8)
    statistics_fraction: float = 1 / 8  # τ1 = |S1| / |S'| (8)
    curvature_fraction: float = 1 / 4  # τ2 = |S2| / |S'| (8) at the start; `KFACState` has what it has grown to
    averaging_maximum: float = 0.95  # bound of ε (5)
    pi_norm: str = "trace"  # the norm of π (6.3)
    chunk_size: int | None = None  # examples at once (13); None: all
    generator: Any = None  # the adapter's source of the sampled targets and subsets

    def checked(self) -> KFACOptions:
        """Itself; a ValueError says which option is wrong and why."""
        self._require_one_of("structure", STRUCTURES)
        self._require_one_of("momentum", MOMENTA)
        self._require_one_of("pi_norm", NORMS)
        for name in ("damping", "weight_decay"):
            self._require(name, lambda x: 0 <= x < math.inf, "a finite number >= 0")
        for name in ("damping_decay", "gamma_decay", "statistics_fraction", "curvature_fraction"):
            self._require(name, lambda x: 0 < x <= 1, "a number in (0, 1]")
        for name in ("damping_period", "gamma_period", "inverse_period"):
            self._require(name, lambda x: isinstance(x, int) and x >= 1, "an integer >= 1")
        self._require("chunk_size", lambda x: x is None or (isinstance(x, int) and x >= 1), "None or an integer >= 1")
        self._require("averaging_maximum", lambda x: 0 <= x < 1, "a number in [0, 1)")
        T2 = self.gamma_period
        self._require("inverse_period", lambda T3: T2 % T3 == 0, f"a divisor of gamma_period = {T2}")
        return self

    def _require_one_of(self, name: str, known: Iterable[str]) -> None:
        self._require(name, lambda x: x in known, "one of " + ", ".join(map(repr, known)))

    def _require(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        if not holds(getattr(self, name)):
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def omega1(self) -> float:
        return self.damping_decay**self.damping_period

    @property
    def omega2(self) -> float:
        return self.gamma_decay**self.gamma_period
