"""K-FAC in JAX beside kfac-jax: the same factors, and our seconds of compilation and of a step over theirs.

In an environment of its own, of Python 3.11 and versions that both run on, on one thread:

    python3.11 -m venv .venv-kfac-jax
    .venv-kfac-jax/bin/python -m pip install -e '.[optax]' jax==0.9.0 jaxlib==0.9.0 kfac-jax==0.0.8
    .venv-kfac-jax/bin/python asv_benchmarks/jax_peers.py    # --networks convnet, --repeats 1, --factors, ...

The factors are compared in float64, with the exact Fisher matrix, layer by layer; theirs of the squared error are of
‖y - z‖² and ours of half of it. What is timed, in float32, each in a process of its own and in turn:

- "fixed": a statistic in each step, an inverse in every tenth, given numbers for λ, the rate and the momentum;
- "adaptive": λ, the rate and the momentum of the paper, inverses in every 20th step, all of the batch in all parts.
  Ours is the paper's whole Algorithm 2, with γ, which they do not have, swept over three values in every 20th step.

"first" is all until the first step is done, "compiling" what the first 20 steps took beyond 20 later ones, "step" the
mean of those: seconds of the processor, which a machine that others use too does not change much. The table has our
medians over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)  # the paper's, of MNIST
BATCH = {"autoencoder": 256, "convnet": 128, "transformer": 64}
STEPS = 20
KINDS = ("fixed", "adaptive")
LIKELIHOODS = {"autoencoder": "bernoulli", "convnet": "categorical", "transformer": "categorical"}


# -- the networks, in functions that both see through --


def dense(key: Any, n: int, m: int) -> dict[str, Any]:
    return {"W": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}


def through(layer: dict[str, Any], x: Any) -> Any:
    return x @ layer["W"] + layer["b"]


def autoencoder_of(key: Any, sizes: tuple[int, ...] = SIZES) -> Any:
    return [dense(jax.random.fold_in(key, i), n, m) for i, (n, m) in enumerate(pairwise(sizes))]


def perceptron_of(key: Any) -> Any:
    return autoencoder_of(key, (784, 30, 10))


def autoencoder(params: Any, x: Any) -> Any:
    x = x.reshape(len(x), -1)
    for i, layer in enumerate(params):
        x = through(layer, x)
        x = x if i in (3, len(params) - 1) else jnp.tanh(x)  # the code and the last are linear
    return x


def convnet_of(key: Any) -> Any:
    keys = jax.random.split(key, 4)
    kernels = [(5, 5, 1, 16), (5, 5, 16, 32)]
    convolutions = [
        {"W": jax.random.normal(k, shape) / np.prod(shape[:3]) ** 0.5, "b": jnp.zeros(shape[-1])}
        for k, shape in zip(keys, kernels, strict=False)
    ]
    return [*convolutions, dense(keys[2], 32 * 49, 128), dense(keys[3], 128, 10)]


def convnet(params: Any, x: Any) -> Any:
    *convolutions, hidden, last = params
    for layer in convolutions:
        x = jax.lax.conv_general_dilated(x, layer["W"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + layer["b"])
    return through(last, jax.nn.relu(through(hidden, x.reshape(len(x), -1))))


def transformer_of(key: Any, width: int = 64, blocks: int = 2) -> Any:
    keys = iter(jax.random.split(key, 6 * blocks + 2))

    def norm() -> dict[str, Any]:
        return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}  # of each its own arrays, which are donated

    shapes = dict.fromkeys(("query", "key", "value", "mix"), (width, width))
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    made = [
        {name: dense(next(keys), *shape) for name, shape in shapes.items()} | {"norm1": norm(), "norm2": norm()}
        for _ in range(blocks)
    ]
    return {"first": dense(next(keys), 28, width), "blocks": made, "norm": norm(), "last": dense(next(keys), width, 10)}


def transformer(params: Any, x: Any, heads: int = 4) -> Any:
    """The rows of a digit as 28 tokens."""

    def normalised(norm: dict[str, Any], x: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * norm["scale"] + norm["shift"]

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1)

    x = through(params["first"], x[..., 0])
    angles = jnp.arange(28)[:, None] / 28.0 ** (jnp.arange(x.shape[-1]) / x.shape[-1])
    x = x + jnp.sin(angles).astype(x.dtype)
    for block in params["blocks"]:
        a = normalised(block["norm1"], x)
        q, k, v = (split(through(block[name], a)) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5)
        x = x + through(block["mix"], jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape))
        x = x + through(block["down"], jax.nn.gelu(through(block["up"], normalised(block["norm2"], x))))
    return through(params["last"], normalised(params["norm"], x).mean(1))


NETWORKS = {
    "autoencoder": (autoencoder, autoencoder_of),
    "convnet": (convnet, convnet_of),
    "transformer": (transformer, transformer_of),
    "perceptron": (autoencoder, perceptron_of),
}


def batch(network: str, size: int, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Images, and what they are to become."""
    rng = np.random.default_rng(0)
    x = rng.random((size, 28, 28, 1)).astype(dtype)
    y = x.reshape(size, -1) if network == "autoencoder" else rng.integers(10, size=size)
    return jnp.asarray(x), jnp.asarray(y)


