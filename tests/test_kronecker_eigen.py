"""`KroneckerEigen` against dense float64 matrices: every verb, its failures, and what depends on the shift."""

import jax
import mpmath
import numpy as np
import pytest
import torch
from backends import NUMPY, TORCH, Backend, every_backend, uncompiled_backends
from matrices import Sample, judge

from kfaclinalg import Diagonal, Kronecker, KroneckerEigen, LowRankPlusDiagonal, OuterProduct, testing

M, N = 3, 4


class Case:
    """A ⊗ B with a prescribed spectrum, and what is asked of its eigendecomposition."""

    def __init__(self, b: Backend, decades=0.2):
        self.b = b
        self.A, self.B = Sample(N, decades=decades).spd(b), Sample(M, decades=decades, seed=1).spd(b)
        self.V = np.random.default_rng(0).standard_normal((M, N)).astype(b.dtype).astype(float)
        self.dense = testing.dense_kronecker(self.A, self.B)
        self.condition = np.linalg.cond(self.dense)

    def run(self, f):
        run = self.b.jit(lambda A, B, V: f(Kronecker(A, B).eigh(), V))
        return self.b.numpy(run(*map(self.b.array, (self.A, self.B, self.V))))


FUNCTIONS = {  # the operator that each makes, and the function of the dense matrix's eigenvalues
    "itself": (lambda F: F, lambda s: s),
    "shifted": (lambda F: F.shifted(0.5), lambda s: s + 0.5),
    "inverse": (lambda F: F.inverse(), lambda s: 1 / s),
    "power -1/2": (lambda F: F.power(-0.5), lambda s: s**-0.5),
    "power 2": (lambda F: F.power(2), lambda s: s**2),
    "map": (lambda F: F.map(lambda s: s / (s + 0.25)), lambda s: s / (s + 0.25)),
    "in a row": (lambda F: F.map(lambda s: 3 * s).shifted(0.1).inverse().power(0.5), lambda s: (3 * s + 0.1) ** -0.5),
}


@every_backend
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_matrix_is_one_of_its_eigenvalues(b, name):
    case, (of_operator, of_value) = Case(b), FUNCTIONS[name]
    s, Q = np.linalg.eigh(case.dense)
    expected = (Q * of_value(s)) @ Q.T
    size = np.linalg.norm(expected)
    bound = testing.inverse_bound(case.condition, b.eps) * size
    dense = case.run(lambda F, V: of_operator(F).to_dense())
    judge(b, f"KroneckerEigen {name}", np.linalg.norm(dense - expected), bound)
    product = testing.vec(case.run(lambda F, V: of_operator(F) @ V))
    v = testing.vec(case.V)
    judge(b, f"KroneckerEigen {name} @", np.linalg.norm(product - expected @ v), bound * np.linalg.norm(v))
    diagonal = testing.vec(case.run(lambda F, V: of_operator(F).diagonal()))
    judge(b, f"KroneckerEigen {name} diagonal", np.linalg.norm(diagonal - np.diag(expected)), bound)
    trace = case.run(lambda F, V: of_operator(F).trace())
    judge(b, f"KroneckerEigen {name} trace", abs(trace - np.trace(expected)), bound * N * M)


@every_backend
def test_solve_and_logdet(b):
    case = Case(b)
    dense = case.dense + 0.25 * np.eye(M * N)
    solved = testing.vec(case.run(lambda F, V: F.shifted(0.25).solve(V)))
    error = testing.backward_error(dense, solved, testing.vec(case.V))
    judge(b, "KroneckerEigen.solve", error, testing.inverse_bound(np.linalg.cond(dense), b.eps))
    logdet = np.linalg.slogdet(case.dense)[1]
    error = abs(case.run(lambda F, V: F.logdet()) - logdet)
    judge(b, "KroneckerEigen.logdet", error, testing.logdet_bound(M * N, case.condition, logdet, b.eps))


def test_the_logdet_of_every_shift_against_50_digits():
    """One decomposition for all; Σ log(b_i a_j + δ) of eigenvalues that mpmath finds."""
    case = Case(NUMPY, decades=0.5)
    F = Kronecker(case.A, case.B).eigh()
    with mpmath.workdps(50):
        a, b = (list(mpmath.eigsy(mpmath.matrix(X.tolist()), eigvals_only=True)) for X in (case.A, case.B))
        for shift in (1e-8, 1e-3, 1.0, 1e3):
            logdet = mpmath.fsum(mpmath.log(x * y + shift) for x in a for y in b)
            condition = float((max(a) * max(b) + shift) / (min(a) * min(b) + shift))
            bound = testing.logdet_bound(M * N, condition, float(logdet), NUMPY.eps)
            assert abs(float(F.shifted(shift).logdet() - logdet)) <= bound


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_gradient_of_the_logdet_is_the_trace_of_the_inverse(framework):
    """∂ log det(F + δ I)/∂δ = tr (F + δ I)⁻¹, for a batch of δ too, compiled in JAX."""
    case = Case(NUMPY)
    shifts = np.asarray([0.01, 0.1, 1.0])
    expected = [np.trace(np.linalg.inv(case.dense + shift * np.eye(M * N))) for shift in shifts]
    if framework == "jax":
        F = Kronecker(jax.numpy.asarray(case.A), jax.numpy.asarray(case.B)).eigh()
        slopes = jax.jit(jax.vmap(jax.grad(lambda shift: F.shifted(shift).logdet())))(jax.numpy.asarray(shifts))
    else:
        F = Kronecker(torch.asarray(case.A), torch.asarray(case.B)).eigh()
        slope = torch.func.grad(lambda shift: F.shifted(shift).logdet())
        slopes = torch.func.vmap(slope)(torch.asarray(shifts))
    np.testing.assert_allclose(np.asarray(slopes), expected, rtol=testing.inverse_bound(case.condition, NUMPY.eps))


