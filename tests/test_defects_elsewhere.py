"""Results that other libraries were seen to get wrong, with the numbers of the reports, computed here."""

import numpy as np
import pytest
from backends import TORCH, eager_backends

from kfaclinalg import (
    Diagonal,
    Kronecker,
    KroneckerPair,
    LowRankPlusDiagonal,
    exactly_damped_inverse,
    spd,
    testing,
)
from kfaclinalg.factors import Factors, LayerFactors


@eager_backends
def test_small_eigenvalues_count_in_the_log_determinant(b):
    """diag(1, 1e-5) ⊗ itself: linear_operator raises eigenvalues to 1e-7 and gives -39.14."""
    M = b.array(np.diag([1.0, 1e-5]))
    exact = pytest.approx(4 * np.log(1e-5), rel=100 * b.eps)
    assert b.numpy(Kronecker(M, M).logdet()) == exact
    by_eigenvalues = b.numpy(Kronecker(M, M).shifted_inverse(0.0).inverse().logdet())
    assert by_eigenvalues == exact if b.dtype == "float64" else np.isnan(by_eigenvalues)  # 1e-10 is below eps
    assert 4 * np.log(1e-5) == pytest.approx(-46.05, abs=0.005)


@eager_backends
def test_a_matrix_that_is_not_symmetric_is_solved_as_its_symmetric_part_or_nan(b):
    """The symmetric part of [[1, 2], [0, 1]] is singular, so NaN; with 1 in the place of 2 it is [[1, ½], [½, 1]]."""
    I, V = b.array(np.eye(2)), b.array(np.ones((2, 2)))
    singular, definite = (b.array([[1.0, x], [0.0, 1.0]]) for x in (2.0, 1.0))
    assert np.isnan(b.numpy(Kronecker(singular, I).solve(V))).all()
    assert np.isnan(b.numpy(Kronecker(singular, I).inverse() @ V)).all()
    np.testing.assert_allclose(b.numpy(Kronecker(definite, I).solve(V)), 2 / 3, rtol=100 * b.eps)
    # the product takes its arrays as given
    np.testing.assert_array_equal(b.numpy(Kronecker(singular, I) @ V), [[3.0, 1.0]] * 2)


def test_large_matrices_are_solved_to_rounding():
    """n = 1000, above the size at which some switch to conjugate gradients: they leave a residual of 0.96."""
    n, rng = 1000, np.random.default_rng(0)
    X = rng.standard_normal((n, n))
    M, v = TORCH.array(X @ X.T / n + 0.1 * np.eye(n)), TORCH.array(rng.standard_normal((n, 1)))
    x, logdet = spd.solve(M, v), float(spd.logdet(M))
    assert testing.backward_error(M, x, v) <= testing.solve_bound(n, TORCH.eps)
    w = np.linalg.eigvalsh(TORCH.numpy(M))
    assert abs(logdet - np.log(w).sum()) <= testing.logdet_bound(n, w[-1] / w[0], logdet, TORCH.eps)


@eager_backends
def test_a_log_determinant_has_its_sign_and_counts_each_dimension(b):
    """0.5 I at n = 1100 is -762.46, where CoLA gives +762.46; 2 I (3 x 3) is 2.079, where it gives 0.693."""
    half, two = b.array(np.full(1100, 0.5)), b.array(2 * np.eye(3))
    assert b.numpy(Diagonal(half).logdet()) == pytest.approx(-762.46, abs=0.005)
    U = b.array(np.zeros((1100, 0)))
    assert b.numpy(LowRankPlusDiagonal(U, b.array(np.zeros(0)), half).logdet()) == pytest.approx(-762.46, abs=0.005)
    assert b.numpy(spd.logdet(b.array(0.5 * np.eye(1100)))) == pytest.approx(-762.46, abs=0.005)
    one = b.array(np.eye(1))
    for P in (Kronecker(two, one), Kronecker(one, two)):
        assert b.numpy(P.logdet()) == pytest.approx(2.079, abs=0.0005)


