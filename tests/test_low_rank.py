import itertools
import pickle
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from backends import (
    EAGER,
    GPU,
    JAX,
    NUMPY,
    TORCH,
    TORCH_FLOAT32,
    Backend,
    eager_backends,
    every_backend,
    uncompiled_backends,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from matrices import judge

from kfaclinalg import (
    Diagonal,
    Factors,
    LayerFactors,
    LowRankPlusDiagonal,
    _capacitance,
    _woodbury,
    low_rank,
    low_rank_inverse,
    low_rank_plus_diagonal,
    testing,
)

METHODS = ("woodbury", "sherman-morrison")
# JAX compiles anew for every shape, and outside of jit for every operation.
eager_and_jit = pytest.mark.parametrize("b", [*EAGER, JAX[-1], *GPU], ids=str)


class Case(NamedTuple):
    """How to draw U, s and d with a positive definite sum: the same for every backend but for rounding to its dtype."""

    n: int = 6
    positive: int = 2  # how many s are positive, and
    negative: int = 1  # how many are not; the two kinds are mixed in a random order
    batch: tuple[int, ...] = ()
    decades: float = 0.3  # log10 of κ, below, as a part of that of 1/eps
    seed: int = 0

    def arrays(self, b: Backend) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        members = [self._member(rng, b) for _ in range(int(np.prod(self.batch)))]
        shapes = ((self.n, self.positive + self.negative), (self.positive + self.negative,), (self.n,))
        stacks = [np.array([m[i] for m in members]).reshape(self.batch + shape) for i, shape in enumerate(shapes)]
        return tuple(x.astype(b.dtype).astype(np.float64) for x in stacks)

    def _member(self, rng, b):
        spread = b.eps ** (-self.decades / 2)
        d = rng.permutation(np.geomspace(1 / spread, 1, self.n))
        P = rng.standard_normal((self.n, self.positive)) * spread ** rng.uniform(0, 0.5)
        N = P @ rng.standard_normal((self.positive, self.negative)) + rng.standard_normal((self.n, self.negative))
        # scaled to leave I + P Pᵀ - N Nᵀ definite, by a margin of 1/spread
        whitened = np.linalg.solve(np.linalg.cholesky(np.eye(self.n) + P @ P.T), N)
        N *= np.sqrt(1 - 0.5 / spread) / np.linalg.norm(whitened, 2) if N.size else 1
        s = rng.lognormal(size=self.positive + self.negative)
        U = np.concatenate([P, N], axis=1) * np.sqrt(d)[:, None] / np.sqrt(s)
        s[self.positive :] *= -1
        order = rng.permutation(len(s))
        return U[:, order], s[order], d


def flat(b: Backend, case: Case):
    """U, s, d of each member, and its dense matrix, in extended precision."""
    U, s, d = (x.astype(np.longdouble) for x in case.arrays(b))
    for i in np.ndindex(*case.batch):
        yield U[i], s[i], d[i], (U[i] * s[i]) @ U[i].T + np.diag(d[i])


def amplification(U, s, d, M) -> float:
    """κ = (‖D‖ + ‖U |S| Uᵀ‖) max(‖M⁻¹‖, ‖D⁻¹‖): the condition number of M by what it is given as, and is inverted as.

    It is that of the dense matrix unless U S Uᵀ cancels against D or within itself, or M⁻¹ is below D⁻¹ all over.
    """
    U, s, d, M = (x.astype(float) for x in (U, s, d, M))
    given = d.max() + (np.linalg.norm((U * abs(s)) @ U.T, 2) if s.size else 0)
    return given * max(np.linalg.norm(np.linalg.inv(M), 2), 1 / d.min())


def run(b: Backend, case: Case, f, *others):
    arrays = (*case.arrays(b), *others)
    return b.numpy(b.jit(lambda U, s, d, *xs: f(LowRankPlusDiagonal(U, s, d), *xs))(*map(b.array, arrays)))


def run_on(b: Backend, fs, M: LowRankPlusDiagonal, X) -> list[np.ndarray]:
    """Each f(M, X), of one program."""
    found = b.jit(lambda U, s, d, X: [f(LowRankPlusDiagonal(U, s, d), X) for f in fs])(M.U, M.s, M.d, X)
    return [b.numpy(Y) for Y in found]


def right_hand_sides(b: Backend, case: Case) -> np.ndarray:
    """M Z for random Z, rounded: a random right-hand side would hide the error of an explicit inverse."""
    Z = np.random.default_rng(case.seed + 1).standard_normal((case.n, 3))
    B = np.array([(M @ Z).astype(float) for *_, M in flat(b, case)]).reshape(*case.batch, case.n, 3)
    return B.astype(b.dtype).astype(float)


def check_product(b: Backend, case: Case) -> None:
    X = np.random.default_rng(1).standard_normal((*case.batch, case.n, 3)).astype(b.dtype).astype(float)
    Y = run(b, case, lambda M, X: M @ X, X)
    assert Y.shape == X.shape
    for (U, s, d, M), X_i, Y_i in zip(flat(b, case), X.reshape(-1, case.n, 3), Y.reshape(-1, case.n, 3), strict=True):
        size = np.linalg.norm(U) ** 2 * np.max(abs(s), initial=0) + d.max()
        error = np.linalg.norm((Y_i - M @ X_i).astype(float)) / float(size) / np.linalg.norm(X_i)
        judge(b, "LowRankPlusDiagonal @", error, testing.solve_bound(case.n + s.size, b.eps))


def check_inverse(b: Backend, case: Case, method: str) -> None:
    B = right_hand_sides(b, case)
    X = run(b, case, lambda M, B: M.inverse(method).to_dense(), B)
    X = X.reshape(-1, case.n, case.n)
    for member, X_i, B_i in zip(flat(b, case), X, B.reshape(-1, case.n, 3), strict=True):
        error = testing.backward_error(member[-1], X_i @ B_i, B_i)
        judge(b, f"LowRank.inverse {method}", error, testing.inverse_bound(amplification(*member), b.eps))


def check_solve(b: Backend, case: Case) -> None:
    B = right_hand_sides(b, case)
    X = run(b, case, lambda M, B: M.solve(B), B)
    assert X.shape == B.shape
    for member, X_i, B_i in zip(flat(b, case), X.reshape(-1, case.n, 3), B.reshape(-1, case.n, 3), strict=True):
        U, s, d, M = member
        size = np.linalg.norm(((U * abs(s)) @ U.T + np.diag(d)).astype(float))
        error = np.linalg.norm((B_i - M @ X_i).astype(float)) / (size * np.linalg.norm(X_i) + np.linalg.norm(B_i))
        judge(b, "LowRankPlusDiagonal.solve", error, testing.solve_bound(case.n + s.size, b.eps))


def check_logdet(b: Backend, case: Case) -> None:
    computed = run(b, case, lambda M: M.logdet())
    assert computed.shape == case.batch
    for (U, s, d, M), value in zip(flat(b, case), computed.reshape(-1), strict=True):
        with mpmath.workdps(40):
            mp = np.vectorize(mpmath.mpf, otypes=[object])
            U_mp, s_mp, d_mp = (mp(x.astype(float)) if x.size else x.astype(object) for x in (U, s, d))
            dense = (U_mp * s_mp) @ U_mp.T + np.diag(d_mp)
            exact = float(mpmath.log(mpmath.det(mpmath.matrix(dense.tolist()))))
        bound = testing.logdet_bound(case.n, amplification(U, s, d, M), exact, b.eps)
        judge(b, "LowRankPlusDiagonal.logdet", abs(value - exact), bound)


CHECKS = {
    "product": check_product,
    "woodbury": lambda b, case: check_inverse(b, case, "woodbury"),
    "sherman-morrison": lambda b, case: check_inverse(b, case, "sherman-morrison"),
    "solve": check_solve,
    "logdet": check_logdet,
}
EDGES = [Case(1, 1, 0), Case(3, 0, 0, (2,)), Case(4, 0, 3, (3,)), Case(5, 4, 4, (2, 2), 0.5), Case(3, 2, 1, (0,))]
FEW = [Case(), Case(3, 0, 0), Case(4, 1, 1, (2,))]


@every_backend
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_errors_are_within_their_bounds_everywhere(b, case, check):
    check(b, case)


@eager_backends
@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_errors_are_within_their_bounds(b, case, check):
    check(b, case)


@eager_backends
@given(
    case=st.builds(
        Case,
        n=st.integers(1, 12),
        positive=st.integers(0, 8),
        negative=st.integers(0, 8),
        batch=st.sampled_from([(), (3,), (0,)]),
        decades=st.floats(0, 0.6),
        seed=st.integers(0, 2**16),
    )
)
def test_errors_are_within_their_bounds_for_random_cases(b, case):
    # the premise of `solve`, and of "definite to working precision"
    assume(all(amplification(*member) < b.eps**-0.7 for member in flat(b, case)))
    for name, check in CHECKS.items():
        if name != "logdet" or case.n <= 6:  # mpmath takes its time
            check(b, case)


@eager_backends
@pytest.mark.parametrize("signs", sorted(set(itertools.permutations([1, 1, -1, -1, 0]))), ids=str)
def test_the_signs_may_come_in_any_order(b, signs):
    """A column with s = 0, and one that repeats another, are among them."""
    U = np.random.default_rng(0).standard_normal((4, 5)).astype(b.dtype).astype(float)
    U[:, 3] = U[:, 0]
    s = np.asarray([{1: 2.0, -1: -0.0625, 0: 0.0}[sign] for sign in signs])
    dense = (U * s) @ U.T + 2 * np.eye(4)
    assert np.linalg.eigvalsh(dense)[0] > 0.1  # the premise
    M = LowRankPlusDiagonal(b.array(U), b.array(s), b.array(np.full(4, 2.0)))
    bound = testing.inverse_bound(np.linalg.cond(dense), b.eps)
    for method in METHODS:
        X = b.numpy(M.inverse(method).to_dense())
        judge(b, f"LowRank.inverse {method}", testing.backward_error(dense, X @ dense, dense), bound)


def test_the_negative_first_would_pass_through_an_indefinite_matrix():
    """1 - 2 + 4 > 0, but 1 - 2 < 0: the order of the recursion is not the order of the columns."""
    M = LowRankPlusDiagonal(np.ones((1, 2)), np.asarray([-2.0, 4.0]), np.ones(1))
    for method in METHODS:
        np.testing.assert_allclose(M.inverse(method).to_dense(), [[1 / 3]], rtol=1e-14)


@eager_and_jit
def test_without_u_it_is_division(b):
    d, X = np.asarray([0.5, 2.0, 3.0]), np.ones((3, 2))
    for M in (
        LowRankPlusDiagonal(b.array(np.zeros((3, 2))), b.array([3.0, -4.0]), b.array(d)),
        LowRankPlusDiagonal(b.array(np.zeros((3, 0))), b.array(np.zeros(0)), b.array(d)),
        Diagonal(b.array(d)),
    ):
        found = b.jit(lambda M, X: (M.inverse() @ X, M.solve(X), M.inverse().to_dense(), M.logdet()))(M, b.array(X))
        for Y, expected in zip(found, (X / d[:, None], X / d[:, None], np.diag(1 / d), np.log(3)), strict=True):
            np.testing.assert_allclose(b.numpy(Y), expected, rtol=testing.C * b.eps)


@eager_backends
def test_the_inverse_of_the_inverse(b):
    case = Case(decades=0.2)
    twice = run(b, case, lambda M: M.inverse().inverse().to_dense())
    ((*arrays, M),) = flat(b, case)
    bound = testing.inverse_bound(2 * amplification(*arrays, M), b.eps)
    judge(
        b,
        "LowRank.inverse twice",
        float(np.linalg.norm((twice - M).astype(float)) / np.linalg.norm(M.astype(float))),
        bound,
    )


@eager_and_jit
def test_trace_diagonal_and_dense(b):
    case = Case(batch=(2,))
    dense = np.array([M.astype(float) for *_, M in flat(b, case)])
    size = np.abs(dense).max()
    bound = testing.solve_bound(case.n + 3, b.eps) * size
    np.testing.assert_allclose(
        run(b, case, lambda M: M.trace()), np.trace(dense, axis1=1, axis2=2), atol=case.n * bound
    )
    np.testing.assert_allclose(run(b, case, lambda M: M.diagonal()), np.diagonal(dense, axis1=1, axis2=2), atol=bound)
    X = run(b, case, lambda M: M.to_dense())
    np.testing.assert_allclose(X, dense, atol=bound)
    np.testing.assert_array_equal(X, X.swapaxes(-1, -2))


@uncompiled_backends
def test_diagonal(b):
    d, X = np.asarray([[0.5, 2.0, 4.0], [1.0, 2.0, 8.0]]), np.random.default_rng(0).standard_normal((2, 3, 2))
    D, X = Diagonal(b.array(d)), b.array(X)
    np.testing.assert_array_equal(b.numpy(D @ X), d[..., None] * b.numpy(X))
    np.testing.assert_array_equal(b.numpy(D.solve(X)), b.numpy(X) / d[..., None])
    np.testing.assert_array_equal(b.numpy(D.to_dense()), d[..., None] * np.eye(3))
    np.testing.assert_array_equal(b.numpy(D.trace()), d.sum(axis=-1))
    np.testing.assert_array_equal(b.numpy(D.diagonal()), d)
    np.testing.assert_allclose(b.numpy(D.logdet()), np.log(d.prod(axis=-1)), rtol=testing.C * b.eps)


def test_a_product_in_the_place_of_a_quotient_is_caught(monkeypatch):
    monkeypatch.setattr(Diagonal, "solve", Diagonal.__matmul__)
    with pytest.raises(AssertionError):
        test_diagonal(NUMPY)


SPOILED = {
    "d is zero": lambda U, s, d: (U, s, d * [1, 0, 1]),
    "d is negative": lambda U, s, d: (U, s, d * [1, -1, 1]),
    "s is too negative": lambda U, s, d: (U, -4 * abs(s), d),
    "NaN in U": lambda U, s, d: (U * [[1, 1], [np.nan, 1], [1, 1]], s, d),
    "infinity in U": lambda U, s, d: (np.where(np.eye(3, 2) > 0, np.inf, U), s, d),
    "NaN in s": lambda U, s, d: (U, s * [1, np.nan], d),
    "infinity in s, and its column is zero": lambda U, s, d: (U * [1, 0], s * [1, np.inf], d),
    "NaN in d": lambda U, s, d: (U, s, d * [1, 1, np.nan]),
    "infinity in d": lambda U, s, d: (U, s, d * [1, 1, np.inf]),
    "singular": lambda U, s, d: (np.eye(3)[:, :2], np.asarray([-1.0, 1.0]), np.ones(3)),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@eager_and_jit
def test_a_failing_member_is_nan_as_a_whole_and_the_others_are_not_touched(b):
    good = Case(3, 1, 1).arrays(b)
    members = [good, *(spoil(*good) for spoil in SPOILED.values()), good]
    M, one = (LowRankPlusDiagonal(*(b.array(np.stack(x)) for x in zip(*m, strict=True))) for m in (members, [good]))
    X = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)  # zeros do not hide it
    for computed, expected in zip(*(run_on(b, OUTPUTS, operator, b.array(X)) for operator in (M, one)), strict=True):
        for i, name in enumerate(SPOILED, start=1):
            assert np.isnan(computed[i]).all(), name
        for i in (0, -1):
            np.testing.assert_allclose(computed[i], expected[0], rtol=1e3 * b.eps, atol=1e3 * b.eps)


OUTPUTS = [
    lambda M, X: M.inverse() @ X,
    lambda M, X: M.inverse("sherman-morrison") @ X,
    lambda M, X: M.inverse().to_dense(),
    lambda M, X: M.inverse().trace(),
    lambda M, X: M.solve(X),
    lambda M, X: M.logdet(),
]


# Plain products follow IEEE: an infinity in U is met by the zeros with which a BLAS fills up its blocks.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@eager_backends
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_single_failing_matrix_is_nan(b, spoil):
    M = LowRankPlusDiagonal(*map(b.array, spoil(*Case(3, 1, 1).arrays(b))))
    for f in OUTPUTS:
        assert np.isnan(b.numpy(f(M, b.array(np.eye(3))))).all()


@uncompiled_backends
@pytest.mark.parametrize("entry", [0.0, -1.0, np.nan, np.inf])
def test_a_failing_member_of_a_diagonal_is_nan(b, entry):
    D = Diagonal(b.array([[1.0, 2.0], [entry, 2.0]]))
    X = b.array(np.eye(2))
    for Y in (D.inverse() @ X, D.solve(X), D.logdet()):
        assert np.isfinite(b.numpy(Y)[0]).all()
        assert np.isnan(b.numpy(Y)[1]).all()


@pytest.mark.parametrize("b", [TORCH, TORCH_FLOAT32], ids=str)
@pytest.mark.parametrize("n", [1, 3, 100, 2000])
def test_a_matrix_that_is_singular_up_to_rounding_is_nan(b, n):
    """I - v vᵀ with ‖v‖ = 1, and I + p pᵀ - v vᵀ with v scaled likewise: the sign of the pivot is noise."""
    rng = np.random.default_rng(n)
    p, v = rng.standard_normal((2, 50, n, 1)).astype(np.longdouble)
    p *= 30 / np.linalg.norm(p, axis=-2, keepdims=True)
    ones = np.ones((50, n))
    alone = v / np.linalg.norm(v, axis=-2, keepdims=True)
    solved = v.mT @ v - (p.mT @ v) ** 2 / (1 + p.mT @ p)
    both = np.concatenate([p, v / np.sqrt(solved)], axis=-1)
    for U, s in ((alone, [-1.0]), (both, [1.0, -1.0])):
        M = LowRankPlusDiagonal(b.array(U), b.array(s), b.array(ones))
        for method in METHODS:
            assert np.isnan(b.numpy(M.inverse(method).d)).all()
        assert np.isnan(b.numpy(M.logdet())).all()


def test_a_diagonal_too_small_to_invert_with_is_nan():
    """M = 1, but 1e20 - 1e20 has no digit of its inverse: never a wrong finite number."""
    M = LowRankPlusDiagonal(np.ones((1, 1)), np.ones(1), np.full(1, 1e-20))
    assert np.isnan(M.solve(np.ones((1, 1)))).all()
    assert M.logdet() == pytest.approx(0, abs=1e-14)


@eager_and_jit
def test_batches_broadcast(b):
    U, s, d = Case(3, 1, 1).arrays(b)
    M = LowRankPlusDiagonal(b.array(np.stack([U, 0.5 * U])[:, None]), b.array(s), b.array(np.stack([d] * 4) * 2))
    X, dense = np.ones((5, 1, 1, 3, 2)), (0.25 * U * s) @ U.T + np.diag(2 * d)
    solved = np.linalg.solve(dense, X[0, 0, 0])
    for f, expected in (
        (lambda M, X: M @ X, dense @ X[0, 0, 0]),
        (lambda M, X: M.inverse() @ X, solved),
        (lambda M, X: M.inverse("sherman-morrison") @ X, solved),
        (lambda M, X: M.solve(X), solved),
    ):
        (Y,) = run_on(b, [f], M, b.array(X))
        assert Y.shape == (5, 2, 4, 3, 2)
        np.testing.assert_allclose(Y[2, 1, 3], expected, rtol=b.eps**0.5)
    scalars = run_on(b, [lambda M, X: M.logdet(), lambda M, X: M.trace()], M, b.array(X))
    assert [x.shape for x in scalars] == [(2, 4)] * 2
    matrices = run_on(b, [lambda M, X: M.to_dense(), lambda M, X: M.inverse().to_dense()], M, b.array(X))
    assert [x.shape for x in matrices] == [(2, 4, 3, 3)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_x_is_computed_in_the_operators_dtype(dtype):
    M = LowRankPlusDiagonal(*map(TORCH.array, Case().arrays(TORCH)))
    X = torch.arange(12).reshape(6, 2).to(dtype)
    for f in (lambda X: M @ X, M.solve, lambda X: Diagonal(M.d) @ X, Diagonal(M.d).solve):
        assert f(X).dtype == dtype
        torch.testing.assert_close(f(X), f(X.double()).to(dtype), rtol=0, atol=0)


def test_values_travel():
    M = pickle.loads(pickle.dumps(LowRankPlusDiagonal(np.ones((3, 2)), np.ones(2), np.ones(3))))
    assert repr(M) == "LowRankPlusDiagonal(U: (3, 2), s: (2,), d: (3,), float64, cpu)"
    assert repr(Diagonal(np.ones(3))) == "Diagonal(d: (3,), float64, cpu)"
    assert M.shape == Diagonal(np.ones(3)).shape == (3, 3)
    assert M.trace() == 9
    with pytest.raises(TypeError):
        np.eye(3) @ M


def operator():
    return LowRankPlusDiagonal(np.ones((3, 2)), np.ones(2), np.ones(3))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda: Diagonal(np.asarray(1.0)), r"d has shape \(\), expected \(\.\.\., n\)"),
        (ValueError, lambda: LowRankPlusDiagonal(*np.ones((3, 2))), r"U has shape \(2,\), expected \(\.\.\., n, k\)"),
        (
            ValueError,
            lambda: LowRankPlusDiagonal(np.ones((3, 2)), np.ones(3), np.ones(3)),
            r"s has shape \(3,\), expected \(\.\.\., 2\)",
        ),
        (
            ValueError,
            lambda: LowRankPlusDiagonal(np.ones((3, 2)), np.ones(2), np.ones(2)),
            r"d has shape \(2,\), expected \(\.\.\., 3\)",
        ),
        (
            ValueError,
            lambda: LowRankPlusDiagonal(np.ones((4, 3, 2)), np.ones((5, 2)), np.ones(3)),
            r"s has batch shape \(5,\), which does not broadcast with \(4,\) of U",
        ),
        (ValueError, lambda: operator() @ np.ones((2, 1)), r"X has shape \(2, 1\), expected \(\.\.\., 3, r\)"),
        (ValueError, lambda: operator().solve(np.ones(3)), r"X has shape \(3,\), expected"),
        (
            ValueError,
            lambda: operator().inverse("lu"),
            "method is 'lu', expected one of 'woodbury', 'sherman-morrison'",
        ),
        (ValueError, lambda: Diagonal(np.ones((2, 3))) @ np.ones((4, 3, 1)), r"X has batch shape \(4,\)"),
        (TypeError, lambda: Diagonal([1.0]), "d is a builtins.list, expected an array"),
        (TypeError, lambda: operator() @ np.ones((3, 1), dtype=np.float32), "X has dtype float32, expected float64"),
        (TypeError, lambda: operator() @ torch.ones(3, 1), r"X is an array of .*torch, expected one of .*numpy"),
        (
            TypeError,
            lambda: LowRankPlusDiagonal(np.ones((3, 2)), np.ones(2, dtype=np.float32), np.ones(3)),
            "s has dtype float32, expected float64, the dtype of U",
        ),
        (ValueError, lambda: low_rank(np.eye(3), 4), "rank is 4, expected an integer from 0 to 3"),
        (ValueError, lambda: low_rank(np.eye(3), -1), "rank is -1, expected an integer from 0 to 3"),
        (ValueError, lambda: low_rank(np.eye(3), 1.5), "rank is 1.5, expected an integer"),
        (ValueError, lambda: low_rank(np.ones((2, 3)), 1), r"M has shape \(2, 3\), expected \(\.\.\., n, n\)"),
        (ValueError, lambda: low_rank(np.eye(3), 1, iterations=-1), "iterations is -1, expected an integer >= 0"),
        (
            ValueError,
            lambda: low_rank_plus_diagonal(np.eye(3), 1, start=operator()),
            r"start has shape \(3, 2\), expected \(\.\.\., 3, 1\)",
        ),
        (TypeError, lambda: low_rank(np.eye(3), 1, start=np.eye(3)), "start is a numpy.ndarray, expected LowRankPlusD"),
        (TypeError, lambda: low_rank(torch.eye(3), 2, start=operator()), "start is an array of .*numpy"),
    ],
)
def test_mistakes_are_refused(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_gradients_pass_through():
    U, s, d = (TORCH.array(x).requires_grad_() for x in Case(4, 1, 1, decades=0.05).arrays(TORCH))
    X = torch.ones((4, 3), dtype=torch.float64, requires_grad=True)
    for method in METHODS:
        assert torch.autograd.gradcheck(
            lambda U, s, d, X, method=method: LowRankPlusDiagonal(U, s, d).inverse(method) @ X, (U, s, d, X)
        )
    assert torch.autograd.gradcheck(lambda U, s, d, X: LowRankPlusDiagonal(U, s, d).solve(X), (U, s, d, X))


@pytest.mark.parametrize("check", [c for name, c in CHECKS.items() if name != "product"])
def test_the_bounds_catch_a_perturbed_factorisation(monkeypatch, check):
    factorise = _woodbury.factorise

    def perturbed(*arguments):
        d, T, J, logdet = factorise(*arguments)
        return _woodbury.Factorisation(d, T * (1 + 1e-6), J, logdet + 1e-6)

    monkeypatch.setattr(_woodbury, "factorise", perturbed)
    monkeypatch.setattr(_capacitance, "REFINEMENTS", 0)
    with pytest.raises(AssertionError):
        check(TORCH, Case(decades=0.1))


@pytest.mark.parametrize("batch", [(), (10,)])  # a single one of NumPy takes LAPACK's way
def test_the_bounds_catch_a_solve_that_is_not_refined(monkeypatch, batch):
    case = Case(6, 5, 0, batch, 0.6, seed=1)
    check_solve(NUMPY, case)
    monkeypatch.setattr(_capacitance, "REFINEMENTS", 0)
    with pytest.raises(AssertionError):
        check_solve(NUMPY, case)


@pytest.mark.parametrize(("spread", "known"), [(1e4, True), (1e13, True), (1e18, False)])
def test_a_solve_without_the_inverse_fails_where_the_inverse_does(spread, known):
    M = LowRankPlusDiagonal(np.full((2, 1), 1.0), np.asarray([spread]), np.asarray([1.0, 1e20]))
    X = np.ones((2, 1))
    for Y in (M.solve(X), M.inverse() @ X):
        assert np.isfinite(Y).all() == known


def test_as_scipy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4)
    for op in (Diagonal(np.arange(1.0, 5)), LowRankPlusDiagonal(rng.standard_normal((4, 2)), np.ones(2), np.ones(4))):
        np.testing.assert_allclose(op.as_scipy() @ x, op.to_dense() @ x, rtol=1e-13)


