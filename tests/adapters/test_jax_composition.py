"""The preconditioner of optax beside what is around it: optax's other transformations, JAX's own, a library's loop."""

from functools import partial

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
from jax_steps import KEY, compiled, network, stepper

from kfaclinalg_jax import Network, Relative, precondition

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


def test_the_steps_of_a_group_of_batches_are_those_of_their_mean():
    """`MultiSteps` takes the statistics of the last of them, and accumulates in float32."""
    net, params, x, y = network(estimator="exact")
    inner = optax.chain(precondition(net, damping=0.1), optax.sgd(0.3, momentum=0.9))
    tx = optax.MultiSteps(inner, 2)
    came, expected = (params, tx.init(params)), (params, inner.init(params))
    (measure, update), step = compiled(net, tx), jax.jit(inner.update)
    for i in range(3):
        seen = []
        for factor in (1.0, 2.0 + i):
            _, gradient, statistics = measure(came[0], factor * x, y, key=KEY)
            updates, state = update(gradient, came[1], came[0], statistics=statistics)
            came = optax.apply_updates(came[0], updates), state
            seen.append(gradient)
        mean = jax.tree.map(lambda *g: sum(g) / 2, *seen)
        updates, state = step(mean, expected[1], expected[0], statistics=statistics)
        expected = optax.apply_updates(expected[0], updates), state
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), came[0], expected[0])


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_an_ensemble_takes_the_steps_of_its_members(structure):
    """One of which is not finite, and refused alone."""
    net, params, x, y = network(keep="rows" if structure == "eigen" else "moments")
    tx = optax.chain(precondition(net, structure=structure, inverse_period=2), optax.sgd(0.3, momentum=0.9))
    step = stepper(net, tx, y)
    every = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))
    members = [params, jax.tree.map(lambda p: p / 2, params), params | {"V": params["V"] * jnp.nan}]
    states = [tx.init(member) for member in members]
    together = tuple(jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (members, states))
    for i in range(3):
        *together, _ = every(*together, x, jax.random.key(i))
        pairs = [step(*pair, x, jax.random.key(i))[:2] for pair in zip(members, states, strict=True)]
        members, states = zip(*pairs, strict=True)
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), together[0], expected)
    np.testing.assert_array_equal(together[1][0].rejected > 0, [False, False, True])


@pytest.fixture(scope="module")
def measured():
    """The usual network and its parameters, with the gradient and the statistics of one batch."""
    net, params, x, y = network()
    return net, params, *jax.jit(net.value_grad_and_statistics)(params, x, y, key=KEY)[1:]


def test_a_step_may_be_given_its_state(measured):
    """Every array of it once: one that came twice could not be donated."""
    net, params, gradient, statistics = measured
    tx = optax.chain(precondition(net), optax.sgd(0.3, momentum=0.9))
    step = jax.jit(lambda state: tx.update(gradient, state, params, statistics=statistics), donate_argnums=0)
    given = tx.init(params)
    step(given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def test_a_run_resumes_from_numpy_arrays():
    """Of a pickle, say; without `jit` too."""
    params, x = {"W": jnp.ones((3, 2))}, jax_models.inputs(3)
    net = Network(lambda p, x: x @ p["W"], "gaussian", example=(params, x))
    measure, update = compiled(net, tx := precondition(net))
    _, gradient, statistics = measure(params, x, x[:, :2], key=KEY)
    _, state = update(gradient, tx.init(params), params, statistics=statistics)
    expected = update(gradient, state, params, statistics=statistics)
    gradient, state, statistics = jax.device_get((gradient, state, statistics))
    came = update(gradient, state, params, statistics=statistics)
    jax.tree.map(np.testing.assert_array_equal, came, expected)
    came = tx.update(gradient, state, params, statistics=statistics)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), came, expected)


def test_a_step_without_statistics_is_one_where_none_is_due():
    """And what is not used of `value_grad_and_statistics` is not computed."""
    net, params, x, y = network()
    tx = optax.chain(precondition(net, statistics_period=4), optax.sgd(0.3, momentum=0.9))

    def step(params, state, key, takes):
        _, gradient, statistics = net.value_grad_and_statistics(params, x, y, key=key)
        updates, state = tx.update(gradient, state, params, statistics=statistics if takes else None)
        return optax.apply_updates(params, updates), state

    always, sometimes = (params, tx.init(params)), (params, tx.init(params))
    without, step = (jax.jit(partial(step, takes=takes)).lower(*always, KEY).compile() for takes in (False, True))
    for i in range(9):
        key = jax.random.key(i)
        always, sometimes = step(*always, key), (without if i % 4 else step)(*sometimes, key)
        jax.tree.map(np.testing.assert_allclose, sometimes, always)
    assert without.cost_analysis()["flops"] < step.cost_analysis()["flops"]


def test_what_is_masked_is_left_alone(measured):
    net, params, gradient, statistics = measured
    whole = precondition(net)
    updates, expected = (
        jax.jit(tx.update)(gradient, tx.init(params), params, statistics=statistics)[0]
        for tx in (optax.masked(whole, {"W": True, "b": True, "V": False, "c": False}), whole)
    )
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
    measure, update = compiled(net, tx)
    _, gradient, statistics = measure(params, x, y, key=KEY)
    updates, _ = update(gradient, tx.init(params), params, statistics=statistics)
    expected = optax.apply_updates(params, updates)
    step(model, optimizer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), nnx.split(model, nnx.Param)[1], expected)