@eager_backends
def test_leading_dimensions_of_the_right_hand_side_are_a_batch(b):
    """(4, 2, 3) stays (4, 2, 3); CoLA gives (4, 6)."""
    V = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(b.dtype)
    A, B = b.array(np.diag([1.0, 2.0, 4.0])), b.array(np.diag([1.0, 8.0]))
    expected = V / np.asarray([[1.0], [8.0]]) / np.asarray([1.0, 2.0, 4.0])
    pair = KroneckerPair(A, B, b.array(np.zeros((3, 3))), B)
    for P in (Kronecker(A, B), pair, Kronecker(A, B).shifted_inverse(0.0).inverse()):
        np.testing.assert_allclose(b.numpy(P.solve(b.array(V))), expected, rtol=100 * b.eps, atol=b.eps)
    np.testing.assert_allclose(b.numpy(spd.solve(B, b.array(V))), V / [[1.0], [8.0]], rtol=10 * b.eps)


@eager_backends
def test_negative_eigenvalues_are_damped_or_nan_and_no_determinant_overflows(b):
    """The exactly damped inverse divides by λ_i + damping, which may be negative; a product of powers may overflow."""
    G, one = b.array(np.diag([1.0, -0.5])), b.array(np.eye(1))
    factors, V = Factors((LayerFactors(one, G),)), (b.array(np.ones((2, 1))),)
    np.testing.assert_allclose(b.numpy((exactly_damped_inverse(factors, 1.0) @ V)[0]), [[0.5], [2.0]], rtol=10 * b.eps)
    for damping in (0.0, 0.25, 0.5):
        assert np.isnan(b.numpy((exactly_damped_inverse(factors, damping) @ V)[0])).all()
    P = Kronecker(b.array(1e6 * np.eye(40)), b.array(1e6 * np.eye(30)))  # the determinant is 1e14400
    assert b.numpy(P.logdet()) == pytest.approx(2 * 40 * 30 * np.log(1e6), rel=100 * b.eps)


@eager_backends
def test_the_exponents_of_a_kronecker_determinant_are_those_of_the_other_factor(b):
    """det(A ⊗ B) = det(A)^m det(B)^n; probnum had them exchanged."""
    P = Kronecker(b.array(2 * np.eye(3)), b.array(5 * np.eye(2)))
    assert b.numpy(P.logdet()) == pytest.approx(np.log(2.0**6 * 5.0**6), rel=100 * b.eps)
    P = Kronecker(b.array(np.diag([2.0, 3.0, 4.0])), b.array(np.diag([5.0, 1.0])))
    assert b.numpy(P.logdet()) == pytest.approx(2 * np.log(24) + 3 * np.log(5), rel=100 * b.eps)


@eager_backends
def test_a_diagonal_that_is_not_constant_is_not_averaged(b):
    """Added to a low rank, and added to a Kronecker product as a product of diagonals (gpytorch until its PR 1430)."""
    u, d = np.ones((3, 1)), np.asarray([1.0, 2.0, 4.0])
    M = LowRankPlusDiagonal(b.array(u), b.array([1.0]), b.array(d))
    expected = np.linalg.solve(u @ u.T + np.diag(d), u)
    np.testing.assert_allclose(b.numpy(M.solve(b.array(u))), expected, rtol=100 * b.eps)
    A, B, C, D = u @ u.T + np.eye(3), np.eye(2), np.diag(d), np.diag([1.0, 3.0])
    V, dense = np.ones((2, 3)), testing.dense_kronecker(A, B) + testing.dense_kronecker(C, D)
    U = b.numpy(KroneckerPair(*map(b.array, (A, B, C, D))).solve(b.array(V)))
    np.testing.assert_allclose(testing.vec(U), np.linalg.solve(dense, testing.vec(V)), rtol=1e3 * b.eps)
