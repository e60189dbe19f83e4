"""What is public passes through `vmap`, `grad` and `jit`, and a batch is a loop, on every backend.

One table holds it all: a function and its arguments, values of the library among them, with three members along the
first axis of every array. The truth is NumPy's, one member at a time; derivatives are central differences of that.
"""

import jax
import numpy as np
import pytest
import torch
from backends import JAX, NUMPY, TORCH, eager_backends

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
    OuterProduct,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    exactly_damped_inverse,
    factored_tikhonov,
    fit_quadratic,
    homogeneous,
    inner_products,
    low_rank,
    low_rank_inverse,
    low_rank_plus_diagonal,
    moving_average,
    spd,
    testing,
    tikhonov_pi,
    update_factors,
)
from kfaclinalg.damping import NORMS

MEMBERS, N, M = 3, 4, 2
rng = np.random.default_rng(0)
each, tree_leaves = jax.tree_util.tree_map, jax.tree_util.tree_leaves


def rounded(x):
    """Exact in float32 too, so that every backend sees the same."""
    return x.astype(np.float32).astype(np.float64)


def normal(*shape):
    return rounded(rng.standard_normal((MEMBERS, *shape)))


def definite(n, condition):
    spectrum = testing.spectrum("geometric", n, condition=condition)
    return rounded(np.stack([testing.spd_matrix(spectrum, rng) for _ in range(MEMBERS)]))


# A ⊗ B for the first layer, of n inputs and m outputs, and B ⊗ A for the second, so that one side of the link is wide
# and the other tall. The eigenvalues are distinct: at repeated ones an eigenvector has no derivative.
A, B, C, D = definite(N, 8), definite(M, 3), definite(N, 5) / 16, definite(M, 2) / 3
V, X, shift = normal(M, N), normal(N, 3), rounded(0.5 + np.arange(MEMBERS) / 7)
K = Kronecker(A, B)
BASIS = KroneckerBasis(np.eye(N) + normal(N, N) / 8, np.eye(M) + normal(M, M) / 8, 1 + V * V)
EIGEN = KroneckerEigen(*(np.linalg.qr(normal(k, k))[0] for k in (N, M)), 1 + V * V)
PAIR = KroneckerPair(A, B, -C, D)
CHOLESKY = CholeskyInverse(np.linalg.cholesky(A))
DIAGONAL = Diagonal(1 + normal(N) ** 2)
LOW = LowRankPlusDiagonal(normal(N, 2), rounded(np.array([[1.0, -0.1]] * MEMBERS)), 2 + normal(N) ** 2)
STRUCTURED = Kronecker(LOW, Diagonal(1 + normal(M) ** 2))
BLOCKS = BlockDiagonal((K, DIAGONAL))
FACTORS = Factors((LayerFactors(A, B), LayerFactors(B + D, A + C)), (Link(normal(N, M) / 20, normal(M, N) / 20),))
LAYER = Factors((LayerFactors(A, B),))
TRIDIAGONAL = block_tridiagonal_inverse(FACTORS, shift)
CONDITION = max(np.linalg.cond(P.to_dense()).max() for P in (K, BASIS, PAIR, STRUCTURED, BLOCKS, TRIDIAGONAL))
VS = (V, V.mT)


def known(P):
    return P.trace(), P.diagonal(), P.to_dense()


def solved(P, V):
    return P.inverse() @ V, P.solve(V), P.logdet()


def symmetric(F):
    return F._replace(layers=tuple(LayerFactors(A + A.mT, G + G.mT) for A, G in F.layers))


