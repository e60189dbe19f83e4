"""Damping: eqns 6 and 7, the rescaling of 6.4, the rule of 6.5 for λ and that of 6.6 for γ."""

import numpy as np
import pytest
from backends import NUMPY, every_backend, uncompiled_backends
from networks import network
from test_algorithm import LinearRegression

from kfaclinalg import (
    KFACOptions,
    Kronecker,
    LayerFactors,
    damping,
    factored_tikhonov,
    fit_quadratic,
    kfac_step,
    levenberg_marquardt,
    tikhonov_pi,
)


@uncompiled_backends
def test_eqn_6_is_inverted_exactly(b):
    net = network(b, 0.0)
    for i, layer in enumerate(net.factors.layers):
        block = net.blocks[i][i] + 0.3 * np.eye(len(net.blocks[i][i]))
        inverse = b.numpy(Kronecker(*layer).shifted_inverse(0.3).to_dense())
        np.testing.assert_allclose(inverse @ block, np.eye(len(block)), atol=100 * np.linalg.cond(block) * b.eps)


@uncompiled_backends
def test_eqn_7_exceeds_eqn_6_by_the_residual(b):
    """(A + πγ I) ⊗ (G + γ/π I) = A ⊗ G + γ² I + [πγ I ⊗ G + γ/π A ⊗ I]."""
    gamma = 0.4
    layer = network(b, 0.0).factors.layers[0]
    A, G = map(b.numpy, layer)
    I_A, I_G = np.eye(len(A)), np.eye(len(G))
    pi = b.numpy(tikhonov_pi(layer)).item()
    residual = pi * gamma * np.kron(I_A, G) + gamma / pi * np.kron(A, I_G)
    damped = np.kron(*map(b.numpy, factored_tikhonov(layer, gamma)))
    np.testing.assert_allclose(damped, np.kron(A, G) + gamma**2 * np.kron(I_A, I_G) + residual, atol=1e3 * b.eps)


@every_backend
@pytest.mark.parametrize("norm", ["trace", "frobenius", "spectral"])
def test_pi_minimises_the_bound_on_the_residual(b, norm):
    """π ‖I ⊗ G‖ + ‖A ⊗ I‖/π is least at π = √(‖A ⊗ I‖ / ‖I ⊗ G‖); a change of it either way makes the bound larger."""
    layer = network(b, 0.0).factors.layers[0]
    A, G = map(b.numpy, layer)
    order = {"trace": "nuc", "frobenius": "fro", "spectral": 2}[norm]
    a = np.linalg.norm(np.kron(A, np.eye(len(G))), order)
    g = np.linalg.norm(np.kron(np.eye(len(A)), G), order)
    pi = b.numpy(b.jit(lambda A, G: tikhonov_pi(LayerFactors(A, G), norm=norm))(*layer)).item()
    assert pi == pytest.approx(np.sqrt(a / g), rel=10 * len(A) * b.eps)
    bound = pi * g + a / pi
    assert all(bound < factor * pi * g + a / (factor * pi) for factor in (0.99, 1.01))


def test_an_inverted_pi_is_caught(monkeypatch):
    monkeypatch.setattr(damping, "_pi", lambda *args, pi=damping._pi, **options: 1 / pi(*args, **options))
    with pytest.raises(AssertionError):
        test_pi_minimises_the_bound_on_the_residual(NUMPY, "trace")


@uncompiled_backends
def test_alpha_of_section_6_4(b):
    """α* = -∇hᵀΔ / (ΔᵀFΔ + (λ+η)‖Δ‖²)."""
    F, D, slope, shift = 2.0, 3.0, -5.0, 0.5
    fit = fit_quadratic(b.array([[F]]), b.array([[D]]), b.array([slope]), shift)
    assert b.numpy(fit.coefficients) == pytest.approx([-slope / (F + shift * D)], rel=10 * b.eps)
    assert b.numpy(fit.change) == pytest.approx(0.5 * b.numpy(fit.coefficients)[0] * slope, rel=10 * b.eps)


@pytest.mark.parametrize(("ratio", "factor"), [(0.76, 0.5), (0.75, 1), (0.25, 1), (0.24, 2), (-3, 2), (np.nan, 2)])
def test_lambda_of_section_6_5(ratio, factor):
    """ω1 λ where ρ > 3/4, λ/ω1 where ρ < 1/4, with ω1 = ½ here; a ρ that is not a number raises it too."""
    assert levenberg_marquardt(3.0, ratio, omega=0.5) == 3 * factor


def test_the_best_of_three_gammas_wins_and_keeps_its_inverse():
    problem = LinearRegression(NUMPY)
    options = KFACOptions(damping=1.0, weight_decay=0.0, gamma_period=4, inverse_period=4)
    weights, state = problem.start, None
    for _ in range(3):
        weights, state, _ = kfac_step(problem, weights, state, options)
    factors = (options.omega2, 1.0, 1 / options.omega2)
    single = options._replace(gamma_period=4000, inverse_period=4)
    tried = {f: kfac_step(problem, weights, state._replace(gamma=f * state.gamma), single) for f in factors}
    moved, after, info = kfac_step(problem, weights, state, options)
    best = min(factors, key=lambda f: tried[f][2].change)
    assert info.gamma == pytest.approx(best * state.gamma)
    assert info.change == pytest.approx(tried[best][2].change, rel=1e-12)
    np.testing.assert_allclose(moved[0], tried[best][0][0], rtol=1e-12)
    np.testing.assert_allclose(after.inverse.blocks[0].A, tried[best][1].inverse.blocks[0].A, rtol=1e-12)
