"""Nothing there, one entry, nearly singular, nearly out of range: the right result, or NaN for the whole member."""

from dataclasses import dataclass

import numpy as np
import pytest
from backends import NUMPY, STRICT, TORCH_FLOAT32, Backend
from hypothesis import given
from hypothesis import strategies as st
from matrices import Sample, judge

from kfaclinalg import (
    BlockDiagonal,
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerBasis,
    KroneckerEigen,
    KroneckerPair,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    factored_tikhonov,
    fit_quadratic,
    low_rank,
    low_rank_plus_diagonal,
    spd,
    testing,
    tikhonov_pi,
)  # fmt: skip
from kfaclinalg.damping import NORMS


@dataclass
class Make:
    """Multiples of I and of ones, for the backend and the batch; x stands for a multiple of a side, p or q."""

    b: Backend
    batch: tuple[int, ...]
    n: int
    m: int
    p: float = 1.0
    q: float = 1.0

    def eye(self, k, x):
        return self.b.array(x * np.tile(np.eye(k), (*self.batch, 1, 1)))

    def full(self, x, *shape):
        return self.b.array(np.full((*self.batch, *shape), x))

    def block(self):
        return Kronecker(self.eye(self.n, 2 * self.p), self.eye(self.m, 3 * self.q))

    def factors(self):
        layer = LayerFactors(self.eye(self.n, 2 * self.p), self.eye(self.m, 3 * self.q))
        return Factors((layer, layer), (Link(self.eye(self.n, 0.0), self.eye(self.m, 0.0)),))


# 6 p q I in as many ways, p on the side of n and q on that of m
OPERATORS = {
    "Kronecker": Make.block,
    "Kronecker, structured": lambda of: Kronecker(
        Diagonal(of.full(2 * of.p, of.n)),
        LowRankPlusDiagonal(of.eye(of.m, 1.0), of.full(of.q, of.m), of.full(2 * of.q, of.m)),
    ),
    "KroneckerBasis": lambda of: KroneckerBasis(
        of.eye(of.n, 2 * of.p), of.eye(of.m, of.q), of.full(1.5 / (of.p * of.q), of.m, of.n)
    ),
    "KroneckerEigen": lambda of: KroneckerEigen(
        of.eye(of.n, 1.0), of.eye(of.m, 1.0), of.full(6 * of.p * of.q, of.m, of.n)
    ),
    "KroneckerPair": lambda of: KroneckerPair(
        of.eye(of.n, 2 * of.p), of.eye(of.m, 2 * of.q), of.eye(of.n, 4 * of.q), of.eye(of.m, 0.5 * of.p)
    ),
    "CholeskyInverse": lambda of: CholeskyInverse(of.eye(of.n, (6 * of.p * of.q) ** -0.5)),
    "Diagonal": lambda of: Diagonal(of.full(6 * of.p * of.q, of.n)),
    "LowRankPlusDiagonal": lambda of: LowRankPlusDiagonal(
        of.eye(of.n, of.p), of.full(2 * of.q / of.p, of.n), of.full(4 * of.p * of.q, of.n)
    ),
    "BlockDiagonal": lambda of: BlockDiagonal((of.block(), of.block())),
}
INVERSES = {
    "block_diagonal_inverse": lambda of: block_diagonal_inverse(of.factors(), 0.0),
    "block_tridiagonal_inverse": lambda of: block_tridiagonal_inverse(of.factors(), 0.0),
    "exactly_damped_inverse": lambda of: exactly_damped_inverse(of.factors(), 0.0),
}
METHODS = {  # the call, and the multiple of X that it gives
    "@": (lambda M, X: M @ X, lambda c: c),
    "solve": (lambda M, X: M.solve(X), lambda c: 1 / c),
    "inverse": (lambda M, X: M.inverse() @ X, lambda c: 1 / c),
    "sherman-morrison": (lambda M, X: M.inverse("sherman-morrison") @ X, lambda c: 1 / c),
    "smith": (lambda M, X: M.solve(X, method="smith"), lambda c: 1 / c),
    "inverse_root": (lambda M, X: M.inverse_root(2) @ X, lambda c: c**-0.5),
    "shifted_inverse": (lambda M, X: M.shifted_inverse(3.0) @ X, lambda c: 1 / (c + 3)),
}
ONLY = {"sherman-morrison": LowRankPlusDiagonal, "smith": KroneckerPair, "shifted_inverse": Kronecker}


def applicable(M):
    """The methods of METHODS that M has."""
    for name, (f, multiple) in METHODS.items():
        if isinstance(M, ONLY[name]) if name in ONLY else name == "@" or hasattr(M, name):
            yield name, f, multiple


