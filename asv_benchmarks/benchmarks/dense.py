"""Functions of one matrix: `spd`, low rank and diagonals."""

import numpy as np

from kfaclinalg import (
    CholeskyInverse,
    Dense,
    Diagonal,
    LowRankPlusDiagonal,
    assert_finite,
    low_rank,
    low_rank_plus_diagonal,
    spd,
)

from .operation import Operation, operations

NEWTON_SCHULZ = 16  # iterations, enough for these matrices
SUBSPACE = 8  # iterations of `low_rank`


def root(by, M):
    w, Q = by.eigh(M)
    K = Q * w**-0.25
    return K @ K.mT


def newton_schulz(by, M):
    I = by.xp.eye(len(M), dtype=M.dtype)
    X = I / by.la.norm(M)
    for _ in range(NEWTON_SCHULZ):
        X = X + X @ (I - M @ X)
    return X


def subspace(by, M, X):
    """Eigenpairs by subspace iteration and Rayleigh-Ritz, as many as X has columns."""
    for _ in range(SUBSPACE):
        X = by.la.qr(M @ X)[0]
    w, P = by.eigh(X.mT @ (M @ X))
    return X @ P, w


def without_diagonal(by, M, X):
    return subspace(by, M * (1 - by.xp.eye(len(M), dtype=M.dtype)), X)


def factor(new, n):
    return CholeskyInverse(np.linalg.cholesky(new.spd(n))), new.matrix(n, n)


def triangular_inverse(by, L):
    return by.substitution(L, by.xp.eye(len(L), dtype=L.dtype))


def woodbury(by, M):
    """T and 1/d with M⁻¹ = diag(1/d) - T Tᵀ, for positive s."""
    W = M.U * M.s**0.5 / (M.d**0.5)[:, None]
    L = by.cholesky(by.shifted(W.mT @ W, 1))
    return by.substitution(L, W.mT).mT / (M.d**0.5)[:, None], 1 / M.d


def woodbury_solve(by, M, X):
    T, inverse = woodbury(by, M)
    return inverse[:, None] * X - T @ (T.mT @ X)


def woodbury_logdet(by, M):
    W = M.U * M.s**0.5 / (M.d**0.5)[:, None]
    return by.log_det(by.shifted(W.mT @ W, 1)) + by.xp.log(M.d).sum()


