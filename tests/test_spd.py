import mpmath
import numpy as np
import pytest
from backends import NUMPY, TORCH, Backend, eager_backends, every_backend, uncompiled_backends
from hypothesis import given
from matrices import FIXED, Sample, judge, members, samples

from kfaclinalg import spd, testing


def check_solve(b: Backend, sample: Sample) -> None:
    M, B = sample.spd(b), sample.normal(b, sample.n, 3)
    X = b.numpy(b.jit(spd.solve)(b.array(M), b.array(B)))
    assert X.shape == B.shape
    for M_i, X_i, B_i in members(M, X, B):
        judge(b, "spd.solve", testing.backward_error(M_i, X_i, B_i), testing.solve_bound(sample.n, b.eps))


def check_inverse(b: Backend, sample: Sample) -> None:
    M = sample.spd(b)
    X = b.numpy(b.jit(spd.inverse)(b.array(M)))
    assert X.shape == M.shape
    np.testing.assert_array_equal(X, X.swapaxes(-1, -2))
    # B = M Z for random Z: a random B would hide the error of an explicit inverse
    Z = sample.normal(b, sample.n, 3)
    for M_i, X_i, Z_i in members(M, X, Z):
        condition = np.linalg.cond(M_i.astype(float))
        B_i = M_i @ Z_i
        judge(b, "spd.inverse", testing.backward_error(M_i, X_i @ B_i, B_i), testing.inverse_bound(condition, b.eps))


def check_inverse_root(b: Backend, sample: Sample, p: float) -> None:
    M = sample.spd(b)
    K = b.numpy(b.jit(lambda M: spd.inverse_root(M, p))(b.array(M)))
    for M_i, K_i in members(M, K):
        w, Q = np.linalg.eigh(M_i.astype(float))
        exact = (Q * w ** (-1 / p)) @ Q.T
        error = np.linalg.norm(K_i.astype(float) - exact) / np.linalg.norm(exact)
        judge(b, "spd.inverse_root", error, testing.inverse_bound(sample.n * w[-1] / w[0], b.eps))


def check_logdet(b: Backend, sample: Sample) -> None:
    M = sample.spd(b)
    computed = b.numpy(b.jit(spd.logdet)(b.array(M)))
    assert computed.shape == sample.batch
    for (M_i,), value in zip(members(M), computed.reshape(-1), strict=True):
        with mpmath.workdps(40):
            exact = float(mpmath.log(mpmath.det(mpmath.matrix(M_i.astype(float).tolist()))))
        bound = testing.logdet_bound(sample.n, np.linalg.cond(M_i.astype(float)), exact, b.eps)
        judge(b, "spd.logdet", abs(value - exact), bound)


CHECKS = [check_solve, check_inverse, check_logdet, lambda b, sample: check_inverse_root(b, sample, 4)]


@every_backend
@pytest.mark.parametrize("sample", FIXED, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=["solve", "inverse", "logdet", "inverse_root"])
def test_errors_are_within_their_bounds(b, sample, check):
    check(b, sample)


@eager_backends
@given(sample=samples)
def test_errors_are_within_their_bounds_for_random_matrices(b, sample):
    check_solve(b, sample)
    check_inverse(b, sample)
    check_inverse_root(b, sample, 2)
    if sample.n <= 8:  # mpmath takes its time
        check_logdet(b, sample)


FUNCTIONS = {
    "inverse": spd.inverse,
    "solve": lambda M: spd.solve(M, M[..., :1]),
    "logdet": spd.logdet,
    "inverse_root": lambda M: spd.inverse_root(M, 2),
}


@every_backend
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_failing_member_is_nan_and_the_others_are_not_touched(b, function):
    good = Sample(4, (6,)).spd(b)
    bad = good.copy()
    bad[1] = -bad[1]  # not definite
    bad[2, 0, 1] = np.nan  # in the triangle that LAPACK does not read
    bad[3, 3, 3] = np.inf
    bad[4] = 0
    expected = b.numpy(b.jit(function)(b.array(good)))
    computed = b.numpy(b.jit(function)(b.array(bad)))
    assert np.isnan(computed[1:5]).all()
    np.testing.assert_allclose(computed[[0, 5]], expected[[0, 5]], rtol=8 * b.eps)


