"""Steps of three processes are those of one: placements, structures, batches, DistributedDataParallel and FSDP2.

Those of four are in `test_distributed_steps_of_four`.
"""

import pytest
import torch
from together import SPLITS, STRUCTURES, N, alone, model_of, spawned, trained, wrapped
from torch.utils._pytree import tree_leaves

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-6}  # of a difference over the largest entry
ORDERS = 6
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


def dtypes(world, structure, split):
    """In float32 one split for each structure: the others would round as it does."""
    square = world == 4 or list(STRUCTURES).index(structure) == list(SPLITS[world]).index(split)
    return BOUNDS if square else [torch.float64]


def runs(world):
    """Cases and dtypes."""
    return [(case, dtype) for case in cases(world) for dtype in dtypes(world, *case[2:4])]


def of(world):
    """The parameters of a test."""
    return pytest.mark.parametrize(
        ("case", "dtype"), [pytest.param(*run, id=" ".join(map(str, (*run[0], run[1])))) for run in runs(world)]
    )


def run(rank, world):
    found = {}
    for case, dtype in runs(world):
        wrapper, placement, structure, split, limit = case
        model = model_of(dtype)
        called = wrapped(model, wrapper, world)
        options = {"placement": placement, "structure": STRUCTURES[structure]} | LIMITS[limit]
        found[case, dtype] = trained(called, model, SPLITS[world][split], rank, world, **options)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("of3"), 3, run)


@pytest.fixture(scope="module")
def references():
    return {}


def reference(references, world, dtype, structure, limit):
    key = world, dtype, structure, limit
    if key not in references:
        references[key] = alone(world, dtype, structure=STRUCTURES[structure], **LIMITS[limit])
    return references[key]


def spread(references, world, dtype, structure, limit):
    """How far the gradients and weights of one process are from those with its examples in another order.

    In float32 the order moves the loss's gradients by 2e-7, and what the inverses make of these by up to 3e-6.
    """
    key = world, dtype, structure, limit, "spread"
    if key not in references:
        expected, found = reference(references, world, dtype, structure, limit), 0.0
        for seed in range(ORDERS if dtype == torch.float32 else 0):
            order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
            other = alone(world, dtype, order=order, structure=STRUCTURES[structure], **LIMITS[limit])
            found = max(found, *(far(other[kind], expected[kind]) for kind in ("gradients", "weights")))
        references[key] = found
    return references[key]


@of(3)
def test_three_processes_give_what_one_gives(processes, references, case, dtype):
    check(processes, references, case, dtype)


def check(processes, references, case, dtype):
    """Gradients, weights and averages are those of one process, and each layer is where its placement has it."""
    world, (_, placement, structure, _, limit) = len(processes), case
    expected = reference(references, world, dtype, structure, limit)
    found = [process[case, dtype] for process in processes]
    bound = max(BOUNDS[dtype], 2 * spread(references, world, dtype, structure, limit))
    for process in found:
        assert far(process["gradients"], expected["gradients"]) <= bound
        assert far(process["weights"], expected["weights"]) <= bound
        torch.testing.assert_close(process["weights"], found[0]["weights"], rtol=0, atol=0)  # to the last bit
    held = [set(process["layers"]) for process in found]
    if placement == "replicated":
        assert all(names == set(expected["layers"]) for names in held)
    else:
        assert sum(map(len, held)) == len(set().union(*held)) == len(expected["layers"])  # each with one process alone
    for process in found:
        held = {name: expected["layers"][name] for name in process["layers"]}
        assert far(process["layers"], held) <= BOUNDS[dtype]


def far(found, expected):
    """The largest difference of a tensor over its largest entry."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs or not expected
    return max((float((x - y).abs().max() / y.abs().max()) for x, y in pairs), default=0.0)


def test_the_order_of_the_examples_is_rounding(references):
    """What the bounds in float32 are made of is small, too."""
    for structure in STRUCTURES:
        assert 0 < spread(references, 3, torch.float32, structure, "no limit") < 1e-5


@pytest.mark.parametrize("world", [3, 4])
def test_the_schedule_that_is_compared_is_not_of_one_step(world):
    """Layers are refreshed in different steps, with what was inverted before."""
    stale = alone(world, structure="block-diagonal", inverse_period=2)
    fresh = alone(world, structure="block-diagonal", inverse_period=1)
    assert (stale["weights"]["0.weight"] - fresh["weights"]["0.weight"]).abs().max() > 1e-4
