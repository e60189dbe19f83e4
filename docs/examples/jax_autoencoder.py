"""A deep autoencoder of digits in plain JAX: Adam, and SGD behind K-FAC's preconditioner.

    python docs/examples/jax_autoencoder.py            # some minutes on one core
    python docs/examples/jax_autoencoder.py --quick    # under a minute

The two see the same mini-batches in the same order. Adam's rate is the best of five, K-FAC's options are the defaults,
with the rate and momentum that its page names. Where kfac-jax is installed, with a JAX on which it runs (0.9), it is
drawn too, its λ, rate and momentum adapted by itself. Picture: build/figures/jax_autoencoder.png.
"""

import argparse
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from kfaclinalg_jax import Network, precondition

SIZES = (784, 400, 200, 100, 30, 100, 200, 400, 784)
CODE = 3  # this layer and the last are linear; all others are tanh
BATCH = 256
RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3)
ROOT = Path(__file__).resolve().parents[2]
DIGITS = Path(__file__).with_name("data") / "mnist_10000.npz"


def autoencoder(params, x):
    """Logits of the pixels (N, 784)."""
    for i, (W, b) in enumerate(params):
        x = x @ W + b
        x = x if i in (CODE, len(params) - 1) else jnp.tanh(x)
    return x


def initial(seed):
    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    return [
        (jax.random.normal(key, (n, m)) / n**0.5, jnp.zeros(m))
        for key, (n, m) in zip(keys, pairwise(SIZES), strict=False)
    ]


def train(tx, net, digits, iterations, label):
    """The squared error of the reconstruction, an image, of each mini-batch; and the seconds without compilation."""

    @jax.jit
    def step(params, state, x, key):
        gradient, statistics = net.value_grad_and_statistics(params, x, x, key=key)[1:]
        updates, state = optax.with_extra_args_support(tx).update(gradient, state, params, statistics=statistics)
        error = jnp.square(jax.nn.sigmoid(autoencoder(params, x)) - x).sum(1).mean()
        return optax.apply_updates(params, updates), state, error

    params, rng = initial(0), np.random.default_rng(0)
    state, errors, key = tx.init(params), [], jax.random.key(1)
    jax.block_until_ready(step(params, state, digits[:BATCH], key))
    start = time.perf_counter()
    for i in tqdm(range(iterations), desc=label, leave=False):
        x = digits[rng.integers(len(digits), size=BATCH)]
        params, state, error = step(params, state, x, jax.random.fold_in(key, i))
        errors.append(float(error))
    return errors, time.perf_counter() - start


def train_kfac_jax(digits, iterations):
    """The same by kfac-jax, which compiles its step itself and asks for the loss to be registered."""
    import kfac_jax

    def loss(params, x):
        z = autoencoder(params, x)
        kfac_jax.register_sigmoid_cross_entropy_loss(z, x)
        return optax.sigmoid_binary_cross_entropy(z, x).sum(1).mean()

    adaptive = {f"use_adaptive_{name}": True for name in ("learning_rate", "momentum", "damping")}
    options = {"l2_reg": 0.0, "initial_damping": 1.0, "num_burnin_steps": 0, "multi_device": False}
    optimizer = kfac_jax.Optimizer(jax.value_and_grad(loss), **options, **adaptive)
    error = jax.jit(lambda params, x: jnp.square(jax.nn.sigmoid(autoencoder(params, x)) - x).sum(1).mean())
    params, rng, key, errors, start = initial(0), np.random.default_rng(0), jax.random.key(1), [], 0.0
    state = optimizer.init(params, key, digits[:BATCH])
    for i in tqdm(range(iterations), desc="kfac-jax", leave=False):
        x = digits[rng.integers(len(digits), size=BATCH)]
        errors.append(float(error(params, x)))
        params, state, _ = optimizer.step(params, state, jax.random.fold_in(key, i), batch=x, global_step_int=i)
        start = start or time.perf_counter()
    return errors, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 iterations, and one rate of Adam")
    quick = parser.parse_args().quick
    iterations, rates = (20, (2e-3,)) if quick else (400, RATES)
    with np.load(DIGITS) as archive:
        digits = archive["x_train"].reshape(-1, 784).astype(np.float32) / 255
    net = Network(autoencoder, "bernoulli", example=(initial(0), digits[:BATCH]))
    kfac = optax.chain(precondition(net), optax.sgd(0.3, momentum=0.9, nesterov=True))
    adam = {rate: train(optax.adam(rate), net, digits, iterations, f"Adam {rate}") for rate in rates}
    best = min(rates, key=lambda rate: np.mean(adam[rate][0][-10:]))
    runs = {f"Adam, {best:g}": adam[best], "K-FAC + SGD, 0.3": train(kfac, net, digits, iterations, "K-FAC")}
    if find_spec("kfac_jax"):
        try:
            runs["kfac-jax, adaptive"] = train_kfac_jax(digits, iterations)
        except (AttributeError, ImportError, TypeError) as error:  # of a JAX that it does not know
            print(f"kfac-jax does not run here: {type(error).__name__}: {error}")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, (errors, seconds) in runs.items():
        smooth = np.convolve(errors, np.ones(10) / 10, "valid")
        axes.semilogy(np.arange(10, len(errors) + 1), smooth, label=label)
        print(f"{label}: error {smooth[-1]:.2f} after {iterations} iterations, {seconds:.1f} s")
    axes.set(xlabel="iteration", ylabel="squared error an image, mean of 10", title="An autoencoder of digits in JAX")
    axes.legend()
    picture = ROOT / "build" / "figures" / "jax_autoencoder.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
