"""Algorithm 2 in several processes is Algorithm 2 in one, on all of their examples."""

import pytest
import torch
from test_distributed_agreement import same
from together import N, batch_of, model_of, spawned
from torch import nn

from kfaclinalg_torch import KFAC

WORLDS = (1, 2, 3, 4)
PARTS = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
UNEVEN = {1: (12,), 2: (11, 1), 3: (1, 8, 3), 4: (1, 1, 9, 1)}  # S1 and S2 have none of some of them
OPTIONS = {
    "block-diagonal": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
    "exact": {"estimator": "exact", "statistics_fraction": 1.0, "curvature_fraction": 0.5},
    "eigen": {"structure": "eigen", "statistics_fraction": 0.5},
    "block-tridiagonal": {"structure": "block-tridiagonal", "statistics_fraction": 1.0},
    "chunks": {"chunk_size": 2, "statistics_fraction": 0.5, "curvature_fraction": 0.5},
    "uneven": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
}


def trained(name, rank=0, world=1, seed=3, steps=4):
    """The weights and what happened in each step; the seeds of the processes differ."""
    parts = UNEVEN if name == "uneven" else PARTS
    model = model_of()
    if name == "block-tridiagonal":
        model = nn.Sequential(model[0], model[2], model[3], model[4], model[5])
    generator = torch.Generator().manual_seed(seed + rank)
    optimizer = KFAC(model, "categorical", damping=0.1, generator=generator, **OPTIONS[name])
    infos = []
    for step in range(steps):
        x, y = (t.split(parts[world])[rank] for t in batch_of(step))
        optimizer.step(x, y)
        infos.append([getattr(optimizer.info, key) for key in ("loss", "damping", "gamma", "alpha", "mu", "ratio")])
        assert not optimizer.info.refused
    return {key: p.detach().clone() for key, p in model.named_parameters()}, torch.tensor(infos, dtype=torch.float64)


def refused(rank):
    """The errors of a step with a wrong target in one process, and with other weights in one."""
    model, (x, y) = model_of(), (t.split(PARTS[3])[rank] for t in batch_of(0))
    optimizer = KFAC(model, "categorical")
    before, said = [p.detach().clone() for p in model.parameters()], []
    for targets in (torch.full_like(y, 5) if rank == 1 else y, y):
        try:
            optimizer.step(x, targets)
        except (RuntimeError, ValueError) as error:
            said.append((str(error), same(before, [p.detach() for p in model.parameters()])))
        if rank == 2:
            model[0].weight.data += 1
            before[0] += 1
    return said


def run(rank, world):
    found = {name: trained(name, rank, world) for name in OPTIONS}
    return found | ({"refused": refused(rank)} if world == 3 else {})


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return {world: spawned(tmp_path_factory.mktemp(f"of{world}"), world, run) for world in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_as_many_processes_as_there_are_take_the_step_of_one(processes, name, world):
    weights, infos = trained(name)
    for found, happened in (process[name] for process in processes[world]):
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(happened, infos, rtol=1e-7, atol=1e-9, equal_nan=True)
        assert same(found, processes[world][0][name][0])  # to the last bit
        torch.testing.assert_close(happened, processes[world][0][name][1], rtol=0, atol=0, equal_nan=True)


def test_a_wrong_target_and_other_weights_are_everyones(processes):
    for rank, found in enumerate(process["refused"] for process in processes[3]):
        (target, unchanged), (weights, still) = found
        assert unchanged
        assert still
        assert ("expected" if rank == 1 else "process 1 of 3 failed at the gradient") in target
        assert "the processes differ in the first weights" in weights


def test_the_parts_are_of_one_batch():
    assert all(sum(parts) == N for split in (PARTS, UNEVEN) for parts in split.values())
