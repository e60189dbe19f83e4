"""What stands around the layers of a function: how its rows are laid out, of which numbers, and what else it does."""

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
from jax import lax

from kfaclinalg_jax import Network

KEY = jax.random.key(2)


def image(x, K):
    return lax.conv_general_dilated(x, K, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


MIXED = {
    "time comes first": lambda p, x: (x.swapaxes(0, 1).reshape(-1, 3) @ p["W"] * p["s"]).reshape(2, -1, 3)[0],
    "two inputs in one": lambda p, x: sum(jnp.split(jnp.concatenate([x[:, 0], x[:, 1]]) @ p["W"] * p["s"], 2)),
    "frames of images": lambda p, x: jax.vmap(image, (1, None), 1)(x[..., None], p["K"]).sum((1, 2)),
    "half of a batch": lambda p, x: jnp.concatenate([x[: len(x) // 2, 0] @ p["W"], x[len(x) // 2 :, 0]]),
}


@pytest.mark.parametrize("f", MIXED.values(), ids=MIXED)
def test_rows_of_several_examples_are_of_none(f):
    """Where the rows of an example are not side by side no gradient of it is taken."""
    params, x = jax_models.params(W=(3, 3), K=(2, 1, 3), s=(3,)), jax_models.inputs(2, 3)
    net = Network(f, "gaussian", example=(params, x), keep="rows")
    assert len(net.layers) == 1
    statistics = jax.eval_shape(lambda: net.value_grad_and_statistics(params, x, f(params, x), key=KEY)[2])
    assert not statistics.rows


def scaled(p, x):
    return (x[..., None] * (p["s"] * jnp.arange(6.0).reshape(2, 3)).T).sum(1) @ p["W"]


def printed(p, x):
    h = x @ p["W"]
    jax.debug.callback(lambda h: None, h)
    return h


def only_four(p, x):
    assert len(x) == 4
    return x @ p["W"]


def spectrum(p, x):
    return x @ p["W"] + jnp.fft.irfft(jnp.fft.rfft(x) @ p["s"], n=2)


@pytest.mark.parametrize(("f", "skipped"), [(scaled, ["s"]), (printed, []), (only_four, []), (spectrum, ["s"])])
def test_what_is_around_a_layer(f, skipped):
    """Entries that are turned after a product, a result that is shown, one size of batch, complex numbers."""
    shapes = {"W": (2 if f is scaled else 3, 2)} | ({"s": (2, 3) if f is scaled else (2, 2)} if skipped else {})
    params, x = jax_models.params(**shapes), jax_models.inputs(3)
    net = Network(f, "gaussian", example=(params, x))
    assert (list(net.layers), list(net.skipped)) == (["W"], skipped)
    net.check(params, x)


def test_a_number_is_a_parameter():
    """Its weak type makes a program of its own."""
    params, x = {"W": jnp.ones((3, 2)), "t": 1.5}, jax_models.inputs(3)
    net = Network(lambda p, x: x @ p["W"] * p["t"], "gaussian", example=(params, x))
    assert list(net.layers) == ["W", "t"]
    net.check(params, x)
    jax.eval_shape(lambda: net.value_grad_and_statistics(params, x, jnp.ones((4, 2)), key=KEY))
    net.value_grad_and_statistics(params, x, jnp.ones((4, 2)), key=KEY)


def test_an_index_that_is_clipped_is_that_of_the_last_row():
    params, x = jax_models.params(E=(5, 2)), jnp.asarray([[0, 7], [1, 2], [9, 9], [3, 4]])
    net = Network(lambda p, x: p["E"].at[x].get(mode="clip").sum(1), "gaussian", example=(params, x))
    net.check(params, x)


def test_one_output_needs_no_dimension_of_its_own():
    params, x, y = {"w": jnp.ones(3)}, jax_models.inputs(3), jnp.ones(4)
    nets = [Network(f, "bernoulli", example=(params, x), estimator="exact") for f in
            (lambda p, x: x @ p["w"], lambda p, x: (x @ p["w"])[:, None])]  # fmt: skip
    came, expected = (
        net.value_grad_and_statistics(params, x, y, key=KEY)[2].moments["w"]
        for net, y in zip(nets, (y, y[:, None]), strict=True)
    )
    np.testing.assert_allclose(came.G, expected.G, rtol=1e-12)


def test_check_knows_the_precision_of_the_rows():
    f, params, x, _, _ = jax_models.mlp()
    low = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)  # noqa: E731
    wide = lambda p, x: jnp.matmul(*low((x, p["W"])), preferred_element_type=float) @ p["V"]  # noqa: E731
    for g in (lambda p, x: f(low(p), low(x)).astype(float), wide):
        Network(g, "gaussian", example=(params, x)).check(params, x)
