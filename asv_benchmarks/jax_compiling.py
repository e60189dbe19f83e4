"""Seconds to compile a step of 24 equal layers over those of 6, of the processor; the shapes are the same.

python asv_benchmarks/jax_compiling.py
"""

import time

import jax
import jax.numpy as jnp
import optax

from kfaclinalg_jax import Network, precondition


def f(params, x):
    for W, b in params:
        x = jnp.tanh(x @ W + b)
    return x


def seconds(depth):
    params, x, key = [(jnp.eye(64), jnp.zeros(64))] * depth, jnp.ones((32, 64)), jax.random.key(0)
    net = Network(f, "gaussian", example=(params, x))
    tx = optax.chain(precondition(net), optax.sgd(0.3, momentum=0.9))

    def step(params, state):
        (loss, _), gradient, statistics = net.value_grad_and_statistics(params, x, x, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    start = time.process_time()
    jax.jit(step).lower(params, tx.init(params)).compile()
    return time.process_time() - start


if __name__ == "__main__":
    seconds(2)  # what comes first warms up
    print(f"{1 / seconds(6) * seconds(24):.2f}")
