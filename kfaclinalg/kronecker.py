"""A ⊗ B as an operator on matrices, the curvature of one layer (Section 4.2)."""

from __future__ import annotations

from . import _backends, _checks, _gram
from ._backends import Array, Scalar
from ._sides import (
    ROUTINES,
    Side,
    SideLike,
    as_given,
    batch_of,
    between,
    between_inverses,
    inverses,
    resolve_sides,
    side,
)
from ._value import Value, as_scipy_on_matrices, rebuilt, value
from .kronecker_basis import KroneckerBasis
from .kronecker_eigen import KroneckerEigen, eigendecompositions
from .outer_product import OuterProduct


@value
class Kronecker(Value):
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

    A: SideLike
    B: SideLike
    as_scipy = as_scipy_on_matrices

    def __post_init__(self) -> None:
        resolve_sides(A=self.A, B=self.B)
        for name in "AB":
            object.__setattr__(self, name, as_given(getattr(self, name)))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the matrices that it acts on."""
        return (self.B.shape[-1], self.A.shape[-1])

    def apply(self, V: Array | OuterProduct, /) -> Array:
        """B V Aᵀ (..., m, n), as `@`. 2 m n (m + n) flops; for an `OuterProduct` V those of `apply_outer`."""
        if isinstance(V, OuterProduct):
            return self.apply_outer(V.L, V.R)
        return self._narrowed(between(self.B, self._operand(V), self.A), V)

    __matmul__ = apply

    def apply_outer(self, L: Array, R: Array) -> Array:
        """(A ⊗ B) applied to L Rᵀ, for L (..., m, r) and R (..., n, r), as (B L)(A R)ᵀ (the end of Section 8).

        2 r (m² + n² + m n) flops, fewer than those of `@` where `OuterProduct.pays`.
        """
        b = resolve_sides(A=self.A, B=self.B)
        m, n = self.shape
        left = _backends.operand(b, "L", L, (m, "r"))
        right = _backends.operand(b, "R", R, (n, L.shape[-1]))
        _checks.check_batches(**self._batches(), L=L.shape[:-2], R=R.shape[:-2])
        A, B = self._sides()
        # From the right: L and R of a batch are transposed, it is their columns that lie together in memory.
        return self._narrowed(_backends.product(B.apply_right(left.mT).mT, A.apply_right(right.mT)), L)

    def inverse(self, *, method: str = "explicit") -> Kronecker:
        """A⁻¹ ⊗ B⁻¹ (Section 4.2). About n³ + m³ flops, a third of it with `method` "cholesky".

        That makes a `CholeskyInverse` of what is dense: cheaper where the inverse is applied once or twice. A diagonal
        or low-rank side has an inverse of its own kind.
        """
        _checks.check_choice("method", method, ROUTINES)
        return rebuilt(Kronecker, inverses((self.A, self.B), (0.0, 0.0), method))

    def solve(self, V: Array) -> Array:
        """B⁻¹ V A⁻¹ by Cholesky factorisation: backward stable, for one-off use. (n³ + m³)/3 + 2 m n (m + n) flops."""
        return self._narrowed(between_inverses(self.B, self._operand(V), self.A), V)

    def inverse_root(self, p: float) -> Kronecker:
        """A^(-1/p) ⊗ B^(-1/p). About 9 (n³ + m³) flops; that of a `LowRankPlusDiagonal` is dense."""
        A, B = self._sides()
        return Kronecker(A.inverse_root(p), B.inverse_root(p))

    def shifted_inverse(self, shift: Scalar) -> KroneckerBasis:
        """(A ⊗ B + shift I)⁻¹, exactly (eqn 6). About 9 (n³ + m³) flops.

        From `eigh`. Only the sum need be positive definite. `shift` is λ + η, what is added to the curvature itself.
        """
        shift = _backends.scalar(resolve_sides(A=self.A, B=self.B), "shift", shift, **self._batches())
        return shifted_inverse(self.eigh(), shift)

    def eigh(self) -> KroneckerEigen:
        """A ⊗ B = (Q_A ⊗ Q_B) diag(vec(b aᵀ)) (Q_A ⊗ Q_B)ᵀ from the eigenvalues a and b. About 9 (n³ + m³) flops.

        What of an eigenvalue of A or B is below rounding, 4 eps of the largest, has no certain sign and is zero. The
        eigenvectors of a `Diagonal` are the identity, which is not formed.
        """
        return eigendecompositions([(self.A, self.B)])[0]

    def logdet(self) -> Array:
        """m log det A + n log det B (...). (n³ + m³)/3 flops."""
        m, n = self.shape
        A, B = self._sides()
        return m * A.logdet() + n * B.logdet()

    def trace(self) -> Array:
        """tr(A) tr(B) (...). n + m flops."""
        A, B = self._sides()
        return A.trace() * B.trace()

    def diagonal(self) -> Array:
        """The diagonal of A ⊗ B, shaped like V: entry (i, j) is B_ii A_jj. m n flops."""
        A, B = self._sides()
        return B.diagonal()[..., :, None] * A.diagonal()[..., None, :]

    def gram(self, U: Array | OuterProduct, V: Array | OuterProduct, /) -> Array:
        """The matrix (p, q) of vec(U_i)ᵀ (A ⊗ B) vec(V_j), for U (p, m, n) and V (q, m, n), or an `OuterProduct`.

        2 q m n (m + n + p) flops. Of gradients g aᵀ it is (g_iᵀ B g_j)(a_iᵀ A a_j), in 2 q (m² + n² + p (m + n)). For a
        batch of operators (..., m, n) the first dimension of (p, ..., m, n) counts, and the result is (..., p, q).
        """
        X, Y = _gram.operands(self, resolve_sides(A=self.A, B=self.B), U, V, self._batches())
        if isinstance(Y, OuterProduct) and not OuterProduct.pays(self.shape, Y.L.shape[-1]):
            Y = Y.to_dense()
        return _gram.narrowed(_gram.inner(X, _gram.turned(self.B, Y, self.A)), V)

    def to_dense(self) -> Array:
        """A ⊗ B as a matrix (..., n m, n m) that acts on vec(V), the columns of V stacked. m² n² flops."""
        A, B = self._sides()
        return _backends.kron(A.to_dense(), B.to_dense())

    def _sides(self) -> tuple[Side, Side]:
        return side(self.A), side(self.B)

    def _operand(self, V: Array) -> Array:
        b = resolve_sides(A=self.A, B=self.B)
        X = _backends.operand(b, "V", V, self.shape)
        _checks.check_batches(**self._batches(), V=V.shape[:-2])
        return X

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {"A": batch_of(self.A), "B": batch_of(self.B)}

    def _narrowed(self, U: Array, V: Array) -> Array:
        return _backends.narrowed(U, V.dtype)


def shifted_inverse(eigen: KroneckerEigen, shift: Scalar) -> KroneckerBasis:
    """(A ⊗ B + shift I)⁻¹, NaN where that is not definite, which eigenvalues that are known to rounding can tell."""
    Q_A, Q_B = (side(Q).to_dense() for Q in (eigen.Q_A, eigen.Q_B))
    eigenvalues = eigen.eigenvalues + _backends.per_member(shift)
    return rebuilt(KroneckerBasis, (Q_A, Q_B, _backends.reciprocal(eigenvalues)))
