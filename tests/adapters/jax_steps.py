"""A small network, and one step of a loop of optax."""

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import optax

from kfaclinalg_jax import Network

KEY = jax.random.key(2)


def stepper(net, tx, y):
    """One step of a loop, compiled."""

    @jax.jit
    def step(params, state, x, key):
        (loss, _), gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics)
        return optax.apply_updates(params, updates), state, loss

    return step


def network(**options):
    f, params, x, _, _ = jax_models.mlp()
    return Network(f, "categorical", example=(params, x), **options), params, x, jnp.asarray([0, 1, 1, 0])


def compiled(net, tx):
    """The two halves of such a step, for those that look between them."""
    return jax.jit(net.value_grad_and_statistics), jax.jit(tx.update)
