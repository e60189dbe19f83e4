import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH_FLOAT32, eager_backends, every_backend, uncompiled_backends
from matrices import FIXED, Sample, judge, members

from kfaclinalg import CholeskyInverse, Kronecker, spd, testing

every_sample = pytest.mark.parametrize("sample", FIXED, ids=lambda sample: f"{sample.n}, {sample.batch}")


def inverse_of(b, sample):
    """The operator made from a definite M, and the M that its L stands for, in float64."""
    P = b.jit(lambda M: CholeskyInverse(spd.cholesky(M)))(b.array(sample.spd(b)))
    L = b.numpy(P.L)
    return P, L @ L.mT


@every_backend
@every_sample
def test_cholesky_is_the_factor_of_m(b, sample):
    P, M = inverse_of(b, sample)
    assert np.array_equal(np.triu(b.numpy(P.L), 1), np.zeros(M.shape))
    for X, Y in members(M, sample.spd(b)):
        error = float(np.linalg.norm((X - Y).astype(float)) / np.linalg.norm(Y.astype(float)))
        judge(b, "spd.cholesky", error, testing.solve_bound(sample.n, b.eps))


@every_backend
@every_sample
def test_apply_is_backward_stable(b, sample):
    P, M = inverse_of(b, sample)
    V = sample.normal(b, sample.n, 3)
    U = b.numpy(b.jit(lambda P, V: P @ V)(P, b.array(V)))
    for X, u, v in members(M, U, V):
        error = testing.backward_error(X.astype(float), u.astype(float), v.astype(float))
        judge(b, "CholeskyInverse @", error, testing.solve_bound(sample.n, b.eps))


@every_backend
@every_sample
def test_what_is_known_of_it_is_that_of_the_dense_inverse(b, sample):
    P, M = inverse_of(b, sample)
    condition = max((np.linalg.cond(X.astype(float)) for (X,) in members(M)), default=1.0)
    dense, bound = np.linalg.inv(M), testing.inverse_bound(condition, b.eps)
    size = np.linalg.norm(dense, axis=(-2, -1))
    found = {
        "to_dense": (b.numpy(P.to_dense()), dense),
        "diagonal": (b.numpy(P.diagonal())[..., None], np.diagonal(dense, axis1=-2, axis2=-1)[..., None]),
        "trace": (b.numpy(P.trace())[..., None, None], np.trace(dense, axis1=-2, axis2=-1)[..., None, None]),
    }
    for name, (computed, exact) in found.items():
        errors = np.linalg.norm(computed - exact, axis=(-2, -1)) / size
        judge(b, f"CholeskyInverse.{name}", np.max(errors, initial=0.0), sample.n**0.5 * bound)
    logdet = -np.linalg.slogdet(M)[1]
    bound = testing.logdet_bound(sample.n, condition, np.max(abs(logdet), initial=0.0), b.eps)
    judge(b, "CholeskyInverse.logdet", np.max(abs(b.numpy(P.logdet()) - logdet), initial=0.0), bound)


@every_backend
def test_inverse_and_solve_are_products_with_m(b):
    sample = Sample(5, (2,))
    P, M = inverse_of(b, sample)
    X = sample.normal(b, 5, 3)
    bound = testing.solve_bound(5, b.eps)
    assert np.array_equal(b.numpy(P.inverse()), b.numpy(P.inverse()).mT)
    for computed, exact in ((P.inverse(), M), (P.solve(b.array(X)), M @ X)):
        judge(b, "CholeskyInverse.solve", np.max(abs(b.numpy(computed) - exact)) / np.max(abs(M)), 5 * bound)


@uncompiled_backends
def test_what_is_above_the_diagonal_is_not_read(b):
    low = np.tril(Sample(4, (2,)).spd(b)) + np.eye(4)
    V = Sample(4, (2,)).normal(b, 4, 2)
    P, Q = (CholeskyInverse(b.array(L)) for L in (low, low + np.triu(np.ones((4, 4)), 1)))
    for f in (
        lambda P: P @ b.array(V),
        lambda P: P.solve(b.array(V)),
        lambda P: P.inverse(),
        lambda P: P.logdet(),
        lambda P: P.trace(),
        lambda P: P.to_dense(),
    ):
        np.testing.assert_array_equal(b.numpy(f(P)), b.numpy(f(Q)))


