"""Algorithm 2 in JAX: the steps of torch's optimizer, in whole programs."""

import re
from functools import partial
from itertools import pairwise

import backends  # noqa: F401 - JAX in float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import kfaclinalg_jax
import kfaclinalg_torch
from kfaclinalg import Schedule, kfac_report
from kfaclinalg_jax import KFAC, Network
from kfaclinalg_jax._problem import NetworkProblem, Weights

N, SIZES, KEY = 32, (8, 8, 8, 8), jax.random.key(0)
WHOLE = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
RNG = np.random.default_rng(0)
NOISE = RNG.random((N, SIZES[-1]))
X = 1 / (1 + np.exp(-RNG.standard_normal((N, 3)) @ RNG.standard_normal((3, SIZES[0]))))
START = [(RNG.standard_normal((n, m)) / n**0.5, 0.1 * RNG.standard_normal(m)) for n, m in pairwise(SIZES)]


def f(params, x):
    for i, (W, b) in enumerate(params):
        x = x @ W + b if i == len(params) - 1 else jnp.tanh(x @ W + b)
    return x


class BernoulliOfJax(kfaclinalg_jax.Bernoulli):
    def sample(self, outputs, key):
        return (jax.nn.sigmoid(outputs) > NOISE).astype(outputs.dtype)


class BernoulliOfTorch(kfaclinalg_torch.Bernoulli):
    def sample(self, outputs, generator):
        return (torch.sigmoid(outputs) > torch.asarray(NOISE)).to(outputs.dtype)


class Poisson:
    """Of counts with the rates exp z: a likelihood that neither adapter has."""

    exp, floor, noise = staticmethod(jnp.exp), staticmethod(jnp.floor), NOISE

    def loss(self, outputs, targets):
        return (self.exp(outputs) - targets * outputs).sum() / len(outputs)

    def sample(self, outputs, source):
        return self.floor(self.exp(outputs) + self.noise)

    def fisher_product(self, outputs, tangents):
        return self.exp(outputs) * tangents


class PoissonOfTorch(Poisson):
    exp, floor, noise = staticmethod(torch.exp), staticmethod(torch.floor), torch.asarray(NOISE)


def params():
    return [(jnp.asarray(W), jnp.asarray(b)) for W, b in START]


def made(likelihood="bernoulli", keep="moments", layers=None, **options):
    net = Network(f, likelihood, example=(params()[:layers], jnp.asarray(X)), keep=keep)
    return KFAC(net, **WHOLE | options)


def of_torch(likelihood, **options):
    layers = [module for n, m in pairwise(SIZES) for module in (nn.Linear(n, m), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for module, (W, b) in zip(model[::2], START, strict=True):
            module.weight.copy_(torch.asarray(W.T))
            module.bias.copy_(torch.asarray(b))
    return model, kfaclinalg_torch.KFAC(model, likelihood, **WHOLE | options)


CASES = {
    "block-diagonal": (BernoulliOfJax(), BernoulliOfTorch()),
    "eigen": (Poisson(), PoissonOfTorch()),
}


@pytest.mark.parametrize("structure", CASES)
def test_fifty_steps_are_those_of_torch(structure):
    """With a built-in likelihood, and with one of the user's own; in four programs."""
    of_jax, of_other = CASES[structure]
    options = {"structure": structure, "damping": 0.01}
    kfac, (model, optimizer) = made(of_jax, "rows", **options), of_torch(of_other, **options)
    held, x = params(), jnp.asarray(X)
    state = kfac.init(held)
    for _ in range(50):
        held, state, info = kfac.step(held, state, x, x, KEY)
        optimizer.step(torch.asarray(X), torch.asarray(X))
        for module, (W, b) in zip(model[::2], held, strict=True):
            found = np.column_stack([np.asarray(W).T, b])
            wanted = torch.column_stack([module.weight, module.bias]).detach().numpy()
            assert np.linalg.norm(found - wanted) <= 1e-9 * np.linalg.norm(wanted)
        found, wanted = kfac_report(info), optimizer.info
        assert (found.refused, found.refreshed) == ("", wanted.refreshed)
        np.testing.assert_allclose(found[:3], wanted[:3], rtol=1e-9)
    assert kfac._compiled._cache_size() == 4
    assert found.damping < 0.01


def test_steps_in_a_scan_are_those_outside():
    """One program for a whole run, of which the state says what is due; weights, state and infos are its own."""
    kfac = made(layers=2, damping=0.05, damping_period=4, inverse_period=4, gamma_period=4)
    x, keys = jnp.asarray(X), jax.random.split(KEY, 9)
    held = params()[:2]
    state = kfac.init(held)

    def body(carry, key):
        *carry, info = kfac.step(*carry, x, x, key)
        return tuple(carry), info

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, keys), donate_argnums=0)
    given = jax.tree.map(jnp.array, (held, state))
    (scanned, after), infos = run(given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given[0], given[1].kfac)))
    for i, key in enumerate(keys):
        held, state, info = kfac.step(held, state, x, x, key)
        np.testing.assert_allclose(kfac_report(info)[:-2], [float(values[i]) for values in infos[:-2]], rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), scanned, held)
    assert int(after.turn) == int(after.kfac.iteration) == state.turn == len(keys)