def operand(of: Make, M):
    """Ones for M to act on, a tuple of them or not, and the dimension of their space."""
    blocks = getattr(M, "blocks", None) or getattr(M, "Lambda", ())
    if isinstance(M, CholeskyInverse | Diagonal | LowRankPlusDiagonal):
        return of.full(1.0, of.n, 2), of.n
    X = of.full(1.0, of.m, of.n)
    return ((X,) * len(blocks), len(blocks) * of.m * of.n) if blocks else (X, of.m * of.n)


def tuples(X):
    return X if isinstance(X, tuple) else (X,)


# In float64, in float32, and in the strict namespace; the routines themselves are tested on all.
THREE = [NUMPY, TORCH_FLOAT32, STRICT[0]]
three_backends = pytest.mark.parametrize("b", THREE, ids=str)
BATCHES = [(), (0,), (3,)]
SIZES = [(1, 1), (1, 3), (3, 1), (0, 2), (2, 0), (0, 0)]
every_size = pytest.mark.parametrize(
    ("b", "batches", "size"), [(b, BATCHES, size) for b in THREE for size in SIZES], ids=str
)


@every_size
@pytest.mark.parametrize("name", OPERATORS | INVERSES)
def test_every_operator_at_every_size(b, batches, size, name):
    """The logarithm of the determinant of nothing is 0, its trace is 0, its matrix is 0 x 0."""
    for batch in batches:
        of, c = Make(b, batch, *size), 1 / 6 if name in INVERSES else 6
        M = (OPERATORS | INVERSES)[name](of)
        X, dim = operand(of, M)
        for method, f, multiple in applicable(M):
            for Y, X_i in zip(tuples(f(M, X)), tuples(X), strict=True):
                assert Y.shape == X_i.shape, method
                np.testing.assert_allclose(b.numpy(Y), multiple(c), rtol=100 * b.eps, err_msg=method)
        dense = np.broadcast_to(c * np.eye(dim), (*batch, dim, dim))
        np.testing.assert_allclose(b.numpy(M.to_dense()), dense, rtol=100 * b.eps, strict=True)
        for method, value in {"logdet": dim * np.log(c), "trace": dim * c}.items():
            if hasattr(M, method):
                expected = np.full(batch, float(value))
                np.testing.assert_allclose(b.numpy(getattr(M, method)()), expected, rtol=100 * b.eps, strict=True)
        if hasattr(M, "diagonal"):
            assert sum(int(np.prod(d.shape[len(batch) :])) for d in tuples(M.diagonal())) == dim


FUNCTIONS = {  # of 4 I (n, n): the multiple of I that it is, or the scalar
    "inverse": (spd.inverse, 0.25),
    "newton_schulz_inverse": (spd.newton_schulz_inverse, 0.25),
    "newton_schulz_inverse, warm": (lambda M: spd.newton_schulz_inverse(M, M), 0.25),
    "inverse_root": (lambda M: spd.inverse_root(M, 2), 0.5),
    "solve": (lambda M: spd.solve(M, M), 1.0),
    "low_rank": (lambda M: low_rank(M, M.shape[-1]).to_dense(), 4.0),
    "low_rank, rank 0": (lambda M: low_rank(M, 0).to_dense(), 0.0),
    "low_rank_plus_diagonal": (lambda M: low_rank_plus_diagonal(M, M.shape[-1]).to_dense(), 4.0),
    "factored_tikhonov": (lambda M: factored_tikhonov(LayerFactors(M, M), 0.5).A, 4.5),
    "batch_factors": (lambda M: batch_factors([M], [M]).layers[0].G * M.shape[-1], 16.0),
    **{f"pi, {norm}": (lambda M, norm=norm: tikhonov_pi(LayerFactors(M, M), norm=norm), lambda n: 1) for norm in NORMS},
    "logdet": (spd.logdet, lambda n: n * np.log(4)),
    "fit_quadratic": (lambda M: fit_quadratic(M, M, low_rank_plus_diagonal(M, 0).d, 1.0).change, lambda n: -n),
}


@every_size
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_at_every_size(b, batches, size, name):
    (f, value), n = FUNCTIONS[name], size[0]
    for batch in batches if n or name != "batch_factors" else ():  # N = 0 is refused
        computed = b.numpy(f(b.array(np.tile(4 * np.eye(n), (*batch, 1, 1)))))
        expected = np.full(batch, value(n)) if callable(value) else np.tile(value * np.eye(n), (*batch, 1, 1))
        assert computed.shape == expected.shape
        np.testing.assert_allclose(computed, expected, rtol=100 * b.eps, atol=100 * b.eps)


