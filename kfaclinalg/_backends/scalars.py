"""Numbers that may be arrays: a damping, a weight in an average, a count; Python's are checked, arrays' not seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import Any, TypeGuard, TypeVar, cast

from .._checks import check_batches, fraction, nonnegative
from .._typing import Array, Scalar, Scalars
from .door import Backend, backend_of, check_place, namespace_of, narrowed, operand
from .finiteness import values

F = TypeVar("F", bound=Callable[..., Any])


def in_double(f: F) -> F:
    """f with float64 in JAX too where it is switched off: the losses late in training differ in the last digits of
    float32. What f returns may be float64 then, which arithmetic elsewhere would round."""

    @wraps(f)
    def run(*args: Any, **options: Any) -> Any:
        if "jax" not in sys.modules or not any(map(_is_of_jax, args)):
            return f(*args, **options)
        import jax

        enable: Any = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
        with enable(True):
            return f(*args, **options)

    return cast(F, run)


def _is_of_jax(x: Any) -> bool:
    """Whether it is an array of JAX, or begins with one."""
    while isinstance(x, (tuple, list)) and x:
        x = x[0]
    return not is_number(x) and type(x).__module__.startswith("jax")


def is_number(x: Any) -> TypeGuard[float]:
    """Whether it is Python's, or is one of NumPy's numbers; of a float without the detour of an abstract class."""
    return isinstance(x, (float, Real))


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


def beside(b: Backend, x: Any) -> Any:
    """A number, or a 0-d array, of floating point in the dtype in which scalars accumulate; what lives elsewhere is
    waited for."""
    if is_number(x):
        return x
    other = backend_of(x)
    if other.xp is not b.xp or (b.kind != "jax" and other.device != b.device):
        return values(x)[0]
    return narrowed(x, b.widest) if b.xp.isdtype(x.dtype, "real floating") else x


def array_beside(b: Backend, x: Scalars) -> Array:
    """The same, of a number too."""
    return b.xp.asarray(x, dtype=b.widest, device=b.device) if is_number(x) else beside(b, x)


def in_dtype(b: Backend, x: Scalars) -> Scalars:
    """A number, or a 0-d array in the backend's dtype."""
    return x if is_number(x) else narrowed(x, b.dtype)


def where(condition: Any, x: Scalars, y: Scalars) -> Scalars:
    """x or y: of a Python condition one of them, of an array an array, its value unseen."""
    if is_number(condition):
        return x if condition else y
    b = backend_of(condition)
    x, y = (b.xp.asarray(z, dtype=b.widest, device=b.device) if is_number(z) else z for z in (x, y))
    return b.xp.where(condition, x, y)


def is_finite(x: Scalars) -> Any:
    return math.isfinite(x) if is_number(x) else namespace_of(x).isfinite(x)
