"""One batch: a forward pass, the gradient of the loss, and the statistics of the sites that it went through."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from . import _versions as versions
from ._estimators import Empirical
from ._moments import Shown
from ._sites import cast, wide
from ._statistics import Statistics, statistics_of


def measured(net: Any, params: Any, inputs: Any, y: Any, key: Any) -> tuple[Any, Any, Statistics]:
    """((loss, what f returns), gradient, statistics) of a `Network` at a batch; the means over its devices."""

    def like(spec: Any) -> Any:
        rows = PartitionSpec(*spec(jax.tree.leaves(inputs)[0])[:1])
        N, returned = net.example.N, net.example.outputs
        found = jax.tree.map(lambda z: rows if z.shape[:1] == (N,) else spec(None), returned)
        return (spec(None), found), jax.tree.map(spec, params), spec(None)

    (loss, found), gradient, statistics = versions.without_explicit_axes(
        partial(_here, net), like, params, inputs, y, key
    )
    if net.axis_name is None:
        return (loss, found), gradient, statistics
    here = (loss, gradient, versions.varying(statistics.moments, net.axis_name))
    loss, gradient, moments = jax.lax.pmean(here, net.axis_name)
    return (loss, found), gradient, statistics._replace(moments=moments)  # rows stay where they are


def _here(net: Any, params: Any, inputs: Any, y: Any, key: Any) -> tuple[Any, Any, Statistics]:
    params = versions.varying(jax.tree.map(jnp.asarray, params), net.axis_name)
    traced = net.traced(params, inputs)
    leaves, tree = jax.tree.flatten(params)
    probes = versions.varying(traced.probes(), net.axis_name)

    def passed(leaves: Any, probes: Any) -> Any:
        found, seen = traced.run(leaves, inputs, probes)
        return net.select(found), (found, seen)

    outputs, pull, (found, seen) = jax.vjp(passed, leaves, probes, has_aux=True)
    numbers = jax.tree.map(wide, outputs)
    if check := getattr(net.likelihood, "check", None):
        check(numbers, y)
    loss, first = jax.value_and_grad(net.likelihood.loss, allow_int=True)(numbers, y)

    def back(cotangent: Any) -> Any:
        return pull(jax.tree.map(cast, cotangent, outputs))

    gradient, slopes = back(first)
    draws, drawn = _draws(net, traced, slopes=(gradient, slopes), back=back, at=(numbers, y, key))
    shown = Shown(seen, traced.N, traced.dtypes, net.reduced)
    statistics = statistics_of(traced, shown, net.keep, draws, drawn, net.axis_name)
    return (loss, found), jax.tree.unflatten(tree, gradient), statistics


def _draws(net: Any, traced: Any, *, slopes: Any, back: Any, at: Any) -> tuple[int, Any]:
    """Of how many draws G is made, and what each sends back: the loss itself, N times its mean's, or targets."""
    if isinstance(net.estimator, Empirical) and not traced.has_entries:
        scaled = jax.tree.map(lambda g: traced.N * g, slopes)
        return 1, lambda draw: scaled
    numbers, y, key = at
    own = key if net.axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(net.axis_name))
    cotangent = partial(net.estimator.cotangent, net.likelihood, numbers, y)
    return net.estimator.draws(numbers), lambda draw: back(cotangent(draw, own))
