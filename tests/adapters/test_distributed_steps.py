"""Steps of many processes are those of one: placements, structures, batches, DistributedDataParallel, FSDP2, HSDP."""

import pytest
import torch
from together import SPLITS, STRUCTURES, alone, model_of, spawned, trained, wrapped

WORLDS = (3, 4)
LIMITS = {"no limit": {}, "length": {"length": 1e-3}, "clip": {"kl_clip": 1e-3}}


def cases(world):
    """(wrapper, placement, structure, split, limit) by name."""
    placements = [("ddp", "replicated"), ("ddp", "owner"), ("fsdp", "owner"), ("fsdp", "replicated")]
    if world == 4:
        placements = [("ddp", 0.5), ("hsdp", "owner"), ("hsdp", "replicated"), ("fsdp", "owner")]
    for wrapper, placement in placements:
        for i, structure in enumerate(STRUCTURES):
            for split in SPLITS[world]:
                if world == 3 or split == ("even", "uneven", "empty")[i]:  # a Latin square where all would take long
                    limit = "no limit" if world == 3 else ("no limit", "length", "clip")[i]
                    yield wrapper, placement, structure, split, limit


CASES = {f"{world} {' '.join(map(str, case))}": (world, case) for world in WORLDS for case in cases(world)}


def run(rank, world):
    found = {}
    for name, (processes, (wrapper, placement, structure, split, limit)) in CASES.items():
        if processes == world:
            model = model_of()
            called = wrapped(model, wrapper, world)
            options = {"placement": placement, "structure": STRUCTURES[structure]} | LIMITS[limit]
            found[name] = trained(called, model, SPLITS[world][split], rank, world, **options)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return {world: spawned(tmp_path_factory.mktemp(f"of{world}"), world, run) for world in WORLDS}


@pytest.fixture(scope="module")
def references():
    return {}


def reference(references, world, structure, limit):
    key = world, structure, limit
    if key not in references:
        references[key] = alone(world, structure=STRUCTURES[structure], **LIMITS[limit])
    return references[key]


@pytest.mark.parametrize("name", CASES)
def test_many_processes_give_what_one_gives(processes, references, name):
    world, (_, placement, structure, _, limit) = CASES[name]
    expected, found = reference(references, world, structure, limit), [ranks[name] for ranks in processes[world]]
    for process in found:
        assert_close(process["gradients"], expected["gradients"])
        assert_close(process["weights"], expected["weights"])
        torch.testing.assert_close(process["weights"], found[0]["weights"], rtol=0, atol=0)  # to the last bit
    held = [set(process["layers"]) for process in found]
    if placement == "replicated":
        assert all(names == set(expected["layers"]) for names in held)
    else:
        assert sum(map(len, held)) == len(set().union(*held)) == len(expected["layers"])  # each with one process alone
    for process in found:
        assert_close(process["layers"], {name: expected["layers"][name] for name in process["layers"]})


def assert_close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world", WORLDS)
def test_the_schedule_that_is_compared_is_not_of_one_step(world):
    """Layers are refreshed in different steps, with what was inverted before."""
    stale = alone(world, structure="block-diagonal", inverse_period=2)
    fresh = alone(world, structure="block-diagonal", inverse_period=1)
    assert (stale["weights"]["0.weight"] - fresh["weights"]["0.weight"]).abs().max() > 1e-4
