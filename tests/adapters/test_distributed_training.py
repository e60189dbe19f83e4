"""Training as it is done, in several processes: tied weights, checkpoints, masks, accumulation, empty batches."""

from functools import cache

import pytest
import torch
from together import schedule_of, spawned, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kfaclinalg import LowRank
from kfaclinalg_torch import KFACPreconditioner, Relative

WORLD, N, POSITIONS, TOKENS = 4, 12, 2, 4  # 8 backward passes for the exact estimator


class Tagger(nn.Module):
    """Tokens to tokens, with one matrix for the embedding and the head, and a part that is computed again."""

    def __init__(self, *, scaled=False):
        super().__init__()
        self.embedding, self.middle, self.norm = nn.Embedding(TOKENS, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(6)) if scaled else 1.0

    def block(self, x):
        return self.norm(torch.tanh(self.middle(x)))

    def forward(self, tokens):
        x = checkpoint(self.block, self.embedding(tokens), use_reentrant=False)
        return self.head(x * self.scale)


SUM = {"estimator": "empirical", "reduction": "sum", "length": 1e-3}  # whatever DDP divides the sum by
CASES = {
    "plain": {},
    "relative damping": {"damping": Relative(0.1)},
    "low rank": {"structure": LowRank(2)},
    "clipped": {"kl_clip": 1e-3},
    "of one length": {"length": 1e-3},
    "in parts": {"parts": 3},
    "masked": {"mask": "some"},
    "all masked": {"mask": "whole parts"},
    "all masked, clipped": {"mask": "whole parts", "kl_clip": 1e-3},
    "eigen": {"structure": "eigen", "mask": "whole parts", "steps": 1},  # later A and G have null spaces, of any basis
    "eigen, relative damping": {"structure": "eigen", "damping": Relative(0.1), "mask": "whole parts", "steps": 1},
    "none": {"split": (0, 5, 7, 0)},
    "its own loss": SUM | {"split": (0, 5, 7, 0)},
    "scaled": {"scaled": True, "split": (0, 5, 7, 0), "steps": 1},
    "scaled, its own loss": SUM | {"scaled": True, "split": (0, 5, 7, 0), "steps": 1},
}
RUNS = [(kind, name) for kind in ("ddp", "fsdp", "hsdp") for name in CASES if kind == "ddp" or "scaled" not in name]


def model_of(scaled):
    torch.manual_seed(0)
    return Tagger(scaled=scaled).double()


def batch_of(seed, kind):
    """Tokens, targets, and which positions count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(TOKENS, (2, N, POSITIONS), generator=generator)
    mask = torch.rand(N, POSITIONS, generator=generator) < (0.7 if kind else 1.0)
    mask[slice(N // 2, N) if kind == "whole parts" else slice(0)] = False
    return tokens, targets, mask


def wrapped(model, kind):
    if kind in ("none", "ddp"):
        return nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    shape, names = ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((WORLD,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in (model.middle, model):
        fully_shard(module, mesh=mesh)
    return model


def sends(called, kind, last):
    """Gradients travel in the last part's backward pass."""
    if kind == "ddp":
        called.require_backward_grad_sync = last  # what `no_sync` sets
    elif kind != "none":
        called.set_requires_gradient_sync(last)


def trained(kind, rank, world, *, steps=3, split=None, parts=1, mask=None, scaled=False, **options):
    """The gradients of each step."""
    model = model_of(scaled)
    called, found = wrapped(model, kind), []
    split = (split or (N // WORLD,) * WORLD) if world > 1 else (N,)
    options = {"estimator": "exact", "damping": 0.1, "statistics_period": 1, "inverse_period": 2} | options
    likelihood = None if options["estimator"] == "empirical" else "categorical"
    preconditioner = KFACPreconditioner(called, likelihood=likelihood, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        batch = batch_of(seed, mask)
        counted, pieces = int(batch[2].any(1).sum()), [t.split(split)[rank].chunk(parts) for t in batch]
        for i, (tokens, targets, counts) in enumerate(zip(*pieces, strict=True)):
            sends(called, kind, i == parts - 1)
            preconditioner.mask = counts if mask else None
            outputs = called(tokens)
            if likelihood:
                preconditioner.update(outputs)
            losses = functional.cross_entropy(outputs.mT, targets, reduction="none")
            ((losses * counts).sum() * (world / counted if likelihood else 1.0)).backward()
        preconditioner.step()
        found.append({name: whole(p.grad).clone() for name, p in model.named_parameters() if name != "scale"})
        optimizer.step()  # of the scale the signs are random
    return found


def run(rank, world):
    return {f"{kind} {name}": trained(kind, rank, world, **CASES[name]) for kind, name in RUNS}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("training"), WORLD, run)


@cache
def alone(name):
    case = CASES[name]
    with schedule_of(WORLD, lambda: model_of(case.get("scaled", False))):
        return trained("none", 0, 1, **case)


@pytest.mark.filterwarnings("ignore:KFACPreconditioner takes:UserWarning")
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_several_processes_train_as_one_does(processes, kind, name):
    for process in processes:
        for found, one in zip(process[f"{kind} {name}"], alone(name), strict=True):
            for parameter, gradient in one.items():
                assert float((found[parameter] - gradient).abs().max()) <= 1e-9 * float(gradient.abs().max())
