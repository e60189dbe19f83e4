"""Checkpoints by torch.distributed.checkpoint: saved by some processes, loaded by others."""

import copy

import pytest
import torch
from test_distributed_agreement import made, same
from together import batch_of, loss_of, model_of, spawned, whole, wrapped
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kfaclinalg import LowRank
from kfaclinalg_torch import KFAC, DistributedState, Relative

SAVED = 4
PARTS = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
CASES = {
    "ddp": ("ddp", {}),
    "ddp owner": ("ddp", {"placement": "owner"}),
    "fsdp eigen": ("fsdp", {"structure": "eigen"}),
    "fsdp sampled": ("fsdp", {"estimator": "sampled"}),
    "hsdp": ("hsdp", {}),
    "hsdp low rank": ("hsdp", {"structure": LowRank(2), "damping": Relative(0.1)}),
    "ddp by substitution": ("ddp", {"placement": "owner", "inverse_period": 1}),
}


def all_then_none(step):
    """Four refreshes, then the inverses that are saved: no number of processes has another schedule."""
    return 1 if step < 4 else 1000


def steps(called, model, optimizer, preconditioner, rank, world, seeds):
    for seed in seeds:
        x, y = (t.split(PARTS[world])[rank] for t in batch_of(seed))
        optimizer.zero_grad()
        outputs = called(x)
        preconditioner.update(outputs)
        loss_of(outputs, y, world).backward()
        preconditioner.step()
        optimizer.step()
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def parts(kind, options, world):
    """What is trained, in as many processes as call; one process alone trains the model as it is."""
    model = model_of()
    kind = "fsdp" if kind == "hsdp" and world != SAVED else kind
    called = wrapped(model, kind, world) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    alone = {name: value for name, value in options.items() if world > 1 or name != "placement"}
    return called, model, optimizer, made(called, **{"inverse_period": all_then_none} | alone)


def state_of(model, optimizer, preconditioner):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "kfac": DistributedState(preconditioner)}


def saved(rank, world, folder):
    """Four steps, a checkpoint, two steps more."""
    found = {}
    for name, (kind, options) in CASES.items():
        things = parts(kind, options, world)
        steps(*things, rank, world, range(4))
        checkpoint.save(state_of(*things[1:]), checkpoint_id=f"{folder}/{name}")
        if kind == "ddp":  # it orders its buckets anew after the first step, and so its own sums of gradients
            things = wrapped(things[1], kind, world), *things[1:]
        found[name] = steps(*things, rank, world, range(4, 6))
    return found


def loaded(rank, world, folder):
    """The two steps more, from the checkpoint."""
    found = {}
    for name, (kind, options) in CASES.items():
        things = parts(kind, options, world)
        _, model, optimizer, _ = things
        state = state_of(*things[1:])
        checkpoint.load(state, checkpoint_id=f"{folder}/{name}")
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        found[name] = steps(*things, rank, world, range(4, 6))
    if world == 2:
        found["refused"] = refused(folder)
        found["periods"] = {kind: other_period(rank, world, kind) for kind in ("plain", "distributed")}
        found["others"] = others_states(rank, world)
    return found


def other_period(rank, world, kind):
    """Two steps more with inverses by substitution, and of explicit ones that go on from their state."""
    things = parts("ddp", {"placement": "owner", "inverse_period": 1}, world)
    steps(*things, rank, world, range(2))
    others = parts("ddp", {"placement": "owner", "inverse_period": 2}, world)
    others[3].inverse_period = 1
    for i in (1, 2):
        others[i].load_state_dict(copy.deepcopy(things[i].state_dict()))
    (one, other) = (x if kind == "plain" else DistributedState(x) for x in (things[3], others[3]))
    other.load_state_dict(one.state_dict())
    return [steps(*those, rank, world, range(2, 4)) for those in (things, others)]


