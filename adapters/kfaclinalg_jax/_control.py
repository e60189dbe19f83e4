"""The numbers of a preconditioner's step: λ, whether a statistic and an inverse are due, the length of the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding

from kfaclinalg import Diagonal, Exact, LayerFactors

from ._damping import Relative
from ._layers import Layer
from ._moments import LARGEST

AUTO = "auto"
LENGTH = 1e-3  # with an optimizer's rate of 1, or 0.1 and a momentum of 0.9: that of AdamW's steps at its usual rate
BOUNDS = {"statistics_period": (1, 10), "inverse_period": (10, 100)}
PLAIN = {"statistics_period": 1, "inverse_period": 10}
EIGENVALUES = 10  # n³ flops for all of them and the vectors, where an inverse takes one


@dataclass(frozen=True)
class Control:
    """What the options say of a step.

    The periods that "auto" stands for are the least ones with which all that is added to the model's own work, products
    with the inverses, statistics and refreshes, is no more than that work at the example's batch; what the products
    leave of it is divided in two. A statistic is taken at least every 10 steps, a refresh every 10 to 100. While the
    averages are of few examples, in the steps 1, 2, 4, 8, ... of the first period, both are due too. With a number for
    λ nothing is chosen: 1 and 10 steps, and the update is as long as it is.
    """

    damping: Any
    decay: Any
    statistics_period: Any
    inverse_period: Any
    length: Any
    kl_clip: Any
    kl_lr: Any
    sharding: Any = None

    def __post_init__(self) -> None:
        for name in BOUNDS:
            _check_period(name, getattr(self, name))
        for name in ("decay", "length", "kl_clip", "kl_lr", "damping"):
            _check_number(name, getattr(self, name))
        if self.sharding is not None and not (
            isinstance(self.sharding, NamedSharding) and len(self.sharding.spec) == 1
        ):
            raise TypeError(f"inverse_sharding is {self.sharding!r}, expected a NamedSharding of one dimension")
        if self.kl_lr is not None and self.kl_clip is None:
            raise ValueError("kl_lr would have no effect without kl_clip")
        if self.kl_clip is not None and self.length not in (AUTO, None):
            raise ValueError("kl_clip would have no effect beside length")

    @property
    def is_relative(self) -> bool:
        return isinstance(self.damping_at(jnp.zeros((), jnp.int32)), Relative)

    def damping_at(self, step: Any) -> Any:
        return self.damping(step) if callable(self.damping) else self.damping

    def period(self, name: str, chosen: dict[str, int]) -> int:
        given = getattr(self, name)
        return int(given) if given != AUTO else chosen[name] if self.is_relative else PLAIN[name]

    def is_early(self, name: str, step: Any, period: int) -> Any:
        """Whether it is due in any case: in the early steps of "auto"."""
        if getattr(self, name) != AUTO or not self.is_relative:
            return False
        return (step < period) & (step & (step - 1) == 0)

    def decay_over(self, period: int) -> Any:
        """That of a statistic; it stands for all the steps of its period where "auto" has chosen that."""
        return self.decay**period if self.statistics_period == AUTO and self.is_relative else self.decay

    def length_at(self, step: Any) -> Any:
        """The root mean square of each layer's update; None: as long as it is."""
        if self.length == AUTO:
            return LENGTH if self.is_relative and self.kl_clip is None else None
        return self.length(step) if callable(self.length) else self.length


def periods(layers: Sequence[Layer], moments: Sequence[LayerFactors], structure: Any, draws: int) -> dict[str, int]:
    """Those that "auto" stands for, with a statistic of so many backward passes."""
    model = statistic = 0
    for layer in layers:
        for use in layer.uses if layer.kind == "linear" else ():
            if not use.is_table:
                m, n = layer.shape[-2:]
                rows = sum(prod(site.probe) // prod(site.matrix[:-1]) for site in use.sites)
                batch, W = prod(layer.shape[:-2]), prod(layer.shape)
                G, A = (d if d > LARGEST and len(layer.shape) == 2 else d * d for d in (m, n))
                model += 6 * rows * W
                statistic += draws * (2 * rows * W + rows * batch * G) + rows * batch * A
    spare = max(model - sum(map(_product, moments)), model // 4, 1)
    refresh = sum(map(cost, moments)) * (EIGENVALUES if isinstance(structure, Exact) else 1)
    costs = {"statistics_period": statistic, "inverse_period": refresh}
    return {name: min(max(-(-2 * costs[name] // spare), low), high) for name, (low, high) in BOUNDS.items()}


def of_length(U: Any, length: Any, stack: int) -> Any:
    """Each U (layers, *stack, ...) with this root mean square; zero stays zero."""
    axes = tuple(range(1 + stack, U.ndim))
    largest = jnp.abs(U).max(axes, keepdims=True)  # squares may leave float32's range
    scaled = U / jnp.where(largest == 0, 1.0, largest)
    size = jnp.sqrt(jnp.square(scaled).mean(axes, keepdims=True))
    return (scaled * (length / jnp.where(size == 0, 1.0, size))).astype(U.dtype)


def turns(moments: Sequence[LayerFactors], period: int) -> list[int]:
    """The step of a period in which each layer is refreshed, so that the steps cost as much as each other."""
    costs, loads, slots = [cost(M) for M in moments], [0] * period, [0] * len(moments)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        slots[i] = loads.index(min(loads))
        loads[slots[i]] += costs[i]
    return slots


def cost(layer: LayerFactors) -> int:
    """n³ for each dense side."""
    return int(sum(M.shape[-1] ** (1 if isinstance(M, Diagonal) else 3) for M in layer))


def _product(layer: LayerFactors) -> int:
    """Flops of G⁻¹ V A⁻¹."""
    n, m = (1 if isinstance(M, Diagonal) else M.shape[-1] for M in layer)
    return 2 * prod(layer.A.shape[:-2] or (1,)) * layer.A.shape[-1] * layer.G.shape[-1] * (n + m)


def _check_period(name: str, value: Any) -> None:
    if isinstance(value, str) and value == AUTO:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}, expected 'auto' or an integer >= 1, which is static under jit")


def _check_number(name: str, value: Any) -> None:
    """Arrays and functions of the step pass: their values are not looked at."""
    allowed = {"length": (None, AUTO), "kl_clip": (None,), "kl_lr": (None,)}.get(name, ())
    function = callable(value) and not isinstance(value, type)
    if function or hasattr(value, "dtype") or isinstance(value, Relative) or value in allowed:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number or a function of the step")
    if not 0 <= float(value) < (1 if name == "decay" else math.inf):
        raise ValueError(f"{name} is {value!r}, expected a number in [0, {1 if name == 'decay' else '∞'})")
