"""The subspace iteration of `low_rank` and `low_rank_plus_diagonal`."""

import numpy as np
import pytest
import torch
from backends import EAGER, GPU, JAX, NUMPY, Backend, eager_backends, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import judge

from kfaclinalg import LowRankPlusDiagonal, _backends, _subspace, low_rank, low_rank_plus_diagonal, testing

# JAX compiles anew for every shape, and outside of jit for every operation.
eager_and_jit = pytest.mark.parametrize("b", [*EAGER, JAX[-1], *GPU], ids=str)


def symmetric(b: Backend, eigenvalues, seed=0, batch=()):
    """Q diag(eigenvalues) Qᵀ in the backend's dtype, and its rounded self in float64."""
    rng = np.random.default_rng(seed)
    M = np.array([testing.spd_matrix(eigenvalues, rng) for _ in range(int(np.prod(batch)))])
    return M.reshape(*batch, len(eigenvalues), len(eigenvalues)).astype(b.dtype).astype(float)


def truncated(M: np.ndarray, rank: int) -> np.ndarray:
    w, Q = np.linalg.eigh(M)
    kept = np.argsort(-abs(w))[:rank]
    return (Q[:, kept] * w[kept]) @ Q[:, kept].T


def check_rank_k(b: Backend, M: np.ndarray, rank: int, **options) -> None:
    """Against the truncated eigendecomposition of a matrix whose spectrum has a gap there."""
    n = M.shape[-1]
    computed = low_rank(b.array(M), rank, **options)
    U, s = b.numpy(computed.U), b.numpy(computed.s)
    X = b.numpy(computed.to_dense())
    assert (b.numpy(computed.d) == 0).all()
    assert (np.diff(abs(s), axis=-1) <= 0).all()
    for i in np.ndindex(*M.shape[:-2]):
        M_i, U_i, X_i = M[i], U[i], X[i]
        judge(b, "low_rank, orthonormal U", np.linalg.norm(U_i.T @ U_i - np.eye(rank)), testing.solve_bound(n, b.eps))
        w = np.sort(abs(np.linalg.eigvalsh(M_i)))[::-1]
        gap = (w[rank - 1] - w[rank]) / w[0] if 0 < rank < n else 1.0
        error = np.linalg.norm(X_i - truncated(M_i, rank)) / w[0]
        judge(b, "low_rank", error, testing.solve_bound(n, b.eps) / gap)


@eager_backends
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_low_rank_is_the_truncated_eigendecomposition(b, batch):
    check_rank_k(b, symmetric(b, [1.0, -0.9, 0.8, -0.75, *[1e-3 * (-0.9) ** i for i in range(16)]], batch=batch), 4)