@every_backend
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("entry", [-1.0, 0.0, np.nan, np.inf])
def test_a_single_failing_matrix_is_nan(b, function, entry):
    M = np.eye(5)
    M[4, 4] = entry
    assert np.isnan(b.numpy(b.jit(function)(b.array(M)))).all()


@uncompiled_backends
def test_both_triangles_count(b):
    M = np.asarray([[2.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(
        b.numpy(spd.inverse(b.array(M))), np.linalg.inv((M + M.T) / 2), rtol=testing.inverse_bound(3, b.eps)
    )


@uncompiled_backends
def test_solve_takes_vectors_and_broadcasts(b):
    M, x = Sample(3, (2,)).spd(b), np.asarray([1.0, 2.0, 3.0])
    y = b.numpy(spd.solve(b.array(M), b.array(x)))
    assert y.shape == (2, 3)
    Y = b.numpy(spd.solve(b.array(M[0]), b.array(np.ones((4, 3, 2)))))
    assert Y.shape == (4, 3, 2)
    np.testing.assert_allclose(M[0] @ Y, np.ones((4, 3, 2)), atol=testing.inverse_bound(b.eps**-0.5, b.eps))


@pytest.mark.parametrize("exponent", [-150, 150])
def test_extreme_entries_do_not_overflow(exponent):
    M = Sample(6).spd(NUMPY)
    scale = 10.0**exponent
    assert spd.logdet(scale * M) == pytest.approx(spd.logdet(M) + 6 * np.log(scale), rel=1e-12)
    np.testing.assert_allclose(spd.inverse(scale * M) * scale, spd.inverse(M), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spd.inverse(np.ones((2, 3))), r"M has shape \(2, 3\), expected \(\.\.\., n, n\)"),
        (lambda: spd.inverse(np.ones(3)), r"M has shape \(3,\)"),
        (lambda: spd.solve(np.eye(2), np.ones((3, 1))), r"X has shape \(3, 1\), expected \(\.\.\., 2, k\)"),
        (lambda: spd.solve(np.ones((2, 2, 2)), np.ones((3, 2, 1))), r"batch shape \(3,\).*\(2,\) of M"),
        (lambda: spd.inverse_root(np.eye(2), 0), "p is 0, expected a finite number > 0"),
    ],
)
def test_shape_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spd.inverse([[1.0]]), "M is a builtins.list, expected an array"),
        (lambda: spd.inverse(np.eye(2, dtype=np.int64)), "M has dtype int64, expected float32 or float64"),
        (lambda: spd.inverse(np.eye(2, dtype=np.float16)), "M has dtype float16"),
        (lambda: spd.solve(np.eye(2), np.ones((2, 1), dtype=np.float32)), "X has dtype float32, expected float64"),
        (
            lambda: spd.solve(np.eye(2), TORCH.array(np.ones((2, 1)))),
            "X is an array of .*torch, expected one of .*numpy",
        ),
    ],
)
def test_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_the_bounds_catch_a_perturbed_inverse(monkeypatch):
    inverse = spd.inverse
    monkeypatch.setattr(spd, "inverse", lambda M: inverse(M) * (1 + 3e-6))
    with pytest.raises(AssertionError):
        check_inverse(TORCH, Sample(5, decades=0.2))


def test_the_bounds_catch_a_perturbed_solve(monkeypatch):
    solve = spd.solve
    monkeypatch.setattr(spd, "solve", lambda M, X: solve(M, X) * (1 + 1e-12))
    with pytest.raises(AssertionError):
        check_solve(TORCH, Sample(5, decades=0.1))


def singular(rng, n):
    """An integer matrix of a rank below n."""
    B = rng.integers(-5, 6, (n, int(rng.integers(1, n))))
    return B @ B.T


@eager_backends
def test_exactly_singular_matrices_have_no_inverse(b):
    """Whatever sign rounding gives their last pivots."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 20, 100):
        M = np.stack([singular(rng, n) for _ in range(20)])
        assert np.isnan(b.numpy(spd.inverse(b.array(M)))).all()
        assert np.isnan(b.numpy(spd.inverse_root(b.array(M), 2))).all()
        for one in M[:5]:
            assert np.isnan(b.numpy(spd.inverse(b.array(one)))).all()
