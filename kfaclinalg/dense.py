"""A dense array as one side of a Kronecker product, beside `Diagonal`, `LowRankPlusDiagonal` and `CholeskyInverse`."""

from __future__ import annotations

from . import _backends, _checks
from ._backends import Array, Scalar
from ._value import Value, as_scipy_on_vectors, gram_of_columns, value


@value
class Dense(Value):
    """M (..., n, n) as an operator on X (..., n, r): symmetric, save that `@` uses it as given.

    `Kronecker` makes one of each array that it is given. What is dense again comes back as an array.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> Dense(np.asarray([[2.0, 0.0], [0.0, 4.0]])).solve(np.ones((2, 1)))
    array([[0.5 ],
           [0.25]])
    """

    M: Array
    as_scipy = as_scipy_on_vectors
    gram = gram_of_columns

    def __post_init__(self) -> None:
        _backends.resolve(M=self.M)
        _checks.check_square(M=self.M)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.M.shape[-1], self.M.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.M.shape[:-2])

    def apply(self, X: Array, /) -> Array:
        """M X for X (..., n, r). 2 n² r flops."""
        Y = self._operand(X, (self.shape[0], "r"))
        return _backends.narrowed(_backends.product(self.M, Y), X.dtype)

    __matmul__ = apply

    def apply_right(self, X: Array) -> Array:
        """X Mᵀ for X (..., r, n). 2 n² r flops."""
        Y = self._operand(X, ("r", self.shape[0]))
        return _backends.narrowed(_backends.product(Y, self.M.mT), X.dtype)

    def inverse(self) -> Array:
        """M⁻¹ (..., n, n). About n³ flops."""
        return _backends.inverse(self.M)

    def inverse_root(self, p: float) -> Array:
        """M^(-1/p) (..., n, n) for p > 0. About 9 n³ flops."""
        return _backends.inverse_root(self.M, _checks.positive("p", p))

    def shifted(self, shift: Scalar) -> Array:
        """M + shift I (..., n, n) for a number or a shift (...). n flops."""
        b = _backends.backend_of(self.M)
        return _backends.shifted(self.M, _backends.scalar(b, "shift", shift, _checks.number, M=self.batch_shape))

    def solve(self, X: Array) -> Array:
        """M⁻¹ X for X (..., n, r). n³/3 + 2 n² r flops."""
        return _backends.narrowed(_backends.solve(self.M, self._operand(X, (self.shape[0], "r"))), X.dtype)

    def logdet(self) -> Array:
        """log det M (...). n³/3 flops."""
        return _backends.logdet(self.M)

    def trace(self) -> Array:
        """tr M (...). n flops."""
        return _backends.trace(self.M)

    def diagonal(self) -> Array:
        """The diagonal (..., n). No flops."""
        return _backends.namespace_of(self.M).linalg.diagonal(self.M)

    def to_dense(self) -> Array:
        """M itself. No flops."""
        return self.M

    def _operand(self, X: Array, core: tuple[int | str, ...]) -> Array:
        Y = _backends.operand(_backends.backend_of(self.M), "X", X, core)
        _checks.check_batches(M=self.batch_shape, X=X.shape[:-2])
        return Y
