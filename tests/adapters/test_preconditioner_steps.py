"""When statistics are taken and inverses refreshed, and how far a step goes with which optimizer."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from training import (
    ESTIMATORS,
    Waits,
    assert_near,
    assert_same,
    backward,
    batch,
    dense,
    gradients,
    losses_of,
    network,
    one_step,
    preconditioned,
)

from kfaclinalg import CholeskyInverse

# -- periods and staggering --


def changes(preconditioner, model, steps):
    """The layers whose inverse is another after each step, seen in what becomes of one and the same gradient."""
    before, changed = {}, []
    for step in range(steps):
        x, y = batch(seed=step)
        backward(model, preconditioner, x, y)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        preconditioner.step()
        now = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith("weight")}
        changed.append(
            {name[: -len(".weight")] for name, g in now.items() if not torch.equal(g, before.get(name))}
            if before
            else {name[: -len(".weight")] for name in now}
        )
        before = now
    return changed


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("period", "due"), [(1, range(8)), (3, (0, 3, 6)), (lambda step: 1 if step < 3 else 4, (0, 1, 2, 4))]
)
def test_statistics_are_taken_on_their_own_period(estimator, period, due):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, estimator, statistics_period=period, inverse_period=5)
    taken, before = [], None
    for step in range(8):
        one_step(model, preconditioner, *batch(seed=step))
        now = dense(preconditioner.layers)
        if before is None or not torch.equal(now["0"][0], before["0"][0]):
            assert before is None or not torch.equal(now["2"][1], before["2"][1])
            taken.append(step)
        before = now
    assert taken == list(due)


def test_inverses_are_refreshed_on_their_own_period_one_layer_a_step():
    model = network(4, 6, 5, 3)
    changed = changes(preconditioned(model, inverse_period=4), model, 13)
    assert changed[0] == {"0", "2", "4"}
    assert sorted(name for names in changed[1:5] for name in names) == ["0", "2", "4"]
    assert changed[1:5] == changed[5:9] == changed[9:13]
    assert max(map(len, changed[1:])) == 1


def test_every_inverse_is_refreshed_at_every_step_where_the_period_is_one():
    model = network(4, 6, 5, 3)
    assert changes(preconditioned(model, statistics_period=1, inverse_period=1), model, 4) == [{"0", "2", "4"}] * 4


def test_where_the_period_is_one_substitution_takes_the_place_of_inverses():
    """A function of the step may say otherwise in the next, so that it keeps to inverses."""
    x, y = batch()
    for often, kind in ((1, CholeskyInverse), (lambda step: 1, torch.Tensor)):
        model = network(4, 6, 5, 3)
        preconditioner = preconditioned(model, inverse_period=often)
        found = [one_step(model, preconditioner, x, y) for _ in range(2)]
        assert all(isinstance(M, kind) for K in preconditioner._inverses.inverses.values() for M in (K.A, K.B))
        if kind is CholeskyInverse:
            expected = found
    assert_near(found, expected)


def test_the_inverse_period_may_follow_the_iterations():
    model = network(4, 5, 3)
    changed = changes(preconditioned(model, inverse_period=lambda step: 1 if step < 3 else 100), model, 8)
    assert changed[:3] == [{"0", "2"}] * 3
    assert changed[3:] == [set()] * 5


def test_damping_may_follow_the_iterations():
    model, case = network(4, 5, 3), batch()
    preconditioner = preconditioned(model, "exact", damping=lambda step: 10.0 ** (step - 3), inverse_period=1)
    for step in range(4):
        came = one_step(model, preconditioner, *case)
        other = network(4, 5, 3)
        assert_near(came, one_step(other, preconditioned(other, "exact", damping=10.0 ** (step - 3)), *case))


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_no_step_is_a_spike(period, structure, monkeypatch):
    """The work of a step, n³ for each side, is at most the largest layer's and the mean."""
    sizes = (3, 20, 5, 17, 30, 2, 9, 9, 9, 9, 3)
    model, work = network(*sizes), []
    preconditioner = preconditioned(model, structure=structure, inverse_period=period)
    build = preconditioner._inverses._built

    def counted(name, layer, damping):
        work[-1] += layer.A.shape[-1] ** 3 + layer.G.shape[-1] ** 3
        return build(name, layer, damping)

    monkeypatch.setattr(preconditioner._inverses, "_built", counted)
    for step in range(2 * period + 1):
        work.append(0)
        x, y = batch(features=3, seed=step)
        one_step(model, preconditioner, x, y)
    costs = [(n + 1) ** 3 + m**3 for n, m in pairwise(sizes)]
    assert work[0] == sum(costs)
    for first in range(1, period + 2):
        assert sum(work[first : first + period]) == sum(costs)
    assert max(work[1:]) <= max(costs) + sum(costs) / period


