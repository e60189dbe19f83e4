"""How many iterations the optimizer needs on scikit-learn's digits, beside an implementation that shares nothing.

docs/examples/digits_autoencoder.py goes on to lower errors, and to 1,000 iterations.
"""

from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from kfaclinalg_torch import KFAC

SIZES = (64, 100, 50, 25, 6, 25, 50, 100, 64)
CODE = 3  # this layer and the last are linear
ERROR, SEED = 1.0, 0
# From elsewhere: what a plain implementation of the paper's Algorithm 2 needed to reach the error, with this seed.
REFERENCE = {
    0.01: {"block-diagonal": 58, "block-tridiagonal": 36},
    1.0: {"block-diagonal": 79, "block-tridiagonal": 72},
}


@torch.no_grad()
def autoencoder(seed):
    """15 weights N(0, 1/16) a unit, the others zero; biases 0.5, but for the output."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for i, (inputs, outputs) in enumerate(pairwise(SIZES)):
        layer, last = nn.Linear(inputs, outputs), i == len(SIZES) - 2
        layer.bias.fill_(0.0 if last else 0.5)
        layer.weight.zero_()
        for unit in layer.weight:
            chosen = torch.randperm(inputs, generator=generator)[:15]
            unit[chosen] = 0.25 * torch.randn(len(chosen), generator=generator)
        modules += [layer] if last or i == CODE else [layer, nn.Tanh()]
    return nn.Sequential(*modules)


def iterations(structure, damping, *, at_most):
    """Until the squared error, summed over pixels, mean over digits, is ERROR."""
    digits = torch.from_numpy(load_digits().data / 16).float()
    model, generator = autoencoder(SEED), torch.Generator().manual_seed(SEED)
    fractions = {"statistics_fraction": 1.0, "curvature_fraction": 1.0}
    optimizer = KFAC(model, "bernoulli", structure=structure, damping=damping, generator=generator, **fractions)
    for k in range(1, int(at_most) + 1):
        optimizer.step(digits, digits)
        assert not optimizer.info.refused
        with torch.no_grad():
            if (model(digits).sigmoid() - digits).square().sum(1).mean() <= ERROR:
                return k
    pytest.fail(f"{structure}, λ0 = {damping}: an error above {ERROR} after {k} iterations")


@pytest.mark.parametrize("damping", REFERENCE)
def test_as_many_iterations_as_the_reference_and_fewer_with_the_tridiagonal_inverse(damping):
    """Fewer than the reference would be those of another algorithm, too."""
    counts = {
        structure: iterations(structure, damping, at_most=1.1 * reference)
        for structure, reference in REFERENCE[damping].items()
    }
    assert counts == pytest.approx(REFERENCE[damping], rel=0.1)
    assert counts["block-tridiagonal"] < counts["block-diagonal"]
