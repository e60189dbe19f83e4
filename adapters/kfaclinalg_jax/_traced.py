"""The program of a network at one batch size, and what was found in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _versions as versions
from ._assemble import Assembly
from ._find import search
from ._moments import Shown, factors
from ._results import Path
from ._run import Plan, run
from ._sites import Site


class Traced:
    """f(params, *inputs) as a program; `examples` says which axis of each site's output counts the examples."""

    def __init__(self, f: Callable[..., Any], params: Any, inputs: Sequence[Any], examples: Mapping[Path, Any]) -> None:
        self.inputs, self.N = inputs, examples_of(inputs)
        closed, shapes = versions.traced(f, params, *inputs)
        self.jaxpr, self.consts = closed.jaxpr, closed.consts
        self.outputs, self.tree = shapes, jax.tree.structure(shapes)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.names = tuple(name_of(path) for path, _ in leaves)
        self.leaves = [leaf for _, leaf in leaves]
        found = search(self.jaxpr, self.leaves, examples)
        self.assembly = Assembly(found, self.names, [tuple(leaf.shape) for leaf in self.leaves])
        layers = self.assembly.layers
        self.sites: dict[Path, Site] = {site.path: site for layer in layers for site in layer.sites}
        needed = {path for site in self.sites.values() for path in (site.source, getattr(site, "factor", None))}
        self.plan = Plan(self.sites, {path: at for path, at in found.factors.items() if path in needed})
        self.dtypes = {
            layer.name: jnp.promote_types(jnp.result_type(*(self.leaves[i].dtype for i in layer.leaves)), jnp.float32)
            for layer in layers
        }

    @property
    def has_entries(self) -> bool:
        """Whether any parameter is left to the fallback."""
        return any(layer.kind == "entries" for layer in self.assembly.layers)

    def probes(self) -> dict[Path, Any]:
        return {path: jnp.zeros(site.probe, site.dtype) for path, site in self.sites.items()}

    def moments(self) -> dict[str, Any]:
        """The shapes of the factors."""

        def of(leaves: Any, inputs: Any, probes: Any) -> Any:
            _, seen = self.run(leaves, inputs, probes)
            shown = Shown.of(self, seen)
            return {x.name: factors(x, shown.A(x), shown.G(x, leaves, probes)) for x in self.assembly.layers}

        found: dict[str, Any] = jax.eval_shape(of, self.leaves, self.inputs, self.probes())
        return found

    def run(self, leaves: Sequence[Any], inputs: Any, probes: Mapping[Path, Any]) -> tuple[Any, Any]:
        """What f returns, and what was seen at the sites."""
        outs, seen = run(self.jaxpr, self.consts, [*leaves, *jax.tree.leaves(inputs)], self.plan, probes)
        return jax.tree.unflatten(self.tree, outs), seen


def shape_of(x: Any) -> Any:
    """The shape and dtype of an array."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def name_of(path: Any) -> str:
    """A path in a tree of parameters, its keys between dots; that of a Flax variable without the variable's own."""
    keys = list(path)
    while keys and getattr(keys[-1], "name", getattr(keys[-1], "key", None)) in ("value", "raw_value"):
        keys.pop()
    return str(jax.tree_util.keystr(tuple(keys or path), simple=True, separator="."))


def examples_of(inputs: Sequence[Any]) -> int:
    """The length of the first dimension of the first input.

    Raises:
        ValueError: there is none.
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or not leaves[0].shape or leaves[0].shape[0] == 0:
        raise ValueError(f"inputs are {inputs!r}, expected arrays of which the first counts the examples first, N > 0")
    return int(leaves[0].shape[0])


def example_axes(f: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> dict[Path, int]:
    """Which axis of what an equation gives counts the examples: the one that is twice as long for twice as many."""
    N = examples_of(inputs)

    def at(times: int) -> Any:
        def longer(x: Any) -> Any:
            grows = len(x.shape) > 0 and x.shape[0] == N and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            return jax.ShapeDtypeStruct((times * N, *x.shape[1:]) if grows else x.shape, x.dtype)

        return versions.traced(f, params, *jax.tree.map(longer, tuple(inputs)))[0].jaxpr

    try:
        return dict(_grown(at(1), at(2), ()))
    except (TypeError, ValueError):  # a function of one batch size
        return {}


def _grown(once: Any, twice: Any, path: Path) -> Iterator[tuple[Path, int]]:
    """The path of each equation with one axis that has doubled, and the axis."""
    for (i, x), (_, y) in zip(versions.numbered(once), versions.numbered(twice), strict=False):
        if x.primitive is not y.primitive:
            return
        for inner, other in zip(versions.programs(x), versions.programs(y), strict=False):
            yield from _grown(inner, other, (*path, i))
        before, after = (tuple(eqn.outvars[0].aval.shape) if eqn.outvars else () for eqn in (x, y))
        grown = [axis for axis, (n, m) in enumerate(zip(before, after, strict=False)) if n != m]
        if len(grown) == 1 and len(before) == len(after) and after[grown[0]] == 2 * before[grown[0]]:
            yield (*path, i), grown[0]
