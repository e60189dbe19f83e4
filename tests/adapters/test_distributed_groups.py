"""Which processes take part: groups, meshes, and processes that know of groups of their own."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from test_distributed_agreement import made
from together import SPLITS, N, alone, batch_of, model_of, spawned, trained, wrapped
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from kfaclinalg_torch import Empirical, KFACPreconditioner

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


def pipeline(rank=None):
    """The weights of a stage that two processes train, in two parts of their batches; of one process those of all."""
    model = model_of()
    part, options = model, {"estimator": Empirical("sum"), "damping": 0.1, "inverse_period": 1}
    if rank is not None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
        (_, chain), (own, data) = ((mesh.get_local_rank(name), mesh.get_group(name)) for name in mesh.mesh_dim_names)
        at, shapes = rank // 2, [torch.empty(3, d, dtype=torch.float64, requires_grad=d == 8) for d in (4, 8, 3)]
        part, options["group"], options["placement"] = (model[:3], model[3:])[at], data, "owner"
        # without these a stage learns the shapes from a pass of its own, which is no other's in the statistic
        given = {"input_args": shapes[at], "output_args": shapes[at + 1]}
        stage = PipelineStage(part, at, 2, torch.device("cpu"), group=chain, **given)
        schedule = Schedule1F1B(stage, 2, loss_fn=summed, scale_grads=False)
    preconditioner = KFACPreconditioner(part, **options)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for seed in range(3):
        x, y = batch_of(seed)
        optimizer.zero_grad()
        if rank is None:
            summed(model(x), y).backward()
        else:
            schedule.step(*([] if at else [x.chunk(2)[own]]), target=y.chunk(2)[own] if at else None)
            for p in part.parameters():
                distributed.all_reduce(p.grad, group=data)
        for p in part.parameters():
            p.grad.div_(N)
        preconditioner.step()
        optimizer.step()
    return {name: p.detach().clone() for name, p in part.named_parameters()}


def summed(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="sum")


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
    found["pipeline"] = pipeline(rank)
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


def test_the_stages_of_a_pipeline_are_those_of_one_process(processes):
    expected = pipeline()
    for rank, found in enumerate(process["pipeline"] for process in processes):
        assert set(found) == {name for name in expected if (name[0] in "35") == (rank > 1)}
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-9)


def test_groups_wait_as_long_as_the_one_they_are_part_of(processes):
    assert all(found["timeouts"] == [TIMEOUT] * 3 for found in processes)
