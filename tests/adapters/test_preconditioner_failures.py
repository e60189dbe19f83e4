"""What becomes of a factor that has no inverse, and of what is not finite."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten
from training import ESTIMATORS, assert_near, assert_same, batch, dense, gradients, network, one_step, preconditioned

from kfaclinalg import Exact, Factored, Factors, Kronecker, LayerFactors, LinAlgError, block_diagonal_inverse
from kfaclinalg_torch._averages import Averaged
from kfaclinalg_torch._inverses import Inverses

FACTORED = Factored()

# -- the failure ladder --


def refreshed(A, G, damping, structure=FACTORED):
    """The inverse that one refresh makes of these factors."""
    found = Inverses(structure, ())
    found.refresh(0, 1, damping, Averaged({"layer": LayerFactors(A, G)}, (), {}))
    return found.inverses["layer"]


@pytest.mark.parametrize("structure", [Factored(), Exact()])
def test_what_is_not_symmetric_is_symmetrised(structure):
    A, skew, G = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.0, 0.3], [-0.3, 0.0]]), torch.eye(2)
    assert_near(refreshed(A + skew, G, 0.1, structure).to_dense(), refreshed(A, G, 0.1, structure).to_dense())


def test_what_float32_cannot_invert_is_inverted_in_float64():
    A, G, damping = torch.ones(2, 2), torch.eye(2), 1e-18  # 1 + γ is 1 in float32
    assert not bool(block_diagonal_inverse(Factors((LayerFactors(A, G),)), 1e-9).blocks[0].A.isfinite().all())
    came = refreshed(A, G, damping)
    assert isinstance(came, Kronecker)
    assert came.A.dtype == came.B.dtype == torch.float32
    expected = torch.linalg.inv(A.double() + 1e-9 * torch.eye(2))
    torch.testing.assert_close(came.A.double(), expected, rtol=1e-6, atol=0)


def test_what_float64_cannot_invert_gets_more_damping_but_not_without_bound():
    c = 1 + 2.0**-23
    A, G = torch.tensor([[1.0, c], [c, 1.0]]), torch.eye(2)  # an eigenvalue is -1.2e-7
    came = refreshed(A, G, 1e-15)
    wide = Factors((LayerFactors(A.double(), G.double()),))
    (expected,) = block_diagonal_inverse(wide, 1e-13**0.5).blocks  # 10 times is γ = 1e-7, too little
    torch.testing.assert_close(came.A.double(), expected.A, rtol=1e-5, atol=0)
    indefinite = Inverses(Factored(), ())
    indefinite.refresh(0, 1, 1e-15, Averaged({"layer": LayerFactors(torch.diag(torch.tensor([1.0, -1.0])), G)}, (), {}))
    assert indefinite.inverses == {}


def test_an_inverse_that_only_float64_holds_is_not_an_inverse():
    """1e45 is finite in float64 and infinite in float32: a NaN in the gradient."""
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    inverses = Inverses(Factored(), ())
    inverses.refresh(0, 1, 1e-90, Averaged({"layer": LayerFactors(singular, torch.eye(2))}, (), {}))
    ((_, U),) = inverses.apply([("layer", torch.diag(torch.tensor([1.0, 0.0])))])
    assert bool(U.isfinite().all())


class Failing:
    """A structure which fails on demand for one of the layers."""

    linked = observes = False

    def __init__(self, width):
        self.width, self.fails, self.tried = width, False, []

    def fitted(self, factors, old):
        return factors

    def inverse(self, fitted, gamma):
        inverse = Factored(method="cholesky").inverse(fitted, gamma)
        (layer,) = fitted.layers
        if layer.A.shape[-1] != self.width:
            return inverse
        self.tried.append((layer.A.dtype, pytest.approx(gamma**2)))
        return torch.utils._pytree.tree_map(lambda x: math.nan * x, inverse) if self.fails else inverse


def failing(model, width=6, **options):
    preconditioner = preconditioned(model, "exact", inverse_period=1, damping=0.01, **options)
    preconditioner._inverses.structure = build = Failing(width)
    return preconditioner, build


def test_the_rungs_of_the_ladder_in_their_order():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    one_step(model, preconditioner, *batch())
    assert build.tried == [(torch.float32, 0.01)]
    build.tried.clear()
    build.fails = True
    one_step(model, preconditioner, *batch())
    assert [dtype for dtype, _ in build.tried[:2]] == [torch.float32, torch.float64]
    dampings = [damping.expected for _, damping in build.tried]
    assert dampings[0] == dampings[1] == pytest.approx(0.01)
    assert all(low < high for low, high in pairwise(dampings[1:]))
    assert 3 <= len(dampings) <= 10
    assert dampings[-1] <= 1e6 * dampings[0]


def test_a_layer_that_fails_keeps_its_inverse_and_the_others_get_theirs():
    model, other = network(4, 5, 3), network(4, 5, 3)
    (preconditioner, build), plain = failing(model), preconditioned(other, "exact", inverse_period=1, damping=0.01)
    for M, P in ((model, preconditioner), (other, plain)):
        one_step(M, P, *batch(seed=0))
    build.fails = True
    kept = plain._inverses.inverses["2"]
    came = one_step(model, preconditioner, *batch(seed=1))
    expected = one_step(other, plain, *batch(seed=1))
    assert torch.equal(came["0.weight"], expected["0.weight"])
    assert not torch.equal(came["2.weight"], expected["2.weight"])
    x, y = batch(seed=1)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    V = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], dim=1)
    assert_near(torch.cat([came["2.weight"], came["2.bias"][:, None]], dim=1), kept @ V)


def test_the_third_failure_in_a_row_raises_and_says_what_and_why():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    for fails in (False, True, True, False, True, True):
        build.fails = fails
        came = one_step(model, preconditioner, *batch())
        assert all(bool(g.isfinite().all()) for g in came.values())
    with pytest.raises(LinAlgError, match=r"'2'.*3 refreshes.*condition.*[Ll]ikely causes"):
        one_step(model, preconditioner, *batch())


def test_only_refreshes_count():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    preconditioner.inverse_period = 4

    def steps(first, last):
        for step in range(first, last):
            build.fails = step > 0
            one_step(model, preconditioner, *batch(seed=step))

    steps(0, 9)  # a third refresh after the first has its turn in the four steps from here
    with pytest.raises(LinAlgError, match="'2'"):
        steps(9, 13)


def test_failures_in_a_row_go_on_after_a_stop():
    model = network(4, 5, 3)
    preconditioner, build = failing(model)
    for fails in (False, True, True):
        build.fails = fails
        one_step(model, preconditioner, *batch())
    resumed, build = failing(model)
    resumed.load_state_dict(preconditioner.state_dict())
    build.fails = True
    with pytest.raises(LinAlgError, match="'2'"):
        one_step(model, resumed, *batch())


@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_singular_factors_with_hardly_any_damping_raise_in_the_third_refresh(structure):
    """A feature that is always zero, before a unit that never learns; and no NaN in a gradient before that."""
    model, (x, y) = network(4, 5, 3, activation=nn.ReLU), batch()
    model[0].bias.data[0] = -100.0
    x[:, 0] = 0.0
    preconditioner = preconditioned(model, structure=structure, damping=5e-324, inverse_period=1)

    def steps():
        for _ in range(3):
            came = one_step(model, preconditioner, x, y)
            assert all(bool(g.isfinite().all()) for g in came.values())

    with pytest.raises(LinAlgError, match="ikely causes"):
        steps()


# -- NaN and infinity --


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("at", [0, 2])
def test_what_is_not_finite_never_enters_an_average(value, structure, estimator, at):
    """1e30 is finite, its square is not."""
    model = network(4, 5, 3, activation=nn.Sigmoid)
    preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=1)
    for step in range(5):
        before = dense(preconditioner.layers)
        x, y = batch(seed=step)
        if step == at:
            x[3, 1] = value
        came = one_step(model, preconditioner, x, y)
        if step == at:
            assert_same(dense(preconditioner.layers), before)
        else:
            assert all(bool(g.isfinite().all()) for g in came.values())
    assert preconditioner.rejected == 1
    assert all(bool(M.isfinite().all()) for M in tree_flatten(dense(preconditioner.layers))[0])


def test_the_squares_of_an_eigenbasis_stay_finite():
    """A ~ 1e24 and G ~ 1e20 are finite; (g a)² ~ 1e44 is not."""
    torch.manual_seed(0)
    model, (x, _), weights = nn.Linear(4, 3, bias=False), batch(), torch.randn(12, 3)
    preconditioner = preconditioned(model, "empirical", structure="eigen", reduction="sum", inverse_period=1)
    for step in range(4):
        model.zero_grad()
        large = step == 1
        ((model(x * (1e12 if large else 1.0)) * weights).sum() * (1e10 if large else 1.0)).backward()
        if large:
            for p in model.parameters():
                p.grad.fill_(1.0)
        preconditioner.step()
    assert all(bool(S.isfinite().all()) for S in (F.eigenvalues for F in preconditioner._inverses.fitted.values()))
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
