"""The approximation of a layer's block by a Kronecker product (eqns 1 and 2), and its error (eqns 3 and 4)."""

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


@pytest.mark.parametrize("targets", ["of the model", "others"])
def test_the_error_is_a_sum_of_cumulants_where_the_targets_are_the_models(targets):
    """Eqn 3: κ(a, a', g, g') + κ(a) κ(a', g, g') + κ(a') κ(a, g, g'). It needs E[g | x] = 0 (Lemma 4)."""
    rng = np.random.default_rng(0)
    a, v = rng.standard_normal((6, 4)) + 1, rng.standard_normal((6, 3))  # of six inputs; g is (p - y) v
    p = np.array([0.25, 0.5, 0.75, 0.25, 0.5, 0.75])
    y = np.arange(4) < 4 * (p if targets == "of the model" else 1 - p)[:, None]  # four targets of each input
    a, g = np.repeat(a, 4, axis=0), ((p[:, None] - y)[:, :, None] * v[:, None]).reshape(24, 3)
    A, G = batch_factors([a], [g]).layers[0]
    error = (block(a, g) - Kronecker(A, G).to_dense()).reshape(4, 3, 4, 3)

    mean, b, c = a.mean(axis=0), a - a.mean(axis=0), g - g.mean(axis=0)
    aa, ag, gg = b.T @ b / 24, b.T @ c / 24, c.T @ c / 24  # second cumulants
    third = np.einsum("ni,nk,nl->ikl", b, c, c) / 24
    fourth = np.einsum("ni,nk,nj,nl->ikjl", b, c, b, c) / 24 - np.einsum("ij,kl->ikjl", aa, gg)
    fourth -= np.einsum("ik,jl->ikjl", ag, ag) + np.einsum("il,jk->ikjl", ag, ag)
    terms = fourth, np.einsum("i,jkl->ikjl", mean, third), np.einsum("j,ikl->ikjl", mean, third)
    holds = np.allclose(error, sum(terms), rtol=0, atol=1e-14)
    assert holds == (targets == "of the model")
    assert np.abs(error).max() > 0.1
    if holds:  # eqn 4
        assert (np.abs(error) <= sum(map(np.abs, terms)) + 1e-14).all()
