"""What one process meets alone is everyone's, in the same step, and nothing has changed; FSDP2 in practice."""

import copy

import pytest
import torch
from together import SPLITS, N, batch_of, loss_of, model_of, spawned, whole, wrapped
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves

from kfaclinalg_torch import KFACPreconditioner, Watch

WORLD = 3
ODD = 1  # the process that meets something


def made(called, **options):
    options = {"damping": 0.1, "statistics_period": 1, "inverse_period": 2, "estimator": "exact"} | options
    return KFACPreconditioner(called, likelihood="categorical", **options)


def passed(called, preconditioner, rank, seed=0, split="even", dtype=torch.float64):
    x, y = (t.split(SPLITS[WORLD][split])[rank] for t in batch_of(seed, dtype))
    outputs = called(x)
    preconditioner.update(outputs)
    loss_of(outputs.double(), y, WORLD).backward()


def seen(preconditioner, model):
    """All that a step may change."""
    p = preconditioner
    state = p._estimate.averages.state(), p._inverses.state(), p._steps, dict(p._periods), p.rejected
    return copy.deepcopy((state, {name: whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}))


def same(one, two):
    pairs = zip(tree_leaves(one), tree_leaves(two), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def raised(model, preconditioner):
    """The error of a step, and whether it has changed anything."""
    before = seen(preconditioner, model)
    try:
        preconditioner.step()
    except Exception as error:
        return str(error), same(before, seen(preconditioner, model))
    return "", True


def poisoned(preconditioner, name, value):
    """The averages of this layer, where this process has them, become this."""
    layers = preconditioner._estimate.averages.layers
    if name in layers:
        A, G = layers[name]
        layers[name] = type(layers[name])(torch.full_like(A, value), torch.full_like(G, value))


def met(kind, preconditioner, model, rank):
    """Process ODD meets something."""
    if kind == "an exception" and rank == ODD:
        preconditioner.damping = lambda step: {}["no such thing"]
    if kind == "another schedule" and rank == ODD:
        preconditioner.inverse_period = 3
    if kind == "another damping" and rank == ODD:
        preconditioner.damping = 0.2
    if kind == "another length" and rank == ODD:
        preconditioner.length = 1e-2
    if kind == "another step" and rank == ODD:
        preconditioner._steps += 1
    if kind == "no gradient" and rank == ODD:
        model[5].bias.requires_grad_(False)
    if kind == "another layer" and rank == ODD:
        model[5].weight = nn.Parameter(model[5].weight.detach())
    if kind == "another wire" and rank == ODD:
        preconditioner._exchange.wire = torch.float32
    if kind == "a failed inverse":
        poisoned(preconditioner, "3", -1e6)
        preconditioner._inverses.failures["3"] = 2
        preconditioner.inverse_period = 1


KINDS = ["an exception", "another schedule", "another step", "no gradient", "another layer", "a failed inverse"]
KINDS += ["another damping", "another length", "another wire", "no statistic"]
MET = [("ddp", kind) for kind in KINDS]
MET += [("fsdp", kind) for kind in KINDS[:6] if kind not in ("no gradient", "another layer")]  # it has a word too


def agreement(rank, world):
    found = {}
    for wrapper, kind in MET:
        model = model_of()
        called = wrapped(model, wrapper, world)
        preconditioner = made(called, placement="owner")
        if kind == "no statistic" and rank == ODD:  # in the second step
            preconditioner.statistics_period = 2
        passed(called, preconditioner, rank)
        preconditioner.step()
        model.zero_grad()
        passed(called, preconditioner, rank, seed=1)
        met(kind, preconditioner, model, rank)
        found[f"{wrapper} {kind}"] = raised(model, preconditioner)
        assert preconditioner._exchange.ahead.team is None  # what leaves early does so in all processes
    found["nan"] = not_finite(rank)
    found["layers"] = other_layers(rank)
    found["halves"] = half_precision(rank)
    defaults = {kind: made(wrapped(model_of(), kind, world)) for kind in ("ddp", "fsdp")}
    found["replicated"] = {kind: one._exchange.grid.replicated for kind, one in defaults.items()}
    found["orders"] = orders(rank, world)
    found["accumulated"] = accumulated(rank, world)
    found["checkpointed"] = checkpointed(rank, world)
    found["compiled"] = compiled(rank, world)
    found["mixed"] = mixed(rank, world)
    found["watched"] = {kind: watched(rank, world, kind) for kind in ("ddp", "fsdp")}
    found["convolutions"] = {kind: convolutions(rank, world, kind) for kind in ("ddp", "fsdp")}
    found["tensor parallel"], found["flat"] = tensor_parallel(world), flat_parameters(rank)
    found["elsewhere"], found["subgroup"] = elsewhere(world), subgroup(rank)
    found["static graph"] = static_graph(rank)  # where a process knows of one group less
    return found


def not_finite(rank):
    """A statistic with a NaN in one process enters no average, of nobody; the next one does."""
    found = []
    for placement in ("replicated", "owner"):
        model = model_of()
        called = wrapped(model, "ddp", WORLD)
        preconditioner = made(called, placement=placement)
        passed(called, preconditioner, rank)
        preconditioner.step()
        before = copy.deepcopy(preconditioner._estimate.averages.state())
        for seed in (1, 2):
            model.zero_grad()
            if seed == 1 and rank == ODD:
                statistic = preconditioner._estimate.statistic
                statistic.add_sums = lambda block, A, rows, G, add=statistic.add_sums: add(
                    block, A, rows, G * torch.nan
                )
            passed(called, preconditioner, rank, seed)
            preconditioner.step()
            found.append((preconditioner.rejected, same(before, preconditioner._estimate.averages.state())))
    return found


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_layers(rank):
    """A process without examples in the first pass learns from the others what is no layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Doubled(5, 3)).double()
    called = nn.parallel.DistributedDataParallel(model)
    preconditioner = made(called)
    passed(called, preconditioner, rank, split="empty")
    preconditioner.step()
    return sorted(preconditioner.layers), sorted(preconditioner.fallback)


def half_precision(rank):
    """In bfloat16 on the wire everything is near, and all processes have the same."""
    found = {}
    for name, wire in (("exact", None), ("half", torch.bfloat16)):
        model = model_of(torch.float32)
        called = wrapped(model, "ddp", WORLD)
        preconditioner = made(called, wire_dtype=wire)
        passed(called, preconditioner, rank, dtype=torch.float32)
        preconditioner.step()
        found[name] = model[3].weight.grad.clone()
    return found


def orders(rank, world):
    """fully_shard after the preconditioner was made is an error that says so."""
    model = model_of()
    preconditioner = made(model)
    wrapped(model, "fsdp", world)
    passed(model, preconditioner, rank)
    return raised(model, preconditioner)[0]


def accumulated(rank, world):
    """Two passes, of which only the second sends gradients, are one."""
    found = {}
    for wrapper in ("ddp", "fsdp"):
        for parts in (1, 2):
            model = model_of()
            called = wrapped(model, wrapper, world)
            preconditioner = made(called)
            x, y = (t.split(4)[rank] for t in batch_of(0))
            for i, (inputs, targets) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                last = i == parts - 1
                if wrapper == "fsdp":
                    model.set_requires_gradient_sync(last)
                else:
                    called.require_backward_grad_sync = last  # what `no_sync` sets
                outputs = called(inputs)
                preconditioner.update(outputs)
                loss_of(outputs, targets, world).backward()
            preconditioner.step()
            found[f"{wrapper} {parts}"] = whole(model[3].weight.grad).clone()
    return found


def compiled(rank, world):
    """torch.compile around the model that is trained in parallel."""
    found = {}
    for wrapper in ("ddp", "fsdp"):
        model = model_of()
        called = torch.compile(wrapped(model, wrapper, world), backend="aot_eager")
        preconditioner = made(called, placement="owner")
        called(batch_of(0)[0][: 2 + rank])  # so that the next size is compiled for any
        passed(called, preconditioner, rank, split="uneven")
        preconditioner.step()
        found[wrapper] = whole(model[3].weight.grad).clone()
    return found


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def checkpointed(rank, world):
    found = {}
    for name in ("plain", "checkpointed"):
        model = model_of()
        if name == "checkpointed":
            model[3] = Checkpointed(model[3])
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        preconditioner = made(model)
        passed(model, preconditioner, rank)
        preconditioner.step()
        found[name] = whole(next(iter(model[3].parameters())).grad).clone()
    return found


class Convolutions(nn.Module):
    """An embedding, convolutions with groups and a transposed one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.plain, self.head = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3), nn.Linear(2, 3)
        self.grouped, self.transposed = nn.Conv1d(4, 4, 2, groups=2), nn.ConvTranspose1d(4, 2, 2)

    def forward(self, tokens):
        x = self.plain(self.embedding(tokens).mT).tanh()
        return self.head(self.transposed(self.grouped(x).tanh()).tanh().mean(2))


