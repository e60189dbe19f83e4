import copy
import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
from backends import DEVICES
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten
from training import Waits

from kfaclinalg import KFACOptions, OuterProduct
from kfaclinalg_torch import KFAC, Gaussian
from kfaclinalg_torch._problem import Batch


def network(*sizes, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    layers = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(device, dtype)


def parity(N=256, dtype=torch.float32, device="cpu"):
    """Four bits in, their parity out: no linear function of the inputs helps."""
    x = torch.randint(2, (N, 4), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return 2 * x - 1, (x.sum(1) % 2).long()


def snapshot(model, optimizer):
    return copy.deepcopy((list(model.parameters()), optimizer.state_dict()))


def assert_same(one, two):
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(two)
    assert tree == other_tree
    assert all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(leaves, others, strict=True)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
def test_it_learns_parity(device, dtype, structure):
    model, (x, y) = network(4, 16, 8, 2, dtype=dtype, device=device), parity(dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    optimizer = KFAC(model, "categorical", structure=structure, damping=0.1, generator=generator)
    first = optimizer.step(x, y)
    for _ in range(80):
        last = optimizer.step(x, y)
        assert not optimizer.info.refused
    assert first > 0.6
    assert last < 0.01
    assert (model(x).argmax(1) == y).all()
    assert all(p.dtype == dtype and p.device.type == device for p in model.parameters())


def test_a_linear_gaussian_model_is_solved_in_one_step():
    """There K-FAC's A ⊗ G is the exact Fisher matrix but for the sampling of G, which the rescaling takes out."""
    torch.manual_seed(0)
    x = torch.randn(500, 3, dtype=torch.float64)
    y = x @ torch.randn(3, 1, dtype=torch.float64) + 1
    model = nn.Linear(3, 1).double()
    KFAC(model, "gaussian", damping=0.0, weight_decay=0.0, statistics_fraction=1.0, curvature_fraction=1.0).step(x, y)
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)


def test_the_loss_is_returned_with_its_weight_decay():
    model, (x, y) = network(4, 3, 2, dtype=torch.float64), parity(dtype=torch.float64)
    h = nn.functional.cross_entropy(model(x), y).item()
    squares = sum((p**2).sum().item() for p in model.parameters())
    optimizer = KFAC(model, "categorical", weight_decay=0.1)
    assert optimizer.step(x, y) == optimizer.info.loss == pytest.approx(h + 0.05 * squares, rel=1e-12)


def test_a_batch_with_nan_is_refused_and_nothing_else_changes():
    model, (x, y) = network(4, 3, 2), parity()
    optimizer = KFAC(model, "categorical")
    for _ in range(4):
        optimizer.step(x, y)
    parameters, state = snapshot(model, optimizer)
    bad = x.clone()
    bad[3, 1] = math.nan
    assert math.isnan(optimizer.step(bad, y))
    assert optimizer.info.refused == "the loss is not finite"
    after = optimizer.state_dict()
    assert_same(list(model.parameters()), parameters)
    assert after["state"].pop("damping") == pytest.approx(state["state"].pop("damping") / 0.95**5)
    assert_same(after["state"], state["state"])
    optimizer.step(x, y)
    assert not optimizer.info.refused


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(self.layer(x))


X, Y = parity()


@pytest.mark.parametrize(
    ("model", "inputs", "targets", "message"),
    [
        (None, X, Y[:-1], r"inputs and targets have \[256, 255\] examples, expected the same number > 0"),
        (None, X[:0], Y[:0], r"have \[0, 0\] examples"),
        (None, X, Y + 1, r"targets lie in \[1, 2\], expected \[0, 1\] \(categorical\)"),
        (None, X, Y[:, None], r"targets have shape \(256, 1\) for outputs of shape \(256, 2\)"),
        (None, X, Y.tolist(), "targets hold a list, expected a tensor, the batch first"),
        (None, X.tolist(), Y, "inputs hold a float, expected a tensor, a tuple or a dictionary of tensors"),
        (None, X[:, None], Y, r"targets have shape \(256,\) for outputs of shape \(256, 1, 2\)"),
        (Twice, X, Y, r"expected every trained parameter in a forward pass, got nothing of idle.weight, idle.bias"),
    ],
)
def test_mistakes_raise_and_change_nothing(model, inputs, targets, message):
    model = model() if model else network(4, 3, 2)
    optimizer = KFAC(model, "categorical")
    if not isinstance(model, Twice):
        optimizer.step(X, Y)
    before = snapshot(model, optimizer)
    info = optimizer.info
    with pytest.raises(ValueError, match=message):
        optimizer.step(inputs, targets)
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.info is info
    assert not any(module._forward_hooks for module in model.modules())


def graphs():
    return {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.grad_fn is not None}


def test_no_graph_no_hook_and_no_gradient_is_left():
    model, (x, y) = network(4, 3, 2), parity()
    optimizer = KFAC(model, "categorical")
    earlier = graphs()
    optimizer.step(x, y)
    gc.collect()
    assert graphs() <= earlier
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_it_steps_under_no_grad():
    model, (x, y) = network(4, 3, 2), parity()
    with torch.no_grad():
        KFAC(model, "categorical").step(x, y)


def test_inputs_may_be_a_tuple():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, shift):
            return self.layer(x) + shift

    x, y = parity()
    optimizer = KFAC(Sum(), "categorical", curvature_fraction=0.5)
    optimizer.step((x, torch.zeros(len(x), 1)), y)
    assert optimizer.info.refused == ""


def test_a_likelihood_of_ones_own():
    class Halved(Gaussian):
        """Variance ½: twice the loss, twice the Fisher matrix."""

        def loss(self, outputs, targets):
            return 2 * super().loss(outputs, targets)

        def fisher_product(self, outputs, tangents):
            return 2 * tangents

    x = torch.randn(50, 4)
    model = nn.Linear(4, 1)
    optimizer = KFAC(model, Halved(), damping=0.0, weight_decay=0.0, curvature_fraction=1.0, statistics_fraction=1.0)
    optimizer.step(x, x[:, :1])
    torch.testing.assert_close(model(x), x[:, :1], rtol=1e-4, atol=1e-4)


def test_frozen_parameters_stay():
    model, (x, y) = network(4, 3, 3, 2), parity()
    model[2].requires_grad_(False)
    frozen = model[2].weight.clone()
    before = model[0].weight.detach().clone()
    KFAC(model, "categorical").step(x, y)
    assert torch.equal(model[2].weight, frozen)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
def test_a_resumed_run_is_bitwise_the_same(tmp_path, structure):
    x, y = parity()
    straight = network(4, 8, 2)
    optimizer = KFAC(straight, "categorical", structure=structure, gamma_period=4, inverse_period=2)
    for _ in range(7):
        optimizer.step(x, y)
    torch.save((straight.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint")
    for _ in range(7):
        optimizer.step(x, y)

    resumed = network(4, 8, 2)
    other = KFAC(resumed, "categorical", structure=structure, gamma_period=4, inverse_period=2)
    model_state, optimizer_state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load_state_dict(model_state)
    other.load_state_dict(optimizer_state)
    for _ in range(7):
        other.step(x, y)
    assert_same(resumed.state_dict(), straight.state_dict())
    assert other.info[:6] == optimizer.info[:6]


def test_a_checkpoint_before_the_first_step_loads(tmp_path):
    optimizer = KFAC(network(4, 2), "categorical")
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.factors is None


def test_a_checkpoint_of_another_model_is_refused():
    optimizer = KFAC(network(4, 3, 2), "categorical")
    optimizer.step(*parity())
    other = KFAC(network(4, 2), "categorical")
    with pytest.raises(ValueError, match=r"layers \{'0': \[3, 5\], '2': \[2, 4\]\}, expected \{'0': \[2, 5\]\}"):
        other.load_state_dict(optimizer.state_dict())


def test_a_scheduler_is_refused_with_the_reason():
    optimizer = KFAC(network(4, 2), "categorical")
    with pytest.raises(ValueError, match="KFAC has no learning rate to schedule"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_the_options_are_those_of_the_core():
    optimizer = KFAC(network(4, 2), "categorical", damping=3.0, inverse_period=5)
    assert optimizer.options._replace(generator=None) == KFACOptions(damping=3.0, inverse_period=5)
    with pytest.raises(ValueError, match="damping is -1"):
        KFAC(network(4, 2), "categorical", damping=-1)
    with pytest.raises(TypeError, match="unknown options learning_rate, expected some of structure, damping, "):
        KFAC(network(4, 2), "categorical", learning_rate=0.1)
    with pytest.raises(TypeError, match=r"generator is 0, expected a torch\.Generator or None"):
        KFAC(network(4, 2), "categorical", generator=0)
    with pytest.raises(ValueError, match="likelihood is 'poisson', expected one of 'bernoulli', 'categorical', 'gau"):
        KFAC(network(4, 2), "poisson")
    with pytest.raises(ValueError, match="lacks the methods loss, sample, fisher_product"):
        KFAC(network(4, 2), object())


def test_runs_with_equal_seeds_are_equal():
    x, y = parity()
    models = [network(4, 3, 2) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed)  # the generator that KFAC makes is seeded from the global one
        optimizer = KFAC(model, "categorical")
        for _ in range(3):
            optimizer.step(x, y)
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


def test_running_factors_are_at_hand():
    optimizer = KFAC(network(4, 3, 2), "categorical")
    optimizer.step(*parity())
    assert [layer.A.shape for layer in optimizer.factors.layers] == [(5, 5), (4, 4)]
    assert [layer.G.shape for layer in optimizer.factors.layers] == [(3, 3), (2, 2)]


def trained(steps=30, *, sizes=(4, 8, 2), N=256, **options):
    """The parameters after some steps in float64, and the optimizer."""
    model, (x, y) = network(*sizes, dtype=torch.float64), parity(N, torch.float64)
    x = torch.nn.functional.pad(x, (0, sizes[0] - 4), value=0.5)
    optimizer = KFAC(model, "categorical", generator=torch.Generator().manual_seed(0), **options)
    for _ in range(steps):
        optimizer.step(x, y)
    return nn.utils.parameters_to_vector(model.parameters()), optimizer


@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
def test_a_run_in_chunks_is_the_run_on_whole_batches(structure):
    whole, chunked = (trained(structure=structure, chunk_size=size)[0] for size in (None, 50))
    torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-9)


def test_a_small_batch_is_preconditioned_by_its_outer_products(monkeypatch):
    """The end of Section 8: only without weight decay, on layers larger than the batch, and to the same result."""
    kept, case = [], {"sizes": (40, 30, 2), "N": 8}
    plain = OuterProduct.__post_init__
    monkeypatch.setattr(OuterProduct, "__post_init__", lambda self: (kept.append(self.shape), plain(self))[1])
    outer, _ = trained(weight_decay=0.0, **case)
    assert set(kept) == {(30, 41)}
    kept.clear()
    for options in ({"weight_decay": 1e-9}, {"chunk_size": 4}, {"structure": "block-tridiagonal"}):
        trained(2, **{"weight_decay": 0.0, **options}, **case)
    trained(2, sizes=(40, 30, 2), N=64, weight_decay=0.0)
    assert not kept
    monkeypatch.setattr(OuterProduct, "pays", lambda shape, r: False)
    torch.testing.assert_close(outer, trained(weight_decay=0.0, **case)[0], rtol=1e-9, atol=1e-9)
    assert not kept


def test_the_iterates_can_be_averaged():
    """Section 13, by torch's own AveragedModel."""
    model, (x, y) = network(4, 3, 2), parity()
    optimizer = KFAC(model, "categorical")
    average, expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), None
    for _ in range(4):
        optimizer.step(x, y)
        average.update_parameters(model)
        now = nn.utils.parameters_to_vector(model.parameters()).detach()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(nn.utils.parameters_to_vector(average.module.parameters()), expected)
    assert average.module(x).shape == (256, 2)


def test_nothing_of_a_deleted_optimizer_stays_on_the_model():
    model = network(4, 3, 2)
    optimizer = KFAC(model, "categorical")
    optimizer.step(*parity())
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_it_follows_the_growth_of_tau2(monkeypatch):
    """And a resumed run goes on with what it had grown to."""
    fractions, subset = [], Batch.subset
    monkeypatch.setattr(
        Batch,
        "subset",
        lambda self, fraction, generator: (fractions.append(fraction), subset(self, fraction, generator))[1],
    )
    optimizer, (x, y) = KFAC(network(4, 3, 2), "categorical"), parity()
    optimizer.step(x, y)
    assert fractions == [1 / 8, 1 / 4]
    saved = optimizer.state_dict()
    saved["state"]["curvature_fraction"] = 1 / 2
    optimizer.load_state_dict(saved)
    optimizer.step(x, y)
    assert fractions[2:] == [1 / 8, 1 / 2]


def test_a_step_waits_for_the_device_no_more_than_its_decisions_need():
    """One for the targets' range, and one for the step, whether it adapts λ and γ or not."""
    model, (x, y) = nn.Linear(3, 2), (torch.randn(20, 3), torch.randint(2, (20,)))
    optimizer = KFAC(model, "categorical", gamma_period=5, inverse_period=5)
    for _ in range(11):
        with Waits() as waits:
            optimizer.step(x, y)
        assert waits.count == 2
