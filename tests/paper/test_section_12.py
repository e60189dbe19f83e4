"""Heskes' interpretation: F̆ is the curvature of a metric on each layer's outputs."""

import numpy as np
from backends import uncompiled_backends
from networks import network

from kfaclinalg import BlockDiagonal, Factors, Kronecker, batch_factors, block_diagonal_inverse


@uncompiled_backends
def test_the_metric_of_section_12(b):
    """D(θ', θ) = ½ Σ_i E[(s_i - s_i')ᵀ G_i (s_i - s_i')] = ½ δᵀ F̆ δ, with s_i = W_i a_i."""
    rng = np.random.default_rng(0)
    N, sizes = 9, [(4, 3), (3, 5)]
    a, g = ([rng.standard_normal((N, size[k])).astype(b.dtype).astype(float) for size in sizes] for k in (0, 1))
    Ws, others = ([rng.standard_normal((m, n)) for n, m in sizes] for _ in range(2))
    D = 0.0
    for a_i, g_i, W, other in zip(a, g, Ws, others, strict=True):
        G = g_i.T @ g_i / N
        D += sum((W @ x - other @ x) @ G @ (W @ x - other @ x) for x in a_i) / (2 * N)
    factors = batch_factors([b.array(x) for x in a], [b.array(x) for x in g])
    deltas = tuple(b.array(other - W) for W, other in zip(Ws, others, strict=True))
    products = BlockDiagonal(tuple(Kronecker(A, G) for A, G in factors.layers)) @ deltas
    half = sum(np.vdot(b.numpy(delta), b.numpy(U)) for delta, U in zip(deltas, products, strict=True)) / 2
    assert abs(half - D) <= 100 * N * b.eps * D


@uncompiled_backends
def test_the_update_is_the_steepest_for_its_length_in_that_metric(b):
    """Of all δ with the same D the one along F̆⁻¹∇h has the largest ∇hᵀδ, and its opposite lowers h most."""
    net, rng = network(b, 0.0), np.random.default_rng(1)
    layers = net.factors.layers
    F = BlockDiagonal(tuple(Kronecker(A, G) for A, G in layers))
    gradient = tuple(map(b.array, net.Vs))
    update = block_diagonal_inverse(Factors(layers), 0.0) @ gradient

    def slope(delta):
        """∇hᵀδ of δ scaled to D = ½."""
        d = [b.numpy(x) for x in delta]
        length = sum(np.vdot(x, b.numpy(y)) for x, y in zip(d, F @ delta, strict=True)) ** 0.5
        return sum(np.vdot(V, x) for V, x in zip(net.Vs, d, strict=True)) / length

    for _ in range(20):
        other = tuple(b.array(b.numpy(U) + 0.1 * rng.standard_normal(U.shape)) for U in update)
        assert slope(other) < slope(update)
    assert slope(gradient) < 0.9 * slope(update)
