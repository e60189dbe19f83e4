"""Algorithm 2 in several processes is Algorithm 2 in one, on all of their examples.

That of four is in `test_distributed_kfac_of_four`.
"""

import copy
from functools import cache

import pytest
import torch
from test_distributed_agreement import same
from together import N, batch_of, model_of, spawned
from torch import nn

from kfaclinalg import Exact, LowRank
from kfaclinalg_torch import KFAC, _divided

WORLDS = (1, 2, 3)
PARTS = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
UNEVEN = {1: (12,), 2: (11, 1), 3: (1, 8, 3), 4: (1, 1, 9, 1)}  # S1 and S2 have none of some of them
EMPTY = {1: (12,), 2: (12, 0), 3: (5, 0, 7), 4: (0, 5, 7, 0)}
OPTIONS = {
    "block-diagonal": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
    "exact": {"estimator": "exact", "statistics_fraction": 1.0, "curvature_fraction": 0.5},
    "eigen": {"structure": "eigen", "statistics_fraction": 0.5},
    "low rank": {"structure": LowRank(2), "statistics_fraction": 0.5},
    "exact damping": {"structure": Exact(), "statistics_fraction": 0.5},
    "block-tridiagonal": {"structure": "block-tridiagonal", "statistics_fraction": 1.0},
    "beside a chain": {"structure": "block-tridiagonal", "statistics_fraction": 1.0},
    "chunks": {"chunk_size": 2, "statistics_fraction": 0.5, "curvature_fraction": 0.5},
    "uneven": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
    "uneven, masked": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
    "empty": {"statistics_fraction": 0.5, "curvature_fraction": 0.25},
    "empty, eigen": {"structure": "eigen", "statistics_fraction": 0.5},
    "empty, masked": {"statistics_fraction": 0.5, "curvature_fraction": 0.5, "chunk_size": 2},
    "empty, block-tridiagonal": {"structure": "block-tridiagonal", "statistics_fraction": 1.0},
    "all masked": {"statistics_fraction": 0.5, "curvature_fraction": 0.5},
    "all masked, eigen": {"structure": "eigen", "estimator": "exact", "chunk_size": 2},
    "all masked, block-tridiagonal": {"structure": "block-tridiagonal", "statistics_fraction": 1.0},
}


def options(world):
    """Where one process has all examples, those that divide them otherwise are no others."""
    return [name for name in OPTIONS if world > 1 or not name.startswith(("uneven", "empty"))]


def trained(name, rank=0, world=1, seed=3, steps=5):
    """The weights and what happened in each step, three γ in two of them; the seeds of the processes differ."""
    parts = UNEVEN if "uneven" in name else EMPTY if "empty" in name else PARTS
    counts = torch.ones(N, dtype=torch.bool)
    counts[slice(6, N) if "all masked" in name else slice(3, 6)] = False  # of the last process, and of others
    model = model_of()
    if name.endswith("block-tridiagonal"):  # the others have a normalisation beside it
        model = nn.Sequential(model[0], model[2], model[3], model[4], model[5])
    generator = torch.Generator().manual_seed(seed + rank)
    periods = {"inverse_period": 2, "gamma_period": 2}
    optimizer = KFAC(model, "categorical", damping=0.1, generator=generator, **periods, **OPTIONS[name])
    infos = []
    for step in range(steps):
        x, y, mask = (t.split(parts[world])[rank] for t in (*batch_of(step), counts))
        optimizer.step(x, y, mask=mask if "masked" in name else None)
        infos.append([getattr(optimizer.info, key) for key in ("loss", "damping", "gamma", "alpha", "mu", "ratio")])
        assert not optimizer.info.refused
    return {key: p.detach().clone() for key, p in model.named_parameters()}, torch.tensor(infos, dtype=torch.float64)


def resumed(rank=0, world=1, states=None):
    """The states after three steps, and the weights after three more; or these, from states of others."""
    model = model_of()
    optimizer = KFAC(model, "categorical", damping=0.1, generator=torch.Generator().manual_seed(0))
    if states is not None:
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    for step in range(0 if states is None else 3, 6):
        if step == 3:
            states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step(*(t.split(PARTS[world])[rank] for t in batch_of(step)))
    return states, model.state_dict()


def run(rank, world):
    _divided.PAYS = 0  # so that whatever can be is shared
    return {name: trained(name, rank, world) for name in options(world)} | {"resumed": resumed(rank, world)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return {world: spawned(tmp_path_factory.mktemp(f"of{world}"), world, run) for world in WORLDS}


expected = cache(trained)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in options(world)])
def test_as_many_processes_as_there_are_take_the_step_of_one(processes, name, world):
    check_steps(processes[world], name)


def check_steps(processes, name):
    """The weights are those of one process, and the same to the last bit in all."""
    weights, infos = expected(name)
    for found, happened in (process[name] for process in processes):
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(happened, infos, rtol=1e-7, atol=1e-9, equal_nan=True)
        assert same(found, processes[0][name][0])
        torch.testing.assert_close(happened, processes[0][name][1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("world", WORLDS)
def test_another_number_of_processes_goes_on_from_a_state(processes, world):
    check_resumed(processes[world])


def check_resumed(processes):
    """The state is the same in all of them, and loaded with weights_only=True."""
    states, weights = processes[-1]["resumed"]
    torch.testing.assert_close(resumed(states=states)[1], weights, rtol=1e-9, atol=1e-9)
    assert all(same(process["resumed"], processes[0]["resumed"]) for process in processes)


def test_the_parts_are_of_one_batch():
    assert all(sum(parts) == N for split in (PARTS, UNEVEN, EMPTY) for parts in split.values())
