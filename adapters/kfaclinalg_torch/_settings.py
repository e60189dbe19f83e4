"""The options of the preconditioner: what they may be, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch

from ._chain import ChainInverse
from ._discovery import Layer
from ._eigen import EigenInverses
from ._inverses import Inverses, exact, factored, low_rank

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
OPTIONAL = ("kl_clip", "rank")


def check_options(**options: Any) -> None:
    """A TypeError or ValueError names the first that is none of its choices, or out of its range.

    Functions of the step pass, and None where it means that there is none.
    """
    for name, value in options.items():
        if name in CHOICES:
            _check_choice(name, value, CHOICES[name])
        elif (value is None and name in OPTIONAL) or callable(value):
            continue
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}, expected a number or a function of the step")
        elif name in COUNTS:
            if not isinstance(value, Integral) or int(value) < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer >= 1")
        elif not 0 <= float(value) < (1 if name == "decay" else math.inf):
            raise ValueError(f"{name} is {value!r}, expected a number in [0, {1 if name == 'decay' else '∞'})")


def at(step: int, name: str, value: Any) -> Any:
    """The value of an option in this step, checked again where a function gives it."""
    if not callable(value):
        return value
    found = value(step)
    check_options(**{name: found})
    return found


def _check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    if not any(value is one or (isinstance(value, str) and value == one) for one in known):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def check_together(estimator: str, likelihood: Any, structure: str, exact_damping: bool, rank: int | None) -> None:
    """A ValueError where one option leaves another without effect."""
    if not isinstance(exact_damping, bool):
        raise TypeError(f"exact_damping is {exact_damping!r}, expected True or False")
    if estimator != "empirical" and likelihood is None:
        raise ValueError(f"estimator {estimator!r} samples from the model: give a likelihood, or take 'empirical'")
    if structure != "block-diagonal" and (exact_damping or rank is not None):
        raise ValueError(f"structure {structure!r} has a damping of its own: exact_damping and rank have no effect")
    if exact_damping and rank is not None:
        raise ValueError("exact_damping takes the whole of A and G, rank a part of them: choose one")


def sharing_of(weight_sharing: str | Mapping[str, str], layers: Sequence[Layer]) -> dict[str, str]:
    """The setting of each block; a mapping names modules, the others are expanded."""
    names = [block.name for layer in layers for block in layer.blocks]
    if not isinstance(weight_sharing, str | Mapping):
        raise TypeError(f"weight_sharing is {weight_sharing!r}, expected 'expand', 'reduce' or a mapping of names")
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
