"""The door for numbers: a damping, a weight in an average, a count; Python's are checked, those of arrays not seen."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from .._checks import check_batches, fraction, nonnegative
from .._typing import Array, Scalar
from .door import Backend, backend_of, check_place, namespace_of, narrowed, operand


def scalar(
    b: Backend, name: str, x: Any, check: Callable[[str, Any], float] = nonnegative, /, **batches: tuple[int, ...]
) -> Scalar:
    """A Python number that passes `check`, or an array (...) that fits the others, its values unseen."""
    if isinstance(x, Real):
        return check(name, x)
    if getattr(x, "weak_type", False):  # what JAX makes of a Python number
        x = b.xp.astype(x, b.dtype)
    x = operand(b, name, x, ())
    check_batches(**batches, **{name: tuple(x.shape)})
    return x


def weight(b: Backend, name: str, x: Any) -> Scalar:
    """A number in [0, 1] as a float, or a 0-d array of any floating-point dtype in the backend's, its value unseen."""
    if isinstance(x, Real):
        return fraction(name, x)
    check_place(b, name, x)
    if x.ndim or not b.xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected a number or a 0-d array")
    return narrowed(x, b.dtype)


def count(name: str, x: Any) -> Array:
    """An array (...) of integers, or of whole floating-point numbers, as floating-point ones; its values unseen."""
    xp = namespace_of(x, name)
    if xp.isdtype(x.dtype, "real floating"):
        return x
    if not xp.isdtype(x.dtype, "integral"):
        raise TypeError(f"{name} has dtype {x.dtype}, expected integers")
    return xp.astype(x, backend_of(x).widest)
