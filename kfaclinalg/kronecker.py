"""A ⊗ B as an operator on matrices, the curvature of one layer (Section 4.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _conversions, _host, _lapack, _linalg, _side
from ._typing import Scalar
from ._value import rebuilt, value
from .kronecker_basis import KroneckerBasis


@value
class OuterProduct:
    """L Rᵀ for L (..., m, r) and R (..., n, r): a layer's gradient Σ g aᵀ over r examples, as the batch gives it.

    `Kronecker @` takes it as a V (m, n) without forming it, the low-rank form at the end of Section 8.

    >>> import numpy as np
    >>> Kronecker(np.eye(3), 2 * np.eye(1)) @ OuterProduct(np.ones((1, 2)), np.ones((3, 2)))
    array([[4., 4., 4.]])
    """

    L: Any
    R: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace

    def __post_init__(self) -> None:
        b = _array.resolve(L=self.L, R=self.R)
        _array.operand(b, "R", self.R, (self.R.shape[-2], self.L.shape[-1]))
        _array.check_batches(L=self.L.shape[:-2], R=self.R.shape[:-2])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return (self.L.shape[-2], self.R.shape[-2])

    @staticmethod
    def pays(shape: tuple[int, int], r: int) -> bool:
        """Whether (A ⊗ B) applied to L Rᵀ takes fewer flops than to the dense V of this shape.

        r (m² + n² + m n) against m n (m + n): for a square layer, r below two thirds of its size.

        >>> OuterProduct.pays((1000, 1000), 600), OuterProduct.pays((1000, 1000), 700)
        (True, False)
        """
        m, n = shape
        return r * (m * m + n * n + m * n) < m * n * (m + n)

    def to_dense(self) -> Any:
        """L Rᵀ (..., m, n). 2 m n r flops."""
        return self.L @ self.R.mT


@value
class Kronecker:
    """A ⊗ B for A (..., n, n) and B (..., m, m), acting on V (..., m, n) by (A ⊗ B) vec(V) = vec(B V Aᵀ).

    `vec` stacks columns; A is on the input side of a layer with weights (m, n) = (outputs, inputs), B on its output
    side. Each of them is a dense array, a `Diagonal`, a `LowRankPlusDiagonal` or a `CholeskyInverse`. n³ flops below
    are those of a dense one, a structured one takes what its own methods say. The n m x n m matrix is never formed,
    except by `to_dense`. Where A or B is not positive definite, `inverse`, `solve` and `logdet` give NaN for that
    member of the batch.

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
        _side.check(A=self.A, B=self.B)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.B.shape[-1], self.A.shape[-1])

    def apply(self, V: Any, /, *, blas: str = "auto") -> Any:
        """B V Aᵀ (..., m, n), as `@`. 2 m n (m + n) flops; for an `OuterProduct` V those of `apply_outer`.

        Here and below `blas` "auto" sends single matrices on torch's CPU to NumPy or SciPy where that is faster,
        "native" keeps to torch; other backends have one way.
        """
        if isinstance(V, OuterProduct):
            return self.apply_outer(V.L, V.R, blas=blas)
        b = self._backend()
        _array.check_choice("blas", blas, _host.CHOICES)
        return _array.narrowed(b, _side.apply(b, blas, (self.A, self.B), self._operand(b, V)), V.dtype)

    def __matmul__(self, V: Any) -> Any:
        """B V Aᵀ (..., m, n). 2 m n (m + n) flops; for an `OuterProduct` V those of `apply_outer`."""
        return self.apply(V)

    def apply_outer(self, L: Any, R: Any, *, blas: str = "auto") -> Any:
        """(A ⊗ B) applied to L Rᵀ, for L (..., m, r) and R (..., n, r), as (B L)(A R)ᵀ (the end of Section 8).

        2 r (m² + n² + m n) flops, fewer than those of `@` where `OuterProduct.pays`.
        """
        b = self._backend()
        m, n = self.shape
        left = _array.operand(b, "L", L, (m, L.shape[-1]))
        right = _array.operand(b, "R", R, (n, L.shape[-1]))
        return _array.narrowed(b, _side.apply_outer(b, blas, (self.A, self.B), left, right), L.dtype)

    def inverse(self, *, method: str = "explicit", blas: str = "auto") -> Kronecker:
        """A⁻¹ ⊗ B⁻¹ (Section 4.2). About n³ + m³ flops, a third of it with `method` "cholesky".

        That makes a `CholeskyInverse` of what is dense: cheaper where the inverse is applied once or twice. A diagonal
        or low-rank side has an inverse of its own kind.
        """
        _array.check_choice("method", method, _side.INVERSES)
        return rebuilt(Kronecker, _side.inverses(self._backend(), method, blas, self.A, self.B))

    def solve(self, V: Any, *, blas: str = "auto") -> Any:
        """B⁻¹ V A⁻¹ by Cholesky factorisation: backward stable, for one-off use. (n³ + m³)/3 + 2 m n (m + n) flops."""
        b = self._backend()
        args = self.A, self.B, self._operand(b, V)
        if _side.are_structured(self.A, self.B):
            return _array.narrowed(b, _solved(partial(_side.solve, blas=blas), *args), V.dtype)
        native = partial(_solved, partial(_side.solve, blas="native"))
        return _array.narrowed(b, _host.run(b, blas, _host_solved, native, *args), V.dtype)

    def inverse_root(self, p: float, *, blas: str = "auto") -> Kronecker:
        """A^(-1/p) ⊗ B^(-1/p). About 9 (n³ + m³) flops; that of a `LowRankPlusDiagonal` is dense."""
        return Kronecker(_side.inverse_root(self.A, p, blas), _side.inverse_root(self.B, p, blas))

    def shifted_inverse(self, shift: Scalar, *, blas: str = "auto") -> KroneckerBasis:
        """(A ⊗ B + shift I)⁻¹, exactly (eqn 6). About 9 (n³ + m³) flops.

        With A = Q_A diag(a) Q_Aᵀ and B = Q_B diag(b) Q_Bᵀ the sum is Q diag(vec(b aᵀ + shift)) Qᵀ, Q = Q_A ⊗ Q_B. Only
        the sum need be positive definite. `shift` is λ + η, what is added to the curvature itself.
        """
        b = self._backend()
        shift = _array.nonnegative("shift", shift)
        args = shift, _side.dense(self.A), _side.dense(self.B)
        if not isinstance(shift, float):  # one of a batch of shifts, perhaps
            return rebuilt(KroneckerBasis, _shifted_inverse(partial(_side.eigh, b, blas), *args))
        native = partial(_shifted_inverse, partial(_side.eigh, b, "native"))
        return rebuilt(KroneckerBasis, _host.run(b, blas, _host_shifted_inverse, native, *args))

    def logdet(self, *, blas: str = "auto") -> Any:
        """m log det A + n log det B (...). (n³ + m³)/3 flops."""
        m, n = self.shape
        return m * _side.logdet(self.A, blas) + n * _side.logdet(self.B, blas)

    def trace(self) -> Any:
        """tr(A) tr(B) (...). n + m flops."""
        b = self._backend()
        return _side.trace(b, self.A) * _side.trace(b, self.B)

    def diagonal(self) -> Any:
        """The diagonal of A ⊗ B, shaped like V: entry (i, j) is B_ii A_jj. m n flops."""
        b = self._backend()
        return _side.diagonal(b, self.B)[..., :, None] * _side.diagonal(b, self.A)[..., None, :]

    def to_dense(self) -> Any:
        """A ⊗ B as a matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. m² n² flops."""
        return _linalg.kron(self._backend(), _side.dense(self.A), _side.dense(self.B))

    def _backend(self) -> _array.Backend:
        return _side.resolve(A=self.A, B=self.B)

    def _operand(self, b: _array.Backend, V: Any) -> Any:
        X = _array.operand(b, "V", V, self.shape)
        _array.check_batches(**_side.batches(A=self.A, B=self.B), V=V.shape[:-2])
        return X


def _solved(solve: Any, A: Any, B: Any, X: Any) -> Any:
    return solve(A, solve(B, X).mT).mT


def _shifted_inverse(eigh: Any, shift: Any, A: Any, B: Any) -> tuple[Any, Any, Any]:
    (a, Q_A), (c, Q_B) = eigh(A), eigh(B)
    eigenvalues = c[..., :, None] * a[..., None, :] + _array.per_member(shift)
    return Q_A, Q_B, _linalg.reciprocal(_array.resolve(A=A), eigenvalues)


_host_solved = partial(_solved, _lapack.solve)
_host_shifted_inverse = partial(_shifted_inverse, _lapack.eigh)