@uncompiled_backends
def test_a_diagonal_side_keeps_the_identity_and_forms_nothing(b):
    d, B = np.asarray([2.0, 0.5, 1.0, 3.0]), Sample(M).spd(b)
    F = Kronecker(Diagonal(b.array(d)), b.array(B)).eigh()
    assert isinstance(F.Q_A, Diagonal)
    dense, V = testing.dense_kronecker(np.diag(d), B) + 0.5 * np.eye(M * N), np.ones((M, N))
    solved = testing.vec(b.numpy(F.shifted(0.5).solve(b.array(V))))
    bound = testing.inverse_bound(np.linalg.cond(dense), b.eps)
    judge(b, "KroneckerEigen of a Diagonal", testing.backward_error(dense, solved, testing.vec(V)), bound)
    np.testing.assert_allclose(b.numpy(F.shifted(0.5).to_dense()), dense, atol=bound * np.linalg.norm(dense))
    np.testing.assert_allclose(
        testing.vec(b.numpy(F.diagonal())), np.diag(dense) - 0.5, atol=bound * np.linalg.norm(dense)
    )


@uncompiled_backends
def test_a_failing_member_is_nan_and_its_neighbours_are_not(b):
    eigenvalues = np.ones((4, 2, 2))
    eigenvalues[1, 0, 1], eigenvalues[2, 1, 0], eigenvalues[3, 1, 1] = 0, -1, np.inf
    F = KroneckerEigen(b.array(np.eye(2)), b.array(np.eye(2)), b.array(eigenvalues))
    V = b.array(np.ones((2, 2)))
    for result in (F.inverse() @ V, F.solve(V), F.power(-0.5) @ V):
        assert np.isnan(b.numpy(result)).all(axis=(-2, -1)).tolist() == [False, True, True, True]
        assert np.isfinite(b.numpy(result)[0]).all()
    assert np.isnan(b.numpy(F.logdet())).tolist() == [False, True, True, True]
    assert np.isnan(b.numpy(F.power(0.5) @ V)).all(axis=(-2, -1)).tolist() == [False, False, True, True]


@uncompiled_backends
def test_what_is_singular_has_no_inverse_and_a_shift_gives_it_one(b):
    """Eigenvalues that are rounding alone are zero: neither a wrong number nor a failure of the shifted matrix."""
    X = np.random.default_rng(0).standard_normal((2, N))
    A, B = X.T @ X, Sample(M).spd(b)
    F = Kronecker(b.array(A), b.array(B)).eigh()
    assert np.isnan(b.numpy(F.inverse() @ b.array(np.ones((M, N))))).all()
    assert np.isnan(b.numpy(F.logdet()))
    shift = 1e-3 * np.trace(A)
    dense = testing.dense_kronecker(A.astype(b.dtype).astype(float), B) + shift * np.eye(M * N)
    solved = testing.vec(b.numpy(F.shifted(shift).solve(b.array(np.ones((M, N))))))
    bound = testing.inverse_bound(np.linalg.cond(dense), b.eps)
    judge(b, "KroneckerEigen, singular", testing.backward_error(dense, solved, np.ones(M * N)), bound)


def test_exact_damping_and_a_shift_of_the_eigenvalues_are_one_decomposition():
    case = Case(NUMPY)
    F, inverse = Kronecker(case.A, case.B).eigh(), Kronecker(case.A, case.B).shifted_inverse(0.3)
    np.testing.assert_array_equal(inverse.K_A, F.Q_A)
    np.testing.assert_array_equal(inverse.weights, F.shifted(0.3).inverse().eigenvalues)


def test_half_precision_comes_back():
    F = Kronecker(torch.eye(2), torch.eye(3)).eigh()
    assert (F @ torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert (F @ OuterProduct(torch.ones(3, 1), torch.ones(2, 1))).shape == (3, 2)


def test_mistakes_are_refused():
    Q_A, Q_B, s = np.eye(2), np.eye(3), np.ones((3, 2))
    with pytest.raises(ValueError, match=r"eigenvalues has shape \(2, 3\), expected \(\.\.\., 3, 2\)"):
        KroneckerEigen(Q_A, Q_B, s.T)
    with pytest.raises(TypeError, match="eigenvalues has dtype float32"):
        KroneckerEigen(Q_A, Q_B, s.astype(np.float32))
    with pytest.raises(TypeError, match=r"Q_A is a .*LowRankPlusDiagonal, expected an array or a Diagonal"):
        KroneckerEigen(LowRankPlusDiagonal(Q_A, np.ones(2), np.ones(2)), Q_B, s)
    F = KroneckerEigen(Q_A, Q_B, s)
    with pytest.raises(ValueError, match="eigenvalues has shape"):
        F.map(lambda s: s[:1])
    with pytest.raises(TypeError, match="p is 'half', expected a number"):
        F.power("half")
    with pytest.raises(ValueError, match=r"V has shape \(2, 3\)"):
        F @ s.T
    assert np.isfinite(F.shifted(-0.5).logdet())  # a shift may have any sign: what is not definite then is NaN
    assert np.isnan(F.shifted(-2.0).logdet())


def test_a_perturbed_operator_is_caught():
    """The bounds are no blank cheque: an eigenvector turned by √eps is seen."""
    case = Case(TORCH)
    F = Kronecker(torch.asarray(case.A), torch.asarray(case.B)).eigh()
    turned = KroneckerEigen(F.Q_A + TORCH.eps**0.5, F.Q_B, F.eigenvalues)
    error = np.linalg.norm(turned.to_dense().numpy() - case.dense) / np.linalg.norm(case.dense)
    assert error > testing.inverse_bound(case.condition, TORCH.eps)
