import numpy as np
import pytest
from backends import every_backend
from matrices import judge, random_spd

from kfaclinalg import Factors, LayerFactors, block_diagonal_inverse, testing
from kfaclinalg.damping import NORMS

SHAPES = [(3, 4), (2, 3)]


@every_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gamma", [0.01, 1.0])
def test_block_diagonal_inverse(b, norm, gamma):
    """Against the damped Kronecker products of eqn 7, formed densely, with π from their dense norms."""
    rng = np.random.default_rng(0)
    pairs = [[random_spd(rng, k).astype(b.dtype).astype(float) for k in (n, m)] for m, n in SHAPES]
    Vs = [rng.standard_normal(shape).astype(b.dtype) for shape in SHAPES]
    factors = Factors(tuple(LayerFactors(*map(b.array, pair)) for pair in pairs))
    Us = b.jit(lambda factors, Vs: block_diagonal_inverse(factors, gamma, norm=norm) @ Vs)(
        factors, tuple(map(b.array, Vs))
    )
    order = {"trace": "nuc", "frobenius": "fro", "spectral": 2}[norm]
    for (A, G), V, U in zip(pairs, Vs, Us, strict=True):
        n, m = len(A), len(G)
        sizes = (np.linalg.norm(np.kron(*pair), order) for pair in ((A, np.eye(m)), (np.eye(n), G)))
        pi = np.sqrt(next(sizes) / next(sizes))
        dense = np.kron(A + pi * gamma * np.eye(n), G + gamma / pi * np.eye(m))
        error = testing.backward_error(dense, testing.vec(b.numpy(U)), testing.vec(V.astype(float)))
        judge(b, "block_diagonal_inverse", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))


@every_backend
def test_singular_factors_need_damping(b):
    """Always-zero inputs, as MNIST's border pixels: singular without γ, fine with it."""
    singular = np.diag([1.0, 0.0])
    factors = Factors((LayerFactors(b.array(singular), b.array(np.eye(1))),))
    V = (b.array(np.ones((1, 2))),)
    assert np.isnan(b.numpy((block_diagonal_inverse(factors, 0.0) @ V)[0])).all()
    assert np.isfinite(b.numpy((block_diagonal_inverse(factors, 0.1) @ V)[0])).all()
