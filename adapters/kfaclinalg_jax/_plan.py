"""The state of a preconditioner, and what is known of its steps before any."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._groups import Group
from ._inverses import Inverse, blank


class PreconditionState(NamedTuple):
    """What the next steps depend on; the averages and inverses are of groups of layers of equal shapes."""

    step: Any
    taken: Any  #: statistics in the averages
    rejected: Any  #: batches whose statistics or gradients were not finite
    averages: tuple[Any, ...]
    spread: tuple[Any, ...]  #: of each layer Σ w²/R over its statistics, of R rows with the weights w
    inverses: tuple[Inverse, ...]


class Plan(NamedTuple):
    """What is known of the layers that are there: their groups, and when each is due."""

    groups: list[Group]
    turns: list[int]
    statistics_period: int
    inverse_period: int
    state: Any  # its shapes
    of: str  # which parameters


def blank_state(structure: Any, groups: list[Group]) -> Any:
    """A function that makes the state of no step yet: one program, not one for each shape."""

    def made() -> PreconditionState:
        averages = tuple(group.zeros() for group in groups)
        spread = tuple(jnp.zeros(len(group.layers)) for group in groups)
        inverses = tuple(blank(structure, group.moments, len(group.layers)) for group in groups)
        step, taken, rejected = (jnp.zeros((), jnp.int32) for _ in range(3))
        return PreconditionState(step, taken, rejected, averages, spread, inverses)

    return jax.jit(made)
