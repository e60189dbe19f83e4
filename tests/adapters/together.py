"""Runs in several processes of torch.distributed, and the same in one."""

from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import set_forkserver_preload

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from training import dense

from kfaclinalg import LowRank
from kfaclinalg_torch import KFACPreconditioner, _inverses
from kfaclinalg_torch._grid import Duties

# What takes each process seconds to import, imported once and forked.
set_forkserver_preload(
    [
        "array_api_compat.torch",
        "kfaclinalg_torch",
        "pytest",
        "torch._decomp.decompositions_for_jvp",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
    ]
)

N = 12
STRUCTURES = {"block-diagonal": "block-diagonal", "eigen": "eigen", "low rank": LowRank(2)}
SPLITS = {
    2: {"even": (6, 6), "uneven": (9, 3), "empty": (12, 0)},
    3: {"even": (4, 4, 4), "uneven": (7, 1, 4), "empty": (5, 0, 7)},
    4: {"even": (3, 3, 3, 3), "uneven": (5, 1, 4, 2), "empty": (0, 5, 7, 0)},
}


def model_of(dtype=torch.float64):
    """Sides of 8, 7 and 3: uneven over three processes, and an empty part of the last over four."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)
    return nn.Sequential(*layers).to(dtype)


def batch_of(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=generator).to(dtype), torch.randint(3, (N,), generator=generator)


def one(rank, world, work, folder, *args):
    """In a process of its own: what `work` gives is stored under its rank."""
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": world}
    distributed.init_process_group("gloo", **where, timeout=timedelta(seconds=120))
    try:
        torch.save(work(rank, world, *args), f"{folder}/{rank}")
    finally:
        distributed.destroy_process_group()


def spawned(folder, world, work, *args):
    """What `work(rank, world, *args)` gives in each of so many processes."""
    given = world, work, str(folder), *args
    torch.multiprocessing.start_processes(one, given, nprocs=world, start_method="forkserver")
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(world)]


def wrapped(model, kind, world):
    """The model as it is trained in parallel."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    shape, names = ((2, world // 2), ("replicate", "shard")) if kind == "hsdp" else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def loss_of(outputs, targets, world):
    """What the mean over the processes makes the mean over all examples."""
    return functional.cross_entropy(outputs, targets, reduction="sum") * world / N


def trained(called, model, split, rank, world, *, steps=3, order=slice(None), **options):
    """The gradients of each step, the weights after all, and the averages that this process has."""
    options = {"estimator": "exact", "damping": 0.1, "statistics_period": 1, "inverse_period": 2} | options
    preconditioner = KFACPreconditioner(called, likelihood="categorical", **options)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for seed in range(steps):
        x, y = (t[order].split(split)[rank] for t in batch_of(seed, next(model.parameters()).dtype))
        optimizer.zero_grad()
        outputs = called(x)
        preconditioner.update(outputs)
        loss_of(outputs, y, world).backward()
        preconditioner.step()
        found.append({name: whole(p.grad).clone() for name, p in model.named_parameters()})
        optimizer.step()
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return {"gradients": found, "weights": weights, "layers": dense(preconditioner.layers)}


@contextmanager
def schedule_of(world, model=model_of):
    """One process refreshes in the steps in which so many would."""
    before = _inverses.turns_of

    def turns(layers, period):
        turns = Duties(KFACPreconditioner(model(), likelihood="categorical")._layers, world).turns(period)
        return list(turns.values())

    _inverses.turns_of = turns
    try:
        yield
    finally:
        _inverses.turns_of = before


def alone(world, dtype=torch.float64, **options):
    """The same on the whole batches in one process, with the schedule of several."""
    with schedule_of(world):
        model = model_of(dtype)
        return trained(model, model, (N,), 0, 1, **options)
