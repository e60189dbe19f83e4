import numpy as np
import pytest

from kfaclinalg import testing


@pytest.mark.parametrize("kind", testing.SPECTRA)
@pytest.mark.parametrize("n", [2, 5, 20])
def test_a_matrix_has_the_prescribed_spectrum(kind, n):
    eigenvalues = testing.spectrum(kind, n, condition=1e6)
    assert (min(eigenvalues), max(eigenvalues)) == (1e-6, 1)
    M = testing.spd_matrix(eigenvalues, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.eigvalsh(M), sorted(eigenvalues), atol=100 * n * 2.2e-16)
    np.testing.assert_array_equal(M, M.T)
    assert np.abs(M - np.diag(np.diagonal(M))).max() > 0.01  # the basis is not the standard one


def test_kronecker_and_vec_agree_with_numpy():
    rng = np.random.default_rng(0)
    A, B, V = rng.standard_normal((3, 3)), rng.standard_normal((2, 2)), rng.standard_normal((2, 3))
    np.testing.assert_allclose(testing.dense_kronecker(A, B), np.kron(A, B))
    np.testing.assert_array_equal(testing.vec(V), V.flatten(order="F"))
    np.testing.assert_array_equal(testing.unvec(testing.vec(V), V.shape), V)


def test_backward_error_is_zero_for_the_solution_and_one_for_zero():
    M, X = np.diag([1.0, 2.0]), np.asarray([[3.0], [4.0]])
    assert testing.backward_error(M, X, M @ X) == 0
    assert testing.backward_error(M, 0 * X, M @ X) == 1
    assert testing.backward_error(M, -X, M @ X) > 0.5


def test_an_unknown_spectrum_is_refused():
    with pytest.raises(ValueError, match="kind is 'flat', expected one of 'geometric'"):
        testing.spectrum("flat", 3, condition=10)
