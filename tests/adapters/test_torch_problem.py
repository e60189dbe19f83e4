"""Statistics, gradient and the exact Fisher's inner products, against loops over examples and dense Jacobians."""

from itertools import pairwise

import pytest
import torch
from backends import DEVICES
from torch import nn

from kfaclinalg import KFACOptions
from kfaclinalg_torch import KFAC
from kfaclinalg_torch._batch import Batch
from kfaclinalg_torch._likelihoods import LIKELIHOODS

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
N, SIZES = 6, (3, 4, 2, 3)


def network(inplace=False, bias=True):
    torch.manual_seed(0)
    layers = []
    for n, m in pairwise(SIZES):
        layers += [nn.Linear(n, m, bias=bias), nn.LeakyReLU(inplace=True) if inplace else nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class Case:
    def __init__(self, likelihood, device="cpu", *, model=None, **options):
        self.model = (model or network()).to(device)
        self.likelihood = LIKELIHOODS[likelihood]
        self.inputs = torch.randn(N, SIZES[0], dtype=torch.float64, device=device)
        self.generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            self.targets = self.likelihood.sample(self.model(self.inputs), self.generator)
        everything = {"statistics_fraction": 1.0, "curvature_fraction": 1.0, "generator": self.generator}
        self.options = KFACOptions(**(everything | options))
        batch = Batch(self.inputs, self.targets)
        optimizer = KFAC(self.model, likelihood, **self.options._asdict())
        self.layers, self.network = optimizer._trained.layers, optimizer._trained.network
        self.problem = optimizer._problem(batch, optimizer._trained.capture(), self.options)
        self.weights = self.network.weights()

    def forward(self, weights, inputs):
        """The network by hand, from the matrices W = [weight, bias]."""
        for i, W in enumerate(weights):
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1) @ W.T
            inputs = torch.tanh(inputs) if i < len(weights) - 1 else inputs
        return inputs

    def fix_the_samples(self, monkeypatch):
        """The targets of each example, whatever subset or chunk it comes in: those of the batch."""
        position = {tuple(row.tolist()): i for i, row in enumerate(self.model(self.inputs).detach())}

        def sample(self_, outputs, generator):
            nearest = torch.cdist(outputs, self.model(self.inputs).detach()).argmin(dim=1)
            return self.targets[nearest]

        assert len(position) == N
        monkeypatch.setattr(type(self.likelihood), "sample", sample)


@every_likelihood
@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_that_of_the_mean_loss(likelihood, device):
    case = Case(likelihood, device)
    loss, gradient = case.problem.loss_and_gradient(case.weights)
    case.likelihood.loss(case.model(case.inputs), case.targets).backward()
    assert loss.item() == pytest.approx(case.problem.loss(case.weights).item(), rel=1e-14)
    for layer, part in zip(case.layers, gradient, strict=True):
        weight, bias = layer.parameters
        expected = torch.cat([weight.grad, bias.grad[:, None]], dim=1)
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)


