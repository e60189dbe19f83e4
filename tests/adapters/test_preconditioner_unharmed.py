"""What happens to a model under a preconditioner: parameters replaced or frozen, the preconditioner forgotten."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from training import batch, network

from kfaclinalg_torch import KFAC, KFACPreconditioner

x, y = batch()


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2)


def step(model, preconditioner):
    model.zero_grad()
    outputs = model(x)
    preconditioner.update(outputs)
    nn.functional.cross_entropy(outputs, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    preconditioner.step()
    return plain


@pytest.mark.parametrize(
    ("name", "replace"),
    [
        ("0.weight", lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)),
        ("2", lambda model: model.__setitem__(2, nn.Linear(5, 3))),
        ("2.bias", lambda model: setattr(model[2], "bias", nn.Parameter(torch.zeros(3)))),
        ("2.bias", lambda model: setattr(model[2], "bias", None)),
    ],
    ids=["all parameters", "a module", "a bias", "a bias with none"],
)
def test_what_was_replaced_is_named(name, replace):
    model = network(4, 5, 3)
    preconditioner = KFACPreconditioner(model, likelihood="categorical")
    step(model, preconditioner)
    replace(model)
    outputs = model(x)
    preconditioner.update(outputs)
    nn.functional.cross_entropy(outputs, y).backward()
    before = {key: None if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"'{name}' was replaced since the preconditioner was made"):
        preconditioner.step()
    for key, p in model.named_parameters():
        assert (p.grad is None) == (before[key] is None)
        assert p.grad is None or torch.equal(p.grad, before[key])


@pytest.mark.parametrize("replace", [lambda model: model.__setitem__(2, nn.Linear(5, 3)), lambda model: model.pop(1)])
def test_what_was_replaced_after_another_was_deleted_is_named(replace):
    model = network(4, 5, 3).append(nn.Tanh())
    preconditioner, optimizer = KFACPreconditioner(model, likelihood="categorical"), KFAC(model, "categorical")
    del model[3]  # which gives the model a new dictionary of its modules
    step(model, preconditioner)
    optimizer.step(x, y)
    replace(model)
    with pytest.raises(ValueError, match="'2' was replaced since the preconditioner was made"):
        step(model, preconditioner)
    with pytest.raises(ValueError, match="'2' was replaced since the optimizer was made"):
        optimizer.step(x, y)


def test_what_is_frozen_later_is_left_alone():
    model = network(4, 5, 3)
    preconditioner = KFACPreconditioner(model, likelihood="categorical")
    step(model, preconditioner)
    stale = model[0].weight.grad.clone()
    model[0].requires_grad_(False)
    for p in model[2].parameters():
        p.grad = None
    outputs = model(x)
    preconditioner.update(outputs)
    nn.functional.cross_entropy(outputs, y).backward()
    plain = model[2].weight.grad.clone()
    preconditioner.step()
    assert torch.equal(model[0].weight.grad, stale)
    assert not torch.equal(model[2].weight.grad, plain)


def test_what_nobody_holds_goes_and_its_hooks_with_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    attention = nn.MultiheadAttention(4, 2)
    for module, inputs in ((model, (x,)), (attention, (x[:, None],) * 3)):
        preconditioner = KFACPreconditioner(module, estimator="empirical")
        gone = weakref.ref(preconditioner)
        module(*inputs)
        del preconditioner
        gc.collect()
        assert gone() is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        assert "forward" not in vars(module)
        module(*inputs)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_copy_of_the_model_shows_nothing(estimator):
    """A target network, say, which is run with gradients between two passes of the model."""
    runs = []
    for copied in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Halved(4, 8), nn.PReLU(), nn.Linear(8, 3))
        likelihood = None if estimator == "empirical" else "categorical"
        with pytest.warns(UserWarning, match="diagonal"):
            preconditioner = KFACPreconditioner(model, estimator=estimator, likelihood=likelihood)
        twin = copy.deepcopy(model)
        if copied:
            twin(x).sum().backward()
        with pytest.warns(UserWarning, match="this Halved is one of its own"):
            outputs = model(x)
        if copied:
            twin(x).sum().backward()
        if estimator == "exact":
            preconditioner.update(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        runs.append({name: p.grad for name, p in model.named_parameters()})
        assert preconditioner.layers.keys() == {"0.weight", "0.bias", "1.weight", "2"}
    assert all(torch.equal(g, runs[1][name]) for name, g in runs[0].items())


@pytest.mark.parametrize("value", [[0.1], None, True, torch.tensor(0.1), "0.1", 1j], ids=repr)
@pytest.mark.parametrize("name", ["damping", "decay", "statistics_period"])
def test_an_option_that_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} is .*, expected a number"):
        KFACPreconditioner(network(4, 3), likelihood="categorical", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exact_damping", 1),
        ("weight_sharing", 3),
        ("generator", 3),
        ("samples", [0.1]),
        ("samples", True),
        ("kl_clip", "0.1"),
        ("skip", [3]),
        ("estimator", ["sampled"]),
        ("structure", torch.ones(2)),
        ("pi_norm", 3),
        ("factor_dtype", torch.float16),
        ("rank", 1.5),
    ],
)
def test_an_option_of_another_kind_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        KFACPreconditioner(network(4, 3), likelihood="categorical", **{name: value})
