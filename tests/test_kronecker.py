import pickle
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH, Backend, eager_backends, every_backend, jit_backends, uncompiled_backends
from hypothesis import given
from hypothesis import strategies as st
from matrices import Sample, judge

from kfaclinalg import (
    BlockTridiagonalInverse,
    CholeskyInverse,
    Diagonal,
    Kronecker,
    KroneckerPair,
    LowRankPlusDiagonal,
    testing,
)


class Side(NamedTuple):
    """A factor for the backend, the same matrix in float64, and the condition number of its inversion."""

    given: Any
    dense: np.ndarray
    condition: float


def dense_side(b: Backend, sample: Sample) -> Side:
    M = sample.spd(b)
    return Side(b.array(M), M, np.linalg.cond(M))


def diagonal_side(b: Backend, sample: Sample) -> Side:
    d = np.diagonal(sample.spd(b)).copy()
    return Side(Diagonal(b.array(d)), np.diag(d), max(d) / min(d))


def low_rank_side(b: Backend, sample: Sample) -> Side:
    U, d, s = sample.normal(b, sample.n, 1), np.diagonal(sample.spd(b)).copy(), np.asarray([2.0])
    M = (U * s) @ U.T + np.diag(d)
    return Side(LowRankPlusDiagonal(*map(b.array, (U, s, d))), M, np.linalg.norm(M, 2) / min(d))


def cholesky_side(b: Backend, sample: Sample) -> Side:
    L = np.linalg.cholesky(sample.spd(b)).astype(b.dtype).astype(np.float64)
    with mpmath.workdps(40):
        K = mpmath.inverse(mpmath.matrix(L.tolist()))
        M = np.asarray((K.T * K).tolist(), dtype=np.float64)
    return Side(CholeskyInverse(b.array(L)), M, np.linalg.cond(M))


KINDS = {"dense": dense_side, "diagonal": diagonal_side, "low-rank": low_rank_side, "cholesky": cholesky_side}
# each kind on each side
PAIRS = [("dense", "dense"), ("diagonal", "low-rank"), ("low-rank", "diagonal"), ("cholesky", "cholesky")]
every_pair = pytest.mark.parametrize("kinds", PAIRS, ids=" ⊗ ".join)


class Case:
    """One Kronecker product beside its dense float64 matrix, for m ≠ n."""

    def __init__(self, b: Backend, n: int = 4, m: int = 3, *, kinds=("dense", "dense"), decades=0.25, seed=0) -> None:
        self.b, self.shape = b, (m, n)
        samples = Sample(n, decades=decades, seed=seed), Sample(m, decades=decades, seed=seed + 1)
        sides = [KINDS[kind](b, sample) for kind, sample in zip(kinds, samples, strict=True)]
        self.A, self.B = (side.dense for side in sides)
        self.V = Sample(1, seed=seed).normal(b, m, n)
        self.dense = testing.dense_kronecker(self.A, self.B)
        self.factors = tuple(side.given for side in sides)
        self.condition = sides[0].condition * sides[1].condition

    def run(self, f):
        return self.b.numpy(self.compiled(f))

    def compiled(self, f):
        return self.b.jit(f)(Kronecker(*self.factors), self.b.array(self.V))

    def unvec(self, v):
        return testing.unvec(v, self.shape)


def check_product(case: Case) -> None:
    U = case.run(lambda P, V: P @ V)
    exact = case.unvec(case.dense @ testing.vec(case.V))
    scale = np.linalg.norm(case.A) * np.linalg.norm(case.B) * np.linalg.norm(case.V)
    judge(case.b, "Kronecker @", np.linalg.norm(U - exact) / scale, testing.solve_bound(sum(case.shape), case.b.eps))


def check_inverse(case: Case) -> None:
    U = case.run(lambda P, V: P.inverse() @ V)
    error = testing.backward_error(case.dense, testing.vec(U), testing.vec(case.V))
    judge(case.b, "Kronecker.inverse", error, testing.inverse_bound(case.condition, case.b.eps))


def check_solve(case: Case) -> None:
    U = case.run(lambda P, V: P.solve(V))
    error = testing.backward_error(case.dense, testing.vec(U), testing.vec(case.V))
    judge(case.b, "Kronecker.solve", error, testing.solve_bound(sum(case.shape), case.b.eps))


