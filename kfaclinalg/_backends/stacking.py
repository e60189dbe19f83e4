"""One routine for many layers: equal shapes in one call where each shape costs a compilation, or each call a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from .._typing import Array
from .door import backend_of, namespace_of
from .transfer import is_array

Row: TypeAlias = tuple[Any, ...]
Results: TypeAlias = Any  # an array, or a tuple of arrays


def each(f: Callable[..., Results], *columns: Iterable[Any]) -> list[Results]:
    """[f(x, y, ...) for x, y, ... in zip(*columns)], where f of a batch is the batch of what f is of its members.

    What is not stacked is taken from the columns, and let go, one after the other.
    """
    made: dict[int, Results] = {}
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        if all(is_array(x) and _stacks(x) for x in row):
            groups.setdefault(tuple((tuple(x.shape), str(x.dtype)) for x in row), {})[i] = row
        else:
            made[i] = f(*row)
    for rows in groups.values():
        made |= zip(rows, _at_once(f, list(rows.values())), strict=True)
    return [made[i] for i in range(len(made))]


def _stacks(x: Array) -> bool:
    b = backend_of(x)
    return b.kind in ("jax", "cupy") or (b.kind == "torch" and b.device.type == "cuda")


def _at_once(f: Callable[..., Results], rows: list[Row]) -> list[Results]:
    if len(rows) == 1:
        return [f(*rows[0])]
    xp = namespace_of(rows[0][0])
    results = f(*(xp.stack(column) for column in zip(*rows, strict=True)))
    if isinstance(results, tuple):
        return list(zip(*(xp.unstack(x) for x in results), strict=True))
    return list(xp.unstack(results))
