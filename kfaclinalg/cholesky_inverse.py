"""(L Lᵀ)⁻¹ as an operator, by substitution."""

from __future__ import annotations

from . import _backends, _checks
from ._backends import Array, Scalar
from ._value import Value, as_scipy_on_vectors, gram_of_columns, value


@value
class CholeskyInverse(Value):
    """(L Lᵀ)⁻¹ for lower triangular L (..., n, n), as `spd.cholesky` gives it; what is above the diagonal is not read.

    To make it takes a third of the flops of an explicit inverse, and to apply it as many as a product, at the lower
    speed of substitution: the cheaper form of an inverse that is applied once or twice, and a backward stable one. A
    member with a zero on the diagonal of L is NaN.

    Raises:
        TypeError, ValueError: L is not a square float32 or float64 array.

    >>> import numpy as np
    >>> CholeskyInverse(np.asarray([[2.0, 0.0], [0.0, 1.0]])) @ np.ones((2, 1))
    array([[0.25],
           [1.  ]])
    """

    L: Array
    as_scipy = as_scipy_on_vectors
    gram = gram_of_columns

    def __post_init__(self) -> None:
        self._backend()
        _checks.check_square(L=self.L)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.L.shape[-1], self.L.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.L.shape[:-2])

    def apply(self, X: Array, /) -> Array:
        """L⁻ᵀ L⁻¹ X for X (..., n, r). 2 n² r flops."""
        Y = self._operand(X, (self.shape[0], "r"))
        return _backends.narrowed(_backends.substituted(self.L, Y), X.dtype)

    __matmul__ = apply

    def apply_right(self, X: Array) -> Array:
        """X L⁻ᵀ L⁻¹ for X (..., r, n). 2 n² r flops."""
        Y = self._operand(X, ("r", self.shape[0]))
        return _backends.narrowed(_backends.substituted(self.L, Y.mT).mT, X.dtype)

    @_backends.in_full_precision
    def inverse(self) -> Array:
        """L Lᵀ (..., n, n), a dense array, exactly symmetric. 2 n³ flops."""
        L = self._lower()
        return _backends.symmetrised(L @ L.mT)

    def inverse_root(self, p: float) -> Array:
        """(L Lᵀ)^(1/p) (..., n, n) for p > 0, a dense array. About 10 n³ flops."""
        return _backends.inverse_root(self.to_dense(), _checks.positive("p", p))

    def shifted(self, shift: Scalar) -> Array:
        """(L Lᵀ)⁻¹ + shift I (..., n, n), a dense array, for a number or a shift (...). ⅔ n³ flops."""
        shift = _backends.scalar(self._backend(), "shift", shift, _checks.number, L=self.batch_shape)
        return _backends.shifted(self.to_dense(), shift)

    @_backends.in_full_precision
    def solve(self, X: Array) -> Array:
        """L Lᵀ X for X (..., n, r). 4 n² r flops."""
        L, Y = self._lower(), self._operand(X, (self.shape[0], "r"))
        return _backends.narrowed(L @ (L.mT @ Y), X.dtype)

    def logdet(self) -> Array:
        """`-2 Σ log |L_ii|` (...). n flops."""
        xp = self._backend().xp
        d = xp.abs(xp.linalg.diagonal(self.L))
        return -2 * xp.sum(xp.log(xp.where((d > 0) & xp.isfinite(d), d, _backends.NAN)), axis=-1)

    def trace(self) -> Array:
        """‖L⁻¹‖_F² (...). n³/3 flops."""
        return self._backend().xp.sum(self.diagonal(), axis=-1)

    def diagonal(self) -> Array:
        """The squared lengths of the columns of L⁻¹ (..., n). n³/3 flops."""
        b = self._backend()
        K = _backends.forward_substitution(_backends.nonsingular(self.L), b.eye(self.shape[0]))
        return b.xp.sum(K * K, axis=-2)

    def to_dense(self) -> Array:
        """(L Lᵀ)⁻¹ (..., n, n). ⅔ n³ flops."""
        return _backends.inverse_of_factor(_backends.nonsingular(self._lower()))

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(L=self.L)

    def _lower(self) -> Array:
        return self._backend().xp.tril(self.L)

    def _operand(self, X: Array, core: tuple[int | str, ...]) -> Array:
        Y = _backends.operand(self._backend(), "X", X, core)
        _checks.check_batches(L=self.batch_shape, X=X.shape[:-2])
        return Y