def check_logdet(case: Case) -> None:
    value = case.run(lambda P, V: P.logdet()).item()
    if len(case.dense) > 12:
        return  # mpmath takes its time, and float64 is no reference for float64
    with mpmath.workdps(40):
        mp = np.vectorize(mpmath.mpf, otypes=[object])
        dense = testing.dense_kronecker(mp(case.A), mp(case.B))  # its entries rounded to float64 would move logdet
        exact = float(mpmath.log(mpmath.det(mpmath.matrix(dense.tolist()))))
    m, n = case.shape
    bound = m * testing.logdet_bound(n, np.linalg.cond(case.A), np.linalg.slogdet(case.A)[1], case.b.eps)
    bound += n * testing.logdet_bound(m, np.linalg.cond(case.B), np.linalg.slogdet(case.B)[1], case.b.eps)
    judge(case.b, "Kronecker.logdet", abs(value - exact), bound)


CHECKS = [check_product, check_inverse, check_solve, check_logdet]


@every_backend
@every_pair
def test_against_the_dense_matrix(b, kinds):
    for check in CHECKS:
        check(Case(b, kinds=kinds))


@eager_backends
@given(n=st.integers(1, 9), m=st.integers(1, 9), decades=st.floats(0, 0.4), seed=st.integers(0, 1000))
def test_against_random_dense_matrices(b, n, m, decades, seed):
    for check in CHECKS:
        check(Case(b, n, m, decades=decades, seed=seed))


@pytest.mark.parametrize("check", CHECKS)
def test_the_wrong_order_of_the_factors_is_caught(check):
    case = Case(NUMPY, 3, 3)
    case.factors = case.factors[::-1]
    if check is check_logdet:  # the same for square V: the sum of the two log determinants does not tell the order
        case = Case(NUMPY)
        case.factors = (1.001 * case.A, case.B)
    with pytest.raises(AssertionError):
        check(case)


@every_backend
@every_pair
def test_trace_diagonal_and_dense(b, kinds):
    case = Case(b, kinds=kinds)
    bound = testing.solve_bound(12, b.eps)
    trace, diagonal, dense = map(b.numpy, case.compiled(lambda P, V: (P.trace(), P.diagonal(), P.to_dense())))
    assert trace == pytest.approx(np.trace(case.dense), rel=bound)
    np.testing.assert_allclose(diagonal, case.unvec(np.diagonal(case.dense)), rtol=bound)
    np.testing.assert_allclose(dense, case.dense, rtol=bound, atol=b.eps)


@every_backend
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("kinds", [("dense", "dense"), ("diagonal", "low-rank")], ids=" ⊗ ".join)
def test_inverse_root(b, p, kinds):
    """p applications of A^(-1/p) ⊗ B^(-1/p) are the inverse."""

    def repeated(P, V):
        root = P.inverse_root(p)
        for _ in range(p):
            V = root @ V
        return V

    case = Case(b, kinds=kinds)
    error = testing.backward_error(case.dense, testing.vec(case.run(repeated)), testing.vec(case.V))
    judge(b, "Kronecker.inverse_root", error, testing.inverse_bound(p * sum(case.shape) * case.condition, b.eps))


@every_backend
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_shifted_inverse(b, shift):
    """Of A ⊗ B, dense or structured, whose own inverse need not exist where the shift is not zero."""
    for kinds in (("dense", "dense"), ("diagonal", "low-rank"), ("low-rank", "dense")):
        case = Case(b, kinds=kinds)
        dense = case.dense + shift * np.eye(len(case.dense))
        U = case.run(lambda P, V: P.shifted_inverse(shift) @ V)
        error = testing.backward_error(dense, testing.vec(U), testing.vec(case.V))
        judge(b, "shifted_inverse, structured", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))


@uncompiled_backends
@every_pair
def test_apply_outer(b, kinds):
    case = Case(b, kinds=kinds)
    rng = np.random.default_rng(0)
    L, R = rng.standard_normal((3, 2)), rng.standard_normal((4, 2))
    U = b.numpy(Kronecker(*case.factors).apply_outer(b.array(L), b.array(R)))
    scale = np.prod([np.linalg.norm(X) for X in (case.B, L, R, case.A)])
    error = np.linalg.norm(U - case.B @ L @ R.T @ case.A.T) / scale
    judge(b, "Kronecker.apply_outer", error, testing.solve_bound(sum(case.shape), b.eps))


@uncompiled_backends
@pytest.mark.parametrize("diagonal", [None, 0, 1])
def test_products_use_the_arrays_as_given(b, diagonal):
    """Nothing dense is taken to be symmetric, whatever the other side is."""
    A, B, V, R = (np.random.default_rng(0).standard_normal((4, 2, 2)).astype(b.dtype)).astype(float)
    dense, given = [A, B], [b.array(A), b.array(B)]
    if diagonal is not None:
        d = np.diagonal(dense[diagonal]).copy()
        dense[diagonal], given[diagonal] = np.diag(d), Diagonal(b.array(d))
    A, B = dense
    P = Kronecker(*given)
    np.testing.assert_allclose(b.numpy(P @ b.array(V)), B @ V @ A.T, atol=100 * b.eps)
    np.testing.assert_allclose(b.numpy(P.apply_outer(b.array(V), b.array(R))), B @ V @ (A @ R).T, atol=100 * b.eps)


