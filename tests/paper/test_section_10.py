"""Invariance to W† = Φ⁻¹ W Ω⁻¹ (Theorem 1), and what it means: whitened, unit-variance coordinates (Corollary 3)."""

import numpy as np
import pytest
from backends import NUMPY, TORCH
from matrices import power
from networks import SIZES, network

from kfaclinalg import Factors, LayerFactors, Link, block_diagonal_inverse, block_tridiagonal_inverse

INVERSES = {"F_check": block_diagonal_inverse, "F_hat": block_tridiagonal_inverse}


def transformed(b, net, Phi, Omega):
    """The statistics of the other coordinates: a† = Ω a, g† = Φᵀ g, ∇W† = Φᵀ ∇W Ωᵀ."""
    layers, links = net.factors
    one = tuple(
        LayerFactors(b.array(O @ b.numpy(A) @ O.T), b.array(P.T @ b.numpy(G) @ P))
        for (A, G), P, O in zip(layers, Phi, Omega, strict=True)
    )
    two = tuple(
        Link(b.array(Omega[i] @ b.numpy(A) @ Omega[i + 1].T), b.array(Phi[i].T @ b.numpy(G) @ Phi[i + 1]))
        for i, (A, G) in enumerate(links)
    )
    return Factors(one, two), [P.T @ V @ O.T for V, P, O in zip(net.Vs, Phi, Omega, strict=True)]


@pytest.mark.parametrize("b", [NUMPY, TORCH], ids=str)
@pytest.mark.parametrize("inverse", INVERSES.values(), ids=INVERSES)
@pytest.mark.parametrize("seed", range(3))
def test_the_undamped_update_is_invariant(b, inverse, seed):
    net, rng = network(b, 0.0, seed=seed), np.random.default_rng(seed)
    Phi = [np.eye(m) + 0.5 * rng.standard_normal((m, m)) for _, m in SIZES]
    Omega = [np.eye(n) + 0.5 * rng.standard_normal((n, n)) for n, _ in SIZES]
    factors, Vs = transformed(b, net, Phi, Omega)
    updates = inverse(net.factors, 0.0) @ tuple(map(b.array, net.Vs))
    others = inverse(factors, 0.0) @ tuple(map(b.array, Vs))
    for U, other, V, V_other, P, O in zip(updates, others, net.Vs, Vs, Phi, Omega, strict=True):
        U, mapped = b.numpy(U), P @ b.numpy(other) @ O  # noqa: PLW2901
        assert np.linalg.norm(mapped - U) <= 1e-9 * np.linalg.norm(U)
        assert np.linalg.norm(P @ V_other @ O - V) > 0.1 * np.linalg.norm(V)  # the plain gradient is not invariant


def test_with_damping_invariance_is_lost():
    """The premise: it is γ = 0 that makes the update invariant."""
    net = network(NUMPY, 0.0)
    Phi, Omega = [2 * np.eye(m) for _, m in SIZES], [np.diag(1.0 + np.arange(n)) for n, _ in SIZES]
    factors, Vs = transformed(NUMPY, net, Phi, Omega)
    (U, *_), (other, *_) = block_diagonal_inverse(net.factors, 0.5) @ net.Vs, block_diagonal_inverse(factors, 0.5) @ Vs
    assert np.linalg.norm(Phi[0] @ other @ Omega[0] - U) > 0.01 * np.linalg.norm(U)


def test_corollary_3_gradient_descent_in_whitened_coordinates():
    """With Ω = A^(-1/2) and Φ = G^(-1/2) all second moments are I, and F̆⁻¹∇h is the plain gradient there."""
    net = network(NUMPY, 0.0)

    Phi, Omega = [power(G, -0.5) for _, G in net.factors.layers], [power(A, -0.5) for A, _ in net.factors.layers]
    factors, gradients = transformed(NUMPY, net, Phi, Omega)
    for A, G in factors.layers:
        np.testing.assert_allclose(A, np.eye(len(A)), atol=1e-12)
        np.testing.assert_allclose(G, np.eye(len(G)), atol=1e-12)
    for U, gradient, P, O in zip(block_diagonal_inverse(net.factors, 0.0) @ net.Vs, gradients, Phi, Omega, strict=True):
        np.testing.assert_allclose(P @ gradient @ O, U, rtol=1e-9, atol=1e-9)
