"""Momentum: the last update is a second direction of the exact quadratic model."""

import numpy as np
from backends import uncompiled_backends

from kfaclinalg import fit_quadratic, testing


@uncompiled_backends
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
