"""Momentum: the last update is a second direction of the exact quadratic model, and that is conjugate gradients."""

import math

import numpy as np
import pytest
from backends import NUMPY, uncompiled_backends
from test_algorithm import EXACT, LinearRegression

from kfaclinalg import Factors, KFACOptions, LayerFactors, fit_quadratic, kfac_step, testing


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


def test_momentum_makes_it_preconditioned_conjugate_gradients():
    """On a quadratic the (α, μ) of Section 7 give linear CG with the approximate Fisher as the preconditioner."""
    problem, lam = LinearRegression(NUMPY), 0.3
    options = KFACOptions(damping=lam, weight_decay=0.0, damping_period=1000, gamma_period=1000, inverse_period=1000)
    gamma = math.sqrt(lam)
    pi = math.sqrt(np.trace(problem.A) / 4)
    preconditioner = testing.dense_kronecker(problem.A + pi * gamma * np.eye(4), (1 + gamma / pi) * np.eye(3))

    Q, w = problem.F + 0 * np.eye(12), testing.vec(problem.start[0])
    steepest, last = [], None
    weights, state = problem.start, None
    for _ in range(4):
        # What the quadratic model says with λ in it, by dense algebra and a least-squares solver of another kind.
        gradient = Q @ (w - testing.vec(problem.optimum))
        delta = -np.linalg.solve(preconditioner, gradient)
        D = np.stack([delta] if last is None else [delta, last], axis=1)
        c = np.linalg.lstsq(D.T @ (Q + lam * np.eye(12)) @ D, -D.T @ gradient, rcond=None)[0]
        last = D @ c
        w = w + last
        weights, state, info = kfac_step(problem, weights, state, options)
        np.testing.assert_allclose(testing.vec(weights[0]), w, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose([info.alpha, info.mu][: len(c)], c, rtol=1e-8)
        steepest.append(info.change)
        expected = 0.5 * last @ (Q + lam * np.eye(12)) @ last + gradient @ last
        assert info.change == pytest.approx(expected, rel=1e-9)
        assert info.update_norm == pytest.approx(np.linalg.norm(last), rel=1e-9)
    assert all(change < 0 for change in steepest)


def test_undamped_momentum_is_conjugate_gradients():
    """With λ = 0 the iterates are those of textbook preconditioned CG, a loop that shares nothing with ours."""
    problem = LinearRegression(NUMPY)
    P = np.diag([1.0, 3.0, 2.0, 5.0])
    problem.factors = lambda weights, links: Factors((LayerFactors(P, np.eye(3)),))  # a poor preconditioner
    optimum, x = testing.vec(problem.optimum), testing.vec(problem.start[0])
    M = testing.dense_kronecker(P, np.eye(3))
    r = problem.F @ (optimum - x)
    z = np.linalg.solve(M, r)
    p = z
    weights, state = problem.start, None
    for _ in range(4):
        alpha = r @ z / (p @ problem.F @ p)
        x, r_next = x + alpha * p, r - alpha * problem.F @ p
        z_next = np.linalg.solve(M, r_next)
        p, r, z = z_next + (r_next @ z_next) / (r @ z) * p, r_next, z_next
        weights, state, _ = kfac_step(problem, weights, state, EXACT)
        np.testing.assert_allclose(testing.vec(weights[0]), x, rtol=1e-8, atol=1e-10)
