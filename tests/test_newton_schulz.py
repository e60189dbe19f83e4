import numpy as np
import pytest
import torch
from backends import EAGER, GPU, JAX, NUMPY, TORCH, Backend, eager_backends, every_backend
from hypothesis import assume, given
from matrices import Sample, judge, members, samples

from kfaclinalg import spd, testing
from kfaclinalg.spd import newton_schulz_inverse

# JAX compiles anew for every shape, and outside of jit for every operation.
eager_and_jit = pytest.mark.parametrize("b", [*EAGER, JAX[-1], *GPU], ids=str)
# Beyond a condition of about 1/√eps the default tolerance cannot be met.
FIXED = [
    Sample(5, decades=0.3),
    Sample(1),
    Sample(7, (3,), "one-tiny", 0.25),
    Sample(4, (2, 2), "clustered", 0.3),
    Sample(3, (0,)),
]


def check(b: Backend, sample: Sample) -> None:
    M = sample.spd(b)
    X = b.numpy(b.jit(newton_schulz_inverse)(b.array(M)))
    assert X.shape == M.shape
    Z = sample.normal(b, sample.n, 3)
    for M_i, X_i, Z_i in members(M, X, Z):
        condition = np.linalg.cond(M_i.astype(float))
        B_i = M_i @ Z_i
        error = testing.backward_error(M_i, X_i @ B_i, B_i)
        judge(b, "newton_schulz_inverse", error, testing.inverse_bound(condition, b.eps))
        residual = float(np.linalg.norm((np.eye(sample.n) - M_i @ X_i).astype(float)))
        judge(b, "newton_schulz_inverse, I - MX", residual, testing.inverse_bound(sample.n * condition, b.eps))
        asymmetry = float(np.linalg.norm((X_i - X_i.T).astype(float)) / np.linalg.norm(X_i.astype(float)))
        judge(b, "newton_schulz_inverse, X - Xᵀ", asymmetry, testing.inverse_bound(sample.n * condition, b.eps))


@every_backend
@pytest.mark.parametrize("sample", FIXED, ids=str)
def test_errors_are_within_their_bounds(b, sample):
    check(b, sample)


@eager_backends
@given(sample=samples)
def test_errors_are_within_their_bounds_for_random_matrices(b, sample):
    sample = sample._replace(decades=0.4 * sample.decades)
    assume(sample.n * b.eps**-sample.decades < 0.1 * b.eps**-0.5)
    check(b, sample)


@eager_backends
@given(sample=samples)
def test_what_is_finite_is_within_the_tolerance(b, sample):
    """Whatever the condition number: NaN, never a wrong finite number."""
    M = sample.spd(b)
    for options in ({}, {"iterations": 5}, {"tolerance": 1e-2}, {"tolerance": 0.9, "iterations": 3}):
        X = b.numpy(newton_schulz_inverse(b.array(M), **options))
        tolerance = options.get("tolerance", b.eps**0.5)
        for M_i, X_i in members(M, X):
            rounding = (
                testing.solve_bound(sample.n, b.eps)
                * float(np.linalg.norm(M_i.astype(float)))
                * float(np.linalg.norm(X_i.astype(float)))
            )
            residual = float(np.linalg.norm((np.eye(sample.n) - M_i @ X_i).astype(float)))
            assert np.isnan(X_i).all() or residual <= tolerance + rounding


@eager_and_jit
def test_a_failing_member_is_nan_and_the_others_are_not_touched(b):
    good = Sample(4, (8,), decades=0.2).spd(b)
    bad = good.copy()
    bad[1] = -bad[1]
    bad[2, 0, 1] = np.nan
    bad[3, 3, 3] = np.inf
    bad[4] = 0
    bad[5] = np.eye(4) + 2 * np.eye(4)[::-1]  # indefinite, with a positive diagonal
    bad[6] = np.ones((4, 4))  # singular
    expected = b.numpy(b.jit(newton_schulz_inverse)(b.array(good)))
    computed = b.numpy(b.jit(newton_schulz_inverse)(b.array(bad)))
    assert np.isnan(computed[1:7]).all()
    np.testing.assert_allclose(computed[[0, 7]], expected[[0, 7]], rtol=100 * b.eps)
    # the same with the exact inverse of the good ones as a start
    computed = b.numpy(b.jit(newton_schulz_inverse)(b.array(bad), b.array(expected)))
    assert np.isnan(computed[1:7]).all()
    np.testing.assert_allclose(computed[[0, 7]], expected[[0, 7]], rtol=b.eps**0.5)


@eager_and_jit
def test_the_inverse_of_an_indefinite_matrix_is_not_its_own_start(b):
    """The iteration converges to the inverse of any nonsingular matrix: only the start was definite or not."""
    M = np.asarray([[1.0, 2.0], [2.0, 1.0]])
    assert np.isnan(b.numpy(b.jit(newton_schulz_inverse)(b.array(M), b.array(np.linalg.inv(M))))).all()


@pytest.mark.parametrize("exponent", [-150, -8, 8, 150])
def test_scale_does_not_matter(exponent):
    M = Sample(6, decades=0.3).spd(NUMPY)
    D = np.diag(10.0 ** np.linspace(-5, 5, 6))
    expected = newton_schulz_inverse(M)
    np.testing.assert_allclose(newton_schulz_inverse(10.0**exponent * M) * 10.0**exponent, expected, rtol=1e-8)
    np.testing.assert_allclose(D @ newton_schulz_inverse(D @ M @ D, tolerance=1e3) @ D, expected, rtol=1e-6)


