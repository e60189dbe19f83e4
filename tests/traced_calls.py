"""Calls of what is public, on arrays A (3, 3), G (2, 2) and V (2, 3), with the shape of each result."""

import torch

from kfaclinalg import (
    BlockDiagonal,
    BlockTridiagonalInverse,
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
    second_moment,
    spd,
    tikhonov_pi,
    update_factors,
)


def factors_of(A, G):
    return Factors((LayerFactors(A, G),))


def linked(A, G):
    return Factors((LayerFactors(A, G),) * 2, (Link(0.5 * A, G),))


def chain(A, G):
    return BlockTridiagonalInverse((A,), (G,), (Kronecker(A, G), Kronecker(A, G)))


def low(A, V):
    return LowRankPlusDiagonal(0.5 * V.mT, V[:, 0], 1 + A[0, :])


# Everything public that takes A (n, n), G (m, m) and V (m, n), by the shape of its result for n = 3, m = 2.
HOT = {
    "spd.inverse": (lambda A, G, V: spd.inverse(A), (3, 3)),
    "spd.cholesky": (lambda A, G, V: spd.cholesky(A), (3, 3)),
    "spd.solve": (lambda A, G, V: spd.solve(A, V.mT), (3, 2)),
    "spd.logdet": (lambda A, G, V: spd.logdet(A), ()),
    "newton_schulz_inverse, cold": (lambda A, G, V: spd.newton_schulz_inverse(A), (3, 3)),
    "newton_schulz_inverse": (lambda A, G, V: spd.newton_schulz_inverse(A, A, iterations=2), (3, 3)),
    "Kronecker @": (lambda A, G, V: Kronecker(A, G) @ V, (2, 3)),
    "Kronecker.inverse": (lambda A, G, V: Kronecker(A, G).inverse() @ V, (2, 3)),
    "Kronecker.inverse cholesky": (lambda A, G, V: Kronecker(A, G).inverse(method="cholesky") @ V, (2, 3)),
    "Kronecker.solve": (lambda A, G, V: Kronecker(A, G).solve(V), (2, 3)),
    "Kronecker.logdet": (lambda A, G, V: Kronecker(A, G).logdet(), ()),
    "Kronecker.trace": (lambda A, G, V: Kronecker(A, G).trace(), ()),
    "Kronecker.diagonal": (lambda A, G, V: Kronecker(A, G).diagonal(), (2, 3)),
    "Kronecker.to_dense": (lambda A, G, V: Kronecker(A, G).to_dense(), (6, 6)),
    "Kronecker.apply_outer": (lambda A, G, V: Kronecker(A, G).apply_outer(G, V.mT), (2, 3)),
    "BlockDiagonal": (lambda A, G, V: BlockDiagonal((Kronecker(A, G),)).inverse().apply((V,))[0], (2, 3)),
    "BlockDiagonal.solve": (lambda A, G, V: BlockDiagonal((Kronecker(A, G),)).solve((V,))[0], (2, 3)),
    "BlockDiagonal.to_dense": (lambda A, G, V: BlockDiagonal((Kronecker(A, G),) * 2).to_dense(), (12, 12)),
    "KroneckerBasis @": (lambda A, G, V: KroneckerBasis(A, G, V) @ V, (2, 3)),
    "KroneckerBasis.inverse": (lambda A, G, V: KroneckerBasis(A, G, V).inverse() @ V, (2, 3)),
    "KroneckerBasis.logdet": (lambda A, G, V: KroneckerBasis(A, G, V).logdet(), ()),
    "KroneckerBasis.to_dense": (lambda A, G, V: KroneckerBasis(A, G, V).to_dense(), (6, 6)),
    "KroneckerEigen @": (lambda A, G, V: KroneckerEigen(A, G, V) @ V, (2, 3)),
    "KroneckerEigen.shifted, solve": (lambda A, G, V: KroneckerEigen(A, G, V).shifted(0.5).solve(V), (2, 3)),
    "KroneckerEigen.power, inverse": (lambda A, G, V: KroneckerEigen(A, G, V).power(0.5).inverse() @ V, (2, 3)),
    "KroneckerEigen.logdet": (lambda A, G, V: KroneckerEigen(A, G, V).logdet(), ()),
    "Kronecker.gram": (lambda A, G, V: Kronecker(A, G).gram(V[None], V[None]), (1, 1)),
    "KroneckerEigen.gram": (
        lambda A, G, V: KroneckerEigen(A, G, V).gram(OuterProduct(G[None], V.mT[None]), V[None]),
        (1, 1),
    ),
    "KroneckerPair @": (lambda A, G, V: KroneckerPair(A, G, A, G) @ V, (2, 3)),
    "KroneckerPair.solve smith": (lambda A, G, V: KroneckerPair(A, G, -0.5 * A, G).solve(V, method="smith"), (2, 3)),
    "BlockTridiagonalInverse": (lambda A, G, V: chain(A, G).apply((V, V))[0], (2, 3)),
    "BlockTridiagonalInverse.logdet": (lambda A, G, V: chain(A, G).logdet(), ()),
    "BlockTridiagonalInverse.to_dense": (lambda A, G, V: chain(A, G).to_dense(), (12, 12)),
    "CholeskyInverse @": (lambda A, G, V: CholeskyInverse(A) @ V.mT, (3, 2)),
    "CholeskyInverse.inverse": (lambda A, G, V: CholeskyInverse(A).inverse(), (3, 3)),
    "CholeskyInverse.solve": (lambda A, G, V: CholeskyInverse(A).solve(V.mT), (3, 2)),
    "CholeskyInverse.logdet": (lambda A, G, V: CholeskyInverse(A).logdet(), ()),
    "CholeskyInverse.trace": (lambda A, G, V: CholeskyInverse(A).trace(), ()),
    "CholeskyInverse.diagonal": (lambda A, G, V: CholeskyInverse(A).diagonal(), (3,)),
    "CholeskyInverse.to_dense": (lambda A, G, V: CholeskyInverse(A).to_dense(), (3, 3)),
    "Diagonal @": (lambda A, G, V: Diagonal(V[0, :]) @ A, (3, 3)),
    "Diagonal.inverse": (lambda A, G, V: Diagonal(V[0, :]).inverse().to_dense(), (3, 3)),
    "Diagonal.solve": (lambda A, G, V: Diagonal(V[0, :]).solve(A), (3, 3)),
    "Diagonal.logdet": (lambda A, G, V: Diagonal(V[0, :]).logdet(), ()),
    "LowRankPlusDiagonal @": (lambda A, G, V: low(A, V) @ A, (3, 3)),
    "LowRankPlusDiagonal.inverse": (lambda A, G, V: low(A, V).inverse().to_dense(), (3, 3)),
    "LowRankPlusDiagonal.inverse sherman-morrison": (
        lambda A, G, V: low(A, V).inverse(method="sherman-morrison").diagonal(),
        (3,),
    ),
    "LowRankPlusDiagonal.solve": (lambda A, G, V: low(A, V).solve(A), (3, 3)),
    "LowRankPlusDiagonal.logdet": (lambda A, G, V: low(A, V).logdet(), ()),
    "LowRankPlusDiagonal.trace": (lambda A, G, V: low(A, V).trace(), ()),
    "LowRankPlusDiagonal.diagonal": (lambda A, G, V: low(A, V).diagonal(), (3,)),
    "LowRankPlusDiagonal.to_dense": (lambda A, G, V: low(A, V).to_dense(), (3, 3)),
    "Kronecker, structured": (lambda A, G, V: Kronecker(low(A, V), Diagonal(V[:, 0])).inverse() @ V, (2, 3)),
    "homogeneous": (lambda A, G, V: homogeneous(V), (2, 4)),
    "second_moment": (lambda A, G, V: second_moment(V), (3, 3)),
    "batch_factors": (lambda A, G, V: batch_factors([V, V], [G, G], links=True).links[0].A, (3, 3)),
    "moving_average": (
        lambda A, G, V: moving_average(factors_of(A, G), factors_of(A, G), decay=0.5).layers[0].A,
        (3, 3),
    ),
    "update_factors": (
        lambda A, G, V: update_factors(factors_of(A, G), [A], [G[[0, 1, 1], :]], decay=0.5).layers[0].A,
        (3, 3),
    ),
    "tikhonov_pi": (lambda A, G, V: tikhonov_pi(LayerFactors(A, G)), ()),
    "factored_tikhonov": (lambda A, G, V: factored_tikhonov(LayerFactors(A, G), 0.1).G, (2, 2)),
    "block_diagonal_inverse": (lambda A, G, V: block_diagonal_inverse(factors_of(A, G), 0.1).apply((V,))[0], (2, 3)),
    "fit_quadratic": (lambda A, G, V: fit_quadratic(G, G, V[:, 0], 0.1).coefficients, (2,)),
    "inner_products": (lambda A, G, V: inner_products([(A, G)], [(A, G), (A, G)]), (1, 2)),
}
# Eigenvalue routines synchronise in torch itself.
COLD = {
    "spd.inverse_root": (lambda A, G, V: spd.inverse_root(A, 2), (3, 3)),
    "Kronecker.inverse_root": (lambda A, G, V: Kronecker(A, G).inverse_root(2) @ V, (2, 3)),
    "Kronecker.shifted_inverse": (lambda A, G, V: Kronecker(A, G).shifted_inverse(0.1) @ V, (2, 3)),
    "KroneckerPair.inverse": (lambda A, G, V: KroneckerPair(A, G, -0.5 * A, G).inverse() @ V, (2, 3)),
    "block_tridiagonal_inverse": (
        lambda A, G, V: block_tridiagonal_inverse(linked(A, G), 0.1).apply((V, V))[0],
        (2, 3),
    ),
    "exactly_damped_inverse": (lambda A, G, V: exactly_damped_inverse(factors_of(A, G), 0.1).apply((V,))[0], (2, 3)),
    "low_rank": (lambda A, G, V: low_rank(A, 1, iterations=1).d, (3,)),
    "low_rank_plus_diagonal": (lambda A, G, V: low_rank_plus_diagonal(A, 2, iterations=1).to_dense(), (3, 3)),
    "low_rank_plus_diagonal, warm": (
        lambda A, G, V: low_rank_plus_diagonal(A, 2, start=low(A, V)).to_dense(),
        (3, 3),
    ),
    "low_rank_inverse": (lambda A, G, V: low_rank_inverse(factors_of(A, G), 0.1, rank=1).apply((V,))[0], (2, 3)),
    "spectral pi": (lambda A, G, V: tikhonov_pi(LayerFactors(A, G), norm="spectral"), ()),
}


def arguments(device="cpu", dtype=torch.float64):
    eye = (torch.eye(3, device=device, dtype=dtype), torch.eye(2, device=device, dtype=dtype))
    return *eye, torch.ones((2, 3), device=device, dtype=dtype)
