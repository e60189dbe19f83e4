"""diag(d) as an operator."""

from __future__ import annotations

from . import _backends, _checks
from ._backends import Array, Scalar
from ._value import Value, as_scipy_on_vectors, gram_of_columns, value


@value
class Diagonal(Value):
    """diag(d) for d (..., n). Where an entry is not positive, `inverse`, `solve` and `logdet` give NaN for that member.

    Raises:
        TypeError, ValueError: d is not a float32 or float64 array (..., n).

    >>> import numpy as np
    >>> Diagonal(np.asarray([2.0, 4.0])).solve(np.ones((2, 1)))
    array([[0.5 ],
           [0.25]])
    """

    d: Array
    as_scipy = as_scipy_on_vectors
    gram = gram_of_columns

    def __post_init__(self) -> None:
        self._backend()
        if self.d.ndim < 1:
            raise ValueError(f"d has shape {tuple(self.d.shape)}, expected (..., n)")

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.d.shape[-1], self.d.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.d.shape[:-1])

    def apply(self, X: Array, /) -> Array:
        """d ∘ X for X (..., n, r). n r flops."""
        Y = self._operand(X, (self.shape[0], "r"))
        return _backends.narrowed(self.d[..., None] * Y, X.dtype)

    __matmul__ = apply

    def apply_right(self, X: Array) -> Array:
        """X ∘ dᵀ for X (..., r, n). n r flops."""
        Y = self._operand(X, ("r", self.shape[0]))
        return _backends.narrowed(Y * self.d[..., None, :], X.dtype)

    def inverse(self) -> Diagonal:
        """diag(1/d). n flops."""
        return Diagonal(1 / self._positive())

    def shifted(self, shift: Scalar) -> Diagonal:
        """diag(d + shift) for a number or a shift (...). n flops."""
        shift = _backends.scalar(self._backend(), "shift", shift, _checks.number, d=self.batch_shape)
        return Diagonal(self.d + _backends.per_member(shift, 1))

    def inverse_root(self, p: float) -> Diagonal:
        """diag(d^(-1/p)) for p > 0. n flops.

        Raises:
            ValueError: p is not positive.
        """
        return Diagonal(self._positive() ** (-1 / _checks.positive("p", p)))

    def solve(self, X: Array) -> Array:
        """X / d for X (..., n, r). n r flops."""
        Y = self._operand(X, (self.shape[0], "r"))
        return _backends.narrowed(Y / self._positive()[..., None], X.dtype)

    def logdet(self) -> Array:
        """Σ log d (...). n flops."""
        xp = self._backend().xp
        return xp.sum(xp.log(self._positive()), axis=-1)

    def trace(self) -> Array:
        """Σ d (...). n flops."""
        return self._backend().xp.sum(self.d, axis=-1)

    def diagonal(self) -> Array:
        """d (..., n). No flops."""
        return self.d

    def to_dense(self) -> Array:
        """diag(d) (..., n, n). No flops."""
        b = self._backend()
        return b.xp.where(b.eye(self.shape[0]) > 0, self.d[..., None], 0.0)

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(d=self.d)

    def _operand(self, X: Array, core: tuple[int | str, ...]) -> Array:
        Y = _backends.operand(self._backend(), "X", X, core)
        _checks.check_batches(d=self.batch_shape, X=X.shape[:-2])
        return Y

    def _positive(self) -> Array:
        """d, NaN for a member with an entry that is not positive and finite."""
        xp = self._backend().xp
        positive = xp.all((self.d > 0) & xp.isfinite(self.d), axis=-1)
        return xp.where(positive[..., None], self.d, _backends.NAN)
