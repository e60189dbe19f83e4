"""The program of a network at one batch size, and what was found in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _versions as versions
from ._assemble import Assembly
from ._find import search
from ._moments import Shown, factors
from ._results import Path
from ._run import Plan, run
from ._sites import Site
from ._trees import name_of


class Examples(NamedTuple):
    """Which inputs count the examples by their first dimension, and which axis of what an equation gives does."""

    inputs: tuple[bool, ...]
    axes: dict[Path, int]


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
        _check(self.names, self.leaves)
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

    def eps(self, name: str) -> float:
        """The rounding of a layer's rows and parameters."""
        (layer,) = (layer for layer in self.assembly.layers if layer.name == name)
        parameters = (float(jnp.finfo(self.leaves[i].dtype).eps) for i in layer.leaves)
        return max(*parameters, *(site.eps for site in layer.sites))

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
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    weak = getattr(x, "weak_type", not hasattr(x, "dtype"))
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), weak_type=weak)


def _check(names: Sequence[str], leaves: Sequence[Any]) -> None:
    """What no gradient, or no name, is there for."""
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"parameter {name!r} has dtype {leaf.dtype}, expected a real one: f can close over others")
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two parameters have the name {name!r}, expected a path of its own for each")


def inputs_of(x: Any, like: Any) -> tuple[Any, ...]:
    """x as inputs like these: itself a tuple of them, or the only one, which may be a tuple too."""
    alone = not isinstance(x, tuple) or jax.tree.structure((x,)) == jax.tree.structure(like)
    return (x,) if alone else x


def examples_of(inputs: Sequence[Any]) -> int:
    """The length of the first dimension of the first input.

    Raises:
        ValueError: there is none.
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or not jnp.shape(leaves[0]) or leaves[0].shape[0] == 0:
        first = f"a {type(leaves[0]).__name__} of shape {jnp.shape(leaves[0])}" if leaves else "nothing"
        raise ValueError(f"inputs begin with {first}, expected an array whose first dimension counts examples, N > 0")
    return int(leaves[0].shape[0])


def examples_in(f: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Examples:
    """Those that are twice as long, in f, for twice as many examples.

    An input as long as there are examples may be another thing (the mean of a normalisation of so many channels): what
    f does not take twice as long is none, or one of the other inputs is not.
    """
    N = examples_of(inputs)

    def at(times: int, grow: Sequence[bool]) -> Any:
        def longer(x: Any, grows: bool) -> Any:
            grows = grows and _counts(x, N)
            return jax.ShapeDtypeStruct((times * N, *x.shape[1:]) if grows else x.shape, x.dtype)

        shapes = (jax.tree.map(partial(longer, grows=grows), x) for x, grows in zip(inputs, grow, strict=True))
        return versions.traced(f, params, *shapes)[0].jaxpr

    able = [any(_counts(x, N) for x in jax.tree.leaves(of)) for of in inputs]
    others = [i for i, counts in enumerate(able) if counts][1:]
    for some in dict.fromkeys(((), *((i,) for i in others), tuple(others))):
        grow = tuple(counts and i not in some for i, counts in enumerate(able))
        try:
            once, twice = at(1, grow), at(2, grow)
        except Exception:
            continue
        found: dict[Path, int] = {}
        _grow(once, twice, [False] * len(once.invars), N, (), found)
        return Examples(grow, found)
    return Examples(tuple(able), {})


def _counts(x: Any, N: int) -> bool:
    return bool(x.shape[:1] == (N,))


def _grow(once: Any, twice: Any, mixed: list[bool], N: int, path: Path, found: dict[Path, int]) -> list[bool]:
    """Find the path of each equation with one axis that has doubled, and the axis.

    That of several rows an example is no such axis where it is `mixed`: an example's rows are not side by side.
    """
    known = dict(zip(once.invars, mixed, strict=False))

    def flag_of(v: Any) -> bool:
        return not versions.is_literal(v) and known.get(v, False)

    for (i, x), (_, y) in zip(versions.numbered(once), versions.numbered(twice), strict=False):
        if x.primitive is not y.primitive:
            return [True] * len(once.outvars)
        operands = [(v, w, flag_of(v)) for v, w in zip(x.invars, y.invars, strict=False)]
        outs = [_is_mixed(x, operands, out, N) for out in zip(x.outvars, y.outvars, strict=False)]
        for inner, other in zip(versions.programs(x), versions.programs(y), strict=False):
            outs = _grow(inner, other, [flag for *_, flag in operands], N, (*path, i), found)
        known |= zip(x.outvars, outs, strict=False)
        axis = _doubled(x.outvars[0], y.outvars[0]) if outs and not outs[0] else None
        if axis is not None:
            found[(*path, i)] = axis
    return [flag_of(v) for v in once.outvars]


def _doubled(x: Any, y: Any) -> int | None:
    """The one axis that is twice as long in y."""
    before, after = tuple(x.aval.shape), tuple(y.aval.shape)
    grown = [axis for axis, (n, m) in enumerate(zip(before, after, strict=False)) if n != m]
    alone = len(grown) == 1 and len(before) == len(after) and after[grown[0]] == 2 * before[grown[0]]
    return grown[0] if alone else None


def _is_mixed(eqn: Any, operands: list[Any], out: Any, N: int) -> bool:
    """Whether the examples are not the outermost part of the axis that has doubled."""
    reshapes = eqn.primitive.name == "reshape"
    axis, shape = _doubled(*out), tuple(out[0].aval.shape)
    if axis is None or shape[axis] == N:
        return False
    for x, y, mixed in operands:
        if (old := _doubled(x, y)) is not None:
            before, order = tuple(x.aval.shape), (eqn.params["dimensions"] if reshapes else None) or range(x.aval.ndim)
            outer = prod(before[i] for i in order[: order.index(old)])
            if mixed or (outer != prod(shape[:axis]) if reshapes else before[old] != shape[axis]):
                return True
    return shape[axis] % N != 0