@uncompiled_backends
@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("batch", [(), (1,)])
def test_a_singular_member_is_nan_all_over(b, entry, batch):
    L = np.tile(np.eye(3), (*batch, 1, 1))
    L[..., 1, 1] = entry
    P, X = CholeskyInverse(b.array(L)), b.array(np.zeros((*batch, 3, 2)))
    for result in (P @ X, P.logdet(), P.trace(), P.diagonal(), P.to_dense()):
        assert np.isnan(b.numpy(result)).all()


@uncompiled_backends
def test_a_member_is_alone_in_its_failure(b):
    M = np.stack([np.eye(3), -np.eye(3)])
    U = b.numpy(Kronecker(b.array(M), b.array(np.eye(2))).inverse(method="cholesky") @ b.array(np.ones((2, 2, 3))))
    np.testing.assert_array_equal(U, np.stack([np.ones((2, 3)), np.full((2, 3), np.nan)]))


@eager_backends
def test_a_tiny_member_does_not_stop_the_others(b):
    """LAPACK's LU takes it for singular: its second pivot is the product of the two, which underflows."""
    tiny = float(np.finfo(b.dtype).tiny)
    t, x = tiny**0.6, 10 * tiny
    L = np.stack([np.eye(2), [[t, 0.0], [1.0, t]]])
    U = b.numpy(CholeskyInverse(b.array(L)) @ b.array([[0.0], [x]]))
    expected = [[[0.0], [x]], [[-x / t / t / t], [x / t / t]]]
    np.testing.assert_allclose(U, expected, rtol=testing.solve_bound(2, b.eps))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("of_x", ["C", "F", "strided"])
def test_every_order_in_memory(order, of_x):
    sample = Sample(6)
    L = np.array(np.linalg.cholesky(sample.spd(NUMPY)), order=order)
    X = sample.normal(NUMPY, 12, 8)[::2, ::2] if of_x == "strided" else np.array(sample.normal(NUMPY, 6, 4), order=of_x)
    before = X.copy()
    np.testing.assert_allclose(L @ L.T @ (CholeskyInverse(L) @ X), X, rtol=0, atol=1e-7 * np.max(abs(X)))
    np.testing.assert_array_equal(X, before)


def test_half_precision_comes_back_in_its_own():
    X = torch.ones(3, 2, dtype=torch.bfloat16)
    P = CholeskyInverse(2 * torch.eye(3))
    for result, value in ((P @ X, 0.25), (P.solve(X), 4.0)):
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, value * X)


def test_damping_and_roots_take_it_as_a_dense_matrix():
    P = Kronecker(CholeskyInverse(2 * np.eye(3)), CholeskyInverse(np.eye(2)))
    np.testing.assert_allclose(P.inverse_root(2) @ np.ones((2, 3)), np.full((2, 3), 2.0), rtol=1e-14)
    np.testing.assert_allclose(P.shifted_inverse(0.75) @ np.ones((2, 3)), np.ones((2, 3)), rtol=1e-14)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: CholeskyInverse(np.ones((2, 3))), r"L has shape \(2, 3\), expected \(\.\.\., n, n\)"),
        (TypeError, lambda: CholeskyInverse([[1.0]]), "L is a builtins.list, expected an array"),
        (TypeError, lambda: CholeskyInverse(np.eye(2, dtype=int)), "L has dtype int64"),
        (ValueError, lambda: CholeskyInverse(np.eye(2)) @ np.ones((3, 1)), "X has shape"),
        (
            ValueError,
            lambda: CholeskyInverse(np.ones((2, 1, 1))) @ np.ones((3, 1, 1)),
            r"X has batch shape \(3,\), which does not broadcast with \(2,\) of L",
        ),
        (ValueError, lambda: Kronecker(np.eye(2), np.eye(2)).inverse(method="qr"), "method is 'qr', expected one of"),
    ],
)
def test_mistakes_are_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_the_bound_catches_a_factor_that_is_slightly_off():
    b, sample = TORCH_FLOAT32, Sample(24, decades=0.1)
    P, M = inverse_of(b, sample)
    V = sample.normal(b, 24, 3)
    U = b.numpy(CholeskyInverse((1 + 1e-3) * P.L) @ b.array(V))
    assert testing.backward_error(M, U, V) > testing.solve_bound(24, b.eps)