def all_of(P, V):
    return P @ V, P.inverse() @ V, P.solve(V), P.logdet(), P.to_dense()


@jit_backends
def test_a_batch_is_a_loop(b):
    A, B = Sample(3, (2, 1)).spd(b), Sample(2, (4,)).spd(b)
    V = np.random.default_rng(0).standard_normal((2, 4, 2, 3))
    P = Kronecker(b.array(A), b.array(B))
    results = b.jit(all_of)(P, b.array(V))
    single = b.jit(all_of)(Kronecker(b.array(A[1, 0]), b.array(B[2])), b.array(V[1, 2]))
    for x, y in zip(map(b.numpy, results), map(b.numpy, single), strict=True):
        assert x.shape == (2, 4, *y.shape)
        np.testing.assert_allclose(x[1, 2], y, rtol=testing.inverse_bound(b.eps**-0.6, b.eps))


@jit_backends
def test_a_failing_member_is_nan_as_a_whole(b):
    A, B = np.stack([np.eye(3)] * 3), np.stack([np.eye(2)] * 3)
    A[1, 0, 0] = -1
    B[2, 0, 1] = np.nan
    _, *Us, logdet, _ = map(b.numpy, b.jit(all_of)(Kronecker(b.array(A), b.array(B)), b.array(np.zeros((3, 2, 3)))))
    for U in Us:
        assert (U[0] == 0).all()
        assert np.isnan(U[1:]).all()
    assert np.isnan(logdet[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_v_is_computed_in_the_factors_dtype(dtype):
    case = Case(TORCH)
    P, V = Kronecker(*case.factors), TORCH.array(case.V).to(dtype)
    pair = KroneckerPair(*case.factors, *(0.1 * M for M in case.factors))
    chain = BlockTridiagonalInverse((), (), (P,))
    for f in (
        *(lambda V: P @ V, P.solve, lambda V: P.inverse() @ V, lambda V: chain.apply((V,))[0]),
        *(lambda V: pair @ V, pair.solve, lambda V: pair.solve(V, method="smith")),
    ):
        U = f(V)
        assert U.dtype == dtype
        torch.testing.assert_close(U, f(V.double()).to(dtype), rtol=0, atol=0)


def test_values_travel():
    P = pickle.loads(pickle.dumps(Kronecker(np.eye(3), 2 * np.eye(2))))
    assert P.trace() == 12
    assert repr(P) == "Kronecker(A: (3, 3), B: (2, 2), float64, cpu)"
    assert P.shape == (2, 3)
    with pytest.raises(AttributeError):
        P.A = np.eye(3)
    with pytest.raises(TypeError):
        np.eye(2) @ P


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda P: Kronecker(np.ones((2, 3)), np.eye(2)),
            r"A has shape \(2, 3\), expected \(\.\.\., n, n\)",
        ),
        (ValueError, lambda P: Kronecker(np.ones((2, 1, 1)), np.ones((3, 1, 1))), r"B has batch shape \(3,\)"),
        (ValueError, lambda P: P @ np.ones((3, 2)), r"V has shape \(3, 2\), expected \(\.\.\., 2, 3\)"),
        (ValueError, lambda P: P @ np.ones(3), r"V has shape \(3,\), expected \(\.\.\., 2, 3\)"),
        (ValueError, lambda P: P.apply_outer(np.ones((2, 4)), np.ones((3, 5))), r"R has shape \(3, 5\), expected"),
        (TypeError, lambda P: P @ np.ones((2, 3), dtype=np.float32), "V has dtype float32, expected float64"),
        (TypeError, lambda P: P @ torch.ones(2, 3), r"V is an array of .*torch, expected one of .*numpy"),
        (TypeError, lambda P: Kronecker(np.eye(2), torch.eye(2)), "B is an array of"),
        (TypeError, lambda P: Kronecker(Diagonal(np.ones(2)), torch.eye(2)), "B is an array of"),
        (ValueError, lambda P: Kronecker(Diagonal(np.ones((2, 1))), np.ones((3, 1, 1))), r"B has batch shape \(3,\)"),
        (ValueError, lambda P: Kronecker(Diagonal(np.ones(2)), np.eye(2)) @ np.ones((3, 2)), "V has shape"),
        (ValueError, lambda P: Diagonal(np.ones(2)).inverse_root(0), "p is 0, expected a finite number > 0"),
    ],
)
def test_mistakes_are_refused(error, call, message):
    with pytest.raises(error, match=message):
        call(Kronecker(np.eye(3), np.eye(2)))
