"""The sides of Kronecker products as users give them: arrays, which stand for a `Dense`, and the other kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from . import _backends, _checks, spd
from ._typing import Array, Side
from ._value import leaves, rebuilt
from .cholesky_inverse import CholeskyInverse
from .dense import Dense
from .low_rank import Diagonal, LowRankPlusDiagonal

SideLike: TypeAlias = "Array | Dense | Diagonal | LowRankPlusDiagonal | CholeskyInverse"
KINDS = (Dense, Diagonal, LowRankPlusDiagonal, CholeskyInverse)
ROUTINES = {"explicit": spd.inverse, "cholesky": spd.cholesky}  # what each method of an inverse makes of an array


def as_given(M: SideLike) -> SideLike:
    """What users see of a side: the array of a `Dense`."""
    return M.M if isinstance(M, Dense) else M


def side(M: SideLike) -> Side:
    """M itself, or the `Dense` of an array that `resolve_sides` has seen."""
    return M if isinstance(M, KINDS) else rebuilt(Dense, (M,))


def resolve_sides(**sides: SideLike) -> _backends.Backend:
    """The backend that all the sides share; what is dense must be square, and the batches must broadcast."""
    b = _backends.resolve(**{name: next(leaves(M)) if isinstance(M, KINDS) else M for name, M in sides.items()})
    _checks.check_square(**{name: M for name, M in sides.items() if not isinstance(M, KINDS)})
    _checks.check_batches(**{name: side(M).batch_shape for name, M in sides.items()})
    return b


def inverses(sides: Iterable[SideLike], method: str) -> list[SideLike]:
    """The inverse of each side, by `method` where it is an array: of equal shapes at once where that is cheaper."""

    def inverse(M: SideLike) -> SideLike:
        if not isinstance(M, KINDS):
            return ROUTINES[method](M)
        made = M.inverse()
        return made if isinstance(made, KINDS) else Dense(made)

    def shown(made: SideLike) -> SideLike:
        if isinstance(made, KINDS):
            return as_given(made)
        return CholeskyInverse(made) if method == "cholesky" else made

    return [shown(made) for made in _backends.each(inverse, sides)]
