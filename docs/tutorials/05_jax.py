"""
In JAX
======

A network in JAX is a function of its parameters. ``Network`` finds the layers in it; then K-FAC is a transformation of
optax, or an optimizer of its own whose every step is one compiled program.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

from kfaclinalg_jax import KFAC, Network, precondition

digits = load_digits()
x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)


def f(params, x):
    for layer in params["hidden"]:
        x = jnp.tanh(x @ layer["W"] + layer["b"])
    return x @ params["head"]


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = [
        {"W": jax.random.normal(key, (n, m)) / n**0.5, "b": jnp.zeros(m)}
        for key, (n, m) in zip(keys[:2], [(64, 48), (48, 48)], strict=True)
    ]
    return {"hidden": hidden, "head": jax.random.normal(keys[2], (48, 10)) / 48**0.5}


# %%
# What it found
# -------------
#
# The function is traced, and every parameter followed to the equations that use it. Nothing is silent: what is no layer
# stands in ``skipped``, with the line of code that is why. ``check`` compares the layers' Σ g aᵀ with ``jax.grad``.

net = Network(f, "categorical", example=(start(), x[:100]))
for path, shape in net.layers.items():
    print(path, shape)
print("skipped:", net.skipped)
net.check(start(), x[:100])

# %%
# With optax
# ----------
#
# ``value_grad_and_statistics`` stands where ``jax.value_and_grad`` stood; its third result is the extra argument of the
# transformation. All that optax can chain with it, it can. Both have the best of three rates.

STEPS, BATCH = 100, 100


def batches():
    for key in jax.random.split(jax.random.key(1), STEPS):
        chosen = jax.random.choice(key, len(x), (BATCH,), replace=False)
        yield x[chosen], y[chosen], key


def run(tx, statistics):
    @jax.jit
    def step(params, state, x, y, key):
        (loss, _), gradient, seen = net.value_grad_and_statistics(params, x, y, key=key)
        more = {"statistics": seen} if statistics else {}
        updates, state = tx.update(gradient, state, params, **more)
        return optax.apply_updates(params, updates), state, loss

    params, losses = start(), []
    state = tx.init(params)
    for batch in batches():
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    assert step._cache_size() == 1  # one program, whatever was due
    return losses


def preconditioned(rate):
    return optax.chain(precondition(net), optax.sgd(rate, momentum=0.9, nesterov=True))


def best(runs):
    return min(runs, key=lambda losses: sum(losses[-10:]))


adam = best(run(optax.adam(rate), False) for rate in (0.003, 0.01, 0.03))
kfac_sgd = best(run(preconditioned(rate), True) for rate in (0.3, 1.0, 3.0))

# %%
# Algorithm 2
# -----------
#
# ``KFAC`` has no learning rate. Here it takes the whole data in each step; what it did is in ``info``, arrays that
# nothing has waited for.

kfac = KFAC(net, damping=0.1, statistics_fraction=1.0, curvature_fraction=1.0)
params, losses = start(), []
state = kfac.init(params)
for key in jax.random.split(jax.random.key(2), 30):
    params, state, info = kfac.step(params, state, x, y, key)
    losses.append(info.loss)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, curve, colour in (
    ("optax.adam", adam, "#009E73"),
    ("precondition + optax.sgd", kfac_sgd, "#0072B2"),
    ("KFAC, the whole data in each step", losses, "#D55E00"),
):
    axes.semilogy(jnp.asarray(curve), label=name, color=colour)
axes.set(xlabel="step", ylabel="loss")
axes.legend(frameon=False)
plt.show()
print(f"after 30 steps λ is {float(info.damping):.2g}, the length of the step {float(info.alpha):.2f}")

# %%
# Next: :doc:`/jax` has what counts as a layer in linen, nnx, Haiku and Equinox, several devices, and a likelihood of
# your own.
