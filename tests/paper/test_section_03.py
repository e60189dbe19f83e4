"""The approximation of a layer's block by a Kronecker product (eqns 1 and 2)."""

import numpy as np
import pytest
from backends import uncompiled_backends

from kfaclinalg import Kronecker, batch_factors, testing


def block(a, g):
    """E[vec(g aᵀ) vec(g aᵀ)ᵀ], example by example."""
    rows = [testing.vec(np.outer(g_i, a_i)) for a_i, g_i in zip(a, g, strict=True)]
    return sum(np.outer(row, row) for row in rows) / len(rows)


@uncompiled_backends
@pytest.mark.parametrize("independent", [True, False])
def test_the_block_is_a_kronecker_product_where_inputs_and_gradients_are_independent(b, independent):
    """A ⊗ G is the block itself if every input comes with every gradient, and not if each comes with its own."""
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    if independent:
        a, g = np.repeat(a, 6, axis=0), np.tile(g, (6, 1))
    a, g = (x.astype(b.dtype).astype(float) for x in (a, g))
    A, G = batch_factors([b.array(a)], [b.array(g)]).layers[0]
    exact, product = block(a, g), b.numpy(Kronecker(A, G).to_dense())
    error = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    assert error <= 10 * len(a) * b.eps if independent else error > 0.1
