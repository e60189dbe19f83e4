"""(K_A ⊗ K_B) diag(w) (K_A ⊗ K_B)ᵀ, the form that the exact inverses of A ⊗ B + shift I (eqn 6) and of A ⊗ B + C ⊗ D
(Appendix B) take."""

from __future__ import annotations

from . import _backends, _checks, _gram
from ._backends import Array
from ._value import Value, as_scipy_on_matrices, value
from .outer_product import OuterProduct


@value
class KroneckerBasis(Value):
    """(K_A ⊗ K_B) diag(vec(weights)) (K_A ⊗ K_B)ᵀ, for K_A (..., n, n), K_B (..., m, m) and weights (..., m, n).

    K_A and K_B are nonsingular; they need not be orthogonal. `logdet` is NaN where a weight is not positive.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices do not fit.

    >>> import numpy as np
    >>> KroneckerBasis(np.eye(1), np.eye(2), np.asarray([[3.0], [5.0]])) @ np.ones((2, 1))
    array([[3.],
           [5.]])
    """

    K_A: Array
    K_B: Array
    weights: Array
    as_scipy = as_scipy_on_matrices

    def __post_init__(self) -> None:
        b = self._backend()
        _checks.check_square(K_A=self.K_A, K_B=self.K_B)
        _backends.operand(b, "weights", self.weights, self.shape)
        _checks.check_batches(**self._batches())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.K_B.shape[-1], self.K_A.shape[-1])

    def apply(self, V: Array, /) -> Array:
        """K_B [(K_Bᵀ V K_A) ∘ weights] K_Aᵀ (..., m, n) (Appendix B). 4 m n (m + n) flops."""
        X = _backends.operand(self._backend(), "V", V, self.shape)
        _checks.check_batches(**self._batches(), V=V.shape[:-2])
        return _backends.narrowed(_applied(self.K_A, self.K_B, self.weights, X), V.dtype)

    __matmul__ = apply

    def inverse(self) -> KroneckerBasis:
        """(K_A⁻ᵀ ⊗ K_B⁻ᵀ) diag(1 / weights) (K_A⁻ᵀ ⊗ K_B⁻ᵀ)ᵀ, NaN where K_A or K_B is singular or a weight is zero.

        2 (n³ + m³) flops.
        """
        b = self._backend()
        K_A, K_B = (_backends.general_inverse(K).mT for K in (self.K_A, self.K_B))
        proper = b.xp.isfinite(self.weights) & (self.weights != 0)
        return KroneckerBasis(K_A, K_B, 1 / b.xp.where(proper, self.weights, _backends.NAN))

    def solve(self, V: Array) -> Array:
        """`inverse() @ V`, for one-off use. 2 (n³ + m³) + 4 m n (m + n) flops."""
        return self.inverse() @ V

    def logdet(self) -> Array:
        """2 m log|det K_A| + 2 n log|det K_B| + Σ log weights (...). ⅔ (n³ + m³) flops."""
        b = self._backend()
        m, n = self.shape
        log_A, log_B = _backends.log_abs_det(self.K_A), _backends.log_abs_det(self.K_B)
        positive = b.xp.where(b.xp.isfinite(self.weights) & (self.weights > 0), self.weights, _backends.NAN)
        return 2 * (m * log_A + n * log_B) + b.xp.sum(b.xp.log(positive), axis=(-2, -1))

    @_backends.in_full_precision
    def trace(self) -> Array:
        """Σ weights_ij ‖K_B e_i‖² ‖K_A e_j‖² (...). 2 (m² + n² + m n) flops."""
        xp = self._backend().xp
        a, b = (xp.sum(K * K, axis=-2) for K in (self.K_A, self.K_B))
        return xp.sum(b * (self.weights @ a[..., None])[..., 0], axis=-1)

    @_backends.in_full_precision
    def diagonal(self) -> Array:
        """(K_B ∘ K_B) weights (K_A ∘ K_A)ᵀ: the diagonal, shaped like V. 2 m n (m + n) flops."""
        return (self.K_B * self.K_B) @ self.weights @ (self.K_A * self.K_A).mT

    @_backends.in_full_precision
    def to_dense(self) -> Array:
        """The matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. 2 m³ n³ flops."""
        K = _backends.kron(self.K_A, self.K_B)
        w = self._backend().xp.reshape(self.weights.mT, (*self.weights.shape[:-2], 1, K.shape[-1]))
        return (K * w) @ K.mT

    def gram(self, U: Array | OuterProduct, V: Array | OuterProduct, /) -> Array:
        """The matrix (p, q) of vec(U_i)ᵀ (this) vec(V_j), as in `KroneckerEigen.gram`, of as many flops."""
        X, Y = _gram.operands(self, self._backend(), U, V, self._batches())
        return _gram.narrowed(_gram.in_basis(self.K_A, self.K_B, self.weights, X, Y), V)

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {name: getattr(self, name).shape[:-2] for name in ("K_A", "K_B", "weights")}

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(K_A=self.K_A, K_B=self.K_B)


def _applied(K_A: Array, K_B: Array, weights: Array, X: Array) -> Array:
    return _backends.product(K_B, _backends.product(K_B.mT, X, K_A) * weights, K_A.mT)
