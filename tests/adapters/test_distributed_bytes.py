"""What a step sends, seen in the collectives, is what the page on many processes says."""

from contextlib import nullcontext

import pytest
import torch
from test_distributed_agreement import made
from together import batch_of, loss_of, spawned, wrapped
from torch import nn
from torch.utils._pytree import tree_leaves

from _sent_bytes import Sent
from kfaclinalg import LowRank
from kfaclinalg_torch import KFAC, _divided
from kfaclinalg_torch._wire import Form

WORLD, RANK = 4, 2
PLACEMENTS = [("ddp", "replicated"), ("ddp", 0.5), ("ddp", "owner"), ("fsdp", "owner"), ("fsdp", "replicated")]
PLACEMENTS += [("hsdp", "owner")]
WIRES = {None: 4, torch.bfloat16: 2}
STRUCTURES = {"block-diagonal": "block-diagonal", "eigen": "eigen", "low rank": LowRank(RANK)}
CASES = {
    f"{kind} {place} {wire} {structure}": (kind, place, wire, structure)
    for kind, place in PLACEMENTS
    for structure in STRUCTURES
    for wire in WIRES
    if wire is None or structure == "block-diagonal"
}
KINDS = {"owner": 1, "replicated": WORLD, 0.5: 2}


def even_model():
    """Every parameter can be split among four processes."""
    layers = nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    return nn.Sequential(*layers)


def run(rank, world):
    found = {}
    for name, (kind, placement, wire, structure) in CASES.items():
        model = even_model()
        called = wrapped(model, kind, world)
        options = {"placement": placement, "wire_dtype": wire, "structure": STRUCTURES[structure]}
        preconditioner = made(called, **options)
        beside = counted = 0.0
        for step in range(4):
            model.zero_grad()
            x, y = (t.chunk(world)[rank] for t in batch_of(step, torch.float32))
            outputs = called(x)
            early = left(preconditioner)
            preconditioner.update(outputs)
            loss_of(outputs, y, world).backward()
            with Sent() if step >= 2 else nullcontext() as sent:  # one whole period of two steps
                preconditioner.step()
            beside += early.bytes if sent else 0
            counted += sent.bytes if sent else 0
        p = preconditioner
        held = [p._estimate.averages.layers, p._inverses.inverses]
        sizes = [x.numel() for x in tree_leaves(held) if isinstance(x, torch.Tensor)]
        found[name] = counted / 2, sum(sizes), beside / 2
    return found | {"KFAC": of_kfac(rank, world)}


def of_kfac(rank, world):
    """The bytes of a step without a refresh, with one, and with one for each of three γ."""
    _divided.PAYS, sents = 0, []
    optimizer = KFAC(even_model(), "categorical", inverse_period=2, gamma_period=4)
    for step in range(8):
        with Sent() as sent:
            optimizer.step(*(t.chunk(world)[rank] for t in batch_of(step, torch.float32)))
        sents.append(sent.bytes)
    return [sents[step] for step in (4, 5, 7)]


def left(preconditioner):
    """What the next update sends, but for the passes that it makes itself."""
    estimate, sent = preconditioner._estimate, Sent()
    inner = estimate.updated

    def updated(statistic):
        with sent:
            inner(statistic)

    estimate.updated = updated
    return sent


DENSE, NORMALISED = [(5, 8), (9, 8), (9, 4)], [(1, 2)] * 8  # [weight, bias] of three layers, (scale, shift)


def formula(kind, placement, wire, structure):
    """Bytes a step with σ = 1 and τ = 2: beside the backward pass, and in the step."""
    T, V, made_of = triangles(DENSE + NORMALISED), entries(DENSE + NORMALISED), MADE_OF[structure]
    P, b, r, w = WORLD, WIRES[wire], (WORLD - 1) / WORLD, 2 if kind == "hsdp" else KINDS[placement]
    everywhere = placement == "replicated"
    statistics = (2 if everywhere else 1) * r * T * b
    inverses = (w - 1) / P * made_of(DENSE + NORMALISED) * b / 2
    if structure == "eigen":  # the squares of the gradients; a normalisation's follow from A and G
        inverses += 2 * r * entries(DENSE) * b + (0 if everywhere else r * made_of(DENSE) * b)
        inverses += 0 if everywhere else (w - 1) / P * entries(NORMALISED) * b
    if kind == "ddp":
        return statistics, inverses + (1 - w / P) * V * 4
    return statistics, inverses + (r * V if everywhere else 2 * (1 - w / P) * V * w / P) * 4


def triangles(shapes):
    """T."""
    return sum(d * (d + 1) // 2 for shape in shapes for d in shape)


def entries(shapes):
    """V."""
    return sum(n * m for n, m in shapes)


MADE_OF = {
    "block-diagonal": triangles,
    "eigen": lambda shapes: sum(n * n + m * m + 2 * n * m for n, m in shapes),
    "low rank": lambda shapes: sum(min(d, RANK) * (d + 1) + d for shape in shapes for d in shape),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return spawned(tmp_path_factory.mktemp("bytes"), WORLD, run)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_step_are_those_of_the_formula(processes, name):
    counted = [sum(found[name][i] for found in processes) / WORLD for i in (2, 0)]
    assert counted == pytest.approx(formula(*CASES[name]), rel=1e-12)


def test_the_bytes_of_kfac_are_those_of_the_formula(processes):
    """2 r (T + V) b, and r T b for each γ for which inverses are made."""
    T, V, r = triangles(DENSE + NORMALISED), entries(DENSE + NORMALISED), (WORLD - 1) / WORLD
    counted = [sum(sents) / WORLD for sents in zip(*(found["KFAC"] for found in processes), strict=True)]
    assert counted == pytest.approx([(2 * (T + V) + times * T) * r * 4 for times in (0, 1, 3)], rel=1e-12)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_memory_falls_with_the_processes(processes, kind):
    """There is one copy in all, and nobody has more than a share and the largest layer."""
    whole = processes[0]["ddp replicated None block-diagonal"][1]
    shares = [found[f"{kind} owner None block-diagonal"][1] for found in processes]
    assert sum(shares) == whole
    assert max(shares) <= whole / WORLD + 2 * (9**2 + 8**2)


@pytest.mark.parametrize("d", range(1, 10))
@pytest.mark.parametrize("batch", [(), (3,)])
def test_triangles_travel_without_loss(d, batch):
    M = torch.randn(*batch, d, d, dtype=torch.float64)
    whole = Form(tuple(M.shape), "symmetric")
    packed = whole.packed(M + M.mT)
    assert packed.shape == (whole.size,) == (len(M.flatten()) // d**2 * d * (d + 1) // 2,)
    assert torch.equal(whole.unpacked(packed), M + M.mT)
    lower = whole._replace(kind="lower")
    assert torch.equal(lower.unpacked(lower.packed(M)), M.tril())
