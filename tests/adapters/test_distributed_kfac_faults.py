"""What several processes of Algorithm 2 refuse, share and say, three of them."""

import copy

import pytest
import torch
from test_distributed_agreement import Doubled, same
from test_distributed_kfac import EMPTY, PARTS
from together import N, batch_of, model_of, spawned, wrapped
from torch import distributed, nn

from kfaclinalg import BlockDiagonal, Factored, Kronecker, LayerFactors
from kfaclinalg_torch import KFAC, _divided
from kfaclinalg_torch._checkpoint import packed
from kfaclinalg_torch._payload import template
from kfaclinalg_torch._team import ALONE


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
    found = {"refused": refused(rank), "sharded": sharded(world), "none": empty(rank)}
    found |= {"grouped": grouped(rank), "masked": masked(rank, world), "made": made_by(rank, Factored())}
    found |= {"nan": spoilt(rank, nothing_left), "error": spoilt(rank, too_much)}
    _divided.PAYS = pays
    return found | {"made by all": made_by(rank, Factored())}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("of3"), 3, run)


def test_a_part_of_which_nothing_counts_adds_nothing(processes):
    """In float32 too; where nothing of the whole counts, that is said as one process says it."""
    losses, expected, _ = masked(0, 1)
    assert losses[-1] < 0.7 * losses[0]
    for found, said, unchanged in (process["masked"] for process in processes):
        assert found == processes[0]["masked"][0]
        assert found == pytest.approx(losses, rel=1e-4)
        assert said == expected == "mask counts no position"
        assert unchanged


def test_a_process_without_examples_learns_from_the_others(processes):
    for layers, said, unchanged in (process["none"] for process in processes):
        assert layers == ["0", "1.bias", "1.weight"]
        assert said == "inputs and targets have no examples in any process, expected some"
        assert unchanged


def test_an_inverse_that_failed_is_refused_by_all(processes):
    """In the same step, with the same damping after it; the next one is taken."""
    found = [process["nan"] for process in processes]
    for steps, weights in found:
        assert [refused for refused, *_ in steps] == ["", "", "the update is not finite", ""]
        assert [unchanged for _, unchanged, _ in steps] == [False, False, True, False]
        assert steps[2][2] > steps[1][2]
        assert same((steps, weights), found[0])


def test_an_error_of_an_owner_is_everyones(processes):
    found = [process["error"] for process in processes]
    for rank, (steps, weights) in enumerate(found):
        said = "no memory is left" if rank == 1 else "process 1 of 3 failed at the inverses"
        assert said in steps[2][0]
        assert [unchanged for _, unchanged, _ in steps] == [False, False, True, False]
        assert same(weights, found[0][1])


def test_each_layer_is_inverted_by_its_owner(processes):
    """But in the first step, before which nobody knows what an inverse is made of; small layers by everyone."""
    layers = len(KFAC(model_of(), "categorical")._trained.layers)
    first, *others = zip(*(process["made"] for process in processes), strict=True)
    assert first == (layers,) * 3
    assert all(sum(step) == layers and 0 < max(step) < layers for step in others)
    assert all(process["made by all"] == [layers] * 3 for process in processes)


@pytest.mark.parametrize(("d", "pays"), [(32, False), (33, True)])
def test_the_shapes_say_whether_an_inverse_is_shared(d, pays):
    """2 d³ multiplications against 64 for each of d (d + 1) numbers."""
    one = Kronecker(torch.eye(d), torch.eye(d))
    shared = _divided.Divided(Factored(), BlockDiagonal((one,)), ALONE)
    item = shared._item(LayerFactors(one.A, one.B), one)
    assert shared._pays(item, template(packed(one), []), one) is pays


def test_a_sharded_model_is_refused_with_what_takes_it(processes):
    assert all("KFACPreconditioner takes those of fully_shard" in process["sharded"] for process in processes)


def test_a_copy_has_the_processes_of_its_original(processes):
    for rank, (said, copies) in enumerate(process["grouped"] for process in processes):
        assert "expected one of torch.distributed.new_group" in said[0]
        assert copies == ([] if rank == 2 else [[0, 1]] * 2)
        assert (rank == 2) == ("expected one of its own" in said[-1])


def test_a_wrong_target_and_other_weights_are_everyones(processes):
    for rank, found in enumerate(process["refused"] for process in processes):
        (target, unchanged), (weights, still) = found
        assert unchanged
        assert still
        assert ("expected" if rank == 1 else "process 1 of 3 failed at the gradient") in target
        assert "the processes differ in the first weights" in weights
