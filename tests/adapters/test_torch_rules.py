"""The rules of the table, and rules of one's own, against the dense Fisher matrix by torch.func."""

from functools import wraps

import pytest
import torch
from dense_fisher import Head, fisher, preconditioned, turned
from torch import nn
from torch.nn import functional
from training import ESTIMATORS

from kfaclinalg_torch import KFAC, Embedding, KFACPreconditioner, Linear, Rule

SLOW = "ignore:There is a performance drop"
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings(SLOW)]


class Conv1D(nn.Module):
    """As in transformers, by the name of its class and module."""

    def __init__(self, m, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.randn(m))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class OwnRMSNorm(nn.Module):
    def __init__(self, n, offset=False):
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.rand(n) + 0.5), 1e-6, offset

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return torch.sin(x) if self.offset else self.weight * x


@pytest.mark.parametrize("name", ["Linear", "Bilinear", "Conv1D", "RNNCell", "GRUCell", "LSTMCell"])
def test_a_rule_has_the_exact_fisher_block_of_one_example(name):
    torch.manual_seed(0)
    made = {
        "Linear": lambda: (Head(nn.Linear(4, 5)), "layer", 5, 4),
        "Bilinear": lambda: (Head(nn.Bilinear(4, 4, 5), twice=True), "layer", 5, 16),
        "Conv1D": lambda: (Head(Conv1D(5, 4)), "layer", 5, 4),
        "RNNCell": lambda: (Head(nn.RNNCell(4, 5)), "layer.ih", 5, 4),
        "GRUCell": lambda: (Head(nn.GRUCell(4, 5)), "layer.ih", 15, 4),
        "LSTMCell": lambda: (Head(nn.LSTMCell(4, 5)), "layer.ih", 20, 4),
    }
    model, block, m, n = made[name]()
    x = (torch.randn(1, 3),)
    layer = preconditioned(model, x).layers[block]
    suffix = "_ih" if "Cell" in name else ""
    F = fisher(model, x, f"layer.weight{suffix}", f"layer.bias{suffix}")
    if name == "Conv1D":  # its weight is (inputs, outputs)
        rows = torch.cat([torch.arange(n * m).view(n, m).T.flatten(), n * m + torch.arange(m)])
        F = F[rows][:, rows]
    torch.testing.assert_close(torch.kron(*layer), turned(F, m, n), rtol=1e-10, atol=1e-14)


def test_the_recurrent_matrix_of_one_step_is_exact():
    """From a given state, one step: A is that of the state, and G that of its gates."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)

        def forward(self, x, h):
            return self.head(self.cell(x, h))

    torch.manual_seed(0)
    model, x = Step(), (torch.randn(1, 3), torch.randn(1, 4))
    layer = preconditioned(model, x).layers["cell.hh"]
    F = fisher(model, x, "cell.weight_hh", "cell.bias_hh")
    torch.testing.assert_close(torch.kron(*layer), turned(F, 12, 4), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_shares_its_weights_over_time(kind, sharing):
    """A and G of a layer that is its own cell, called step by step: every step is a use of the cell's weights."""

    class ByHand(nn.Module):
        def __init__(self, layer, head):
            super().__init__()
            cell = {nn.RNN: nn.RNNCell, nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell}[kind]
            self.cell, self.head = cell(4, 5), head
            for suffix in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(self.cell, suffix, getattr(layer, f"{suffix}_l0"))

        def forward(self, x):
            h = (x.new_zeros(len(x), 5),) * 2 if kind is nn.LSTM else x.new_zeros(len(x), 5)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.head(h[0] if kind is nn.LSTM else h)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Whole(), (torch.randn(6, 7, 4),)
    one = preconditioned(model, x, weight_sharing=sharing).layers
    other = preconditioned(ByHand(model.layer, model.head), x, weight_sharing=sharing).layers
    for kind_of in ("ih", "hh"):
        for came, expected in zip(one[f"layer.{kind_of}_l0"], other[f"cell.{kind_of}"], strict=True):
            torch.testing.assert_close(came, expected, rtol=1e-10, atol=1e-14)


def test_an_rmsnorm_of_a_class_of_ones_own_has_the_exact_blocks_of_its_channels():
    torch.manual_seed(0)
    model, x = Head(OwnRMSNorm(4), m=4), (torch.randn(6, 3),)
    preconditioner = preconditioned(model, x)
    assert preconditioner.fallback == preconditioner.skipped == {}
    F = fisher(model, x, "layer.weight")
    G = preconditioner.layers["layer"].G
    torch.testing.assert_close(G[:, 0, 0], F.diagonal(), rtol=1e-10, atol=1e-14)


