"""The gradient of W as the sum of products of what a site has shown: the identity that K-FAC stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._layers import Layer, Use
from ._moments import Shown


def gradient_of_rows(shown: Shown, layer: Layer, g: Mapping[Any, Any]) -> Any:
    """Σ g aᵀ (*stack, [batch], m, n) over all examples and positions."""
    if layer.kind == "scale":
        return shown.slopes(layer, g).sum(layer.stack)[..., None]
    terms = [_of_use(shown, layer, use, g) for use in layer.uses]
    return sum(terms[1:], terms[0])


def relative_errors(
    f: Callable[..., Any], select: Callable[[Any], Any], traced: Any, params: Any, inputs: Any
) -> dict[str, Any]:
    """Of each layer's Σ g aᵀ, for a random cotangent of the outputs, `select` of what f returns."""
    leaves, tree = jax.tree.flatten(params)

    def passed(leaves: Any, probes: Any) -> Any:
        found, seen = traced.run(leaves, inputs, probes)
        return select(found), seen

    outputs, pull, seen = jax.vjp(passed, leaves, traced.probes(), has_aux=True)
    _, expected = jax.vjp(lambda leaves: select(f(jax.tree.unflatten(tree, leaves), *inputs)), leaves)
    cotangent = random_cotangent(outputs)
    (gradient,), (_, probes) = expected(cotangent), pull(cotangent)
    shown, errors = Shown.of(traced, seen), {}
    for layer in traced.assembly.layers:
        if layer.kind != "entries":
            came, true = gradient_of_rows(shown, layer, probes).ravel(), layer.matrix(gradient).ravel()
            norm = jnp.linalg.norm(true)
            errors[layer.name] = jnp.linalg.norm(came - true) / jnp.where(norm == 0, 1, norm)
    return errors


def random_cotangent(outputs: Any) -> Any:
    """Normal numbers for outputs that are real, none for others."""
    keys = iter(jax.random.split(jax.random.key(0), jax.tree.structure(outputs).num_leaves))

    def one(z: Any) -> Any:
        key = next(keys)
        if not jnp.issubdtype(z.dtype, jnp.inexact):
            return np.zeros(z.shape, jax.dtypes.float0)
        return jax.random.normal(key, z.shape, z.dtype)

    return jax.tree.map(one, outputs)


def _of_use(shown: Shown, layer: Layer, use: Use, g: Mapping[Any, Any]) -> Any:
    total: Any = 0.0
    for a, s in zip(shown.inputs(layer, use), shown.outputs(layer, use, g), strict=True):
        n = layer.shape[-2 if use.turned else -1]
        one_hot = (a == jnp.arange(n)).astype(s.dtype) if use.is_table else a
        total = total + jnp.einsum("...nri,...nrj->...ij", s, one_hot)
    return total.mT if use.turned else total
