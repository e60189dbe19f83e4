"""The equations at which a parameter meets what it acts on: what goes in there, and the gradient at what comes out.

A site turns both into rows (*stack, N, R, ...): the scans that slice the parameter, N examples of R positions each. The
matrices of a batch, such as the groups of a convolution, come after the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._views import Part

Axes = tuple[int, ...]


class Loop(NamedTuple):
    """A scan around an equation: whether it slices the parameter, or makes more rows of it."""

    length: int
    slices: bool


class Groups(NamedTuple):
    """Which axes of an array count matrices of a batch, rows (the examples among them), and entries of a row."""

    batch: Axes
    rows: Axes
    features: Axes

    def arranged(self, x: Any, loops: tuple[Loop, ...], example: int | None, N: int) -> Any:
        """(*stack, [batch], N, R, features) of x, whose first axes are the loops; N is 1 where no axis is known."""
        k = len(loops)
        stack = [i for i, loop in enumerate(loops) if loop.slices]
        times = [i for i, loop in enumerate(loops) if not loop.slices]
        batch, rows, features = ([k + i for i in axes] for axes in self)
        known = [] if example is None else [rows[example]]
        order = [*stack, *batch, *known, *times, *(i for i in rows if i not in known), *features]
        sizes = [x.shape[i] for i in stack] + ([prod(x.shape[i] for i in batch)] if batch else [])
        total, width = prod(x.shape[i] for i in [*times, *rows]), prod(x.shape[i] for i in features)
        count = 1 if example is None else N
        return x.transpose(order).reshape(*sizes, count, total // count, width)


@dataclass(frozen=True)
class Site:
    """A linear map s = W a of rows; `example` says which of the axes of the rows counts the examples."""

    path: tuple[int, ...]  # of equations, the outermost first
    place: str  # the primitive and the line of the source
    loops: tuple[Loop, ...]
    shape: tuple[int, ...]  # of the output
    dtype: Any
    eps: float  # of the least precise of what goes in and comes out
    operand: int  # which operand of the equation is what the parameter acts on
    weight: Part
    matrix: tuple[int, ...]  # (*stack, [batch], m, n) of the weight
    x: Groups  # of that operand
    s: Groups  # of the output
    bias: Part | None = None
    bias_at: tuple[int, ...] | None = None  # the path of the equation that adds it
    example: int | None = None
    source: tuple[int, ...] | None = None  # where what the parameter acts on is seen, if not here

    @property
    def labels(self) -> Axes:
        """The axes of the output that count entries of a bias, in their order in W."""
        return (*self.s.batch, *self.s.features)

    @property
    def probe(self) -> tuple[int, ...]:
        """The shape of all that comes out, over the scans."""
        return (*(loop.length for loop in self.loops), *self.shape)

    def seen_at(self, axis: int | None) -> Site:
        """The same, with this axis of the output counting the examples."""
        rows = self.s.rows
        return replace(self, example=rows.index(axis) if axis in rows else None)

    def inputs(self, x: Any, N: int) -> Any:
        """a (*stack, [batch], N, R, n)."""
        return self.x.arranged(x, self.loops, self.example, N)

    def outputs(self, s: Any, N: int) -> Any:
        """g (*stack, [batch], N, R, m)."""
        return self.s.arranged(s, self.loops, self.example, N)


@dataclass(frozen=True)
class Dense(Site):
    """`dot_general`."""


@dataclass(frozen=True)
class Convolution(Site):
    """`conv_general_dilated`: the rows are patches. `x` and `s` are the groups of (N, groups, features, ...)."""

    options: Any = None  # of the patches
    lhs: Axes = ()  # N, channels, space: which axes of the operand
    out: Axes = ()
    groups: int = 1

    def inputs(self, x: Any, N: int) -> Any:
        def patches(x: Any) -> Any:
            found = jax.lax.conv_general_dilated_patches(x.transpose(self.lhs), **self.options)
            return found.reshape(len(found), self.groups, -1, *found.shape[2:])

        for _ in self.loops:
            patches = jax.vmap(patches)
        return self.x.arranged(patches(x), self.loops, self.example, N)

    def outputs(self, s: Any, N: int) -> Any:
        k = len(self.loops)
        s = s.transpose(*range(k), *(k + i for i in self.out))
        s = s.reshape(*s.shape[: k + 1], self.groups, -1, *s.shape[k + 2 :])
        return self.s.arranged(s, self.loops, self.example, N)

    @property
    def labels(self) -> Axes:
        return (self.out[1],)

    def seen_at(self, axis: int | None) -> Site:
        return replace(self, example=0 if axis == self.out[0] else None)


@dataclass(frozen=True)
class Embedding(Site):
    """`gather` of rows: a linear map of one-hot rows, of which the index is kept."""

    column: int = 0  # of the index
    last: int | None = None  # the row that an index beyond the table stands for, if it stands for one

    def inputs(self, x: Any, N: int) -> Any:
        """The indices (*stack, N, R, 1)."""
        x = x[..., self.column : self.column + 1]
        return super().inputs(x if self.last is None else x.clip(0, self.last), N)


@dataclass(frozen=True)
class Scale(Site):
    """`mul` by a parameter that is broadcast over the rows, or `add` of one: then nothing goes in, and a is 1.

    What a parameter acts on is one number for each of its entries: the features of `x` and `s` are the parameter's.
    """

    owner: tuple[int, ...] | None = None  # of a shift, the path of the scale whose outputs it shifts
    factor: tuple[int, ...] | None = None  # where the parameter was multiplied by the same numbers for all examples

    def slopes(self, seen: Mapping[Any, Any], s: Any, N: int) -> Any:
        """The gradient of each example (*stack, N, entries), in the dtype of s."""
        x = seen[self.path].astype(s.dtype) if self.operand >= 0 else 1.0
        slopes = self.outputs(s * x, N).sum(-2)
        return slopes if self.factor is None else slopes * seen[self.factor].astype(s.dtype).reshape(-1)


def wide(x: Any) -> Any:
    """Half precision widened to float32; what is no real number stays as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def times(c: Any, g: Any) -> Any:
    """c g; what is no real number has no gradient g, and float0 says so."""
    return g if g.dtype == jax.dtypes.float0 else c * g


def cast(g: Any, z: Any) -> Any:
    """A gradient at z in the dtype of z."""
    return g if g.dtype == jax.dtypes.float0 else g.astype(z.dtype)
