"""Which equations are sites of a parameter, and which only show it otherwise."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from ._sites import Convolution, Dense, Embedding, Groups, Loop, Scale, Site
from ._versions import SAME, place
from ._views import View


def _without(n: int, *taken: Any) -> tuple[int, ...]:
    return tuple(i for i in range(n) if not any(i in axes for axes in taken))


def common(eqn: Any, view: View, path: tuple[int, ...], lengths: tuple[int, ...]) -> dict[str, Any]:
    """What every site has."""
    out = eqn.outvars[0].aval
    loops = tuple(Loop(length, level in view.levels) for level, length in enumerate(lengths))
    dtypes = (v.aval.dtype for v in (*eqn.invars, *eqn.outvars))
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact))
    shared = {"path": path, "place": place(eqn), "loops": loops, "shape": tuple(out.shape), "dtype": out.dtype}
    return shared | {"eps": eps}


def dense(eqn: Any, at: int, view: View, shared: dict[str, Any]) -> Site | None:
    """W against anything but a parameter."""
    contracted, batched = eqn.params["dimension_numbers"]
    if view.is_broadcast or view.factor:
        return None
    w, x = (len(eqn.invars[i].aval.shape) for i in (at, 1 - at))
    (wc, xc), (wb, xb) = ((axes[at], axes[1 - at]) for axes in (contracted, batched))
    wf, xf = _without(w, wc, wb), _without(x, xc, xb)
    b = len(wb)
    of_left, of_right = b + len((wf, xf)[at]), b + len(wf) + len(xf)
    halves = tuple(range(b, of_left)), tuple(range(of_left, of_right))
    batch = (tuple(wb),) if wb else ()
    sizes = [prod(view.shape[i] for i in group) for group in (*batch, wf, wc)]
    return Dense(
        **shared,
        operand=1 - at,
        weight=view.part(*batch, wf, tuple(wc)),
        matrix=(*view.stack, *sizes),
        x=Groups(tuple(xb), xf, tuple(xc)),
        s=Groups(tuple(range(b)), halves[1 - at], halves[at]),
    )


def vouched(view: View, source: tuple[int, ...], shared: dict[str, Any]) -> Site:
    """What `layer` has said: inputs @ weight."""
    last = len(shared["shape"]) - 1
    groups = Groups((), tuple(range(last)), (last,))
    matrix = (*view.stack, view.shape[1], view.shape[0])
    return Dense(**shared, operand=-1, weight=view.part((1,), (0,)), matrix=matrix, x=groups, s=groups, source=source)


def convolution(eqn: Any, at: int, view: View, shared: dict[str, Any]) -> Site | None:
    """Images on the left, a kernel on the right."""
    p, x = eqn.params, eqn.invars[0].aval
    lhs, rhs, out = p["dimension_numbers"]
    if at != 1 or view.is_broadcast or view.factor or p["batch_group_count"] != 1:
        return None
    groups, (o, i, *space) = p["feature_group_count"], rhs
    kernel = [view.shape[j] for j in space]
    m, n = view.shape[o] // groups, view.shape[i] * prod(kernel)
    matrix = (*view.stack, *((groups,) if groups > 1 else ()), m, n)
    weight = view.part((o,), (i, *space))
    options = {
        "filter_shape": kernel,
        "window_strides": p["window_strides"],
        "padding": p["padding"],
        "lhs_dilation": p["lhs_dilation"],
        "rhs_dilation": p["rhs_dilation"],
        "precision": p["precision"],
    }
    own = Groups((1,) if groups > 1 else (), (0, *range(3, len(x.shape) + 1), *(() if groups > 1 else (1,))), (2,))
    return Convolution(
        **shared,
        operand=0,
        weight=weight._replace(ops=(*weight.ops, ("reshape", matrix))),
        matrix=matrix,
        x=own,
        s=own,
        options=options,
        lhs=tuple(lhs),
        out=tuple(out),
        groups=groups,
    )


def embedding(eqn: Any, at: int, view: View, shared: dict[str, Any]) -> Site | None:
    """Whole rows of a table, by one index each: an index of all axes begins at 0 on those that are taken whole."""
    p, d, table = eqn.params, eqn.params["dimension_numbers"], view.shape
    named, sizes = tuple(d.start_index_map), p["slice_sizes"]
    collapsed, clipped = tuple(d.collapsed_slice_dims), p["mode"] == jax.lax.GatherScatterMode.CLIP
    picked = [i for i in named if i in collapsed or sizes[i] < table[i]]
    if at != 0 or view.is_broadcast or view.factor or len(picked) != 1 or d.operand_batching_dims:
        return None
    (c,), rest = picked, _without(len(table), picked)
    if collapsed not in ((), (c,)) or sizes[c] != 1 or any(sizes[i] != table[i] for i in rest):
        return None
    if len(named) > 1 and p["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:  # which looks at them all
        return None
    last = len(eqn.invars[1].aval.shape) - 1
    return Embedding(
        **shared,
        operand=1,
        weight=view.part(rest, (c,)),
        matrix=(*view.stack, prod(table[i] for i in rest), table[c]),
        x=Groups((), tuple(range(last)), (last,)),
        s=Groups((), _without(len(shared["shape"]), d.offset_dims), tuple(d.offset_dims)),
        column=named.index(c),
        last=table[c] - 1 if clipped else None,
    )


def scale(eqn: Any, at: int, view: View, shared: dict[str, Any]) -> Site:
    """A factor, or a term, for each entry of a parameter."""
    places, rank = view.places, len(shared["shape"])
    groups = Groups((), _without(rank, places), places)
    part, matrix = view.part(places, (), ()), (*view.stack, prod(view.core), 1, 1)
    return Scale(**shared, operand=1 - at, weight=part, matrix=matrix, x=groups, s=groups, factor=view.factor)


RULES: dict[str, Callable[..., Site | None]] = {
    "dot_general": dense,
    "conv_general_dilated": convolution,
    "gather": embedding,
    "mul": scale,
    "add": scale,
}


def moved(eqn: Any, view: View) -> View | None:
    """The parameter behind an equation that only rearranges it."""
    shape, p, kind = tuple(eqn.outvars[0].aval.shape), eqn.params, eqn.primitive.name
    match kind:
        case "transpose":
            return view.transposed(tuple(p["permutation"]))
        case "rev":
            return view.flipped(p["dimensions"])
        case "reshape" | "squeeze" | "expand_dims" if kind != "reshape" or p["dimensions"] is None:
            return view.reshaped(shape)
        case "broadcast_in_dim":
            return view.broadcast(shape, p["broadcast_dimensions"])
        case name if name in SAME and len(eqn.outvars) == 1 and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return view
    return None
