"""Layers whose W and factors have the same shapes, one array for all of them: what is compiled follows the shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kfaclinalg import LayerFactors

from ._layers import Layer


@dataclass(frozen=True)
class Group:
    """The layers of one kind, in order; `place` is where each stands among all."""

    layers: tuple[Layer, ...]
    places: tuple[int, ...]
    moments: LayerFactors  # their shapes, for one layer

    def stacked(self, of: Mapping[str, Any]) -> Any:
        """What there is by the layers' names, one array (layers, ...) for each."""
        return jax.tree.map(lambda *xs: jnp.stack(xs), *(of[layer.name] for layer in self.layers))

    def gradients(self, leaves: Mapping[str, Any], names: Sequence[str]) -> Any:
        """∇W (layers, *stack, [batch], m, n), in the factors' dtype: equations for the group, not for each layer."""
        first, dtype = self.layers[0], jax.tree.leaves(self.moments)[0].dtype
        columns = zip(*([leaves[names[i]] for i in layer.leaves] for layer in self.layers), strict=True)
        stacked = dict(zip(first.leaves, (jnp.stack(column).astype(dtype) for column in columns), strict=True))
        return jax.vmap(first.matrix)(stacked)

    def back(self, U: Any, names: Sequence[str], like: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of W by the names of the parameters, in their dtypes."""
        first = self.layers[0]
        shapes = {i: like[names[i]].shape for i in first.leaves}
        parts = jax.vmap(lambda W: first.back(W, shapes))(U)
        found: dict[str, Any] = {}
        for j, i in enumerate(first.leaves):
            members = jnp.unstack(parts[i].astype(like[names[i]].dtype))
            found |= {names[layer.leaves[j]]: part for layer, part in zip(self.layers, members, strict=True)}
        return found

    def zeros(self) -> LayerFactors:
        return jax.tree.map(lambda M: jnp.zeros((len(self.layers), *M.shape), M.dtype), self.moments)


def grouped(layers: Sequence[Layer], moments: Mapping[str, LayerFactors], leaves: Sequence[Any]) -> list[Group]:
    """In the order of their first layers; `leaves` are the shapes of the parameters."""
    found: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        sides = jax.tree.map(lambda M: (M.shape, str(M.dtype)), moments[layer.name])
        parts = tuple((part.ops, leaves[part.leaf].shape, str(leaves[part.leaf].dtype)) for part in layer.parts)
        key = (layer.shape, layer.stack, parts, jax.tree.structure(moments[layer.name]), str(sides))
        found.setdefault(key, []).append(i)
    return [
        Group(tuple(layers[i] for i in places), tuple(places), moments[layers[places[0]].name])
        for places in found.values()
    ]
