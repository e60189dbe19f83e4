"""The preconditioner of optax: the other adapter's updates, what it composes with, and what makes it compile."""

import math
import re
from functools import partial

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
import torch
from jax_steps import KEY, network, stepper
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


COMPOSITIONS = {
    "a schedule": lambda net: optax.chain(precondition(net), optax.sgd(optax.cosine_decay_schedule(0.3, 20))),
    "masked": lambda net: optax.chain(optax.masked(precondition(net), {"W": True, "b": True, "V": False, "c": False}),
                                      optax.sgd(0.1)),
    "partition": lambda net: optax.partition(
        {"kfac": optax.chain(precondition(net), optax.sgd(0.3)), "adam": optax.adam(1e-2)},
        {"W": "kfac", "b": "kfac", "V": "adam", "c": "adam"}),
    "MultiSteps": lambda net: optax.MultiSteps(optax.chain(precondition(net), optax.sgd(0.3)), 2),
    "inject_hyperparams": lambda net: optax.chain(
        optax.inject_hyperparams(precondition)(net, damping=optax.linear_schedule(1.0, 0.1, 10)), optax.sgd(0.1)),
    "inject_hyperparams of the clip": lambda net: optax.chain(
        optax.inject_hyperparams(precondition)(net, damping=0.1, kl_clip=1e-2, kl_lr=0.1), optax.sgd(0.1)),
    "apply_if_finite": lambda net: optax.apply_if_finite(optax.chain(precondition(net), optax.adamw(1e-2)), 3),
    "a damping that falls": lambda net: optax.chain(
        precondition(net, damping=lambda k: Relative(0.5 / (1.0 + k))), optax.sgd(0.3, momentum=0.9, nesterov=True)),
}  # fmt: skip


@pytest.mark.parametrize("compose", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_it_composes_and_compiles_once(compose):
    net, params, x, y = network()
    tx = compose(net)
    step, state = stepper(net, tx, y), tx.init(params)
    first = None
    for i in range(20):
        params, state, loss = step(params, state, x, jax.random.key(i))
        first = loss if first is None else first
    assert loss < first
    assert step._cache_size() == 1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", Exact(), LowRank(3)])
def test_the_sampling_error_of_the_averages_is_added_to_a_relative_damping(structure):
    """Three batches of 40, 8 and 24 with the weights 0.3, 0.3 and 0.4: of one layer it is a larger fraction."""
    rows, (n, m) = 1 / (0.3**2 / 40 + 0.3**2 / 8 + 0.4**2 / 24), (4, 3)
    fraction = math.sqrt((0.1 + (n - 1) / rows) * (0.1 + (m - 1) / rows))
    params = {"W": jax.random.normal(KEY, (n, m))}
    net = Network(lambda p, x: x @ p["W"], "gaussian", example=(params, jnp.ones((5, n))), keep="rows")
    options = {"structure": structure, "decay": 0.6, "statistics_period": 1, "inverse_period": 1, "length": None}
    found = []
    for damping in (Relative(0.1), Relative(fraction, sampling=False)):
        tx = precondition(net, damping, **options)
        state = tx.init(params)
        for N in (40, 8, 24):
            x = jax.random.normal(jax.random.key(N), (N, n))
            _, gradient, statistics = net.value_grad_and_statistics(params, x, jnp.ones((N, m)), key=KEY)
            updates, state = tx.update(gradient, state, statistics=statistics)
        found.append(updates)
    np.testing.assert_allclose(found[0]["W"], found[1]["W"], rtol=1e-9)


def test_the_steps_of_a_group_of_batches_are_those_of_their_mean():
    """`MultiSteps` takes the statistics of the last of them, and accumulates in float32."""
    net, params, x, y = network(estimator="exact")
    inner = optax.chain(precondition(net, damping=0.1), optax.sgd(0.3, momentum=0.9))
    tx = optax.MultiSteps(inner, 2)
    came, expected = (params, tx.init(params)), (params, inner.init(params))
    for i in range(3):
        seen = []
        for factor in (1.0, 2.0 + i):
            _, gradient, statistics = net.value_grad_and_statistics(came[0], factor * x, y, key=KEY)
            updates, state = tx.update(gradient, came[1], came[0], statistics=statistics)
            came = optax.apply_updates(came[0], updates), state
            seen.append(gradient)
        mean = jax.tree.map(lambda *g: sum(g) / 2, *seen)
        updates, state = inner.update(mean, expected[1], expected[0], statistics=statistics)
        expected = optax.apply_updates(expected[0], updates), state
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), came[0], expected[0])


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_an_ensemble_takes_the_steps_of_its_members(structure):
    """One of which is not finite, and refused alone."""
    net, params, x, y = network(keep="rows" if structure == "eigen" else "moments")
    tx = optax.chain(precondition(net, structure=structure, inverse_period=2), optax.sgd(0.3, momentum=0.9))
    step = stepper(net, tx, y)
    members = [params, jax.tree.map(lambda p: p / 2, params), params | {"V": params["V"] * jnp.nan}]
    states = [tx.init(member) for member in members]
    together = tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (members, states))
    for i in range(3):
        *together, _ = jax.vmap(step, in_axes=(0, 0, None, None))(*together, x, jax.random.key(i))
        pairs = [step(*pair, x, jax.random.key(i))[:2] for pair in zip(members, states, strict=True)]
        members, states = zip(*pairs, strict=True)
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), together[0], expected)
    np.testing.assert_array_equal(together[1][0].rejected > 0, [False, False, True])


