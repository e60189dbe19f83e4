"""Algorithm 2 in JAX steps every network: all kinds of layers, what has none, parameters in any order."""

from collections import OrderedDict
from functools import partial

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest

import kfaclinalg_jax
from kfaclinalg import kfac_report
from kfaclinalg_jax import KFAC, Network
from kfaclinalg_jax._problem import NetworkProblem

KEY = jax.random.key(0)
WHOLE = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
X = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (32, 8)))


@pytest.mark.parametrize("name", ["scanned_layers", "convolutions", "composed_weights"])
def test_every_kind_of_layer_is_stepped(name):
    """Stacks, convolutions, scales, and what has no layer: the loss falls, and W goes back to where it was."""
    f, held, x, _, _ = getattr(jax_models, name)()
    shape = jax.eval_shape(f, held, x).shape
    y = jax.random.normal(KEY, shape)
    net = Network(f, "gaussian", example=(held, x))
    kfac = KFAC(net, damping=0.1, **WHOLE)
    jax.tree.map(np.testing.assert_array_equal, kfac.weights.params(kfac.weights.of(held)), held)
    loss = jax.jit(lambda p: net.likelihood.loss(f(p, x), y))
    moved, _, info = kfac.step(held, kfac.init(held), x, y, KEY)
    assert kfac_report(info).refused == ""
    assert loss(moved) < 0.95 * loss(held)


def test_a_parameter_without_entries_stays_as_it_is():
    held = {"W": jnp.ones((8, 2)), "none": jnp.zeros((0, 3))}
    net = Network(lambda p, x: x @ p["W"], "gaussian", example=(held, X))
    kfac = KFAC(net, **WHOLE)
    moved = jax.eval_shape(lambda: kfac.step(held, kfac.init(held), X, X[:, :2], KEY)[0])
    assert moved["none"].shape == (0, 3)
    tx = kfaclinalg_jax.precondition(net)
    updates = jax.eval_shape(lambda: tx.update(held, tx.init(held), held)[0])
    assert updates["none"].shape == (0, 3)


def test_parameters_may_come_in_another_order():
    held = {"b": jnp.ones((8, 8)), "a": jnp.eye(8)}
    kfac = KFAC(Network(lambda p, x: jnp.tanh(x @ p["b"]) @ p["a"], "gaussian", example=(held, X)), **WHOLE)
    moved = [kfac.step(p, kfac.init(p), X, X, KEY)[0] for p in (held, OrderedDict(held))]
    jax.tree.map(np.testing.assert_array_equal, *moved)


@pytest.mark.parametrize("N", [8, 6])
def test_a_subset_of_the_examples_leaves_what_counts_no_examples(N):
    """An input as wide as there are examples too."""
    x, shift = X[:N], jnp.arange(8.0)
    held = jax_models.params(W=(8, 3), b=(3,), V=(3, 8))

    def f(p, x):
        return jnp.tanh(x @ p["W"] + p["b"]) @ p["V"]

    options = WHOLE | {"curvature_fraction": 0.5, "statistics_fraction": 0.5}
    made = [
        KFAC(Network(lambda p, x, s: f(p, x - s), "bernoulli", example=(held, x, shift)), **options),
        KFAC(Network(lambda p, x: f(p, x - shift), "bernoulli", example=(held, x)), **options),
    ]
    inputs = (x, shift), x
    moved = [k.step(held, k.init(held), given, x, KEY)[0] for k, given in zip(made, inputs, strict=True)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), *moved)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_what_is_left_of_a_good_fit_is_exact_in_float32(likelihood):
    """p - y and 1 - p have few digits of a p near 1: ∇h and the exact Fisher take them from z."""
    x, held = jax.random.normal(KEY, (32, 4)), {"W": 6 * jnp.eye(4), "b": jnp.zeros(4)}
    x, held = jax.tree.map(lambda a: a.astype(jnp.float32), (x + 2 * jnp.sign(x), held))
    y = jnp.argmax(x, 1) if likelihood == "categorical" else (x > 0).astype(jnp.float32)

    net = Network(lambda p, x: x @ p["W"] + p["b"], likelihood, example=(held, x))
    kfac = KFAC(net, **WHOLE)
    W = kfac.weights.of(held)
    problem = NetworkProblem(net, kfac.weights, (x, y, KEY), kfac.options, 1.0)
    came = problem.loss_and_gradient(W)[1][0], problem.curvature_gram(W, [W])

    a = np.c_[np.asarray(x, np.float64), np.ones(len(x))]
    z = a[:, :-1] @ np.asarray(held["W"], np.float64)
    if likelihood == "categorical":
        p, y = np.exp(z) / np.exp(z).sum(1, keepdims=True), np.eye(4)[y]
        F = [np.diag(q) - np.outer(q, q) for q in p]
    else:
        p = 1 / (1 + np.exp(-z))
        F = [np.diag(q * (1 - q)) for q in p]
    exact = (p - np.asarray(y)).T @ a / len(x), np.mean([t @ M @ t for t, M in zip(z, F, strict=True)])  # J W = z
    for one, other in zip(came, exact, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
