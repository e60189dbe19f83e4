"""Low rank plus diagonal: the factors of low-rank K-FAC, A ≈ rank_k(A) and G ≈ rank_k(G - diag G) + diag G.

They take O(n k) memory, and their inverses, of the same form, O(n k²) flops.
"""

from __future__ import annotations

from . import _backends, _capacitance, _checks, _subspace, _woodbury
from ._backends import Array, Scalar
from ._value import Value, as_scipy_on_vectors, gram_of_columns, value
from .diagonal import Diagonal

__all__ = ["Diagonal", "LowRankPlusDiagonal", "low_rank", "low_rank_plus_diagonal"]


@value
class LowRankPlusDiagonal(Value):
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

    U: Array
    s: Array
    d: Array
    as_scipy = as_scipy_on_vectors
    gram = gram_of_columns

    def __post_init__(self) -> None:
        b = self._backend()
        if self.U.ndim < 2:
            raise ValueError(f"U has shape {tuple(self.U.shape)}, expected (..., n, k)")
        _backends.operand(b, "s", self.s, self.U.shape[-1:])
        _backends.operand(b, "d", self.d, self.U.shape[-2:-1])
        _checks.check_batches(**self._batches())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.U.shape[-2], self.U.shape[-2])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dimensions, broadcast."""
        return _checks.common_batch(*self._batches().values())

    def apply(self, X: Array, /) -> Array:
        """U (s ∘ Uᵀ X) + d ∘ X for X (..., n, r). 4 n k r flops."""
        return _backends.narrowed(self._applied(self._operand(X, (self.shape[0], "r"))), X.dtype)

    __matmul__ = apply

    def apply_right(self, X: Array, /) -> Array:
        """X M for X (..., r, n). 4 n k r flops."""
        Y = self._operand(X, ("r", self.shape[0]))
        return _backends.narrowed(self._applied(Y.mT).mT, X.dtype)

    def inverse(self, method: str = "woodbury") -> LowRankPlusDiagonal:
        """diag(1/d) minus a correction of rank k, by "woodbury" or "sherman-morrison". 14 n k² flops.

        Such a difference is known to eps max(1/d): the backward error is of the order eps ‖M‖ max(‖M⁻¹‖, 1/d), and a
        member is NaN where no digit of a diagonal entry of M⁻¹ is left.

        Raises:
            ValueError: an unknown method.
        """
        _checks.check_choice("method", method, _woodbury.METHODS)
        if method == "woodbury" and _capacitance.applies(self.U, self.s, self.d):
            return LowRankPlusDiagonal(*_capacitance.inverse(self.U, self.s, self.d))
        return LowRankPlusDiagonal(*_woodbury.inverse(self.U, self.s, self.d, method))

    def inverse_root(self, p: float) -> Array:
        """M^(-1/p) (..., n, n) for p > 0, a dense array. About 9 n³ flops."""
        return _backends.inverse_root(self.to_dense(), _checks.positive("p", p))

    def shifted(self, shift: Scalar) -> LowRankPlusDiagonal:
        """M + shift I for a number or a shift (...). n flops."""
        shift = _backends.scalar(self._backend(), "shift", shift, _checks.number, M=self.batch_shape)
        return LowRankPlusDiagonal(self.U, self.s, self.d + _backends.per_member(shift, 1))

    def solve(self, X: Array) -> Array:
        """M⁻¹ X for X (..., n, r): `inverse() @ X`, refined. 14 n k² + 28 n k r flops.

        Each step of refinement takes a factor of about κ eps off the residual, κ = ‖M‖ max(‖M⁻¹‖, 1/d): three of them
        make the solution backward stable up to κ = eps^(-3/4). Where values may be read it stops where the next would
        be below eps.
        """
        Y = self._operand(X, (self.shape[0], "r"))
        Z = _capacitance.solve(self.U, self.s, self.d, Y) if _capacitance.applies(self.U, self.s, self.d) else None
        return _backends.narrowed(self._refined(Y) if Z is None else Z, X.dtype)

    def logdet(self) -> Array:
        """log det M (...), from the pivots of the inverse. 14 n k² flops."""
        one = _capacitance if _capacitance.applies(self.U, self.s, self.d) else _woodbury
        return one.logdet(self.U, self.s, self.d)

    def trace(self) -> Array:
        """Σ_j s_j ‖u_j‖² + Σ d (...). 3 n k flops."""
        return self._backend().xp.sum(self.diagonal(), axis=-1)

    def diagonal(self) -> Array:
        """(U ∘ U) s + d (..., n). 3 n k flops."""
        return self._backend().xp.sum(self.U * self.U * self.s[..., None, :], axis=-1) + self.d

    @_backends.in_full_precision
    def to_dense(self) -> Array:
        """M (..., n, n), exactly symmetric. 2 n² k flops."""
        return _backends.symmetrised((self.U * self.s[..., None, :]) @ self.U.mT) + Diagonal(self.d).to_dense()

    def _backend(self) -> _backends.Backend:
        return _backends.resolve(U=self.U, s=self.s, d=self.d)

    @_backends.in_full_precision
    def _applied(self, X: Array) -> Array:
        return self.U @ (self.s[..., None] * (self.U.mT @ X)) + self.d[..., None] * X

    def _refined(self, X: Array) -> Array:
        b, inverse = self._backend(), self.inverse()
        Z = inverse._applied(X)
        for _ in range(_capacitance.REFINEMENTS):
            step = inverse._applied(X - self._applied(Z))
            Z = Z + step
            if _backends.may_read(Z) and 0 not in Z.shape and _capacitance.is_refined(b, step, Z):
                break
        return Z

    def _batches(self) -> dict[str, tuple[int, ...]]:
        return {"U": self.U.shape[:-2], "s": self.s.shape[:-1], "d": self.d.shape[:-1]}

    def _operand(self, X: Array, core: tuple[int | str, ...]) -> Array:
        Y = _backends.operand(self._backend(), "X", X, core)
        _checks.check_batches(**self._batches(), X=X.shape[:-2])
        return Y


def low_rank(
    M: Array, rank: int, /, *, iterations: int = 8, start: LowRankPlusDiagonal | None = None
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
    U, s = _subspace.dominant_eigenpairs(b, _backends.symmetrised(M), rank, iterations, start and start.U)
    return LowRankPlusDiagonal(U, s, b.zeros(*U.shape[:-1]))


def low_rank_plus_diagonal(
    M: Array, rank: int, /, *, iterations: int = 8, start: LowRankPlusDiagonal | None = None
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
    d = b.xp.where(finite, b.xp.linalg.diagonal(M), _backends.NAN)
    off_diagonal = b.xp.where(b.eye(M.shape[-1]) > 0, d[..., None] - d[..., None], _backends.symmetrised(M))
    U, s = _subspace.dominant_eigenpairs(b, off_diagonal, rank, iterations, start and start.U)
    return LowRankPlusDiagonal(U, s, d)


def _check(M: Array, rank: int, iterations: int, start: LowRankPlusDiagonal | None) -> _backends.Backend:
    _backends.resolve(M=M)
    _checks.check_square(M=M)
    n = M.shape[-1]
    _checks.integer("rank", rank, 0, n)
    _checks.integer("iterations", iterations, 0)
    if start is None:
        return _backends.resolve(M=M)
    _checks.check_class("start", start, LowRankPlusDiagonal)
    b = _backends.resolve(M=M, start=start.U)
    _backends.operand(b, "start", start.U, (n, rank))
    _checks.check_batches(M=M.shape[:-2], start=start.U.shape[:-2])
    return b
