"""The second moments of a batch, from what the sites have shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfaclinalg
from kfaclinalg import Diagonal, LayerFactors

from ._layers import Layer, Use

LARGEST = 8192  # a side longer than this keeps the diagonal of its moment


class Rows(NamedTuple):
    """Those of one layer: for each site a (*stack, [batch], N, R, n), and g (draws, *stack, [batch], N, R, m)."""

    a: Any
    g: Any


class Shown(NamedTuple):
    """What was seen at the sites, for N examples, and the dtype of the factors by the layer's name.

    A layer that is `reduced` shows one row for each example: the mean of a over its positions, and the sum of g.
    """

    seen: Mapping[Any, Any]
    N: int
    dtypes: Mapping[str, Any]
    reduced: frozenset[str] = frozenset()

    @classmethod
    def of(cls, traced: Any, seen: Mapping[Any, Any]) -> Shown:
        return cls(seen, traced.N, traced.dtypes)

    def inputs(self, layer: Layer, use: Use) -> list[Any]:
        """a of each site of a use, a one last where there is a bias; indices of a table."""
        found = [site.inputs(self.seen[site.source or site.path], self.N) for site in use.sites]
        if use.is_table:
            return found
        found = [a.astype(self.dtypes[layer.name]) for a in found]
        found = [jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1) if use.has_bias else a for a in found]
        if layer.name not in self.reduced:
            return found
        return [sum(a.sum(-2, keepdims=True) for a in found) / sum(a.shape[-2] for a in found)]

    def outputs(self, layer: Layer, use: Use, g: Mapping[Any, Any]) -> list[Any]:
        """g of each site of a use."""
        found = [site.outputs(g[site.path], self.N).astype(self.dtypes[layer.name]) for site in use.sites]
        return [sum(g.sum(-2, keepdims=True) for g in found)] if layer.name in self.reduced else found

    def slopes(self, layer: Layer, g: Mapping[Any, Any]) -> Any:
        """The gradient of each example with respect to scale and shift (*stack, N, entries, 1 or 2)."""
        dtype = self.dtypes[layer.name]
        columns = []
        for use in layer.uses:
            terms = []
            for site in use.sites:
                terms.append(site.slopes(self.seen, g[site.path].astype(dtype), self.N))  # type: ignore[attr-defined]
            columns.append(sum(terms[1:], terms[0]))
        return jnp.stack(columns, axis=-1)

    def rows(self, layer: Layer) -> int:
        """How many A is the mean of, of all uses."""
        if layer.kind != "linear":
            return self.N
        shapes = jax.eval_shape(lambda: [a for use in layer.uses for a in self.inputs(layer, use)])
        return sum(prod(a.shape[-3:-1]) for a in shapes)

    def A(self, layer: Layer) -> list[Any]:
        """E[a aᵀ] over all rows of each use."""
        if layer.kind == "linear":
            return [self._input_moment(layer, use) for use in layer.uses]
        if layer.kind == "scale":
            return [jnp.ones((*layer.shape[:-2], 1, 1), self.dtypes[layer.name])]
        return [jnp.ones((1, 1), self.dtypes[layer.name])]

    def G(self, layer: Layer, slopes: Sequence[Any], g: Mapping[Any, Any]) -> list[Any]:
        """Σ g gᵀ over all rows of each use; `slopes` are the gradients of the parameters."""
        if layer.kind == "linear":
            return [sum(map(_summed, self.outputs(layer, use, g))) for use in layer.uses]
        if layer.kind == "scale":
            return [_summed(jnp.moveaxis(self.slopes(layer, g), -2, layer.stack)[..., None, :, :])]
        return [jnp.square(slopes[layer.leaves[0]].astype(self.dtypes[layer.name])).reshape(-1)]

    def _input_moment(self, layer: Layer, use: Use) -> Any:
        inputs = self.inputs(layer, use)
        rows = sum(prod(a.shape[-3:-1]) for a in inputs)
        if use.is_table:
            alone = layer.name in self.reduced
            n, stack = layer.shape[-2 if use.turned else -1], layer.stack + alone
            counted: Any = sum(_counts(a, n, stack) for a in inputs)
            counted = counted.astype(self.dtypes[layer.name]) / (rows // self.N if alone else rows)
            return jnp.square(counted).mean(-2) if alone else counted
        return sum(map(_summed, inputs)) / rows


def factors(layer: Layer, A: Sequence[Any], G: Sequence[Any]) -> LayerFactors:
    """Those of a layer, of A = E[a aᵀ] and G = E[g gᵀ] of each of its uses."""
    sides = [LayerFactors(_side(a, layer), _side(g, layer)) for a, g in zip(A, G, strict=True)]
    if layer.kind == "linear":
        turns = [use.turned for use in layer.uses]
        sides = [LayerFactors(M.G, M.A) if turned else M for M, turned in zip(sides, turns, strict=True)]
    return _combined(sides)


def _combined(sides: Sequence[LayerFactors]) -> LayerFactors:
    """The A ⊗ G with the partial traces of Σ A_i ⊗ G_i: exact for one use, and for proportional ones.

    A = Σ tr(G_i) A_i / Σ tr(A_i) tr(G_i) and G = Σ tr(A_i) G_i.
    """
    if len(sides) == 1:
        return sides[0]
    traces = [(_trace(A), _trace(G)) for A, G in sides]
    total = sum(a * g for a, g in traces)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    A = _sum([(g / total, layer.A) for (_, g), layer in zip(traces, sides, strict=True)])
    return LayerFactors(A, _sum([(a, layer.G) for (a, _), layer in zip(traces, sides, strict=True)]))


def _sum(terms: Sequence[tuple[Any, Any]]) -> Any:
    """Σ c M; the diagonal of it where one of them is a `Diagonal`."""
    if any(isinstance(M, Diagonal) for _, M in terms):
        return Diagonal(sum(c[..., None] * _diagonal(M) for c, M in terms))
    return sum(c[..., None, None] * M for c, M in terms)


def _trace(M: Any) -> Any:
    return _diagonal(M).sum(-1)


def _diagonal(M: Any) -> Any:
    return M.d if isinstance(M, Diagonal) else jnp.diagonal(M, axis1=-2, axis2=-1)


def _side(M: Any, layer: Layer) -> Any:
    """A vector stands for a diagonal."""
    batch = len(layer.shape) - 2
    return Diagonal(M) if M.ndim == batch + 1 else M


def _summed(x: Any) -> Any:
    """Σ x xᵀ over the rows of x (..., N, R, d), exactly symmetric; its diagonal where d is large."""
    x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    if x.shape[-1] > LARGEST and x.ndim == 2:
        return jnp.square(x).sum(0)
    return kfaclinalg.second_moment(x) * x.shape[-2]


def _counts(indices: Any, n: int, stack: int) -> Any:
    """How often each index came (*stack, n)."""
    rows = indices.reshape(prod(indices.shape[:stack]), -1)
    counts = jnp.zeros((len(rows), n), jnp.int32).at[jnp.arange(len(rows))[:, None], rows].add(1)
    return counts.reshape(*indices.shape[:stack], n)