def others_states(rank, world):
    """What loading says of states that are not this process's, and what is there afterwards."""
    made_by = {place: parts("ddp", {"placement": place}, world) for place in ("owner", "replicated")}
    states, found = {}, {}
    for place, things in made_by.items():
        steps(*things, rank, world, range(2))
        states[place] = things[3].state_dict()
    first = [states["owner"]]
    distributed.broadcast_object_list(first)
    broken = states["owner"] | ({"steps": "none"} if rank else {})
    loads = {"its own": ("owner", states["owner"]), "all of it": ("owner", states["replicated"])}
    loads |= {"the first one's": ("owner", first[0]), "a part": ("replicated", states["owner"])}
    for name, (place, state) in (loads | {"a broken one": ("owner", broken)}).items():
        *_, preconditioner = parts("ddp", {"placement": place}, world)
        before, said = preconditioner.state_dict(), ""
        try:
            preconditioner.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            said = str(error)
        found[name] = said, same(before, preconditioner.state_dict()), sorted(preconditioner.layers)
    return found


def refused(folder):
    """A state of another structure, in both processes; nothing has changed."""
    *_, preconditioner = parts("ddp", {"structure": "eigen"}, 2)
    before, said = preconditioner.state_dict(), ""
    state = DistributedState(preconditioner).state_dict()
    other = DistributedState(parts("ddp", {}, 2)[3]).state_dict()
    try:
        DistributedState(preconditioner).load_state_dict(state | {"facts": other["facts"]})
    except ValueError as error:
        said = str(error)
    return said, same(before, preconditioner.state_dict()), distributed.get_world_size()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    first = spawned(tmp_path_factory.mktemp("saved"), SAVED, saved, str(folder))
    others = {n: spawned(tmp_path_factory.mktemp(f"by{n}"), n, loaded, str(folder)) for n in (1, 2, 3, SAVED)}
    return first, others


@pytest.mark.parametrize("world", [1, 2, 3, SAVED])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_processes_goes_on(runs, name, world):
    first, others = runs
    expected = first[0][name]
    for found in (process[name] for process in others[world]):
        if world == SAVED:
            assert same(found, expected)
        elif "sampled" not in name:  # others draw others
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert same(found, others[world][0][name])


def test_a_state_of_another_structure_is_refused(runs):
    for found in runs[1][2]:
        said, unchanged, world = found["refused"]
        assert "structure" in said
        assert unchanged
        assert world == 2


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_inverses_of_another_period_are_made_anew(runs, kind):
    for found in (process["periods"][kind] for process in runs[1][2]):
        torch.testing.assert_close(*found[::-1], rtol=1e-9, atol=1e-9)


def test_each_process_loads_what_it_holds_or_none_does(runs):
    for rank, found in enumerate(process["others"] for process in runs[1][2]):
        for name in ("its own", "all of it"):
            said, unchanged, held = found[name]
            assert not said
            assert not unchanged
            assert held == found["its own"][2]
        for name in ("the first one's", "a part", "a broken one"):
            said, unchanged, _ = found[name]
            assert unchanged
            expected = {"the first one's": "lacks" if rank else "failed at", "a part": "lacks"}
            assert expected.get(name, "steps is" if rank else "failed at") in said
    assert not set(runs[1][2][0]["others"]["its own"][2]) & set(runs[1][2][1]["others"]["its own"][2])


def test_sampled_targets_of_one_process_go_on():
    """Their state is its generator's; that of several follows from the step."""
    things = parts("none", {"estimator": "sampled"}, 1)
    steps(*things, 0, 1, range(2))
    others = parts("none", {"estimator": "sampled"}, 1)
    for i in (1, 2):
        others[i].load_state_dict(copy.deepcopy(things[i].state_dict()))
    DistributedState(others[3]).load_state_dict(DistributedState(things[3]).state_dict())
    assert same(*(steps(*those, 0, 1, range(2, 4)) for those in (things, others)))


def test_what_is_stored_is_tensors_alone(runs, tmp_path):
    """`torch.save` of it loads with weights_only=True, and no other object is in it."""
    preconditioner = made(model_of())
    state = DistributedState(preconditioner).state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    torch.save(state, tmp_path / "state")
    assert same(state, torch.load(tmp_path / "state", weights_only=True))


def test_the_state_of_an_optimizer_is_its_own():
    with pytest.raises(TypeError, match=r"is a KFAC, of which every process has the same state: take state_dict\(\)"):
        DistributedState(KFAC(model_of(), "categorical"))
