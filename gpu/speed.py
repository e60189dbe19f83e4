"""Part 2: how fast, against the same work by cuSOLVER and GEMM by hand, and whole steps against SGD's and AdamW's."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from _bench import DEVICE, DRY, Table, median_ms, peak_memory, random_factor, times
from _networks import AUTOENCODER, VOCABULARY, autoencoder, resnet18, transformer
from kfaclinalg import Factors, LayerFactors, batch_factors, block_diagonal_inverse, block_tridiagonal_inverse, spd
from kfaclinalg_torch import KFAC, KFACPreconditioner

SHAPES = [(m, n + 1) for n, m in itertools.pairwise(AUTOENCODER)]


def refresh() -> Table:
    """The autoencoder's sixteen factors: bar 3 ms on a card of the H100's class."""
    table = Table("refresh of the autoencoder's 16 factors, ms", "median", "ratio", "MiB")
    layers = [LayerFactors(random_factor(n, i), random_factor(m, 50 + i)) for i, (m, n) in enumerate(SHAPES)]
    sides = [M for layer in layers for M in layer]
    damped = [M + 0.1 * torch.eye(len(M), device=DEVICE) for M in sides]
    groups = [torch.stack(list(alike)) for _, alike in itertools.groupby(sorted(damped, key=len), key=len)]
    earlier = [spd.inverse(M) for M in damped]

    def by_hand(Ms: list[Tensor]) -> Callable[[], object]:
        return lambda: [torch.cholesky_inverse(torch.linalg.cholesky_ex(M).L) for M in Ms]

    ways: dict[str, Callable[[], object]] = {
        "cholesky_ex + cholesky_inverse, one by one": by_hand(damped),
        "the same, equal sizes batched": by_hand(groups),
        "block_diagonal_inverse": lambda: block_diagonal_inverse(Factors(tuple(layers)), 0.1),
        "newton_schulz from the last inverse, 4 iterations": lambda: [
            spd.newton_schulz_inverse(M, X, iterations=4) for M, X in zip(damped, earlier, strict=True)
        ],
    }
    floor = min(median_ms(by_hand(damped)), median_ms(by_hand(groups)))
    for name, f in ways.items():
        with table.guarded(name):
            ms = median_ms(f)
            table.row(name, ms, ms / floor, peak_memory(f))
    return table


def algebra() -> Table:
    """Statistics, applications and the tridiagonal inverse."""
    table = Table("algebra, ms", "ours", "by hand", "ratio")
    N = 64 if DRY else 1000
    inputs = [torch.randn(N, n, device=DEVICE) for _, n in SHAPES]
    gradients = [torch.randn(N, m, device=DEVICE) for m, _ in SHAPES]
    factors = batch_factors(inputs, gradients, links=True)
    Vs = tuple(torch.randn(m, n, device=DEVICE) for m, n in SHAPES)
    P, T = block_diagonal_inverse(factors, 0.3), block_tridiagonal_inverse(factors, 0.3)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "batch_factors": (
            lambda: batch_factors(inputs, gradients),
            lambda: [x.mT @ x / N for x in (*inputs, *gradients)],
        ),
        "block-diagonal @": (
            lambda: P @ Vs,
            lambda: [block.B @ V @ block.A for block, V in zip(P.blocks, Vs, strict=True)],
        ),
        "block_tridiagonal_inverse": (
            lambda: block_tridiagonal_inverse(factors, 0.3),
            lambda: [torch.linalg.eigh(M) for layer in factors.layers[1:] for M in layer],
        ),
        "block-tridiagonal @": (lambda: T @ Vs, lambda: P @ Vs),
    }
    for name, (ours, by_hand) in pairs.items():
        with table.guarded(name):
            one, other = median_ms(ours, 10), median_ms(by_hand, 10)
            table.row(name, one, other, one / other)
    return table


class Job(NamedTuple):
    """A network on one batch."""

    name: str
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]
    likelihood: str


def step_of(job: Job, how: str) -> Callable[[], object]:
    """One iteration of a loop, on a network of its own, data on the device, no loss read."""
    torch.manual_seed(0)
    net, x, y = job.build().to(DEVICE), job.x.to(DEVICE), job.y.to(DEVICE)
    if how == "KFAC":
        optimizer = KFAC(net, job.likelihood)
        return lambda: optimizer.step(x, y)
    inner: torch.optim.Optimizer
    if how.startswith("SGD"):
        inner = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=True)
    else:
        inner = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    periods = {"statistics_period": 20, "inverse_period": 20} if "20/20" in how else {}
    preconditioner = KFACPreconditioner(net, likelihood=job.likelihood, **periods) if "K-FAC" in how else None

    def step() -> None:
        inner.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled="bf16" in how):
            outputs = net(x)
            if preconditioner:
                preconditioner.update(outputs)
            loss = job.criterion(outputs, y)
        loss.backward()
        if preconditioner:
            preconditioner.step()
        inner.step()

    return step


def jobs() -> Iterator[tuple[Job, tuple[str, ...]]]:
    """With the ways to train each; a way without K-FAC is what the ones after it are compared with."""
    for m in (64,) if DRY else (1000, 8192):
        digits = torch.rand(m, AUTOENCODER[0])
        job = Job(f"autoencoder, m = {m}", autoencoder, digits, digits, pixels_loss, "bernoulli")
        yield job, ("SGD", "KFAC", "SGD + K-FAC 20/20")
    ways = "AdamW", "AdamW + K-FAC", "AdamW + K-FAC 20/20", "AdamW, bf16", "AdamW, bf16 + K-FAC 20/20"
    images, tokens = torch.randn(8 if DRY else 128, 3, 32, 32), torch.randint(VOCABULARY, (2, 8) if DRY else (8, 512))
    labels = torch.randint(10, images.shape[:1])
    yield Job("ResNet-18, batch 128", resnet18, images, labels, nn.functional.cross_entropy, "categorical"), ways
    yield Job("GPT-2 small's blocks, 8 x 512", transformer, tokens, tokens, tokens_loss, "categorical"), ways


def pixels_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, y, reduction="sum") / len(y)


def tokens_loss(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), y.flatten())


def whole_steps() -> Table:
    """Bars: KFAC at most 2 times SGD, 20/20 at most 1.3 times AdamW, no step above 3 times the median."""
    table = Table("whole steps, ms", "median", "ratio", "longest/median", "MiB")
    for job, ways in jobs():
        base = float("nan")
        for how in ways:
            with table.guarded(f"{job.name}: {how}"):
                step = step_of(job, how)
                seconds = times(step, count=40, warmup=5)
                middle = statistics.median(seconds)
                base = middle if "K" not in how else base
                cells = 1e3 * middle, middle / base, max(seconds) / middle, peak_memory(step)
                table.row(f"{job.name}: {how}", *cells)
    return table


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = sum(part().failed for part in (refresh, algebra, whole_steps))
    print(f"\n{failed} failed")
    sys.exit(bool(failed))
