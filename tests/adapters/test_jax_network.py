"""What a `Network` measures: loss, gradient, and factors, against single examples. Nothing here needs torch."""

from functools import partial

import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest

from kfaclinalg_jax import KFAC, Gaussian, Network, Sampled

KEY = jax.random.key(2)


@pytest.mark.parametrize("name", ["scanned_layers", "an_example_at_a_time"])
def test_the_loss_and_its_gradient_are_those_of_the_function(name):
    f, params, x, _, _ = getattr(jax_models, name)()
    net, y = Network(f, "gaussian", example=(params, x)), jnp.ones(jax.eval_shape(f, params, x).shape)
    came = jax.jit(lambda p: net.value_grad_and_statistics(p, x, y, key=KEY)[:2])(params)
    expected = jax.value_and_grad(lambda p: (net.likelihood.loss(f(p, x), y), f(p, x)), has_aux=True)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), came, expected)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_factors_are_those_of_the_gradients_of_single_examples(estimator):
    """The bias's gradient of an example is g, the weight's is a gᵀ: no forward pass of ours is needed."""
    f, params, x, _, _ = jax_models.mlp()
    y = jnp.asarray([0, 1, 1, 0])
    net = Network(f, "categorical", example=(params, x), estimator=estimator)
    _, _, statistics = jax.jit(net.value_grad_and_statistics)(params, x, y, key=KEY)

    def loss(p, x, c):
        return -jax.nn.log_softmax(f(p, x[None])[0])[c]

    gradients = [jax.vmap(jax.grad(loss), (None, 0, None))(params, x, c) for c in range(2)]
    probabilities = jax.nn.softmax(f(params, x)) if estimator == "exact" else jax.nn.one_hot(y, 2)
    for weight, bias in ("Wb", "Vc"):
        a = jnp.einsum("nij,nj->ni", gradients[0][weight], gradients[0][bias])
        a = jnp.concatenate([a / jnp.square(gradients[0][bias]).sum(1, keepdims=True), jnp.ones((4, 1))], 1)
        A, G = statistics.moments[weight]
        np.testing.assert_allclose(A, jnp.einsum("ni,nj->ij", a, a) / 4, rtol=1e-12)
        expected = sum(
            jnp.einsum("n,ni,nj->ij", probabilities[:, c], g[bias], g[bias]) for c, g in enumerate(gradients)
        )
        np.testing.assert_allclose(G, expected / 4, rtol=1e-11, atol=1e-14)


def test_the_fallback_is_the_diagonal_of_the_fisher_matrix():
    """In the mean over many samples."""
    params, x = {"z": jnp.asarray([0.3, -0.2]), "V": jnp.ones((2, 3))}, jax_models.inputs(2)

    def f(p, x):
        return x * jnp.exp(p["z"]) @ p["V"]

    net = Network(f, "gaussian", example=(params, x), estimator=Sampled(4000))
    moments = net.value_grad_and_statistics(params, x, jnp.zeros((4, 3)), key=KEY)[2].moments
    J = jax.vmap(lambda x: jax.jacobian(lambda z: f({"z": z, "V": params["V"]}, x))(params["z"]))(x)
    np.testing.assert_allclose(moments["z"].G.d, jnp.square(J).sum((0, 1)) / 4, rtol=0.1)


def test_one_input_may_be_a_tuple():
    f, params, x, _, _ = jax_models.mlp()
    pair, y = (x, jnp.ones((4, 1))), jnp.ones((4, 2))
    net = Network(lambda p, pair: f(p, pair[0]) * pair[1], "gaussian", example=(params, pair))
    net.check(params, pair)
    measure = jax.jit(net.value_grad_and_statistics)
    (loss, _), _, _ = measure(params, pair, y, key=KEY)
    assert loss == measure(params, (pair,), y, key=KEY)[0][0]
    kfac = KFAC(net, weight_decay=0.0)
    np.testing.assert_allclose(kfac.step(params, kfac.init(params), pair, y, KEY)[2].loss, loss, rtol=1e-12)


def test_a_function_may_return_more_than_its_outputs():
    """New running means, which are of no loss: a part of all that comes back, whatever its type."""

    def f(p, x, mean):
        h = x @ p["W"] + p["b"]
        h = (h - h.mean(0)) * p["s"]
        return {"logits": jnp.tanh(h) @ p["V"], "mean": 0.9 * mean + 0.1 * h.mean(0), "seen": len(x), "key": KEY}

    held, x, y = jax_models.params(W=(3, 5), b=(5,), s=(5,), V=(5, 2)), jax_models.inputs(3), jnp.asarray([0, 1, 1, 0])
    inputs = x, jnp.ones(5)
    for estimator in ("exact", "empirical"):
        of = [
            Network(g, "categorical", example=(held, *inputs), estimator=estimator, outputs=outputs)
            for g, outputs in ((f, lambda found: found["logits"]), (lambda *args: f(*args)["logits"], None))
        ]
        of[0].check(held, inputs)
        found = [jax.jit(net.value_grad_and_statistics)(held, inputs, y, key=KEY) for net in of]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found[0][1:], found[1][1:])
        jax.tree.map(np.testing.assert_array_equal, (found[0][0][0], found[0][0][1]["logits"]), found[1][0])
        np.testing.assert_allclose(found[0][0][1]["mean"], f(held, *inputs)["mean"], rtol=1e-12)
        loss = found[0][0][0]
    kfac = KFAC(
        Network(f, "categorical", example=(held, *inputs), outputs=lambda found: found["logits"]), weight_decay=0.0
    )
    np.testing.assert_allclose(kfac.step(held, kfac.init(held), inputs, y, KEY)[2].loss, loss, rtol=1e-12)
    with pytest.raises(TypeError, match="outputs is 'logits', expected a function"):
        Network(f, "categorical", example=(held, *inputs), outputs="logits")


