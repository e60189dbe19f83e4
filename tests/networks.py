"""Statistics of a small random network, and the dense matrices of Section 4 that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from backends import Backend

from kfaclinalg import Factors, LayerFactors, Link, testing

SIZES = [(5, 3), (3, 4), (4, 2), (3, 3)]  # (n, m) a layer: n above and below the next one's
N = 60


@dataclass
class Network:
    """Factors in a backend's arrays beside the dense blocks A_ij ⊗ G_ij of F̃, those on the diagonal damped."""

    factors: Factors
    blocks: list[list[np.ndarray]]  # F̃_ij
    Vs: list[np.ndarray]

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *(n * m for n, m in SIZES)])

    @property
    def F(self) -> np.ndarray:
        return np.block(self.blocks)

    @property
    def v(self) -> np.ndarray:
        return np.concatenate([testing.vec(V) for V in self.Vs])

    def slice(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i + 1])


def network(b: Backend, gamma: float, *, seed: int = 0) -> Network:
    """Inputs and gradients that are correlated from layer to layer, as a network's are; π of the traces."""
    rng = np.random.default_rng(seed)
    common_a, common_g = rng.standard_normal((N, 3)), rng.standard_normal((N, 3))
    a, g = (
        [rng.standard_normal((N, size[side])) + common @ rng.standard_normal((3, size[side])) for size in SIZES]
        for side, common in ((0, common_a), (1, common_g))
    )
    A, G = ([[(x.T @ y / N).astype(b.dtype).astype(float) for y in side] for x in side] for side in (a, g))
    layers = tuple(LayerFactors(b.array(A[i][i]), b.array(G[i][i])) for i in range(len(SIZES)))
    links = tuple(Link(b.array(A[i][i + 1]), b.array(G[i][i + 1])) for i in range(len(SIZES) - 1))
    for i, (n, m) in enumerate(SIZES):
        pi = np.sqrt(np.trace(A[i][i]) / n) / np.sqrt(np.trace(G[i][i]) / m)
        A[i][i] = A[i][i] + pi * gamma * np.eye(n)
        G[i][i] = G[i][i] + gamma / pi * np.eye(m)
    blocks = [[np.kron(A[i][j], G[i][j]) for j in range(len(SIZES))] for i in range(len(SIZES))]
    Vs = [rng.standard_normal((m, n)).astype(b.dtype).astype(float) for n, m in SIZES]
    return Network(Factors(layers, links), blocks, Vs)


def pairwise_joint_inverse(net: Network) -> np.ndarray:
    """F̂⁻¹ as the sum of the inverses of neighbouring pairs' joint covariances, less those of the inner layers.

    The precision matrix of a Gaussian chain; it shares nothing with Ξᵀ Λ Ξ.
    """
    F, total = net.F, np.zeros_like(net.F)
    last = len(SIZES) - 1
    for i in range(last):
        pair = slice(net.starts[i], net.starts[i + 2])
        total[pair, pair] += np.linalg.inv(F[pair, pair])
    for i in range(1, last):
        total[net.slice(i), net.slice(i)] -= np.linalg.inv(F[net.slice(i), net.slice(i)])
    return total
