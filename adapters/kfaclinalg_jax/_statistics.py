"""The statistics of one batch, over the draws of its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._moments import Rows, Shown, factors
from ._traced import Traced
from ._versions import varying


class Statistics(NamedTuple):
    """What a batch says of the curvature: a pytree, to be given to an optimizer as `statistics=`.

    `moments` are a `LayerFactors` by the name of each layer, A = E[a aᵀ] over all rows and G = Σ g gᵀ/N of N examples;
    `counted` are the numbers of the rows, and `rows` these, for the layers and structures that take more than moments.
    """

    moments: dict[str, Any]
    rows: dict[str, Rows]
    counted: dict[str, Any]


def statistics_of(
    traced: Traced, shown: Shown, keep: str, draws: int, back: Callable[[Any], tuple[Any, Any]], axis: str | None = None
) -> Statistics:
    """`back(draw)` are the gradients of the parameters and at the sites, of the sum of the examples' losses."""
    layers = traced.assembly.layers
    kept = [layer for layer in layers if keep == "rows" and layer.has_rows]

    def one(draw: Any) -> tuple[Any, Any]:
        slopes, g = back(draw)
        moments = {layer.name: shown.G(layer, slopes, g) for layer in layers}
        return moments, {layer.name: shown.outputs(layer, layer.uses[0], g) for layer in kept}

    if draws == 1:
        G, rows = one(0)
        rows = jax.tree.map(lambda g: g[None], rows)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0)[0])

        def step(total: Any, draw: Any) -> Any:
            moments, rows = one(draw)
            return jax.tree.map(jnp.add, total, moments), rows

        G, rows = jax.lax.scan(step, varying(zeros, axis), jnp.arange(draws))
    moments = {layer.name: factors(layer, shown.A(layer), [M / shown.N for M in G[layer.name]]) for layer in layers}
    inputs = {layer.name: shown.inputs(layer, layer.uses[0]) for layer in kept}
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    counted = {layer.name: jnp.asarray(float(devices * shown.rows(layer))) for layer in layers}
    return Statistics(moments, {name: Rows(a, rows[name]) for name, a in inputs.items()}, counted)
