"""All that depends on the version of JAX: how an equation holds what is inside it, and how it is evaluated.

JAX 0.9 to 0.12 differ in the parameters of `scan` and in how a primitive is bound. An equation is evaluated as a
program of its own by the public `jax.core.eval_jaxpr`; those that hold sites are made anew by the public `jax.lax.scan`
and `jax.checkpoint`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

INLINED = {  # primitive: which of its parameters is the program inside
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
}
LAYER = "kfaclinalg.layer"  # the first part of the names that `layer` gives
REMAT = ("checkpoint", "remat", "remat2")
#: what gives its operand in another dtype, place or state of variance
SAME = frozenset(
    [
        "convert_element_type",
        "copy",
        "copy_p",
        "mesh_cast",
        "optimization_barrier",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "sharding_constraint",
    ]
)


class Scan(NamedTuple):
    """A scan equation; its operands are the constants, the first carry and what is scanned, in this order."""

    body: Any  # with its constants closed over
    consts: int
    carries: int
    length: int
    options: dict[str, Any]

    @classmethod
    def of(cls, eqn: Any) -> Scan:
        p = eqn.params
        body, carries = p["jaxpr"], int(p["num_carry"]) if "num_carry" in p else -1
        if "num_consts" in p:
            consts = int(p["num_consts"])
        else:  # 0.12: a tree of three groups of operands
            consts, carries = (len(group) for group in tuple(p["ft_in"].unpack())[:2])
        options = {"reverse": p["reverse"], "unroll": p["unroll"]}
        return cls(body, consts, carries, int(p["length"]), options)

    def run(self, step: Callable[..., Any], carry: list[Any], xs: Any) -> Any:
        """The scan of another step."""
        return jax.lax.scan(step, carry, xs, length=self.length, **self.options)


def is_literal(atom: Any) -> bool:
    """Whether it is a number and no variable."""
    return isinstance(atom, core.Literal)


def is_dropped(variable: Any) -> bool:
    """Whether nobody takes this result; JAX 0.9 has no public name for the class."""
    return type(variable).__name__ == "DropVar"


def traced(f: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The program of f at these arguments, arrays or their shapes, and the tree of shapes that it returns."""
    return jax.make_jaxpr(f, return_shape=True)(*args)


def inside(eqn: Any) -> Any:
    """The program that is inlined in place of an equation, as (jaxpr, constants); None where it is no such call."""
    name = INLINED.get(eqn.primitive.name)
    if name is None:
        return None
    closed = eqn.params[name]
    return (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, [])


def numbered(jaxpr: Any) -> list[tuple[int, Any]]:
    """The equations of a program by numbers that `shard_map`, which adds casts of its own, does not change."""
    casts = [eqn.primitive.name in ("pcast", "pvary") for eqn in jaxpr.eqns]
    before = [0, *itertools.accumulate(casts)]
    return [(~i if cast else i - before[i], eqn) for i, (eqn, cast) in enumerate(zip(jaxpr.eqns, casts, strict=True))]


def word(eqn: Any) -> tuple[str, str] | None:
    """The number and the role in what `layer` has said of a value."""
    parts = str(eqn.params.get("name", "")).split("/") if eqn.primitive.name == "name" else []
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == LAYER else None


def programs(eqn: Any) -> list[Any]:
    """All programs inside an equation that can hold sites."""
    if found := inside(eqn) or rematerialised(eqn):
        return [found[0]]
    return [eqn.params["jaxpr"].jaxpr] if eqn.primitive.name == "scan" else []


def rematerialised(eqn: Any) -> Any:
    """(jaxpr, what makes a function that is rematerialised as it was), or None."""
    if eqn.primitive.name not in REMAT:
        return None
    p = eqn.params
    return p["jaxpr"], lambda f: jax.checkpoint(f, prevent_cse=p["prevent_cse"], policy=p["policy"])


def evaluate(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of one equation of a program, at these values of its operands."""
    given = {atom: value for atom, value in zip(eqn.invars, values, strict=True) if not is_literal(atom)}
    wanted = [v for v in eqn.outvars if not is_dropped(v)]
    info = jaxpr.debug_info.with_unknown_names() if hasattr(jaxpr.debug_info, "with_unknown_names") else None
    alone = jaxpr.replace(
        constvars=[], invars=list(given), outvars=wanted, eqns=[eqn], **({"debug_info": info} if info else {})
    )
    found = iter(jax.core.eval_jaxpr(alone, [], *given.values()))
    return [None if is_dropped(v) else next(found) for v in eqn.outvars]


def varying(tree: Any, axis: str | None) -> Any:
    """As what differs along an axis of `shard_map`: the gradients of what does not come out summed over it."""
    if axis is None:
        return tree

    def one(x: Any) -> Any:
        try:
            return jax.lax.pcast(x, axis, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axis)
        except ValueError:  # it differs already
            return x

    return jax.tree.map(one, tree)


def without_explicit_axes(f: Callable[..., Any], like: Callable[..., Any], *args: Any) -> Any:
    """f(*args), where types name no axes of a mesh; `like(spec)` are the specifications of the results.

    They are given in the terms of `spec(x)`, that of an array x, and of `spec(None)`, not divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit not in (mesh.axis_types or ()):
        return f(*args)

    def spec(x: Any) -> Any:
        return jax.sharding.PartitionSpec() if x is None else jax.typeof(x).sharding.spec

    return jax.sharding.auto_axes(f, out_sharding=like(spec))(*args)


def place(eqn: Any) -> str:
    """The primitive, and the line of the user's code that it comes from."""
    from jax._src import source_info_util  # the one thing that no public name gives

    line = source_info_util.summarize(eqn.source_info)
    return f"{eqn.primitive.name} at {line or 'a line of JAX itself'}"
