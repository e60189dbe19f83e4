"""`state_dict` and `remove`: a run goes on after a stop, and a model becomes what it was."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import (
    ESTIMATORS,
    Mixed,
    Partly,
    assert_same,
    assert_untouched,
    attributes,
    batch,
    dense,
    gradients,
    mixed_batch,
    network,
    one_step,
    preconditioned,
)

# -- state_dict --

STRUCTURES = {
    "block-diagonal": {},
    "substitution": {"inverse_period": 1},
    "exactly damped": {"exact_damping": True},
    "low rank": {"rank": 2},
    "reduce": {"weight_sharing": "reduce"},
    "eigen": {"structure": "eigen"},
    "eigen reduce": {"structure": "eigen", "weight_sharing": "reduce"},
    "block-tridiagonal": {"structure": "block-tridiagonal"},
}


class Run:
    def __init__(self, structure, estimator, optimizer, seed=0):
        chain = structure == "block-tridiagonal"
        self.model, self.batch = (network(4, 6, 5, 3), batch) if chain else (Mixed(), mixed_batch)
        options = {"statistics_period": 2, "inverse_period": 3, "kl_clip": 0.1, "damping": 0.1} | STRUCTURES[structure]
        self.preconditioner = preconditioned(self.model, estimator, seed=seed, **options)
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.5)
        self.parts = (self.model, self.preconditioner, self.optimizer, self.scheduler)

    def go(self, steps):
        for step in steps:
            one_step(self.model, self.preconditioner, *self.batch(seed=step))
            self.optimizer.step()
            self.scheduler.step()
        return self


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


@pytest.mark.parametrize(("optimizer", "stop"), [("SGD", 1), ("AdamW", 5)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_resumed_run_is_bitwise_the_run_without_a_stop(structure, estimator, optimizer, stop):
    straight = Run(structure, estimator, OPTIMIZERS[optimizer]).go(range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in straight.parts], file)
    straight.go(range(stop, stop + 6))

    file.seek(0)
    resumed = Run(structure, estimator, OPTIMIZERS[optimizer], seed=7)  # its generator stands elsewhere
    for part, state in zip(resumed.parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed.go(range(stop, stop + 6))
    for part, expected in zip(resumed.parts, straight.parts, strict=True):
        assert_same(dict(part.state_dict()), dict(expected.state_dict()))


def test_a_state_with_a_grad_scaler_is_of_another_run_too():
    """It does not name the scaler, which is another object there."""
    one, other = (
        preconditioned(network(4, 3), "empirical", grad_scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        for scale in (2.0, 4.0)
    )
    other.load_state_dict(one.state_dict())
    assert other.estimator.grad_scaler is not one.estimator.grad_scaler


def test_a_state_is_a_snapshot():
    """Later steps do not change it, nor does loading it twice."""
    run = Run("block-diagonal", "exact", OPTIMIZERS["SGD"]).go(range(3))
    state = run.preconditioner.state_dict()
    before = copy.deepcopy(state)
    run.go(range(3, 6))
    assert_same(state, before)
    run.preconditioner.load_state_dict(state)
    run.go(range(3, 6))
    assert_same(state, before)


def test_a_state_from_before_the_first_step_loads():
    model = network(4, 3)
    preconditioner = preconditioned(model)
    preconditioner.load_state_dict(preconditioner.state_dict())
    one_step(model, preconditioner, *batch())


def test_a_state_of_a_model_with_an_idle_layer_loads():
    model = Partly()
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    other = preconditioned(Partly())
    other.load_state_dict(preconditioner.state_dict())
    assert_same(dense(other.layers), dense(preconditioner.layers))


def test_a_module_may_have_any_name():
    """`kind` is a key of the stored records too."""
    model = nn.ModuleDict({"kind": nn.Linear(4, 3), "moments": nn.Linear(3, 3)})
    model.forward = lambda x: model["moments"](model["kind"](x))
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    before = dense(preconditioner.layers)
    preconditioner.load_state_dict(preconditioner.state_dict())
    assert_same(dense(preconditioner.layers), before)


@pytest.mark.parametrize(
    ("other", "options"),
    [
        ((4, 6, 3), {}),
        ((4, 6, 5, 3), {}),
        ((5, 5, 3), {}),
        ((4, 5, 3), {"structure": "eigen"}),
        ((4, 5, 3), {"structure": "block-tridiagonal"}),
    ],
    ids=["widths", "layers", "inputs", "eigen", "block-tridiagonal"],
)
def test_the_state_of_another_model_or_structure_is_refused_and_changes_nothing(other, options):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, *batch())
    network_of_other = network(*other)
    refusing = preconditioned(network_of_other, **options)
    one_step(network_of_other, refusing, *batch(features=other[0]))
    before = copy.deepcopy(refusing.state_dict())
    with pytest.raises(ValueError, match="state"):
        refusing.load_state_dict(preconditioner.state_dict())
    assert_same(refusing.state_dict(), before)


# -- remove --


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_remove_leaves_the_model_as_it_was(estimator):
    model = Mixed()
    before = attributes(model)
    preconditioner = preconditioned(model, estimator)
    one_step(model, preconditioner, *mixed_batch())
    preconditioner.remove()
    assert_untouched(model, before)
    assert model.attention.forward.__func__ is nn.MultiheadAttention.forward
    preconditioner.remove()  # a second time it does nothing


def test_remove_in_the_middle_of_a_step_leaves_the_backward_pass_alone():
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model, "empirical")
    loss = functional.cross_entropy(model(x), y)
    preconditioner.remove()
    loss.backward()
    other = network(4, 3)
    functional.cross_entropy(other(x), y).backward()
    assert_same(gradients(model), gradients(other))


def test_remove_keeps_a_forward_of_ones_own():
    model = Mixed()
    original = model.attention.forward
    model.attention.forward = partial(original)
    before = attributes(model)
    preconditioned(model).remove()
    assert_untouched(model, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_preconditioners_of_one_model_are_removed_in_any_order(order):
    model = Mixed()
    before = attributes(model)
    both = [preconditioned(model, "exact") for _ in range(2)]
    for i in order:
        both[i].remove()
    assert_untouched(model, before)


def test_a_model_is_copied_and_pickled_after_remove():
    model, (x, y) = Mixed(), mixed_batch()
    preconditioner = preconditioned(model)
    one_step(model, preconditioner, x, y)
    preconditioner.remove()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_a_copy_of_a_model_in_training_is_a_model():
    """`torch.optim.swa_utils.AveragedModel` makes one."""
    model, (x, y) = Mixed(), mixed_batch()
    preconditioner = preconditioned(model, "exact")
    average = torch.optim.swa_utils.AveragedModel(model)
    with preconditioner.paused():  # by the modules' own passes; a rule's rounds in another order
        assert torch.equal(average(x), model(x))
    came = one_step(model, preconditioner, x, y)
    other = Mixed()
    assert_same(came, one_step(other, preconditioned(other, "exact"), x, y))
