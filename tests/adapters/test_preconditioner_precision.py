"""`KFACPreconditioner` under `torch.amp`, and the dtypes of its factors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten
from training import (
    ESTIMATORS,
    Fixed,
    Mixed,
    assert_near,
    assert_same,
    batch,
    dense,
    gradients,
    mixed_batch,
    network,
    one_step,
    preconditioned,
)


def scaled(estimator, scaler):
    """What says that the loss is scaled: the empirical estimator alone takes its gradients."""
    return {"grad_scaler": scaler} if estimator == "empirical" else {}


# -- torch.amp --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [lambda: (network(4, 8, 3), batch()), lambda: (Mixed(), mixed_batch())])
def test_it_trains_under_autocast(dtype, estimator, make):
    model, (x, y) = make()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    preconditioner = preconditioned(model, estimator, damping=0.1, inverse_period=2, **scaled(estimator, scaler))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(x)
            loss = functional.cross_entropy(outputs.float(), y)
        assert outputs.dtype == dtype
        if estimator != "empirical":
            preconditioner.update(outputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(
        M.dtype == torch.float32 and bool(M.isfinite().all()) for M in tree_flatten(dense(preconditioner.layers))[0]
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert preconditioner.rejected == 0


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_the_factors_under_autocast_are_those_of_the_float32_pass_to_bfloat16_rounding(estimator):
    x, y = batch(64)
    came = []
    for enabled in (True, False):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, estimator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(x)
        if estimator == "exact":
            preconditioner.update(outputs)
        functional.cross_entropy(outputs.float(), y).backward()
        preconditioner.step()
        came.append(dense(preconditioner.layers))
    assert not torch.equal(came[0]["0"][1], came[1]["0"][1])
    assert_near(came[0], came[1], c=5 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)


class Read(nn.Module):
    """A recurrent layer of what a linear one gives, in bfloat16 under autocast."""

    def __init__(self, kind):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.read, self.head = nn.Linear(4, 5), kind(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.read(self.first(x))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_under_autocast_is_still_one(kind):
    x, came = torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(0)), []
    for enabled in (True, False):
        preconditioner = preconditioned(model := Read(kind), "exact")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(x)
            preconditioner.update(outputs)
        functional.cross_entropy(outputs.float(), torch.zeros(64, dtype=torch.int64)).backward()
        preconditioner.step()
        assert preconditioner.fallback == {}
        came.append(dense(preconditioner.layers))
    assert_near(*came, c=10 * torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_update_under_autocast_takes_the_same_statistic(weight_sharing):
    """The moments of bfloat16 activations are float32 sums, not bfloat16 products."""
    (x, y), came = mixed_batch(N=64), []
    for inside in (True, False):
        model = Mixed()
        preconditioner = preconditioned(model, "exact", weight_sharing=weight_sharing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            preconditioner.update(outputs)
        functional.cross_entropy(outputs.float(), y).backward()
        preconditioner.step()
        came.append(dense(preconditioner.layers))
    assert_near(*came)


def test_a_whole_loop_under_autocast_keeps_the_factors_in_float32():
    """backward() and step() inside the `with` too, as many loops have it."""
    (x, y), came = batch(64), []
    for inside in (True, False):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, "empirical")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            functional.cross_entropy(outputs.float(), y).backward()
            preconditioner.step()
        came.append((dense(preconditioner.layers), gradients(model)))
    assert_near(came[0][0], came[1][0])
    assert_near(came[0][1], came[1][1], c=1000)


@pytest.mark.parametrize("unscale", ["before the step", "by the optimizer's step"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_scaled_loss_gives_the_statistics_and_the_step_of_an_unscaled_one(estimator, unscale):
    """Bitwise: the scale is a power of two."""
    runs = []
    for scale in (None, 2.0**12):
        model, (x, y) = network(4, 8, 3), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        preconditioner = preconditioned(model, estimator, damping=0.1, inverse_period=2, **scaled(estimator, scaler))
        for _ in range(4):
            optimizer.zero_grad()
            outputs = model(x)
            if estimator != "empirical":
                preconditioner.update(outputs)
            scaler.scale(functional.cross_entropy(outputs, y)).backward()
            if unscale == "before the step":
                scaler.unscale_(optimizer)
            preconditioner.step()
            scaler.step(optimizer)
            scaler.update()
        runs.append((dict(model.state_dict()), dense(preconditioner.layers)))
    assert_same(*runs)


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("at", [0, 2])
def test_statistics_are_skipped_with_the_step_that_overflows(estimator, at, structure):
    model, optimizer, (x, y) = network(4, 8, 3), None, batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    preconditioner = preconditioned(
        model, estimator, structure=structure, inverse_period=1, **scaled(estimator, scaler)
    )
    for step in range(5):
        before = copy.deepcopy((model.state_dict(), dense(preconditioner.layers)))
        optimizer.zero_grad()
        outputs = model(x)
        if estimator != "empirical":
            preconditioner.update(outputs)
        loss = functional.cross_entropy(outputs, y)
        scaler.scale(loss * (torch.inf if step == at else 1.0)).backward()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        after = (model.state_dict(), dense(preconditioner.layers))
        if step == at:
            assert_same(after, before)
        else:
            assert not torch.equal(after[0]["0.weight"], before[0]["0.weight"])
        assert preconditioner.rejected == (step >= at)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_large_float16_gradients_do_not_look_like_an_overflow():
    """Each is finite; only their sum in float16 would not be."""
    model, (x, _) = network(4, 40, 3).half(), batch()
    preconditioner = preconditioned(model, damping=1.0)
    preconditioner.update(model(x.half()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1000.0)
    preconditioner.step()
    assert preconditioner.rejected == 0


# -- dtypes --


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_factors_follow_the_parameters_half_precision_widened(dtype, structure, estimator):
    (x, y), runs = batch(), []
    for kind in (torch.float32, dtype):
        model = network(4, 8, 3, dtype=dtype).to(kind)  # the same weights
        likelihood = Fixed() if estimator == "sampled" else "categorical"
        preconditioner = preconditioned(model, estimator, likelihood, structure=structure, damping=0.1, kl_clip=0.01)
        came = one_step(model, preconditioner, x.to(dtype).to(kind), y)
        assert all(g.dtype == kind for g in came.values())
        layers = dense(preconditioner.layers)
        own = torch.float64 if kind == torch.float64 else torch.float32
        assert all(M.dtype == own for pair in layers.values() for M in pair)
        runs.append((came, layers))
    c = 20 * max(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps, 5)
    assert_near(*((found, layers) for found, layers in (runs[1], runs[0])), c=c)


def test_a_model_of_several_dtypes():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(4, 5).bfloat16(), nn.Linear(5, 6), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.three(self.two(self.one(x.bfloat16()).float()).double())

    model = Cast()
    preconditioner = preconditioned(model, kl_clip=1e-3)
    came = one_step(model, preconditioner, *batch())
    assert len(came) == 6
    assert all(bool(g.isfinite().all()) for g in came.values())
    assert preconditioner.rejected == 0


def test_factors_in_float64_on_request():
    model, (x, y) = network(4, 3).double(), batch()
    preconditioner = preconditioned(model, factor_dtype=torch.float64)
    one_step(model, preconditioner, x.double(), y)
    assert all(M.dtype == torch.float64 for M in preconditioner.layers["0"])
