"""One Algorithm 2: NumPy, torch, array-api-strict and JAX, and the torch optimizer, take the same 50 steps.

Everything random is drawn by NumPy, so that all see the same sampled targets and subsets; what differs is rounding.
With λ = 0.01 at the start, λ and γ go up and down in these runs, and rounding grows to between 1e-14 and 1e-11.
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from backends import GPU, JAX, NUMPY, STRICT, TORCH
from torch import nn

from kfaclinalg import KFACOptions, kfac_step
from kfaclinalg_mlp import MLP, sparse_weights
from kfaclinalg_torch import KFAC, Bernoulli

N, SIZES, STEPS, BOUND = 32, (8, 10, 6, 8), 50, 1e-9
EQUAL_SIZES = (8, 8, 8, 8)  # for JAX, which compiles anew for every shape
OPTIONS = KFACOptions(damping=0.01, inverse_period=5)
ACTIVATIONS = ("tanh", "tanh", "identity")
every_structure = pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
ALL, SUBSETS = (1.0, 1.0), (1 / 4, 1 / 2)


def data(sizes):
    """An autoencoder's: smooth intensities in [0, 1] of three latent numbers."""
    rng = np.random.default_rng(0)
    x = 1 / (1 + np.exp(-rng.standard_normal((N, 3)) @ rng.standard_normal((3, sizes[0]))))
    return x, sparse_weights(sizes, rng=rng, connections=5)


@cache
def by_the_mlp(b, structure, fractions, sizes=SIZES):
    """The weights after each step, and what the steps decided."""
    x, start = data(sizes)
    inputs, weights, state = b.array(x), tuple(map(b.array, start)), None
    mlp, rng = MLP(ACTIVATIONS, "bernoulli"), np.random.default_rng(1)
    options = OPTIONS._replace(structure=structure)
    names = ("statistics_fraction", "curvature_fraction")
    problem = mlp.problem(inputs, inputs, rng=rng, **dict(zip(names, fractions, strict=True)))
    trajectory, infos = [], []
    for _ in range(STEPS):
        weights, state, info = kfac_step(problem, weights, state, options)
        trajectory.append([b.numpy(W) for W in weights])
        infos.append(info)
    return trajectory, infos


class SampledByNumPy(Bernoulli):
    def __init__(self, rng):
        self.rng = rng

    def sample(self, outputs, generator):
        return (torch.asarray(self.rng.random(outputs.shape)) < torch.sigmoid(outputs)).to(outputs.dtype)


def by_the_optimizer(structure):
    x, start = data(SIZES)
    layers = [module for n, m in pairwise(SIZES) for module in (nn.Linear(n, m), nn.Tanh())][:-1]
    model, inputs = nn.Sequential(*layers).double(), torch.asarray(x)
    linear = model[::2]
    with torch.no_grad():
        for module, W in zip(linear, map(torch.asarray, start), strict=True):
            module.weight.copy_(W[:, :-1])
            module.bias.copy_(W[:, -1])
    likelihood = SampledByNumPy(np.random.default_rng(1))
    everything = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
    optimizer = KFAC(model, likelihood, **OPTIONS._replace(structure=structure, **everything)._asdict())
    trajectory, infos = [], []
    for _ in range(STEPS):
        optimizer.step(inputs, inputs)
        trajectory.append([np.column_stack([p.detach().numpy() for p in (m.weight, m.bias)]) for m in linear])
        infos.append(optimizer.info)
    return trajectory, infos


def distance(one, other):
    """The largest ‖W - W'‖ / ‖W'‖ over the steps."""
    flat, expected = (np.asarray([np.concatenate([W.ravel() for W in Ws]) for Ws in t]) for t in (one, other))
    return (np.linalg.norm(flat - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


def assert_the_same(found, expected):
    (trajectory, infos), (reference, reference_infos) = found, expected
    assert len(trajectory) == len(reference) == STEPS
    assert distance(trajectory, reference) <= BOUND
    for field in ("loss", "damping", "gamma"):
        values, references = ([getattr(info, field) for info in which] for which in (infos, reference_infos))
        np.testing.assert_allclose(values, references, rtol=BOUND)


@every_structure
@pytest.mark.parametrize("fractions", [ALL, SUBSETS], ids=["all", "subsets"])
@pytest.mark.parametrize("b", [TORCH, STRICT[0], *GPU[::2]], ids=str)
def test_every_namespace_takes_the_same_steps(b, structure, fractions):
    assert_the_same(by_the_mlp(b, structure, fractions), by_the_mlp(NUMPY, structure, fractions))


def test_jax_takes_the_same_steps():
    for structure in ("block-tridiagonal", "block-diagonal"):  # in one test, so that one worker compiles for both
        found, expected = (by_the_mlp(b, structure, SUBSETS, EQUAL_SIZES) for b in (JAX[0], NUMPY))
        assert_the_same(found, expected)


@every_structure
def test_the_torch_optimizer_takes_the_same_steps(structure):
    assert_the_same(by_the_optimizer(structure), by_the_mlp(NUMPY, structure, ALL))


@every_structure
@pytest.mark.parametrize("fractions", [ALL, SUBSETS], ids=["all", "subsets"])
def test_the_steps_are_worth_comparing(structure, fractions):
    """The loss falls to near the best that three latent numbers allow, no step is refused, and λ, γ and μ move."""
    _, infos = by_the_mlp(NUMPY, structure, fractions)
    x, _ = data(SIZES)
    entropy = -(x * np.log(x) + (1 - x) * np.log(1 - x)).sum() / N
    assert {info.refused for info in infos} == {""}
    assert infos[-1].loss - entropy < 0.05 * (infos[0].loss - entropy)
    assert all(len({getattr(info, field) for info in infos}) > 1 for field in ("damping", "gamma", "mu"))


def test_other_noise_gives_other_steps():
    """What the bound would show of one sampled target, or one weight, that differs."""
    x, start = data(SIZES)
    mlp, ends = MLP(ACTIVATIONS, "bernoulli"), []
    for seed in (1, 2):
        problem = mlp.problem(x, x, rng=np.random.default_rng(seed))
        weights, _, _ = kfac_step(problem, start, None, OPTIONS)
        ends.append([weights])
    assert distance(*ends) > 1e3 * BOUND
