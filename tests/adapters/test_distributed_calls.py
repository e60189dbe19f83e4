"""Calls in a wrong order are the same error in several processes as in one, in all of them and at the same step."""

import warnings
from unittest import mock

import pytest
from test_distributed_agreement import made, same, seen
from together import batch_of, loss_of, model_of, spawned, wrapped
from torch import distributed, nn

from kfaclinalg_torch import KFAC, KFACPreconditioner

WORLD = 2
WRAPPERS = ("ddp", "fsdp")
NOTHING = "nothing was captured before step(): call update(outputs) first"
STALE = "step() found the gradients as its last call has left them"
MISTAKES = {
    "no update": NOTHING,
    "update after the loss": "update(outputs) comes before loss.backward()",
    "update twice": "update() got outputs of no pass that has shown a layer",
    "step twice": STALE,
    "step twice, of two": STALE,  # of which the second takes no statistic
    "no loss": "no parameter has a gradient in step()",
}


def empirical(called, **options):
    return KFACPreconditioner(called, estimator="empirical", damping=0.1, inverse_period=2, **options)


def passed(called, preconditioner, rank, world, seed, mistake=""):
    x, y = (t.chunk(world)[rank] for t in batch_of(seed))
    outputs = called(x)
    loss = loss_of(outputs, y, world)
    if mistake == "update after the loss":
        loss.backward()
    if mistake != "no update" and (mistake != "no update in one" or rank):
        preconditioner.update(outputs)
    if mistake == "update twice":
        preconditioner.update(outputs)
    if mistake not in ("no loss", "update after the loss"):
        loss.backward()


def said_of(kind, mistake, rank, world):
    """What is said, and whether what raises has changed nothing."""
    model = model_of()
    called = wrapped(model, kind, world) if world > 1 else model
    preconditioner = made(called, statistics_period=2 if "of two" in mistake else 1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = None
        try:
            passed(called, preconditioner, rank, world, 0, mistake)
            before = seen(preconditioner, model) if "update" in mistake else None
            preconditioner.step()
            if "step twice" in mistake:
                before = seen(preconditioner, model)
                preconditioner.step()
        except (RuntimeError, ValueError) as error:
            return str(error), before is None or same(before, seen(preconditioner, model))
    return str(warned[-1].message) if warned else "", True


def twice(kind, rank, world):
    """A second step with the empirical estimator."""
    model = model_of()
    called = wrapped(model, kind, world) if world > 1 else model
    preconditioner = empirical(called, statistics_period=1)
    x, y = (t.chunk(world)[rank] for t in batch_of(0))
    loss_of(called(x), y, world).backward()
    preconditioner.step()
    try:
        preconditioner.step()
    except RuntimeError as error:
        return str(error)


def in_order(kind, rank, world, zeroed):
    """Steps between which gradients are kept, zeroed or taken away, each with new ones; how many there were."""
    model = model_of()
    views = {"gradient_as_bucket_view": True}  # which DistributedDataParallel itself writes to
    called = nn.parallel.DistributedDataParallel(model, **views) if kind == "ddp" else wrapped(model, kind, world)
    preconditioner = made(called, statistics_period=2)
    for seed in range(4):
        if zeroed != "kept":
            model.zero_grad(set_to_none=zeroed == "taken away")
        passed(called, preconditioner, rank, world, seed)
        preconditioner.step()
    return preconditioner._steps


def joined(rank, world):
    """In which step of `join` an error says what, and whether it has changed anything: the first process has more."""
    found = []
    for options in ({}, {"throw_on_early_termination": True}):
        model, steps, before = model_of(), 0, None
        called = wrapped(model, "ddp", world)
        preconditioner = made(called)
        try:
            with called.join(**options):
                for seed in range(3 - rank):
                    model.zero_grad()
                    passed(called, preconditioner, rank, world, seed)
                    before = seen(preconditioner, model)
                    preconditioner.step()
                    steps += 1
        except RuntimeError as error:
            found.append((steps, str(error), steps > 0 or same(before, seen(preconditioner, model))))
    return found


def made_before(rank, world):
    """What is said where torch.distributed runs since, and whether the weights and gradients are as they were."""
    with mock.patch.object(distributed, "is_initialized", return_value=False):
        model, other = model_of(), model_of()
        preconditioner, optimizer = made(model), KFAC(other, "categorical")
    called, said, weights = wrapped(model, "ddp", world), [], [p.detach().clone() for p in other.parameters()]
    passed(called, preconditioner, rank, world, 0)
    before = seen(preconditioner, model)
    for step in (preconditioner.step, lambda: optimizer.step(*(t.chunk(world)[rank] for t in batch_of(0)))):
        try:
            step()
        except RuntimeError as error:
            said.append(str(error))
    unchanged = same(before, seen(preconditioner, model))
    return said, unchanged and same(weights, [p.detach() for p in other.parameters()])


def run(rank, world):
    found = {f"{kind} {mistake}": said_of(kind, mistake, rank, world) for kind in WRAPPERS for mistake in MISTAKES}
    found["before"], found["joined"] = made_before(rank, world), joined(rank, world)
    found["in one"] = said_of("ddp", "no update in one", rank, world)
    for kind in WRAPPERS:
        found[f"{kind} twice"] = twice(kind, rank, world)
        found[f"{kind} in order"] = [in_order(kind, rank, world, how) for how in ("kept", "zeroed", "taken away")]
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("calls"), WORLD, run)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_mistake_is_that_of_one_process_in_all_of_them(processes, kind, mistake):
    expected, _ = said_of(kind, mistake, 0, 1)
    assert MISTAKES[mistake] in expected
    for found in processes:
        assert found[f"{kind} {mistake}"] == (expected, True)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_second_step_on_the_same_gradients_of_the_loss_s_own_statistics(processes, kind):
    assert STALE in twice(kind, 0, 1)
    assert all(STALE in found[f"{kind} twice"] for found in processes)


def test_an_update_that_one_process_leaves_out_is_everyones_error(processes):
    """In the first step, in which one process alone would have nothing to go on with."""
    assert NOTHING in processes[0]["in one"][0]
    assert "process 0 of 2 failed at the start of a step" in processes[1]["in one"][0]
    assert all(found["in one"][1] for found in processes)


def test_what_was_made_for_one_process_is_none_of_several(processes):
    for said, unchanged in (found["before"] for found in processes):
        assert len(said) == 2
        assert all("make it after init_process_group" in one for one in said)
        assert unchanged


@pytest.mark.parametrize("kind", WRAPPERS)
def test_new_gradients_are_taken_wherever_they_are_put(processes, kind):
    assert all(found[f"{kind} in order"] == [4, 4, 4] for found in processes)


def test_join_is_refused_but_where_it_ends_for_all(processes):
    for rank, found in enumerate(process["joined"] for process in processes):
        (steps, said, unchanged), (others, ended, _) = found
        assert steps == 0
        assert "model is in join()" in said
        assert unchanged
        assert others == 2
        assert ("exhausted all inputs" if rank else "at least one rank that exhausted inputs") in ended
