from functools import cache

import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH, TORCH_FLOAT32, Backend, eager_backends, every_backend, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import Sample, judge

from kfaclinalg import KroneckerPair, kronecker_pair, testing


@cache
def compiled(b: Backend, f):
    """Once for all signs and radii."""
    return b.jit(lambda A, B, C, D, V: f(KroneckerPair(A, B, C, D), V))


def inverted(P, V):
    return P.inverse() @ V


def verbs(P, V):
    return P.to_dense(), P @ V, P.diagonal(), P.trace(), P.logdet()


def solved(P, V):
    return P.solve(V, method="smith"), P.solve(V)


class Case:
    """A ⊗ B + sign C ⊗ D beside its dense matrix, with C and D of rank below n and m and ρ(A⁻¹C) ρ(B⁻¹D) = `radius`."""

    def __init__(self, b: Backend, n=4, m=3, *, sign=-1.0, radius=0.9, decades=0.2, seed=0):
        self.b, self.shape = b, (m, n)
        rng = np.random.default_rng(seed)
        self.A, self.B = (Sample(k, decades=decades, seed=seed + k).spd(b) for k in (n, m))
        self.C, self.D = (self._dominated(M, radius**0.5, rng).astype(b.dtype).astype(float) for M in (self.A, self.B))
        self.C = sign * self.C
        self.dense = testing.dense_kronecker(self.A, self.B) + testing.dense_kronecker(self.C, self.D)
        # V = M Z for random Z: a random V would hide the error of an explicit inverse
        self.V = testing.unvec(self.dense @ rng.standard_normal(n * m), (m, n)).astype(b.dtype).astype(float)
        self.arrays = tuple(map(b.array, (self.A, self.B, self.C, self.D)))

    @staticmethod
    def _dominated(M, radius, rng):
        """L X Lᵀ with X positive semidefinite of norm `radius`: ρ(M⁻¹ L X Lᵀ) = radius."""
        n = len(M)
        X = testing.spd_matrix([radius * (i / max(n - 1, 1)) for i in range(n)], rng) if n > 1 else np.eye(1) * radius
        L = np.linalg.cholesky(M)
        return (L @ X @ L.T + (L @ X @ L.T).T) / 2

    @property
    def condition(self):
        return np.linalg.cond(self.dense)

    def run(self, f):
        return self.b.numpy(self.compiled(f))

    def compiled(self, f):
        return compiled(self.b, f)(*self.arrays, self.b.array(self.V))

    def error(self, U):
        return testing.backward_error(self.dense, testing.vec(U), testing.vec(self.V))


def check(case: Case) -> None:
    U = case.run(inverted)
    judge(case.b, "KroneckerPair.inverse", case.error(U), testing.inverse_bound(case.condition, case.b.eps))


both_signs = pytest.mark.parametrize("sign", [-1.0, 1.0])


@every_backend
@both_signs
def test_inverse_against_the_dense_matrix(b, sign):
    check(Case(b, sign=sign))


@eager_backends
@given(
    n=st.integers(1, 8), m=st.integers(1, 8), sign=st.sampled_from([-1.0, 1.0]), radius=st.floats(0, 0.99),
    decades=st.floats(0, 0.3), seed=st.integers(0, 1000),
)  # fmt: skip
def test_inverse_against_random_dense_matrices(b, n, m, sign, radius, decades, seed):
    check(Case(b, n, m, sign=sign, radius=radius, decades=decades, seed=seed))


def test_the_wrong_sign_is_caught():
    case = Case(NUMPY)
    case.arrays = (*case.arrays[:2], -case.C, case.D)
    with pytest.raises(AssertionError, match=r"KroneckerPair\.inverse"):
        check(case)


@every_backend
@both_signs
def test_the_other_methods(b, sign):
    case = Case(b, sign=sign)
    bound = testing.inverse_bound(case.condition, b.eps)
    small = testing.solve_bound(12, b.eps) * np.abs(case.dense).max() * 10
    dense, U, diagonal, trace, logdet = map(b.numpy, case.compiled(verbs))
    np.testing.assert_allclose(dense, case.dense, atol=small)
    np.testing.assert_allclose(testing.vec(U), case.dense @ testing.vec(case.V), atol=small)
    np.testing.assert_allclose(testing.vec(diagonal), np.diagonal(case.dense), atol=small)
    assert trace == pytest.approx(np.trace(case.dense), abs=small * 12)
    exact = np.linalg.slogdet(case.dense)[1]
    m, n = case.shape
    judge(b, "KroneckerPair.logdet", abs(logdet - exact), n * m * bound)


@every_backend
@both_signs
@pytest.mark.parametrize("radius", [0.0, 0.5, 0.999])
def test_smith_agrees_with_eigh(b, sign, radius):
    case = Case(b, sign=sign, radius=radius)
    smith, eigh = map(b.numpy, case.compiled(solved))
    judge(b, "KroneckerPair.solve smith", case.error(smith), testing.inverse_bound(10 * case.condition, b.eps))
    judge(b, "KroneckerPair.solve eigh", case.error(eigh), testing.inverse_bound(case.condition, b.eps))


@uncompiled_backends
def test_smith_is_nan_where_the_series_diverges_though_the_pair_is_definite(b):
    P = KroneckerPair(*(b.array(np.eye(k) * c) for k, c in ((3, 1.0), (2, 1.0), (3, 2.0), (2, 1.0))))
    V = b.array(np.ones((2, 3)))
    np.testing.assert_allclose(b.numpy(P.solve(V)), np.ones((2, 3)) / 3, rtol=testing.inverse_bound(3, b.eps))
    assert np.isnan(b.numpy(P.solve(V, method="smith"))).all()


