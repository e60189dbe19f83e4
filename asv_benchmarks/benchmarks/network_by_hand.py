"""What the operations of a whole network are given, and the same by hand."""

from itertools import pairwise

import numpy as np

import kfaclinalg as kf

from .dense import subspace
from .operators import basis_dense, in_basis

LAYERS = 3  # each with n inputs and n/2 outputs
GAMMA, DECAY = 0.3, 0.95


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


def batches(new, n):
    """What a quadratic form takes: eight of each matrix."""
    return blocks(new, n)[0], tuple(new.matrix(8, n // 2, n) for _ in range(LAYERS))


def gram(U, V):
    return U.reshape(len(U), -1) @ V.reshape(len(U), -1).mT


def members(new, n):
    """A batch of operators, of which `DirectSum` makes one."""
    A, B = ([new.spd(d) for _ in range(8)] for d in (n, n // 2))
    return kf.DirectSum(kf.Kronecker(np.stack(A), np.stack(B))), new.matrix(8, n // 2, n)


def diagonals(M):
    i = np.arange(M.shape[-1])
    return M[:, i, i]


def traces(M):
    return diagonals(M).sum(-1)


def outer_diagonals(by, P, V):
    return diagonals(P.members.B)[:, :, None] * diagonals(P.members.A)[:, None, :]


def logdets(by, P, V):
    (m, n), logs = P.members.shape, [by.xp.log(diagonals(by.la.cholesky(M))).sum() for M in (P.members.A, P.members.B)]
    return 2 * (m * logs[0] + n * logs[1])


def dense_members(by, P, V):
    blocks = [by.xp.kron(A, B) for A, B in zip(P.members.A, P.members.B, strict=True)]
    rows = [[K if i == j else by.xp.zeros_like(K) for j in range(len(blocks))] for i, K in enumerate(blocks)]
    return by.xp.concatenate([by.xp.concatenate(row, 1) for row in rows], 0)


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


def spectra(by, F):
    """Eigenvalues of every layer, in the eigenvectors of its sides."""
    pairs = [[by.eigh(M) for M in layer] for layer in F.layers]
    return [(Q_A, Q_G, by.xp.outer(g, a)) for (a, Q_A), (g, Q_G) in pairs]


def shifted_reciprocals(by, F):
    return [1 / (Q.eigenvalues + GAMMA**2) for Q in F]


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
