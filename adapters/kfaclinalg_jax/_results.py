"""The output of a site on its way to the bias that is added to it, or to the shift of what it scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _versions as versions

Path = tuple[int, ...]


class Result(NamedTuple):
    """The output of a site on its way: which axis of the variable is which axis of that output.

    None stands for axes that hold rows.
    """

    site: Path
    axes: tuple[int | None, ...]
    alone: bool = True  # whether nothing else has used it


def passed(eqn: Any, result: Any) -> Any:
    """The output of a site behind an equation that only rearranges it, or that multiplies it."""
    if not eqn.outvars:  # printed
        return None
    before, after = (tuple(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0]))
    old, p, new = result.axes, eqn.params, None
    match eqn.primitive.name:
        case "transpose":
            new = [old[i] for i in p["permutation"]]
        case "squeeze":
            new = [axis for i, axis in enumerate(old) if i not in p["dimensions"]]
        case "broadcast_in_dim":
            along = p["broadcast_dimensions"]
            new = [old[along.index(i)] if i in along else None for i in range(len(after))]
        case "reshape" if p["dimensions"] is None:
            new = _reshaped(old, before, after)
        case "mul" if len(old) == len(after):
            return result._replace(alone=False)
        case name if name in versions.SAME and len(eqn.outvars) == 1:
            return result
    return None if new is None or len(new) != len(after) else result._replace(axes=tuple(new))


def _reshaped(axes: Sequence[int | None], before: tuple[int, ...], after: tuple[int, ...]) -> list[int | None] | None:
    """Where the axes that count stand in what the reshape leaves alone, at the end or at the beginning."""
    pairs = list(zip(before, after, strict=False))
    first = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
    ends = list(zip(before[::-1], after[::-1], strict=False))
    last = next((i for i, (x, y) in enumerate(ends) if x != y), len(ends))
    new: list[int | None] = [None] * len(after)
    for i, axis in enumerate(axes):
        if axis is None or before[i] == 1:
            continue
        if i >= len(before) - last:
            new[i + len(after) - len(before)] = axis
        elif i < first:
            new[i] = axis
        else:
            return None
    return new
