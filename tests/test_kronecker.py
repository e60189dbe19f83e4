import pickle

import mpmath
import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH, Backend, eager_backends, every_backend
from hypothesis import given
from hypothesis import strategies as st
from matrices import Sample, judge

from kfaclinalg import BlockTridiagonalInverse, Kronecker, KroneckerPair, testing


class Case:
    """One Kronecker product beside its dense float64 matrix, for m ≠ n."""

    def __init__(self, b: Backend, n: int = 4, m: int = 3, *, decades: float = 0.25, seed: int = 0) -> None:
        self.b, self.shape = b, (m, n)
        self.A = Sample(n, decades=decades, seed=seed).spd(b)
        self.B = Sample(m, decades=decades, seed=seed + 1).spd(b)
        self.V = Sample(1, seed=seed).normal(b, m, n)
        self.dense = testing.dense_kronecker(self.A, self.B)
        self.arrays = (b.array(self.A), b.array(self.B))

    @property
    def condition(self) -> float:
        return np.linalg.cond(self.A) * np.linalg.cond(self.B)

    def run(self, f):
        return self.b.numpy(self.b.jit(lambda A, B, V: f(Kronecker(A, B), V))(*self.arrays, self.b.array(self.V)))

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
@pytest.mark.parametrize("check", CHECKS)
def test_against_the_dense_matrix(b, check):
    check(Case(b))


@eager_backends
@given(n=st.integers(1, 9), m=st.integers(1, 9), decades=st.floats(0, 0.4), seed=st.integers(0, 1000))
def test_against_random_dense_matrices(b, n, m, decades, seed):
    for check in CHECKS:
        check(Case(b, n, m, decades=decades, seed=seed))


@pytest.mark.parametrize("check", CHECKS)
def test_the_wrong_order_of_the_factors_is_caught(check):
    case = Case(NUMPY, 3, 3)
    case.arrays = case.arrays[::-1]
    if check is check_logdet:  # the same for square V: the sum of the two log determinants does not tell the order
        case = Case(NUMPY)
        case.arrays = (1.001 * case.A, case.B)
    with pytest.raises(AssertionError):
        check(case)


@every_backend
def test_trace_diagonal_and_dense(b):
    case = Case(b)
    bound = testing.solve_bound(12, b.eps)
    assert case.run(lambda P, V: P.trace()) == pytest.approx(np.trace(case.dense), rel=bound)
    np.testing.assert_allclose(case.run(lambda P, V: P.diagonal()), case.unvec(np.diagonal(case.dense)), rtol=bound)
    np.testing.assert_allclose(case.run(lambda P, V: P.to_dense()), case.dense, rtol=bound, atol=b.eps)


@every_backend
@pytest.mark.parametrize("p", [1, 2, 4])
def test_inverse_root(b, p):
    """p applications of A^(-1/p) ⊗ B^(-1/p) are the inverse."""

    def repeated(P, V):
        root = P.inverse_root(p)
        for _ in range(p):
            V = root @ V
        return V

    case = Case(b)
    error = testing.backward_error(case.dense, testing.vec(case.run(repeated)), testing.vec(case.V))
    judge(b, "Kronecker.inverse_root", error, testing.inverse_bound(p * sum(case.shape) * case.condition, b.eps))


@every_backend
def test_apply_outer(b):
    case = Case(b)
    rng = np.random.default_rng(0)
    L, R = rng.standard_normal((3, 2)), rng.standard_normal((4, 2))
    U = b.numpy(Kronecker(*case.arrays).apply_outer(b.array(L), b.array(R)))
    np.testing.assert_allclose(U, case.B @ L @ R.T @ case.A.T, atol=100 * b.eps)


@every_backend
def test_products_use_the_arrays_as_given(b):
    A, B, V = (np.random.default_rng(0).standard_normal((3, 2, 2)).astype(b.dtype)).astype(float)
    U = b.numpy(Kronecker(b.array(A), b.array(B)) @ b.array(V))
    np.testing.assert_allclose(U, B @ V @ A.T, atol=100 * b.eps)


@every_backend
def test_a_batch_is_a_loop(b):
    A, B = Sample(3, (2, 1)).spd(b), Sample(2, (4,)).spd(b)
    V = np.random.default_rng(0).standard_normal((2, 4, 2, 3))
    P = Kronecker(b.array(A), b.array(B))
    for f in (lambda P, V: P @ V, lambda P, V: P.inverse() @ V, lambda P, V: P.solve(V)):
        stacked = b.numpy(f(P, b.array(V)))
        assert stacked.shape == (2, 4, 2, 3)
        single = b.numpy(f(Kronecker(b.array(A[1, 0]), b.array(B[2])), b.array(V[1, 2])))
        np.testing.assert_allclose(stacked[1, 2], single, rtol=testing.inverse_bound(b.eps**-0.6, b.eps))
    assert b.numpy(P.logdet()).shape == (2, 4)
    assert b.numpy(P.to_dense()).shape == (2, 4, 6, 6)


@every_backend
def test_a_failing_member_is_nan_as_a_whole(b):
    A, B = np.stack([np.eye(3)] * 3), np.stack([np.eye(2)] * 3)
    A[1, 0, 0] = -1
    B[2, 0, 1] = np.nan
    P, V = Kronecker(b.array(A), b.array(B)), b.array(np.zeros((3, 2, 3)))
    for U in (P.inverse() @ V, P.solve(V)):
        assert (b.numpy(U)[0] == 0).all()
        assert np.isnan(b.numpy(U)[1:]).all()
    assert np.isnan(b.numpy(P.logdet())[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_v_is_computed_in_the_factors_dtype(dtype):
    case = Case(TORCH)
    P, V = Kronecker(*case.arrays), TORCH.array(case.V).to(dtype)
    pair = KroneckerPair(*case.arrays, *(0.1 * M for M in case.arrays))
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
    ],
)
def test_mistakes_are_refused(error, call, message):
    with pytest.raises(error, match=message):
        call(Kronecker(np.eye(3), np.eye(2)))
