"""Where A, G and the inverses of a layer are: with all processes, with one, or a part of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import distributed

from ._layer import Layer
from ._places import Item, Place, places_of, slots_of
from ._team import Team

PLACEMENTS = ("auto", "replicated", "owner")


class Grid(NamedTuple):
    """All processes; those among which each inverse is with one, and those that hold the same inverses.

    With the processes in rows of so many `columns` the owner of a layer is in one column, which holds its inverse: each
    row has all of them, and the gradients and updates travel along it. `replicated`: all hold everything.
    """

    all: Team
    row: Team
    column: Team
    replicated: bool

    def column_of(self, owner: int) -> int | None:
        """The place in a row of who holds the inverse; None where all do."""
        return None if self.replicated else owner % self.row.size


def grid_of(placement: Any, team: Team, mesh: Any) -> Grid:
    """The processes of a placement; under FSDP2 those of the parameters' mesh.

    Raises:
        TypeError, ValueError: no placement, or a fraction that does not divide the processes.
    """
    by_name = isinstance(placement, str) and placement in PLACEMENTS
    number = isinstance(placement, float | int) and not isinstance(placement, bool)
    if not (by_name or number):
        raise TypeError(f"placement is {placement!r}, expected 'replicated', 'owner' or a fraction of the processes")
    if placement == "auto":
        placement = "replicated" if mesh is None else "owner"
    if number and not 0 < placement <= 1:
        raise ValueError(f"placement is {placement!r}, expected a fraction in (0, 1]")
    alone = Team(None, team.device)
    if mesh is not None:
        if number:
            raise ValueError(
                f"placement is {placement!r}, expected 'owner' or 'replicated' under fully_shard, where a mesh of "
                "two dimensions says how many processes hold an inverse"
            )
        row = Team(mesh.get_group(mesh.ndim - 1), team.device)
        if placement == "replicated":
            return Grid(team, row, team, True)
        return Grid(team, row, alone if mesh.ndim == 1 else Team(mesh.get_group(0), team.device), False)
    if placement == "replicated" or team.size == 1:
        return Grid(team, alone, team, True)
    workers = 1 if placement == "owner" else round(placement * team.size)
    if placement != "owner" and (workers < 1 or workers != placement * team.size or team.size % workers):
        raise ValueError(f"placement is {placement!r}, expected k/{team.size} for a divisor k of {team.size} processes")
    columns = team.size // workers
    if workers == 1:
        return Grid(team, team, alone, False)
    first, own = team.rank - team.rank % columns, team.rank % columns
    ranks = range(first, first + columns), range(own, team.size, columns)
    row, column = (subgroup([team.global_rank(rank) for rank in some], team) for some in ranks)
    return Grid(team, row, column, False)


class Duties:
    """What each process does: layers that share a parameter have one owner, who is known from the shapes alone."""

    def __init__(self, layers: Sequence[Layer], processes: int) -> None:
        self.units = _units(layers)
        self.items: list[Item] = [[_sides(layer) for layer in unit] for unit in self.units]
        self.places: list[Place] = places_of(self.items, processes)
        self.owner = {layer.name: p.owner for unit, p in zip(self.units, self.places, strict=True) for layer in unit}
        shelves = {layer.name: p for unit, p in zip(self.units, self.places, strict=True) for layer in unit}
        self.order = sorted(shelves, key=lambda name: shelves[name][::-1])  #: a shelf after the other
        self.of_block = {
            block.name: self.owner[layer.name] for u in self.units for layer in u for block in layer.blocks
        }

    def turns(self, period: int) -> dict[str, int]:
        """The step of a period in which each layer is refreshed."""
        slots = slots_of(self.items, self.places, period)
        return {layer.name: slot for unit, slot in zip(self.units, slots, strict=True) for layer in unit}


def _units(layers: Sequence[Layer]) -> list[list[Layer]]:
    units: dict[int, list[Layer]] = {}
    unit_of: dict[Any, int] = {}
    for i, layer in enumerate(layers):
        parameters = {p for block in layer.blocks for p in block.parameters}
        met = {unit_of[p] for p in parameters if p in unit_of}
        first = min(met, default=i)
        units[first] = [one for j in sorted(met) for one in units.pop(j)] + [layer]
        unit_of |= {p: first for one in units[first] for block in one.blocks for p in block.parameters}
    return list(units.values())


def _sides(layer: Layer) -> Any:
    A, G = layer.empty_moments()
    return (A.shape[-1], A.ndim == 1), (G.shape[-1], G.ndim == 1), prod(A.shape[:-2])


def subgroup(ranks: Sequence[int], *teams: Team) -> Team:
    """A new group of these processes of all; every member of the teams, which together link them, makes one.

    It waits as long as the first team; torch's default is half an hour. torch names it by how many groups a process
    knows, and who has another name is waited for in vain: who knows fewer than the others makes some of itself alone.
    """
    own, known = [distributed.get_rank()], distributed.distributed_c10d._world.pg_names
    most = [len(known)]
    for team in teams:
        most = team.largest(most, "a process group")
    with teams[0].waiting("a process group"):
        while len(known) < most[0]:
            distributed.new_group(own, use_local_synchronization=True)
        group = distributed.new_group(list(ranks), teams[0].timeout, use_local_synchronization=True)
    return Team(group, teams[0].device)