# Every one of these is NaN for a member of which all arrays change their sign,
DEFINITE = {
    "spd.inverse": (spd.inverse, A),
    "spd.cholesky": (spd.cholesky, A),
    "spd.solve": (spd.solve, A, X),
    "spd.inverse_root": (lambda A: spd.inverse_root(A, 2), A),
    "spd.logdet": (spd.logdet, A),
    "newton_schulz_inverse": (lambda A: spd.newton_schulz_inverse(A, iterations=9), A),
    "newton_schulz_inverse, warm": (
        lambda A, X: spd.newton_schulz_inverse(A, X, iterations=6),
        A,
        np.linalg.inv(A + C),
    ),
    "Kronecker.inverse, solve, logdet": (solved, K, V),
    "Kronecker.inverse, cholesky": (lambda P, V: P.inverse(method="cholesky") @ V, K, V),
    "Kronecker.inverse_root": (lambda P: P.inverse_root(4), K),
    "Kronecker.shifted_inverse": (lambda P, shift, V: P.shifted_inverse(shift) @ V, K, shift, V),
    "Kronecker of structured factors": (solved, STRUCTURED, V),
    "KroneckerBasis.logdet": (lambda P: P.logdet(), BASIS),
    "Kronecker.eigh": (lambda P, shift, V: P.eigh().shifted(shift).solve(V), K, shift, V),
    "KroneckerEigen.inverse, solve, logdet": (solved, EIGEN, V),
    "KroneckerEigen.shifted, power": (lambda P, shift: P.shifted(shift).power(-0.5).to_dense(), EIGEN, shift),
    "KroneckerPair.inverse, solve, logdet": (solved, PAIR, V),
    "KroneckerPair.solve, smith": (lambda P, V: P.solve(V, method="smith"), PAIR, V),
    "Diagonal.inverse, solve, logdet": (solved, DIAGONAL, X),
    "LowRankPlusDiagonal.inverse, solve, logdet": (solved, LOW, X),
    "LowRankPlusDiagonal.inverse, sherman-morrison": (lambda P: P.inverse("sherman-morrison").to_dense(), LOW),
    "BlockDiagonal.inverse, solve, logdet": (lambda P, V: (P.inverse() @ V, P.solve(V), P.logdet()), BLOCKS, (V, X)),
    "BlockTridiagonalInverse.logdet": (lambda P: P.logdet(), TRIDIAGONAL),
    "block_diagonal_inverse": (lambda F, gamma, V: block_diagonal_inverse(F, gamma) @ V, FACTORS, shift, VS),
    "block_tridiagonal_inverse": (lambda F, gamma, V: block_tridiagonal_inverse(F, gamma) @ V, FACTORS, shift, VS),
    "low_rank_inverse": (lambda F, gamma, V: low_rank_inverse(F, gamma, rank=2) @ (V,), LAYER, shift, V),
    "exactly_damped_inverse": (lambda F, shift, V: exactly_damped_inverse(F, shift) @ V, FACTORS, shift, VS),
}
# and these need no definite matrix.
PLAIN = {
    "Kronecker @": (lambda P, V: P @ V, K, V),
    "Kronecker.apply_outer": (lambda P, L, R: P.apply_outer(L, R), K, normal(M, 3), X),
    "Kronecker.trace, diagonal, to_dense": (known, K),
    "Kronecker of structured factors @": (lambda P, V: (P @ V, *known(P)), STRUCTURED, V),
    "KroneckerBasis @": (lambda P, V: P @ V, BASIS, V),
    "KroneckerBasis.inverse, solve": (lambda P, V: (P.inverse(), P.solve(V)), BASIS, V),
    "KroneckerBasis.trace, diagonal, to_dense": (known, BASIS),
    "KroneckerEigen @": (lambda P, V: P @ V, EIGEN, V),
    "KroneckerEigen.trace, diagonal, to_dense": (known, EIGEN),
    "KroneckerEigen.map": (lambda P, V: P.map(lambda s: s * s) @ V, EIGEN, V),
    "KroneckerPair @": (lambda P, V: P @ V, PAIR, V),
    "KroneckerPair.trace, diagonal, to_dense": (known, PAIR),
    "CholeskyInverse @, solve": (lambda P, X: (P @ X, P.solve(X)), CHOLESKY, X),
    "CholeskyInverse.inverse, logdet": (lambda P: (P.inverse(), P.logdet()), CHOLESKY),
    "CholeskyInverse.trace, diagonal, to_dense": (known, CHOLESKY),
    "Diagonal @": (lambda P, X: P @ X, DIAGONAL, X),
    "Diagonal.trace, diagonal, to_dense": (known, DIAGONAL),
    "LowRankPlusDiagonal @": (lambda P, X: P @ X, LOW, X),
    "LowRankPlusDiagonal.trace, diagonal, to_dense": (known, LOW),
    "BlockDiagonal @": (lambda P, V: P @ V, BLOCKS, (V, X)),
    "BlockDiagonal.trace, diagonal, to_dense": (known, BLOCKS),
    "BlockTridiagonalInverse @": (lambda P, V: P @ V, TRIDIAGONAL, VS),
    "BlockTridiagonalInverse.to_dense": (lambda P: P.to_dense(), TRIDIAGONAL),
    # The signs of the columns of U are free, U diag(s) Uᵀ is not.
    "low_rank": (lambda A: low_rank(A, 2, iterations=2).to_dense(), A),
    "low_rank_plus_diagonal": (lambda A: low_rank_plus_diagonal(A, 2, iterations=2).to_dense(), A),
    "tikhonov_pi": (lambda layer: [tikhonov_pi(layer, norm=norm) for norm in NORMS], LayerFactors(A, B)),
    "factored_tikhonov": (factored_tikhonov, LayerFactors(A, B), shift),
    "fit_quadratic": (fit_quadratic, B, B + D, V[..., 0], shift),
    "batch_factors": (lambda a, g: batch_factors(a, g, links=True), (A, X), (X, A)),
    "homogeneous": (homogeneous, A),
    "moving_average": (lambda old, new: moving_average(old, new, decay=0.75), FACTORS, each(lambda x: 2 * x, FACTORS)),
    "update_factors": (
        lambda old, a, g: update_factors(symmetric(old), a, g, decay=0.75),
        FACTORS,
        (normal(3, N), normal(3, M)),
        (normal(3, M), normal(3, N)),
    ),
}
# The inner products are of one network: the sum is over a batch too. A gram's first dimension counts its matrices.
ALONE = {
    "inner_products": (lambda d, e: inner_products([d], [d, e]), VS, (3 * V, V.mT + 1)),
    "Kronecker.gram": (lambda P, U, V: P.gram(U, V), K, normal(2, M, N), normal(3, M, N)),
    "KroneckerEigen.gram": (lambda P, L, R: P.gram(*[OuterProduct(L, R)] * 2), EIGEN, normal(2, M, 1), normal(2, N, 1)),
}
BATCHED = DEFINITE | PLAIN
EVERYTHING = BATCHED | ALONE
# Ones and zeros, which no NaN reaches.
HAVE_CONSTANTS = {"homogeneous", *(f"{name}.trace, diagonal, to_dense" for name in ("Diagonal", "BlockDiagonal"))}


