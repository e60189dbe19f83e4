"""NaN and infinity, looked for on the host: what waits for the device, and the error that says so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from .._checks import check_class
from .._typing import Array
from .door import resolve

CAUSES = (
    "a matrix that is not positive definite to working precision (more damping, or float64, helps), "
    "NaN or infinity in what came in, or overflow."
)


class LinAlgError(ValueError, RuntimeError):
    """What `assert_finite` raises. NumPy's habit, `except ValueError`, and torch's, `except RuntimeError`, catch it."""

    __module__ = "kfaclinalg"


def all_finite(arrays: Sequence[Array]) -> bool:
    """No entry of any array, none of them empty, is NaN or infinite. It waits for the device, once."""
    xp = resolve(x=arrays[0]).xp
    return bool(xp.all(xp.isfinite(xp.stack([f(x) for x in arrays for f in (xp.min, xp.max)]))))  # a NaN is both


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
