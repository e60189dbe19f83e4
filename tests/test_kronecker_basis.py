import numpy as np
import pytest
from backends import NUMPY, Backend, every_backend, uncompiled_backends
from matrices import Sample, judge

from kfaclinalg import Kronecker, KroneckerBasis, testing


class Case:
    def __init__(self, b: Backend, n=4, m=3):
        self.b, self.shape = b, (m, n)
        rng = np.random.default_rng(0)
        self.K_A, self.K_B = (np.eye(k) + 0.2 * rng.standard_normal((k, k)) for k in (n, m))
        self.weights, self.V = rng.uniform(0.5, 2, (m, n)), rng.standard_normal((m, n))
        K = testing.dense_kronecker(self.K_A, self.K_B)
        self.dense = K @ np.diag(testing.vec(self.weights)) @ K.T

    def run(self, f):
        arrays = map(self.b.array, (self.K_A, self.K_B, self.weights, self.V))
        return self.b.numpy(self.b.jit(lambda K_A, K_B, w, V: f(KroneckerBasis(K_A, K_B, w), V))(*arrays))


@every_backend
def test_against_the_dense_matrix(b):
    case = Case(b)
    v, bound = testing.vec(case.V), testing.inverse_bound(np.linalg.cond(case.dense), b.eps)
    product = testing.vec(case.run(lambda P, V: P @ V))
    np.testing.assert_allclose(product, case.dense @ v, atol=bound)
    np.testing.assert_allclose(case.run(lambda P, V: P.to_dense()), case.dense, atol=bound)
    np.testing.assert_allclose(testing.vec(case.run(lambda P, V: P.diagonal())), np.diagonal(case.dense), atol=bound)
    assert case.run(lambda P, V: P.trace()) == pytest.approx(np.trace(case.dense), abs=bound * 12)
    assert case.run(lambda P, V: P.logdet()) == pytest.approx(np.linalg.slogdet(case.dense)[1], abs=bound * 12)
    for f in (lambda P, V: P.solve(V), lambda P, V: P.inverse() @ V):
        error = testing.backward_error(case.dense, testing.vec(case.run(f)), v)
        judge(b, "KroneckerBasis.solve", error, bound)


def test_transposed_weights_are_caught():
    case = Case(NUMPY, 3, 3)
    right = testing.vec(case.run(lambda P, V: P @ V))
    case.weights = case.weights.T
    assert not np.allclose(testing.vec(case.run(lambda P, V: P @ V)), right)


@uncompiled_backends
def test_nan_where_it_has_no_inverse_or_logarithm(b):
    weights = np.ones((3, 2, 2))
    weights[1, 0, 1], weights[2, 1, 0] = 0, -1
    P = KroneckerBasis(b.array(np.eye(2)), b.array(np.eye(2)), b.array(weights))
    assert np.isnan(b.numpy(P.logdet())).tolist() == [False, True, True]
    inverse = b.numpy(P.inverse() @ b.array(np.ones((2, 2))))
    assert np.isfinite(inverse[[0, 2]]).all()
    assert np.isnan(inverse[1]).all()
    K = np.stack([np.eye(2), np.ones((2, 2))])
    singular = KroneckerBasis(b.array(K), b.array(np.eye(2)), b.array(np.ones((2, 2, 2))))
    inverse = b.numpy(singular.inverse() @ b.array(np.ones((2, 2))))
    assert np.isfinite(inverse[0]).all()
    assert np.isnan(inverse[1]).all()


def shifted(b, A, B, shift, V):
    run = b.jit(lambda A, B, V: Kronecker(A, B).shifted_inverse(shift) @ V)
    return b.numpy(run(b.array(A), b.array(B), b.array(V)))


@every_backend
@pytest.mark.parametrize("shift", [1e-3, 0.1, 10.0])
def test_shifted_inverse_is_exact(b, shift):
    """(A ⊗ B + shift I)⁻¹, eqn 6, with factors that are themselves singular."""
    A, B = Sample(4, decades=0.2).spd(b), Sample(3, decades=0.2, seed=1).spd(b)
    A[:, 0] = A[0, :] = 0
    dense = testing.dense_kronecker(A, B) + shift * np.eye(12)
    V = np.random.default_rng(0).standard_normal((3, 4)).astype(b.dtype).astype(float)
    error = testing.backward_error(dense, testing.vec(shifted(b, A, B, shift, V)), testing.vec(V))
    judge(b, "Kronecker.shifted_inverse", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))


@every_backend
def test_only_the_sum_need_be_definite(b):
    A, B, V = np.diag([1.0, -0.5]), np.eye(1), np.ones((1, 2))
    np.testing.assert_allclose(shifted(b, A, B, 1.0, V), [[0.5, 2.0]], rtol=10 * b.eps)
    assert np.isnan(shifted(b, A, B, 0.25, V)).all()
    with pytest.raises(ValueError, match=r"shift is -1.0, expected a finite number >= 0"):
        shifted(b, A, B, -1.0, V)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"weights has shape \(2, 3\), expected \(\.\.\., 3, 2\)"):
        KroneckerBasis(np.eye(2), np.eye(3), np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"K_A has shape \(2, 3\)"):
        KroneckerBasis(np.ones((2, 3)), np.eye(3), np.ones((2, 3)))
