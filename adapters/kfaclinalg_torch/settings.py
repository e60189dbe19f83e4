"""The options of the preconditioner: what they may be, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .chain import ChainInverse
from .discovery import Layer
from .eigen import EigenInverses
from .inverses import Inverses, exact, factored, low_rank

Number = float | Callable[[int], float]
Period = int | Callable[[int], int]
CHOICES: dict[str, Sequence[Any]] = {
    "estimator": ("sampled", "exact", "empirical"),
    "reduction": ("mean", "sum"),
    "structure": ("block-diagonal", "eigen", "block-tridiagonal"),
    "pi_norm": ("trace", "frobenius", "spectral"),
    "factor_dtype": (torch.float32, torch.float64),
}
COUNTS = ("statistics_period", "inverse_period", "samples", "rank")


def check_options(**options: Any) -> None:
    """A ValueError names the first that is none of its choices, or out of its range; functions of the step pass."""
    for name, value in options.items():
        if name in CHOICES:
            _check_choice(name, value, CHOICES[name])
        elif value is None or callable(value):
            continue
        elif name in COUNTS:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        elif not 0 <= value < (1 if name == "decay" else math.inf):
            raise ValueError(f"{name} is {value!r}, expected a number in [0, {1 if name == 'decay' else '∞'})")


def at(step: int, name: str, value: Any) -> Any:
    """The value of an option in this step, checked again where a function gives it."""
    if not callable(value):
        return value
    found = value(step)
    check_options(**{name: found})
    return found


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def check_together(estimator: str, likelihood: Any, structure: str, exact_damping: bool, rank: int | None) -> None:
    """A ValueError where one option leaves another without effect."""
    if estimator != "empirical" and likelihood is None:
        raise ValueError(f"estimator {estimator!r} samples from the model: give a likelihood, or take 'empirical'")
    if structure != "block-diagonal" and (exact_damping or rank is not None):
        raise ValueError(f"structure {structure!r} has a damping of its own: exact_damping and rank have no effect")
    if exact_damping and rank is not None:
        raise ValueError("exact_damping takes the whole of A and G, rank a part of them: choose one")


def sharing_of(weight_sharing: str | Mapping[str, str], layers: Sequence[Layer]) -> dict[str, str]:
    """The setting of each block; a mapping names modules, the others are expanded."""
    names = [block.name for layer in layers for block in layer.blocks]
    given = dict.fromkeys(names, weight_sharing) if isinstance(weight_sharing, str) else dict(weight_sharing)
    for name, setting in given.items():
        _check_choice(f"weight_sharing of {name!r}", setting, ("expand", "reduce"))
    if unknown := sorted(given.keys() - set(names)):
        raise ValueError(f"weight_sharing names {', '.join(unknown)}, expected names of {', '.join(names)}")
    return dict.fromkeys(names, "expand") | given


def inverses_of(
    structure: str,
    exact_damping: bool,
    rank: int | None,
    norm: str,
    period: Period,
    layers: Sequence[Layer],
) -> Inverses:
    if structure == "block-tridiagonal":
        return ChainInverse(norm, layers)
    if structure == "eigen":
        return EigenInverses(partial(exact, norm=norm), layers)
    if rank is not None:
        return Inverses(partial(low_rank, norm=norm, rank=rank))
    if exact_damping:
        return Inverses(partial(exact, norm=norm))
    method = "cholesky" if period == 1 else "explicit"  # what is applied once is not worth an inverse
    return Inverses(partial(factored, norm=norm, method=method))
