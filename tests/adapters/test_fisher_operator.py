"""`FisherOperator`, products with the exact Fisher matrix: against the dense one, and in conjugate gradients."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from curvature_cases import MODELS, Case, K, N, close, flat
from torch import nn

from kfaclinalg import Tridiagonal
from kfaclinalg_torch import FisherOperator, fit_curvature

pytestmark = pytest.mark.filterwarnings("ignore:fit_curvature takes the diagonal")

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_products_with_the_exact_fisher_and_the_gradient(name):
    case = Case(name)
    F, curvature = FisherOperator(case.model, "categorical", case.loader(7)), case.fit()
    v = torch.randn(
        len(flat(curvature, case.parameters)), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    close(F.stacked(F @ F.split(v)), case.fisher(curvature) @ v)
    close(F.stacked(F.gradient()), case.gradients(curvature).mean(0))
    for operator in (F.as_scipy(0.5), F.as_scipy(0.5).H):
        np.testing.assert_allclose(operator @ v.numpy(), F.stacked(F @ F.split(v)) + 0.5 * v, atol=1e-13)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_products_with_the_exact_fisher_of_a_recurrence(kind):
    """In float32 as well, of which torch has no forward mode of an LSTM."""
    torch.manual_seed(0)
    model, x, y = kind(3, 4, batch_first=True), torch.randn(N, 2, 3), torch.randint(4, (N, 2))
    F = FisherOperator(model, "categorical", (x, y), outputs=0)
    curvature = fit_curvature(model, "categorical", (x, y), outputs=0, progress=False)
    (names, parameters), outputs = zip(*model.named_parameters(), strict=True), model(x)[0].flatten(0, 1)
    v = torch.randn(sum(p.numel() for p in parameters))
    product = torch.zeros_like(v)
    for z, p in zip(outputs, outputs.softmax(-1).detach(), strict=True):
        slopes = [torch.autograd.grad(z_k, parameters, retain_graph=True) for z_k in z]
        J = torch.stack([flat(curvature, dict(zip(names, slope, strict=True))) for slope in slopes])
        product += J.T @ ((torch.diag(p) - torch.outer(p, p)) @ (J @ v)) / N
    torch.testing.assert_close(F.stacked(F @ F.split(v)), product)


def test_the_fisher_operator_takes_matrices_in_the_dtype_of_the_factors():
    case, wide = Case("mlp", torch.float32), {"factor_dtype": torch.float64}
    F, curvature = FisherOperator(case.model, "categorical", case.loader(7), **wide), case.fit(**wide)
    Vs = curvature.pack(case.parameters)
    product = F @ Vs
    assert {V.dtype for V in (*Vs, *product, *F.gradient())} == {torch.float64}
    expected = FisherOperator(case.model, "categorical", case.loader()) @ [V.float() for V in Vs]
    torch.testing.assert_close(F.stacked(product).float(), F.stacked(expected))


def test_the_fisher_operator_takes_what_the_curvature_packs():
    """Of a layer that is used without a call as well, which a first pass shows."""

    class Uncalled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, K)

        def forward(self, x):
            return self.last(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))

    model, data = Uncalled(), (torch.randn(N, 5), torch.randint(K, (N,)))
    curvature, F = fit_curvature(model, "categorical", data, progress=False), FisherOperator(model, "categorical", data)
    assert F.shapes == [tuple(V.shape) for V in curvature.pack(dict(model.named_parameters()))]
    assert len(F @ curvature.pack(dict(model.named_parameters()))) == len(curvature.layers) == 3


def solved(system, b, M=None):
    """By SciPy's cg, and in how many iterations."""
    steps = []
    solution, failed = scipy.sparse.linalg.cg(system, b, M=M, rtol=1e-8, callback=steps.append, maxiter=2000)
    assert not failed
    return solution, len(steps)


@pytest.fixture(scope="module")
def hessian_free():
    """A model after a few steps, its data, (F + λI) x = ∇h of it, and what cg makes of that by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, K)).double()
    x = torch.randn(400, 12, dtype=torch.float64) * torch.logspace(1, 0, 12, dtype=torch.float64)
    data, damping = [(x, x[:, :K].abs().argmax(1))], 1e-4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), data[0][1]).backward()
        optimizer.step()
    F = FisherOperator(model, "categorical", data)
    system, b = F.as_scipy(damping), F.stacked(F.gradient()).numpy()
    return model, data, damping, (system, b), solved(system, b)


@pytest.mark.parametrize("structure", ["block-diagonal", Tridiagonal(), "eigen"], ids=str)
def test_kfac_preconditions_conjugate_gradients(hessian_free, structure):
    """Hessian-free with SciPy's cg: fewer iterations with F̆⁻¹ and F̂⁻¹ than without, and the same minimiser."""
    model, data, damping, equations, (expected, most) = hessian_free
    curvature = fit_curvature(model, "categorical", data, structure=structure, progress=False)
    inverse = curvature.inverse(damping**0.5).to_namespace(np).as_scipy()
    solution, iterations = solved(*equations, inverse)
    assert iterations < 0.7 * most, (iterations, most)
    np.testing.assert_allclose(solution, expected, atol=1e-5 * np.linalg.norm(expected))