# -- kl_clip --


def clipped_case(**options):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, "exact", **options)
    model.zero_grad()
    backward(model, preconditioner, *batch())
    V = gradients(model)
    preconditioner.step()
    return V, gradients(model)


@pytest.mark.parametrize("lr", [1.0, 0.1, lambda step: 0.5])
@pytest.mark.parametrize("kappa", [1e-3, 1e-1, 1e6])
def test_kl_clip_scales_the_whole_update_by_one_factor(kappa, lr):
    V, U = clipped_case(length=None)
    agreement = sum(float((V[name].double() * U[name].double()).sum()) for name in V)
    rate = lr(0) if callable(lr) else lr
    factor = min(1.0, math.sqrt(kappa / (rate**2 * agreement)))
    assert (factor < 1.0) == (kappa == 1e-3 or (kappa, lr) == (1e-1, 1.0)) or callable(lr)
    _, clipped = clipped_case(kl_clip=kappa, kl_lr=lr)
    assert_near(clipped, {name: factor * u for name, u in U.items()})


def test_kl_clip_may_follow_the_iterations():
    _, expected = clipped_case(kl_clip=1e-3)
    _, came = clipped_case(kl_clip=lambda step: 1e-3 * (step + 1))
    assert_same(came, expected)


def test_kl_clip_leaves_a_zero_gradient_zero():
    model = network(4, 3)
    preconditioner = preconditioned(model, kl_clip=1e-3)
    came = one_step(model, preconditioner, *batch(), scale=0.0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in came.values())


# -- with the optimizers of torch --


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_any_optimizer_takes_the_gradients_and_a_scheduler_its_learning_rate(optimizer, structure):
    model, (x, y) = network(4, 8, 3), batch(48)
    rate = {"SGD": 0.5, "Adagrad": 0.1}.get(optimizer, 0.02)
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.1 * rate)
    preconditioner = preconditioned(model, structure=structure, damping=0.1, inverse_period=5)
    losses = losses_of(model, optimizer, preconditioner, x, y, 40, after=scheduler.step)
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * rate)


def test_one_step_on_a_gaussian_model_is_the_natural_gradient():
    """A linear model: G = I, so that a step with rate 1 solves the least-squares problem."""
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    target = x @ torch.randn(3, 2) + 1
    model = nn.Linear(3, 2)
    preconditioner = preconditioned(model, "exact", "gaussian", damping=1e-12)
    one_step(model, preconditioner, x, target, loss=lambda z, t: 0.5 * (z - t).square().sum() / len(z))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.testing.assert_close(model(x), target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_a_step_waits_for_the_device_once_for_its_statistic_and_once_for_its_refresh(structure):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, "sampled", structure=structure, statistics_period=2, inverse_period=4)
    counts = []
    for seed in range(8):
        with Waits() as waits:
            one_step(model, preconditioner, *batch(seed=seed))
        counts.append(waits.count)
    assert max(counts[::2]) == 2
    assert max(counts[1::2]) <= 1
