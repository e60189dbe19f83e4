"""The door: which namespace, dtype and device an array has, and whether what came in fits together.

A public function resolves its arrays once to a `Backend`. Dtypes, devices and shapes are checked here, at once, with
the name, what came and what was expected; values are not looked at, save by `assert_finite`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device
from array_api_compat import numpy as numpy_namespace

from .._typing import Array, ArrayT, Device, DType, Namespace

NAN = math.nan
KINDS = ("torch", "jax", "cupy", "numpy")
CAUSES = (
    "a matrix that is not positive definite to working precision (more damping, or float64, helps), "
    "NaN or infinity in what came in, or overflow."
)
_known: dict[type, tuple[Namespace, str]] = {np.ndarray: (numpy_namespace, "numpy")}  # and torch.Tensor, once seen


class LinAlgError(ValueError, RuntimeError):
    """What `assert_finite` raises. NumPy's habit, `except ValueError`, and torch's, `except RuntimeError`, catch it."""

    __module__ = "kfaclinalg"


class Backend(NamedTuple):
    """Where one public call computes."""

    xp: Namespace
    kind: str  # one of KINDS, or "other"
    dtype: DType
    device: Device

    @property
    def eps(self) -> float:
        return float(self.xp.finfo(self.dtype).eps)

    @property
    def widest(self) -> DType:
        """The dtype in which scalars accumulate: float64 where the device has it."""
        dtypes = self.xp.__array_namespace_info__().dtypes(kind="real floating", device=self.device)
        return dtypes.get("float64", self.dtype)

    def eye(self, n: int) -> Array:
        return self.xp.eye(n, dtype=self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Array:
        return self.xp.zeros(shape, dtype=self.dtype, device=self.device)


def backend_of(x: Array) -> Backend:
    """That of an array which has come through the door."""
    xp, kind, place = _origin("x", x)
    return Backend(xp, kind, x.dtype, place)


def resolve(**arrays: Array) -> Backend:
    """The backend that all the arrays share; the error names the first that differs."""
    (first, x), *rest = arrays.items()
    xp, kind, place = _origin(first, x)
    if x.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"{first} has dtype {x.dtype}, expected float32 or float64")
    b = Backend(xp, kind, x.dtype, place)
    for name, y in rest:
        _same_place(b, name, y)
        if y.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {y.dtype}, expected {x.dtype}, the dtype of {first}")
    return b


def operand(b: Backend, name: str, x: Array, core: tuple[int, ...]) -> Array:
    """`x` (..., *core) in the backend's dtype: float16 and bfloat16 are widened, anything else must fit."""
    _same_place(b, name, x)
    half = x.dtype != b.dtype and str(x.dtype).rpartition(".")[2] in ("float16", "bfloat16")
    if not half and x.dtype != b.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {b.dtype}, float16 or bfloat16")
    if x.ndim < len(core) or tuple(x.shape[x.ndim - len(core) :]) != core:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, core))})")
    return b.xp.astype(x, b.dtype) if half else x


def narrowed(x: ArrayT, dtype: DType) -> ArrayT:
    """`x` in the dtype that the caller's array came in."""
    return x if x.dtype == dtype else backend_of(x).xp.astype(x, dtype)


def widest(x: Array) -> Array:
    """`x` in the dtype in which scalars accumulate."""
    b = resolve(x=x)
    return narrowed(x, b.widest)


def kind_of(x: object) -> str:
    """One of KINDS, or "other"."""
    known = _known.get(type(x))
    return known[1] if known else _origin("x", x)[1]


def _origin(name: str, x: Any) -> tuple[Namespace, str, Device]:
    """Namespace, kind and device."""
    if known := _known.get(type(x)):
        return known[0], known[1], x.device
    try:
        xp = array_namespace(x)
    except TypeError as error:
        raise TypeError(f"{name} is a {_class(x)}, expected an array (NumPy, CuPy, torch, JAX, ...)") from error
    parts = xp.__name__.split(".")
    kind = next((kind for kind in KINDS if kind in parts), "other")
    if _class(x) == "torch.Tensor":
        _known[type(x)] = xp, kind
    return xp, kind, device(x)


def _class(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _same_place(b: Backend, name: str, x: Array) -> None:
    xp, _, place = _origin(name, x)
    if xp is not b.xp:
        raise TypeError(f"{name} is an array of {xp.__name__}, expected one of {b.xp.__name__}, as the others are")
    if place != b.device:
        raise ValueError(f"{name} is on device {place}, expected {b.device}, as the others are")


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
    xp = resolve(**{name: x}).xp
    finite = xp.all(xp.isfinite(x), axis=tuple(range(-min(x.ndim, 2), 0)))
    if not bool(xp.all(finite)):
        indices = product(*map(range, finite.shape))
        first = next(index for index in indices if not bool(finite[index]))
        member = f" in batch member {first}" if first else ""
        raise LinAlgError(f"{name} is not finite{member}. Likely causes: {CAUSES}")


def picked(x: Array, indices: Sequence[int]) -> Array:
    """x[i, j, ...] for i, j, ... in `indices` alone, on every axis."""
    b = resolve(x=x)
    along = b.xp.asarray(indices, device=b.device)
    for axis in range(x.ndim):
        x = b.xp.take(x, along, axis=axis)
    return x