# -- the two libraries, as functions that make a step --

Step = Callable[[int], Any]


def ours(network: str, kind: str) -> Step:
    import optax

    from kfaclinalg_jax import KFAC, Network, precondition

    f, initial = NETWORKS[network]
    params, (x, y) = initial(jax.random.key(0)), batch(network, BATCH[network])
    net, key = Network(f, LIKELIHOODS[network], example=(params, x)), jax.random.key(1)
    if kind == "adaptive":
        kfac = KFAC(net, damping=1.0, statistics_fraction=1.0, curvature_fraction=1.0)
        held = params, kfac.init(params)

        def whole(i: int) -> Any:
            nonlocal held
            *held, info = kfac.step(*held, x, y, jax.random.fold_in(key, i))  # type: ignore[assignment]
            return info.loss

        return whole
    options = {"damping": 0.1, "statistics_period": 1, "inverse_period": 10}
    tx = optax.chain(precondition(net, **options), optax.sgd(1e-3, momentum=0.9))

    def update(params: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
        (loss, _), gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    compiled, state = jax.jit(update, donate_argnums=(0, 1)), tx.init(params)

    def step(i: int) -> Any:
        nonlocal params, state
        params, state, loss = compiled(params, state, x, y, jax.random.fold_in(key, i))
        return loss

    return step


def loss_of(network: str, likelihood: str) -> Callable[..., Any]:
    """The loss as kfac-jax wants it, registered."""
    import kfac_jax

    f = NETWORKS[network][0]

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        z = f(params, x)
        if likelihood == "categorical":
            kfac_jax.register_softmax_cross_entropy_loss(z, y)
            return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()
        if likelihood == "gaussian":
            kfac_jax.register_squared_error_loss(z, y)
            return jnp.square(y - z).sum(1).mean()
        kfac_jax.register_sigmoid_cross_entropy_loss(z, y)
        return (jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))).sum(1).mean()

    return loss


def theirs(network: str, kind: str) -> Step:
    import kfac_jax

    initial = NETWORKS[network][1]
    params, data = initial(jax.random.key(0)), batch(network, BATCH[network])
    value_and_grad = jax.value_and_grad(loss_of(network, LIKELIHOODS[network]))
    common = {"multi_device": False, "num_burnin_steps": 0, "curvature_update_period": 1}
    if kind == "adaptive":
        names = ("learning_rate", "momentum", "damping")
        adaptive = {f"use_adaptive_{name}": True for name in names} | {"initial_damping": 1.0, "min_damping": 1e-5}
        optimizer = kfac_jax.Optimizer(value_and_grad, l2_reg=0.0, inverse_update_period=20, **adaptive, **common)
        given = {}
    else:
        optimizer = kfac_jax.Optimizer(value_and_grad, l2_reg=0.0, inverse_update_period=10, **common)
        numbers = {"learning_rate": 1e-3, "momentum": 0.9, "damping": 0.1}
        given = {name: jnp.asarray(x) for name, x in numbers.items()}
    key = jax.random.key(1)
    state = optimizer.init(params, key, data)

    def step(i: int) -> Any:
        nonlocal params, state
        options = {"batch": data, "global_step_int": i, **given}
        params, state, stats = optimizer.step(params, state, jax.random.fold_in(key, i), **options)
        return stats["loss"]

    return step


