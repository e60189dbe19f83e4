"""Low rank plus diagonal: the factors of low-rank K-FAC, A ≈ rank_k(A) and G ≈ rank_k(G - diag G) + diag G.

They take O(n k) memory, and their inverses, of the same form, O(n k²) flops.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _capacitance, _conversions, _host, _linalg, _subspace, _woodbury
from ._value import value
from .diagonal import Diagonal

__all__ = ["Diagonal", "LowRankPlusDiagonal", "low_rank", "low_rank_plus_diagonal"]


@value
class LowRankPlusDiagonal:
    """M = U diag(s) Uᵀ + diag(d) for any U (..., n, k), s (..., k) of any sign, in any order, and d (..., n).

    `inverse`, `solve` and `logdet` need d > 0 and M positive definite: what is not, to working precision, gives NaN for
    that member of the batch. M itself is never formed, except by `to_dense`.

    Raises:
        TypeError, ValueError: shapes, dtypes, namespaces or devices do not fit.

    >>> import numpy as np
    >>> LowRankPlusDiagonal(np.ones((2, 1)), np.asarray([-0.25]), np.ones(2)).inverse().to_dense()
    array([[1.5, 0.5],
           [0.5, 1.5]])
    """

    U: Any
    s: Any
    d: Any
    astype, to_device, to_namespace = _conversions.astype, _conversions.to_device, _conversions.to_namespace
    as_scipy = _conversions.as_scipy_on_vectors

    def __post_init__(self) -> None:
        b = self._backend()
        if self.U.ndim < 2:
            raise ValueError(f"U has shape {tuple(self.U.shape)}, expected (..., n, k)")
        _array.operand(b, "s", self.s, self.U.shape[-1:])
        _array.operand(b, "d", self.d, self.U.shape[-2:-1])
        _array.check_batches(**self._batches())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.U.shape[-2], self.U.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions, broadcast."""
        return _array.common_batch(*self._batches().values())

    def __matmul__(self, X: Any) -> Any:
        """U (s ∘ Uᵀ X) + d ∘ X for X (..., n, r). 4 n k r flops."""
        b = self._backend()
        return _array.narrowed(b, self._apply(self._operand(b, X)), X.dtype)

    def inverse(self, method: str = "woodbury", *, blas: str = "auto") -> LowRankPlusDiagonal:
        """diag(1/d) minus a correction of rank k, by "woodbury" or "sherman-morrison". 14 n k² flops.

        Such a difference is known to eps max(1/d): the backward error is of the order eps ‖M‖ max(‖M⁻¹‖, 1/d), and a
        member is NaN where no digit of a diagonal entry of M⁻¹ is left. `blas` is as in `spd.inverse`, for "woodbury".

        Raises:
            ValueError: an unknown method.
        """
        b = self._backend()
        _array.check_choice("method", method, _woodbury.METHODS)
        _array.check_choice("blas", blas, _host.CHOICES)
        native = partial(_woodbury.inverse, b, method)
        if method != "woodbury":
            return LowRankPlusDiagonal(*native(self.U, self.s, self.d))
        return LowRankPlusDiagonal(*_host.run(b, blas, _woodbury.host_inverse, native, self.U, self.s, self.d))

    def solve(self, X: Any, *, blas: str = "auto") -> Any:
        """M⁻¹ X for X (..., n, r): `inverse() @ X`, refined. 14 n k² + 28 n k r flops. `blas` is as in `inverse`.

        Each step of refinement takes a factor of about κ eps off the residual, κ = ‖M‖ max(‖M⁻¹‖, 1/d): three of them
        make the solution backward stable up to κ = eps^(-3/4). NumPy stops where the next would be below eps.
        """
        b = self._backend()
        Y = self._operand(b, X)
        Z = _host.run(b, blas, _host_solve, partial(_solve, "native"), self.U, self.s, self.d, Y)
        return _array.narrowed(b, Z, X.dtype)

    def logdet(self, *, blas: str = "auto") -> Any:
        """log det M (...), from the pivots of the inverse. 14 n k² flops. `blas` is as in `inverse`."""
        b = self._backend()
        return _host.run(b, blas, _woodbury.host_logdet, partial(_woodbury.logdet, b), self.U, self.s, self.d)

    def trace(self) -> Any:
        """Σ_j s_j ‖u_j‖² + Σ d (...). 3 n k flops."""
        return self._backend().xp.sum(self.diagonal(), axis=-1)

    def diagonal(self) -> Any:
        """(U ∘ U) s + d (..., n). 3 n k flops."""
        return self._backend().xp.sum(self.U * self.U * self.s[..., None, :], axis=-1) + self.d

    def to_dense(self) -> Any:
        """M (..., n, n), exactly symmetric. 2 n² k flops."""
        return _linalg.symmetrised((self.U * self.s[..., None, :]) @ self.U.mT) + Diagonal(self.d).to_dense()

    def _backend(self) -> _array.Backend:
        return _array.resolve(U=self.U, s=self.s, d=self.d)

    def _apply(self, X: Any) -> Any:
        return self.U @ (self.s[..., None] * (self.U.mT @ X)) + self.d[..., None] * X

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {"U": self.U.shape[:-2], "s": self.s.shape[:-1], "d": self.d.shape[:-1]}

    def _operand(self, b: _array.Backend, X: Any) -> Any:
        Y = _array.operand(b, "X", X, (self.shape[0], *X.shape[-1:]))
        _array.check_batches(**self._batches(), X=X.shape[:-2])
        return Y


