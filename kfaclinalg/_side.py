"""One side of a Kronecker product: a dense array (..., n, n), a `Diagonal` or a `LowRankPlusDiagonal`.

All three are symmetric but the dense one, which `@` uses as given. M.shape[-1] is n for each.
"""

from __future__ import annotations

from typing import Any

from . import _array, _host, spd
from ._value import leaves
from .low_rank import Diagonal, LowRankPlusDiagonal

STRUCTURED = (Diagonal, LowRankPlusDiagonal)


def resolve(**sides: Any) -> _array.Backend:
    """The backend that all the sides share."""
    return _array.resolve(**{name: next(leaves(M)) if isinstance(M, STRUCTURED) else M for name, M in sides.items()})


def check(**sides: Any) -> None:
    """What is dense must be square, and the batches must broadcast."""
    for name, M in sides.items():
        if not isinstance(M, STRUCTURED):
            _array.check_square(**{name: M})
    _array.check_batches(**batches(**sides))


def batches(**sides: Any) -> dict[str, tuple[int, ...]]:
    return {name: M.batch_shape if isinstance(M, STRUCTURED) else M.shape[:-2] for name, M in sides.items()}


def apply_right(X: Any, M: Any) -> Any:
    """X Mᵀ for X (..., m, n)."""
    return (M @ X.mT).mT if isinstance(M, STRUCTURED) else X @ M.mT


def sandwich(B: Any, X: Any, A: Any) -> Any:
    """B X Aᵀ for X (..., m, n)."""
    return apply_right(B @ X, A)


def outer(B: Any, L: Any, A: Any, R: Any) -> Any:
    """(B L)(A R)ᵀ for L (..., m, r) and R (..., n, r)."""
    return (B @ L) @ (A @ R).mT


def inverse(M: Any, blas: str) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    if isinstance(M, Diagonal):
        return M.inverse()
    return M.inverse(blas=blas) if isinstance(M, LowRankPlusDiagonal) else spd.inverse(M, blas=blas)


def solve(M: Any, X: Any, blas: str) -> Any:
    _array.check_choice("blas", blas, _host.CHOICES)
    if isinstance(M, Diagonal):
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
    return M.trace() if isinstance(M, STRUCTURED) else b.xp.linalg.trace(M)


def diagonal(b: _array.Backend, M: Any) -> Any:
    return M.diagonal() if isinstance(M, STRUCTURED) else b.xp.linalg.diagonal(M)


def dense(M: Any) -> Any:
    return M.to_dense() if isinstance(M, STRUCTURED) else M


def eigh(b: _array.Backend, M: Any, blas: str) -> tuple[Any, Any]:
    """Eigenvalues (..., n) and eigenvectors (..., n, n) of the symmetric part."""
    return spd.eigh(b, dense(M), blas)


def shifted(b: _array.Backend, M: Any, shift: Any) -> Any:
    """M + shift I, of the same kind, for a shift (...)."""
    if isinstance(M, Diagonal):
        return Diagonal(M.d + shift[..., None])
    if isinstance(M, LowRankPlusDiagonal):
        return LowRankPlusDiagonal(M.U, M.s, M.d + shift[..., None])
    return _array.add_to_diagonal(b, M, shift)
