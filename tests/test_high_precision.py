"""float64 itself against 40 digits, on small ill-conditioned matrices: one reference, mpmath, for every operator."""

from itertools import pairwise

import mpmath
import numpy as np
import pytest
from backends import NUMPY, TORCH
from matrices import judge

from kfaclinalg import (
    BlockDiagonal,
    CholeskyInverse,
    Diagonal,
    Factors,
    Kronecker,
    KroneckerPair,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
    block_tridiagonal_inverse,
    fit_quadratic,
    spd,
    testing,
)

precise = pytest.mark.parametrize("b", [NUMPY, TORCH], ids=str)
conditions = pytest.mark.parametrize("condition", [1e8, 1e12])
mp = np.vectorize(mpmath.mpf, otypes=[object])


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(40):
        yield


def matrix(x):
    return mpmath.matrix(np.asarray(x).tolist())


def array(X):
    return np.asarray(X.tolist(), dtype=object).reshape(X.rows, X.cols)


def inverse(M):
    return array(matrix(M) ** -1)


def logdet(M):
    return mpmath.log(mpmath.det(matrix(M)))


def condition_of(M) -> float:
    """That in the Frobenius norm over n, which is no more than that in the spectral norm."""
    return float(mpmath.norm(matrix(M)) * mpmath.norm(matrix(inverse(M)))) / len(M)


def ill(n, condition, seed=0):
    return testing.spd_matrix(testing.spectrum("geometric", n, condition=condition), np.random.default_rng(seed))


def same(b, name, computed, exact, bound):
    """Norm-wise, relative to the exact result."""
    error = mpmath.norm(matrix(mp(b.numpy(computed)) - exact)) / mpmath.norm(matrix(exact))
    judge(b, f"{name}, 40 digits", float(error), bound)


def check(b, name, M, V, *, solve=None, inverse_=None, logdet_=None, kappa=None):
    """Each of what is given against the dense matrix M of 40 digits; V holds the right-hand side as columns."""
    kappa, n = kappa or condition_of(M), len(M)
    exact = inverse(M) @ mp(V)
    if solve is not None:
        same(b, f"{name}.solve", solve, exact, testing.inverse_bound(n * kappa, b.eps))
    if inverse_ is not None:
        same(b, f"{name}.inverse", inverse_, exact, testing.inverse_bound(n * kappa, b.eps))
    if logdet_ is not None:
        true = float(logdet(M))
        judge(b, f"{name}.logdet, 40 digits", abs(b.numpy(logdet_).item() - true),
              testing.logdet_bound(n, kappa, true, b.eps))  # fmt: skip


@precise
@conditions
def test_one_matrix(b, condition):
    M, X = ill(5, condition), np.random.default_rng(1).standard_normal((5, 2))
    A, V = b.array(M), b.array(X)
    check(b, "spd", mp(M), X, solve=spd.solve(A, V), inverse_=spd.inverse(A) @ V, logdet_=spd.logdet(A))
    root = mp(b.numpy(spd.inverse_root(A, 2)))
    same(b, "spd.inverse_root", b.array((root @ root).astype(float)), inverse(mp(M)),
         testing.inverse_bound(2 * 5 * condition, b.eps))  # fmt: skip
    newton = spd.newton_schulz_inverse(A, iterations=60, tolerance=0.1)
    check(b, "newton_schulz", mp(M), X, inverse_=newton @ V)


@precise
@conditions
def test_kronecker(b, condition):
    A, B, V = ill(3, condition**0.5), ill(2, condition**0.5, 1), np.random.default_rng(1).standard_normal((2, 3))
    P, X, dense = Kronecker(b.array(A), b.array(B)), b.array(V), testing.dense_kronecker(mp(A), mp(B))
    v = testing.vec(V)[:, None]

    def flat(U):
        return b.array(testing.vec(b.numpy(U))[:, None])

    F = BlockDiagonal((P, P))
    check(b, "Kronecker", dense, v, solve=flat(P.solve(X)), inverse_=flat(P.inverse() @ X), logdet_=P.logdet())
    check(b, "BlockDiagonal", dense, v, solve=flat(F.solve((X, X))[1]), logdet_=0.5 * F.logdet())
    shift = 0.01 / condition
    shifted, dense = P.shifted_inverse(shift), dense + mp(shift * np.eye(6))
    check(b, "shifted_inverse", dense, v, inverse_=flat(shifted @ X), logdet_=-shifted.logdet())
    back = shifted.inverse()
    check(b, "KroneckerBasis", dense, v, solve=flat(back.solve(X)), logdet_=back.logdet())


