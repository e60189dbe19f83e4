"""`fit_curvature` leaves the model, and those who watch it, as they were."""

import pytest
import torch
from curvature_cases import Case, K, N
from torch import nn

from kfaclinalg_torch import KFAC, FisherOperator, KFACPreconditioner, fit_curvature

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")


def test_a_preconditioner_and_its_model_are_seen_together():
    """Both take the place of attention's forward pass, and each sees what it would alone."""
    case = Case("attending")
    expected, found = case.fit(), []
    for fitted in (False, True):
        preconditioner = KFACPreconditioner(case.model, likelihood="categorical", estimator="exact")
        outputs = case.model(case.x)
        with preconditioner.paused():
            curvature = case.fit() if fitted else expected
        assert torch.equal(curvature.operator.to_dense(), expected.operator.to_dense())
        preconditioner.update(outputs)
        nn.functional.cross_entropy(outputs, case.y).backward()
        preconditioner.step()
        found.append(preconditioner.layers)
        preconditioner.remove()
    assert type(case.model.attention).forward is case.model.attention.forward.__func__
    assert found[0].keys() == found[1].keys() == expected.layers.keys()
    assert all(torch.equal(M.G, found[1][name].G) for name, M in found[0].items())
    other = KFACPreconditioner(case.model, likelihood="categorical", estimator="exact")
    KFAC(case.model, "categorical").step(case.x, case.y)
    other.update(case.model(case.x))
    other.step()
    assert other.layers.keys() == found[0].keys()


@pytest.mark.parametrize("name", ["mlp", "attending"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_preconditioner_does_not_see_the_passes_of_a_fit(name, estimator):
    """Not paused, between the backward pass and the step, of the model and of what it is a part of."""
    found = []
    for fitted in (False, True):
        case = Case(name)
        own = {} if estimator == "empirical" else {"likelihood": "categorical"}
        whole = nn.Sequential(case.model)
        preconditioner = KFACPreconditioner(whole, estimator=estimator, **own)
        outputs = whole(case.x)
        if own:
            preconditioner.update(outputs)
        nn.functional.cross_entropy(outputs, case.y).backward()
        if fitted:
            curvature = case.fit(structure="eigen")
            curvature.self_scores(case.loader())
            FisherOperator(case.model, "categorical", case.loader()).gradient()
        preconditioner.step()
        found.append(preconditioner.layers)
    for one, other in zip(*(layers.values() for layers in found), strict=True):
        assert torch.equal(one.A.diagonal(), other.A.diagonal())
        assert torch.equal(one.G, other.G)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, K)).double()
    x, before = torch.randn(N, 5).double(), {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    curvature = fit_curvature(
        model, "categorical", (x, torch.randint(K, (N,), generator=torch.Generator())), progress=False
    )
    curvature.variances(x)
    FisherOperator(model, "categorical", (x, torch.zeros(N, dtype=torch.int64))).gradient()
    assert model.training
    assert model[2].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_has_changed_is_refused():
    """Its new layer would be seen by nobody, and add nothing to the scores."""
    case = Case("mlp")
    curvature, F = case.fit(), FisherOperator(case.model, "categorical", case.loader())
    uses = (
        lambda: curvature.self_scores(case.loader()),
        lambda: curvature.variances(case.x),
        curvature.sample,
        F.gradient,
        lambda: F @ curvature.pack(case.parameters),
    )
    old, case.model[2] = case.model[2], nn.Linear(6, K).double()
    for of in uses:
        with pytest.raises(ValueError, match="'2' was replaced since the curvature was made"):
            of()
    case.model[2] = old
    case.model.float()
    for of in uses:
        with pytest.raises(ValueError, match=r"'0\.weight' was \(torch\.float64, 'cpu'\) when the curvature was made"):
            of()


def test_a_model_may_be_frozen_after_the_fit():
    case = Case("tied")
    curvature = case.fit()
    scores, variances = curvature.self_scores(case.loader()), curvature.variances(case.x)
    case.model.requires_grad_(False)
    assert torch.equal(curvature.self_scores(case.loader()), scores)
    assert torch.equal(curvature.variances(case.x), variances)
    assert not any(p.requires_grad for p in case.model.parameters())


class Failing(nn.Module):
    """Takes a batch of N, and of it no smaller one."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(5, K), nn.Dropout(0.5)

    def forward(self, x):
        if len(x) < 3:
            raise RuntimeError("too few")
        return self.layer(self.dropout(x))


def test_the_model_is_left_as_it_was_after_an_error():
    """As long as somebody holds the error, too."""
    model, x, y = Failing(), torch.randn(N, 5), torch.randint(K, (N,))
    curvature, data = fit_curvature(model, "categorical", (x, y), progress=False), [(x, y), (x[:2], y[:2])]
    F = FisherOperator(model, "categorical", data)
    Vs = curvature.pack(dict(model.named_parameters()))
    for of in (
        lambda: fit_curvature(model, "categorical", data, progress=False),
        lambda: curvature.scores((x, y), data),
        lambda: curvature.self_scores(data),
        lambda: curvature.variances([x, x[:2]]),
        lambda: F @ Vs,
        F.gradient,
    ):
        with pytest.raises((ValueError, RuntimeError), match="too few") as error:
            of()
        assert model.training
        assert model.dropout.training
        assert not model.layer._forward_hooks
        assert not model._forward_pre_hooks
        assert torch.is_grad_enabled()
        assert error
