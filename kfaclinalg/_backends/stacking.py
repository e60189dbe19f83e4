"""One routine for many layers: equal shapes in one call where each shape costs a compilation, or each call a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from .._typing import Array
from .door import backend_of, namespace_of
from .transfer import is_array

Row: TypeAlias = tuple[Any, ...]
Results: TypeAlias = Any  # an array, or a tuple of arrays


def each(f: Callable[..., Results], rows: Iterable[Row]) -> list[Results]:
    """[f(x, y, ...) for x, y, ... in rows], where f of a batch is the batch of what f is of its members.

    Numbers are the same for a whole batch. What is not stacked is taken from the rows, and let go, one after the other.
    """
    made: dict[int, Results] = {}
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for i, row in enumerate(rows):
        if all(isinstance(x, float) or (is_array(x) and _stacks(x)) for x in row):
            groups.setdefault(tuple(map(_shape, row)), {})[i] = row
        else:
            made[i] = f(*row)
    for alike in groups.values():
        made |= zip(alike, _at_once(f, list(alike.values())), strict=True)
    return [made[i] for i in range(len(made))]


def _shape(x: Any) -> Any:
    return x if isinstance(x, float) else (tuple(x.shape), str(x.dtype))


def _stacks(x: Array) -> bool:
    b = backend_of(x)
    return b.kind in ("jax", "cupy") or (b.kind == "torch" and b.device.type == "cuda")


def _at_once(f: Callable[..., Results], rows: list[Row]) -> list[Results]:
    if len(rows) == 1:
        return [f(*rows[0])]
    xp = namespace_of(rows[0][0])
    results = f(*(x[0] if isinstance(x[0], float) else xp.stack(x) for x in zip(*rows, strict=True)))
    if isinstance(results, tuple):
        return list(zip(*(xp.unstack(x) for x in results), strict=True))
    return list(xp.unstack(results))