@precise
@conditions
@pytest.mark.parametrize("sign", [-0.5, 0.5])
def test_kronecker_pair(b, condition, sign):
    A, B, V = ill(3, condition**0.5), ill(2, condition**0.5, 1), np.random.default_rng(1).standard_normal((2, 3))
    L = np.linalg.cholesky(A)
    C, D = sign * (L @ np.diag([1, 0.5, 0]) @ L.T), B @ B
    C = (C + C.T) / 2
    P, X = KroneckerPair(*map(b.array, (A, B, C, D))), b.array(V)
    dense = testing.dense_kronecker(mp(A), mp(B)) + testing.dense_kronecker(mp(C), mp(D))
    solved, inverted = (b.array(testing.vec(b.numpy(U))[:, None]) for U in (P.solve(X), P.inverse() @ X))
    check(b, "KroneckerPair", dense, testing.vec(V)[:, None], solve=solved, inverse_=inverted, logdet_=P.logdet(),
          kappa=condition)  # fmt: skip
    smith = b.array(testing.vec(b.numpy(P.solve(X, method="smith")))[:, None])
    check(b, "KroneckerPair smith", dense, testing.vec(V)[:, None], solve=smith, kappa=condition)


def chain(blocks):
    """F̂⁻¹ from the inverses of neighbouring pairs' joint matrices, less those of the inner layers."""
    ends = np.cumsum([0, *(len(row[i]) for i, row in enumerate(blocks))])
    F, last = np.block(blocks), len(blocks) - 1
    total = 0 * F
    for i in range(last):
        pair = slice(ends[i], ends[i + 2])
        total[pair, pair] = total[pair, pair] + inverse(F[pair, pair])
    for i in range(1, last):
        one = slice(ends[i], ends[i + 1])
        total[one, one] = total[one, one] - inverse(F[one, one])
    return total


@precise
@conditions
def test_block_tridiagonal_inverse(b, condition):
    """Three layers of 2 x 2, whose joint moments are ill-conditioned."""
    A, G = ill(6, condition**0.5), ill(6, condition**0.5, 1)
    cut = [slice(2 * i, 2 * i + 2) for i in range(3)]
    layers = tuple(LayerFactors(b.array(A[i, i]), b.array(G[i, i])) for i in cut)
    links = tuple(Link(b.array(A[i, j]), b.array(G[i, j])) for i, j in pairwise(cut))
    M = block_tridiagonal_inverse(Factors(layers, links), 0.0)
    exact = chain([[testing.dense_kronecker(mp(A[i, j]), mp(G[i, j])) for j in cut] for i in cut])
    kappa = condition_of(exact)
    same(b, "block_tridiagonal_inverse", M.to_dense(), exact, testing.inverse_bound(12 * kappa, b.eps))
    true = float(logdet(exact))
    bound = testing.logdet_bound(12, kappa, true, b.eps)
    judge(b, "block_tridiagonal_inverse.logdet, 40 digits", abs(b.numpy(M.logdet()).item() - true), bound)


@precise
@conditions
def test_low_rank_plus_diagonal(b, condition):
    """A large s, a negative one that leaves a margin of 1/condition, and d of very different sizes."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((4, 2)))[0]
    for s, d in (([condition, 2.0], np.ones(4)), ([3.0, 100 / condition - 1], np.ones(4)),
                 ([1.0, 2.0], np.geomspace(1 / condition, 1, 4))):  # fmt: skip
        M, X = LowRankPlusDiagonal(b.array(U), b.array(s), b.array(d)), rng.standard_normal((4, 2))
        dense = (mp(U) * mp(s)) @ mp(U).T + np.diag(mp(d))
        kappa = float(mpmath.norm(matrix(dense)) * max(mpmath.norm(matrix(inverse(dense))), 1 / d.min()))
        V = b.array(X)
        check(b, "LowRank", dense, X, solve=M.solve(V), inverse_=M.inverse() @ V, logdet_=M.logdet(), kappa=kappa)
        check(b, "LowRank sherman-morrison", dense, X, inverse_=M.inverse("sherman-morrison") @ V, kappa=kappa)
        L = np.tril(U @ U.T) + np.diag(1 + d)
        C = CholeskyInverse(b.array(L))
        dense = inverse(mp(L) @ mp(L).T)
        check(b, "CholeskyInverse", dense, X, solve=C.solve(V), inverse_=C.inverse() @ V, logdet_=C.logdet())
        D = Diagonal(b.array(d))
        check(b, "Diagonal", np.diag(mp(d)), X, solve=D.solve(V), inverse_=D.inverse() @ V, logdet_=D.logdet())


@precise
@pytest.mark.parametrize("condition", [1e4, 1e7])
def test_fit_quadratic(b, condition):
    """What is parallel to 1e-10 is dropped: cosines that differ from 1 by more than that are resolved."""
    F, D, g = ill(3, condition), np.eye(3), np.random.default_rng(0).standard_normal(3)
    fit = fit_quadratic(*map(b.array, (F, D, g)), 0.0)
    exact = -(inverse(mp(F)) @ mp(g))
    same(b, "fit_quadratic", fit.coefficients[:, None], exact[:, None], testing.inverse_bound(3 * condition, b.eps))
    change = float(0.5 * (mp(g) @ exact))
    judge(b, "fit_quadratic.change, 40 digits", abs(b.numpy(fit.change).item() - change) / abs(change),
          testing.inverse_bound(3 * condition, b.eps))  # fmt: skip


def test_an_error_in_the_tenth_digit_is_caught():
    M = ill(3, 1e3)
    with pytest.raises(AssertionError, match=r"spd\.inverse, 40 digits"):
        check(NUMPY, "spd", mp(M), np.eye(3), inverse_=spd.inverse(M) * (1 + 1e-9))
