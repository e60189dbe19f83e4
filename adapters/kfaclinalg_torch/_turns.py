"""The step of a period in which each layer is refreshed, so that the steps cost as much as each other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from kfaclinalg import Diagonal, LayerFactors


def turns_of(layers: Iterable[LayerFactors], period: int) -> list[int]:
    """The turn of each."""
    return _slots(tuple(map(_cost, layers)), period)


def _cost(layer: LayerFactors) -> float:
    """n³ for each dense side."""
    return sum(M.shape[-1] ** (1 if isinstance(M, Diagonal) else 3) for M in layer)


@lru_cache
def _slots(costs: tuple[float, ...], period: int) -> list[int]:
    loads, slots = [0.0] * period, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        slots[i] = loads.index(min(loads))
        loads[slots[i]] += costs[i]
    return slots
