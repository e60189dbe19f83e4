"""The layers and models that `KFACPreconditioner` cannot treat, or treats in part."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from training import ESTIMATORS, Partly, assert_near, backward, batch, gradients, network, one_step, preconditioned

from kfaclinalg import Factors, LayerFactors, block_diagonal_inverse
from kfaclinalg_torch import KFACPreconditioner


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x + self.shift)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.layer = nn.LSTM(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.lstm(x)[0])


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear, self.layer = nn.Bilinear(4, 4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(self.bilinear(x, x))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.spectrum, self.layer = nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.spectrum(x.to(torch.complex64)).abs())


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.layer = embedding, nn.Linear(4, 3)

    def forward(self, x):
        x = self.embedding((x.abs() * 3).long().clamp(max=6))
        return self.layer(x if x.ndim == 2 else x.mean(1))


class Normalised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.one, self.norm, self.layer = nn.Linear(4, 4), norm, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.norm(self.one(x).unflatten(1, (2, 2))).flatten(1))


class TiedConvolutions(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.one, self.two = (nn.Conv1d(2, 2, 3, padding=1, bias=bias) for _ in range(2))
        self.two.weight, self.layer = self.one.weight, nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(self.two(self.one(x.unflatten(1, (2, 2))).tanh()).flatten(1))


class TiedNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.layer = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.layer(self.two(self.one(x).tanh()))


def frozen():
    model = network(4, 5, 3)
    model[0].weight.requires_grad_(False)
    return model


def lazy():
    return nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3))


def normed(wrap):
    return lambda: nn.Sequential(wrap(nn.Linear(4, 5)), nn.Linear(5, 3))


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


UNTREATED = {
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)), {"1.weight"}, "PReLU"),
    "Parameter": (Raw, {"shift"}, "Raw"),
    "weight_norm": (
        normed(parametrizations.weight_norm),
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
        "computed from|made of",
    ),
    "old weight_norm": (normed(old_weight_norm), {"0.bias", "0.weight_g", "0.weight_v"}, "computed from|made of"),
    "spectral_norm": (
        normed(parametrizations.spectral_norm),
        {"0.bias", "0.parametrizations.weight.original"},
        "computed from|made of",
    ),
    "LazyLinear": (lazy, {"1.weight", "1.bias"}, "not initialised"),
    "frozen weight": (frozen, {"0.bias"}, "frozen"),
    "sparse Embedding": (lambda: Words(nn.Embedding(7, 4, sparse=True)), {"embedding.weight"}, "sparse"),
    "by frequency": (
        lambda: Words(nn.Embedding(7, 4, scale_grad_by_freq=True)),
        {"embedding.weight"},
        "frequency",
    ),
    "EmbeddingBag": (lambda: Words(nn.EmbeddingBag(7, 4)), {"embedding.weight"}, "EmbeddingBag"),
    "SyncBatchNorm": (
        lambda: Normalised(nn.SyncBatchNorm(2)).eval(),
        {"norm.weight", "norm.bias"},
        "SyncBatchNorm",
    ),
    "InstanceNorm": (
        lambda: Normalised(nn.InstanceNorm1d(2, affine=True)),
        {"norm.weight", "norm.bias"},
        "InstanceNorm1d",
    ),
    "complex": (Complex, {"spectrum.weight", "spectrum.bias"}, "not real"),
    "tied convolutions": (TiedConvolutions, {"one.weight"}, "tied"),
    "tied normalisations": (TiedNorms, {"one.weight", "one.bias", "two.bias"}, "tied"),
    "tied convolutions with biases of their own": (
        lambda: TiedConvolutions(bias=True),
        {"one.weight", "one.bias", "two.bias"},
        "tied",
    ),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", UNTREATED)
def test_what_it_cannot_treat_is_named_with_the_reason_in_one_warning_and_left_alone(name, estimator):
    make, skipped, reason = UNTREATED[name]
    torch.manual_seed(0)
    model, (x, y) = make(), batch()
    with pytest.warns(UserWarning, match="KFACPreconditioner leaves") as caught:
        preconditioner = preconditioned(model, estimator, damping=0.1, fallback="none")
    (warning,) = caught
    assert warning.filename == preconditioned.__code__.co_filename  # where the preconditioner was made
    assert preconditioner.fallback == {}
    said = {parameter: why for parameter, why in preconditioner.skipped.items() if why != "frozen"}
    assert said.keys() == skipped
    for parameter, why in said.items():
        assert parameter in str(warning.message)
        assert why in str(warning.message)
    assert re.search(reason, " ".join(said.values()))

    if name == "SyncBatchNorm":
        return  # it runs on an accelerator alone
    outputs = model(x)
    if estimator != "empirical":
        preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    before = gradients(model)
    preconditioner.step()
    for parameter, g in gradients(model).items():
        assert torch.equal(g.to_dense(), before[parameter].to_dense()) == (parameter in skipped), parameter


@pytest.mark.filterwarnings("ignore:KFACPreconditioner leaves")
@pytest.mark.parametrize("generator", [None, torch.Generator()])
@pytest.mark.parametrize(
    "make", [nn.Tanh, lambda: network(4, 3).requires_grad_(False), lambda: nn.Sequential(nn.LazyLinear(3))]
)
def test_a_model_with_nothing_to_precondition_is_refused(make, generator):
    with pytest.raises(ValueError, match=r"(nothing|no layer|no parameter|none)"):
        KFACPreconditioner(make(), likelihood="categorical", generator=generator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_that_is_not_used_or_only_sometimes(estimator):
    model = Partly()
    preconditioner = preconditioned(model, estimator, inverse_period=3)
    for step in range(10):
        x, y = batch(seed=step)
        model.zero_grad()
        outputs = model(x, rarely=step % 4 == 2)
        if estimator != "empirical":
            preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        V = gradients(model)
        preconditioner.step()
        U = gradients(model)
        assert V.keys() == U.keys()
        assert all(not torch.equal(V[name], U[name]) for name in V)
        assert ("rare" in preconditioner.layers) == (step >= 2)
    assert "idle" not in preconditioner.layers


def test_a_layer_that_comes_late_is_averaged_from_its_own_first_statistic():
    model = Partly()
    preconditioner = preconditioned(model, "exact")
    for step in range(5):
        one_step(model, preconditioner, *batch(seed=step))
    x, y = batch(seed=9)
    outputs = model(x, rarely=True)
    preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    a = functional.pad(model.layer(x).detach(), (0, 1), value=1.0)
    assert_near(preconditioner.layers["rare"].A, a.mT @ a / len(x))


def test_two_layers_with_one_bias():
    """It is a layer of its own, A = 1 and the G of both: its gradient is preconditioned once."""
    torch.manual_seed(0)
    model = network(4, 4, 4, 4)
    model[2].bias = model[0].bias
    preconditioner = preconditioned(model, "exact", damping=0.1)
    (x, y) = batch()
    before = [p.detach().clone() for p in model.parameters()]
    came = one_step(model, preconditioner, x, y)
    assert preconditioner.skipped == {}
    layers = preconditioner.layers
    G = layers["0.bias"].G + layers["2.bias"].G
    plain = network(4, 4, 4, 4)
    plain[2].bias = plain[0].bias
    for p, value in zip(plain.parameters(), before, strict=True):
        p.data.copy_(value)
    functional.cross_entropy(plain(x), y).backward()
    P = block_diagonal_inverse(Factors((LayerFactors(torch.ones(1, 1), G),)), 0.1**0.5)
    (expected,) = P @ (plain[0].bias.grad[:, None],)
    assert torch.allclose(came["0.bias"], expected[:, 0], rtol=1e-4, atol=1e-7)


def test_skip_leaves_a_module_alone():
    model = network(4, 5, 3)
    with pytest.warns(UserWarning, match=r"2\.weight.*by name"):
        preconditioner = preconditioned(model, skip=["2"])
    assert preconditioner.skipped.keys() == {"2.weight", "2.bias"}
    x, y = batch()
    backward(model, preconditioner, x, y)
    V = gradients(model)
    preconditioner.step()
    assert torch.equal(model[2].weight.grad, V["2.weight"])
    assert not torch.equal(model[0].weight.grad, V["0.weight"])
