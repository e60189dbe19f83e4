"""Numbers that may be arrays: a damping, a weight in an average, a count; Python's are checked, arrays' not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from .._checks import check_batches, fraction, nonnegative
from .._typing import Array, Scalar, Scalars
from .door import Backend, backend_of, check_place, namespace_of, narrowed, operand
from .finiteness import values


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


def beside(b: Backend, x: Any) -> Scalars:
    """A number, or a 0-d array in the dtype in which scalars accumulate; one that lives elsewhere is waited for."""
    if isinstance(x, Real):
        return float(x)
    other = backend_of(x)
    here = other.xp is b.xp and (b.kind == "jax" or other.device == b.device)
    return narrowed(x, b.widest) if here else values(x)[0]


def where(condition: Any, x: Scalars, y: Scalars) -> Scalars:
    """x or y: of a Python condition one of them, of an array an array, its value unseen."""
    if isinstance(condition, Real):
        return x if condition else y
    b = backend_of(condition)
    x, y = (b.xp.asarray(z, dtype=b.widest, device=b.device) if isinstance(z, Real) else z for z in (x, y))
    return b.xp.where(condition, x, y)


def is_finite(x: Scalars) -> Any:
    return math.isfinite(x) if isinstance(x, Real) else namespace_of(x).isfinite(x)
