"""The gradient of a mini-batch has rank m: G⁻¹ (1/m g aᵀ) A⁻¹ from the batch's own a and g."""

import numpy as np
from backends import uncompiled_backends
from networks import network

from kfaclinalg import Kronecker, OuterProduct, testing


@uncompiled_backends
def test_the_low_rank_form_of_the_preconditioned_gradient(b):
    layer = network(b, 0.0).factors.layers[0]
    rng = np.random.default_rng(0)
    a, g = rng.standard_normal((7, 5)), rng.standard_normal((7, 3))  # rows are examples
    inverse = Kronecker(*layer).inverse()
    gradient = OuterProduct(b.array(g.T / 7), b.array(a.T))
    low_rank = b.numpy(inverse @ gradient)
    A, G = map(b.numpy, layer)
    exact = np.linalg.solve(G, g.T @ a / 7) @ np.linalg.inv(A)
    bound = testing.inverse_bound(np.linalg.cond(A) * np.linalg.cond(G), b.eps)
    np.testing.assert_allclose(low_rank, exact, atol=bound * np.linalg.norm(exact))
    np.testing.assert_allclose(b.numpy(gradient.to_dense()), g.T @ a / 7, atol=10 * b.eps)
    assert gradient.shape == (3, 5)
