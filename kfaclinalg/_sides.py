"""The sides of Kronecker products as users give them: arrays, which stand for a `Dense`, and the other kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

from . import _backends, _checks
from ._backends import Array, Scalar
from ._value import leaves
from .cholesky_inverse import CholeskyInverse
from .dense import Dense
from .low_rank import Diagonal, LowRankPlusDiagonal


class Side(Protocol):
    """One side of a Kronecker product, a symmetric matrix (..., n, n): `Dense`, `Diagonal`, `LowRankPlusDiagonal` or
    `CholeskyInverse`. What is dense comes and goes as an array."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def batch_shape(self) -> tuple[int, ...]: ...
    def apply(self, X: Array, /) -> Array: ...
    def apply_right(self, X: Array, /) -> Array: ...
    def inverse(self) -> Any: ...
    def inverse_root(self, p: float) -> Any: ...
    def shifted(self, shift: Scalar) -> Any: ...
    def solve(self, X: Array) -> Array: ...
    def logdet(self) -> Array: ...
    def trace(self) -> Array: ...
    def diagonal(self) -> Array: ...
    def to_dense(self) -> Array: ...


SideLike: TypeAlias = "Array | Dense | Diagonal | LowRankPlusDiagonal | CholeskyInverse"
KINDS = (Dense, Diagonal, LowRankPlusDiagonal, CholeskyInverse)
ROUTINES = {
    "explicit": _backends.inverse,
    "cholesky": _backends.cholesky,
}  # what each method of an inverse makes of an array


def as_given(M: SideLike) -> SideLike:
    """What users see of a side: the array of a `Dense`."""
    return M.M if isinstance(M, Dense) else M


def side(M: SideLike) -> Side:
    """M itself, or the `Dense` of an array that `resolve_sides` has seen."""
    if isinstance(M, KINDS):
        return M
    made = object.__new__(Dense)  # for a moment, without checks
    object.__setattr__(made, "M", M)
    return made


def transposed(M: SideLike) -> SideLike:
    """Mᵀ; all but arrays are symmetric."""
    return M if isinstance(M, KINDS) else M.mT


def between(B: SideLike, X: Array, A: SideLike) -> Array:
    """B X Aᵀ, at once where both are arrays."""
    if isinstance(A, KINDS) or isinstance(B, KINDS):
        return side(A).apply_right(side(B).apply(X))
    return _backends.product(B, X, A.mT)


def between_inverses(B: SideLike, X: Array, A: SideLike) -> Array:
    """B⁻¹ X A⁻¹."""
    for M in (B, A):
        X = (side(M).solve(X) if isinstance(M, KINDS) else _backends.solve(M, X)).mT
    return X


def resolve_sides(**sides: SideLike) -> _backends.Backend:
    """The backend that all the sides share; what is dense must be square, and the batches must broadcast."""
    dense = {name: M for name, M in sides.items() if not isinstance(M, KINDS)}
    arrays: dict[str, Any] = {name: M if name in dense else next(leaves(M)) for name, M in sides.items()}
    b = _backends.resolve(**arrays)
    _checks.check_square(**dense)
    _checks.check_batches(**{name: batch_of(M) for name, M in sides.items()})
    return b


def batch_of(M: SideLike) -> tuple[int, ...]:
    """The leading dimensions of a side."""
    return M.batch_shape if isinstance(M, KINDS) else tuple(M.shape[:-2])


def inverses(sides: Iterable[SideLike], shifts: Iterable[Scalar], method: str) -> list[SideLike]:
    """(M + shift I)⁻¹ of each side, by `method` where it is an array: of equal shapes at once where that is cheaper."""

    def inverse(M: SideLike, shift: Scalar) -> SideLike:
        if not isinstance(M, KINDS):
            return ROUTINES[method](M, shift)
        made = M.inverse()
        return made if isinstance(made, KINDS) else Dense(made)

    def shown(made: SideLike) -> SideLike:
        if isinstance(made, KINDS):
            return as_given(made)
        return CholeskyInverse(made) if method == "cholesky" else made

    rows = (_apart(M, shift) for M, shift in zip(sides, shifts, strict=True))
    return [shown(made) for made in _backends.each(inverse, rows)]


def _apart(M: SideLike, shift: Scalar) -> tuple[SideLike, Scalar]:
    """M and a shift for each of its members, which a routine adds by itself; else their sum."""
    if not isinstance(M, KINDS) and (isinstance(shift, float) or shift.ndim == M.ndim - 2):
        return M, shift
    return (M if type(shift) is float and shift == 0 else side(M).shifted(shift)), 0.0
