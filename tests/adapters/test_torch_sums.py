"""Moments that grow in place, a batch and a draw after the other, are those of all rows at once."""

import pytest
import torch
from torch import nn

from kfaclinalg_torch import Linear, Rule, fit_curvature
from kfaclinalg_torch._panels import PANEL
from kfaclinalg_torch._sums import Sums

WIDTHS = (3, PANEL, 2 * PANEL + 1, 3 * PANEL + 5)  # one panel, one, two, and several of which the last is narrower


def whole_numbers(*shape, seed=0):
    """Sums of their products are exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("width", WIDTHS)
def test_batches_one_after_the_other_are_all_at_once(width, rows):
    block = Linear("layer", torch.zeros(width, width + 1, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    x, g = whole_numbers(3 * rows, width + 1), whole_numbers(3 * rows, width, seed=1)
    sums = Sums(torch.zeros(width + 2, width + 2).double(), 0, torch.zeros(width, width).double())
    for some in torch.arange(3 * rows).split(rows):
        for draw in (0, 1):
            sums.show(block, x[some], g[some], rows, None, draw)
    a = torch.cat([x, torch.ones(3 * rows, 1)], 1)
    assert sums.whole().rows == 3 * rows
    assert torch.equal(sums.A, torch.einsum("ri,rj->ij", a, a))
    assert torch.equal(sums.G, 2 * torch.einsum("ri,rj->ij", g, g))


def test_what_lags_below_the_diagonal_is_seen_to():
    block = Linear("layer", torch.zeros(1, 3 * PANEL, dtype=torch.float64))
    sums = Sums(torch.zeros(3 * PANEL, 3 * PANEL).double(), 0, torch.zeros(1, 1).double())
    sums.show(block, whole_numbers(5, 3 * PANEL), whole_numbers(5, 1), 5, None, 0)
    assert not torch.equal(sums.A, sums.A.mT)  # the premise
    assert torch.equal(sums.whole().A, sums.A.mT)


class Held(Linear):
    """A block of a user that hands out the same tensors each time."""

    def input_moment(self, x, N, mask=None):
        return ONE, 1

    def output_moment(self, x, g, N):
        return TWO


ONE, TWO = torch.eye(3), 2 * torch.eye(2)


def test_tensors_that_a_block_keeps_are_not_written_to():
    model, x = nn.Linear(2, 2), torch.zeros(6, 2)
    rule = Rule(blocks=lambda name, module: [Held(name, module.weight, module.bias)])
    fit_curvature(model, "gaussian", [(x, x)] * 3, layers={nn.Linear: rule}, progress=False)
    assert torch.equal(ONE, torch.eye(3))
    assert torch.equal(TWO, 2 * torch.eye(2))


class Weighted(Linear):
    """A block of a user with moments of its own."""

    def input_moment(self, x, N, mask=None):
        A, rows = super().input_moment(x, N, mask)
        return 2 * A, rows

    def output_moment(self, x, g, N):
        return 3 * super().output_moment(x, g, N)


def test_the_moments_of_a_block_of_ones_own_are_those_of_every_batch():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(60, 5, dtype=torch.float64)
    batches = list(zip(x.split(20), torch.zeros(60, dtype=torch.int64).split(20), strict=True))
    rule = Rule(blocks=lambda name, module: [Weighted(name, module.weight, module.bias)])
    own = fit_curvature(model, "categorical", batches, layers={nn.Linear: rule}, progress=False).layers[""]
    usual = fit_curvature(model, "categorical", batches, progress=False).layers[""]
    torch.testing.assert_close(own.A, 2 * usual.A, rtol=1e-14, atol=0)
    torch.testing.assert_close(own.G, 3 * usual.G, rtol=1e-14, atol=1e-16)


class Halved(Linear):
    """A block of a user with inputs of its own."""

    def inputs(self, x, N):
        return super().inputs(x, N) / 2


def test_the_inputs_of_a_block_of_ones_own_meet_the_eigenvectors():
    """Of half the inputs and the ones the factor is a quarter, and so are the eigenvalues."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(60, 5, dtype=torch.float64)
    batches = list(zip(x.split(20), torch.zeros(60, dtype=torch.int64).split(20), strict=True))
    rule = Rule(blocks=lambda name, module: [Halved(name, module.weight, module.bias)])
    own, usual = (
        fit_curvature(model, "categorical", batches, structure="eigen", estimator="exact", progress=False, **layers)
        .operator.blocks[0]
        .to_dense()
        for layers in ({"layers": {nn.Linear: rule}}, {})
    )
    torch.testing.assert_close(own, usual / 4, rtol=1e-12, atol=1e-16)


def test_the_size_of_the_batches_is_of_no_account():
    """As many steps as a data set has batches: no drift of a mean, and no rounding but that of a sum."""
    torch.manual_seed(0)
    model, x = nn.Linear(2 * PANEL, 4).double(), torch.randn(60, 2 * PANEL, dtype=torch.float64)
    y = torch.zeros(60, dtype=torch.int64)
    few, many = (
        fit_curvature(model, "categorical", list(zip(x.split(size), y.split(size), strict=True)), progress=False)
        for size in (60, 1)
    )
    a = torch.cat([x, torch.ones(60, 1)], 1)
    for fitted in (few, many):
        A = fitted.layers[""].A
        assert torch.equal(A, A.mT)
        assert (A - a.mT @ a / 60).abs().max() <= 10 * 60 * torch.finfo(torch.float64).eps
