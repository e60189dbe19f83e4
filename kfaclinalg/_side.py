"""One side of a Kronecker product: a dense array (..., n, n), a `Diagonal`, `LowRankPlusDiagonal` or `CholeskyInverse`.

All are symmetric but the dense one, which `@` uses as given. M.shape[-1] is n for each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _host, _lapack, _linalg, spd
from ._value import leaves
from .cholesky_inverse import CholeskyInverse
from .low_rank import Diagonal, LowRankPlusDiagonal

STRUCTURED = (Diagonal, LowRankPlusDiagonal, CholeskyInverse)
INVERSES = {"explicit": _lapack.inverse, "cholesky": _lapack.factor}  # of one side, on the host


def resolve(**sides: Any) -> _array.Backend:
    """The backend that all the sides share."""
    return _array.resolve(**{name: next(leaves(M)) if isinstance(M, STRUCTURED) else M for name, M in sides.items()})


def check(**sides: Any) -> None:
    """What is dense must be square, and the batches must broadcast."""
    _array.check_square(**{name: M for name, M in sides.items() if not isinstance(M, STRUCTURED)})
    _array.check_batches(**batches(**sides))


def batches(**sides: Any) -> dict[str, tuple[int, ...]]:
    return {name: M.batch_shape if isinstance(M, STRUCTURED) else M.shape[:-2] for name, M in sides.items()}


def are_structured(*sides: Any) -> bool:
    """Any of them."""
    return any(isinstance(M, STRUCTURED) for M in sides)


def apply(b: _array.Backend, blas: str, sides: tuple[Any, Any], X: Any) -> Any:
    """B X Aᵀ for (A, B) and X (..., m, n)."""
    if not are_structured(*sides):
        return _host.run(b, blas, _applied, _applied, *sides, X)
    A, B = sides
    return _apply_right(b, blas, _apply_left(b, blas, B, X), A)


def apply_outer(b: _array.Backend, blas: str, sides: tuple[Any, Any], L: Any, R: Any) -> Any:
    """B L (A R)ᵀ for (A, B), L (..., m, r) and R (..., n, r)."""
    if not are_structured(*sides):
        return _host.run(b, blas, _applied_outer, _applied_outer, *sides, L, R)
    RA, LB = (_apply_right(b, blas, X.mT, M) for M, X in zip(sides, (R, L), strict=True))
    return _host.product(b, blas, LB.mT, RA)


def _applied(A: Any, B: Any, X: Any) -> Any:
    return B @ X @ A.mT


def _applied_outer(A: Any, B: Any, L: Any, R: Any) -> Any:
    """From the right: L and R of a batch are transposed, it is their columns that lie together in memory."""
    return (L.mT @ B.mT).mT @ (R.mT @ A.mT)


def _apply_left(b: _array.Backend, blas: str, M: Any, X: Any) -> Any:
    """M X for X (..., n, r)."""
    if isinstance(M, CholeskyInverse):
        return M.apply(X, blas=blas)
    return M @ X if isinstance(M, STRUCTURED) else _host.product(b, blas, M, X)


def _apply_right(b: _array.Backend, blas: str, X: Any, M: Any) -> Any:
    """X Mᵀ for X (..., r, n)."""
    return _apply_left(b, blas, M, X.mT).mT if isinstance(M, STRUCTURED) else _host.product(b, blas, X, M.mT)


def inverses(b: _array.Backend, method: str, blas: str, *sides: Any) -> Any:
    """Of each side; of dense ones at once."""
    if are_structured(*sides):
        return [_inverse(M, method, blas) for M in sides]
    native = partial(_of_each, partial(_inverse, method=method, blas="native"))
    return [as_inverse(made, method) for made in _host.run(b, blas, _HOST[method], native, *sides)]


def as_inverse(made: Any, method: str) -> Any:
    """What `method` made of a dense side: an inverse as it is, a Cholesky factor as an operator."""
    return CholeskyInverse(made) if method == "cholesky" and not isinstance(made, STRUCTURED) else made


def _inverse(M: Any, method: str, blas: str) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    if isinstance(M, Diagonal | CholeskyInverse):
        return M.inverse()
    if isinstance(M, LowRankPlusDiagonal):
        return M.inverse(blas=blas)
    return as_inverse((spd.cholesky if method == "cholesky" else spd.inverse)(M, blas=blas), method)


def _of_each(f: Any, *sides: Any) -> tuple[Any, ...]:
    return tuple(map(f, sides))


_HOST = {method: partial(_of_each, f) for method, f in INVERSES.items()}


def solve(M: Any, X: Any, blas: str) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    if isinstance(M, Diagonal | CholeskyInverse):
        return M.solve(X)
    return M.solve(X, blas=blas) if isinstance(M, LowRankPlusDiagonal) else spd.solve(M, X, blas=blas)


def inverse_root(M: Any, p: float, blas: str) -> Any:
    """Of the same kind, save that a `LowRankPlusDiagonal` has a dense one."""
    _array.check_choice("blas", blas, _host.CHOICES)
    return M.inverse_root(p) if isinstance(M, Diagonal) else spd.inverse_root(dense(M), p, blas=blas)


def logdet(M: Any, blas: str) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    return M.logdet() if isinstance(M, STRUCTURED) else spd.logdet(M, blas=blas)


def trace(b: _array.Backend, M: Any) -> Any:
    if isinstance(M, STRUCTURED):
        return M.trace()
    return M.trace(axis1=-2, axis2=-1) if b.kind == "numpy" else b.xp.linalg.trace(M)


def diagonal(b: _array.Backend, M: Any) -> Any:
    return M.diagonal() if isinstance(M, STRUCTURED) else b.xp.linalg.diagonal(M)


def dense(M: Any) -> Any:
    return M.to_dense() if isinstance(M, STRUCTURED) else M


def eigh(b: _array.Backend, blas: str, M: Any) -> tuple[Any, Any]:
    """Eigenvalues (..., n) and eigenvectors (..., n, n) of the symmetric part."""
    return _host.run(b, blas, _lapack.eigh, lambda M: _linalg.eigh(b, _linalg.symmetrised(M)), dense(M))


def shifted(b: _array.Backend, M: Any, shift: Any) -> Any:
    """M + shift I, of the same kind, for a shift (...)."""
    if isinstance(M, Diagonal):
        return Diagonal(M.d + shift[..., None])
    if isinstance(M, LowRankPlusDiagonal):
        return LowRankPlusDiagonal(M.U, M.s, M.d + shift[..., None])
    return _array.add_to_diagonal(b, dense(M), shift)
