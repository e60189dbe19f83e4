"""Damping: eqns 6 and 7, the rescaling of 6.4 and the rule of 6.5."""

import numpy as np
import pytest
from backends import every_backend
from networks import network

from kfaclinalg import Kronecker, factored_tikhonov, fit_quadratic, levenberg_marquardt, testing, tikhonov_pi


@every_backend
def test_eqn_6_is_inverted_exactly(b):
    net = network(b, 0.0)
    for i, layer in enumerate(net.factors.layers):
        block = net.blocks[i][i] + 0.3 * np.eye(len(net.blocks[i][i]))
        inverse = b.numpy(Kronecker(*layer).shifted_inverse(0.3).to_dense())
        np.testing.assert_allclose(inverse @ block, np.eye(len(block)), atol=100 * np.linalg.cond(block) * b.eps)


@every_backend
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
    """π minimises π ‖I ⊗ G‖ + ‖A ⊗ I‖/π: a change of it either way makes the bound larger."""
    layer = network(b, 0.0).factors.layers[0]
    A, G = map(b.numpy, layer)
    order = {"trace": "nuc", "frobenius": "fro", "spectral": 2}[norm]
    a = np.linalg.norm(np.kron(A, np.eye(len(G))), order)
    g = np.linalg.norm(np.kron(np.eye(len(A)), G), order)
    pi = b.numpy(tikhonov_pi(layer, norm=norm)).item()
    bound = pi * g + a / pi
    assert all(bound < factor * pi * g + a / (factor * pi) for factor in (0.99, 1.01))


@every_backend
def test_alpha_of_section_6_4(b):
    """α* = -∇hᵀΔ / (ΔᵀFΔ + (λ+η)‖Δ‖²)."""
    F, D, slope, shift = 2.0, 3.0, -5.0, 0.5
    fit = fit_quadratic(b.array([[F]]), b.array([[D]]), b.array([slope]), shift)
    assert b.numpy(fit.coefficients) == pytest.approx([-slope / (F + shift * D)], rel=10 * b.eps)
    assert b.numpy(fit.change) == pytest.approx(0.5 * b.numpy(fit.coefficients)[0] * slope, rel=10 * b.eps)


def test_lambda_of_section_6_5():
    omega1 = (19 / 20) ** 5
    assert levenberg_marquardt(150.0, 0.8, omega=omega1) == omega1 * 150
    assert levenberg_marquardt(150.0, 0.2, omega=omega1) == 150 / omega1
    assert levenberg_marquardt(150.0, 0.5, omega=omega1) == 150


@every_backend
def test_momentum_of_section_7(b):
    """(α*, μ*) = -[[ΔᵀFΔ + (λ+η)‖Δ‖², ...], [..., δ0ᵀFδ0 + (λ+η)‖δ0‖²]]⁻¹ (∇hᵀΔ, ∇hᵀδ0)."""
    rng = np.random.default_rng(0)
    J, d, gradient, shift = rng.standard_normal((9, 6)), rng.standard_normal((2, 6)), rng.standard_normal(6), 0.7
    F = J.T @ J
    (p, q), (_, r) = d @ F @ d.T + shift * d @ d.T
    s, t = d @ gradient
    determinant = p * r - q * q
    exact = [-(r * s - q * t) / determinant, -(p * t - q * s) / determinant]
    fit = fit_quadratic(b.array(d @ F @ d.T), b.array(d @ d.T), b.array(d @ gradient), shift)
    condition = np.linalg.cond([[p, q], [q, r]])
    np.testing.assert_allclose(b.numpy(fit.coefficients), exact, rtol=testing.inverse_bound(2 * condition, b.eps))