def convolutions(rank, world, kind="none", split="uneven"):
    """A step of which the moments of a layer are taken in other ways by who has fewer examples."""
    torch.manual_seed(0)
    model, tokens = Convolutions().double(), torch.randint(7, (N, 5))
    called = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    preconditioner = made(called)
    x, y = (t.split(SPLITS[WORLD][split] if world > 1 else N)[rank] for t in (tokens, batch_of(0)[1]))
    outputs = called(x)
    preconditioner.update(outputs)
    loss_of(outputs, y, world).backward()
    preconditioner.step()
    return {name: whole(p.grad).clone() for name, p in model.named_parameters()}


def mixed(rank, world):
    """Parameters in bfloat16 for the passes, A, G and the inverses in float32."""
    model = model_of(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    preconditioner = made(model)
    passed(model, preconditioner, rank, dtype=torch.float32)
    preconditioner.step()
    return {str(M.dtype) for pair in preconditioner.layers.values() for M in pair}, whole(model[3].weight.grad).clone()


def watched(rank, world, kind="none"):
    """What `Watch` writes down of a step, but for the seconds, and what is said of a copy of all."""
    model, said = model_of(), ""
    called = model if kind == "none" else wrapped(model, kind, world)
    watch = Watch(made(called))
    x, y = (t.split(4 if world > 1 else N)[rank] for t in batch_of(0))
    outputs = called(x)
    watch.update(outputs)
    loss_of(outputs, y, world).backward()
    watch.step()
    if kind != "fsdp":  # torch copies none of its models
        try:
            copy.deepcopy((model, watch.optimizer))[1].update(outputs)
        except RuntimeError as error:
            said = str(error)
    return {name: value for name, value in watch.history[0].items() if not name.startswith("seconds")}, said


def subgroup(rank):
    """Two of three processes train one model; the third takes no part in it."""
    group = distributed.new_group([0, 2])
    if rank == 1:
        return None
    model = model_of()
    called = nn.parallel.DistributedDataParallel(model, process_group=group)
    preconditioner = made(called, placement="owner")
    x, y = (t.chunk(2)[rank // 2] for t in batch_of(0))
    outputs = called(x)
    preconditioner.update(outputs)
    loss_of(outputs, y, 2).backward()
    preconditioner.step()
    return model[3].weight.grad.clone()


def static_graph(rank):
    """What is said of a wrapper that has seen no backward pass yet, and a step of one that has."""
    model, said = model_of(), ""
    called = nn.parallel.DistributedDataParallel(model, static_graph=True)
    try:
        made(called)
    except ValueError as error:
        said = str(error)
    called(batch_of(0)[0]).sum().backward()
    model.zero_grad()
    preconditioner = made(called)
    passed(called, preconditioner, rank)
    preconditioner.step()
    return said, model[3].weight.grad.clone()


def tensor_parallel(world):
    """What is said of a layer in parts, alone and under fully_shard."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    said = []
    for sharded in (False, True):
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
        model = parallelize_module(model_of(), mesh["tensor"], {"3": ColwiseParallel()})
        if sharded:
            fully_shard(model, mesh=mesh["data"])
        for p in model.parameters():
            p.requires_grad_(hasattr(p, "device_mesh"))
        try:
            made(model)
        except ValueError as error:
            said.append(str(error))
    return said


def elsewhere(world):
    """What is said of parameters beside the device of their mesh, as CPUOffloadPolicy has them with a GPU."""
    with torch.device("meta"):
        model, said = nn.Sequential(nn.Linear(4, 3)), ""
    try:
        made(fully_shard(model, mesh=init_device_mesh("cpu", (world,))))
    except ValueError as error:
        said = str(error)
    return said


def flat_parameters(rank):
    try:
        made(FullyShardedDataParallel(model_of(), device_id=torch.device("cpu")))
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("agreement"), WORLD, agreement)


SAID = {
    "an exception": ("no such thing", "process 1 of 3 failed at the start of a step"),
    "another schedule": ("the processes differ in the schedule",) * 2,
    "another step": ("the processes differ in the schedule",) * 2,
    "no statistic": ("the processes differ in the schedule",) * 2,
    **{f"another {option}": ("the processes differ in the options",) * 2 for option in ("damping", "length", "wire")},
    "no gradient": ("the processes differ in the layers with gradients",) * 2,
    "another layer": ("was replaced since", "process 1 of 3 failed at the start of a step"),
    "a failed inverse": ("failed at the inverses",) * 2,
}


@pytest.mark.parametrize(("wrapper", "kind"), MET)
def test_what_one_process_meets_is_everyones_and_changes_nothing(processes, wrapper, kind):
    for rank, found in enumerate(processes):
        said, unchanged = found[f"{wrapper} {kind}"]
        expected = SAID[kind][rank != ODD]
        assert expected in said or (kind == "a failed inverse" and "could not be inverted in 3 refreshes" in said)
        assert unchanged


def test_the_placement_follows_from_the_parameters(processes):
    assert all(found["replicated"] == {"ddp": True, "fsdp": False} for found in processes)


def test_a_nan_of_one_process_is_refused_by_all(processes):
    for found in processes:
        assert found["nan"] == [(1, True), (1, False)] * 2


def test_all_learn_which_layers_are_none(processes):
    for found in processes:
        assert found["layers"] == (["0", "1.bias", "1.weight"], ["1.bias", "1.weight"])


def test_half_the_bytes_are_near_and_the_same_everywhere(processes):
    halves = [found["halves"] for found in processes]
    torch.testing.assert_close(halves[0]["half"], halves[0]["exact"], rtol=0.05, atol=0.05)
    assert not torch.equal(halves[0]["half"], halves[0]["exact"])
    assert all(torch.equal(found["half"], halves[0]["half"]) for found in halves)


def test_fully_shard_comes_before_the_preconditioner(processes):
    assert all("make a new one, after fully_shard" in found["orders"] for found in processes)


def test_accumulated_gradients_are_those_of_one_pass(processes):
    for found in (process["accumulated"] for process in processes):
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, found["ddp 1"], rtol=1e-9, atol=1e-9, msg=name)


def test_activation_checkpoints_change_nothing(processes):
    for found in (process["checkpointed"] for process in processes):
        torch.testing.assert_close(found["checkpointed"], found["plain"], rtol=1e-9, atol=1e-9)


def test_compiled_models_are_the_same(processes):
    for found in processes:
        for gradient in found["compiled"].values():
            torch.testing.assert_close(gradient, found["accumulated"]["ddp 1"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_convolutions_and_embeddings_in_parallel_are_those_of_one_process(processes, kind):
    expected = convolutions(0, 1)
    for found in (process["convolutions"][kind] for process in processes):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_mixed_precision_of_fully_shard(processes):
    for dtypes, gradient in (process["mixed"] for process in processes):
        assert dtypes <= {"torch.float32"}
        torch.testing.assert_close(gradient, processes[0]["halves"]["exact"], rtol=0.2, atol=0.05)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_is_watched_is_that_of_one_process(processes, kind):
    expected, copied = watched(0, 1)
    assert "or of a copy, has no hooks" in copied
    for record, said in (process["watched"][kind] for process in processes):
        assert record == pytest.approx(expected, rel=1e-9)
        assert said == ("" if kind == "fsdp" else copied)


def test_only_the_processes_of_its_group_take_part(processes):
    torch.testing.assert_close(processes[0]["subgroup"], processes[0]["accumulated"]["ddp 1"], rtol=1e-9, atol=1e-9)
    assert torch.equal(processes[0]["subgroup"], processes[2]["subgroup"])


def test_a_static_graph_is_not_that_of_update(processes):
    for said, gradient in (process["static graph"] for process in processes):
        assert "expected static_graph=False, or a backward pass" in said
        torch.testing.assert_close(gradient, processes[0]["accumulated"]["ddp 1"], rtol=1e-9, atol=1e-9)


def test_tensor_parallel_layers_are_refused_with_the_reason(processes):
    for found in processes:
        assert len(found["tensor parallel"]) == 2
        assert all(
            "shows each process a part of its inputs or outputs alone" in said for said in found["tensor parallel"]
        )


def test_parameters_beside_the_device_of_their_mesh_are_refused(processes):
    assert all("parameters are on meta, and their mesh is of cpu" in found["elsewhere"] for found in processes)


def test_flat_parameters_are_refused(processes):
    assert all("expected fully_shard" in found["flat"] for found in processes)
