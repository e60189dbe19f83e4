"""Whole iterations of Algorithm 2 as one program of JAX: no value is looked at, and the steps are NumPy's."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import JAX, NUMPY
from test_algorithm import REASONS, LinearRegression

from kfaclinalg import (
    Factors,
    KFACOptions,
    KFACState,
    LayerFactors,
    Schedule,
    kfac_iteration,
    kfac_report,
    kfac_step,
)
from kfaclinalg_mlp import MLP, sparse_weights

SIZES, N = (8, 8, 8, 8), 32
ACTIVATIONS = ("tanh", "tanh", "identity")
WHOLE = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}


class Drawn:
    """A generator that gives what another one drew before: NumPy draws nothing in a program."""

    def __init__(self, *draws):
        self._next = partial(next, iter(draws))

    def permutation(self, N):
        return self._next()

    def random(self, shape):
        return self._next()

    standard_normal = random


def autoencoder(N=N, sizes=SIZES):
    """Inputs in [0, 1] of three latent numbers, and weights to start from."""
    rng = np.random.default_rng(0)
    x = 1 / (1 + np.exp(-rng.standard_normal((N, 3)) @ rng.standard_normal((3, sizes[0]))))
    return x, sparse_weights(sizes, rng=rng, connections=5)


def compiled(problem_of, options):
    """(weights, state, batch, schedule) to what `kfac_iteration` gives, old weights and state being given away."""

    def iteration(weights, state, batch, schedule):
        return kfac_iteration(problem_of(batch), weights, state, options, schedule)

    return jax.jit(iteration, static_argnames="schedule", donate_argnums=(0, 1))


def before(step, weights, batch, options):
    """The state of a run without a step, with zeros for the arrays that it will hold."""
    first, schedule = KFACState.start(options), Schedule.at(1, options)
    shapes = jax.eval_shape(partial(step.__wrapped__, schedule=schedule), weights, first, batch)[1]
    known = [None if isinstance(x, Factors) else x for x in first]
    return KFACState(
        *(
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), s) if x is None else jnp.asarray(x, s.dtype)
            for x, s in zip(known, shapes, strict=True)
        )
    )


def copied(tree):
    return jax.tree.map(jnp.array, tree)


def test_fifty_compiled_steps_are_those_of_numpy():
    """In four programs: every fifth iteration adapts λ, every twentieth makes all that there is."""
    options = KFACOptions(damping=0.01, **WHOLE)
    x, start = autoencoder()
    mlp, rng = MLP(ACTIVATIONS, "bernoulli"), np.random.default_rng(1)
    step = compiled(lambda batch: mlp.problem(batch[0], batch[0], rng=Drawn(batch[1]), **WHOLE), options)
    weights, state = tuple(map(JAX[0].array, start)), None
    expected, expected_state = start, None
    for k in range(1, 51):
        noise = rng.random((N, SIZES[-1]))
        batch = jnp.asarray(x), jnp.asarray(noise)
        state = before(step, weights, batch, options) if state is None else state
        given = weights, state
        weights, state, info = step(weights, state, batch, schedule=Schedule.at(k, options))
        assert all(a.is_deleted() for a in jax.tree.leaves(given[0]))
        problem = mlp.problem(x, x, rng=Drawn(noise), **WHOLE)
        expected, expected_state, wanted = kfac_step(problem, expected, expected_state, options)
        for W, V in zip(weights, expected, strict=True):
            assert np.linalg.norm(np.asarray(W) - V) <= 1e-9 * np.linalg.norm(V)
        found = kfac_report(info)
        assert (found.refreshed, found.refused) == (wanted.refreshed, "")
        np.testing.assert_allclose(found[:-2], wanted[:-2], rtol=1e-6)
    assert step._cache_size() == 4
    numbers = [float(getattr(state, name)) for name in ("iteration", "damping", "gamma", "ceiling")]
    np.testing.assert_allclose(
        numbers, [getattr(expected_state, name) for name in KFACState._fields[:3]] + [expected_state.ceiling], rtol=1e-9
    )


class Spoiled(LinearRegression):
    """Each of its answers times a number."""

    def __init__(self, b, by):
        super().__init__(b)
        self.by = by

    def loss_and_gradient(self, weights):
        gradient = self.residuals(weights[0]).mT @ self.inputs / self.N
        return super().loss(weights) * self.by["loss"], (gradient * self.by["gradient"],)

    def factors(self, weights, links):
        ((A, G),) = super().factors(weights, links).layers
        return Factors((LayerFactors(A, G * self.by["factors"]),))

    def curvature_gram(self, weights, directions):
        return super().curvature_gram(weights, directions) * self.by["curvature"]

    def loss(self, weights):
        return super().loss(weights) * self.by["loss after"]


def test_a_step_that_is_not_finite_is_refused_in_the_program():
    """And λ, γ and the rest are then what they are where the host decides."""
    options = KFACOptions(damping_period=1, inverse_period=1, gamma_period=1)
    sound = dict.fromkeys(REASONS, 1.0)
    step = compiled(lambda by: Spoiled(JAX[0], by), options)
    weights = LinearRegression(JAX[0]).start
    state = before(step, weights, sound, options)
    held, held_state = LinearRegression(NUMPY).start, None
    for bad in (None, *REASONS, None):
        by = sound | ({} if bad is None else {bad: math.nan})
        old = copied((weights, state))
        weights, state, info = step(weights, state, by, schedule=Schedule.at(1, options))
        with np.errstate(invalid="ignore"):
            held, held_state, wanted = kfac_step(Spoiled(NUMPY, by), held, held_state, options)
        found = kfac_report(info)
        assert found.refused == wanted.refused == ("" if bad is None else REASONS[bad])
        np.testing.assert_allclose(found[:-2], wanted[:-2], rtol=1e-9)
        np.testing.assert_allclose(weights[0], held[0], rtol=1e-9)
        assert float(state.damping) == pytest.approx(held_state.damping, rel=1e-9)
        assert float(state.gamma) == pytest.approx(held_state.gamma, rel=1e-9)
        if bad is not None:
            kept = (weights, state._replace(damping=old[1].damping, gamma=old[1].gamma))
            for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(old), strict=True):
                np.testing.assert_array_equal(one, other)
    assert step._cache_size() == 1


def test_steps_of_one_schedule_may_be_scanned():
    options = KFACOptions(damping=0.1, **WHOLE)
    problem, schedule = LinearRegression(JAX[0]), Schedule(False, False, True)
    step = compiled(lambda _: problem, options)
    weights, state = problem.start, before(step, problem.start, None, options)
    weights, state, _ = step(copied(weights), state, None, schedule=Schedule.at(1, options))

    def body(carry, _):
        *carry, info = kfac_iteration(problem, *carry, options, schedule)
        return tuple(carry), info.loss

    (scanned, _), losses = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=5))(copied((weights, state)))
    for loss in losses:
        weights, state, info = step(weights, state, None, schedule=schedule)
        assert float(info.loss) == pytest.approx(float(loss), rel=1e-12)
    np.testing.assert_allclose(scanned[0], weights[0], rtol=1e-12)
    assert all(one > other for one, other in pairwise(losses))


def test_without_x64_the_sums_are_in_float64():
    """Late in training, where a loss rounded to float32 leaves two digits of ρ."""
    N, sizes, last = 4096, (16, 8, 16), 30
    options = KFACOptions(damping=0.1, damping_period=1, **WHOLE)
    x, start = autoencoder(N, sizes)
    mlp, rng = MLP(("tanh", "identity"), "bernoulli"), np.random.default_rng(1)

    def problem(x, noise):
        return mlp.problem(x, x, rng=Drawn(noise), **WHOLE)

    def in_float32(x):
        return jnp.asarray(x, jnp.float32) if np.asarray(x).dtype == np.float64 else jnp.asarray(x, jnp.int32)

    x = x.astype(np.float32).astype(np.float64)
    weights, state = start, None
    for k in range(1, last + 1):
        noise = rng.random((N, sizes[-1])).astype(np.float32).astype(np.float64)
        if k == last:
            weights = tuple(W.astype(np.float32).astype(np.float64) for W in weights)
            with jax.enable_x64(False):
                arrays = jax.tree.map(in_float32, (weights, state, (x, noise)))
                step = compiled(lambda batch: problem(*batch), options)
                _, after, info = step(*arrays, schedule=Schedule.at(k, options))
                found = kfac_report(info)
        weights, state, wanted = kfac_step(problem(x, noise), weights, state, options)
    assert after.damping.dtype == jnp.float32
    assert np.finfo(np.float32).eps * wanted.loss > 1e-3 * abs(wanted.change)
    assert found.alpha == pytest.approx(wanted.alpha, abs=1e-5)
    assert found.ratio == pytest.approx(wanted.ratio, abs=1e-5)
