"""What no rule knows: the diagonal of its Fisher matrix."""

import pytest
import torch
from dense_fisher import fisher, preconditioned
from torch import nn
from torch.nn import functional
from training import ESTIMATORS

from kfaclinalg_torch import KFAC, KFACPreconditioner
from kfaclinalg_torch._preconditioned import precondition

SLOW = "ignore:There is a performance drop"
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings(SLOW)]


class Token(nn.Module):
    """A class token and a layer scale."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.token, self.scale = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.head(self.scale * torch.tanh(self.first(x) + self.token))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_diagonal_of_the_fallback_is_unbiased(estimator):
    """The mean over many draws is the diagonal of the dense matrix, within 5 standard errors."""
    torch.manual_seed(0)
    model, x, y = Token(), (torch.randn(5, 3),), torch.randint(3, (5,))
    own = {} if estimator == "empirical" else {"likelihood": "categorical"}
    with pytest.warns(UserWarning, match="diagonal of the Fisher matrix"):
        preconditioner = KFACPreconditioner(
            model, estimator=estimator, generator=torch.Generator().manual_seed(0), inverse_period=1000, **own
        )
    found = {"token": [], "scale": []}
    estimate = preconditioner._estimate
    for _ in range(1500):
        estimate.begin(True, False)
        model.zero_grad()
        z = model(*x)
        if estimator != "empirical":
            preconditioner.update(z)
        else:
            functional.cross_entropy(z, y).backward()
        moments = estimate.statistic.moments(estimate.scale)
        for name, samples in found.items():
            samples.append(moments[name].G.d)
        estimate.capture.uses = []
    preconditioner.remove()
    for name, draws in found.items():
        samples = torch.stack(draws)
        expected = fisher(model, x, name, y=y if estimator == "empirical" else None).diagonal()
        error = samples.std(0) / len(samples) ** 0.5
        assert bool(((samples.mean(0) - expected).abs() <= 5 * error + 1e-12).all())
        assert float((error / expected).max()) < 0.1  # so that a factor would show


def test_two_passes_before_their_backward_passes_are_one_batch(monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = Token(), (torch.randn(6, 3), torch.randint(3, (6,)))
    with pytest.warns(UserWarning, match="diagonal of the Fisher matrix"):
        preconditioner = KFACPreconditioner(model, estimator="empirical")
    statistic, seen = preconditioner._estimate.statistic, []
    monkeypatch.setattr(statistic, "add_entries", lambda block, g: seen.append(block.name))
    passes = [model(x[:2]), model(x[2:])]
    sum(
        functional.cross_entropy(z, t, reduction="sum") / 6 for z, t in zip(passes, (y[:2], y[2:]), strict=True)
    ).backward()
    assert sorted(seen) == ["scale", "scale", "token", "token"]
    assert statistic.examples == 6


def test_a_step_of_the_diagonal_is_damped_as_the_others_are():
    torch.manual_seed(0)
    model, x = Token(), (torch.randn(5, 3),)
    preconditioner = preconditioned(model, x)
    A, G = preconditioner.layers["scale"]
    model.zero_grad()
    functional.cross_entropy(model(*x), torch.zeros(5, dtype=torch.int64)).backward()
    V = model.scale.grad.clone()
    with preconditioner.paused():
        precondition(preconditioner._layers, preconditioner._inverses, {}, preconditioner.factor_dtype, None, None, 0)
    gamma, pi = 0.1**0.5, (A[0, 0] / G.d.mean()) ** 0.5
    torch.testing.assert_close(model.scale.grad, V / ((A[0, 0] + pi * gamma) * (G.d + gamma / pi)))


def test_without_a_fallback_they_are_left_alone_and_listed():
    model = Token()
    with pytest.warns(UserWarning, match="leaves some gradients as they are"):
        preconditioner = KFACPreconditioner(model, likelihood="categorical", fallback="none")
    assert preconditioner.fallback == {}
    assert preconditioner.skipped.keys() == {"token", "scale"}
    with pytest.warns(UserWarning, match="leaves some gradients as they are"):
        optimizer = KFAC(model, "categorical", fallback="none")
    before = model.token.detach().clone()
    optimizer.step(torch.randn(5, 3), torch.randint(3, (5,)))
    assert torch.equal(model.token, before)


@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_sparse_gradient_is_left_alone(embedding, estimator):
    """It is for an optimizer that knows such, beside the others."""
    torch.manual_seed(0)
    model = nn.Sequential(embedding(6, 4, sparse=True), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randint(6, (5, 2)), torch.randint(3, (5,))
    model(x)
    preconditioner = preconditioned(model, (x,), y, estimator)
    assert preconditioner.skipped == {"0.weight": "its gradient is sparse"}
    assert model[0].weight.grad.is_sparse
    assert preconditioner.layers.keys() == {"2"}


def test_frozen_parameters_are_listed():
    model = Token()
    model.token.requires_grad_(False)
    model.first.requires_grad_(False)
    with pytest.warns(UserWarning, match="scale: no Kronecker factorisation of a Token"):
        preconditioner = KFACPreconditioner(model, likelihood="categorical")
    assert preconditioner.skipped == dict.fromkeys(("token", "first.weight", "first.bias"), "frozen")
