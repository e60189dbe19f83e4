"""Which processes take part: groups, meshes, and processes that know of groups of their own."""

import pytest
import torch
from together import SPLITS, alone, model_of, spawned, trained, wrapped
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD = 4
STEPS = 4  # sums leave early from the third one on
CASES = {"ddp": {"placement": "owner"}, "columns": {"placement": 0.5}, "hsdp": {}}


def part_of_a_mesh(rank):
    """HSDP in each stage of a pipeline, on the whole batch."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "replicate", "shard"))["replicate", "shard"]
    model = fully_shard(model_of(), mesh=mesh)
    found = trained(model, model, SPLITS[2]["even"], rank % 2, 2, steps=STEPS)
    return found["weights"]


def run(rank, world):
    for ranks in ([0, 1], [0, 2], [0, 3]):
        distributed.new_group(ranks)
    if rank == 3:
        distributed.new_group([3], use_local_synchronization=True)
    found = {"mesh": part_of_a_mesh(rank)}
    for kind, options in CASES.items():
        model = model_of()
        called = wrapped(model, "hsdp" if kind == "hsdp" else "ddp", world)
        found[kind] = trained(called, model, SPLITS[world]["uneven"], rank, world, steps=STEPS, **options)["weights"]
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("groups"), WORLD, run)


@pytest.mark.parametrize("kind", ["mesh", *CASES])
def test_processes_that_know_different_numbers_of_groups_train_together(processes, kind):
    expected = alone(2 if kind == "mesh" else WORLD, steps=STEPS)["weights"]
    for found in processes:
        torch.testing.assert_close(found[kind], expected, rtol=1e-9, atol=1e-9)