def _host_solve(U: Any, s: Any, d: Any, X: Any) -> Any:
    Z = _capacitance.solve(U, s, d, X) if (s > 0).all() else None
    return _solve("auto", U, s, d, X) if Z is None else Z


def _solve(blas: str, U: Any, s: Any, d: Any, X: Any) -> Any:
    M = LowRankPlusDiagonal(U, s, d)
    b = M._backend()
    inverse = M.inverse(blas=blas)
    Z = inverse._apply(X)
    for _ in range(_capacitance.REFINEMENTS):
        step = inverse._apply(X - M._apply(Z))
        Z = Z + step
        if b.kind == "numpy":
            change, size = (abs(Y).max(axis=-2, initial=0.0) for Y in (step, Z))
            if (change <= 0.1 * b.eps**0.5 * size).all():
                break
    return Z


def low_rank(
    M: Any, rank: int, /, *, iterations: int = 8, start: LowRankPlusDiagonal | None = None
) -> LowRankPlusDiagonal:
    """rank_k(M) = U diag(s) Uᵀ of the eigenpairs of (M + Mᵀ)/2 of the largest magnitude, in that order; d is zero.

    By subspace iteration from the columns of an earlier result `start`, or else of a fixed matrix. Each is a product
    and a QR factorisation, 2 n² k + 4 n k² flops, and takes a factor of about `|λ_(k+6) / λ_k|` off the error.

    Raises:
        TypeError, ValueError: M is not square; rank is not in 0, ..., n; iterations is negative; `start` does not fit.

    >>> import numpy as np
    >>> low_rank(np.diag([1.0, -3.0, 2.0]), 2).s.round(6)
    array([-3.,  2.])
    """
    b = _check(M, rank, iterations, start)
    U, s = _subspace.dominant_eigenpairs(b, _linalg.symmetrised(M), rank, iterations, start and start.U)
    return LowRankPlusDiagonal(U, s, b.xp.zeros(U.shape[:-1], dtype=b.dtype, device=b.device))


def low_rank_plus_diagonal(
    M: Any, rank: int, /, *, iterations: int = 8, start: LowRankPlusDiagonal | None = None
) -> LowRankPlusDiagonal:
    """rank_k(M - diag M) + diag M, in as many flops as `low_rank`. M - diag M is indefinite: s may be negative.

    Raises:
        TypeError, ValueError: as for `low_rank`.

    >>> import numpy as np
    >>> low_rank_plus_diagonal(np.asarray([[5.0, 1.0], [1.0, 7.0]]), 2).to_dense().round(6)
    array([[5., 1.],
           [1., 7.]])
    """
    b = _check(M, rank, iterations, start)
    finite = b.xp.all(b.xp.isfinite(M), axis=(-2, -1))[..., None]
    d = b.xp.where(finite, b.xp.linalg.diagonal(M), _array.NAN)
    off_diagonal = b.xp.where(b.eye(M.shape[-1]) > 0, d[..., None] - d[..., None], _linalg.symmetrised(M))
    U, s = _subspace.dominant_eigenpairs(b, off_diagonal, rank, iterations, start and start.U)
    return LowRankPlusDiagonal(U, s, d)


def _check(M: Any, rank: int, iterations: int, start: LowRankPlusDiagonal | None) -> _array.Backend:
    _array.resolve(M=M)
    _array.check_square(M=M)
    n = M.shape[-1]
    if not isinstance(rank, int) or not 0 <= rank <= n:
        raise ValueError(f"rank is {rank!r}, expected an integer from 0 to {n}, the size of M")
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations is {iterations!r}, expected an integer >= 0")
    if start is None:
        return _array.resolve(M=M)
    if not isinstance(start, LowRankPlusDiagonal):
        raise TypeError(f"start is a {type(start).__qualname__}, expected a LowRankPlusDiagonal")
    b = _array.resolve(M=M, start=start.U)
    _array.operand(b, "start", start.U, (n, rank))
    _array.check_batches(M=M.shape[:-2], start=start.U.shape[:-2])
    return b
