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
        """∇W (layers, *stack, [batch], m, n), in the factors' dtype."""
        by_leaf = {i: leaves[names[i]] for layer in self.layers for i in layer.leaves}
        dtype = jax.tree.leaves(self.moments)[0].dtype
        return jnp.stack([layer.matrix(by_leaf).astype(dtype) for layer in self.layers])

    def back(self, U: Any, names: Sequence[str], like: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of W by the names of the parameters, in their dtypes."""
        found: dict[str, Any] = {}
        for layer, W in zip(self.layers, U, strict=True):
            shapes = {i: like[names[i]].shape for i in layer.leaves}
            parts = layer.back(W, shapes)
            found |= {names[i]: part.astype(like[names[i]].dtype) for i, part in parts.items()}
        return found

    def zeros(self) -> LayerFactors:
        return jax.tree.map(lambda M: jnp.zeros((len(self.layers), *M.shape), M.dtype), self.moments)


def grouped(layers: Sequence[Layer], moments: Mapping[str, LayerFactors]) -> list[Group]:
    """In the order of their first layers."""
    found: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        sides = jax.tree.map(lambda M: (M.shape, str(M.dtype)), moments[layer.name])
        key = (layer.shape, layer.stack, jax.tree.structure(moments[layer.name]), str(sides))
        found.setdefault(key, []).append(i)
    return [
        Group(tuple(layers[i] for i in places), tuple(places), moments[layers[places[0]].name])
        for places in found.values()
    ]
