"""What makes an operator a value that travels: between processes and dtypes, devices and namespaces, through the
transformations of JAX and torch, and to SciPy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar, dataclass_transform

from . import _backends
from ._backends import Array, Device, DType, Namespace, pytrees, transfer

T = TypeVar("T")
LinearOperator: TypeAlias = Any  # scipy.sparse.linalg's
_first_field: dict[type, str] = {}


@dataclass_transform(eq_default=False, frozen_default=True)
def value(cls: type[T], /) -> type[T]:
    """A frozen dataclass with slots whose fields are arrays, other values, or tuples of these. Equality is identity.

    Its repr shows shapes, dtype and device, and reads no entry; `numpy_array @ it` is a TypeError; it can be pickled
    and copied. It is a pytree of JAX and of torch, which rebuild it without
    `__post_init__`, whatever its leaves are then. A framework that is imported later learns of all the classes when the
    next instance is made.

    >>> import numpy as np
    >>> @value
    ... class Scaling:
    ...     d: Any
    >>> Scaling(np.ones(3))
    Scaling(d: (3,), float64, cpu)
    """
    check = cls.__dict__.get("__post_init__")

    def __post_init__(self: T) -> None:
        pytrees.register_pending()
        if check is not None and not _has_placeholders(self):
            check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = dataclass(frozen=True, eq=False, repr=False, slots=True)(cls)
    for name, attribute in (("__repr__", _description), ("__setstate__", _restore), ("__array_ufunc__", None)):
        setattr(made, name, attribute)
    _first_field[made] = made.__match_args__[0]  # type: ignore[attr-defined]
    pytrees.register(made, rebuilt)
    return made


class Value:
    """The base of the operators: what can be converted to another dtype, device or namespace."""

    __slots__ = ()

    def astype(self, dtype: DType, /) -> Self:
        """The same operator with every array in `dtype`: float32 or float64 of its namespace.

        Raises:
            TypeError: any other dtype; float64 in JAX without x64.
        """
        return _mapped(partial(transfer.with_dtype, dtype=dtype), self)

    def to_device(self, device: Device, /) -> Self:
        """The same operator with every array on `device`, as its namespace calls it: "cuda:1" in torch."""
        return _mapped(partial(transfer.on_device, device=device), self)

    def to_namespace(self, xp: Namespace, /, *, device: Device | None = None) -> Self:
        """The same operator in arrays of `xp` (numpy, torch, jax.numpy, cupy, ...), on their device or on `device`.

        The arrays are copied, by DLPack where both sides can: what is later written to one side does not show on the
        other.

        Raises:
            TypeError: `xp` is no array namespace, or does not keep the dtype (JAX does not keep float64 without x64).
            ValueError: `xp` has no arrays where these are, and `device` does not say where they should go.
        """
        if not hasattr(xp, "from_dlpack"):
            raise TypeError(f"xp is {xp!r}, expected an array namespace such as numpy, torch or jax.numpy")
        return _mapped(partial(transfer.in_namespace, xp=xp, device=device), self)


def leaves(x: Any) -> Iterator[Any]:
    """What a value holds, through all that it is made of."""
    parts = parts_of(x)
    if parts is None:
        yield x
    else:
        for y in parts.values():
            yield from leaves(y)


def parts_of(x: Any) -> dict[str, Any] | None:
    """The fields of a value or a NamedTuple, the items of a tuple; None for anything else, which is a leaf."""
    if type(x) is tuple:
        return {str(i): y for i, y in enumerate(x)}
    names = getattr(type(x), "__match_args__", None) if isinstance(x, tuple) or is_dataclass(x) else None
    return None if names is None else {name: getattr(x, name) for name in names}


def chosen(condition: Any, one: Callable[[], T], other: Callable[[], T]) -> T:
    """What one of two functions makes: of a Python condition that one alone, of a 0-d array the entries of both."""
    if isinstance(condition, bool):
        return one() if condition else other()
    return where(condition, one(), other())


def where(condition: Any, x: Any, y: Any) -> Any:
    """Each entry of x where the condition, a 0-d array, holds, else of y, which is of one structure with it or None."""
    if x is y or y is None:
        return x
    one, other = parts_of(x), parts_of(y)
    if one is None or other is None:
        return _backends.where(condition, x, y)
    items = [where(condition, one[name], other[name]) for name in one]
    return tuple(items) if type(x) is tuple else type(x)(*items)


def _has_placeholders(x: Any) -> bool:
    """Whether a framework is rebuilding it, with something else in the place of its arrays."""
    while name := _first_field.get(type(x)):
        x = getattr(x, name)
    return pytrees.is_placeholder(x)


def _description(self: object) -> str:
    """`Kronecker(A: (3, 3), B: (4, 4), float64, cpu)`; what is not an array is shown by its type."""
    arrays = [x for x in leaves(self) if isinstance(getattr(x, "shape", None), tuple)]
    common = [transfer.dtype_name(x.dtype) for x in arrays] + [
        str(x.device) for x in arrays if getattr(x, "device", None)
    ]
    return ", ".join([_outline(self)[:-1], *dict.fromkeys(common)]) + ")"


def _outline(x: Any) -> str:
    parts = parts_of(x)
    if parts is None:
        shape = getattr(x, "shape", None)
        return str(tuple(shape)) if isinstance(shape, tuple) else type(x).__name__
    if type(x) is tuple:
        shown = [_outline(y) for y in x[:3]]
        return f"({', '.join(shown if len(x) <= 3 else [*shown, f'... {len(x) - 3} more'])})"
    return f"{type(x).__name__}({', '.join(f'{name}: {_outline(y)}' for name, y in parts.items())})"


def _restore(self: Any, values: Iterable[Any]) -> None:
    """Fill the fields without checks: the values may be tracers, axes or None."""
    pytrees.register_pending()
    for name, x in zip(type(self).__match_args__, values, strict=True):
        object.__setattr__(self, name, x)


def rebuilt(cls: type[T], values: Iterable[Any]) -> T:
    """A value of fields that need no checks."""
    self = object.__new__(cls)
    _restore(self, values)
    return self


def as_scipy_on_matrices(self: Any) -> LinearOperator:
    """A scipy.sparse.linalg.LinearOperator on vec(V), the columns of V stacked, for cg, lsqr, eigsh and the like.

    It is its own adjoint, for a symmetric operator.

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


def gram_of_columns(self: Any, X: Array, Y: Array, /) -> Array:
    """Xᵀ M Y (..., p, q) for X (..., n, p) and Y (..., n, q). The flops of `@`, and 2 n p q."""
    left, right = (self._operand(Z, (self.shape[0], k)) for Z, k in ((X, "p"), (Y, "q")))
    return _backends.narrowed(_backends.product(left.mT, self.apply(right)), Y.dtype)


def linear_operator(
    operator: object, shapes: Sequence[tuple[int, ...]], apply: Callable[[tuple[Array, ...]], Iterable[Array]]
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
