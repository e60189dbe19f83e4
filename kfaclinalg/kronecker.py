"""A ⊗ B as an operator on matrices: the curvature of one layer (Section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from . import _array, spd


@dataclass(frozen=True, eq=False, repr=False, slots=True)
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
    __array_ufunc__: ClassVar[None] = None  # `array @ operator` is a TypeError, not an array of operators

    def __post_init__(self) -> None:
        if _array.is_placeholder(self.A):
            return
        self._backend()
        _array.check_square(A=self.A, B=self.B)
        _array.check_batches(A=self.A.shape[:-2], B=self.B.shape[:-2])

    def __repr__(self) -> str:
        return _array.description(self, A=self.A, B=self.B)

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
        dense = self.A[..., :, None, :, None] * self.B[..., None, :, None, :]
        size = self.shape[0] * self.shape[1]
        return self._backend().xp.reshape(dense, (*dense.shape[:-4], size, size))

    def _backend(self) -> _array.Backend:
        return _array.resolve(A=self.A, B=self.B)

    def _operand(self, b: _array.Backend, V: Any) -> Any:
        X = _array.operand(b, "V", V, self.shape)
        _array.check_batches(A=self.A.shape[:-2], B=self.B.shape[:-2], V=V.shape[:-2])
        return X
