"""The steps of one device on several: run as a program, since the number of host devices is fixed at the start."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kfaclinalg_jax import KFAC, Network, precondition

SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()
OFTEN = dict.fromkeys(("damping_period", "gamma_period", "inverse_period"), 1)


def f(p, x):
    for W, b in zip(p["W"], p["b"], strict=True):
        x = jnp.tanh(x @ W + b)
    x = x * jnp.cos(p["angle"]).sum()
    return ((x - x.mean(-1, keepdims=True)) * p["scale"] + p["shift"]) @ p["V"]


def run(make, place, wrap=lambda step: step, programs=1):
    """Three steps from the same start."""
    normal = np.random.default_rng(0).normal
    params = {"W": [0.5 * normal(size=(4, 4)) for _ in range(2)], "b": [np.zeros(4)] * 2}
    params |= {"scale": np.ones(4), "shift": np.zeros(4), "V": normal(size=(4, 2)), "angle": np.ones(8)}
    params, x, y = jax.tree.map(jnp.asarray, (params, normal(size=(8, 4)), np.arange(8) % 2))
    net, tx = make(params, x)

    def step(params, state, x, y, key):
        (loss, _), gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(wrap(step))
    (params,), (x, y) = place((params,), WHOLE), place((x, y), SPLIT)
    state = tx.init(params)
    for _ in range(3):
        params, state, loss = compiled(params, state, x, y, jax.random.key(1))
    assert compiled._cache_size() <= programs
    return jax.device_get((params, loss))


def maker(*, part=1, structure="block-diagonal", axis_name=None, **options):
    keep = "rows" if structure == "eigen" else "moments"

    def make(params, x):
        example = (params, x[: len(x) // part])
        net = Network(f, "categorical", example=example, estimator="empirical", keep=keep, axis_name=axis_name)
        periods = {"statistics_period": 1, "inverse_period": 2}
        return net, optax.chain(precondition(net, structure=structure, **periods, **options), optax.sgd(0.3))

    return make


def algorithm2(place, structure, wrap=lambda step: step, **options):
    """Three steps of `KFAC`, in which everything is due."""
    normal = np.random.default_rng(0).normal
    params, x, y = jax.tree.map(jnp.asarray, ({"W": normal(size=(4, 3))}, normal(size=(8, 4)), np.arange(8) % 3))
    example = (params, x[: len(x) // options.pop("part", 1)])
    keep = "rows" if structure == "eigen" else "moments"
    net = Network(lambda p, x: x @ p["W"], "categorical", example=example, estimator="exact", keep=keep, **options)
    kfac = KFAC(net, damping=0.1, structure=structure, statistics_fraction=1.0, curvature_fraction=1.0, **OFTEN)
    (params,), (x, y) = place((params,), WHOLE), place((x, y), SPLIT)
    step, state = jax.jit(wrap(kfac.step)), kfac.init(params)
    for _ in range(3):
        params, state, info = step(params, state, x, y, jax.random.key(1))
    return jax.device_get((params, info.loss))


def on(mesh, split="none"):
    """On a mesh, the parameters with `split` in their names in parts."""

    def put(path, a, spec):
        part = jax.tree_util.keystr(path).startswith("[0]") and split in jax.tree_util.keystr(path)
        return jax.device_put(a, NamedSharding(mesh, SPLIT if part else spec))

    return lambda tree, spec: jax.tree_util.tree_map_with_path(partial(put, spec=spec), tree)


def main(devices, structure):
    auto, explicit = (
        jax.make_mesh((devices,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)
    )
    mapped = maker(structure=structure, part=devices, axis_name="data")
    specs = {"in_specs": (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE), "out_specs": WHOLE}
    map_over = partial(jax.shard_map, mesh=auto, **specs)
    expected = run(maker(structure=structure), lambda tree, spec: tree)
    found = {"shard_map": run(mapped, on(auto), map_over)}
    of_kfac = algorithm2(lambda tree, spec: tree, structure)
    found_of_kfac = {
        "KFAC in shard_map": algorithm2(on(auto), structure, map_over, part=devices, axis_name="data"),
        "KFAC in jit": algorithm2(on(auto), structure),
    }
    if structure == "block-diagonal":
        found["jit"] = run(maker(), on(auto))
        run_twice = partial(run, programs=2)  # for the state in parts; and for P(), which comes back as P(None, None)
        found["inverses divided"] = run_twice(maker(inverse_sharding=NamedSharding(auto, SPLIT)), on(auto))
        with jax.set_mesh(explicit):
            found["explicit"] = run_twice(maker(), on(explicit))
            found["explicit, a parameter in parts"] = run_twice(maker(), on(explicit, "angle"))
            found["explicit, all parameters in parts"] = run_twice(
                maker(inverse_sharding=NamedSharding(explicit, SPLIT)), on(explicit, "")
            )
    close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    for name, came in (found | found_of_kfac).items():
        wanted = of_kfac if name in found_of_kfac else expected
        jax.tree.map(partial(close, err_msg=name), came, wanted)
        print(devices, structure, name)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(len(jax.devices()), sys.argv[1])
