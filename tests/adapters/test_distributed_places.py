"""Who owns which layer: balance by counted cost."""

import pytest

from _cost_model import NETWORKS, dense
from kfaclinalg_torch._places import critical_path, memory_of, places_of, slots_of, work_of

GPT2 = NETWORKS["GPT-2 small"]


def test_the_networks_are_those_of_that_name():
    assert (len(GPT2), len(NETWORKS["ResNet-50"])) == (48, 54)
    assert sum(n * m for item in NETWORKS["ResNet-50"] for (n, _), (m, _), _ in item) == 25_503_912  # with fc's bias


@pytest.mark.parametrize("period", [1, 10, 100])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_nobody_waits_long_for_the_others(name, processes, period):
    path, bound = critical_path(NETWORKS[name], processes, period)
    assert bound <= path <= 1.1 * bound if processes <= 8 else path <= 1.4 * bound


@pytest.mark.parametrize("processes", [1, 2, 7, 64, 512, 4096])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_wait_is_less_than_the_costliest_layer(name, processes):
    """At every size: the path over the shares of all is at most the costliest one, which no split can beat."""
    items = NETWORKS[name]
    path, bound = critical_path(items, processes, period=10)
    works = list(map(work_of, items))
    assert bound <= path < sum(works) / processes + max(works)
    if processes >= len(items):
        assert path == bound == max(works)


@pytest.mark.parametrize("processes", [2, 8, 64, 4096])
def test_owners_hold_as_much_as_each_other(processes):
    """Many equal layers: work and memory differ by one layer at most; nobody is idle."""
    items = [dense(64, 32)] * 3 * processes
    places = places_of(items, processes)
    held = [sum(place.owner == rank for place in places) for rank in range(processes)]
    assert set(held) == {3}


def test_memory_decides_where_the_work_is_the_same():
    """Diagonal sides cost next to no work, and their memory is spread."""
    heavy = [[((10, False), (10, False), 1)]] * 2
    light = [[((1000, True), (0, True), 1)], [((500, True), (500, True), 1)]] * 4
    places = places_of([*heavy, *light], 2)
    memory = [sum(memory_of(i) for i, p in zip([*heavy, *light], places, strict=True) if p.owner == r) for r in (0, 1)]
    assert max(memory) - min(memory) <= 1000


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_the_steps_of_a_period_cost_as_much_as_each_other(processes):
    """The dearest one is at most twice the mean, or what the costliest layer takes."""
    places, loads = places_of(GPT2, processes), dict[tuple[int, int], int]()
    for item, place, slot in zip(GPT2, places, slots_of(GPT2, places, 10), strict=True):
        loads[slot, place.owner] = loads.get((slot, place.owner), 0) + work_of(item)
    steps = [max((load for (at, _), load in loads.items() if at == slot), default=0) for slot in range(10)]
    assert max(steps) <= max(2 * sum(steps) / 10, *map(work_of, GPT2))


def test_with_as_many_processes_as_layers_each_has_one():
    assert {place.owner for place in places_of(GPT2, 48)} == set(range(48))
