"""A ⊗ B as an operator on matrices, the curvature of one layer (Section 4.2), and the form that the exact inverses of
A ⊗ B + shift I and of A ⊗ B + C ⊗ D take: (K_A ⊗ K_B) diag(w) (K_A ⊗ K_B)ᵀ (Appendix B)."""

from __future__ import annotations

from typing import Any

from . import _array, _conversions, _linalg, spd
from ._typing import Scalar
from ._value import value


@value
class Kronecker:
    """A ⊗ B for A (..., n, n) and B (..., m, m), acting on V (..., m, n) by (A ⊗ B) vec(V) = vec(B V Aᵀ).

    `vec` stacks columns; A is on the input side of a layer with weights (m, n) = (outputs, inputs), B on its output
    side. The n m x n m matrix is never formed, except by `to_dense`. Where A or B is not positive definite, `inverse`,
    `solve` and `logdet` give NaN for that member of the batch.

    Raises:
        TypeError, ValueError: A or B is not square, or they differ in dtype, namespace or device.

    >>> import numpy as np
    >>> P = Kronecker(np.asarray([[2.0]]), np.asarray([[1.0, 0.0], [0.0, 4.0]]))
    >>> P.inverse() @ np.asarray([[2.0], [2.0]])
    array([[1.  ],
           [0.25]])
    """

    A: Any
    B: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy

    def __post_init__(self) -> None:
        self._backend()
        _array.check_square(A=self.A, B=self.B)
        _array.check_batches(A=self.A.shape[:-2], B=self.B.shape[:-2])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.B.shape[-1], self.A.shape[-1])

    def __matmul__(self, V: Any) -> Any:
        """B V Aᵀ (..., m, n). 2 m n (m + n) flops."""
        b = self._backend()
        X = self._operand(b, V)
        return _array.narrowed(b, self.B @ X @ self.A.mT, V.dtype)

    def apply_outer(self, L: Any, R: Any) -> Any:
        """(A ⊗ B) applied to L Rᵀ, for L (..., m, r) and R (..., n, r), as (B L)(A R)ᵀ (the end of Section 8).

        2 r (m² + n² + m n) flops: less than forming L Rᵀ where r is below about half of the smaller of m and n.
        """
        b = self._backend()
        m, n = self.shape
        left = _array.operand(b, "L", L, (m, L.shape[-1]))
        right = _array.operand(b, "R", R, (n, L.shape[-1]))
        return _array.narrowed(b, (self.B @ left) @ (self.A @ right).mT, L.dtype)

    def inverse(self) -> Kronecker:
        """A⁻¹ ⊗ B⁻¹ (Section 4.2). About n³ + m³ flops."""
        return Kronecker(spd.inverse(self.A), spd.inverse(self.B))

    def solve(self, V: Any) -> Any:
        """B⁻¹ V A⁻¹ by Cholesky factorisation: backward stable, for one-off use. (n³ + m³)/3 + 2 m n (m + n) flops."""
        b = self._backend()
        X = self._operand(b, V)
        return _array.narrowed(b, spd.solve(self.A, spd.solve(self.B, X).mT).mT, V.dtype)

    def inverse_root(self, p: float) -> Kronecker:
        """A^(-1/p) ⊗ B^(-1/p). About 9 (n³ + m³) flops."""
        return Kronecker(spd.inverse_root(self.A, p), spd.inverse_root(self.B, p))

    def shifted_inverse(self, shift: Scalar) -> KroneckerBasis:
        """(A ⊗ B + shift I)⁻¹, exactly (eqn 6). About 9 (n³ + m³) flops.

        With A = Q_A diag(a) Q_Aᵀ and B = Q_B diag(b) Q_Bᵀ the sum is Q diag(vec(b aᵀ + shift)) Qᵀ, Q = Q_A ⊗ Q_B. Only
        the sum need be positive definite. `shift` is λ + η, what is added to the curvature itself.
        """
        b = self._backend()
        shift = _array.nonnegative("shift", shift)
        (a, Q_A), (c, Q_B) = (_linalg.eigh(b, _linalg.symmetrised(M)) for M in (self.A, self.B))
        return KroneckerBasis(
            Q_A, Q_B, _linalg.reciprocal(b, c[..., :, None] * a[..., None, :] + _array.per_member(shift))
        )

    def logdet(self) -> Any:
        """m log det A + n log det B (...). (n³ + m³)/3 flops."""
        m, n = self.shape
        return m * spd.logdet(self.A) + n * spd.logdet(self.B)

    def trace(self) -> Any:
        """tr(A) tr(B) (...)."""
        trace = self._backend().xp.linalg.trace
        return trace(self.A) * trace(self.B)

    def diagonal(self) -> Any:
        """The diagonal of A ⊗ B, shaped like V: entry (i, j) is B_ii A_jj."""
        diagonal = self._backend().xp.linalg.diagonal
        return diagonal(self.B)[..., :, None] * diagonal(self.A)[..., None, :]

    def to_dense(self) -> Any:
        """A ⊗ B as a matrix (..., n m, n m) that acts on vec(V), the columns of V stacked."""
        return _linalg.kron(self._backend(), self.A, self.B)

    def _backend(self) -> _array.Backend:
        return _array.resolve(A=self.A, B=self.B)

    def _operand(self, b: _array.Backend, V: Any) -> Any:
        X = _array.operand(b, "V", V, self.shape)
        _array.check_batches(A=self.A.shape[:-2], B=self.B.shape[:-2], V=V.shape[:-2])
        return X


