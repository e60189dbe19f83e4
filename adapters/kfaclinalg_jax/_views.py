"""A parameter on its way to the equation that uses it: transposed, reshaped, sliced by a scan, broadcast, cast."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

Op = tuple[str, tuple[int, ...]]  # ("transpose", axes), ("reshape", shape) or ("flip", axes)


class Part(NamedTuple):
    """What a layer's matrix W holds of one parameter: a rearrangement of its entries."""

    leaf: int
    ops: tuple[Op, ...]

    def of(self, x: Any) -> Any:
        """Its part of W (..., m, n), of the parameter or of what is shaped like it."""
        for name, argument in self.ops:
            x = _flipped(x, argument) if name == "flip" else getattr(x, name)(argument)
        return x

    def back(self, W: Any, shape: Sequence[int]) -> Any:
        """The inverse of `of`, for a parameter of this shape."""
        shapes = [tuple(shape)]
        for name, argument in self.ops:
            last = shapes[-1]
            after = {"reshape": argument, "flip": last}
            shapes.append(after[name] if name in after else tuple(last[i] for i in argument))
        for (name, argument), before in zip(self.ops[::-1], shapes[-2::-1], strict=True):
            if name == "flip":
                W = _flipped(W, argument)
            else:
                W = W.reshape(before) if name == "reshape" else W.transpose(_inverse(argument))
        return W


class View(NamedTuple):
    """A variable that holds a parameter's entries: its `core`, all axes longer than 1, stands at `places` of its shape.

    The core is what `ops` make of the parameter. Before its own axes it has those of the scans that slice it, `stack`.
    The other axes of the variable are of length 1, or broadcast.
    """

    leaf: int
    ops: tuple[Op, ...]
    stack: tuple[int, ...]
    levels: tuple[int, ...]  # which of the scans around the variable they are, the outermost being 0
    shape: tuple[int, ...]  # of the variable
    places: tuple[int, ...]
    factor: Any = None  # the path of an equation that has multiplied it by numbers that no example enters

    @classmethod
    def whole(cls, leaf: int, shape: tuple[int, ...]) -> View:
        places = tuple(i for i, n in enumerate(shape) if n != 1)
        return cls(leaf, (("reshape", tuple(shape[i] for i in places)),), (), (), shape, places)

    @property
    def core(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.places)

    @property
    def is_broadcast(self) -> bool:
        return prod(self.core) != prod(self.shape)

    def transposed(self, axes: Sequence[int]) -> View | None:
        """None where it was multiplied by what stays as it is."""
        places = [axes.index(i) for i in self.places]
        order = sorted(range(len(places)), key=places.__getitem__)
        if self.factor and places != sorted(places):
            return None
        k = len(self.stack)
        turn: Op = ("transpose", (*range(k), *(k + i for i in order)))
        shape = tuple(self.shape[i] for i in axes)
        return self._replace(ops=(*self.ops, turn), shape=shape, places=tuple(sorted(places)))

    def flipped(self, axes: Sequence[int]) -> View | None:
        """None where it was multiplied by what stays as it is."""
        found = tuple(len(self.stack) + i for i, place in enumerate(self.places) if place in axes)
        return None if self.factor else self._replace(ops=(*self.ops, ("flip", found)))

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """None where what is broadcast would mix with what is not."""
        if not self.is_broadcast:
            places = tuple(i for i, n in enumerate(shape) if n != 1)
            whole: Op = ("reshape", (*self.stack, *(shape[i] for i in places)))
            return self._replace(ops=(*self.ops, whole), shape=shape, places=places)
        before, after = ([(i, n) for i, n in enumerate(s) if n != 1] for s in (self.shape, shape))
        if [n for _, n in before] != [n for _, n in after]:
            return None
        moved = {i: j for (i, _), (j, _) in zip(before, after, strict=True)}
        return self._replace(shape=shape, places=tuple(moved[i] for i in self.places))

    def broadcast(self, shape: tuple[int, ...], along: Sequence[int]) -> View:
        return self._replace(shape=shape, places=tuple(along[i] for i in self.places))

    def sliced(self, level: int) -> View | None:
        """One step of a scan over its first axis; None where that is broadcast, or multiplied."""
        L, rest = self.shape[0], self.shape[1:]
        if self.factor:
            return None
        if L == 1:
            one: Op = ("reshape", (*self.stack, 1, *self.core))
            moved = self._replace(ops=(*self.ops, one))
        elif self.places[:1] == (0,):
            moved = self._replace(places=self.places[1:])
        else:
            return None
        places = tuple(i - 1 for i in moved.places)
        return moved._replace(stack=(*self.stack, L), levels=(*self.levels, level), shape=rest, places=places)

    def part(self, *groups: Sequence[int]) -> Part:
        """(*stack, *groups): the axes of each group of the variable's as one."""
        k = len(self.stack)
        order = [i for group in groups for i in group]
        axes = (*range(k), *(k + i for i in order))
        sizes = (prod(self.shape[i] for i in group) for group in groups)
        return Part(
            self.leaf,
            (
                *self.ops,
                ("reshape", (*self.stack, *(n if i in self.places else 1 for i, n in enumerate(self.shape)))),
                ("transpose", (*axes, *(k + i for i in range(len(self.shape)) if i not in order))),
                ("reshape", (*self.stack, *sizes)),
            ),
        )


def _flipped(x: Any, axes: Sequence[int]) -> Any:
    return x[tuple(slice(None, None, -1 if i in axes else 1) for i in range(x.ndim))]


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))
