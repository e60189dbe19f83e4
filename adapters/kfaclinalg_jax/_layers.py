"""What shares one inverse: the parameters of one matrix W, and the sites at which they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ._sites import Embedding, Scale, Site
from ._views import Part


@dataclass(frozen=True)
class Use:
    """The sites that see W the same way: more rows of one map. Where it is `turned` they see its transpose."""

    sites: tuple[Site, ...]
    turned: bool = False

    @property
    def is_table(self) -> bool:
        return isinstance(self.sites[0], Embedding)

    @property
    def has_bias(self) -> bool:
        return self.sites[0].bias is not None


@dataclass(frozen=True)
class Layer:
    """W (*stack, [batch], m, n) of parts that stand side by side along `axis`: a weight and its bias, for instance.

    The kinds: "linear" (and tables of an embedding, and what is tied), "scale" (factors and terms, a column for each
    entry) and "entries" (of which the diagonal is taken: the fallback).
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    stack: int  # how many of the first dimensions come from scans
    uses: tuple[Use, ...] = ()
    axis: int = -1

    @property
    def leaves(self) -> tuple[int, ...]:
        return tuple(part.leaf for part in self.parts)

    def matrix(self, leaves: Any) -> Any:
        """W, of the parameters or of what is shaped like them."""
        columns = [part.of(leaves[part.leaf]) for part in self.parts]
        return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=self.axis)

    def back(self, W: Any, shapes: Any) -> dict[int, Any]:
        """The inverse of `matrix`: what belongs to each parameter."""
        found, start = {}, 0
        for part, last in zip(self.parts, self._ends(W), strict=True):
            index = [slice(None)] * W.ndim
            index[self.axis] = slice(start, last)
            found[part.leaf] = part.back(W[tuple(index)], shapes[part.leaf])
            start = last
        return found

    def _ends(self, W: Any) -> tuple[int, ...]:
        """Where each part ends: all but the first are one wide."""
        n, k = W.shape[self.axis], len(self.parts)
        return tuple(n - k + 1 + i for i in range(k))

    @property
    def has_rows(self) -> bool:
        """Whether the gradient of each example is a sum of products of what its sites show."""
        alone = self.kind == "linear" and len(self.uses) == 1 and not self.uses[0].is_table
        return alone and all(site.example is not None for site in self.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for use in self.uses for site in use.sites)


def entries(name: str, leaf: int, size: int) -> Layer:
    """The layer of a parameter that no rule knows."""
    return Layer(name, "entries", (Part(leaf, (("reshape", (size, 1)),)),), (size, 1), 0)


def scale(name: str, uses: Sequence[Sequence[Site]]) -> Layer:
    """The factors and terms of the same entries, (*stack, entries, 2, 1): one use for each parameter."""
    site = uses[0][0]
    *batch, _, _ = site.matrix
    parts = tuple(sites[0].weight for sites in uses)
    found = tuple(Use(tuple(sites)) for sites in uses)
    stack = sum(loop.slices for loop in site.loops)
    return Layer(name, "scale", parts, (*batch, len(uses), 1), stack, found, axis=-2)


def linear(name: str, uses: Sequence[Use]) -> Layer:
    """A weight, with its bias where it has one."""
    site = uses[0].sites[0]
    *batch, m, n = site.matrix
    parts = (site.weight,) if site.bias is None else (site.weight, site.bias)
    stack = sum(loop.slices for loop in site.loops)
    return Layer(name, "linear", parts, (*batch, m, n + len(parts) - 1), stack, tuple(uses))


def is_scale(site: Site) -> bool:
    return isinstance(site, Scale)
