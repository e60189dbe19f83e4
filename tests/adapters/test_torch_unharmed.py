"""What should not harm a run of `KFAC`: a perfect fit, bad batches, dead inputs, randomness, copies, interrupts."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kfaclinalg_torch import KFAC
from kfaclinalg_torch._network import Network

pytestmark = pytest.mark.usefixtures("double")


def regression(N=64, n=3, m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, n, generator=generator, dtype=torch.float64)
    return x, x @ torch.randn(n, m, generator=generator, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("weight_decay", [0.0, 1e-5])
def test_a_perfect_fit_does_not_raise_the_damping(weight_decay):
    """Its ρ is a quotient of rounding errors; data that come later must still be learnt."""
    model, (x, y) = nn.Linear(3, 2), regression()
    optimizer = KFAC(model, "gaussian", weight_decay=weight_decay)
    for _ in range(300):
        optimizer.step(x, y)
    assert optimizer.info.damping <= 1.0
    losses = [optimizer.step(x, 3 - y) for _ in range(60)]
    assert losses[-1] < 1e-3 * losses[0]


def test_many_bad_batches_leave_a_damping_to_go_on_with():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, x, y = KFAC(model, "gaussian"), torch.randn(64, 5), torch.randn(64, 2)
    for _ in range(10):
        before = optimizer.step(x, y)
    for _ in range(100):
        optimizer.step(x * math.nan, y)
        assert optimizer.info.refused
    assert optimizer.info.damping < 1000
    for _ in range(200):
        after = optimizer.step(x, y)
        assert not optimizer.info.refused
    assert after < 0.5 * before


def test_a_dead_input_without_damping_is_refused_once():
    """A is singular then: λ and γ begin to rise from 0."""
    model, (x, y) = nn.Linear(3, 2), regression()
    x[:, 1] = 0
    optimizer = KFAC(model, "gaussian", damping=0.0, weight_decay=0.0)
    first = optimizer.step(x, y)
    assert optimizer.info.refused == "the update is not finite"
    for _ in range(20):
        last = optimizer.step(x, y)
        assert not optimizer.info.refused
    assert last < first


EXACT = {"damping": 0.0, "weight_decay": 0.0, "damping_period": 1, "curvature_fraction": 1.0}


@pytest.mark.parametrize("chunk_size", [None, 24])
def test_one_step_is_of_one_function_with_dropout_on(chunk_size):
    """ρ of a quadratic problem is 1 only if the loss before, after, the gradient and J have the same masks."""
    model, (x, y) = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)), regression()
    optimizer = KFAC(model, "gaussian", chunk_size=chunk_size, **EXACT)
    losses = [optimizer.step(x, y) for _ in range(3)]
    assert optimizer.info.ratio == pytest.approx(1, abs=1e-9)
    assert len(set(losses)) == 3  # other masks in the next step


def test_a_step_draws_as_many_random_numbers_as_one_pass():
    model, (x, y) = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)), regression()
    optimizer = KFAC(model, "gaussian", **EXACT)
    torch.manual_seed(1)
    optimizer.step(x, y)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    model(x)
    assert torch.equal(after, torch.get_rng_state())


def test_running_statistics_move_once_a_step_and_not_in_a_refused_one():
    norm, (x, y) = nn.BatchNorm1d(3, affine=False), regression()
    model = nn.Sequential(norm, nn.Linear(3, 2))
    twin = copy.deepcopy(norm)
    optimizer = KFAC(model, "gaussian", **EXACT)
    for _ in range(3):
        optimizer.step(x, y)
        twin(x)
        optimizer.step(x * math.nan, y)
        assert optimizer.info.refused == "the loss is not finite"
    assert norm.track_running_stats
    for one, other in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(input=x)


def test_a_layer_may_be_called_by_keyword():
    (x, y), losses = regression(), []
    for make in (lambda: nn.Linear(3, 2), ByKeyword):
        torch.manual_seed(0)
        optimizer = KFAC(make(), "gaussian")
        losses.append([optimizer.step(x, y) for _ in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_goes_on_as_the_original(copied):
    model, (x, y) = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), regression()
    optimizer = KFAC(model, "gaussian")
    for _ in range(4):
        optimizer.step(x, y)
    other_model, other = copied((model, optimizer))
    assert [optimizer.step(x, y) for _ in range(6)] == [other.step(x, y) for _ in range(6)]
    for one, two in zip(model.parameters(), other_model.parameters(), strict=True):
        assert one is not two
        assert torch.equal(one, two)
    assert other.param_groups[0]["params"][0] is next(other_model.parameters())


def test_a_parameter_group_cannot_be_added():
    optimizer = KFAC(nn.Linear(3, 2), "gaussian")
    with pytest.raises(ValueError, match="takes its parameters from the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("how", ["replaced", "frozen"])
def test_what_happened_to_a_parameter_is_said(how):
    model, (x, y) = nn.Sequential(nn.Linear(3, 2)), regression()
    optimizer = KFAC(model, "gaussian")
    optimizer.step(x, y)
    if how == "replaced":
        model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    else:
        model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"'0.*' was {how} since the optimizer was made"):
        optimizer.step(x, y)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def interrupted(f, after):
    """f, interrupted at its call number `after` and never again."""
    calls = []

    def run(*args, **options):
        calls.append(None)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return f(*args, **options)

    return run


def half_done(assign, layers):
    """An assignment that is interrupted once, after so many layers."""
    calls = []

    def run(network, weights):
        calls.append(None)
        if len(calls) > 1:
            return assign(network, weights)
        assign(network, (*weights[:layers], *network.weights()[layers:]))
        raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("where", ["a pass", "the assignment"])
def test_an_interrupt_leaves_all_as_it_was(where, after, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = regression()
    optimizer = KFAC(model, "gaussian", damping_period=1)
    for _ in range(2):
        optimizer.step(x, y)
    before = tree_leaves(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    with monkeypatch.context() as patched:
        if where == "a pass":
            patched.setattr(model[2], "forward", interrupted(model[2].forward, after))
        else:
            patched.setattr(Network, "assign", half_done(Network.assign, after % 3))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(x, y)
    now = tree_leaves((model.state_dict(), optimizer.state_dict()))
    for one, other in zip(now, before, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    _, twin = copy.deepcopy((model, optimizer))
    assert optimizer.step(x, y) == twin.step(x, y)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian"])
def test_a_bad_batch_is_refused_whatever_is_sampled(likelihood, value):
    """To draw from NaN raises on a CPU, and ends a process with a GPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer, x = KFAC(model, likelihood), torch.randn(64, 5)
    y = torch.randint(2, (64,)) if likelihood == "categorical" else torch.rand(64, 2).round()
    optimizer.step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(x * value, y)
    assert optimizer.info.refused
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.step(x, y)
    assert not optimizer.info.refused