def test_a_batch_that_is_not_finite_is_refused_in_the_program():
    kfac, held, x = made(), params(), jnp.asarray(X)
    state = kfac.init(held)
    held, state, _ = kfac.step(held, state, x, x, KEY)
    before = jax.tree.map(np.asarray, state)
    batch = x * jnp.nan, x, KEY
    with jax.transfer_guard_device_to_host("disallow"):
        same, after, info = kfac._compiled(held, state.kfac, batch, schedule=Schedule.at(2, kfac.options), fraction=1.0)
    jax.tree.map(np.testing.assert_array_equal, same, held)
    kept = after._replace(damping=before.kfac.damping)
    jax.tree.map(np.testing.assert_array_equal, kept, before.kfac)
    assert float(after.damping) == pytest.approx(float(before.kfac.damping) / kfac.options.omega1)
    assert kfac_report(info).refused == "the loss is not finite"


@pytest.mark.parametrize(("fraction", "forward"), [(1.0, 1), (0.5, 3)])
def test_a_step_has_the_matrix_products_of_the_algebra(fraction, forward):
    """S1 and S2 have forward passes of their own only where they are not the whole batch; h(θ + δ) has one."""
    kfac = made(statistics_fraction=fraction, curvature_fraction=fraction)
    held, x, layers = params(), jnp.asarray(X), len(SIZES) - 1
    step = partial(kfac._compiled.lower, held, kfac.init(held).kfac, (x, x, KEY), fraction=fraction)
    backward, sampled, moments, inverse = 2 * layers - 1, layers - 1, 2 * layers, 2 * layers
    tangents = 2 * (2 * layers - 1)  # of Δ and δ0
    expected = (forward + 1) * layers + backward + sampled + moments + inverse + tangents
    text = step(schedule=Schedule(False, False, False)).compile().as_text()
    products = re.findall(r"f64\[(\d+),(\d+)\]\S* dot\(", text)
    assert sum(min(map(int, shape)) > 2 for shape in products) == expected  # but for those of (α, μ)


