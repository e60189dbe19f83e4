"""From one dtype, device or namespace to another, and to SciPy.

A class says in its body what it can be converted to, where a reader and a type checker see it:
`astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from ._backends import transfer
from ._typing import Array, Device, DType, Namespace
from ._value import leaves, parts_of

T = TypeVar("T")
LinearOperator: TypeAlias = Any  # scipy.sparse.linalg's


def astype(self: T, dtype: DType, /) -> T:
    """The same operator with every array in `dtype`: float32 or float64 of its namespace.

    Raises:
        TypeError: any other dtype; float64 in JAX without x64.
    """
    return _mapped(partial(transfer.with_dtype, dtype=dtype), self)


def to_device(self: T, device: Device, /) -> T:
    """The same operator with every array on `device`, as its namespace calls it: "cuda:1" in torch."""
    return _mapped(partial(transfer.on_device, device=device), self)


def to_namespace(self: T, xp: Namespace, /, *, device: Device | None = None) -> T:
    """The same operator in arrays of `xp` (numpy, torch, jax.numpy, cupy, ...), on their device or on `device`.

    The arrays are copied, by DLPack where both sides can: what is later written to one side is not seen on the other.

    Raises:
        TypeError: `xp` is no array namespace, or does not keep the dtype (JAX does not keep float64 without x64).
        ValueError: `xp` has no arrays where these are, and `device` does not say where they should go.
    """
    if not hasattr(xp, "from_dlpack"):
        raise TypeError(f"xp is {xp!r}, expected an array namespace such as numpy, torch or jax.numpy")
    return _mapped(partial(transfer.in_namespace, xp=xp, device=device), self)


def as_scipy(self: Any) -> LinearOperator:
    """A scipy.sparse.linalg.LinearOperator on vec(V), the columns of V stacked, for cg, minres, eigsh and the like.

    Raises:
        TypeError, ValueError: the arrays are not NumPy's, or it is a batch of operators.
    """
    return linear_operator(self, [self.shape], lambda Vs: (self @ Vs[0],))


def as_scipy_on_vectors(self: Any) -> LinearOperator:
    """A scipy.sparse.linalg.LinearOperator on vectors (n,), for an operator of shape (n, n) that acts on (..., n, k).

    Raises:
        TypeError, ValueError: the arrays are not NumPy's, or it is a batch of operators.
    """
    return linear_operator(self, [(self.shape[0], 1)], lambda Xs: (self @ Xs[0],))


def linear_operator(
    operator: object, shapes: Sequence[tuple[int, int]], apply: Callable[[tuple[Array, ...]], Iterable[Array]]
) -> LinearOperator:
    """`apply`, which takes a tuple of matrices (..., *shape), as an operator of SciPy on their stacked vecs."""
    return transfer.linear_operator(operator, list(leaves(operator)), shapes, apply)


def _mapped(f: Callable[[Any], Any], x: Any) -> Any:
    """`x` with f(array) in the place of every array, through the checks of each class."""
    parts = parts_of(x)
    if parts is None:
        return f(x) if transfer.is_array(x) else x
    items = [_mapped(f, y) for y in parts.values()]
    return tuple(items) if type(x) is tuple else type(x)(*items)
