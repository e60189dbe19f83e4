"""The step of a period in which each layer is refreshed, so that the steps cost as much as each other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod

from kfaclinalg import Diagonal, LayerFactors


def turns_of(layers: Iterable[LayerFactors], period: int) -> list[int]:
    """The turn of each."""
    return _slots(tuple(map(cost_of, layers)), period)


def cost_of(layer: LayerFactors) -> float:
    """n³ for each dense side."""
    return sum(M.shape[-1] ** (1 if isinstance(M, Diagonal) else 3) for M in layer)


def product_of(layer: LayerFactors) -> int:
    """Flops of G⁻¹ V A⁻¹."""
    n, m = (1 if isinstance(M, Diagonal) else M.shape[-1] for M in layer)
    return 2 * prod(layer.A.shape[:-2] or (1,)) * layer.A.shape[-1] * layer.G.shape[-1] * (n + m)


@lru_cache
def _slots(costs: tuple[float, ...], period: int) -> list[int]:
    loads, slots = [0.0] * period, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        slots[i] = loads.index(min(loads))
        loads[slots[i]] += costs[i]
    return slots
