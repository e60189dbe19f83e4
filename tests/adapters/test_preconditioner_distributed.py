"""The parts of a batch, in several passes or in several processes, give what the batch gives."""

import pytest
from together import spawned
from torch import nn
from torch.nn import functional
from training import (
    Fixed,
    Mixed,
    assert_near,
    assert_same,
    backward,
    batch,
    dense,
    gradients,
    mixed_batch,
    network,
    preconditioned,
)

# -- gradient accumulation --


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ["exact", "empirical", "fixed"])
@pytest.mark.parametrize(("parts", "reduction"), [((6, 6), "mean"), ((1, 4, 7), "sum"), ((1,) * 12, "mean")])
def test_parts_of_a_batch_are_the_batch(estimator, parts, reduction, weight_sharing):
    x, y = mixed_batch(N=12)
    N, runs = len(x), []
    for sizes in ((12,), parts):
        model = Mixed()
        likelihood = Fixed() if estimator == "fixed" else "categorical"
        kind = "sampled" if estimator == "fixed" else estimator
        own = {"reduction": reduction} if estimator == "empirical" else {}
        preconditioner = preconditioned(model, kind, likelihood, weight_sharing=weight_sharing, damping=0.1, **own)
        for part, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            share = len(part) / N if reduction == "mean" else len(part)
            backward(model, preconditioner, part, targets, scale=share)
        preconditioner.step()
        runs.append((dense(preconditioner.layers), gradients(model)))
    assert_near(runs[1][0], runs[0][0])
    assert_near(runs[1][1], runs[0][1], c=1000)


@pytest.mark.parametrize("structure", ["eigen", "block-tridiagonal"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_parts_of_a_batch_are_the_batch_to_every_structure(structure, estimator):
    (x, y), runs = batch(), []
    for sizes in ((12,), (5, 7)):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, estimator, structure=structure, damping=0.1)
        for part, targets in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(model, preconditioner, part, targets, scale=len(part) / len(x))
        preconditioner.step()
        runs.append((dense(preconditioner.layers), gradients(model)))
    assert_near(runs[1][0], runs[0][0])
    assert_near(runs[1][1], runs[0][1], c=1000)


def test_all_forward_passes_may_come_before_the_backward_passes():
    (x, y), runs = batch(), []
    for sizes in ((12,), (5, 7)):
        model = network(4, 8, 3)
        preconditioner = preconditioned(model, "empirical")
        losses = [
            functional.cross_entropy(model(part), targets) * len(part) / len(x)
            for part, targets in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        for loss in reversed(losses):
            loss.backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_near(*runs)


# -- DistributedDataParallel --

WORLD = 2
DISTRIBUTED = {
    f"{structure} {estimator} {kind}": (structure, estimator, kind)
    for structure, kinds in {
        "block-diagonal": ("linear", "mixed", "reduce", "unequal", "empty"),
        "eigen": ("linear", "mixed"),
        "block-tridiagonal": ("linear",),
    }.items()
    for estimator in ("exact", "empirical")
    for kind in kinds
}


def distributed_run(structure, estimator, kind, rank, world):
    """The gradients and factors after three steps on this process's share of the batches."""
    linear = kind in ("linear", "unequal", "empty")
    parts = {"unequal": (9, 3), "empty": (12, 0)}.get(kind, (6, 6))
    model = network(4, 8, 3) if linear else Mixed()
    called = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    sharing = "reduce" if kind == "reduce" else "expand"
    preconditioner = preconditioned(
        called, estimator, structure=structure, weight_sharing=sharing, damping=0.1, inverse_period=1
    )
    found = []
    for seed in range(3):
        x, y = batch(seed=seed) if linear else mixed_batch(seed, N=12)
        if world > 1:
            x, y = (t.split(parts)[rank] for t in (x, y))
        model.zero_grad()
        if kind == "empty":
            outputs = called(x)
            if estimator != "empirical":
                preconditioner.update(outputs)
            (functional.cross_entropy(outputs, y, reduction="sum") / 12).backward()
        else:
            backward(called, preconditioner, x, y)
        preconditioner.step()
        found.append(gradients(model))
    return found, dense(preconditioner.layers)


def chosen(x, y):
    """The periods that a preconditioner chooses in its first step."""
    model = network(4, 30, 3)
    preconditioner = preconditioned(model, "exact")
    backward(model, preconditioner, x, y)
    preconditioner.step()
    return dict(preconditioner._periods)


def run(rank, world):
    found: dict = {name: distributed_run(*case, rank, world) for name, case in DISTRIBUTED.items()}
    found["periods"] = chosen(*(t.split(6)[rank] for t in batch()))
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("distributed"), WORLD, run)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_give_what_one_gives_on_the_whole_batch(processes, name):
    found, layers = distributed_run(*DISTRIBUTED[name], 0, 1)
    for process in processes:
        assert_near(process[name][1], layers)
        if not name.endswith(("unequal", "empty")):  # there DDP's own mean of the gradients is another
            assert_near(process[name][0], found, c=1000)
    # To the last bit, or else the copies of the model would drift apart: nobody sends the weights round again.
    assert_same(processes[0][name], processes[1][name])


def test_the_periods_are_chosen_together_by_the_work_of_one_process(processes):
    """Each process has half of the examples, makes half of the inverses and all of the products."""
    together = processes[0]["periods"]
    assert processes[1]["periods"] == together
    alone = chosen(*(t[:6] for t in batch()))
    assert together["statistics_period"] == alone["statistics_period"]
    assert together["inverse_period"] == -(-alone["inverse_period"] // 2)