OPERATIONS = {
    "spd.inverse": Operation(lambda new, n: (new.spd(n),), spd.inverse, lambda by, M: by.inverse(M)),
    "spd.cholesky": Operation(lambda new, n: (new.spd(n),), spd.cholesky, lambda by, M: by.cholesky(M)),
    "spd.solve": Operation(lambda new, n: (new.spd(n), new.matrix(n, n)), spd.solve, lambda by, M, X: by.solve(M, X)),
    "spd.inverse_root": Operation(lambda new, n: (new.spd(n),), lambda M: spd.inverse_root(M, 2), root, (64, 256, 512)),
    "spd.logdet": Operation(lambda new, n: (new.spd(n),), spd.logdet, lambda by, M: by.log_det(M)),
    "spd.newton_schulz_inverse": Operation(
        lambda new, n: (new.spd(n),),
        lambda M: spd.newton_schulz_inverse(M, iterations=NEWTON_SCHULZ),
        newton_schulz,
    ),
    "low_rank": Operation(
        lambda new, n: (new.spd(n), new.matrix(n, n // 8 + 5)), lambda M, _: low_rank(M, len(M) // 8), subspace
    ),
    "low_rank_plus_diagonal": Operation(
        lambda new, n: (new.spd(n), new.matrix(n, n // 8 + 5)),
        lambda M, _: low_rank_plus_diagonal(M, len(M) // 8),
        without_diagonal,
    ),
    "assert_finite": Operation(
        lambda new, n: (new.matrix(n, n),),
        lambda x: assert_finite(x, "x"),
        lambda by, x: bool(by.xp.isfinite(x).all()),
        mode="eager",
    ),
    **operations(
        "Dense.",
        lambda new, n: (Dense(new.spd(n)), new.matrix(n, n)),
        {
            "__matmul__": (lambda P, X: P @ X, lambda by, P, X: P.M @ X),
            "gram": (lambda P, X: P.gram(X, X), lambda by, P, X: X.mT @ (P.M @ X)),
            "apply": (lambda P, X: P.apply(X), lambda by, P, X: P.M @ X),
            "apply_right": (lambda P, X: P.apply_right(X), lambda by, P, X: X @ P.M.mT),
            "inverse": (lambda P, X: P.inverse(), lambda by, P, X: by.inverse(P.M)),
            "solve": (lambda P, X: P.solve(X), lambda by, P, X: by.solve(P.M, X)),
            "logdet": (lambda P, X: P.logdet(), lambda by, P, X: by.log_det(P.M)),
            "shifted": (lambda P, X: P.shifted(1.0), lambda by, P, X: by.shifted(P.M, 1)),
            "trace": (lambda P, X: P.trace(), lambda by, P, X: by.xp.diagonal(P.M).sum()),
            "diagonal": (lambda P, X: P.diagonal(), lambda by, P, X: by.xp.diagonal(P.M)),
            "to_dense": (lambda P, X: P.to_dense(), lambda by, P, X: P.M),
        },
    ),
    "Dense.inverse_root": Operation(
        lambda new, n: (Dense(new.spd(n)),),
        lambda P: P.inverse_root(2),
        lambda by, P: root(by, P.M),
        (64, 256, 512),
    ),
    **operations(
        "CholeskyInverse.",
        factor,
        {
            "__matmul__": (lambda P, X: P @ X, lambda by, P, X: by.substitution(P.L, by.substitution(P.L, X), trans=1)),
            "gram": (
                lambda P, X: P.gram(X, X),
                lambda by, P, X: X.mT @ by.substitution(P.L, by.substitution(P.L, X), trans=1),
            ),
            "apply": (
                lambda P, X: P.apply(X),
                lambda by, P, X: by.substitution(P.L, by.substitution(P.L, X), trans=1),
            ),
            "apply_right": (
                lambda P, X: P.apply_right(X),
                lambda by, P, X: by.substitution(P.L, by.substitution(P.L, X.mT), trans=1).mT,
            ),
            "inverse": (lambda P, X: P.inverse(), lambda by, P, X: P.L @ P.L.mT),
            "shifted": (lambda P, X: P.shifted(1.0), lambda by, P, X: by.shifted(by.inverse_of_factor(P.L), 1)),
            "solve": (lambda P, X: P.solve(X), lambda by, P, X: P.L @ (P.L.mT @ X)),
            "logdet": (lambda P, X: P.logdet(), lambda by, P, X: -2 * by.xp.log(by.xp.diagonal(P.L)).sum()),
            "trace": (lambda P, X: P.trace(), lambda by, P, X: (triangular_inverse(by, P.L) ** 2).sum()),
            "diagonal": (lambda P, X: P.diagonal(), lambda by, P, X: (triangular_inverse(by, P.L) ** 2).sum(0)),
            "to_dense": (lambda P, X: P.to_dense(), lambda by, P, X: by.inverse_of_factor(P.L)),
        },
    ),
    "CholeskyInverse.inverse_root": Operation(
        factor,
        lambda P, X: P.inverse_root(2),
        lambda by, P, X: root(by, by.inverse_of_factor(P.L)),
        (64, 256, 512),
    ),
    **operations(
        "Diagonal.",
        lambda new, n: (Diagonal(new.positive(n)), new.matrix(n, n)),
        {
            "__matmul__": (lambda D, X: D @ X, lambda by, D, X: D.d[:, None] * X),
            "gram": (lambda P, X: P.gram(X, X), lambda by, P, X: X.mT @ (P.d[:, None] * X)),
            "apply": (lambda D, X: D.apply(X), lambda by, D, X: D.d[:, None] * X),
            "apply_right": (lambda D, X: D.apply_right(X), lambda by, D, X: X * D.d),
            "shifted": (lambda D, X: D.shifted(1.0), lambda by, D, X: D.d + 1.0),
            "inverse": (lambda D, X: D.inverse(), lambda by, D, X: 1 / D.d),
            "inverse_root": (lambda D, X: D.inverse_root(2), lambda by, D, X: D.d**-0.5),
            "solve": (lambda D, X: D.solve(X), lambda by, D, X: X / D.d[:, None]),
            "logdet": (lambda D, X: D.logdet(), lambda by, D, X: by.xp.log(D.d).sum()),
            "trace": (lambda D, X: D.trace(), lambda by, D, X: D.d.sum()),
            "diagonal": (lambda D, X: D.diagonal(), lambda by, D, X: D.d),
            "to_dense": (lambda D, X: D.to_dense(), lambda by, D, X: by.xp.diag(D.d)),
        },
    ),
    **operations(
        "LowRankPlusDiagonal.",
        lambda new, n: (
            LowRankPlusDiagonal(new.matrix(n, n // 8), new.positive(n // 8), new.positive(n)),
            new.matrix(n, n),
        ),
        {
            "__matmul__": (
                lambda M, X: M @ X,
                lambda by, M, X: M.U @ (M.s[:, None] * (M.U.mT @ X)) + M.d[:, None] * X,
            ),
            "gram": (
                lambda P, X: P.gram(X, X),
                lambda by, P, X: X.mT @ (P.U @ (P.s[:, None] * (P.U.mT @ X)) + P.d[:, None] * X),
            ),
            "apply": (
                lambda M, X: M.apply(X),
                lambda by, M, X: M.U @ (M.s[:, None] * (M.U.mT @ X)) + M.d[:, None] * X,
            ),
            "apply_right": (
                lambda M, X: M.apply_right(X),
                lambda by, M, X: ((X @ M.U) * M.s) @ M.U.mT + X * M.d,
            ),
            "shifted": (lambda M, X: M.shifted(1.0).d, lambda by, M, X: M.d + 1.0),
            "inverse_root": (
                lambda M, X: M.inverse_root(2),
                lambda by, M, X: root(by, by.shifted((M.U * M.s) @ M.U.mT, M.d)),
            ),
            "inverse": (lambda M, X: M.inverse(), lambda by, M, X: woodbury(by, M)),
            "inverse sherman-morrison": (
                lambda M, X: M.inverse("sherman-morrison"),
                lambda by, M, X: woodbury(by, M),
            ),
            "solve": (lambda M, X: M.solve(X), woodbury_solve),
            "logdet": (lambda M, X: M.logdet(), lambda by, M, X: woodbury_logdet(by, M)),
            "trace": (lambda M, X: M.trace(), lambda by, M, X: ((M.U * M.U) @ M.s).sum() + M.d.sum()),
            "diagonal": (lambda M, X: M.diagonal(), lambda by, M, X: (M.U * M.U) @ M.s + M.d),
            "to_dense": (lambda M, X: M.to_dense(), lambda by, M, X: by.shifted((M.U * M.s) @ M.U.mT, M.d)),
        },
        sizes=(64, 256),
    ),
}
