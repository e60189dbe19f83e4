from pathlib import Path

import numpy as np
import pytest
from backends import NUMPY, STRICT, TORCH_FLOAT32, Backend, eager_backends, every_backend, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import FIXED, Sample, judge, members, samples

from kfaclinalg import _backends, testing


def check_factor(b: Backend, sample: Sample) -> None:
    M = sample.spd(b)
    L = b.numpy(_backends.cholesky(b.array(M)))
    np.testing.assert_array_equal(L, np.tril(L))
    for M_i, L_i in members(M, L):
        error = np.linalg.norm((L_i @ L_i.T - M_i).astype(float)) / np.linalg.norm(M_i.astype(float))
        judge(b, "cholesky", error, testing.solve_bound(sample.n, b.eps))


def check_substitution(b: Backend, sample: Sample) -> None:
    L, X = np.linalg.cholesky(sample.spd(b)).astype(b.dtype).astype(float), sample.normal(b, sample.n, 2)
    Y = b.numpy(_backends.forward_substitution(b.array(L), b.array(X)))
    Z = b.numpy(_backends.back_substitution(b.array(L), b.array(X)))
    for L_i, X_i, Y_i, Z_i in members(L, X, Y, Z):
        bound = testing.solve_bound(sample.n, b.eps)
        judge(b, "forward substitution", testing.backward_error(L_i, Y_i, X_i), bound)
        judge(b, "back substitution", testing.backward_error(L_i.T, Z_i, X_i), bound)


def check_eigh(b: Backend, sample: Sample) -> None:
    M = sample.spd(b)
    w, Q = map(b.numpy, _backends.eigh(b.array(M)))
    for M_i, Q_i, w_i in zip(*(x.reshape(-1, *M.shape[-2:]) for x in (M, Q)), w.reshape(-1, sample.n), strict=True):
        bound = testing.solve_bound(sample.n, b.eps)
        judge(b, "eigh", np.linalg.norm((Q_i * w_i) @ Q_i.T - M_i) / np.linalg.norm(M_i), bound)
        judge(b, "eigh orthogonality", np.linalg.norm(Q_i.T @ Q_i - np.eye(sample.n)), bound)


def check_left_singular(b: Backend, sample: Sample) -> None:
    """R tall, square and wide, with singular values down to √eps and some rows that are zero."""
    rng, n = np.random.default_rng(sample.seed), sample.n
    for k in (max(n // 2, 1), n, 2 * n):
        R = np.linalg.qr(rng.standard_normal((max(n, k),) * 2))[0][:n, :k] * b.eps ** np.linspace(0, 0.5, k)
        R[: n // 4] = 0
        R = R.astype(b.dtype).astype(float)
        E, s = map(b.numpy, _backends.left_singular(b.array(R)))
        assert ((s >= 0) & (s <= 1 + testing.solve_bound(n, b.eps))).all()
        judge(b, "left_singular", np.linalg.norm((E * s) @ E.T - R @ R.T), testing.solve_bound(n, b.eps))
        judge(b, "left_singular orthogonality", np.linalg.norm(E.T @ E - np.eye(n)), testing.solve_bound(n, b.eps))


CHECKS = [check_left_singular, check_factor, check_substitution, check_eigh]


@uncompiled_backends
@pytest.mark.parametrize("sample", FIXED, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_errors_are_within_their_bounds(b, sample, check):
    check(b, sample)


@eager_backends
@given(sample=samples)
def test_errors_are_within_their_bounds_for_random_matrices(b, sample):
    for check in CHECKS:
        check(b, sample)


@eager_backends
@given(n=st.integers(2, 12), seed=st.integers(0, 1000))
def test_an_indefinite_matrix_never_gives_a_factor(b, n, seed):
    """Clearly indefinite: one eigenvalue of -√eps beside those in [√eps, 1]."""
    eigenvalues = testing.spectrum("geometric", n, condition=b.eps**-0.5)
    M = testing.spd_matrix([-(b.eps**0.5), *eigenvalues[1:]], np.random.default_rng(seed))
    for stack in (M, np.stack([M, M])):
        assert np.isnan(b.numpy(_backends.cholesky(b.array(stack)))).all()


def eigh_trap():
    """The symmetric matrix from the lower triangle of its rows and columns that are not zero."""
    with np.load(Path(__file__).parent / "data" / "eigh_trap.npz") as file:
        kept, lower = file["kept"], file["lower"]
    M, part = np.zeros((785, 785), lower.dtype), np.zeros((len(kept),) * 2, lower.dtype)
    part[np.tril_indices(len(kept))] = lower
    M[np.ix_(kept, kept)] = np.where(np.tri(len(kept), dtype=bool), part, part.T)
    return M


def test_the_matrix_on_which_float32_eigh_fails():
    """R Rᵀ of MNIST's input layer, 785 x 785 with 280 zero rows: torch's eigenvalues of it are NaN."""
    M = eigh_trap()
    w, Q = np.linalg.eigh(M.astype(np.float64))
    R = (Q[:, -400:] * np.sqrt(np.maximum(w[-400:], 0))).astype(np.float32)
    b = TORCH_FLOAT32
    E, s = map(b.numpy, _backends.left_singular(b.array(R)))
    exact = R.astype(float) @ R.T.astype(float)
    judge(b, "left_singular", np.linalg.norm((E * s) @ E.T - exact), testing.solve_bound(785, b.eps))


def test_a_partial_factor_is_rejected(monkeypatch):
    """CuPy leaves the trailing block as it was, and says nothing."""
    xp = _backends.backend_of(STRICT[0].array(np.zeros(1))).xp
    monkeypatch.setattr(xp.linalg, "cholesky", xp.tril)
    M = STRICT[0].array(np.stack([np.eye(3), 4 * np.eye(3)]))  # the first is its own factor, the second is not
    L = STRICT[0].numpy(_backends.cholesky(M))
    np.testing.assert_array_equal(L[0], np.eye(3))
    assert np.isnan(L[1]).all()


@every_backend
@pytest.mark.parametrize("n", [2, 3, 25, 26, 64])
def test_eigh_of_nan_is_nan_at_every_size(b, n):
    M = np.stack([np.eye(n), np.eye(n)])
    M[1, n - 1, 0] = np.nan
    w, Q = map(b.numpy, b.jit(_backends.eigh)(b.array(M)))
    assert np.isfinite(w[0]).all()
    assert np.isnan(w[1]).all()
    assert np.isnan(Q[1]).all()


def test_eigh_that_does_not_converge_is_nan_for_that_member(monkeypatch):
    def fails_on_zero(M):
        if (np.asarray(M) == 0).all(axis=(-2, -1)).any():
            raise np.linalg.LinAlgError("did not converge")
        return eigh(M)

    xp = _backends.backend_of(np.zeros(1)).xp
    eigh = xp.linalg.eigh
    monkeypatch.setattr(xp.linalg, "eigh", fails_on_zero)
    w, Q = _backends.eigh(np.stack([np.eye(2), np.zeros((2, 2)), 2 * np.eye(2)]))
    np.testing.assert_array_equal(w, [[1, 1], [np.nan, np.nan], [2, 2]])
    assert np.isnan(Q[1]).all()
    assert np.isfinite(Q[::2]).all()


def test_the_bounds_catch_the_wrong_triangle(monkeypatch):
    monkeypatch.setattr(_backends, "forward_substitution", _backends.back_substitution)
    with pytest.raises(AssertionError, match="forward substitution on numpy"):
        check_substitution(NUMPY, Sample(6))