@eager_backends
@given(data=st.data())
def test_low_rank_for_random_spectra(b, data):
    n = data.draw(st.integers(1, 24))
    rank = data.draw(st.integers(0, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    kept = rng.uniform(0.5, 1, rank) * rng.choice([-1, 1], rank)
    check_rank_k(b, symmetric(b, [*kept, *rng.uniform(-1e-3, 1e-3, n - rank)], seed=rank), rank)


@eager_backends
@pytest.mark.parametrize("rank", [0, 1, 4, 12])
def test_low_rank_of_a_matrix_of_low_rank_is_exact(b, rank):
    """A single iteration does: the range is found at once."""
    M = symmetric(b, [*np.geomspace(1, 1e-2, rank) * (-1) ** np.arange(rank), *np.zeros(12 - rank)])
    X = b.numpy(low_rank(b.array(M), rank, iterations=1).to_dense())
    judge(b, "low_rank, exact", np.linalg.norm(X - M), testing.solve_bound(12, b.eps))


@eager_backends
@pytest.mark.parametrize("exponent", [-15, 0, 15])
def test_low_rank_plus_diagonal(b, exponent):
    """A diagonal plus a matrix of low rank and zero diagonal is found; and M - diag M is indefinite."""
    n, rank = 12, 4
    E = np.zeros((n, n))
    E[0, 1:] = E[1:, 0] = 1 / np.arange(1, n)  # eigenvalues ±‖e‖: equal magnitude, opposite signs
    E[2, 3] = E[3, 2] = 0.5
    M = ((E + np.diag(np.arange(2.0, 2 + n))) * 10.0**exponent).astype(b.dtype).astype(float)
    computed = low_rank_plus_diagonal(b.array(M), rank)
    np.testing.assert_array_equal(b.numpy(computed.d), np.diagonal(M))
    assert sorted(np.sign(b.numpy(computed.s))) == [-1, -1, 1, 1]
    error = np.linalg.norm(b.numpy(computed.to_dense()) - M) / np.linalg.norm(M)
    judge(b, "low_rank_plus_diagonal", error, testing.solve_bound(n, b.eps))
    X = b.numpy(computed.inverse().to_dense())
    judge(
        b,
        "low_rank_plus_diagonal, inverse",
        testing.backward_error(M, X @ M, M),
        testing.inverse_bound(np.linalg.cond(M), b.eps),
    )


def iterations_needed(M, rank, start):
    """Until the error is 100 eps of the truncated eigendecomposition's."""
    exact = truncated(M, rank)
    for iterations in range(50):
        X = low_rank(M, rank, iterations=iterations, start=start).to_dense()
        if np.linalg.norm(X - exact) <= 100 * NUMPY.eps:
            return iterations
    raise AssertionError("no convergence")


def test_a_warm_start_pays():
    n, rank = 30, 5
    M = symmetric(NUMPY, [*np.linspace(1, 0.6, rank), *0.4 * 0.9 ** np.arange(n - rank)])
    start = low_rank(M, rank, iterations=45)
    assert iterations_needed(M, rank, start) == 0
    E = symmetric(NUMPY, np.linspace(-1, 1, n), seed=1)
    cold, warm = (iterations_needed(M + 1e-6 * E, rank, x) for x in (None, start))
    assert warm <= 0.7 * cold


@eager_and_jit
def test_a_start_that_never_saw_the_large_eigenvalues_still_finds_them(b):
    """The start spans an invariant subspace: alone it would never leave it."""
    M = np.diag([1e-3, 1e-3, 1.0, 0.0, 0.5, 0.0])
    start = LowRankPlusDiagonal(b.array(np.eye(6)[:, :2]), b.array([1.0, 1.0]), b.array(np.zeros(6)))
    X = b.numpy(low_rank(b.array(M), 2, start=start).to_dense())
    np.testing.assert_allclose(X, np.diag([0, 0, 1.0, 0, 0.5, 0]), atol=testing.solve_bound(6, b.eps))


@uncompiled_backends
@pytest.mark.parametrize("f", [low_rank, low_rank_plus_diagonal])
def test_a_matrix_that_is_not_finite_gives_nan_for_its_member(b, f):
    M = np.stack([np.diag([3.0, 2.0, 1.0, 0.5])] * 4)
    M[:, 0, 1] = M[:, 1, 0] = 1.0
    M[1, 0, 1] = np.nan
    M[2, 2, 2] = np.inf
    computed = f(b.array(M), 2)
    for x in (computed.U, computed.s, computed.to_dense()):
        assert np.isnan(b.numpy(x)[1:3]).all()
        assert np.isfinite(b.numpy(x)[[0, 3]]).all()
    # a member that failed earlier is no start, and does no harm
    again = f(b.array(np.stack([M[0]] * 4)), 2, start=computed)
    np.testing.assert_allclose(b.numpy(again.to_dense())[1], b.numpy(again.to_dense())[0], atol=1e3 * b.eps)


@eager_backends
@pytest.mark.parametrize("M", [np.zeros((3, 3)), np.eye(3), np.ones((3, 3)), np.ones((1, 1)), -np.eye(3)], ids=str)
def test_degenerate_matrices(b, M):
    n = len(M)
    for rank in range(n + 1):
        X = b.numpy(low_rank(b.array(M), rank).to_dense())
        best = np.sqrt((np.sort(np.linalg.eigvalsh(M) ** 2)[: n - rank]).sum())
        assert np.linalg.norm(X - M) == pytest.approx(best, abs=testing.solve_bound(n, b.eps))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 24, 100, 500])
def test_the_start_is_well_conditioned_and_the_same_everywhere(n):
    X = _subspace._mixing(_backends.resolve(M=np.eye(1)), n, n // 2 + 1)
    assert np.linalg.cond(X) < 20
    assert abs(X).min() > 0
    Y = _subspace._mixing(_backends.resolve(M=torch.eye(1)), n, n // 2 + 1)
    np.testing.assert_allclose(Y, X, atol=1e-5)


def test_the_bounds_catch_too_few_iterations():
    with pytest.raises(AssertionError):
        check_rank_k(NUMPY, symmetric(NUMPY, [1.0, 0.9, *0.5 * 0.9 ** np.arange(18)]), 2, iterations=1)
