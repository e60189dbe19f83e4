"""How matrices travel between processes: symmetric ones as triangles, many of them in one bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ._team import Team

BUCKET = 2**23  # entries that travel at once


class Form(NamedTuple):
    """What a tensor is before it is seen. Of a "symmetric" one and a "lower" triangle one half travels."""

    shape: tuple[int, ...]
    kind: str = "plain"

    @property
    def size(self) -> int:
        if self.kind == "plain":
            return prod(self.shape)
        *batch, d, _ = self.shape
        return prod(batch) * (d * (d + 1) // 2)

    def packed(self, M: Tensor) -> Tensor:
        return M.reshape(-1) if self.kind == "plain" else triangle(M).reshape(-1)

    def unpacked(self, flat: Tensor) -> Tensor:
        if self.kind == "plain":
            return flat.view(self.shape)
        *batch, d, _ = self.shape
        lower = lower_of(flat.view(*batch, d + 1 - d % 2, (d + 1) // 2), d)
        return lower + lower.tril(-1).mT if self.kind == "symmetric" else lower


def triangle(M: Tensor) -> Tensor:
    """The lower triangle of M (..., d, d) as a rectangle (..., d or d + 1, ⌈d/2⌉) without gaps (LAPACK's RFP).

    The first half of the columns, with the rest, turned round, where they were above the diagonal.
    """
    d = M.shape[-1]
    half, even = (d + 1) // 2, 1 - d % 2
    R = M.new_zeros(*M.shape[:-2], d + even, half)
    R[..., even:, :] = M[..., :half].tril()
    R[..., : d - half, 1 - even :] += M[..., half:, half:].tril().mT
    return R


def lower_of(R: Tensor, d: int) -> Tensor:
    """The lower triangle (..., d, d) that `triangle` made a rectangle of; zero above the diagonal."""
    half, even = (d + 1) // 2, 1 - d % 2
    L = R.new_zeros(*R.shape[:-2], d, d)
    L[..., :half] = R[..., even:, :].tril()
    L[..., half:, half:] = R[..., : d - half, 1 - even :].triu().mT
    return L


class Parcel(NamedTuple):
    """Consecutive tensors with one owner."""

    owner: int | None
    places: list[int]


def parcels(owners: Sequence[int | None], forms: Sequence[Form]) -> list[Parcel]:
    """In an order that depends on the forms alone, so that it is every process's."""
    found: list[Parcel] = []
    open_: dict[Any, tuple[Parcel, int]] = {}
    for place, (owner, form) in enumerate(zip(owners, forms, strict=True)):
        parcel, size = open_.get(owner, (None, 0))
        if parcel is None or size + form.size > BUCKET:
            parcel, size = Parcel(owner, []), 0
            found.append(parcel)
        parcel.places.append(place)
        open_[owner] = parcel, size + form.size
    return found


class Way(NamedTuple):
    """A parcel on its way."""

    work: Any
    flat: Tensor
    owner: int | None
    places: list[int]


Make = Callable[[list[int]], Sequence[Tensor]]  #: the tensors at these places


def reduced(
    team: Team, owners: Sequence[int | None], forms: Sequence[Form], make: Make, dtype: torch.dtype, what: str
) -> tuple[list[Way], Exception | None]:
    """Sums over the processes, on their way to who owns them; one without an owner is everyone's.

    A parcel is made while those before it travel. After an error NaN travels, since the others wait for each.
    """
    ways, failure = list[Way](), None
    for owner, places in parcels(owners, forms):
        flat, failure = _made(team, forms, places, make, dtype, failure)
        with team.waiting(what):
            if owner is None:
                work = distributed.all_reduce(flat, group=team.group, async_op=True)
            else:
                work = distributed.reduce(flat, team.global_rank(owner), group=team.group, async_op=True)
        ways.append(Way(work, flat, owner, places))
    return ways, failure


def sent(
    team: Team, owners: Sequence[int], forms: Sequence[Form], make: Make, dtype: torch.dtype, what: str
) -> Iterator[tuple[int, Tensor]]:
    """(place, tensor) of all, each as it was with its owner and to the last bit the same everywhere.

    An owner makes the tensors of a parcel while those before it travel. An error of that is raised when all do.
    """
    ways, failure = list[Way](), None
    for owner, places in parcels(owners, forms):
        assert owner is not None
        if owner == team.rank:
            flat, failure = _made(team, forms, places, make, dtype, failure)
        else:
            flat = torch.empty(sum(forms[i].size for i in places), dtype=dtype, device=team.device)
        with team.waiting(what):
            work = distributed.broadcast(flat, team.global_rank(owner), team.group, async_op=True)
        ways.append(Way(work, flat, None, places))
    if failure is not None:
        raise failure
    yield from arrived(team, forms, ways, what)


def arrived(team: Team, forms: Sequence[Form], ways: Sequence[Way], what: str) -> Iterator[tuple[int, Tensor]]:
    """(place, tensor) of what is this process's."""
    for work, flat, owner, places in ways:
        with team.waiting(what):
            work.wait()
        if owner in (None, team.rank):
            for i, part in zip(places, flat.split([forms[i].size for i in places]), strict=True):
                yield i, forms[i].unpacked(part)


def _made(
    team: Team, forms: Sequence[Form], places: list[int], make: Make, dtype: torch.dtype, failure: Exception | None
) -> tuple[Tensor, Exception | None]:
    """The parcel, and the first error of all."""
    if failure is None:
        try:
            tensors = zip(places, make(places), strict=True)
            return torch.cat([forms[i].packed(M).to(dtype) for i, M in tensors]), None
        except Exception as error:
            failure = error
    size = sum(forms[i].size for i in places)
    return torch.full((size,), torch.nan, dtype=dtype, device=team.device), failure
