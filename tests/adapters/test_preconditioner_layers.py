"""The factors of every kind of layer against dense float64 matrices."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from backends import TORCH
from dense_layers import (
    EPS,
    OPERATIONS,
    Case,
    both_sharings,
    by_group,
    case,
    effective,
    factored,
    judge_factors,
    moments,
    seen_together,
)
from layer_rows import ROWS, TRAINED
from matrices import judge
from torch import Tensor, nn

from kfaclinalg import Diagonal, LayerFactors
from kfaclinalg_torch import KFACPreconditioner

pytestmark = pytest.mark.usefixtures("double")
every_row = pytest.mark.parametrize("row", ROWS)
quiet = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@quiet
@every_row
@both_sharings
def test_layer(row, sharing):
    """A and G of the exact Fisher matrix, and p.grad after a step."""
    one = case(row)
    layers = one.run(weight_sharing=sharing).layers
    examples = one.seen()
    judge_factors(f"factors, exact, {sharing}", layers, examples, sharing)
    for name, layer in layers.items():
        embedding = isinstance(dict(one.model.named_modules()).get(name), nn.Embedding)
        assert [type(M) for M in layer] == [Diagonal if embedding else Tensor, Tensor]
    one.judge(f"step, {sharing}", by_group(factored, effective(one.twin, moments(examples, sharing))))


@quiet
@every_row
def test_layer_from_the_gradients_of_the_loss(row):
    one = case(row)
    judge_factors("factors, empirical", one.run("empirical").layers, one.seen("empirical"), "expand")


@pytest.mark.parametrize("row", TRAINED)
@both_sharings
def test_batch_normalisation_of_the_batch(row, sharing):
    """The examples depend on each other: what one of them gives is its part of the gradient of the sum."""
    model, *args = TRAINED[row]()
    one = Case(model, tuple(args))
    layers = one.run("empirical", weight_sharing=sharing).layers
    examples = seen_together(one.twin, one.args, one.likelihood, one.targets)
    judge_factors("factors, batch statistics", layers, examples, sharing)
    one.judge("step, batch statistics", by_group(factored, effective(one.twin, moments(examples, sharing))))


def test_the_setting_of_single_modules():
    one = case("Linear, 3-D, no bias")
    sharing = {"0": "reduce"}
    judge_factors("factors, mixed", one.run(weight_sharing=sharing).layers, one.seen(), sharing)
    assert not np.allclose(moments(one.seen(), sharing)["0"][1], moments(one.seen())["0"][1])


def test_a_perturbation_is_noticed():
    one = case("Conv2d, groups")
    layers = one.run().layers
    judge_factors("factors", layers, one.seen(), "expand")
    changed = {name: LayerFactors(A, (1 + 1e-12) * G) for name, (A, G) in layers.items()}
    with pytest.raises(AssertionError):
        judge_factors("factors", changed, one.seen(), "expand")


def judge_outputs(one: Tensor, other: Tensor) -> None:
    one, other = one.detach(), other.detach()
    judge(TORCH, "attention", float((one - other).abs().max()), 10 * OPERATIONS * EPS * float(other.abs().max()))


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("Multihead")])
def test_attention_gives_what_it_gave(row):
    one = case(row)
    plain, by_hand = deepcopy(one.model)(*one.args), one.twin(*one.args)
    KFACPreconditioner(one.model, estimator="empirical")
    for expected in (plain, by_hand):
        judge_outputs(one.model(*one.args), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "mask", ["none", "bool", "float", "bool 3-D", "bool and padding", "unbatched", "unbatched, padding"]
)
def test_attention_gives_all_that_it_gave(batch_first, need_weights, average, mask):
    """Its weights too, and for a query without a batch."""
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    plain, (L, S) = deepcopy(module), (3, 5)
    KFACPreconditioner(module, estimator="empirical")
    batch = () if "unbatched" in mask else (2,)
    q, k, v = (torch.randn(*batch, length, 4) for length in (L, S, S))
    if batch and not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    keep = torch.ones(L, S).triu(3).bool()
    masks = {"none": None, "bool": keep, "float": torch.randn(L, S), "bool 3-D": keep.repeat(4, 1, 1)}
    options = {"attn_mask": masks.get(mask, keep if "bool" in mask else None)}
    if "padding" in mask:
        options["key_padding_mask"] = (torch.arange(S) > 3).expand(*batch, S)
    options |= {"need_weights": need_weights, "average_attn_weights": average}
    for a, b in zip(module(q, k, v, **options), plain(q, k, v, **options), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            judge_outputs(a, b)
