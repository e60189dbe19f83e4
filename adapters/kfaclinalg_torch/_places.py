"""Which process makes the inverse of each layer, and in which step of a period."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Any, NamedTuple

Side = tuple[int, bool]  #: its length, and whether it is a diagonal
Item = Sequence[tuple[Side, Side, int]]  #: A, G and the length of the batch, of each layer that one owner must hold


class Place(NamedTuple):
    """The process that owns an item, and its shelf: items of one shelf are refreshed in the same step."""

    owner: int
    shelf: int


def work_of(item: Item) -> int:
    """n³ + m³ for each member, without those of diagonal sides."""
    return sum(batch * sum(d if diagonal else d**3 for d, diagonal in sides) for *sides, batch in item)


def memory_of(item: Item) -> int:
    """Entries of A and G."""
    return sum(batch * sum(d if diagonal else d * d for d, diagonal in sides) for *sides, batch in item)


def places_of(items: Sequence[Item], processes: int) -> list[Place]:
    """Where each item is, from the shapes and the number of processes alone.

    A shelf is as high as the costliest item that is left, and every process has as much room on it: whatever fits goes
    to the process with the least on the shelf, and then the least work and memory in all. What the processes wait for
    each other is less than the costliest item, in the whole of a period.
    """
    costs = [(work_of(item), memory_of(item)) for item in items]
    left = sorted(range(len(items)), key=lambda i: (-costs[i][0], -costs[i][1], i))
    totals = [(0, 0)] * processes
    places: dict[int, Place] = {}
    shelf = 0
    while left:
        height, over = costs[left[0]][0], []
        room = [(0, *totals[rank], rank) for rank in range(processes)]
        heapify(room)
        for i in left:
            (work, memory), (load, before, held, rank) = costs[i], room[0]
            if load + work > height:
                over.append(i)
                continue
            places[i], totals[rank] = Place(rank, shelf), (before + work, held + memory)
            heapreplace(room, (load + work, *totals[rank], rank))
        left, shelf = over, shelf + 1
    return [places[i] for i in range(len(items))]


def slots_of(items: Sequence[Item], places: Sequence[Place], period: int) -> list[int]:
    """The step of a period in which each item is refreshed; the shelves are spread over it by their heights."""
    heights = [0] * (1 + max((place.shelf for place in places), default=-1))
    for item, place in zip(items, places, strict=True):
        heights[place.shelf] = max(heights[place.shelf], work_of(item))
    loads, slots = [0] * period, [0] * len(heights)
    for shelf in sorted(range(len(heights)), key=lambda i: -heights[i]):
        slots[shelf] = loads.index(min(loads))
        loads[slots[shelf]] += heights[shelf]
    return [slots[place.shelf] for place in places]


def critical_path(items: Sequence[Item], processes: int, period: int) -> tuple[int, int]:
    """The work that the processes wait for in a period, Σ over its steps of the most that one does; and its bound.

    Less than the whole over `processes`, or than the costliest item, it cannot be: items are whole.
    """
    places, loads = places_of(items, processes), dict[Any, int]()
    for item, place, slot in zip(items, places, slots_of(items, places, period), strict=True):
        loads[slot, place.owner] = loads.get((slot, place.owner), 0) + work_of(item)
    path = sum(max((load for (at, _), load in loads.items() if at == slot), default=0) for slot in range(period))
    works = list(map(work_of, items))
    return path, max(-(-sum(works) // processes), *works)