class Experts(nn.Module):
    """Each row goes to one matrix of a stack."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x, which):
        out = torch.zeros_like(x)
        for i in which.unique():
            rows = (which == i).nonzero()[:, 0]
            h = torch.tanh(functional.linear(x[rows], self.up[i]))
            out = out.index_add(0, rows, functional.linear(h, self.down[i]))
        return out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.experts, self.head = nn.Linear(3, 4), Experts(), nn.Linear(4, 3)

    def forward(self, x, which):
        return self.head(self.experts(torch.tanh(self.first(x)), which))


def test_experts_have_a_factor_for_each_matrix_of_a_stack():
    torch.manual_seed(0)
    model, x, which = Mixture(), torch.randn(4, 3), torch.tensor([0, 2, 2, 2])
    preconditioner = preconditioned(model, (x, which))
    assert preconditioner.fallback == {}
    F = fisher(model, (x[:1], which[:1]), "experts.down")[:20, :20] / len(x)  # of the one row of the first expert
    A, G = preconditioner.layers["experts.down.0"]
    torch.testing.assert_close(torch.kron(A, G), turned(F, 4, 5, bias=False), rtol=1e-10, atol=1e-14)
    assert "experts.up.1" not in preconditioner.layers  # which nothing went to
    preconditioner.remove()
    x, which, y = torch.randn(64, 3), torch.randint(3, (64,)), torch.randint(3, (64,))
    optimizer = KFAC(model, "categorical", curvature_fraction=1.0)
    losses = [optimizer.step((x, which), y) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


class Named(Experts):
    """The same with weights that are given by name."""

    def forward(self, x, which):
        s = [functional.linear(weight=self.up[i], input=x[n : n + 1]) for n, i in enumerate(which)]
        h = torch.tanh(torch.cat(s))
        return torch.cat([functional.linear(h[n : n + 1], weight=self.down[i]) for n, i in enumerate(which)])


def test_the_weights_of_experts_may_be_given_by_name():
    torch.manual_seed(0)
    model, x = Mixture(), (torch.randn(4, 3), torch.tensor([0, 2, 2, 1]))
    expected = preconditioned(model, x).layers
    model.experts.__class__ = Named
    layers = preconditioned(model, x).layers
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(tuple(layer), tuple(expected[name]), rtol=1e-10, atol=1e-14)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Reshaped(nn.Linear):
    """Its parent's formula, in its own words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Conv2d(1, 5, 3), LayerNorm2d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(self.first(x.reshape(-1, 1, 1, 3).expand(-1, 1, 4, 3))).mean((2, 3)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [lambda: Head(Doubled(4, 5)), Image, lambda: Head(OwnRMSNorm(4, offset=True), m=4)])
def test_a_forward_pass_of_its_own_gets_the_diagonal(make, estimator):
    torch.manual_seed(0)
    model, x, y = make(), (torch.randn(6, 3),), torch.randint(3, (6,))
    own = {} if estimator == "empirical" else {"likelihood": "categorical"}
    preconditioner = KFACPreconditioner(model, estimator=estimator, **own)
    with pytest.warns(UserWarning, match="one of its own"):
        z = model(*x)
    names = {name for name, _ in model.named_parameters() if name.startswith("layer")}
    assert preconditioner.fallback.keys() == names
    if estimator != "empirical":
        preconditioner.update(z)
    functional.cross_entropy(z, y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    preconditioner.step()
    assert "layer" not in preconditioner.layers
    assert not any(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_class_that_does_what_its_parent_does_is_taken_for_it():
    torch.manual_seed(0)
    model, x = Head(Reshaped(4, 5)), (torch.randn(6, 3),)
    preconditioner = preconditioned(model, x)
    assert preconditioner.fallback == {}
    other = Head(nn.Linear(4, 5))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(preconditioner.layers, preconditioned(other, x).layers)


def test_the_user_may_say_what_a_class_is():
    torch.manual_seed(0)
    model, x = Head(Doubled(4, 5)), (torch.randn(6, 3),)
    preconditioner = preconditioned(model, x, layers={Doubled: nn.Linear})
    assert preconditioner.fallback == {}
    assert "layer" in preconditioner.layers


def test_a_rule_of_ones_own():
    def blocks(name, module):
        yield Linear(f"{name}.map", module.weight)

    def forward(module, see, x):
        s = 2 * x @ module.weight.T
        see("map", 2 * x, s, None)
        return s + module.bias

    torch.manual_seed(0)
    model, x = Head(Doubled(4, 5)), (torch.randn(1, 3),)
    preconditioner = preconditioned(model, x, layers={Doubled: Rule(blocks, forward)})
    assert preconditioner.fallback.keys() == {"layer.bias"}
    F = turned(fisher(model, x, "layer.weight"), 5, 4, bias=False)
    torch.testing.assert_close(torch.kron(*preconditioner.layers["layer.map"]), F, rtol=1e-10, atol=1e-14)


def test_a_function_of_blocks_is_a_rule():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 4))

        def forward(self, i):
            return self.weight[i]

    torch.manual_seed(0)
    model = nn.Sequential(Lookup(), nn.Tanh(), nn.Linear(4, 3))
    rule = {Lookup: lambda name, module: [Embedding(name, module.weight)]}
    layer = preconditioned(model, (torch.tensor([1, 1, 3]),), layers=rule).layers["0"]
    assert layer.A.d.tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0, 0, 0])


