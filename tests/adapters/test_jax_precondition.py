"""The preconditioner of optax: the updates of the other adapter, and programs of no more than the algebra asks for."""

import math
import re
from functools import cache

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
import torch
from jax_steps import KEY, compiled, network, stepper
from jax_torch import Texts, as_params, texts
from torch import nn

from kfaclinalg import Exact, LowRank
from kfaclinalg_jax import Network, Relative, precondition
from kfaclinalg_torch import KFACPreconditioner
from kfaclinalg_torch import Relative as TorchRelative


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": "eigen"},
        {"structure": Exact(), "inverse_period": 2, "statistics_period": 3},
        {"structure": LowRank(2), "damping": Relative(0.01), "length": 0.01},
        {"structure": Exact(), "damping": Relative(0.3, sampling=False)},
        {"damping": 0.1, "kl_clip": 1e-4, "inverse_period": 3},
    ],
    ids=",".join,
)
def test_the_updates_are_those_of_the_other_adapter(options):
    model, x = Texts(), torch.randint(7, (10, 6, 3))
    y = torch.randint(5, (6, 3))
    params = as_params(model)
    theirs = {k: TorchRelative(v.fraction, v.sampling) if isinstance(v, Relative) else v for k, v in options.items()}
    preconditioner = KFACPreconditioner(model, likelihood="categorical", estimator="exact", **theirs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    keep = "rows" if options.get("structure") == "eigen" else "moments"
    inputs, targets = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    net = Network(texts, "categorical", example=(params, inputs[0]), estimator="exact", keep=keep)
    tx = optax.chain(precondition(net, **options), optax.sgd(0.3, momentum=0.9))
    step, state = stepper(net, tx, targets), tx.init(params)
    for i in range(10):
        optimizer.zero_grad()
        outputs = model(x[i])
        preconditioner.update(outputs)
        (nn.functional.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum") / len(outputs)).backward()
        preconditioner.step()
        optimizer.step()
        params, state, _ = step(params, state, inputs[i], KEY)
    assert step._cache_size() == 1
    for name, p in as_params(model).items():
        np.testing.assert_allclose(params[name], p, rtol=1e-9, atol=1e-9, err_msg=name)


SHAPE, ROWS = (4, 3), (40, 8, 24)


@cache
def batches(keep):
    """A network of one layer, its parameters, and the gradient and statistics of so many rows."""
    n, m = SHAPE
    params = {"W": jax.random.normal(KEY, (n, m))}
    net = Network(lambda p, x: x @ p["W"], "gaussian", example=(params, jnp.ones((5, n))), keep=keep)
    inputs = [jax.random.normal(jax.random.key(N), (N, n)) for N in ROWS]
    return net, params, [net.value_grad_and_statistics(params, x, jnp.ones((len(x), m)), key=KEY)[1:] for x in inputs]


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", Exact(), LowRank(3)])
def test_the_sampling_error_of_the_averages_is_added_to_a_relative_damping(structure):
    """Three batches of 40, 8 and 24 with the weights 0.3, 0.3 and 0.4: of one layer it is a larger fraction."""
    rows, (n, m) = 1 / (0.3**2 / 40 + 0.3**2 / 8 + 0.4**2 / 24), SHAPE
    fraction = math.sqrt((0.1 + (n - 1) / rows) * (0.1 + (m - 1) / rows))
    net, params, seen = batches("rows" if structure == "eigen" else "moments")
    options = {"structure": structure, "decay": 0.6, "statistics_period": 1, "inverse_period": 1, "length": None}
    found = []
    for damping in (Relative(0.1), Relative(fraction, sampling=False)):
        tx = precondition(net, damping, **options)
        update, state = jax.jit(tx.update), tx.init(params)
        for gradient, statistics in seen:
            updates, state = update(gradient, state, statistics=statistics)
        found.append(updates)
    np.testing.assert_allclose(found[0]["W"], found[1]["W"], rtol=1e-9)


def test_the_weights_of_an_average_are_as_precise_as_what_they_weigh():
    net, params, x, y = network()
    tx = precondition(net, statistics_period=1, decay=0.6)
    (measure, update), state, expected = compiled(net, tx), tx.init(params), None
    for i, epsilon in enumerate([0, 1 / 2, 0.6, 0.6]):
        _, gradient, statistics = measure(params, (1 + i) * x, y, key=KEY)
        _, state = update(gradient, state, params, statistics=statistics)
        new = statistics.moments["W"].A
        expected = new if i == 0 else epsilon * expected + (1 - epsilon) * new
    (found,) = [M.A[0] for M in state.averages if M.A.shape[-1] == len(expected)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_a_clip_to_nothing_leaves_a_gradient_of_zero():
    net, params, x, y = network()
    tx = precondition(net, 0.1, kl_clip=0.0)
    measure, update = compiled(net, tx)
    _, gradient, statistics = measure(params, x, y, key=KEY)
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    updates, _ = update(zeros, tx.init(params), params, statistics=statistics)
    assert not any(u.any() for u in jax.tree.leaves(updates))


@cache
def lowered(depth):
    """A step of so many equal layers, as JAX gives it to XLA."""

    def f(p, x):
        for W, b in zip(p["W"], p["b"], strict=True):
            x = jnp.tanh(x @ W + b)
        return x

    params, x = {"W": [jnp.eye(3)] * depth, "b": [jnp.zeros(3)] * depth}, jax_models.inputs(3)
    net = Network(f, "gaussian", example=(params, x))
    tx = precondition(net)
    return stepper(net, tx, x).lower(params, tx.init(params), x, KEY).as_text()


def test_equal_layers_are_inverted_by_one_call():
    """So that compiling follows the shapes of the layers and not their number."""

    def calls(depth):
        text = lowered(depth)
        return len(re.findall(r"lapack_\w+", text)), len(re.findall(r"stablehlo\.(?:case|while)", text))

    assert calls(5) == calls(2)
    assert calls(2)[0] > 0


def test_the_matrix_products_of_a_step_are_those_of_the_algebra():
    """A layer more: one forward, two for the gradient, one for the sampled gradients, A and G; none to precondition."""

    def products(depth):
        text = lowered(depth)
        return len(re.findall(r"dot_general .*, tensor<\d+x\d+x\w+>\) ->", text))  # not those with a vector

    shallow, deep = products(2), products(5)
    assert deep - shallow == 3 * 6
    assert shallow <= 6 * 2 - 2 + 4  # no gradient of the inputs, twice; two to apply and two to invert
