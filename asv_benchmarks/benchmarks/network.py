"""What a whole network takes: statistics, damping, inverse curvature, block operators, the quadratic model."""

from itertools import pairwise

import kfaclinalg as kf

from .dense import subspace
from .operation import Operation, operations
from .operators import basis_dense, in_basis, shifted_inverse

LAYERS = 3  # each with n inputs and n/2 outputs
GAMMA, DECAY = 0.3, 0.95
SIZES = {"sizes": (64, 256, 512)}
NUMBERS = {"sizes": (1,), "backends": ("numpy",), "dtypes": ("float32",)}  # of Python


def batch(new, n):
    """Inputs and output gradients of n examples."""
    return [new.matrix(n, n) for _ in range(LAYERS)], [new.matrix(n, n // 2) for _ in range(LAYERS)]


def factors(new, n):
    """Those of 2n examples, the inputs of neighbouring layers correlated."""
    a, g = new.matrix(2 * n, n), new.matrix(2 * n, n // 2)
    inputs = [a + 0.5 * new.matrix(2 * n, n) for _ in range(LAYERS)]
    return kf.batch_factors(inputs, [g + 0.5 * new.matrix(2 * n, n // 2) for _ in range(LAYERS)], links=True)


def matrices(new, n):
    return tuple(new.matrix(n // 2, n) for _ in range(LAYERS))


def blocks(new, n):
    return kf.BlockDiagonal(tuple(kf.Kronecker(new.spd(n), new.spd(n // 2)) for _ in range(LAYERS))), matrices(new, n)


def tridiagonal(new, n):
    return kf.block_tridiagonal_inverse(factors(new, n), GAMMA), matrices(new, n)


def each(f):
    """The floor of a block operator, from that of one block."""
    return lambda by, P, Vs: [f(by, block, V) for block, V in zip(P.blocks, Vs, strict=True)]


def total(f):
    return lambda by, P, Vs: sum(each(f)(by, P, Vs))


def dense_blocks(by, P, Vs):
    blocks = [by.xp.kron(block.A, block.B) for block in P.blocks]
    rows = [[K if i == j else by.xp.zeros_like(K) for j in range(LAYERS)] for i, K in enumerate(blocks)]
    return by.xp.concatenate([by.xp.concatenate(row, 1) for row in rows], 0)


def damped(by, layer, pi=None):
    A, G = layer
    pi = (A.trace() / len(A) / (G.trace() / len(G))) ** 0.5 if pi is None else pi
    return by.shifted(A, GAMMA * pi), by.shifted(G, GAMMA / pi)


def block_diagonal(by, F):
    return [[by.inverse(M) for M in damped(by, layer)] for layer in F.layers]


def conditional(by, M, above, X):
    """Psi, K and s of one side of a layer given the next."""
    L, L_above = by.cholesky(M), by.cholesky(above)
    Y = by.substitution(L_above, X.mT)
    R = by.substitution(L, Y.mT)
    s, E = by.eigh(R @ R.mT)
    return by.substitution(L_above, Y, trans=1).mT, by.substitution(L, E, trans=1), s


def block_tridiagonal(by, F):
    layers = [damped(by, layer) for layer in F.layers]
    found = []
    for (lower, upper), link in zip(pairwise(layers), F.links, strict=True):
        (Psi, K_A, s), (Phi, K_G, t) = (conditional(by, *side) for side in zip(lower, upper, link, strict=True))
        found.append((Psi, Phi, K_A, K_G, 1 / (1 - t[:, None] * s)))
    return found, [by.inverse(M) for M in layers[-1]]


def sweeps(by, P, Vs):
    """Ξᵀ Λ Ξ."""
    links = list(zip(P.Psi_A, P.Psi_G, strict=True))
    Us = [V - G @ above @ A.mT for V, above, (A, G) in zip(Vs, Vs[1:], links, strict=False)]
    Us = [in_basis(L.K_A, L.K_B, L.weights, U) for L, U in zip(P.Lambda, Us, strict=False)]
    Us.append(P.Lambda[-1].B @ Vs[-1] @ P.Lambda[-1].A)
    return [Us[0], *(U - G.mT @ below @ A for U, below, (A, G) in zip(Us[1:], Us, links, strict=False))]


def dense_tridiagonal(by, P, Vs):
    """Ξᵀ Λ Ξ of matrices on the stacked vec(V_i)."""
    *bases, last = P.Lambda
    Lambda = [*(basis_dense(by, block, None) for block in bases), by.xp.kron(last.A, last.B)]
    d = len(Lambda[0])
    Xi = [[by.xp.eye(d, dtype=Lambda[0].dtype) * (i == j) for j in range(LAYERS)] for i in range(LAYERS)]
    for i, (A, G) in enumerate(zip(P.Psi_A, P.Psi_G, strict=True)):
        Xi[i][i + 1] = -by.xp.kron(A, G)
    Xi = by.xp.concatenate([by.xp.concatenate(row, 1) for row in Xi], 0)
    rows = [Lambda[i] @ Xi[i * d : (i + 1) * d] for i in range(LAYERS)]
    return Xi.mT @ by.xp.concatenate(rows, 0)


def tridiagonal_logdet(by, P, Vs):
    *bases, last = P.Lambda
    logs = [
        2 * (len(L.K_B) * by.log_abs_det(L.K_A) + len(L.K_A) * by.log_abs_det(L.K_B)) + by.xp.log(L.weights).sum()
        for L in bases
    ]
    return sum(logs) + kronecker_logdet(by, last)


def kronecker_logdet(by, P):
    return len(P.B) * by.log_det(P.A) + len(P.A) * by.log_det(P.B)


def low_rank_inverse(by, F, Xs):
    """Subspace iteration on every side, then Woodbury."""
    found = []
    for M, X in zip((M for layer in F.layers for M in layer), Xs, strict=True):
        U, s = subspace(by, M, X)
        found.append((by.substitution(by.cholesky(by.shifted(U.mT @ U, 1)), U.mT), s))
    return found


def fit(by, F, D, slopes):
    c = -by.la.solve(F + 0.1 * D, slopes)
    return c, 0.5 * (slopes @ c)


def moments(by, a, g):
    return [by.moment(x) for pair in zip(a, g, strict=True) for x in pair]


def links(a, g):
    neighbours = zip(pairwise(a), pairwise(g), strict=True)
    return [x.mT @ y / len(x) for sides in neighbours for x, y in sides]


def mixed(by, F):
    return [DECAY * M + (1 - DECAY) * M for layer in F.layers for M in layer]


def norms(kind):
    """π by that norm."""
    size = {
        "frobenius": lambda by, M: by.la.norm(M) / len(M) ** 0.5,
        "spectral": lambda by, M: by.eigvalsh(M)[-1],
        "trace": lambda by, M: M.trace() / len(M),
    }[kind]

    def floor(by, layer):
        return (size(by, layer[0]) / size(by, layer[1])) ** 0.5

    return lambda layer: kf.tikhonov_pi(layer, norm=kind), floor


OPERATIONS = {
    **operations(
        "",
        batch,
        {
            "homogeneous": (
                lambda a, g: kf.homogeneous(a[0]),
                lambda by, a, g: by.xp.concatenate([a[0], by.xp.ones_like(a[0][:, :1])], 1),
            ),
            "batch_factors": (kf.batch_factors, moments),
            "batch_factors links": (
                lambda a, g: kf.batch_factors(a, g, links=True),
                lambda by, a, g: (moments(by, a, g), links(a, g)),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (kf.Factors(factors(new, n).layers), *batch(new, n)),
        {
            "update_factors": (
                lambda F, a, g: kf.update_factors(F, a, g, decay=DECAY),
                lambda by, F, a, g: [
                    by.updated(DECAY, C, x)
                    for layer, *pair in zip(F.layers, a, g, strict=True)
                    for C, x in zip(layer, pair, strict=True)
                ],
            ),
            "moving_average": (
                lambda F, a, g: kf.moving_average(F, F, decay=DECAY),
                lambda by, F, a, g: mixed(by, F),
            ),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (factors(new, n).layers[0],),
        {
            **{f"tikhonov_pi {kind}": norms(kind) for kind in ("trace", "frobenius", "spectral")},
            "factored_tikhonov": (lambda layer: kf.factored_tikhonov(layer, GAMMA), damped),
        },
        **SIZES,
    ),
    **operations(
        "",
        lambda new, n: (factors(new, n),),
        {
            "block_diagonal_inverse": (lambda F: kf.block_diagonal_inverse(F, GAMMA), block_diagonal),
            "block_tridiagonal_inverse": (lambda F: kf.block_tridiagonal_inverse(F, GAMMA), block_tridiagonal),
            "exactly_damped_inverse": (
                lambda F: kf.exactly_damped_inverse(F, 0.1),
                lambda by, F: [shifted_inverse(by, kf.Kronecker(*layer), None) for layer in F.layers],
            ),
        },
        **SIZES,
    ),
    "low_rank_inverse": Operation(
        lambda new, n: (
            factors(new, n),
            [new.matrix(d, n // 8 + 5) for _ in range(LAYERS) for d in (n, n // 2)],
        ),
        lambda F, _: kf.low_rank_inverse(F, GAMMA, rank=len(F.layers[0].A) // 8),
        low_rank_inverse,
        **SIZES,
    ),
    **operations(
        "BlockDiagonal.",
        blocks,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "apply": (lambda P, Vs: P.apply(Vs), each(lambda by, P, V: P.B @ V @ P.A.mT)),
            "inverse": (lambda P, Vs: P.inverse(), each(lambda by, P, V: (by.inverse(P.A), by.inverse(P.B)))),
            "solve": (lambda P, Vs: P.solve(Vs), each(lambda by, P, V: by.solve(P.A, by.solve(P.B, V).mT).mT)),
            "logdet": (lambda P, Vs: P.logdet(), total(lambda by, P, V: kronecker_logdet(by, P))),
            "trace": (lambda P, Vs: P.trace(), total(lambda by, P, V: P.A.trace() * P.B.trace())),
            "diagonal": (
                lambda P, Vs: P.diagonal(),
                each(lambda by, P, V: by.xp.outer(by.xp.diagonal(P.B), by.xp.diagonal(P.A))),
            ),
        },
        **SIZES,
    ),
    "BlockDiagonal.to_dense": Operation(blocks, lambda P, Vs: P.to_dense(), dense_blocks, sizes=(8, 16)),
    **operations(
        "BlockTridiagonalInverse.",
        tridiagonal,
        {
            "__matmul__": (lambda P, Vs: P @ Vs, sweeps),
            "apply": (lambda P, Vs: P.apply(Vs), sweeps),
            "logdet": (lambda P, Vs: P.logdet(), tridiagonal_logdet),
        },
        **SIZES,
    ),
    "BlockTridiagonalInverse.to_dense": Operation(
        tridiagonal, lambda P, Vs: P.to_dense(), dense_tridiagonal, sizes=(8, 16)
    ),
    "fit_quadratic": Operation(
        lambda new, n: (new.spd(n), new.spd(n), new.matrix(n)),
        lambda F, D, slopes: kf.fit_quadratic(F, D, slopes, 0.1),
        fit,
        sizes=(1, 2),
    ),
    "inner_products": Operation(
        lambda new, n: (matrices(new, n), matrices(new, n)),
        lambda x, y: kf.inner_products([x, y], [x, y]),
        lambda by, x, y: [
            sum(by.xp.vdot(X.reshape(-1), Y.reshape(-1)) for X, Y in zip(*pair, strict=True))
            for pair in ((x, x), (x, y), (y, x), (y, y))
        ],
    ),
    "averaging_decay": Operation(
        lambda new, n: (), lambda: kf.averaging_decay(7), lambda by: min(1 - 1 / 7, DECAY), **NUMBERS
    ),
    "reduction_ratio": Operation(
        lambda new, n: (), lambda: kf.reduction_ratio(3.0, 2.0, -2.0), lambda by: (2.0 - 3.0) / -2.0, **NUMBERS
    ),
    "levenberg_marquardt": Operation(
        lambda new, n: (),
        lambda: kf.levenberg_marquardt(1.0, 0.9, omega=0.5),
        lambda by: 0.5 * 1.0,
        **NUMBERS,
    ),
}