class TiedToDoubled(nn.Module):
    """A layer that shares its weight with one that is not what its class says."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.plain, self.head = nn.Linear(3, 4), Doubled(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.plain.weight = self.layer.weight

    def forward(self, x):
        return self.head(torch.tanh(self.plain(torch.tanh(self.layer(torch.tanh(self.first(x)))))))


@pytest.mark.filterwarnings("ignore:KFAC")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_tied_to_it_goes_too(estimator):
    torch.manual_seed(0)
    model, x, y = TiedToDoubled(), (torch.randn(6, 3),), torch.randint(3, (6,))
    preconditioner = preconditioned(model, x, y, estimator)
    assert "layer.weight" in preconditioner.fallback
    assert not {"layer", "plain"} & preconditioner.layers.keys()
    other = KFACPreconditioner(
        TiedToDoubled(), estimator=preconditioner.estimator, likelihood=preconditioner.likelihood
    )
    other.load_state_dict(preconditioner.state_dict())
    assert other.fallback == preconditioner.fallback
    preconditioner.remove()
    optimizer = KFAC(model, "categorical")
    for _ in range(3):
        optimizer.step(*x, y)
    assert optimizer.info.refused == ""
    again = KFAC(TiedToDoubled(), "categorical")
    again.load_state_dict(optimizer.state_dict())
    assert again.fallback == optimizer.fallback


class Functional(nn.Module):
    """Weights that are used without a call of their module."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return functional.linear(torch.tanh(self.first(x)), self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weights_that_are_used_without_a_call_get_the_diagonal(estimator):
    torch.manual_seed(0)
    model, x, y = Functional(), (torch.randn(6, 3),), torch.randint(3, (6,))
    preconditioner = preconditioned(model, x, y, estimator)
    assert preconditioner.fallback.keys() == {"layer.weight", "layer.bias"}
    assert preconditioner.layers.keys() == {"first", "layer.weight", "layer.bias"}


def doubled(forward):
    """A decorator that changes what a pass returns."""

    @wraps(forward)
    def run(self, x):
        return 2 * forward(self, x)

    return run


class Positions(nn.Module):
    """A stack of matrices that is none of a mixture of experts, under a decorator."""

    def __init__(self, stack):
        super().__init__()
        self.first, self.head, self.stack = nn.Linear(3, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(stack, 2, 4))

    @doubled
    def forward(self, x):
        return self.head(torch.tanh(self.first(x)[:, None, None] + self.stack).mean((1, 2)))


@pytest.mark.filterwarnings("ignore:KFAC")
@pytest.mark.parametrize("stack", [1, 3])
def test_no_pass_is_another_function_under_it(stack):
    torch.manual_seed(0)
    model, x, y = Positions(stack), torch.randn(6, 3), torch.randint(3, (6,))
    expected = model(x)
    loss = functional.cross_entropy(expected, y)
    optimizer = KFAC(model, "categorical", weight_decay=0.0)
    assert optimizer.step(x, y) == pytest.approx(float(loss.detach()))
    assert optimizer.fallback.keys() == {"stack"}
    expected = model(x)
    preconditioner = KFACPreconditioner(model, likelihood="categorical")
    for _ in range(3):
        came = model(x)
        torch.testing.assert_close(came, expected, rtol=0, atol=0)
        preconditioner.update(came)
        functional.cross_entropy(came, y).backward()
        preconditioner.step()
    assert preconditioner.fallback.keys() == {"stack"}