@pytest.mark.parametrize("method", ["woodbury", "sherman-morrison"])
@pytest.mark.parametrize(
    "shapes",
    [((5, 2), (3, 2), (5,)), ((5, 2), (2,), (3, 5)), ((3, 5, 2), (2,), (5,)), ((5, 2), (3, 2), (4, 1, 5))],
    ids=str,
)
def test_parts_may_have_batches_of_their_own(shapes, method):
    U, s, d = (np.abs(np.random.default_rng(0).standard_normal(shape)) for shape in shapes)
    M = LowRankPlusDiagonal(U, s, d)
    dense = (U * s[..., None, :]) @ U.mT + d[..., None] * np.eye(5)
    X = np.ones((5, 1))
    np.testing.assert_allclose(M.inverse(method).to_dense(), np.linalg.inv(dense), atol=1e-12)
    np.testing.assert_allclose(M.solve(X), np.linalg.inv(dense) @ X, atol=1e-12)
    np.testing.assert_allclose(M.logdet(), np.linalg.slogdet(dense)[1], atol=1e-12)


def test_a_batch_of_gammas():
    factors = Factors((LayerFactors(np.diag([3.0, 2.0, 1.0]), np.diag([2.0, 1.0])),))
    gammas = np.asarray([0.1, 0.2, 0.3])
    all_at_once = low_rank_inverse(factors, gammas, rank=1).blocks[0].to_dense()
    for gamma, dense in zip(gammas, all_at_once, strict=True):
        np.testing.assert_allclose(dense, low_rank_inverse(factors, float(gamma), rank=1).blocks[0].to_dense())
