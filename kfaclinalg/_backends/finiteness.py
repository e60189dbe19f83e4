"""What waits for the device: numbers that the host decides by, NaN and infinity, and the error that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from numbers import Real
from typing import Any

from .._checks import check_class
from .._typing import Array
from .door import backend_of, resolve

CAUSES = (
    "a matrix that is not positive definite to working precision (more damping, or float64, helps), "
    "NaN or infinity in what came in, or overflow."
)


class LinAlgError(ValueError, RuntimeError):
    """What `assert_finite` raises. NumPy's habit, `except ValueError`, and torch's, `except RuntimeError`, catch it."""

    __module__ = "kfaclinalg"


def all_finite(arrays: Sequence[Array]) -> Array:
    """Whether no entry of any array, none of them empty, is NaN or infinite: a 0-d array, which waits for nothing."""
    xp = resolve(x=arrays[0]).xp
    return xp.all(xp.isfinite(xp.stack([f(x) for x in arrays for f in (xp.min, xp.max)])))  # a NaN is both


def values(*xs: Any) -> list[float]:
    """Python's numbers of 0-d arrays, and of numbers: each device is waited for once."""
    found = [float(x) if isinstance(x, Real) else math.nan for x in xs]
    places: dict[Any, list[int]] = {}
    for i, x in enumerate(xs):
        if not isinstance(x, Real):
            b = backend_of(x)
            places.setdefault((b.xp, b.widest, str(b.device)), []).append(i)
    for (xp, widest, _), indices in places.items():
        held = xp.stack([xp.astype(xs[i], widest) for i in indices])
        numbers = held.tolist() if hasattr(held, "tolist") else map(float, xp.unstack(held))
        for i, number in zip(indices, numbers, strict=True):
            found[i] = number
    return found


def assert_finite(x: Array, name: str) -> None:
    """Raise a LinAlgError where `x` (..., m, n), named `name` in the message, holds a NaN or an infinity.

    The one place that waits for the device: elsewhere a failure stays NaN.

    >>> import numpy as np
    >>> assert_finite(np.asarray([[[1.0]], [[np.nan]]]), "inverse")
    Traceback (most recent call last):
    kfaclinalg.LinAlgError: inverse is not finite in batch member (1,). Likely causes: ...
    """
    check_class("name", name, str)
    xp = resolve(**{name: x}).xp
    finite = xp.all(xp.isfinite(x), axis=tuple(range(-min(x.ndim, 2), 0)))
    if not bool(xp.all(finite)):
        indices = product(*map(range, finite.shape))
        first = next(index for index in indices if not bool(finite[index]))
        member = f" in batch member {first}" if first else ""
        raise LinAlgError(f"{name} is not finite{member}. Likely causes: {CAUSES}")
