"""The block-tridiagonal inverse F̂⁻¹ = Ξᵀ Λ Ξ, each of its parts against dense matrices."""

import numpy as np
import pytest
from backends import NUMPY, uncompiled_backends
from networks import SIZES, network

from kfaclinalg import block_tridiagonal_inverse, testing

GAMMA = 0.1
PAIRS = range(len(SIZES) - 1)


def parts(b):
    net = network(b, GAMMA)
    return net, block_tridiagonal_inverse(net.factors, GAMMA)


def tolerance(b, matrix):
    return testing.inverse_bound(np.linalg.cond(matrix), b.eps) * np.linalg.norm(matrix, 2)


@uncompiled_backends
@pytest.mark.parametrize("i", PAIRS)
def test_Psi(b, i):
    """Ψ_{i,i+1} = F̃_{i,i+1} F̃_{i+1,i+1}⁻¹ = Ψ^A ⊗ Ψ^G."""
    net, inverse = parts(b)
    Psi = np.kron(b.numpy(inverse.Psi_A[i]), b.numpy(inverse.Psi_G[i]))
    exact = np.linalg.solve(net.blocks[i + 1][i + 1].T, net.blocks[i][i + 1].T).T
    np.testing.assert_allclose(Psi, exact, atol=tolerance(b, net.blocks[i + 1][i + 1]))


@uncompiled_backends
@pytest.mark.parametrize("i", PAIRS)
def test_Sigma(b, i):
    """Σ_{i|i+1} = F̃_ii - Ψ F̃_{i+1,i+1} Ψᵀ: the Schur complement of the next layer in the pair's joint covariance."""
    net, inverse = parts(b)
    F = net.blocks
    Sigma = F[i][i] - F[i][i + 1] @ np.linalg.solve(F[i + 1][i + 1], F[i][i + 1].T)
    exact = np.linalg.inv(Sigma)
    np.testing.assert_allclose(b.numpy(inverse.Lambda[i].to_dense()), exact, atol=tolerance(b, exact))


@uncompiled_backends
def test_the_last_block_of_Lambda(b):
    net, inverse = parts(b)
    exact = np.linalg.inv(net.blocks[-1][-1])
    np.testing.assert_allclose(b.numpy(inverse.Lambda[-1].to_dense()), exact, atol=tolerance(b, exact))


@uncompiled_backends
def test_Xi_Lambda_Xi(b):
    """F̂⁻¹ from the dense Ξ and Λ of the definition."""
    net, inverse = parts(b)
    Xi = np.eye(len(net.F))
    Lambda = np.zeros_like(net.F)
    for i in range(len(SIZES)):
        Lambda[net.slice(i), net.slice(i)] = b.numpy(inverse.Lambda[i].to_dense())
    for i in PAIRS:
        Xi[net.slice(i), net.slice(i + 1)] = -np.kron(b.numpy(inverse.Psi_A[i]), b.numpy(inverse.Psi_G[i]))
    exact = Xi.T @ Lambda @ Xi
    applied = inverse @ tuple(map(b.array, net.Vs))
    u = np.concatenate([testing.vec(b.numpy(U)) for U in applied])
    np.testing.assert_allclose(u, exact @ net.v, atol=tolerance(b, exact) * np.linalg.norm(net.v))


def test_F_hat_agrees_with_F_tilde_on_the_tridiagonal_blocks_and_its_inverse_is_block_tridiagonal():
    """The two properties that define F̂."""
    net, inverse = parts(NUMPY)
    dense = inverse.to_dense()
    F_hat = np.linalg.inv(dense)
    for i in range(len(SIZES)):
        for j in range(len(SIZES)):
            if abs(i - j) <= 1:
                agrees = F_hat[net.slice(i), net.slice(j)]
                np.testing.assert_allclose(agrees, net.blocks[i][j], atol=tolerance(NUMPY, dense))
            else:
                assert (dense[net.slice(i), net.slice(j)] == 0).all()


def test_F_hat_is_not_F_tilde():
    """The premise of the test above: off the tridiagonal blocks they differ."""
    net, inverse = parts(NUMPY)
    far = (net.slice(0), net.slice(2))
    assert np.abs(np.linalg.inv(inverse.to_dense())[far] - net.F[far]).max() > 0.01