@value
class KroneckerBasis:
    """(K_A ⊗ K_B) diag(vec(weights)) (K_A ⊗ K_B)ᵀ, for K_A (..., n, n), K_B (..., m, m) and weights (..., m, n).

    K_A and K_B are nonsingular; they need not be orthogonal. `logdet` is NaN where a weight is not positive.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices do not fit.

    >>> import numpy as np
    >>> KroneckerBasis(np.eye(1), np.eye(2), np.asarray([[3.0], [5.0]])) @ np.ones((2, 1))
    array([[3.],
           [5.]])
    """

    K_A: Any
    K_B: Any
    weights: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy

    def __post_init__(self) -> None:
        b = self._backend()
        _array.check_square(K_A=self.K_A, K_B=self.K_B)
        _array.operand(b, "weights", self.weights, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.K_B.shape[-1], self.K_A.shape[-1])

    def __matmul__(self, V: Any) -> Any:
        """K_B [(K_Bᵀ V K_A) ∘ weights] K_Aᵀ (..., m, n) (Appendix B). 4 m n (m + n) flops."""
        X = _array.operand(self._backend(), "V", V, self.shape)
        inner = (self.K_B.mT @ X @ self.K_A) * self.weights
        return _array.narrowed(self._backend(), self.K_B @ inner @ self.K_A.mT, V.dtype)

    def inverse(self) -> KroneckerBasis:
        """(K_A⁻ᵀ ⊗ K_B⁻ᵀ) diag(1 / weights) (K_A⁻ᵀ ⊗ K_B⁻ᵀ)ᵀ, NaN where K_A or K_B is singular or a weight is zero."""
        b = self._backend()
        K_A, K_B = (_linalg.general_inverse(b, K).mT for K in (self.K_A, self.K_B))
        return KroneckerBasis(K_A, K_B, 1 / b.xp.where(self.weights == 0, _array.NAN, self.weights))

    def solve(self, V: Any) -> Any:
        """`inverse() @ V`, for one-off use."""
        return self.inverse() @ V

    def logdet(self) -> Any:
        """2 m log|det K_A| + 2 n log|det K_B| + Σ log weights (...)."""
        b = self._backend()
        m, n = self.shape
        log_A, log_B = (_linalg.log_abs_det(b, K) for K in (self.K_A, self.K_B))
        positive = b.xp.where(self.weights > 0, self.weights, _array.NAN)
        return 2 * (m * log_A + n * log_B) + b.xp.sum(b.xp.log(positive), axis=(-2, -1))

    def trace(self) -> Any:
        """Σ weights_ij ‖K_B e_i‖² ‖K_A e_j‖² (...)."""
        return self._backend().xp.sum(self.diagonal(), axis=(-2, -1))

    def diagonal(self) -> Any:
        """(K_B ∘ K_B) weights (K_A ∘ K_A)ᵀ: the diagonal, shaped like V."""
        return (self.K_B * self.K_B) @ self.weights @ (self.K_A * self.K_A).mT

    def to_dense(self) -> Any:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked."""
        K = Kronecker(self.K_A, self.K_B).to_dense()
        w = self._backend().xp.reshape(self.weights.mT, (*self.weights.shape[:-2], 1, K.shape[-1]))
        return (K * w) @ K.mT

    def _backend(self) -> _array.Backend:
        return _array.resolve(K_A=self.K_A, K_B=self.K_B)
