"""The layers of a group divided over the devices of a mesh: each refreshes the inverses of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Refresh = Callable[[Any, Any, Any], Any]  # moments, inverses and which are due, to inverses: (layers, ...) all of them


def beside(state: Any, params: Any) -> Any:
    """A state on all devices of the mesh of the parameters: elsewhere a second step would compile anew."""
    arrays = (x for x in jax.tree.leaves(params) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    places = [x.sharding for x in arrays if isinstance(x.sharding, NamedSharding)]
    return jax.device_put(state, NamedSharding(places[0].mesh, PartitionSpec())) if places else state


def divided(refresh: Refresh, axis_name: str | None, sharding: NamedSharding | None) -> Refresh:
    """The same, over the axis of the `shard_map` that it is called in, or the first axis of a sharding."""
    if axis_name is not None:
        return lambda *args: _inside(refresh, axis_name, args)
    if sharding is None:
        return refresh
    spec = PartitionSpec(sharding.spec[0])
    here = jax.sharding.get_abstract_mesh()  # within an explicit mesh that of a program without its types
    mesh = None if here.shape == sharding.mesh.shape else sharding.mesh
    mapped = jax.shard_map(refresh, mesh=mesh, in_specs=spec, out_specs=spec)
    return lambda *args: _cut(mapped(*_padded(args, _size(sharding))), args)


def _inside(refresh: Refresh, axis: str, args: Any) -> Any:
    """Each device takes its slice, and the sum of all slices, zero elsewhere, is the whole on each of them."""
    devices = jax.lax.axis_size(axis)
    padded = _padded(args, devices)
    length = len(padded[2]) // devices
    start = jax.lax.axis_index(axis) * length
    mine = refresh(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), padded))

    def whole(x: Any, like: Any) -> Any:
        numbers = x.astype(jnp.int32) if x.dtype == bool else x
        zeros = jnp.zeros((devices * length, *x.shape[1:]), numbers.dtype)
        return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, numbers, start, 0), axis).astype(like.dtype)

    return _cut(jax.tree.map(whole, mine, padded[1]), args)


def _padded(args: Any, devices: int) -> Any:
    """With as many layers as the devices divide; those that are added are never due."""
    more = -len(args[2]) % devices
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros((more, *x.shape[1:]), x.dtype)]) if more else x, args)


def _cut(found: Any, args: Any) -> Any:
    return jax.tree.map(lambda x: x[: len(args[2])], found)


def _size(sharding: NamedSharding) -> int:
    names = sharding.spec[0]
    size = 1
    for name in (names,) if isinstance(names, str) else tuple(names or ()):
        size *= sharding.mesh.shape[name]
    return size