def timed(make: Callable[[str, str], Step], network: str, kind: str) -> dict[str, float]:
    """Seconds of the processor."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(3)))  # JAX itself is up
    marks = [time.process_time()]
    step = make(network, kind)
    for i in range(2 * STEPS):
        loss = float(step(i))
        marks.append(time.process_time())
    if not np.isfinite(loss):
        raise SystemExit(f"the loss is {loss}")
    later = marks[2 * STEPS] - marks[STEPS]
    return {"first": marks[1] - marks[0], "compiling": marks[STEPS] - marks[0] - later, "step": later / STEPS}


# -- the same factors --


def compared(network: str, likelihood: str) -> tuple[float, float, int]:
    """Of the layers' A ⊗ G the largest relative difference but for the size; theirs over ours in size; the layers."""
    import kfac_jax

    from kfaclinalg_jax import Network

    f, initial = NETWORKS[network]
    params = jax.tree.map(lambda p: p.astype(jnp.float64), initial(jax.random.key(0)))
    x, y = batch(network, 8, np.float64)
    y = y if likelihood == "categorical" else jnp.zeros((8, 10))
    arguments, key = (params, (x, y)), jax.random.key(0)
    estimator = kfac_jax.BlockDiagonalCurvature(loss_of(network, likelihood), default_estimation_mode="fisher_exact")
    state = estimator.init(key, arguments, set(), set(), False)
    one = {"ema_old": 0.0, "ema_new": 1.0, "identity_weight": 0.0, "batch_size": len(x)}
    update = partial(estimator.update_curvature_matrix_estimate, **one, rng=key)
    state = jax.jit(lambda state, arguments: update(state, func_args=arguments))(state, arguments)
    net = Network(f, likelihood, example=(params, x), estimator="exact")
    moments = jax.jit(net.value_grad_and_statistics)(params, x, y, key=key)[2].moments
    leaves = jax.tree_util.tree_leaves_with_path(estimator.params_block_index)
    names = {i: str(jax.tree_util.keystr(path, simple=True, separator=".")) for path, i in leaves[::-1]}
    differences, sizes = [], []
    for i, (block, held) in enumerate(zip(estimator.blocks, state.blocks_states, strict=True)):
        mine, yours = matrices(moments[names[i]], block, held)
        traces = [[np.trace(M) for M in pair] for pair in (mine, yours)]
        for M, Y, m, t in zip(mine, yours, *traces, strict=True):
            differences.append(np.linalg.norm(M / m - Y / t) / np.linalg.norm(M / m))
        sizes.append(float(block.scale(held, use_cache=False)) * np.prod(traces[1]) / np.prod(traces[0]))
    if np.ptp(sizes) > 1e-9:
        raise SystemExit(f"{network}: the sizes of the layers do not agree: {sizes}")
    return float(max(differences)), float(np.mean(sizes)), len(sizes)


def matrices(ours: Any, block: Any, held: Any) -> tuple[list[Any], list[Any]]:
    """Ours and theirs of one layer, in our order of the inputs; of a scale and its shift both diagonals."""
    if not hasattr(held, "factors"):
        columns = [np.diag(M.value) for M in held.diagonal_factors]
        return [np.diag(ours.G[:, i, i]) for i in range(2)], columns
    A, G = (np.asarray(M.value) for M in held.factors)
    kernel = block.parameters_shapes[0]
    if len(kernel) == 4:  # height, width, channels: ours are channels, height, width
        order = [*np.arange(np.prod(kernel[:3])).reshape(kernel[:3]).transpose(2, 0, 1).ravel(), len(A) - 1]
        A = A[np.ix_(order, order)]
    return [np.asarray(ours.A), np.asarray(ours.G)], [A, G]


FACTORS = (
    ("convnet", "categorical"),
    ("convnet", "gaussian"),
    ("transformer", "categorical"),
    ("perceptron", "bernoulli"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--factors", action="store_true", help="compare the factors alone")
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "NETWORK", "KIND"), help="time one alone, as JSON")
    args = parser.parse_args()
    if args.one:
        library, network, kind = args.one
        print(json.dumps(timed({"ours": ours, "theirs": theirs}[library], network, kind)))
        return
    with jax.enable_x64(True):
        for network, likelihood in FACTORS:
            difference, size, layers = compared(network, likelihood)
            print(f"{network:12} {likelihood:12} {layers:3} layers, theirs over ours {size:.3f}, ", end="")
            print(f"else off by {difference:.0e}", flush=True)
    for network in args.networks if not args.factors else ():
        for kind in args.kinds:
            seconds = [{name: alone(name, network, kind) for name in ("ours", "theirs")} for _ in range(args.repeats)]
            for what in ("first", "compiling", "step"):
                mine, yours = (statistics.median(s[name][what] for s in seconds) for name in ("ours", "theirs"))
                print(f"{network:12} {kind:9} {what:10} {mine:8.3f} s {yours:8.3f} s {mine / yours:6.2f}", flush=True)


def alone(library: str, network: str, kind: str) -> dict[str, float]:
    """In a process of its own, on one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | threads | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--one", library, network, kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
