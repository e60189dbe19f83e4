"""Algorithm 2 in several processes is Algorithm 2 in one, on all of their examples."""

import copy
from functools import cache

import pytest
import torch
from test_distributed_agreement import Doubled, same
from together import N, batch_of, model_of, spawned, wrapped
from torch import distributed, nn

from kfaclinalg import BlockDiagonal, Exact, Factored, Kronecker, LayerFactors, LowRank
from kfaclinalg_torch import KFAC, _divided
from kfaclinalg_torch._checkpoint import packed
from kfaclinalg_torch._payload import template
from kfaclinalg_torch._team import ALONE

WORLDS = (1, 2, 3, 4)
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


def masked(rank, world):
    """The losses of steps in float32 in which nothing of the last part counts, and the error of one without any."""
    model, counts = model_of(torch.float32), torch.arange(N) < 8
    optimizer = KFAC(model, "categorical", generator=torch.Generator().manual_seed(0))
    x, y, mask = (t.split(PARTS[world])[rank] for t in (*batch_of(0, torch.float32), counts))
    losses, drawn = [optimizer.step(x, y, mask=mask) for _ in range(4)], optimizer.options.generator.get_state()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step(x, y, mask=torch.zeros_like(mask))
    except ValueError as error:
        said = str(error)
    after = [p.detach() for p in model.parameters()], optimizer.options.generator.get_state()
    return losses, said, same((before, drawn), after)


def empty(rank):
    """Which layers are none, of two steps in which a process has no examples, and the error where none has any."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), Doubled(5, 3)).double(), batch_of(0)
    optimizer = KFAC(model, "categorical", generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.step(*(t.split(EMPTY[3])[rank] for t in (x, y)))
    before, said = [p.detach().clone() for p in model.parameters()], ""
    try:
        optimizer.step(x[:0], y[:0])
    except ValueError as error:
        said = str(error)
    return sorted(optimizer.layers), said, same(before, [p.detach() for p in model.parameters()])


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


def spoilt(rank, failure):
    """A third step in which process 1 fails to invert what it owns; then all is well again."""
    model = model_of()
    optimizer = KFAC(model, "categorical", damping=0.1, generator=torch.Generator().manual_seed(0))
    inverse, said, found = Factored.inverse, "", []

    def fails(self, fitted, gamma):
        return failure(inverse(self, fitted, gamma))

    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        Factored.inverse = fails if (rank, step) == (1, 2) else inverse
        try:
            optimizer.step(*(t.split(PARTS[3])[rank] for t in batch_of(step)))
        except RuntimeError as error:
            said = str(error)
        refused = said if step == 2 and said else optimizer.info.refused
        found.append((refused, same(before, [p.detach() for p in model.parameters()]), optimizer._state.damping))
    Factored.inverse = inverse
    return found, [p.detach().clone() for p in model.parameters()]


def nothing_left(inverse):
    return BlockDiagonal(tuple(Kronecker(block.A * torch.nan, block.B) for block in inverse.blocks))


def too_much(inverse):
    raise RuntimeError("no memory is left")


def made_by(rank, structure):
    """How many layers this process inverted in each step, and the bytes of an exchange that a rule may spare."""
    kind, counts = type(structure), []
    inverse = kind.inverse

    def counted(self, fitted, gamma):
        counts[-1] += len(fitted.layers)
        return inverse(self, fitted, gamma)

    model = model_of()
    optimizer = KFAC(model, "categorical", damping=0.1, structure=structure)
    kind.inverse = counted
    for step in range(3):
        counts.append(0)
        optimizer.step(*(t.split(PARTS[3])[rank] for t in batch_of(step)))
    kind.inverse = inverse
    return counts


def sharded(world):
    try:
        KFAC(wrapped(model_of(), "fsdp", world), "categorical")
    except ValueError as error:
        return str(error)


def grouped(rank):
    """Two of three processes: the group of a copy, and what is said of a group that is none, or another's."""
    group, said = distributed.new_group([0, 1]), []
    for given in ("a name", group):
        try:
            optimizer = KFAC(model_of(), "categorical", group=given)
        except (TypeError, ValueError) as error:
            said.append(str(error))
    copies = [] if rank == 2 else [copy.copy(optimizer), copy.deepcopy(optimizer)]
    return said, [distributed.get_process_group_ranks(one._group) for one in copies]


def run(rank, world):
    pays, _divided.PAYS = _divided.PAYS, 0  # so that whatever can be is shared
    found = {name: trained(name, rank, world) for name in options(world)} | {"resumed": resumed(rank, world)}
    if world == 3:
        found["refused"], found["sharded"], found["none"] = refused(rank), sharded(world), empty(rank)
        found["grouped"], found["masked"] = grouped(rank), masked(rank, world)
        found["nan"], found["error"] = (spoilt(rank, failure) for failure in (nothing_left, too_much))
        found["made"] = made_by(rank, Factored())
        _divided.PAYS = pays
        found["made by all"] = made_by(rank, Factored())
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return {world: spawned(tmp_path_factory.mktemp(f"of{world}"), world, run) for world in WORLDS}


