"""The block-diagonal approximation F̆ of F̃."""

import numpy as np
from backends import uncompiled_backends
from matrices import judge
from networks import network

from kfaclinalg import block_diagonal_inverse, testing


@uncompiled_backends
def test_the_inverse_is_that_of_each_diagonal_block(b):
    """U_i = G_i⁻¹ V_i A_i⁻¹ solves F̃_ii vec(U_i) = vec(V_i)."""
    net = network(b, 0.0)
    Us = block_diagonal_inverse(net.factors, 0.0) @ tuple(map(b.array, net.Vs))
    for i, (U, V) in enumerate(zip(Us, net.Vs, strict=True)):
        block = net.blocks[i][i]
        error = testing.backward_error(block, testing.vec(b.numpy(U)), testing.vec(V))
        judge(b, "4.2", error, testing.inverse_bound(np.linalg.cond(block), b.eps))
