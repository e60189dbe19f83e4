"""What makes an operator a value that travels: between processes, and through the transformations of JAX and torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from ._backends import pytrees
from ._backends.transfer import dtype_name

T = TypeVar("T")
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


def _has_placeholders(x: Any) -> bool:
    """Whether a framework is rebuilding it, with something else in the place of its arrays."""
    while name := _first_field.get(type(x)):
        x = getattr(x, name)
    return pytrees.is_placeholder(x)


def _description(self: object) -> str:
    """`Kronecker(A: (3, 3), B: (4, 4), float64, cpu)`; what is not an array is shown by its type."""
    arrays = [x for x in leaves(self) if isinstance(getattr(x, "shape", None), tuple)]
    common = [dtype_name(x.dtype) for x in arrays] + [str(x.device) for x in arrays if getattr(x, "device", None)]
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
