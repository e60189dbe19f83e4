"""Which processes take part: groups, meshes, and processes that know of groups of their own."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from test_distributed_agreement import made
from together import SPLITS, alone, model_of, spawned, trained, wrapped
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD = 4
STEPS = 4  # sums leave early from the third one on
SAID = {
    "ddp": "group is of the processes [0, 1, 3], expected [0, 1, 2, 3], of DistributedDataParallel",
    "fsdp": "group would have no effect: the mesh of the parameters has the processes [0, 1, 2, 3]",
    "hsdp": "group would have no effect: the mesh of the parameters has the processes [[0, 1], [2, 3]]",
    "the same": "",
}
CASES = {"ddp": {"placement": "owner"}, "columns": {"placement": 0.5}, "hsdp": {}}
TIMEOUT = 100.0  # seconds; nobody's default


def part_of_a_mesh(rank):
    """HSDP in each stage of a pipeline, on the whole batch."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "replicate", "shard"))["replicate", "shard"]
    model = fully_shard(model_of(), mesh=mesh)
    found = trained(model, model, SPLITS[2]["even"], rank % 2, 2, steps=STEPS)
    return found["weights"]


def refused(rank, world):
    """What is said of a group beside a wrapper, of which this process is one."""
    groups, said = [distributed.new_group(ranks) for ranks in ([0, 1, 3], [1, 2, 3])], {}
    for kind in SAID:
        called, given = wrapped(model_of(), "ddp" if kind == "the same" else kind, world), groups[rank == 2]
        try:
            made(called, group=distributed.group.WORLD if kind == "the same" else given)
            said[kind] = ""
        except ValueError as error:
            said[kind] = str(error).replace("[1, 2, 3], expected", "[0, 1, 3], expected")
    return said


def timeouts():
    """Those of the groups that are made beside the wrapper's own."""
    group = distributed.new_group(timeout=timedelta(seconds=TIMEOUT))
    called = nn.parallel.DistributedDataParallel(model_of(), process_group=group)
    exchange = made(called, placement=0.5)._exchange
    exchange.ahead.learn(SimpleNamespace(steady=1, rows={}))
    teams = exchange.grid.row, exchange.grid.column, exchange.ahead.team
    backends = [team.group._get_backend(torch.device("cpu")) for team in teams]
    return [backend.options._timeout.total_seconds() for backend in backends]


def run(rank, world):
    for ranks in ([0, 1], [0, 2], [0, 3]):
        distributed.new_group(ranks)
    if rank == 3:
        distributed.new_group([3], use_local_synchronization=True)
    found = {"mesh": part_of_a_mesh(rank), "refused": refused(rank, world), "timeouts": timeouts()}
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


@pytest.mark.parametrize("kind", SAID)
def test_a_group_beside_the_one_of_the_parameters_is_refused(processes, kind):
    assert all(found["refused"][kind] == SAID[kind] for found in processes)


def test_groups_wait_as_long_as_the_one_they_are_part_of(processes):
    assert all(found["timeouts"] == [TIMEOUT] * 3 for found in processes)