@three_backends
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)], ids=str)
@pytest.mark.parametrize("name", OPERATORS | INVERSES)
def test_entries_near_the_ends_of_the_range(b, signs, name):
    """1e±150 in float64 and 1e±17 in float32 on either side: what is representable is right."""
    p, q = (10.0 ** (sign * {"float64": 150, "float32": 17}[b.dtype]) for sign in signs)
    of, c = Make(b, (), 3, 2, p, q), 1 / (6 * p * q) if name in INVERSES else 6 * p * q
    M = (OPERATORS | INVERSES)[name](of)
    X, _ = operand(of, M)
    for method, f, multiple in applicable(M):
        if method == "smith":  # it measures its error by norms, which may overflow: NaN then
            with np.errstate(over="ignore", invalid="ignore"):
                Y = b.numpy(f(M, X))
            assert np.isnan(Y).all() or np.allclose(Y, multiple(c), rtol=100 * b.eps, atol=0)
        elif method != "shifted_inverse":
            for Y in tuples(f(M, X)):
                np.testing.assert_allclose(b.numpy(Y), multiple(c), rtol=100 * b.eps, err_msg=method)
    of = Make(b, (), 50, 50, p, q)  # the determinant itself is 10^750000
    M = (OPERATORS | INVERSES)[name](of)
    dim = operand(of, M)[1]
    size = dim * (abs(np.log(p)) + abs(np.log(q)) + np.log(6))  # of what is added up
    exact = dim * np.log(c)
    bound = min(testing.logdet_bound(50, 1.0, size, b.eps), testing.logdet_bound(dim, 1.0, exact, b.eps))
    assert abs(b.numpy(M.logdet()).item() - exact) <= bound


def test_plain_products_overflow_as_ieee_does():
    with np.errstate(over="ignore"):
        assert (Kronecker(1e200 * np.eye(2), 1e200 * np.eye(1)) @ np.ones((1, 2)) == np.inf).all()
        assert np.isnan(Kronecker(1e200 * np.eye(2), 1e200 * np.eye(1)).shifted_inverse(1.0) @ np.ones((1, 2))).all()


@three_backends
def test_zero_is_solved_by_zero(b):
    P = KroneckerPair(*(b.array(np.eye(2)),) * 2, b.array(0.5 * np.eye(2)), b.array(np.eye(2)))
    V = np.stack([np.zeros((2, 2)), np.ones((2, 2))])
    for method in ("eigh", "smith"):
        np.testing.assert_allclose(b.numpy(P.solve(b.array(V), method=method)), V / 1.5, rtol=100 * b.eps)


@three_backends
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_infinity_in_a_basis_is_nan(b, place):
    """1 / infinity = 0 would be finite."""
    arrays = [np.eye(2), np.eye(2), np.ones((2, 2))]
    arrays[place][0, 0] = np.inf
    P = KroneckerBasis(*map(b.array, arrays))
    for Y in (P.inverse() @ b.array(np.ones((2, 2))), P.solve(b.array(np.ones((2, 2)))), P.logdet()):
        assert np.isnan(b.numpy(Y)).all()


SOLVERS = {  # of M ⊗ N and V: the call, and the bound of its backward error
    "solve": (lambda P, V: P.solve(V), lambda n, condition, eps: testing.solve_bound(n, eps)),
    "inverse": (lambda P, V: P.inverse() @ V, lambda n, condition, eps: testing.inverse_bound(condition, eps)),
    "shifted_inverse": (
        lambda P, V: P.shifted_inverse(0.0) @ V,
        lambda n, condition, eps: testing.inverse_bound(condition, eps),
    ),
    "pair": (
        lambda P, V: KroneckerPair(P.A, P.B, 0 * P.A, P.B).solve(V),
        lambda n, condition, eps: testing.inverse_bound(condition, eps),
    ),
}


@three_backends
@given(
    n=st.integers(1, 5), kind=st.sampled_from(testing.SPECTRA), decades=st.floats(0.6, 1), seed=st.integers(0, 2**16)
)
def test_nearly_singular_is_within_the_bound_or_nan(b, n, kind, decades, seed):
    """Up to a condition number of 1/eps; V = M X for random X, rounded."""
    A, B = Sample(n, (), kind, decades, seed).spd(b), Sample(2, (), "geometric", 0.05, seed).spd(b)
    dense, condition = testing.dense_kronecker(A, B), np.linalg.cond(A) * np.linalg.cond(B)
    v = (dense @ np.random.default_rng(seed).standard_normal(2 * n)).astype(b.dtype).astype(float)
    for name, (f, bound) in SOLVERS.items():
        U = b.numpy(f(Kronecker(b.array(A), b.array(B)), b.array(testing.unvec(v, (2, n)))))
        if not np.isnan(U).all():
            error = testing.backward_error(dense, testing.vec(U), v)
            judge(b, f"nearly singular, {name}", error, bound(n + 2, condition, b.eps))
