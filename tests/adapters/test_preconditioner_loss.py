"""The reduction of the loss, the clip, and one step that solves least squares."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from backends import TORCH
from dense_layers import EPS, OPERATIONS, Case, both_sharings, case, effective, gradient, judge_factors, losses, moments
from layer_rows import Frames, N
from matrices import judge
from torch import nn
from torch.nn import functional

from kfaclinalg_torch import KFACPreconditioner

pytestmark = pytest.mark.usefixtures("double")


# -- the reduction of the loss --


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_the_reduction_does_not_matter(estimator, structure):
    runs = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        one = case("Linear")
        layers = one.run(estimator, reduction=reduction, structure=structure).layers
        judge_factors("reduction", layers, one.seen(estimator), "expand")
        runs.append([gradient(one.model, name) for name in layers])
    for mean, total in zip(*runs, strict=True):  # the same inverse, but for rounding, on N times the gradient
        judge(TORCH, "reduction, step", np.linalg.norm(N * mean - total), 1e5 * EPS * np.linalg.norm(total))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("examples", [1, 7, 50])
def test_the_gradients_are_those_of_single_examples(reduction, examples):
    """G of softmax regression written down: (1/N) Σ (p - y)(p - y)ᵀ. A factor N, or its square, would show."""
    x = torch.randn(examples, 4)
    one = Case(nn.Linear(4, 3), (x,))
    layer = one.run("empirical", reduction=reduction).layers[""]
    g = torch.softmax(one.model(x), 1).detach() - functional.one_hot(one.targets, 3)
    a = torch.cat([x, torch.ones(examples, 1)], 1)
    for came, rows in zip(layer, (a, g), strict=True):
        expected = sum(torch.outer(row, row) for row in rows) / examples
        judge(TORCH, "reduction", float((came - expected).norm()), 10 * OPERATIONS * EPS * float(expected.trace()))


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@both_sharings
def test_parts_of_a_batch_are_one_batch(estimator, reduction, sharing):
    """Gradient accumulation, in parts of 1 and 2 examples."""
    one = case("Conv2d, stride")
    preconditioner = one.preconditioner(estimator, reduction=reduction, weight_sharing=sharing)
    for part in (slice(0, 1), slice(1, 3)):
        z = one.model(one.args[0][part])
        if estimator != "empirical":
            preconditioner.update(z)
        total = losses(one.likelihood, z, one.targets[part]).sum()
        (total / N if reduction == "mean" else total).backward()
    preconditioner.step()
    judge_factors("accumulation", preconditioner.layers, one.seen(estimator), sharing)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_two_passes_before_their_updates(estimator):
    one = case("Linear")
    preconditioner = one.preconditioner(estimator)
    parts = [slice(0, 1), slice(1, 3)]
    passes = [one.model(one.args[0][part]) for part in parts]
    for z, part in zip(passes, parts, strict=True):
        if estimator != "empirical":
            preconditioner.update(z)
        (losses(one.likelihood, z, one.targets[part]).sum() / N).backward()
    preconditioner.step()
    judge_factors("accumulation", preconditioner.layers, one.seen(estimator), "expand")


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_inputs_in_a_dictionary(estimator):
    """The examples are counted once, though the frames that one layer sees are three times as many."""

    class Packed(Frames):
        def forward(self, batch):
            return super().forward(batch["x"])

    one = case("Linear, frames")
    expected = one.seen(estimator)
    model = Packed(one.model.layer, 6)
    model.head = one.model.head
    one.model, one.args = model, ({"x": one.args[0]},)
    judge_factors("factors, dictionary", one.run(estimator).layers, expected, "expand")


# -- the clip --


@pytest.mark.parametrize(
    "row", ["Conv2d, groups", "LayerNorm, 3-D", "MultiheadAttention", "Embedding tied to the head"]
)
@pytest.mark.parametrize(("part", "lr"), [(1e-4, 1.0), (0.25, 0.1), (4.0, 0.1)])
def test_kl_clip(row, lr, part):
    """min(1, √(κ / Σ lr² |<V, U>|)) over all layers; κ is `part` of the sum."""
    one = case(row)
    two = deepcopy(one)
    before: dict[str, np.ndarray] = {}
    preconditioner = one.preconditioner()
    names = list(effective(one.twin, moments(one.seen())))
    one.step(preconditioner, lambda: before.update({name: gradient(one.model, name).copy() for name in names}))
    U = {name: gradient(one.model, name) for name in names}
    total = sum(abs(float((before[name] * U[name]).sum())) for name in names)
    two.run(kl_clip=part * lr**2 * total, kl_lr=lr)
    for name in names:
        error = np.linalg.norm(gradient(two.model, name) - min(1, part**0.5) * U[name])
        judge(TORCH, "kl_clip", error, 10 * OPERATIONS * EPS * np.linalg.norm(U[name]))


# -- one step --


@pytest.mark.parametrize("options", [{}, {"exact_damping": True}, {"structure": "eigen", "decay": 0.0}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_step_solves_least_squares(options, reduction):
    """The curvature of the loss is A ⊗ I. The rest of the error is that of the normal equations, 10 cond eps."""
    x, y = torch.randn(20, 4), torch.randn(20, 3)
    model = nn.Linear(4, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0 if reduction == "mean" else 1 / 20)
    preconditioner = KFACPreconditioner(
        model,
        likelihood="gaussian",
        estimator="exact",
        damping=1e-30,
        factor_dtype=torch.float64,
        **options,
    )
    z = model(x)
    preconditioner.update(z)
    (((z - y) ** 2).sum() / (40 if reduction == "mean" else 2)).backward()
    preconditioner.step()
    sgd.step()
    a = np.hstack([x.numpy(), np.ones((20, 1))])
    solution = np.linalg.lstsq(a, y.numpy(), rcond=None)[0].T
    W = np.hstack([model.weight.detach().numpy(), model.bias.detach().numpy()[:, None]])
    bound = 10 * 5 * np.linalg.cond(a) ** 2 * EPS * max(np.linalg.norm(solution), 1.0)
    judge(TORCH, "least squares", np.linalg.norm(W - solution), bound)
