"""The errors of wrong options and of calls in a wrong order."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import ESTIMATORS, assert_untouched, attributes, backward, batch, network, one_step, preconditioned

from kfaclinalg import Eigen, Exact
from kfaclinalg_torch import KFAC, Categorical, KFACPreconditioner, Relative, Sampled, fit_curvature

MISTAKES = [
    ({"estimator": "fisher"}, "estimator is 'fisher', expected one of"),
    ({"structure": "kfac"}, "structure is 'kfac', expected one of"),
    ({"likelihood": None, "estimator": "empirical", "reduction": "average"}, "reduction is 'average', expected one of"),
    ({"reduction": "sum"}, "reduction would have no effect"),
    ({"estimator": "exact", "samples": 2}, "samples would have no effect"),
    ({"estimator": "exact", "grad_scaler": object()}, "grad_scaler would have no effect"),
    ({"estimator": "empirical"}, "likelihood would have no effect"),
    ({"kl_lr": 0.1}, "kl_lr would have no effect"),
    ({"structure": Exact(), "rank": 2}, "exact_damping, rank and pi_norm have no effect"),
    ({"estimator": Sampled(), "samples": 2}, "samples beside estimator"),
    ({"structure": Eigen}, "structure is"),
    ({"fallback": "ignore"}, "fallback is 'ignore', expected one of"),
    ({"layers": {nn.Linear: 3}}, "layers has the rule 3"),
    ({"layers": {"Linear": nn.Linear}}, "layers has the key 'Linear'"),
    ({"layers": [nn.Linear]}, "layers is"),
    ({"likelihood": "poisson"}, "likelihood is 'poisson', expected one of"),
    ({"likelihood": object()}, "lacks the methods"),
    ({"likelihood": None}, "likelihood"),
    ({"likelihood": Categorical}, r"likelihood is the class Categorical, expected an object, Categorical\(\)"),
    ({"weight_sharing": "both"}, "weight_sharing"),
    ({"weight_sharing": {"0": "both"}}, "weight_sharing"),
    ({"weight_sharing": {"nothing": "reduce"}}, "weight_sharing names nothing"),
    ({"skip": ["nothing"]}, "skip.*nothing"),
    ({"skip": "0"}, "skip"),
    ({"damping": -1.0}, "damping"),
    ({"damping": math.nan}, "damping"),
    ({"damping": Relative}, "damping is .*Relative.*, expected a number or a function"),
    ({"damping": math.inf}, "damping"),
    ({"decay": 1.0}, "decay"),
    ({"decay": -0.1}, "decay"),
    ({"decay": math.nan}, "decay"),
    ({"statistics_period": 0}, "statistics_period"),
    ({"statistics_period": -2}, "statistics_period"),
    ({"inverse_period": 0}, "inverse_period"),
    ({"inverse_period": -2}, "inverse_period"),
    ({"inverse_period": 2.5}, "inverse_period"),
    ({"samples": 0}, "samples"),
    ({"samples": -1}, "samples"),
    ({"kl_clip": -1.0}, "kl_clip"),
    ({"kl_clip": math.nan}, "kl_clip"),
    ({"kl_clip": 1.0, "kl_lr": -1.0}, "kl_lr"),
    ({"pi_norm": "nuclear"}, "norm"),
    ({"rank": 0}, "rank"),
    ({"factor_dtype": torch.bfloat16}, "factor_dtype"),
    ({"factor_dtype": torch.int64}, "factor_dtype"),
    ({"structure": "eigen", "rank": 2}, "rank"),
    ({"structure": "block-tridiagonal", "rank": 2}, "rank"),
    ({"structure": "block-tridiagonal", "exact_damping": True}, "exact_damping"),
    ({"exact_damping": True, "rank": 2}, "rank"),
]


@pytest.mark.parametrize(
    ("options", "message"), MISTAKES, ids=[re.sub(" at 0x.*", "", str(options)) for options, _ in MISTAKES]
)
def test_a_wrong_option_is_refused_at_once_and_leaves_no_hook(options, message):
    model = network(4, 5, 3)
    before = attributes(model)
    with pytest.raises((ValueError, TypeError), match=message):
        KFACPreconditioner(model, **({"likelihood": "categorical"} | options))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "make", [KFACPreconditioner, KFAC, lambda model, likelihood: fit_curvature(model, likelihood, [])]
)
def test_what_is_no_module_is_refused(make):
    with pytest.raises(TypeError, match=r"model is a generator, expected a torch\.nn\.Module"):
        make(network(4, 3).parameters(), likelihood="categorical")


def test_a_wrong_keyword_is_refused():
    with pytest.raises(TypeError, match="learning_rate"):
        KFACPreconditioner(network(4, 3), likelihood="categorical", learning_rate=0.1)


@pytest.mark.parametrize("name", ["damping", "inverse_period", "statistics_period", "kl_clip", "kl_lr"])
def test_what_a_callable_gives_is_checked_too(name):
    model = network(4, 5, 3)
    with pytest.raises(ValueError, match=name):  # noqa: PT012
        options = {"kl_clip": 1.0, "inverse_period": 1} | {name: lambda step: 1 if step < 2 else -1}
        preconditioner = preconditioned(model, **options)
        for step in range(4):
            one_step(model, preconditioner, *batch(seed=step))


@pytest.mark.parametrize("name", ["damping", "inverse_period", "length", "kl_clip", "kl_lr"])
def test_a_step_that_a_callable_has_stopped_is_taken_as_if_it_had_not(name):
    options = {} if name == "length" else {"kl_clip": 1.0}
    models = [network(4, 5, 3) for _ in range(2)]
    preconditioners = [preconditioned(model, statistics_period=1, **options) for model in models]
    for model, preconditioner in zip(models, preconditioners, strict=True):
        one_step(model, preconditioner, *batch())
        backward(model, preconditioner, *batch(seed=1))
    given = getattr(preconditioners[0], name)
    setattr(preconditioners[0], name, lambda step: -1)
    with pytest.raises(ValueError, match=name):
        preconditioners[0].step()
    setattr(preconditioners[0], name, given)
    for preconditioner in preconditioners:
        preconditioner.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p.grad, q.grad)
    came, expected = (preconditioner.state_dict() for preconditioner in preconditioners)
    assert came["averages"]["taken"] == expected["averages"]["taken"] == 2


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
class TestUpdate:
    def test_twice(self, estimator):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        preconditioner.update(outputs)
        with pytest.raises((RuntimeError, ValueError), match="update"):
            preconditioner.update(outputs)

    def test_between_statistics_it_does_nothing_however_often(self, estimator):
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator, statistics_period=2)
        one_step(model, preconditioner, x, y)
        outputs = model(x)
        preconditioner.update(outputs)
        preconditioner.update(outputs)

    @pytest.mark.parametrize("other", ["model", "pass without gradients", "detached", "earlier pass"])
    def test_with_outputs_of_something_else(self, estimator, other):
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        if other == "earlier pass":
            outputs = model(x)
            preconditioner.update(outputs)
            functional.cross_entropy(outputs, y).backward(retain_graph=True)
            preconditioner.step()
            model(x)
        elif other == "pass without gradients":
            with torch.no_grad():
                outputs = model(x)
        elif other == "detached":
            outputs = model(x).detach()
        else:
            model(x)
            outputs = network(4, 3, seed=1)(x)
        with pytest.raises((RuntimeError, ValueError), match=r"outputs|update"):
            preconditioner.update(outputs)

    @pytest.mark.parametrize("kind", [tuple, lambda z: {"logits": z}, lambda z: None])
    def test_with_what_is_no_tensor(self, estimator, kind):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = kind(model(x))
        with pytest.raises((TypeError, ValueError), match="outputs"):
            preconditioner.update(outputs)

    def test_after_the_backward_pass(self, estimator):
        model, (x, y) = network(4, 5, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        functional.cross_entropy(outputs, y).backward()
        with pytest.raises(RuntimeError, match=r"update\(outputs\) comes before loss\.backward\(\)"):
            preconditioner.update(outputs)

    def test_with_the_loss(self, estimator):
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        loss = functional.cross_entropy(model(x), y)
        with pytest.raises(ValueError, match="outputs is a scalar, expected what the model returned"):
            preconditioner.update(loss)

    def test_with_one_logit_for_each_example(self, estimator):
        model, (x, _) = network(4, 1), batch()
        preconditioner = preconditioned(model, estimator)
        with pytest.raises(ValueError, match=r"outputs have shape \(12,\), expected \(N, \.\.\., classes\)"):
            preconditioner.update(model(x)[:, 0])

    def test_with_a_pass_from_before(self, estimator):
        """Its layers, of which no call was seen, would be taken for none, for good."""
        model, (x, y) = network(4, 5, 3), batch()
        outputs = model(x)
        preconditioner = preconditioned(model, estimator)
        with pytest.raises(ValueError, match="a pass that was not seen"):
            preconditioner.update(outputs)
        one_step(model, preconditioner, x, y)
        assert list(preconditioner.layers) == ["0", "2"]
        assert not preconditioner.fallback

    def test_after_remove(self, estimator):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        preconditioner.remove()
        with pytest.raises(RuntimeError, match=r"after remove\(\)"):
            preconditioner.update(model(x))

    def test_of_a_copy(self, estimator):
        """The hooks stay with the original."""
        model, (x, y) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        one_step(model, preconditioner, x, y)
        model, preconditioner = copy.deepcopy((model, preconditioner))
        with pytest.raises(RuntimeError, match="or of a copy, has no hooks"):
            preconditioner.update(model(x))

    def test_after_an_input_was_changed_in_place(self, estimator):
        model, (x, _) = network(4, 3), batch()
        preconditioner = preconditioned(model, estimator)
        outputs = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="'0' were changed in place"):
            preconditioner.update(outputs)


def test_update_with_the_empirical_estimator():
    model = network(4, 3)
    preconditioner = preconditioned(model, "empirical")
    with pytest.raises(ValueError, match=r"'empirical' takes its statistics from loss.backward\(\)"):
        preconditioner.update(model(batch()[0]))


def test_an_input_changed_in_place_before_the_loss_s_own_backward_pass():
    """Where autograd itself has no need of it: the weight's gradient of a Linear whose weight is frozen later."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.Embedding(5, 3)

        def forward(self, tokens):
            return self.norm(tokens).sum(1)

    model, tokens = Sum(), torch.randint(5, (6, 2))
    preconditioner = preconditioned(model, "empirical")
    loss = functional.cross_entropy(model(tokens), torch.zeros(6, dtype=torch.int64))
    tokens.add_(0)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        loss.backward()
    assert preconditioner.layers == {}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_step_before_anything_was_captured(estimator):
    missing = r"loss.backward\(\)" if estimator == "empirical" else r"update\(outputs\)"
    model = network(4, 3)
    preconditioner = preconditioned(model, estimator)
    with pytest.raises(RuntimeError, match=f"nothing was captured before step.*{missing}"):
        preconditioner.step()
    one_step(model, preconditioner, *batch())  # it is as before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_second_step_on_the_same_gradients(estimator):
    model, (x, y) = network(4, 5, 3), batch()
    preconditioner = preconditioned(model, estimator, statistics_period=1)
    one_step(model, preconditioner, x, y)
    gradients = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="found the gradients as its last call has left them"):
            preconditioner.step()
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, g)


def test_a_step_before_the_backward_pass_is_warned_of():
    """The statistic is taken all the same."""
    model, (x, y) = network(4, 5, 3), batch()
    preconditioner = preconditioned(model, "exact", statistics_period=1)
    one_step(model, preconditioner, x, y)
    model.zero_grad(set_to_none=True)
    preconditioner.update(model(x))
    with pytest.warns(UserWarning, match="no parameter has a gradient in step"):
        preconditioner.step()
    assert preconditioner.state_dict()["averages"]["taken"] == 2


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_that_comes_out_the_same_is_a_new_one(to_none):
    model, (x, y) = network(4, 5, 3), batch()
    preconditioner = preconditioned(model, "exact", damping=1.0, inverse_period=100, decay=0.0)
    for _ in range(2):
        model.zero_grad(set_to_none=to_none)
        backward(model, preconditioner, x, y)
        preconditioner.step()
