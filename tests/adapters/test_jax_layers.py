"""The layers that are found in a function, whichever library wrote it, or that are said to be. Nothing needs torch."""

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
from jax import lax

from kfaclinalg_jax import Network, layer
from kfaclinalg_jax._problem import Weights

KEY = jax.random.key(2)


def shortened(layers, expected):
    """By the end of the path that the table has."""
    ends = {name: max((end for end in expected if name.endswith(end)), key=len, default=name) for name in layers}
    return {ends[name]: shape for name, shape in layers.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", jax_models.MODELS, ids=lambda model: model.__name__)
def test_every_parameter_has_a_layer_or_is_listed(model):
    f, params, x, layers, skipped = model()
    net = Network(f, "gaussian", example=(params, x))
    assert shortened(net.layers, layers) == layers
    assert list(net.skipped) == skipped
    assert all("jax_models.py:" in why or "JAX itself" in why for why in net.skipped.values())
    net.check(params, x)
    y = jnp.ones(jax.eval_shape(f, params, x).shape)
    statistics = jax.eval_shape(lambda p: net.value_grad_and_statistics(p, x, y, key=KEY), params)[2]
    assert statistics.moments.keys() >= net.layers.keys()


@pytest.mark.parametrize("name", ["a_convolution_turned", "attention"])
def test_the_matrices_go_back_to_the_parameters(name):
    f, params, x, _, _ = getattr(jax_models, name)()
    weights = Weights(Network(f, "gaussian", example=(params, x)))
    jax.tree.map(np.testing.assert_array_equal, weights.params(weights.of(params)), params)


def test_check_finds_a_gradient_that_is_none_of_products():
    """A rule that disagrees with its function, which is looked into as if it had none."""

    @jax.custom_jvp
    def dense(x, W):
        return x @ W

    dense.defjvp(lambda primals, tangents: (primals[0] @ primals[1], 2 * primals[0] @ tangents[1]))
    params, x = {"W": jnp.ones((3, 2))}, jax_models.inputs(3)
    net = Network(lambda p, x: dense(x, p["W"]), "gaussian", example=(params, x))
    with pytest.raises(ValueError, match=r"not the gradient.*'W'"):
        net.check(params, x)


@pytest.mark.parametrize("N", [3, 4])
@pytest.mark.parametrize("last", [False, True])
def test_an_input_may_be_as_long_as_there_are_examples(N, last):
    """The mean of a normalisation is no example where there are as many channels."""
    x, mean, weight = jax.random.normal(KEY, (N, 3)), jnp.ones(3), jnp.ones((N, 1))
    params = {"s": jnp.ones(3), "W": jnp.ones((3, 2))}

    def f(p, x, first, second):
        mean, weight = (second, first) if last else (first, second)
        return jnp.tanh((x - mean) * weight * p["s"]) @ p["W"]

    inputs = (x, weight, mean) if last else (x, mean, weight)
    net = Network(f, "gaussian", example=(params, *inputs))
    assert net.layers == {"W": (2, 3), "s": (3, 1, 1)}
    assert not net.skipped


def test_a_layer_is_what_the_user_says_it_is():
    """In a branch, under `vmap` and in a scan; a bias that is added after it belongs to it."""

    def hidden(x, W):
        return layer(lax.cond(True, lambda: x @ W, lambda: x @ W), inputs=x, weight=W)

    def f(p, x):
        x = jax.vmap(lambda x: jnp.tanh(hidden(x, p["W"]) + p["b"]))(x)
        return lax.scan(lambda x, V: (jnp.tanh(hidden(x, V)), None), x, p["V"])[0]

    params, x = jax_models.params(W=(3, 4), b=(4,), V=(2, 4, 4)), jax_models.inputs(3)
    net = Network(f, "gaussian", example=(params, x))
    assert (net.layers, net.skipped) == ({"V": (2, 4, 4), "W": (4, 4)}, {})
    net.check(params, x)
    wrong = Network(lambda p, x: layer(2 * (x @ p["W"]), inputs=x, weight=p["W"]), "gaussian", example=(params, x))
    with pytest.raises(ValueError, match="not the gradient"):
        wrong.check(params, x)
    with pytest.raises(ValueError, match=r"y has shape \(4, 3\)"):
        layer(x, inputs=x, weight=params["W"])
    for name in ("y", "inputs", "weight"):
        with pytest.raises(TypeError, match=f"{name} is 2.0, expected an array"):
            layer(**({"y": x @ params["W"], "inputs": x, "weight": params["W"]} | {name: 2.0}))
    with pytest.raises(ValueError, match=r"of inputs \(\) @"):
        layer(x @ params["W"], inputs=x[0, 0], weight=params["W"])
