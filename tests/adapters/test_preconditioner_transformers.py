"""`KFACPreconditioner` on the transformers of torch, in training and in evaluation."""

import copy
import warnings

import pytest
import torch
from torch import nn
from training import assert_near, batch, gradients, network, preconditioned

from kfaclinalg_torch import Gaussian


def encoder_layer(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, **({"batch_first": True} | options))


def padding(N=3, L=5):
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[0, 3:] = True
    return mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_encoder_layer_in_training_gives_the_same(batch_first, norm_first, masked, dropout):
    """Outputs and gradients, with the same random numbers too."""
    model = encoder_layer(batch_first=batch_first, norm_first=norm_first, dropout=dropout)
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical")
    x, weights = torch.randn(3, 5, 8), torch.randn(8)
    mask = padding() if masked else None
    runs = []
    for m in (model, other):
        torch.manual_seed(1)
        z = m(x if batch_first else x.transpose(0, 1), src_key_padding_mask=mask)
        (z * weights).sum().backward()
        runs.append((z.detach(), gradients(m), torch.rand(1)))
    assert_near(*runs, c=1000)
    preconditioner.step()
    names = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert set(preconditioner.layers) == names | {"linear1", "linear2", "norm1", "norm2"}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_fast_path_in_evaluation_gives_the_same(depth, masked, mode):
    """`TransformerEncoder` makes nested tensors of padded sequences there."""
    model = encoder_layer(dropout=0.0)
    if depth:
        model = nn.TransformerEncoder(model, depth)
    model.eval()
    other = copy.deepcopy(model)
    preconditioned(model, "empirical")
    x, options = torch.randn(3, 5, 8), {"src_key_padding_mask": padding()} if masked else {}
    with mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype stage")
        expected, came = other(x, **options), model(x, **options)
    kept = slice(None) if not masked else ~padding()  # what is padded is nobody's
    assert_near(came[kept].detach(), expected[kept].detach())


def test_the_fast_path_is_back_after_remove():
    model = encoder_layer(dropout=0.0).eval()
    other = copy.deepcopy(model)
    preconditioned(model, "empirical").remove()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_whole_transformer_trains():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical", damping=0.1)
    source, target, weights = torch.randn(3, 5, 8), torch.randn(3, 4, 8), torch.randn(8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    runs = []
    for m in (model, other):
        z = m(source, target, tgt_mask=mask, tgt_is_causal=True)
        (z * weights).sum().backward()
        runs.append((z.detach(), gradients(m)))
    assert_near(*runs, c=1000)
    preconditioner.step()
    assert preconditioner.skipped == {}
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


def test_a_likelihood_of_ones_own_in_the_exact_factor():
    class Half:
        def loss(self, outputs, targets):
            return Gaussian().loss(outputs, targets) * 2

        def sample(self, outputs, generator):
            return Gaussian().sample(outputs, generator)

        def fisher_product(self, outputs, tangents):
            return 2 * tangents

    model, (x, _) = network(4, 3), batch()
    preconditioner = preconditioned(model, "exact", Half())
    outputs = model(x)
    preconditioner.update(outputs)
    outputs.square().mean().backward()
    preconditioner.step()
    assert_near(preconditioner.layers["0"].G, 2 * torch.eye(3))