def test_only_where_lambda_is_adapted_are_slopes_taken_of_a_small_change():
    """Two more passes of tangents in float32, and in the other steps none."""
    held, x = jax.tree.map(lambda a: a.astype(jnp.float32), (params(), jnp.asarray(X)))
    kfac, layers = KFAC(Network(f, "bernoulli", example=(held, x)), **WHOLE), len(SIZES) - 1
    step = partial(kfac._compiled.lower, held, kfac.init(held).kfac, (x, x, KEY), fraction=1.0)
    usual, adapted = (
        sum(min(map(int, shape)) > 2 for shape in re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", text))
        for text in (step(schedule=Schedule(False, False, adapt)).compile().as_text() for adapt in (False, True))
    )
    whole = 2 * layers + (2 * layers - 1) + (layers - 1) + 4 * layers + 2 * (2 * layers - 1)  # as in float64
    assert usual == whole
    assert adapted == whole + 2 * (layers + 2 * layers - 1) - 1  # x δ of the first layer is that of both points


@pytest.mark.parametrize("size", [1e-1, 1e-2, 3e-3, 1e-3, 1e-5])
def test_the_change_of_the_loss_is_exact_in_float32(size):
    """The difference of two passes has only the digits of h, and none of a change of 1e-5."""
    net = Network(f, "bernoulli", example=jax.tree.map(lambda a: a.astype(jnp.float32), (params(), X)))
    weights, keys = Weights(net), jax.random.split(KEY, 3)
    x = jnp.asarray(X, jnp.float32)
    start = weights.of(net_params := jax.tree.map(lambda a: a.astype(jnp.float32), params()))
    end = tuple(W + size * jax.random.normal(k, W.shape, W.dtype) for k, W in zip(keys, start, strict=True))
    problem = NetworkProblem(net, weights, (x, x, KEY), made().options, 1.0)
    h, _ = problem.loss_and_gradient(start)
    came = problem.loss(end) - h
    moved = weights.params(end)
    double = [jax.tree.map(lambda a: a.astype(jnp.float64), p) for p in (net_params, moved)]
    before, after = (net.likelihood.loss(f(p, x.astype(jnp.float64)), x.astype(jnp.float64)) for p in double)
    assert abs(came - (after - before)) <= 1e-5 * abs(after - before)


def test_tau2_grows_where_the_model_misleads():
    """One more program for each schedule of the new τ2."""

    class Flat(kfaclinalg_jax.Gaussian):
        def fisher_product(self, outputs, tangents):
            return 0.1 * tangents

    kfac = made(Flat(), damping=1e-3, curvature_fraction=0.5, damping_period=1)
    held, x = params(), jnp.asarray(X)
    state = kfac.init(held)
    for _ in range(2):
        held, state, _ = kfac.step(held, state, x, x, KEY)
    assert state.fraction == 1.0
    assert kfac._compiled._cache_size() == 2


class Unsampled:
    def loss(self, outputs, targets):
        return ((outputs - targets) ** 2).mean()

    sample = loss


def test_mistakes_are_refused():
    x = jnp.asarray(X)

    def net(likelihood="bernoulli", **options):
        return Network(f, likelihood, example=(params(), x), **options)

    for call, message in (
        (lambda: KFAC(f), "net is a function, expected a Network"),
        (lambda: KFAC(net(), damping=-1), "damping is -1"),
        (lambda: KFAC(net(), lr=0.1), "unknown options lr, expected some of structure, damping, "),
        (lambda: KFAC(net()).init(params()[:-1]), r"params lacks 2.0 \(\d+, \d+\), 2.1 \(\d+,\), expected the param"),
        (lambda: KFAC(net()).step([*params(), 1.0], KFAC(net()).init(params()), x, x, KEY), r"params has 3 \(\), exp"),
        (lambda: KFAC(net()).step(params(), None, x, x, KEY), "state is a NoneType, expected that of init"),
        (lambda: KFAC(net(), chunk_size=3), "chunk_size is 3, expected None"),
        (lambda: KFAC(net(), structure="block-tridiagonal"), "expected one without links"),
        (lambda: KFAC(net(), structure="eigen"), "keep='rows'"),
        (lambda: KFAC(net(estimator="empirical")), "estimator is 'empirical'"),
        (lambda: KFAC(net(Unsampled())), "lacks the methods fisher_product"),
        (lambda: KFAC(net()).step(params(), KFAC(net()).init(params()), x, x[:, 1:], KEY), r"targets have shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
