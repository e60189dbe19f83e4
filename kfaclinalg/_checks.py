"""Checks of shapes, numbers, names and types: each says what came and what was expected, at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from functools import reduce
from itertools import combinations, zip_longest
from numbers import Integral, Real
from typing import Any, TypeVar

from ._typing import Array

T = TypeVar("T")


def named(name: str, f: Callable[..., T], *args: Any, **options: Any) -> T:
    """f(...), whose complaints begin with `name`: the item of the sequence that they are about."""
    try:
        return f(*args, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


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


def nonnegative(name: str, x: Any) -> float:
    if not 0 <= number(name, x) < math.inf:
        raise ValueError(f"{name} is {x}, expected a finite number >= 0")
    return float(x)


def positive(name: str, x: Any) -> float:
    if not 0 < number(name, x) < math.inf:
        raise ValueError(f"{name} is {x}, expected a finite number > 0")
    return float(x)


def fraction(name: str, x: Any, interval: str = "[0, 1]") -> float:
    ends = {0} if interval[0] == "(" else set()
    ends |= {1} if interval[-1] == ")" else set()
    if not 0 <= number(name, x) <= 1 or x in ends:
        raise ValueError(f"{name} is {x}, expected a number in {interval}")
    return float(x)


def number(name: str, x: Any) -> float:
    if type(x) is bool or not isinstance(x, Real):
        raise TypeError(f"{name} is {_shown(x)}, expected a number")
    return float(x)


def integer(name: str, x: Any, low: int, high: float = math.inf) -> int:
    """x within [low, high]."""
    if type(x) is bool or not isinstance(x, Integral) or not low <= int(x) <= high:
        kind = ValueError if isinstance(x, Real) else TypeError
        bounds = f">= {low}" if high == math.inf else f"from {low} to {high}"
        raise kind(f"{name} is {_shown(x)}, expected an integer {bounds}")
    return int(x)


def check_flag(name: str, x: Any) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} is {_shown(x)}, expected True or False")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {_shown(value)}, expected one of {', '.join(map(repr, known))}")


def check_class(name: str, x: Any, cls: type, *more: type) -> None:
    if not isinstance(x, (cls, *more)):
        raise TypeError(f"{name} is {_shown(x)}, expected {' or '.join(c.__name__ for c in (cls, *more))}")


def items(name: str, xs: Any, count: int | None = None) -> tuple[Any, ...]:
    """What a sequence holds: `count` items, or one and more."""
    if not isinstance(xs, Iterable) or isinstance(xs, (str, bytes, Mapping, Set)) or hasattr(xs, "dtype"):
        raise TypeError(f"{name} is a {class_of(xs)}, expected a sequence")
    held = tuple(xs)
    if not held or count not in (None, len(held)):
        raise ValueError(f"{name} has {len(held)} items, expected {'one or more' if count is None else count}")
    return held


def class_of(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _shown(x: object) -> str:
    return repr(x) if x is None or isinstance(x, (str, Real)) else f"a {class_of(x)}"
