"""What the preconditioner of optax refuses: numbers that are not finite, in the program; mistakes, at once."""

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
from jax_steps import KEY, network, stepper

from kfaclinalg import Tridiagonal
from kfaclinalg_jax import Network, Relative, precondition
from kfaclinalg_jax._inverses import are_finite


def test_a_batch_of_nan_is_refused_in_the_program():
    net, params, x, y = network()
    tx = precondition(net)
    step, state = stepper(net, tx, y), tx.init(params)
    params, state, _ = step(params, state, x, KEY)
    after, refused, _ = step(params, state, x.at[0, 0].set(jnp.nan), KEY)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, refused.averages, state.averages)
    assert (int(refused.rejected), int(refused.taken), int(refused.step)) == (1, 1, 2)
    again, state, _ = step(after, refused, x, KEY)
    assert all(jnp.isfinite(p).all() for p in again.values())
    assert (int(state.rejected), step._cache_size()) == (1, 1)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_entry_that_is_not_finite_is_seen_and_the_largest_number_is(bad):
    shapes = [(3, 2), (2, 4, 1), (5,), ()]
    largest = [jnp.full(shape, jnp.finfo(jnp.float32).max, jnp.float32) for shape in shapes]
    assert are_finite(largest)
    assert are_finite([])
    for i, x in enumerate(largest):
        for place in np.ndindex(x.shape):
            assert not are_finite([*largest[:i], x.at[place].set(bad), *largest[i + 1 :]])


def test_a_layer_that_fails_keeps_its_inverse_beside_one_that_does_not():
    """Both are of one group, and go up the ladder together."""
    params, x = {"V": 0.1 * jnp.eye(3), "W": 0.1 * jnp.eye(3)}, jax_models.inputs(3)
    net = Network(lambda p, x: jnp.tanh(x @ p["V"]) @ p["W"], "gaussian", example=(params, x))
    statistics = net.value_grad_and_statistics(params, x, x, key=KEY)[2]
    singular = statistics.moments | {"V": statistics.moments["V"]._replace(G=jnp.ones((3, 3)))}
    tx = precondition(net, damping=0.0, decay=0.0, inverse_period=1)
    before = tx.update(params, tx.init(params), statistics=statistics)[1]
    after = tx.update(params, before, statistics=statistics._replace(moments=singular))[1]
    (old,), (new,) = before.inverses, after.inverses
    np.testing.assert_array_equal(new.failures, [1, 0])
    np.testing.assert_array_equal(new.operator.B, old.operator.B)
    assert new.ready.all()
    assert tx.update(params, after, statistics=statistics)[1].inverses[0].failures.sum() == 0


def test_an_inverse_that_fails_climbs_the_ladder_or_stays():
    """G is singular without damping: 0 times any number is 0, a millionth of eps is enough from the third rung on."""
    net, params, x, y = network()
    statistics = net.value_grad_and_statistics(params, x, y, key=KEY)[2]
    one = {name: M._replace(G=jnp.ones_like(M.G)) for name, M in statistics.moments.items()}
    gradient = jax.tree.map(jnp.ones_like, params)
    for damping, failures in ((0.0, 1), (1e-32, 0)):
        tx = precondition(net, damping=damping)
        updates, state = tx.update(gradient, tx.init(params), statistics=statistics._replace(moments=one))
        assert all(int(inverse.failures.sum()) == failures for inverse in state.inverses)
        assert all(jnp.isfinite(u).all() for u in updates.values())


def test_parameters_in_half_precision_keep_their_dtype():
    f, params, x, _, _ = jax_models.mlp()
    params, x = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    net = Network(f, "categorical", example=(params, x))
    tx = precondition(net)
    after, state, _ = stepper(net, tx, jnp.asarray([0, 1, 1, 0]))(params, tx.init(params), x, KEY)
    assert {p.dtype for p in after.values()} == {jnp.dtype(jnp.bfloat16)}
    assert state.averages[0].A.dtype == jnp.float32


