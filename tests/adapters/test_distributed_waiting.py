"""What is on its way, and who is waited for: sums that leave before their step, processes that are lost in it."""

import ast
import itertools
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_distributed_agreement import made, raised, same
from together import batch_of, loss_of, model_of, spawned, whole, wrapped
from torch import distributed
from training import dense

import kfaclinalg_torch
from kfaclinalg_torch import KFAC, _divided

WORLD = 3
ADAPTER = Path(kfaclinalg_torch.__file__).parent
COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather_object", "all_to_all_single")
KINDS = {
    "ddp replicated": ("ddp", {"placement": "replicated", "kl_clip": 1e-3}),
    "ddp owner eigen": ("ddp", {"placement": "owner", "structure": "eigen", "kl_clip": 1e-3}),
    "fsdp owner": ("fsdp", {"placement": "owner"}),
}


class Gone:
    def wait(self):
        raise RuntimeError("Connection closed by peer")


@contextmanager
def cut(n):
    """The nth collective from here finds nobody: at once or, where it is not waited for yet, then."""
    count, before = itertools.count(), {name: getattr(distributed, name) for name in COLLECTIVES}

    def broken(collective):
        def call(*args, **kwargs):
            if next(count) != n:
                return collective(*args, **kwargs)
            return Gone() if kwargs.get("async_op") else Gone().wait()

        return call

    for name, collective in before.items():
        setattr(distributed, name, broken(collective))
    try:
        yield count
    finally:
        for name, collective in before.items():
            setattr(distributed, name, collective)


def passed(called, preconditioner, rank, seed, parts=1, updated=True):
    """A pass, or several; all but the last send no gradients."""
    x, y = (t.chunk(WORLD)[rank] for t in batch_of(seed))
    for i, (inputs, targets) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        if parts > 1:
            called.require_backward_grad_sync = i == parts - 1
        outputs = called(inputs)
        if updated:
            preconditioner.update(outputs)
        loss_of(outputs, targets, WORLD).backward()


def lost(rank, kind, options):
    """Of each collective of a third step the error, and whether it has changed anything."""
    found, n = [], 0
    while n is not None:
        model = model_of()
        called = wrapped(model, kind, WORLD)
        preconditioner = made(called, inverse_period=1, **options)
        for seed in range(2):
            model.zero_grad()
            passed(called, preconditioner, rank, seed)
            preconditioner.step()
        model.zero_grad()
        with cut(n) as count:
            passed(called, preconditioner, rank, 2)
            found.append(raised(model, preconditioner))
            n = None if next(count) <= n else n + 1
    return found


def lost_in_kfac(rank):
    found, n = [], 0
    while n is not None:
        model = model_of()
        optimizer = KFAC(model, "categorical", generator=torch.Generator().manual_seed(0))
        for seed in range(2):
            optimizer.step(*(t.chunk(WORLD)[rank] for t in batch_of(seed)))
        before, state = [p.detach().clone() for p in model.parameters()], optimizer._state
        with cut(n) as count:
            said = ""
            try:
                optimizer.step(*(t.chunk(WORLD)[rank] for t in batch_of(2)))
            except RuntimeError as error:
                said = str(error)
            found.append((said, same(before, [p.detach() for p in model.parameters()]) and optimizer._state is state))
            n = None if next(count) <= n else n + 1
    return found


def irregular(rank, kind, early):
    """Steps in which a process has more updates than the others, one has none, and one meets an error at first."""
    model = model_of()
    called = wrapped(model, kind, WORLD)
    preconditioner = made(called, placement="owner")
    if not early:
        preconditioner._exchange.ahead.team = None
    found, left = [], []
    for seed in range(8):
        model.zero_grad()
        odd = seed == 2 and kind == "ddp"
        passed(called, preconditioner, rank, seed, parts=1 + (odd and rank == 1), updated=not (odd and rank == 2))
        left.append(preconditioner._estimate.statistic.early is not None)
        if seed == 6:
            preconditioner.damping = (lambda step: {}["nothing"]) if rank == 1 else 0.1
            said, unchanged = raised(model, preconditioner)
            assert said
            assert unchanged
            preconditioner.damping = 0.1
        preconditioner.step()
        found.append({name: whole(p.grad).clone() for name, p in model.named_parameters()})
    return found, dense(preconditioner.layers), left


def run(rank, world):
    _divided.PAYS = 0
    found = {name: lost(rank, *kind) for name, kind in KINDS.items()}
    found["KFAC"] = lost_in_kfac(rank)
    for kind in ("ddp", "fsdp"):
        for early in (False, True):
            found[f"{kind} {early}"] = irregular(rank, kind, early)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("waiting"), WORLD, run)


COMMON = {"the start of a step", "the counts of the statistics", "the statistics", "the inverses", "the updates"}
WHATS = {
    "ddp replicated": COMMON,
    "ddp owner eigen": COMMON | {"the squares of the gradients", "the length of the update"},
    "fsdp owner": COMMON | {"the rows of the gradients"},
    "KFAC": {
        *("the start of a step", "the sizes of the parts", "the random numbers", "the gradient", "the factors"),
        *("the counts of the statistics", "the statistics", "the inverses", "the curvature", "the loss"),
    },
}


@pytest.mark.parametrize("kind", WHATS)
def test_whatever_is_waited_for_in_vain_is_said(processes, kind):
    for rank, found in enumerate(process[kind] for process in processes):
        *errors, (last, _) = found
        assert not last  # the last one was not cut
        start = f"process {rank} of {WORLD} waited in vain for the others, for "
        whats = {said.removeprefix(start).partition(",")[0] for said, _ in errors}
        assert all(said.startswith(start) and "Connection closed by peer" in said for said, _ in errors)
        assert whats == WHATS[kind]
        assert all(unchanged for _, unchanged in errors)


def test_no_collective_is_without_its_word():
    """In the source, each is under a `with team.waiting(...)`, and so is each wait for one."""
    found = []
    for path in ADAPTER.glob("*.py"):
        for node, within in walked(ast.parse(path.read_text(encoding="utf-8")), False):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = node.func.attr in (*COLLECTIVES, "new_group") and ast.unparse(node.func).startswith(
                    ("distributed.", "torch.distributed.")
                )
                if named or ast.unparse(node.func) == "work.wait":
                    found.append((path.stem, node.lineno, within))
    assert len(found) >= 10
    assert [place for *place, within in found if not within] == []


def walked(node, within):
    """Each node, and whether it is under such a `with`."""
    if isinstance(node, ast.With):
        within = within or any(".waiting(" in ast.unparse(item) for item in node.items)
    yield node, within
    for child in ast.iter_child_nodes(node):
        yield from walked(child, within)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sums_that_leave_early_arrive_all_the_same(processes, kind):
    """Beside the backward pass, after as many updates as there were in the last statistic; the others in the step."""
    for process in processes:
        (plain, layers, never), (found, others, left) = (process[f"{kind} {early}"] for early in (False, True))
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(others, layers, rtol=1e-12, atol=1e-12)
        assert not any(never)
        assert left[:2] == [False, True]
        assert left[5:] == [True, True, False]  # after an error nothing does
        assert kind == "fsdp" or not left[3]