def iterations_needed(M, start):
    for iterations in range(60):
        if np.isfinite(newton_schulz_inverse(M, start, iterations=iterations)).all():
            return iterations
    raise AssertionError("no convergence")


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1.5, 100.0])
def test_a_warm_start_pays(factor):
    """Also where all of M has grown: the best multiple of the earlier inverse is taken."""
    M = Sample(8, decades=0.35).spd(NUMPY)
    E = np.linalg.cholesky(M) @ np.diag(np.linspace(-0.05, 0.05, 8)) @ np.linalg.cholesky(M).T
    start = spd.inverse(M)
    assert iterations_needed(factor * M, start) <= 1
    assert iterations_needed(factor * (M + E), start) <= 3
    assert iterations_needed(factor * (M + E), None) >= 15


def test_a_start_from_which_it_would_not_converge_is_not_used():
    """It is definite, but no multiple of it brings all eigenvalues of M X into (0, 2)."""
    M, start = np.diag([1.0, 1e-3, 1e3]), np.diag([1.0, 1e-3, 1e3])
    np.testing.assert_allclose(
        newton_schulz_inverse(M, start), np.linalg.inv(M), rtol=testing.inverse_bound(1, NUMPY.eps)
    )


@eager_and_jit
def test_a_start_that_is_too_far_is_not_used(b):
    M = Sample(5, (6,), decades=0.2).spd(b)
    rng = np.random.default_rng(0)
    start = rng.standard_normal(M.shape)
    start[1] = 0
    start[2, 0, 0] = np.nan
    start[3, 1, 1] = np.inf
    start[4] *= 1e6
    start[5] = -np.linalg.inv(M[5])
    X = b.numpy(b.jit(newton_schulz_inverse)(b.array(M), b.array(start)))
    for M_i, X_i in members(M, X):
        bound = testing.inverse_bound(np.linalg.cond(M_i.astype(float)), b.eps)
        judge(b, "newton_schulz_inverse", testing.backward_error(M_i, X_i @ M_i, M_i), bound)
    # and the few iterations that a good start needs end in NaN
    assert np.isnan(b.numpy(newton_schulz_inverse(b.array(M), b.array(start), iterations=2))[:5]).all()


@eager_and_jit
def test_batches_of_starts_broadcast(b):
    M = Sample(3, (2,), decades=0.1).spd(b)
    X = b.numpy(b.jit(newton_schulz_inverse)(b.array(M), b.array(np.eye(3))))
    assert X.shape == (2, 3, 3)
    Y = b.numpy(b.jit(newton_schulz_inverse)(b.array(M[0]), b.array(np.stack([np.eye(3)] * 4))))
    assert Y.shape == (4, 3, 3)
    np.testing.assert_allclose(Y[1], X[0], rtol=b.eps**0.5, atol=b.eps**0.5)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda: newton_schulz_inverse(np.ones((2, 3))),
            r"M has shape \(2, 3\), expected \(\.\.\., n, n\)",
        ),
        (ValueError, lambda: newton_schulz_inverse(np.eye(2), np.eye(3)), r"start has shape \(3, 3\), expected"),
        (ValueError, lambda: newton_schulz_inverse(np.ones((2, 1, 1)), np.ones((3, 1, 1))), r"start has batch shape"),
        (ValueError, lambda: newton_schulz_inverse(np.eye(2), iterations=-1), "iterations is -1, expected an integer"),
        (
            ValueError,
            lambda: newton_schulz_inverse(np.eye(2), tolerance=0),
            "tolerance is 0, expected a finite",
        ),
        (ValueError, lambda: newton_schulz_inverse(np.eye(2), tolerance=np.nan), "tolerance is nan"),
        (TypeError, lambda: newton_schulz_inverse(np.eye(2), torch.eye(2)), "start is an array of .*torch"),
        (
            TypeError,
            lambda: newton_schulz_inverse(np.eye(2), np.eye(2, dtype=np.float32)),
            "start has dtype float32, expected float64",
        ),
    ],
)
def test_mistakes_are_refused(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_gradients_pass_through():
    M = TORCH.array(Sample(3, decades=0.05).spd(TORCH)).requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz_inverse, (M,))


def test_the_bounds_catch_a_perturbed_inverse(monkeypatch):
    monkeypatch.setitem(globals(), "newton_schulz_inverse", lambda M: spd.newton_schulz_inverse(M) * (1 + 3e-6))
    with pytest.raises(AssertionError):
        check(TORCH, Sample(5, decades=0.2))


def test_the_bounds_catch_a_loose_tolerance(monkeypatch):
    loose = lambda M: spd.newton_schulz_inverse(M, iterations=5, tolerance=0.5)  # noqa: E731
    monkeypatch.setitem(globals(), "newton_schulz_inverse", loose)
    with pytest.raises(AssertionError):
        check(TORCH, Sample(5, decades=0.2))


def test_the_start_may_be_named():
    M = np.diag([2.0, 4.0])
    np.testing.assert_array_equal(newton_schulz_inverse(M, start=M), newton_schulz_inverse(M, M))
