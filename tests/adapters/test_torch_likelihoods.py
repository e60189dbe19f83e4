import math

import pytest
import torch

from kfaclinalg_torch import Bernoulli, Categorical, Gaussian

CASES = {
    "bernoulli": (Bernoulli(), torch.rand_like),
    "categorical": (Categorical(), lambda z: torch.randint(z.shape[1], z.shape[:1])),
    "gaussian": (Gaussian(), torch.randn_like),
}
every_likelihood = pytest.mark.parametrize(("likelihood", "draw"), CASES.values(), ids=CASES)


def outputs(N=5, K=4):
    torch.manual_seed(0)
    return torch.randn(N, K, dtype=torch.float64)


def log_likelihood(likelihood, z, y):
    """Of one example, from torch's own distributions."""
    match likelihood:
        case Bernoulli():
            return -torch.nn.functional.binary_cross_entropy(torch.sigmoid(z), y, reduction="sum")
        case Categorical():
            return torch.distributions.Categorical(logits=z).log_prob(y)
        case _:
            constant = 0.5 * len(z) * math.log(2 * math.pi)
            return torch.distributions.Normal(z, 1.0).log_prob(y).sum() + constant


@every_likelihood
def test_the_loss_is_minus_the_log_likelihood_mean_over_examples(likelihood, draw):
    z = outputs()
    y = draw(z)
    expected = -sum(log_likelihood(likelihood, *pair) for pair in zip(z, y, strict=True)) / 5
    torch.testing.assert_close(likelihood.loss(z, y), expected, rtol=1e-13, atol=0)


@every_likelihood
def test_the_fisher_matrix_is_the_hessian_of_the_loss(likelihood, draw):
    """z are natural parameters: the Hessian does not depend on the targets and is the Fisher matrix."""
    z, (t,) = outputs(1), outputs(1, 4)
    y = draw(z)
    H = torch.func.hessian(lambda z: likelihood.loss(z[None], y))(z[0])
    torch.testing.assert_close(likelihood.fisher_product(z, t[None])[0], H @ t, rtol=1e-12, atol=1e-14)


@every_likelihood
def test_samples_are_from_the_models_own_distribution(likelihood, draw):
    """The Fisher matrix is the covariance of the gradient over sampled targets, and its mean is zero."""
    N = 40_000
    z = outputs(1).expand(N, 4).clone().requires_grad_()
    y = likelihood.sample(z.detach(), torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(N * likelihood.loss(z, y), z)
    F = torch.stack([likelihood.fisher_product(z[:1], e[None])[0] for e in torch.eye(4, dtype=torch.float64)]).detach()
    spread = 5 / math.sqrt(N)  # standard deviations, of entries of order one
    assert g.mean(0).abs().max() < spread
    assert (g.T @ g / N - F).abs().max() < 3 * spread


@every_likelihood
def test_samples_follow_the_generator(likelihood, draw):
    one, two = (likelihood.sample(outputs(), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, likelihood.sample(outputs(), torch.Generator().manual_seed(8)))


def test_the_loss_accumulates_in_float64():
    z, y = torch.zeros(1, 1_000_000), torch.full((1, 1_000_000), 0.5)
    expected = 1e6 * float(torch.nn.functional.softplus(torch.zeros(())))
    assert Bernoulli().loss(z, y).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (Bernoulli(), torch.zeros(5, 3), r"targets have shape \(5, 3\), expected \(5, 4\)"),
        (Bernoulli(), torch.full((5, 4), 1.5), r"targets lie in \[1.5, 1.5\], expected \[0, 1\]"),
        (Bernoulli(), torch.zeros(5, 4, dtype=torch.int64), "targets have dtype torch.int64, expected torch.float32"),
        (Gaussian(), torch.zeros(5), r"targets have shape \(5,\), expected \(5, 4\)"),
        (Categorical(), torch.zeros(5, 4), r"targets have shape \(5, 4\) .* expected class indices"),
        (Categorical(), torch.zeros(5), "targets have dtype torch.float32, expected integer class indices"),
        (Categorical(), torch.full((5,), 4), r"targets lie in \[4, 4\], expected \[0, 3\]"),
    ],
)
def test_wrong_targets_are_refused(likelihood, targets, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check(torch.zeros(5, 4), targets)


def test_nan_targets_pass_the_range_check():
    """They make the loss NaN, and the step is refused."""
    Bernoulli().check(torch.zeros(1, 1), torch.full((1, 1), math.nan))
