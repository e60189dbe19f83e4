"""F, F̃, F̆ and F̂ of the middle layers of a small classifier as dense matrices (Sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kfaclinalg import (
    BlockDiagonal,
    Kronecker,
    LayerFactors,
    batch_factors,
    block_diagonal_inverse,
    block_tridiagonal_inverse,
    factored_tikhonov,
    homogeneous,
)

MIDDLE = slice(1, 5)  # weight layers 2 ... 5


class Rows(NamedTuple):
    """ā_{i-1} (NC, n_i) and g_i (NC, m_i) of layers i = 2 ... 5; a row is one digit with one class as its target.

    g carries √(C p), p the model's probability of the class, so that a plain mean over rows of what has two g in it is
    the expectation over digits and the model's own targets.
    """

    a: list[np.ndarray]
    g: list[np.ndarray]

    @property
    def sizes(self) -> list[int]:
        """n_i m_i, of the blocks."""
        return [a_i.shape[1] * g_i.shape[1] for a_i, g_i in zip(*self, strict=True)]


def enumerate_targets(weights: tuple[np.ndarray, ...], digits: np.ndarray) -> Rows:
    """Algorithm 1 for every digit and class, with tanh in every layer but the last."""
    a = [homogeneous(digits)]
    for W in weights[:-1]:
        a.append(homogeneous(np.tanh(a[-1] @ W.T)))
    z = a[-1] @ weights[-1].T
    N, C = z.shape
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    a = [np.repeat(a_i, C, axis=0) for a_i in a]
    Dz = np.repeat(p, C, axis=0) - np.tile(np.eye(C), (N, 1))
    g = [np.sqrt(C * p.reshape(-1, 1)) * Dz]
    for W, a_i in zip(weights[:0:-1], a[:0:-1], strict=True):  # layers l, ..., 2: tanh' = 1 - a²
        g.insert(0, g[0] @ W[:, :-1] * (1 - a_i[:, :-1] ** 2))
    return Rows(a[MIDDLE], g[MIDDLE])


def block_matrix(rows: Rows) -> np.ndarray:
    """E[a_i a_jᵀ] ⊗ E[g_i g_jᵀ] for all pairs of layers (eqn 1)."""
    a, g = rows
    N, layers = len(a[0]), range(len(a))
    return np.block([[np.kron(a[i].T @ a[j] / N, g[i].T @ g[j] / N) for j in layers] for i in layers])


class Fisher(NamedTuple):
    F: np.ndarray
    F_tilde: np.ndarray
    bound: np.ndarray  # on |F - F̃| (eqn 4)
    residual: float  # of eqn 3, against max |F|


def fisher_matrices(rows: Rows) -> Fisher:
    """F = E[Dθ Dθᵀ] with Dθ = ā ⊗ g, F̃, and the cumulants that F - F̃ is a sum of.

    E[g] = 0 whatever a is. So with ã = a - E[a] all other terms of the cumulants vanish, and they are

        κ(a1, a2, g1, g2) = E[ã1 ã2 g1 g2] - E[ã1 ã2] E[g1 g2],    κ(a2, g1, g2) = E[ã2 g1 g2].
    """
    N = len(rows.a[0])
    means = [a_i.mean(axis=0) for a_i in rows.a]
    centred = Rows([a_i - mean for a_i, mean in zip(rows.a, means, strict=True)], rows.g)
    F, F_centred, g_F = 0.0, 0.0, 0.0
    for part in tqdm(np.array_split(np.arange(N), 20), desc="Fisher", leave=False):
        D, D_centred = derivatives(rows, part), derivatives(centred, part)
        F += D.T @ D / N
        F_centred += D_centred.T @ D_centred / N  # E[ã1 ã2 g1 g2]
        g_F += np.hstack([g_i[part] for g_i in rows.g]).T @ D_centred / N  # E[g1 ã2 g2]
    F_tilde = block_matrix(rows)
    kappa4 = F_centred - block_matrix(centred)
    layers = np.split(g_F, np.cumsum([g_i.shape[1] for g_i in rows.g])[:-1])
    # E[a1] κ(a2, g1, g2)
    kappa3 = np.vstack([np.kron(mean[:, None], T) for mean, T in zip(means, layers, strict=True)])
    residual = np.abs(F - F_tilde - (kappa4 + kappa3 + kappa3.T)).max() / np.abs(F).max()
    return Fisher(F, F_tilde, np.abs(kappa4) + np.abs(kappa3) + np.abs(kappa3.T), float(residual))


def derivatives(rows: Rows, part: np.ndarray) -> np.ndarray:
    """Dθ, the vec(g aᵀ) = a ⊗ g of all layers side by side, one row each."""
    pairs = ((a_i[part, :, None], g_i[part, None, :]) for a_i, g_i in zip(*rows, strict=True))
    return np.hstack([(a_i * g_i).reshape(len(part), -1) for a_i, g_i in pairs])


class Matrices(NamedTuple):
    """F and F̃ with the same damping; F̆ and F̂, whose inverses are block-diagonal and -tridiagonal. Or the inverses."""

    exact: np.ndarray
    tilde: np.ndarray
    check: np.ndarray
    hat: np.ndarray


def inverses(rows: Rows, fisher: Fisher, gamma: float) -> Matrices:
    """The four inverses, those of F̆ and F̂ as the library makes them for the optimizer."""
    factors = batch_factors(*rows, links=True)
    damping = added_damping(factors.layers, gamma)
    return Matrices(
        exact=np.linalg.inv(fisher.F + damping),
        tilde=np.linalg.inv(fisher.F_tilde + damping),
        check=block_diagonal_inverse(factors, gamma).to_dense(),
        hat=block_tridiagonal_inverse(factors, gamma).to_dense(),
    )


def added_damping(layers: Sequence[LayerFactors], gamma: float) -> np.ndarray:
    """What factored Tikhonov damping adds to F̃, in the diagonal blocks only (Section 6.3)."""
    damped = BlockDiagonal(tuple(Kronecker(*factored_tikhonov(layer, gamma)) for layer in layers))
    return damped.to_dense() - BlockDiagonal(tuple(Kronecker(*layer) for layer in layers)).to_dense()


def distances(sizes: list[int]) -> np.ndarray:
    """|i - j| of the block that each entry is in."""
    layer = np.repeat(np.arange(len(sizes)), sizes)
    return np.abs(layer[:, None] - layer)


def averages(M: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The mean |entry| of each block."""
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(np.add.reduceat(np.abs(M), starts, axis=0), starts, axis=1)
    return sums / np.outer(sizes, sizes)


def relative(M: np.ndarray, truth: np.ndarray, where: np.ndarray | slice = slice(None)) -> float:
    """‖M - truth‖ / ‖truth‖ in the Frobenius norm, of the entries chosen."""
    return float(np.linalg.norm((M - truth)[where]) / np.linalg.norm(truth[where]))
