"""Operators of one layer: `Kronecker`, `KroneckerBasis`, `KroneckerEigen`, `KroneckerPair`, `OuterProduct`."""

from kfaclinalg import Kronecker, KroneckerBasis, KroneckerEigen, KroneckerPair, OuterProduct

from .dense import root
from .operation import Operation, operations

SQUARINGS = 4  # of the Smith iteration, enough for these pairs
EXAMPLES = 32
QUERIES = 8
EIGENVALUES = {"sizes": (64, 256, 512)}
SMALL = {"sizes": (8, 16, 32)}  # of what holds (m n)² entries


def layer(new, n):
    """n inputs and n/2 outputs."""
    return Kronecker(new.spd(n), new.spd(n // 2)), new.matrix(n // 2, n)


def outer(new, n):
    return layer(new, n)[0], OuterProduct(new.matrix(n // 2, EXAMPLES), new.matrix(n, EXAMPLES))


def basis(new, n):
    return KroneckerBasis(new.spd(n), new.spd(n // 2), new.positive(n // 2, n)), new.matrix(n // 2, n)


def eigen(new, n):
    """With bases that are not orthogonal: the products take as long."""
    return KroneckerEigen(new.spd(n), new.spd(n // 2), new.positive(n // 2, n)), new.matrix(n // 2, n)


def gradients(new, n, count, rows=1):
    return OuterProduct(new.matrix(count, n // 2, rows), new.matrix(count, n, rows))


def with_gradients(make):
    """Few queries and many examples, each of one row g aᵀ."""
    return lambda new, n: (make(new, n)[0], gradients(new, n, QUERIES), gradients(new, n, EXAMPLES))


def flat(V):
    return (V.L * V.R.mT).reshape(len(V.L), -1)


def pair(new, n):
    """C and D are small beside A and B, so that the Smith iteration converges."""
    m = n // 2
    return KroneckerPair(new.spd(n), new.spd(m), 0.02 * new.spd(n), 0.02 * new.spd(m)), new.matrix(m, n)


def shifted_inverse(by, P, V):
    (a, Q_A), (c, Q_B) = by.eigh(P.A), by.eigh(P.B)
    return Q_A, Q_B, 1 / (c[:, None] * a + 0.1)


def squares(K):
    """The squared norms of the columns."""
    return (K * K).sum(0)


def in_basis(K_A, K_B, weights, V):
    return K_B @ ((K_B.mT @ V @ K_A) * weights) @ K_A.mT


def basis_dense(by, P, V):
    K = by.xp.kron(P.K_A, P.K_B)
    return (K * P.weights.mT.reshape(-1)) @ K.mT


def eigen_dense(by, P, V):
    Q = by.xp.kron(P.Q_A, P.Q_B)
    return (Q * P.eigenvalues.mT.reshape(-1)) @ Q.mT


def by_square(x):
    return x * x


def diagonalised(by, M, N):
    """K and s with Kᵀ M K = I, Kᵀ N K = diag(s)."""
    L = by.cholesky(M)
    s, E = by.eigh(by.substitution(L, by.substitution(L, N).mT))
    return by.substitution(L, E, trans=1), s


def gram_in_basis(K_A, K_B, weights, U, V):
    x, y = (((W.L[..., 0] @ K_B)[:, :, None] * (W.R[..., 0] @ K_A)[:, None, :]) for W in (U, V))
    return x.reshape(len(x), -1) @ (weights * y).reshape(len(y), -1).mT


def products_gram(A, B, U, V):
    """(g_iᵀ B g_j)(a_iᵀ A a_j)."""
    return (U.L[..., 0] @ (V.L[..., 0] @ B.mT).mT) * (U.R[..., 0] @ (V.R[..., 0] @ A.mT).mT)


def pair_inverse(by, P, V):
    (K_A, s), (K_B, t) = diagonalised(by, P.A, P.C), diagonalised(by, P.B, P.D)
    return K_A, K_B, 1 / (1 + t[:, None] * s)


def pair_logdet(by, P, V):
    """m log det A + n log det B + Σ log(1 + s_A s_B): eigenvalues alone."""
    logs, values = 0.0, []
    for M, N, count in ((P.A, P.C, len(P.B)), (P.B, P.D, len(P.A))):
        L = by.cholesky(M)
        logs += 2 * count * by.xp.log(by.xp.diagonal(L)).sum()
        values.append(by.eigvalsh(by.substitution(L, by.substitution(L, N).mT)))
    return logs + by.xp.log(1 + values[1][:, None] * values[0]).sum()


def smith(by, P, V):
    U = by.solve(P.A, by.solve(P.B, V).mT).mT
    F, H, sign = by.solve(P.B, P.D), by.solve(P.A, P.C.mT).mT, -1
    for _ in range(SQUARINGS):
        U, F, H, sign = U + sign * (F @ U @ H), F @ F, H @ H, 1
    return U


def diagonals(by, *Ms):
    return [by.xp.diagonal(M) for M in Ms]


OPERATIONS = {
    **operations(
        "Kronecker.",
        layer,
        {
            "__matmul__": (lambda P, V: P @ V, lambda by, P, V: P.B @ V @ P.A.mT),
            "apply": (lambda P, V: P.apply(V), lambda by, P, V: P.B @ V @ P.A.mT),
            "inverse": (lambda P, V: P.inverse(), lambda by, P, V: (by.inverse(P.A), by.inverse(P.B))),
            "inverse cholesky": (
                lambda P, V: P.inverse(method="cholesky"),
                lambda by, P, V: (by.cholesky(P.A), by.cholesky(P.B)),
            ),
            "solve": (lambda P, V: P.solve(V), lambda by, P, V: by.solve(P.A, by.solve(P.B, V).mT).mT),
            "logdet": (
                lambda P, V: P.logdet(),
                lambda by, P, V: len(P.B) * by.log_det(P.A) + len(P.A) * by.log_det(P.B),
            ),
            "trace": (lambda P, V: P.trace(), lambda by, P, V: P.A.trace() * P.B.trace()),
            "diagonal": (lambda P, V: P.diagonal(), lambda by, P, V: by.xp.outer(*diagonals(by, P.B, P.A))),
        },
    ),
    **operations(
        "Kronecker.",
        layer,
        {
            "inverse_root": (lambda P, V: P.inverse_root(2), lambda by, P, V: (root(by, P.A), root(by, P.B))),
            "shifted_inverse": (lambda P, V: P.shifted_inverse(0.1), shifted_inverse),
            "eigh": (lambda P, V: P.eigh(), lambda by, P, V: (by.eigh(P.A), by.eigh(P.B))),
        },
        **EIGENVALUES,
    ),
    **operations(
        "Kronecker.",
        outer,
        {
            "apply_outer": (lambda P, V: P.apply_outer(V.L, V.R), lambda by, P, V: (P.B @ V.L) @ (P.A @ V.R).mT),
            "__matmul__ OuterProduct": (lambda P, V: P @ V, lambda by, P, V: (P.B @ V.L) @ (P.A @ V.R).mT),
        },
    ),
    "OuterProduct.to_dense": Operation(outer, lambda P, V: V.to_dense(), lambda by, P, V: V.L @ V.R.mT),
    **operations(
        "KroneckerBasis.",
        basis,
        {
            "__matmul__": (lambda P, V: P @ V, lambda by, P, V: in_basis(P.K_A, P.K_B, P.weights, V)),
            "apply": (lambda P, V: P.apply(V), lambda by, P, V: in_basis(P.K_A, P.K_B, P.weights, V)),
            "inverse": (lambda P, V: P.inverse(), lambda by, P, V: (by.inv(P.K_A), by.inv(P.K_B), 1 / P.weights)),
            "solve": (
                lambda P, V: P.solve(V),
                lambda by, P, V: in_basis(by.inv(P.K_A).mT, by.inv(P.K_B).mT, 1 / P.weights, V),
            ),
            "logdet": (
                lambda P, V: P.logdet(),
                lambda by, P, V: (
                    2 * (len(P.K_B) * by.log_abs_det(P.K_A) + len(P.K_A) * by.log_abs_det(P.K_B))
                    + by.xp.log(P.weights).sum()
                ),
            ),
            "trace": (lambda P, V: P.trace(), lambda by, P, V: squares(P.K_B) @ P.weights @ squares(P.K_A)),
            "diagonal": (
                lambda P, V: P.diagonal(),
                lambda by, P, V: (P.K_B * P.K_B) @ P.weights @ (P.K_A * P.K_A).mT,
            ),
        },
    ),
    **operations(
        "KroneckerEigen.",
        eigen,
        {
            "__matmul__": (lambda P, V: P @ V, lambda by, P, V: in_basis(P.Q_A, P.Q_B, P.eigenvalues, V)),
            "apply": (lambda P, V: P.apply(V), lambda by, P, V: in_basis(P.Q_A, P.Q_B, P.eigenvalues, V)),
            "solve": (lambda P, V: P.solve(V), lambda by, P, V: in_basis(P.Q_A, P.Q_B, 1 / P.eigenvalues, V)),
            "diagonal": (
                lambda P, V: P.diagonal(),
                lambda by, P, V: (P.Q_B * P.Q_B) @ P.eigenvalues @ (P.Q_A * P.Q_A).mT,
            ),
            "inverse": (lambda P, V: P.inverse().eigenvalues, lambda by, P, V: 1 / P.eigenvalues),
            "shifted": (lambda P, V: P.shifted(0.1).eigenvalues, lambda by, P, V: P.eigenvalues + 0.1),
            "power": (lambda P, V: P.power(-0.5).eigenvalues, lambda by, P, V: P.eigenvalues**-0.5),
            "map": (lambda P, V: P.map(by_square).eigenvalues, lambda by, P, V: P.eigenvalues * P.eigenvalues),
            "logdet": (lambda P, V: P.logdet(), lambda by, P, V: by.xp.log(P.eigenvalues).sum()),
            "trace": (lambda P, V: P.trace(), lambda by, P, V: P.eigenvalues.sum()),
        },
    ),
    **operations(
        "",
        with_gradients(layer),
        {"Kronecker.gram": (lambda P, U, V: P.gram(U, V), lambda by, P, U, V: products_gram(P.A, P.B, U, V))},
    ),
    **operations(
        "",
        with_gradients(basis),
        {
            "KroneckerBasis.gram": (
                lambda P, U, V: P.gram(U, V),
                lambda by, P, U, V: gram_in_basis(P.K_A, P.K_B, P.weights, U, V),
            )
        },
    ),
    **operations(
        "",
        with_gradients(eigen),
        {
            "KroneckerEigen.gram": (
                lambda P, U, V: P.gram(U, V),
                lambda by, P, U, V: gram_in_basis(P.Q_A, P.Q_B, P.eigenvalues, U, V),
            )
        },
    ),
    **operations(
        "",
        with_gradients(pair),
        {
            "KroneckerPair.gram": (
                lambda P, U, V: P.gram(U, V),
                lambda by, P, U, V: products_gram(P.A, P.B, U, V) + products_gram(P.C, P.D, U, V),
            )
        },
    ),
    **operations(
        "KroneckerPair.",
        pair,
        {
            "__matmul__": (lambda P, V: P @ V, lambda by, P, V: P.B @ V @ P.A.mT + P.D @ V @ P.C.mT),
            "apply": (lambda P, V: P.apply(V), lambda by, P, V: P.B @ V @ P.A.mT + P.D @ V @ P.C.mT),
            "inverse": (lambda P, V: P.inverse(), pair_inverse),
            "solve": (lambda P, V: P.solve(V), lambda by, P, V: in_basis(*pair_inverse(by, P, V), V)),
            "solve smith": (lambda P, V: P.solve(V, "smith"), smith),
            "logdet": (lambda P, V: P.logdet(), pair_logdet),
            "trace": (
                lambda P, V: P.trace(),
                lambda by, P, V: P.A.trace() * P.B.trace() + P.C.trace() * P.D.trace(),
            ),
            "diagonal": (
                lambda P, V: P.diagonal(),
                lambda by, P, V: by.xp.outer(*diagonals(by, P.B, P.A)) + by.xp.outer(*diagonals(by, P.D, P.C)),
            ),
        },
        **EIGENVALUES,
    ),
    "Kronecker.to_dense": Operation(layer, lambda P, V: P.to_dense(), lambda by, P, V: by.xp.kron(P.A, P.B), **SMALL),
    "KroneckerBasis.to_dense": Operation(basis, lambda P, V: P.to_dense(), basis_dense, **SMALL),
    "KroneckerEigen.to_dense": Operation(eigen, lambda P, V: P.to_dense(), eigen_dense, **SMALL),
    "KroneckerPair.to_dense": Operation(
        pair, lambda P, V: P.to_dense(), lambda by, P, V: by.xp.kron(P.A, P.B) + by.xp.kron(P.C, P.D), **SMALL
    ),
    "OuterProduct.pays": Operation(
        lambda new, n: (),
        lambda: OuterProduct.pays((64, 64), 32),
        lambda by: 32 * 3 * 64 * 64 < 64 * 64 * 128,
        sizes=(64,),
        backends=("numpy",),
        dtypes=("float32",),
    ),
}
