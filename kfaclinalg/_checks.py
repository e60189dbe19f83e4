"""Checks of shapes, numbers and names: each says what came and what was expected, at once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from itertools import combinations, zip_longest
from numbers import Real
from typing import Any

from ._typing import Array, Scalar


def check_square(**arrays: Array) -> None:
    for name, x in arrays.items():
        if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., n, n)")


def check_batches(**shapes: tuple[int, ...]) -> None:
    """The batch shapes must broadcast against each other."""
    if not any(shapes.values()):
        return
    for (first, a), (name, c) in combinations(shapes.items(), 2):
        if any(i != j and 1 not in (i, j) for i, j in zip(reversed(a), reversed(c), strict=False)):
            raise ValueError(f"{name} has batch shape {tuple(c)}, which does not broadcast with {tuple(a)} of {first}")


def common_batch(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes that broadcast against each other broadcast to."""

    def both(a: tuple[int, ...], c: tuple[int, ...]) -> tuple[int, ...]:
        pairs = zip_longest(reversed(a), reversed(c), fillvalue=1)
        return tuple(j if i == 1 else i for i, j in pairs)[::-1]

    return reduce(both, map(tuple, shapes))


def nonnegative(name: str, x: Any) -> Scalar:
    """A damping: a Python number is checked and becomes a float; an array is left as it is, its values unseen."""
    if isinstance(x, Real):
        if not 0 <= float(x) < math.inf:
            raise ValueError(f"{name} is {x}, expected a finite number >= 0")
        return float(x)
    return x


def check_positive(name: str, x: float) -> None:
    if not x > 0:
        raise ValueError(f"{name} is {x}, expected a number > 0")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")