def squares(results):
    """Half the sum of the squares: the one number that gradients are taken of."""
    return sum((y * y).sum() for y in tree_leaves(results)) / 2


def member(args, i):
    return each(lambda x: x[i], args)


def assert_close(b, computed, expected):
    for x, y in zip(tree_leaves(computed), tree_leaves(expected), strict=True):
        assert np.linalg.norm(b.read(x) - y) <= testing.inverse_bound(CONDITION, b.eps) * (1 + np.linalg.norm(y))


def loop(f, args):
    return each(lambda *ys: np.stack(ys), *(tree_leaves(f(*member(args, i))) for i in range(MEMBERS)))


@eager_backends
@pytest.mark.parametrize(("f", "args"), [(f, args) for f, *args in BATCHED.values()], ids=BATCHED)
def test_a_batch_is_a_loop(b, f, args):
    assert_close(b, f(*each(b.array, args)), loop(f, args))


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
FRAMEWORKS = {
    "jax": (JAX[0], jax.vmap, jax.grad, lambda f: jax.jit(f, compiler_options=QUICK)),
    "torch": (TORCH, torch.func.vmap, torch.func.grad, lambda f: f),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_vmap_is_a_loop_and_grad_a_difference_quotient(framework, name, monkeypatch):
    """And a failing member is NaN under both, while the others keep every bit. In JAX all of it is under `jit`."""
    monkeypatch.setattr("kfaclinalg.kronecker_pair.SQUARINGS", 12)  # enough for it to underflow
    (f, *args), (b, vmap, grad, jit) = EVERYTHING[name], FRAMEWORKS[framework]
    both = jit(lambda args: (vmap(lambda args: f(*args))(args), vmap(grad(lambda args: squares(f(*args))))(args)))

    def run(args):
        return each(b.read, both(each(b.array, args)))

    mapped, slopes = run(args)
    assert_close(NUMPY, mapped, loop(f, args))

    direction, h = each(lambda x: np.random.default_rng(1).standard_normal(x.shape), args), 1e-5
    ahead, behind = each(lambda x, dx: x + h * dx, args, direction), each(lambda x, dx: x - h * dx, args, direction)
    for i in range(MEMBERS):
        quotient = (squares(f(*member(ahead, i))) - squares(f(*member(behind, i)))) / (2 * h)
        products = each(lambda g, dx: (g * dx).sum(), member(slopes, i), member(direction, i))
        np.testing.assert_allclose(sum(tree_leaves(products)), quotient, rtol=1e-5, atol=1e-5)

    for factor in [np.nan, -1] if name in DEFINITE else [np.nan]:
        results = run(each(lambda x, c=factor: np.stack([x[0], c * x[1], x[2]]), args))
        for x, y in zip(tree_leaves(results), tree_leaves((mapped, slopes)), strict=True):
            np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
        for x in tree_leaves(results[0]):
            assert np.isnan(x[1]).all() or name in HAVE_CONSTANTS