@uncompiled_backends
def test_a_failing_member_is_nan_and_the_others_are_not_touched(b):
    """Not A definite; C NaN; the pair not definite."""
    A, B, C, D = (np.stack([np.eye(k)] * 5) for k in (3, 2, 3, 2))
    C = -0.5 * C
    A[1, 0, 0], C[2, 2, 1], C[3] = -1, np.nan, -1.5 * np.eye(3)
    P = KroneckerPair(*map(b.array, (A, B, C, D)))
    V = b.array(np.ones((2, 3)))
    for U in map(b.numpy, (P.inverse() @ V, P.solve(V, method="smith"))):
        np.testing.assert_allclose(U[[0, 4]], 2, rtol=testing.inverse_bound(2, b.eps))
        assert np.isnan(U[1:4]).all()
    assert np.isnan(b.numpy(P.logdet())[1:4]).all()


@pytest.mark.parametrize("b", [NUMPY, TORCH, TORCH_FLOAT32], ids=str)
def test_a_side_that_is_singular_is_seen_as_often_as_in_cholesky(b):
    """By its pivots alone, which miss one in ten."""
    rng, missed = np.random.default_rng(0), 0
    for n in [2, 3, 4, 5, 6] * 20:
        X = rng.standard_normal((n, n - 1))
        A, I = b.array(X @ X.T), b.array(np.eye(2))
        missed += bool(np.isfinite(b.numpy(KroneckerPair(A, I, 0.05 * A, I).solve(b.array(np.ones((2, n)))))).any())
    assert missed <= 10


def test_exactly_singular_is_nan():
    """A linear hidden layer without damping: 1 - s1 s2 = 0 up to rounding, of either sign."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        A, B = Sample(4, seed=seed, decades=0.1).spd(NUMPY), Sample(3, seed=seed + 50, decades=0.1).spd(NUMPY)
        U = KroneckerPair(A, B, -A, B).inverse() @ rng.standard_normal((3, 4))
        assert np.isnan(U).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KroneckerPair(np.eye(2), *[np.eye(3)] * 3), r"C has shape \(3, 3\), expected \(\.\.\., 2, 2\)"),
        (lambda: Case(NUMPY).run(lambda P, V: P.inverse(method="lu")), "method is 'lu', expected one of 'eigh'"),
        (lambda: Case(NUMPY).run(lambda P, V: P.solve(V, method="lu")), "expected one of 'eigh', 'smith'"),
        (lambda: Case(TORCH).run(lambda P, V: P @ V.mT), r"V has shape \(4, 3\), expected \(\.\.\., 3, 4\)"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(40))
def test_smith_is_backward_stable_or_nan(seed):
    """On definite pairs up to singular ones and beyond: ρ(A⁻¹C) ρ(B⁻¹D) from 0 to 3."""
    rng = np.random.default_rng(seed)
    for b in (NUMPY, TORCH_FLOAT32):
        n, m = rng.integers(1, 6, 2)
        A, B = (testing.spd_matrix(testing.spectrum("geometric", k, condition=1e3), rng) for k in (n, m))
        C, D = (X + X.T for X in (rng.standard_normal((k, k)) for k in (n, m)))
        values = np.linalg.eigvals(np.kron(np.linalg.solve(A, C), np.linalg.solve(B, D))).real
        worst = values[np.argmax(abs(values))]
        target = [rng.uniform(0, 0.99), 1 - 10.0 ** rng.uniform(-9, -1), 1.0, rng.uniform(1, 3)][seed % 4]
        C = -C * target / worst  # the largest is -target
        pair = [np.asarray(X, b.dtype).astype(float) for X in (A, B, C, D)]
        F = np.kron(pair[0], pair[1]) + np.kron(pair[2], pair[3])
        V = rng.standard_normal((m, n)).astype(b.dtype).astype(float)
        U = b.numpy(KroneckerPair(*map(b.array, pair)).solve(b.array(V), "smith"))
        if np.isfinite(U).all():
            assert testing.backward_error(F, testing.vec(U), testing.vec(V)) <= testing.solve_bound(len(F), b.eps)
            assert np.linalg.eigvalsh(F)[0] > 0
        else:
            assert np.isnan(U).all()
            assert seed % 4, "ρ < 0.99"


def test_gradients_pass_through_smith():
    A, B, C, D = (torch.eye(k, dtype=torch.float64) * x for k, x in ((3, 2.0), (2, 3.0), (3, 0.5), (2, 0.5)))
    V = torch.ones(2, 3, dtype=torch.float64)
    for X in (A, B, C, D, V):
        X.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda A, B, C, D, V: KroneckerPair(*(0.5 * (X + X.mT) for X in (A, B, C, D))).solve(V, "smith"),
        (A, B, C, D, V),
    )


@pytest.mark.parametrize("method", ["eigh", "smith"])
def test_a_solve_without_refinement_is_caught(method, monkeypatch):
    """A and B are ill conditioned: what inverts them alone has a larger error, or is NaN for its residual."""
    case = Case(TORCH, decades=0.5, radius=0.5)

    def error():
        return case.error(case.run(lambda P, V: P.solve(V, method))) / testing.solve_bound(max(case.shape), case.b.eps)

    assert error() <= 1
    monkeypatch.setattr(kronecker_pair, "REFINEMENTS", 0)
    assert not error() <= 1
