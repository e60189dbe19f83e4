"""Where K-FAC is exact, its factors are the dense blocks of the Gauss-Newton matrix."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from backends import TORCH
from dense_layers import (
    EPS,
    OPERATIONS,
    Case,
    both_sharings,
    case,
    dense_ggn,
    every_likelihood,
    judge_factors,
    losses,
    moments,
    targets_for,
)
from layer_rows import ROWS, Bag, words
from matrices import judge
from torch import nn

from kfaclinalg import Diagonal, LayerFactors

pytestmark = pytest.mark.usefixtures("double")


def judge_blocks(operation: str, layers: dict[str, LayerFactors], expected: dict[str, np.ndarray], names=None) -> None:
    for name in names or layers:
        layer = LayerFactors(*(M.to_dense() if isinstance(M, Diagonal) else M for M in layers[name]))
        sides = [M.numpy() if M.ndim == 3 else M.numpy()[None] for M in layer]
        for A, G, F in zip(*sides, expected[name], strict=True):
            error = np.linalg.norm(np.kron(A, G) - F)
            judge(TORCH, operation, error, 10 * OPERATIONS * len(F) * EPS * np.trace(A) * np.trace(G))


def linear_network(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))


class Pooled(nn.Sequential):
    """The mean over the positions at the end."""

    def __init__(self, *layers, dims=1):
        super().__init__(*layers)
        self.dims = dims

    def forward(self, x):
        return super().forward(x).mean(self.dims)


EXACT = {
    "deep linear network": (lambda: linear_network(3, 4, 2, 3), (5, 3), "expand"),
    "independent positions": (lambda: linear_network(3, 4, 2), (5, 4, 3), "expand"),
    "mean over positions": (lambda: Pooled(*linear_network(3, 4, 2)), (5, 4, 3), "reduce"),
    "mean over pixels": (
        lambda: Pooled(nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 1, bias=False), dims=(2, 3)),
        (4, 2, 4, 3),
        "reduce",
    ),
    "mean over pixels, groups": (
        lambda: Pooled(nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 1), dims=(2, 3)),
        (4, 2, 4, 3),
        "reduce",
    ),
    "mean over pixels, transposed": (
        lambda: Pooled(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1), dims=(2, 3)),
        (4, 2, 2, 3),
        "reduce",
    ),
}


@pytest.mark.parametrize("network", EXACT)
def test_linear_networks_with_a_square_loss(network):
    build, shape, sharing = EXACT[network]
    one = Case(build(), (torch.randn(shape),), "gaussian")
    layers = one.run(weight_sharing=sharing).layers
    judge_blocks("exact: linear network", layers, dense_ggn(one.twin, one.args, "gaussian"))


@every_likelihood
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3)),
    ],
)
def test_one_example(build, likelihood):
    one = Case(build(), (torch.randn(1, 4),), likelihood)
    judge_blocks("exact: one example", one.run().layers, dense_ggn(one.twin, one.args, likelihood))


def test_one_word():
    one = Case(Bag(), (words(),), "categorical")
    one.args = (one.args[0][:1],)
    one.targets = one.targets[:1]
    judge_blocks("exact: one example", one.run().layers, dense_ggn(one.twin, one.args, "categorical"))


def test_the_last_layer_of_any_network_with_a_square_loss():
    one = case("Linear", "gaussian")
    judge_blocks("exact: last layer", one.run().layers, dense_ggn(one.twin, one.args, "gaussian"), ["2"])


@every_likelihood
@pytest.mark.parametrize("row", [row for row in ROWS if "Norm" in row])
def test_normalisations_have_the_exact_blocks_of_their_channels(row, likelihood):
    one = case(row, likelihood)
    layers = one.run(weight_sharing="expand").layers
    judge_blocks("exact: channels", layers, dense_ggn(one.twin, one.args, likelihood), ["1"])


@every_likelihood
@both_sharings
def test_the_exact_factors_of_each_likelihood(likelihood, sharing):
    """Of outputs (N, classes) and (N, R, classes)."""
    for row in ("Linear, 3-D", "Conv2d, stride"):
        one = case(row, likelihood)
        judge_factors("factors, likelihoods", one.run(weight_sharing=sharing).layers, one.seen(), sharing)


@every_likelihood
@both_sharings
def test_sampled_factors_have_the_exact_ones_as_their_mean(likelihood, sharing):
    """4000 samples an example: 40 means of 25 copies of it, each with 4 samples."""
    model, x = ROWS["Linear, 3-D"]()
    one, copies = Case(model, (x,), likelihood), Case(model, (x.repeat(25, 1, 1),), likelihood)
    expected = moments(one.seen(), sharing)
    drawn: dict[str, list[np.ndarray]] = {}
    for k in range(40):
        generator = torch.Generator().manual_seed(k)
        sampled = copies.run("sampled", samples=4, generator=generator, weight_sharing=sharing)
        sampled.remove()
        for name, (A, G) in sampled.layers.items():
            drawn.setdefault(name, []).append(G.numpy())
            bound = 10 * OPERATIONS * EPS * np.trace(expected[name][0][0])
            judge(TORCH, "factors, sampled", np.linalg.norm(A.numpy() - expected[name][0][0]), bound)
    for name, Gs in drawn.items():
        error = np.std(Gs, axis=0, ddof=1) / len(Gs) ** 0.5
        assert (np.abs(np.mean(Gs, axis=0) - expected[name][1][0]) <= 5 * error).all()
        assert error.max() < 0.1 * np.abs(expected[name][1]).max()


class Custom:
    """A likelihood with what `Likelihood` asks for, and nothing more."""

    def __init__(self, likelihood):
        self.likelihood = likelihood

    def loss(self, outputs, targets):
        return losses(self.likelihood, outputs, targets).mean()

    def sample(self, outputs, generator):
        raise AssertionError("the exact estimator draws no samples")

    def fisher_product(self, outputs, tangents):
        z = outputs.detach()
        y = targets_for(self.likelihood, z)
        f = torch.func.grad(lambda v: losses(self.likelihood, v, y).sum())
        return torch.func.jvp(f, (z,), (tangents,))[1]


@every_likelihood
@both_sharings
@pytest.mark.parametrize("row", ["Linear, 3-D", "Conv2d, stride", "LayerNorm"])
def test_a_likelihood_of_three_methods(likelihood, sharing, row):
    one = case(row, likelihood)
    preconditioner = one.run(likelihood=Custom(likelihood), weight_sharing=sharing)
    judge_factors("factors, custom likelihood", preconditioner.layers, one.seen(), sharing)


class Correlated(Custom):
    """½ (y - z)ᵀ P (y - z), which no unit or position has to itself."""

    def __init__(self, P):
        self.P = P

    def fisher_product(self, outputs, tangents):
        return (tangents.flatten(1) @ self.P).reshape(outputs.shape)


@both_sharings
def test_a_likelihood_whose_positions_are_correlated(sharing):
    one = case("Linear, 3-D", "gaussian")
    root = torch.randn(9, 5)
    examples = [example._replace(F=root @ root.T) for example in one.seen()]
    preconditioner = one.run(likelihood=Correlated(root @ root.T), weight_sharing=sharing)
    judge_factors("factors, custom likelihood", preconditioner.layers, examples, sharing)
