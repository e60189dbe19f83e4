"""The steps of one device on several: run as a program, since the number of host devices is fixed at the start."""

import os
import sys

devices, os.environ["XLA_FLAGS"] = int(sys.argv[1]), f"--xla_force_host_platform_device_count={sys.argv[1]}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

from kfaclinalg_jax import Network, precondition  # noqa: E402

jax.config.update("jax_enable_x64", True)
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def f(p, x):
    for W, b in zip(p["W"], p["b"], strict=True):
        x = jnp.tanh(x @ W + b)
    return ((x - x.mean(-1, keepdims=True)) * p["scale"] + p["shift"]) @ p["V"]


def run(make, place, wrap=lambda step: step):
    """Three steps from the same start."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    params = {"W": [0.5 * jax.random.normal(next(keys), (6, 6)) for _ in range(3)], "b": [jnp.zeros(6)] * 3}
    params |= {"scale": jnp.ones(6), "shift": jnp.zeros(6), "V": jax.random.normal(next(keys), (6, 2))}
    x, y = jax.random.normal(next(keys), (8, 6)), jnp.arange(8) % 2
    net, tx = make(params, x)
    state = tx.init(params)

    def step(params, state, x, y, key):
        loss, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(wrap(step))
    (params, state), (x, y) = place((params, state), WHOLE), place((x, y), SPLIT)
    for _ in range(3):
        params, state, loss = compiled(params, state, x, y, jax.random.key(1))
    return jax.device_get((params, loss))


def maker(*, part=1, structure="block-diagonal", axis_name=None, **options):
    keep = "rows" if structure == "eigen" else "moments"

    def make(params, x):
        example = (params, x[: len(x) // part])
        net = Network(f, "categorical", example=example, estimator="exact", keep=keep, axis_name=axis_name)
        periods = {"statistics_period": 1, "inverse_period": 2}
        return net, optax.chain(precondition(net, structure=structure, **periods, **options), optax.sgd(0.3))

    return make


def on(mesh):
    return lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)


structure = sys.argv[2]
expected = run(maker(structure=structure), lambda tree, spec: tree)
auto, explicit = (
    jax.make_mesh((devices,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)
)
found = {"jit": run(maker(structure=structure), on(auto))}
sharded = maker(structure=structure, inverse_sharding=NamedSharding(auto, SPLIT))
found["inverses divided"] = run(sharded, on(auto))
mapped = maker(structure=structure, part=devices, axis_name="data")
specs = {"in_specs": (WHOLE, WHOLE, SPLIT, SPLIT, WHOLE), "out_specs": WHOLE}
found["shard_map"] = run(mapped, lambda tree, spec: tree, lambda step: jax.shard_map(step, mesh=auto, **specs))
with jax.set_mesh(explicit):
    found["explicit"] = run(maker(structure=structure), on(explicit))
for name, came in found.items():
    jax.tree.map(
        lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13, err_msg=name),
        came,
        expected,
    )
    print(devices, structure, name)
