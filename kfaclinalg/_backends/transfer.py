"""One array in another dtype, on another device or in another namespace, and SciPy's operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import array_api_compat
import numpy as np

from .._typing import Array, Device, DType, Namespace

HOST = 1  # DLPack's number for the CPU


def is_array(x: object) -> bool:
    return array_api_compat.is_array_api_obj(x)


def on_device(x: Array, device: Device) -> Array:
    """x on `device`, as its namespace calls it."""
    try:
        if is_array(device) or isinstance(device, complex):  # torch would take its dtype
            raise TypeError
        return array_api_compat.to_device(x, device)
    except Exception as error:
        place = array_api_compat.device(x)
        raise ValueError(f"device is {device!r}, expected one of those of the arrays, as {place}") from error


def with_dtype(x: Array, dtype: DType) -> Array:
    xp = array_api_compat.array_namespace(x)
    try:
        known = dtype in (xp.float32, xp.float64)
    except (TypeError, ValueError, RuntimeError):  # an array
        known = False
    if not known:
        raise TypeError(f"dtype is {dtype!r}, expected float32 or float64 of {xp.__name__}")
    y = xp.astype(x, dtype, copy=False)
    if y.dtype != dtype:
        raise TypeError(f"{xp.__name__} gave {y.dtype} for {dtype!r}: JAX needs jax_enable_x64")
    return y


def in_namespace(x: Array, xp: Namespace, device: Device | None) -> Array:
    source = array_api_compat.array_namespace(x)
    if source.__name__.rpartition("array_api_compat.")[2] == xp.__name__.rpartition("array_api_compat.")[2]:
        y = x
    else:
        # a copy: torch aborts the process on a negative stride, and makes a read-only array writeable
        y = _exchanged(source.astype(x, x.dtype, copy=True), xp, device)
        if dtype_name(y.dtype) != dtype_name(x.dtype):
            raise TypeError(f"{xp.__name__} made {y.dtype} of {x.dtype}: use astype first, or jax_enable_x64 in JAX")
    return y if device is None else on_device(y, device)


def _exchanged(x: Any, target: Namespace, device: Device | None) -> Array:
    try:
        return target.from_dlpack(x)
    except (BufferError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if x.__dlpack_device__()[0] != HOST:
            place = array_api_compat.device(x)
            raise ValueError(f"{target.__name__} takes no arrays from {place}: use to_device first") from error
    y = target.asarray(np.asarray(x).copy())  # JAX's are read-only in NumPy; cupy.asarray itself takes no device
    if device is None and y.__dlpack_device__()[0] != HOST:
        raise ValueError(f"{target.__name__} has no arrays on the host: name the device that they should go to")
    return y


def dtype_name(dtype: DType) -> str:
    """ "float32", without the namespace."""
    return str(dtype).rpartition(".")[2]


def linear_operator(
    operator: object,
    arrays: Sequence[Array],
    shapes: Sequence[tuple[int, ...]],
    apply: Callable[[tuple[Any, ...]], Iterable[Any]],
) -> Any:
    """`apply`, symmetric, of a tuple of arrays (..., *shape), as SciPy's operator on the stacked vecs of matrices."""
    from scipy.sparse.linalg import LinearOperator

    if not all(isinstance(x, np.ndarray) for x in arrays):
        raise TypeError(f"SciPy takes NumPy arrays, got {operator!r}: to_namespace(numpy) converts it")
    dtype = arrays[0].dtype
    if [U.shape for U in apply(tuple(np.zeros(shape, dtype) for shape in shapes))] != list(shapes):
        raise ValueError(f"SciPy takes one operator, got a batch of them: {operator!r}")
    ends = list(accumulate(map(prod, shapes), initial=0))

    def matmat(X: Any) -> Any:  # each column of X is a member of a batch of V
        rows = np.asarray(X).astype(dtype, casting="same_kind", copy=False).T
        pieces = zip(pairwise(ends), shapes, strict=True)
        Vs = tuple(rows[:, i:j].reshape(len(rows), *batch, n, m).mT for (i, j), (*batch, m, n) in pieces)
        return np.concat([U.mT.reshape(len(rows), prod(U.shape[1:])) for U in apply(Vs)], axis=1).T

    def matvec(x: Any) -> Any:
        return matmat(x.reshape(-1, 1))

    both = {"matvec": matvec, "rmatvec": matvec, "matmat": matmat, "rmatmat": matmat}
    return LinearOperator((ends[-1], ends[-1]), dtype=dtype, **both)
