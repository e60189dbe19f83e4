"""(L Lᵀ)⁻¹ as an operator, by substitution."""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _conversions, _host, _lapack, _linalg
from ._value import value


@value
class CholeskyInverse:
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

    L: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy_on_vectors

    def __post_init__(self) -> None:
        self._backend()
        _array.check_square(L=self.L)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.L.shape[-1], self.L.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.L.shape[:-2])

    def apply(self, X: Any, /, *, blas: str = "auto") -> Any:
        """L⁻ᵀ L⁻¹ X for X (..., n, r), as `@`; `blas` as in `spd.inverse`. 2 n² r flops."""
        b = self._backend()
        Y = self._operand(b, X)
        return _array.narrowed(b, _host.run(b, blas, _lapack.substituted, partial(_substituted, b), self.L, Y), X.dtype)

    def __matmul__(self, X: Any) -> Any:
        """L⁻ᵀ L⁻¹ X for X (..., n, r). 2 n² r flops."""
        return self.apply(X)

    def inverse(self) -> Any:
        """L Lᵀ (..., n, n), a dense array, exactly symmetric. 2 n³ flops."""
        L = self._lower()
        return _linalg.symmetrised(L @ L.mT)

    def solve(self, X: Any) -> Any:
        """L Lᵀ X for X (..., n, r). 4 n² r flops."""
        b, L = self._backend(), self._lower()
        return _array.narrowed(b, L @ (L.mT @ self._operand(b, X)), X.dtype)

    def logdet(self) -> Any:
        """`-2 Σ log |L_ii|` (...). n flops."""
        xp = self._backend().xp
        d = xp.abs(xp.linalg.diagonal(self.L))
        return -2 * xp.sum(xp.log(xp.where((d > 0) & xp.isfinite(d), d, _array.NAN)), axis=-1)

    def trace(self) -> Any:
        """‖L⁻¹‖_F² (...). n³/3 flops."""
        return self._backend().xp.sum(self.diagonal(), axis=-1)

    def diagonal(self) -> Any:
        """The squared lengths of the columns of L⁻¹ (..., n). n³/3 flops."""
        b = self._backend()
        K = _linalg.forward_substitution(b, _nonsingular(b, self.L), b.eye(self.shape[0]))
        return b.xp.sum(K * K, axis=-2)

    def to_dense(self) -> Any:
        """(L Lᵀ)⁻¹ (..., n, n). ⅔ n³ flops."""
        b = self._backend()
        return _linalg.cholesky_inverse(b, _nonsingular(b, self._lower()))

    def _backend(self) -> _array.Backend:
        return _array.resolve(L=self.L)

    def _lower(self) -> Any:
        return self._backend().xp.tril(self.L)

    def _operand(self, b: _array.Backend, X: Any) -> Any:
        Y = _array.operand(b, "X", X, (self.shape[0], *X.shape[-1:]))
        _array.check_batches(L=self.batch_shape, X=X.shape[:-2])
        return Y


def _substituted(b: _array.Backend, L: Any, X: Any) -> Any:
    L = _nonsingular(b, L)
    return _linalg.back_substitution(b, L, _linalg.forward_substitution(b, L, X))


def _nonsingular(b: _array.Backend, L: Any) -> Any:
    """L, NaN for a member that is singular."""
    d = b.xp.linalg.diagonal(L)
    return b.xp.where(b.xp.all((d != 0) & b.xp.isfinite(d), axis=-1)[..., None, None], L, _array.NAN)
