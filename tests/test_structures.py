"""The structures against dense matrices, and Algorithm 2 with each of them."""

import numpy as np
import pytest

from kfaclinalg import (
    Diagonal,
    Eigen,
    Exact,
    Factored,
    Factors,
    KFACOptions,
    LayerFactors,
    Link,
    LowRank,
    Tridiagonal,
    batch_factors,
    kfac_step,
    moving_average,
)
from kfaclinalg_mlp import MLP, sparse_weights

rng = np.random.default_rng(0)
A, G, V = rng.normal(size=(50, 4)), rng.normal(size=(50, 3)), rng.normal(size=(3, 4))
LAYER = batch_factors([A], [G]).layers[0]
EMBEDDED = LayerFactors(Diagonal(np.asarray([0.5, 0.3, 0.2, 0.0])), LAYER.G)
STRUCTURES = [Factored(), Exact(), LowRank(3), Eigen(), Tridiagonal()]
by_name = {"ids": lambda structure: type(structure).__name__}


def dense(matrix):
    """(m n, m n) to what it does to V: vec stacks columns."""
    return (matrix @ V.T.reshape(-1)).reshape(4, 3).T


def inverse(structure, *layers, gamma):
    return structure.inverse(structure.fitted(Factors(layers), None), gamma)


def test_exact_adds_the_square_of_gamma_to_the_curvature():
    F = np.kron(LAYER.A, LAYER.G)
    expected = dense(np.linalg.inv(F + 0.3**2 * np.eye(12)))
    np.testing.assert_allclose((inverse(Exact(), LAYER, gamma=0.3) @ (V,))[0], expected, rtol=1e-12)


def test_what_rounding_leaves_below_zero_is_zero():
    nothing = LayerFactors(-1e-17 * np.eye(4), LAYER.G)
    np.testing.assert_allclose((inverse(Exact(), nothing, gamma=0.5) @ (V,))[0], 4 * V, rtol=1e-12)


@pytest.mark.parametrize("structure", [Exact(), Eigen(), LowRank(2)], **by_name)
def test_a_layer_with_a_diagonal_side_is_factored(structure):
    expected = inverse(Factored(), EMBEDDED, gamma=0.3) @ (V,)
    U = inverse(structure, EMBEDDED, LAYER, gamma=0.3) @ (V, V)
    np.testing.assert_array_equal(U[0], expected[0])


def test_eigen_has_the_second_moment_of_the_gradients_on_its_diagonal():
    structure = Eigen()
    (Q,) = fitted = structure.fitted(Factors((LAYER,)), None)
    gradients = np.einsum("im,in->imn", G, A)
    K = np.kron(Q.Q_A, Q.Q_B)
    F = sum(np.outer(v, v) for v in (g.T.reshape(-1) for g in gradients)) / len(A)
    squares = np.square(Q.Q_B.T @ gradients @ Q.Q_A).mean(0)
    (seen,) = structure.observed(fitted, [squares], decay=0.0)
    np.testing.assert_allclose(seen.eigenvalues.T.reshape(-1), np.diag(K.T @ F @ K), rtol=1e-12)
    expected = dense(K @ np.diag(1 / (np.diag(K.T @ F @ K) + 0.2**2)) @ K.T)
    np.testing.assert_allclose((structure.inverse((seen,), 0.2) @ (V,))[0], expected, rtol=1e-12)


def test_eigen_keeps_its_diagonal_when_the_basis_turns():
    structure, other = Eigen(), batch_factors([A[:20]], [G[:20]]).layers[0]
    old = structure.observed(structure.fitted(Factors((LAYER,)), None), [rng.uniform(size=(3, 4))], decay=0.0)
    (new,) = structure.fitted(Factors((other,)), old)
    K, L = (np.kron(Q.Q_A, Q.Q_B) for Q in (old[0], new))
    F = K @ np.diag(old[0].eigenvalues.T.reshape(-1)) @ K.T
    np.testing.assert_allclose(new.eigenvalues.T.reshape(-1), np.diag(L.T @ F @ L), rtol=1e-12)


def test_eigen_leaves_out_squares_that_overflowed():
    structure = Eigen()
    fitted = structure.fitted(Factors((LAYER,)), None)
    (seen,) = structure.observed(fitted, [np.full((3, 4), np.inf)], decay=0.5)
    np.testing.assert_array_equal(seen.eigenvalues, fitted[0].eigenvalues)
    assert structure.observed(fitted, [None], decay=0.5) == fitted


def test_low_rank_of_full_rank_is_factored():
    expected = inverse(Factored(), LAYER, gamma=0.3) @ (V,)
    np.testing.assert_allclose((inverse(LowRank(4), LAYER, gamma=0.3) @ (V,))[0], expected[0], rtol=1e-10)


def test_the_average_of_diagonals_is_one():
    new = LayerFactors(Diagonal(np.ones(4)), np.zeros((3, 3)))
    (layer,) = moving_average(Factors((EMBEDDED,)), Factors((new,)), decay=0.25).layers
    np.testing.assert_allclose(layer.A.d, 0.25 * EMBEDDED.A.d + 0.75)
    with pytest.raises(ValueError, match="expected"):
        moving_average(Factors((LAYER,)), Factors((new,)), decay=0.25)


@pytest.mark.parametrize("structure", STRUCTURES, **by_name)
def test_algorithm_2_trains_with_it(structure):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(256, 8))
    y = (np.square(x).sum(1) > 8).astype(int)
    mlp, state, losses = MLP(("tanh", "identity"), "categorical"), None, []
    weights = sparse_weights((8, 16, 2), rng=rng)
    for _ in range(40):
        problem = mlp.problem(x, y, rng=rng, statistics_fraction=1.0, curvature_fraction=1.0)
        weights, state, info = kfac_step(problem, weights, state, KFACOptions(structure, damping=0.1))
        assert not info.refused
        losses.append(info.loss)
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize(("short", "structure"), [("block-diagonal", Factored()), ("block-tridiagonal", Tridiagonal())])
def test_a_short_form_is_its_value(short, structure):
    links = (Link(LAYER.A, LAYER.G),)
    factors = Factors((LAYER, LAYER), tuple(Link(0.5 * link.A, 0.5 * link.G) for link in links))

    class Problem:
        def loss_and_gradient(self, weights):
            return 1.0, (V, V)

        def factors(self, weights, links):
            return factors if links else factors._replace(links=())

        def curvature_gram(self, weights, directions):
            return np.eye(len(directions))

        def loss(self, weights):
            return 0.5

    one, other = (kfac_step(Problem(), (V, V), None, KFACOptions(s))[0] for s in (short, structure))
    np.testing.assert_array_equal(one[0], other[0])


def test_what_is_no_structure_is_named():
    with pytest.raises(TypeError, match="expected one of 'block-diagonal'"):
        KFACOptions(structure=Factored).checked()
    with pytest.raises(ValueError, match="has a norm of its own"):
        KFACOptions(structure=Exact(), pi_norm="spectral").checked()
    with pytest.raises(ValueError, match="rank is 0"):
        LowRank(0)
    with pytest.raises(ValueError, match="norm is 'nuclear'"):
        Tridiagonal("nuclear")