@every_likelihood
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("links", [False, True])
def test_the_factors_are_the_moments_of_single_examples(likelihood, device, links, monkeypatch):
    """g is the gradient of the loss of ONE example: taken from a loop over batches of one, it fixes G's scale."""
    case = Case(likelihood, device)
    case.fix_the_samples(monkeypatch)
    a, g = [[] for _ in SIZES[1:]], [[] for _ in SIZES[1:]]
    for i in range(N):
        x, outputs = case.inputs[i : i + 1], []
        for j, W in enumerate(case.weights):
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
            a[j].append(x[0].detach())
            x = (x @ W.T).requires_grad_()
            outputs.append(x)
            x = torch.tanh(x) if j < len(SIZES) - 2 else x
        loss = case.likelihood.loss(x, case.targets[i : i + 1])
        for j, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            g[j].append(gradient[0])
    factors = case.problem.factors(case.weights, links)

    def moment(x, y):
        return sum(torch.outer(*pair) for pair in zip(x, y, strict=True)) / N

    for j, layer in enumerate(factors.layers):
        torch.testing.assert_close(layer.A, moment(a[j], a[j]), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(layer.G, moment(g[j], g[j]), rtol=1e-12, atol=1e-15)
    assert len(factors.links) == (len(SIZES) - 2 if links else 0)
    for j, link in enumerate(factors.links):
        torch.testing.assert_close(link.A, moment(a[j], a[j + 1]), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(link.G, moment(g[j], g[j + 1]), rtol=1e-12, atol=1e-15)


@every_likelihood
@pytest.mark.parametrize("device", DEVICES)
def test_the_curvature_gram_is_that_of_the_exact_fisher(likelihood, device):
    """F = mean Jᵀ F_R J, from a dense Jacobian and the Hessian of the loss, example by example."""
    case = Case(likelihood, device)
    directions = [tuple(torch.randn_like(W) for W in case.weights) for _ in range(3)]
    D = torch.stack([torch.cat([d.flatten() for d in direction]) for direction in directions])
    expected = torch.zeros(3, 3, dtype=torch.float64, device=device)
    for x, y in zip(case.inputs, case.targets, strict=True):
        blocks = torch.func.jacrev(lambda weights, x=x: case.forward(weights, x[None])[0])(case.weights)
        J = torch.cat([block.flatten(1) for block in blocks], dim=1)
        z = case.forward(case.weights, x[None])[0]
        H = torch.func.hessian(lambda z, y=y: case.likelihood.loss(z[None], y[None]))(z)
        expected += D @ J.T @ H @ J @ D.T / N
    gram = case.problem.curvature_gram(case.weights, directions)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, expected, rtol=1e-10, atol=1e-13)


@every_likelihood
@pytest.mark.parametrize("size", [1, 4, 5])
def test_chunks_give_the_same_result(likelihood, size):
    """The sampled targets too: they are drawn for the whole batch."""
    whole, chunked = Case(likelihood), Case(likelihood, chunk_size=size)
    chunked.inputs.copy_(whole.inputs)
    chunked.targets.copy_(whole.targets)
    directions = [whole.weights]
    for f in (
        lambda p: p.loss_and_gradient(whole.weights),
        lambda p: p.factors(whole.weights, True),
        lambda p: p.curvature_gram(whole.weights, directions),
        lambda p: p.loss(whole.weights),
    ):
        torch.testing.assert_close(f(chunked.problem), f(whole.problem), rtol=1e-12, atol=1e-14)


def test_subsets_have_their_size_and_follow_the_generator():
    batch = Batch(torch.arange(80), torch.arange(80))
    one, two = (batch.subset(1 / 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert len(one) == 10
    ((share, piece),), pieces = one.chunks(None), list(two.chunks(4))
    assert (share, [share for share, _ in pieces]) == (1.0, [0.4, 0.4, 0.2])
    assert len(set(piece.targets.tolist())) == 10
    assert torch.equal(piece.inputs, piece.targets)
    assert torch.equal(torch.cat([piece.targets for _, piece in pieces]), piece.targets)
    assert len(batch.subset(1e-9, torch.Generator())) == 1
    assert batch.subset(1.0, torch.Generator()) is batch


def test_an_activation_that_overwrites_the_outputs_does_not_change_the_statistics(monkeypatch):
    one, two = Case("gaussian", model=network(inplace=True)), Case("gaussian", model=network(inplace=True))
    for i in (1, 3):
        two.model[i] = nn.LeakyReLU()
    two.inputs.copy_(one.inputs)
    two.targets.copy_(one.targets)
    one.fix_the_samples(monkeypatch)
    torch.testing.assert_close(one.problem.factors(one.weights, True), two.problem.factors(two.weights, True))


def test_layers_without_a_trained_bias_have_no_column_of_ones(monkeypatch):
    case = Case("gaussian", model=network(bias=False))
    assert [W.shape for W in case.weights] == [(4, 3), (2, 4), (3, 2)]
    assert [layer.A.shape for layer in case.problem.factors(case.weights, False).layers] == [(3, 3), (4, 4), (2, 2)]
    model = network()
    model[0].bias.requires_grad_(False)
    frozen_bias = Case("gaussian", model=model)
    assert frozen_bias.weights[0].shape == (4, 3)
    assert frozen_bias.problem.loss_and_gradient(frozen_bias.weights)[1][0].shape == (4, 3)


def bias_only():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.filterwarnings("ignore:KFAC")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU, "the model has no parameters to precondition"),
        (lambda: nn.Linear(2, 2).half(), "has dtype torch.float16, expected float32 or float64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "1 has dtype torch.float64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "1 is on meta, expected cpu"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        KFAC(model(), "gaussian")


def test_frozen_layers_are_left_out():
    model = network()
    model.append(nn.LayerNorm(3).double().requires_grad_(False))
    model[2].requires_grad_(False)
    optimizer = KFAC(model, "gaussian")
    assert optimizer._trained.names == ("0", "4")
    assert optimizer.skipped == dict.fromkeys(("2.weight", "2.bias", "5.weight", "5.bias"), "frozen")


def test_frozen_attention_is_the_same_in_evaluation():
    """Without the fast path, which has no products with the Jacobian."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True).requires_grad_(False)

        def forward(self, x):
            h = self.first(x)
            return self.last(self.attention(h, h, h)[0].sum(1))

    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model, x, y = Attending().double().train(training), torch.randn(6, 5, 3).double(), torch.randint(2, (6,))
        optimizer = KFAC(model, "categorical", generator=torch.Generator().manual_seed(0))
        optimizer.step(x, y)
        found.append(model.last.weight.detach())
    torch.testing.assert_close(*found)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_bias_by_itself_gets_the_diagonal():
    with pytest.warns(UserWarning, match="diagonal of the Fisher matrix"):
        optimizer = KFAC(bias_only(), "gaussian")
    assert optimizer.fallback.keys() == {"0.bias"}