expected = cache(trained)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in options(world)])
def test_as_many_processes_as_there_are_take_the_step_of_one(processes, name, world):
    weights, infos = expected(name)
    for found, happened in (process[name] for process in processes[world]):
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(happened, infos, rtol=1e-7, atol=1e-9, equal_nan=True)
        assert same(found, processes[world][0][name][0])  # to the last bit
        torch.testing.assert_close(happened, processes[world][0][name][1], rtol=0, atol=0, equal_nan=True)


def test_a_part_of_which_nothing_counts_adds_nothing(processes):
    """In float32 too; where nothing of the whole counts, that is said as one process says it."""
    losses, expected, _ = masked(0, 1)
    assert losses[-1] < 0.7 * losses[0]
    for found, said, unchanged in (process["masked"] for process in processes[3]):
        assert found == processes[3][0]["masked"][0]
        assert found == pytest.approx(losses, rel=1e-4)
        assert said == expected == "mask counts no position"
        assert unchanged


def test_a_process_without_examples_learns_from_the_others(processes):
    for layers, said, unchanged in (process["none"] for process in processes[3]):
        assert layers == ["0", "1.bias", "1.weight"]
        assert said == "inputs and targets have no examples in any process, expected some"
        assert unchanged


def test_an_inverse_that_failed_is_refused_by_all(processes):
    """In the same step, with the same damping after it; the next one is taken."""
    found = [process["nan"] for process in processes[3]]
    for steps, weights in found:
        assert [refused for refused, *_ in steps] == ["", "", "the update is not finite", ""]
        assert [unchanged for _, unchanged, _ in steps] == [False, False, True, False]
        assert steps[2][2] > steps[1][2]
        assert same((steps, weights), found[0])


def test_an_error_of_an_owner_is_everyones(processes):
    found = [process["error"] for process in processes[3]]
    for rank, (steps, weights) in enumerate(found):
        said = "no memory is left" if rank == 1 else "process 1 of 3 failed at the inverses"
        assert said in steps[2][0]
        assert [unchanged for _, unchanged, _ in steps] == [False, False, True, False]
        assert same(weights, found[0][1])


def test_each_layer_is_inverted_by_its_owner(processes):
    """But in the first step, before which nobody knows what an inverse is made of; small layers by everyone."""
    layers = len(KFAC(model_of(), "categorical")._trained.layers)
    first, *others = zip(*(process["made"] for process in processes[3]), strict=True)
    assert first == (layers,) * 3
    assert all(sum(step) == layers and 0 < max(step) < layers for step in others)
    assert all(process["made by all"] == [layers] * 3 for process in processes[3])


@pytest.mark.parametrize(("d", "pays"), [(32, False), (33, True)])
def test_the_shapes_say_whether_an_inverse_is_shared(d, pays):
    """2 d³ multiplications against 64 for each of d (d + 1) numbers."""
    one = Kronecker(torch.eye(d), torch.eye(d))
    shared = _divided.Divided(Factored(), BlockDiagonal((one,)), ALONE)
    item = shared._item(LayerFactors(one.A, one.B), one)
    assert shared._pays(item, template(packed(one), []), one) is pays


@pytest.mark.parametrize("world", WORLDS)
def test_another_number_of_processes_goes_on_from_a_state(processes, world):
    """It is the same in all of them, and loaded with weights_only=True."""
    states, weights = processes[world][-1]["resumed"]
    torch.testing.assert_close(resumed(states=states)[1], weights, rtol=1e-9, atol=1e-9)
    assert all(same(process["resumed"], processes[world][0]["resumed"]) for process in processes[world])


def test_a_sharded_model_is_refused_with_what_takes_it(processes):
    assert all("KFACPreconditioner takes those of fully_shard" in process["sharded"] for process in processes[3])


def test_a_copy_has_the_processes_of_its_original(processes):
    for rank, (said, copies) in enumerate(process["grouped"] for process in processes[3]):
        assert "expected one of torch.distributed.new_group" in said[0]
        assert copies == ([] if rank == 2 else [[0, 1]] * 2)
        assert (rank == 2) == ("expected one of its own" in said[-1])


def test_a_wrong_target_and_other_weights_are_everyones(processes):
    for rank, found in enumerate(process["refused"] for process in processes[3]):
        (target, unchanged), (weights, still) = found
        assert unchanged
        assert still
        assert ("expected" if rank == 1 else "process 1 of 3 failed at the gradient") in target
        assert "the processes differ in the first weights" in weights


def test_the_parts_are_of_one_batch():
    assert all(sum(parts) == N for split in (PARTS, UNEVEN, EMPTY) for parts in split.values())
