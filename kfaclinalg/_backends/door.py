"""The door: which namespace, dtype and device an array has, and whether what came in fits together.

A public function resolves its arrays once to a `Backend`. Dtypes, devices and shapes are checked here, at once, with
the name, what came and what was expected; values are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device
from array_api_compat import numpy as numpy_namespace

from .._checks import class_of
from .._typing import Array, ArrayT, Device, DType, Namespace

NAN = math.nan
KINDS = ("torch", "jax", "cupy", "numpy")
_known: dict[type, tuple[Namespace, str]] = {np.ndarray: (numpy_namespace, "numpy")}  # and more of theirs, once seen


class Backend(NamedTuple):
    """Where one public call computes."""

    xp: Namespace
    kind: str  # one of KINDS, or "other"
    dtype: DType
    device: Device  # None in JAX for arrays that are not committed to theirs: what is made beside them is not either

    @property
    def eps(self) -> float:
        return float(self.xp.finfo(self.dtype).eps)

    @property
    def widest(self) -> DType:
        """The dtype in which scalars accumulate: float64 where the device has it."""
        dtypes = self.xp.__array_namespace_info__().dtypes(kind="real floating", device=self.device)
        return dtypes.get("float64", self.xp.float32)

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
        check_place(b, name, y, first)
        if y.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {y.dtype}, expected {x.dtype}, the dtype of {first}")
    return b


def operand(b: Backend, name: str, x: Array, core: tuple[int | str, ...], like: str = "the others") -> Array:
    """`x` (..., *core) in the backend's dtype: float16 and bfloat16 are widened, anything else must fit.

    A letter in `core` stands for any size; `like` is who else is of this backend.
    """
    check_place(b, name, x, like)
    half = x.dtype != b.dtype and str(x.dtype).rpartition(".")[2] in ("float16", "bfloat16")
    if not half and x.dtype != b.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {b.dtype}, float16 or bfloat16")
    sizes = zip(x.shape[max(0, x.ndim - len(core)) :], core, strict=False)
    if x.ndim < len(core) or any(isinstance(n, int) and n != size for size, n in sizes):
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


def namespace_of(x: Any, name: str = "x") -> Namespace:
    """The array-API module of an array."""
    return known[0] if (known := _known.get(type(x))) else _origin(name, x)[0]


def _origin(name: str, x: Any) -> tuple[Namespace, str, Device]:
    """Namespace, kind and device."""
    known = _known.get(type(x))
    xp, kind = known or _namespace(name, x)
    if kind == "torch" and (x.layout is not xp.strided or x.is_nested):
        raise TypeError(f"{name} is a tensor of layout {x.layout}, expected one that is neither sparse nor nested")
    if kind == "jax":
        import jax

        return xp, kind, None if isinstance(x, jax.core.Tracer) or not x.committed else x.device
    if kind == "numpy":
        return xp, kind, "cpu"  # its scalars have no device before 2.1
    return xp, kind, x.device if known else device(x)


def _namespace(name: str, x: Any) -> tuple[Namespace, str]:
    try:
        if isinstance(x, (np.matrix, np.ma.MaskedArray)):  # whose products are others
            raise TypeError
        xp = array_namespace(x)
    except TypeError as error:
        raise TypeError(f"{name} is a {class_of(x)}, expected an array (NumPy, CuPy, torch, JAX, ...)") from error
    parts = xp.__name__.split(".")
    kind = next((kind for kind in KINDS if kind in parts), "other")
    if isinstance(x, np.generic) or class_of(x) == "torch.Tensor":
        _known[type(x)] = xp, kind
    return xp, kind


def check_place(b: Backend, name: str, x: Array, like: str = "the others") -> None:
    """x must be of the namespace and on the device of `like`."""
    xp, _, place = _origin(name, x)
    if xp is not b.xp:
        raise TypeError(f"{name} is an array of {xp.__name__}, expected one of {b.xp.__name__}, as {like}")
    if place != b.device and (b.kind != "jax" or None not in (place, b.device)):
        raise ValueError(f"{name} is on device {place}, expected {b.device}, as {like}")


def picked(x: Array, picks: Sequence[Sequence[int]]) -> Array:
    """Of x (n, n, ...) the parts x[i, j, ...] for i, j, ... in each of `picks`, which are of one length, as a batch."""
    b, n = resolve(x=x), x.shape[0]
    if list(picks) == [[*range(n)]]:
        return x[None, ...]
    indices = (at for pick in picks for at in product(pick, repeat=x.ndim))
    places = [sum(i * n**axis for axis, i in enumerate(reversed(at))) for at in indices]
    parts = b.xp.take(b.xp.reshape(x, (-1,)), b.xp.asarray(places, device=b.device))
    return b.xp.reshape(parts, (len(picks), *(len(picks[0]),) * x.ndim))