def test_the_weights_of_an_average_are_as_precise_as_what_they_weigh():
    net, params, x, y = network()
    tx = precondition(net, statistics_period=1, decay=0.6)
    state, expected = tx.init(params), None
    for i, epsilon in enumerate([0, 1 / 2, 0.6, 0.6]):
        _, gradient, statistics = net.value_grad_and_statistics(params, (1 + i) * x, y, key=KEY)
        _, state = tx.update(gradient, state, params, statistics=statistics)
        new = statistics.moments["W"].A
        expected = new if i == 0 else epsilon * expected + (1 - epsilon) * new
    (found,) = [M.A[0] for M in state.averages if M.A.shape[-1] == len(expected)]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_a_clip_to_nothing_leaves_a_gradient_of_zero():
    net, params, x, y = network()
    tx = precondition(net, 0.1, kl_clip=0.0)
    _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    updates, _ = tx.update(zeros, tx.init(params), params, statistics=statistics)
    assert not any(u.any() for u in jax.tree.leaves(updates))


def test_a_step_may_be_given_its_state():
    """Every array of it once: one that came twice could not be donated."""
    net, params, x, y = network()
    tx = optax.chain(precondition(net), optax.sgd(0.3, momentum=0.9))
    _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
    step = jax.jit(lambda state: tx.update(gradient, state, params, statistics=statistics), donate_argnums=0)
    given = tx.init(params)
    step(given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_a_run_resumes_from_numpy_arrays():
    """Of a pickle, say; without `jit` too."""
    net, params, x, y = network()
    tx = precondition(net)
    _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
    _, state = tx.update(gradient, tx.init(params), params, statistics=statistics)
    expected = tx.update(gradient, state, params, statistics=statistics)
    gradient, state, statistics = jax.device_get((gradient, state, statistics))
    came = tx.update(gradient, state, params, statistics=statistics)
    jax.tree.map(np.testing.assert_array_equal, came, expected)


def test_a_step_without_statistics_is_one_where_none_is_due():
    """And what is not used of `value_grad_and_statistics` is not computed."""
    net, params, x, y = network()
    tx = optax.chain(precondition(net, statistics_period=4), optax.sgd(0.3, momentum=0.9))

    def step(params, state, key, takes):
        _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics if takes else None)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, static_argnames="takes")
    always, sometimes = (params, tx.init(params)), (params, tx.init(params))
    for i in range(9):
        key = jax.random.key(i)
        always, sometimes = step(*always, key, True), step(*sometimes, key, i % 4 == 0)
        jax.tree.map(np.testing.assert_allclose, sometimes, always)
    flops = [step.lower(*always, KEY, takes).compile().cost_analysis()["flops"] for takes in (False, True)]
    assert flops[0] < flops[1]


def test_what_is_masked_is_left_alone():
    net, params, x, y = network()
    tx = optax.masked(precondition(net), {"W": True, "b": True, "V": False, "c": False})
    _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
    updates, _ = tx.update(gradient, tx.init(params), params, statistics=statistics)
    whole = precondition(net)
    expected, _ = whole.update(gradient, whole.init(params), params, statistics=statistics)
    jax.tree.map(np.testing.assert_array_equal, updates, expected | {name: gradient[name] for name in "Vc"})


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_of_nnx_takes_the_statistics():
    nnx = jax_models.library("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    x, y = jax_models.inputs(3), jnp.asarray([0, 1, 1, 0])
    net = Network(lambda p, x: nnx.merge(graph, p)(x), "categorical", example=(params, x))
    tx = optax.chain(precondition(net), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        _, params = nnx.split(model, nnx.Param)
        _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
        optimizer.update(model, gradient, statistics=statistics)

    params = jax.tree.map(jnp.copy, params)  # those of the model change in place
    _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=KEY)
    updates, _ = tx.update(gradient, tx.init(params), params, statistics=statistics)
    expected = optax.apply_updates(params, updates)
    step(model, optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), nnx.split(model, nnx.Param)[1], expected)


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

    assert calls(24) == calls(6)
    assert calls(6)[0] > 0


def test_the_matrix_products_of_a_step_are_those_of_the_algebra():
    """A layer more: one forward, two for the gradient, one for the sampled gradients, A and G; none to precondition."""

    def products(depth):
        text = lowered(depth)
        return len(re.findall(r"dot_general .*, tensor<\d+x\d+x\w+>\) ->", text))  # not those with a vector

    shallow, deep = products(2), products(5)
    assert deep - shallow == 3 * 6
    assert shallow <= 6 * 2 - 2 + 4  # no gradient of the inputs, twice; two to apply and two to invert