def test_mistakes_in_the_options():
    net, *_ = network()
    for options, error, match in [
        ({"structure": Tridiagonal()}, ValueError, "takes no links"),
        ({"structure": "eigen"}, ValueError, "keep='rows'"),
        ({"statistics_period": 1.5}, ValueError, "statistics_period is 1.5"),
        ({"decay": 1.0}, ValueError, r"decay is 1.0, expected a number in \[0, 1\)"),
        ({"damping": -1.0}, ValueError, "damping is -1.0"),
        ({"length": "long"}, TypeError, "length is 'long'"),
        ({"damping": Relative}, TypeError, "damping is .*Relative.*, expected a number or a function"),
        ({"kl_lr": 0.1}, ValueError, "without kl_clip"),
        ({"kl_clip": 0.1, "length": 0.1}, ValueError, "beside length"),
    ]:
        with pytest.raises(error, match=match):
            precondition(net, **options)
    with pytest.raises(ValueError, match="fraction is -1"):
        Relative(-1)
    with pytest.raises(TypeError, match="sampling is"):
        Relative(0.1, sampling=None)
    with pytest.raises(TypeError, match="net is a function, expected a Network"):
        precondition(lambda p, x: x)


def test_statistics_that_are_none_of_this_network():
    f, params, x, _, _ = jax_models.mlp()
    y = jnp.zeros(len(x), int)

    def of(params, x, f=f, **options):
        net = Network(f, "categorical", example=(params, x), **options)
        return net, net.value_grad_and_statistics(params, x, y, key=KEY)[2]

    (net, _), (_, own) = of(params, x, keep="rows"), of(params, x)
    wider = params | {"W": jnp.ones((4, 5))}
    for options, came, error, match in (
        ({}, own.moments, TypeError, "statistics is a dict, expected the Statistics of Network"),
        ({}, of({"other": params["W"]}, x, lambda p, x: x @ p["other"])[1], ValueError,
         r"statistics has other.A \(3, 3\) float64, other.G .* and lacks V.A \(6, 6\) float64, .*, expected those of "),
        ({}, of(wider, jax_models.inputs(4))[1], ValueError, r"has W.A \(5, 5\) float64 and lacks W.A \(4, 4\) "),
        ({"structure": "eigen"}, own, ValueError, r"no rows, expected those of a Network\(..., keep='rows'\)"),
    ):  # fmt: skip
        tx = precondition(net, **options)
        with pytest.raises(error, match=match):
            tx.update(params, tx.init(params), params, statistics=came)


def test_trees_that_are_none_of_this_network():
    """Nothing is passed by in silence: a layer that is not found would be left alone."""
    net, params, *_ = network()
    tx, eigen = precondition(net), precondition(network(keep="rows")[0], structure="eigen")
    state, part = tx.init(params), {name: params[name] for name in "Wb"}
    nested = r"has net.V \(5, 2\), net.W .* and lacks V \(5, 2\), W .*, expected parameters of the network"
    turned = r"has W \(5, 3\) and lacks W \(3, 5\), expected parameters of the network"
    for call, error, match in (
        (lambda: tx.init({"net": params}), ValueError, f"params {nested}"),
        (lambda: tx.init(params | {"W": params["W"].T}), ValueError, f"params {turned}"),
        (lambda: optax.flatten(tx).init(params), ValueError, r"params has  \(32,\) and lacks V"),
        (lambda: tx.update({"net": params}, state), ValueError, f"the gradient {nested}"),
        (lambda: tx.update(params | {"W": params["W"].T}, state), ValueError, f"the gradient {turned}"),
        (lambda: tx.update(params | {"z": jnp.ones(2)}, state), ValueError, r"the gradient has z \(2,\), expected"),
        (
            lambda: tx.update(part, state),
            ValueError,
            "expected that of init for parameters without V, c, like the grad",
        ),
        (lambda: tx.update(params, tx.init(part)), ValueError, r"lacks averages.0.A .* init for all parameters"),
        (lambda: tx.update(params, eigen.init(params)), ValueError, "state has inverses.0.operator.Q_A"),
        (lambda: tx.update(params, ()), TypeError, "state is a tuple, expected the PreconditionState of init"),
    ):
        with pytest.raises(error, match=match):
            call()