class Masked:
    """Squared errors of what the second output, of booleans, lets through."""

    def loss(self, outputs, targets):
        z, mask = outputs
        return jnp.square(jnp.where(mask[:, None], z - targets, 0)).sum() / 2 / len(z)

    def sample(self, outputs, key):
        return outputs[0] + jax.random.normal(key, outputs[0].shape, outputs[0].dtype)

    def fisher_product(self, outputs, tangents):
        return jnp.where(outputs[1][:, None], tangents[0], 0), tangents[1]


def test_an_output_may_be_no_real_number():
    f, params, x, _, _ = jax_models.mlp()
    y = jnp.ones((4, 2))

    def masked(p, x):
        return f(p, x), x[:, 0] > 0

    for estimator in ("sampled", "empirical"):
        net = Network(masked, Masked(), example=(params, x), estimator=estimator)
        net.check(params, x)
        (loss, _), gradient, _ = jax.jit(net.value_grad_and_statistics)(params, x, y, key=KEY)
        expected = jax.grad(lambda p: Masked().loss(masked(p, x), y))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), gradient, expected)
    kfac = KFAC(Network(masked, Masked(), example=(params, x)), weight_decay=0.0)
    np.testing.assert_allclose(kfac.step(params, kfac.init(params), x, y, KEY)[2].loss, loss, rtol=1e-12)


def test_half_precision_is_widened():
    f, params, x, _, _ = jax_models.mlp()
    params, x = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    net = Network(f, "categorical", example=(params, x))
    _, gradient, statistics = jax.eval_shape(net.value_grad_and_statistics, params, x, jnp.zeros(4, int), key=KEY)
    assert gradient["W"].dtype == jnp.bfloat16
    assert statistics.moments["W"].A.dtype == statistics.moments["W"].G.dtype == jnp.float32


def test_mistakes():
    f, params, x, _, _ = jax_models.mlp()
    with pytest.raises(ValueError, match=r"no layer.*Skipped: z: used by exp at .*test_jax_network.py"):
        Network(lambda p, x: x @ jnp.exp(p["z"]), "gaussian", example=({"z": jnp.ones((3, 2))}, x))
    for options, error, match in [
        ({"likelihood": "poisson"}, ValueError, "likelihood is 'poisson'"),
        ({"estimator": "all"}, ValueError, "estimator is 'all'"),
        ({"keep": "all"}, ValueError, "keep is 'all'"),
        ({"example": params}, TypeError, r"expected \(params, \*inputs\)"),
        ({"likelihood": object()}, ValueError, "lacks the methods loss, sample"),
        ({"likelihood": Gaussian}, TypeError, "likelihood is the class Gaussian, expected an object"),
    ]:
        with pytest.raises(error, match=match):
            Network(f, **{"likelihood": "gaussian", "example": (params, x)} | options)
    for more, error, match in [
        ({"k": jnp.arange(3)}, TypeError, "parameter 'k' has dtype int64"),
        ({"k": jnp.ones(3) + 1j}, TypeError, "parameter 'k' has dtype complex128"),
        ({"k": {"k": x}, "k.k": x}, ValueError, "two parameters have the name 'k.k'"),
    ]:
        with pytest.raises(error, match=match):
            Network(f, "gaussian", example=({**params, **more}, x))
    with pytest.raises(ValueError, match="outputs are a dict, expected one array"):
        Network(lambda p, x: {"z": f(p, x)}, "gaussian", example=(params, x), estimator="exact")
    net = Network(f, "categorical", example=(params, x))
    with pytest.raises(ValueError, match="key is None"):
        net.value_grad_and_statistics(params, x, jnp.zeros(4, int))
    with pytest.raises(ValueError, match="expected class indices"):
        net.value_grad_and_statistics(params, x, jnp.zeros((4, 2)), key=KEY)
    with pytest.raises(TypeError, match="targets are a list, expected an array"):
        net.value_grad_and_statistics(params, x, [0, 1, 1, 0], key=KEY)
    with pytest.raises(ValueError, match=r"inputs begin with a float of shape \(\), expected"):
        net.value_grad_and_statistics(params, x.tolist(), jnp.zeros(4, int), key=KEY)
    for likelihood in ("categorical", "gaussian"):
        net = Network(lambda p, x: (f(p, x), x), likelihood, example=(params, x))
        with pytest.raises(TypeError, match="outputs are a tuple, expected an array"):
            net.value_grad_and_statistics(params, x, jnp.zeros(4, int), key=KEY)
    net = Network(f, "categorical", example=(params, x))
    for other, match in (
        ({**params, "z": jnp.ones(1)}, r"params has z \(1,\), expected the parameters of the network"),
        ({"params": params}, r"params has params.V \(5, 2\), .* and lacks V \(5, 2\), "),
        ({"W": params["W"]}, r"params lacks V \(5, 2\), b \(5,\), c \(2,\), expected"),
    ):
        with pytest.raises(ValueError, match=match):
            net.value_grad_and_statistics(other, x, jnp.zeros(4, int), key=KEY)
    params = {"s": jnp.ones(3), "W": jnp.ones((3, 2))}
    one = Network(lambda p, x: (x @ x.mT) @ x * p["s"] @ p["W"], "gaussian", example=(params, jnp.ones((1, 2, 3))))
    with pytest.raises(ValueError, match=r"other layers at .* \(N = 4\) than at the example \(N = 1\): .*'s'"):
        one.value_grad_and_statistics(params, jnp.ones((4, 2, 3)), jnp.zeros((4, 2, 2)), key=KEY)
