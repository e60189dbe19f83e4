"""From one dtype, device or namespace to another, and to SciPy.

A class says in its body what it can be converted to, where a reader and a type checker see it:
`astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import array_api_compat
import numpy as np

from ._typing import Device, DType, Namespace
from ._value import leaves, parts_of, suffix

T = TypeVar("T")
HOST = 1  # DLPack's number for the CPU


def astype(self: T, dtype: DType, /) -> T:
    """The same operator with every array in `dtype`: float32 or float64 of its namespace.

    Raises:
        TypeError: any other dtype; float64 in JAX without x64.
    """
    return _mapped(partial(_with_dtype, dtype=dtype), self)


def to_device(self: T, device: Device, /) -> T:
    """The same operator with every array on `device`, as its namespace calls it: "cuda:1" in torch."""
    return _mapped(lambda x: array_api_compat.to_device(x, device), self)


def to_namespace(self: T, xp: Namespace, /, *, device: Device | None = None) -> T:
    """The same operator in arrays of `xp` (numpy, torch, jax.numpy, cupy, ...), on their device or on `device`.

    The arrays are copied, by DLPack where both sides can: what is later written to one side is not seen on the other.

    Raises:
        TypeError: `xp` is no array namespace, or does not keep the dtype (JAX does not keep float64 without x64).
        ValueError: `xp` has no arrays where these are, and `device` does not say where they should go.
    """
    if not hasattr(xp, "from_dlpack"):
        raise TypeError(f"xp is {xp!r}, expected an array namespace such as numpy, torch or jax.numpy")
    return _mapped(partial(_in_namespace, xp=xp, device=device), self)


def as_scipy(self: Any) -> Any:
    """A scipy.sparse.linalg.LinearOperator on vec(V), the columns of V stacked, for cg, minres, eigsh and the like.

    Raises:
        TypeError, ValueError: the arrays are not NumPy's, or it is a batch of operators.
    """
    return linear_operator(self, [self.shape], lambda Vs: (self @ Vs[0],))


def as_scipy_on_vectors(self: Any) -> Any:
    """A scipy.sparse.linalg.LinearOperator on vectors (n,), for an operator of shape (n, n) that acts on (..., n, k).

    Raises:
        TypeError, ValueError: the arrays are not NumPy's, or it is a batch of operators.
    """
    return linear_operator(self, [(self.shape[0], 1)], lambda Xs: (self @ Xs[0],))


def linear_operator(
    operator: object, shapes: Sequence[tuple[int, int]], apply: Callable[[tuple[Any, ...]], Iterable[Any]]
) -> Any:
    """`apply`, which takes a tuple of matrices (..., *shape), as an operator of SciPy on their stacked vecs."""
    from scipy.sparse.linalg import LinearOperator

    arrays = list(leaves(operator))
    if not all(isinstance(x, np.ndarray) for x in arrays):
        raise TypeError(f"SciPy takes NumPy arrays, got {operator!r}: to_namespace(numpy) converts it")
    dtype = arrays[0].dtype
    if [U.shape for U in apply(tuple(np.zeros(shape, dtype) for shape in shapes))] != list(shapes):
        raise ValueError(f"SciPy takes one operator, got a batch of them: {operator!r}")
    ends = list(accumulate((m * n for m, n in shapes), initial=0))

    def matmat(X: Any) -> Any:  # each column of X is a member of a batch of V
        rows = np.asarray(X).astype(dtype, casting="same_kind", copy=False).T
        pieces = zip(pairwise(ends), shapes, strict=True)
        Vs = tuple(rows[:, start:stop].reshape(len(rows), n, m).mT for (start, stop), (m, n) in pieces)
        Us = zip(apply(Vs), shapes, strict=True)
        return np.concat([U.mT.reshape(len(rows), m * n) for U, (m, n) in Us], axis=1).T

    return LinearOperator((ends[-1], ends[-1]), matvec=lambda x: matmat(x.reshape(-1, 1)), matmat=matmat, dtype=dtype)


def _with_dtype(x: Any, dtype: DType) -> Any:
    xp = array_api_compat.array_namespace(x)
    if dtype not in (xp.float32, xp.float64):
        raise TypeError(f"dtype is {dtype!r}, expected float32 or float64 of {xp.__name__}")
    y = xp.astype(x, dtype, copy=False)
    if y.dtype != dtype:
        raise TypeError(f"{xp.__name__} gave {y.dtype} for {dtype!r}: JAX needs jax_enable_x64")
    return y


def _in_namespace(x: Any, xp: Namespace, device: Device | None) -> Any:
    source = array_api_compat.array_namespace(x)
    if source.__name__.rpartition("array_api_compat.")[2] == xp.__name__.rpartition("array_api_compat.")[2]:
        y = x
    else:
        # a copy: torch aborts the process on a negative stride, and makes a read-only array writeable
        y = _exchanged(source.astype(x, x.dtype, copy=True), xp, device)
        if suffix(y.dtype) != suffix(x.dtype):
            raise TypeError(f"{xp.__name__} made {y.dtype} of {x.dtype}: use astype first, or jax_enable_x64 in JAX")
    return y if device is None else array_api_compat.to_device(y, device)


def _exchanged(x: Any, target: Namespace, device: Device | None) -> Any:
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


def _mapped(f: Callable[[Any], Any], x: Any) -> Any:
    """`x` with f(array) in the place of every array, through the checks of each class."""
    parts = parts_of(x)
    if parts is None:
        return f(x) if array_api_compat.is_array_api_obj(x) else x
    items = [_mapped(f, y) for y in parts.values()]
    return tuple(items) if type(x) is tuple else type(x)(*items)
