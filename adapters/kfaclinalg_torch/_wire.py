"""How matrices travel between processes: symmetric ones as triangles, many of them in one bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def reduced(
    team: Team, owners: Sequence[int | None], forms: Sequence[Form], tensors: list[Any], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(place, sum over the processes) of those that this process owns; one without an owner is everyone's.

    `tensors` is emptied on the way.
    """
    waiting = []
    for owner, places in parcels(owners, forms):
        flat = torch.cat([forms[i].packed(tensors[i]).to(dtype) for i in places])
        for i in places:
            tensors[i] = None
        if owner is None:
            work = distributed.all_reduce(flat, group=team.group, async_op=True)
        else:
            work = distributed.reduce(flat, team.global_rank(owner), group=team.group, async_op=True)
        waiting.append((work, flat, owner, places))
    for work, flat, owner, places in waiting:
        work.wait()
        if owner in (None, team.rank):
            yield from _opened(flat, forms, places)


def sent(
    team: Team, owners: Sequence[int], forms: Sequence[Form], tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(place, tensor) of all, each as it was with its owner and to the last bit the same everywhere."""
    waiting = []
    for owner, places in parcels(owners, forms):
        if owner == team.rank:
            flat = torch.cat([forms[i].packed(tensors[i]).to(dtype) for i in places])  # type: ignore[arg-type]
        else:
            flat = torch.empty(sum(forms[i].size for i in places), dtype=dtype, device=team.device)
        assert owner is not None
        waiting.append((distributed.broadcast(flat, team.global_rank(owner), team.group, async_op=True), flat, places))
    for work, flat, places in waiting:
        work.wait()
        yield from _opened(flat, forms, places)


def _opened(flat: Tensor, forms: Sequence[Form], places: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    for i, part in zip(places, flat.split([forms[i].size for i in places]), strict=True):
        yield i, forms[i].unpacked(part)
