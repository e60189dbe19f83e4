"""Part 1: what the library computes on a GPU, against float64 on the host and the bounds of its tests.

First what no test can say: the global switch of TF32, members that fail, batches of NaN, reads of the device. Then the
tests' own CUDA, CuPy and JAX cases, as many as the time allows.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from training import Waits

from _bench import DEVICE, DRY, Table, random_factor
from kfaclinalg import Factors, LayerFactors, block_diagonal_inverse, second_moment, show_config, spd, testing
from kfaclinalg_torch import KFAC, KFACPreconditioner

START = time.monotonic()
SECONDS = 215  # what the tests may take up to
FILES = (
    "spd",
    "kronecker",
    "kronecker_pair",
    "kronecker_basis",
    "curvature",
    "damping",
    "factors",
    "low_rank",
    "quadratic",
)
EPS = float(torch.finfo(torch.float32).eps)


def host(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def tf32() -> Table:
    """Errors over their bounds with the switch off and on: the same, or the library depends on it."""
    table = Table("float32, error / bound (at most 1), by torch.backends.cuda.matmul.allow_tf32", "off", "on")
    n = 64 if DRY else 512
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0))
    A, G, V = random_factor(n, 1), random_factor(n, 2), torch.ones(n, n, device=DEVICE)
    condition = float(np.linalg.cond(host(A)))

    def moment() -> float:
        exact = host(x).T @ host(x) / len(x)
        return float(np.abs(host(second_moment(x.to(DEVICE))) - exact).max() / (n * EPS * np.abs(exact).max()))

    def inverse() -> float:
        exact = np.linalg.inv(host(A))
        error = np.linalg.norm(host(spd.inverse(A)) - exact) / np.linalg.norm(exact)
        return float(error / testing.inverse_bound(condition, EPS))

    def preconditioned() -> float:
        (U,) = block_diagonal_inverse(Factors((LayerFactors(A, G),)), 0.1) @ (V,)
        a, g, pi = host(A), host(G), np.sqrt(np.trace(host(A)) / np.trace(host(G)))
        a, g = a + 0.1 * pi * np.eye(n), g + 0.1 / pi * np.eye(n)
        exact = np.linalg.solve(g, np.linalg.solve(a, host(V).T).T)
        bound = testing.inverse_bound(float(np.linalg.cond(a) * np.linalg.cond(g)), EPS)
        return float(np.linalg.norm(host(U) - exact) / np.linalg.norm(exact) / bound)

    for measure in (moment, inverse, preconditioned):
        with table.guarded(measure.__name__):
            ratios = []
            for switch in (False, True):
                torch.backends.cuda.matmul.allow_tf32 = switch
                ratios.append(measure())
            table.row(measure.__name__, *ratios, holds=max(ratios) <= 1)
    torch.backends.cuda.matmul.allow_tf32 = False
    return table


def members() -> Table:
    """A member that fails is NaN, and the others are what they are alone."""
    table = Table("batches of four: NaN, infinity, not definite, and one that is sound", "as expected")
    good = random_factor(5, 0, torch.float64)
    bad = [good * float("nan"), good.clone(), -good, good]
    bad[1][0, 0] = float("inf")
    M = torch.stack(bad)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "inverse": spd.inverse,
        "cholesky": spd.cholesky,
        "solve": lambda M: spd.solve(M, torch.ones(5, 2, dtype=M.dtype, device=M.device)),
        "inverse_root": lambda M: spd.inverse_root(M, 2),
        "logdet": spd.logdet,
    }
    for name, f in functions.items():
        with table.guarded(name):
            batch, alone = f(M), f(good)
            lost = [bool(torch.isnan(x).all()) for x in batch]
            expected = lost == [True, True, True, False] and torch.allclose(batch[3], alone, rtol=1e-10)
            table.row(name, expected, holds=expected)
    return table


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10)).to(DEVICE)


def bad_batches() -> Table:
    """Batches of NaN and infinity are refused, and the next good one moves the weights to finite ones."""
    table = Table("bad batches", "refused", "then finite", "then moved")
    x, y = torch.randn(64, 20, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    for value in (float("nan"), float("inf")):
        with table.guarded(f"KFAC, {value}"):
            net = network()
            optimizer = KFAC(net, "categorical")
            optimizer.step(x, y)
            before = net[0].weight.clone()
            optimizer.step(x * value, y)
            refused = bool(optimizer.info.refused) and torch.equal(before, net[0].weight)
            optimizer.step(x, y)
            finite, moved = bool(net[0].weight.isfinite().all()), not torch.equal(before, net[0].weight)
            table.row(f"KFAC, {value}", refused, finite, moved, holds=refused and finite and moved)
    return table


def steps() -> dict[str, Callable[[], None]]:
    """A step of each optimizer, on data that stay on the device."""
    x, y = torch.randn(64, 20, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    made = {}
    for structure in ("block-diagonal", "block-tridiagonal"):
        optimizer = KFAC(network(), "categorical", structure=structure)
        made[f"KFAC, {structure}"] = lambda optimizer=optimizer: optimizer.step(x, y)
    for structure in ("block-diagonal", "eigen"):
        net = network()
        preconditioner = KFACPreconditioner(net, likelihood="categorical", structure=structure, inverse_period=5)
        inner = torch.optim.AdamW(net.parameters(), fused=True)

        def step(net=net, preconditioner=preconditioner, inner=inner) -> None:
            outputs = net(x)
            preconditioner.update(outputs)
            inner.zero_grad()
            nn.functional.cross_entropy(outputs, y).backward()
            preconditioner.step()
            inner.step()

        made[f"preconditioner, {structure}"] = step
    return made


def waits(step: Callable[[], None]) -> int:
    """How often a step waits: on a GPU by torch's own count, a warning each."""
    if DEVICE.type != "cuda":
        with Waits() as seen_by_torch:
            step()
        return seen_by_torch.count
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def reads() -> Table:
    """What the targets' range, the decisions of λ, γ and refusal, a statistic and a refresh need."""
    table = Table("waits for the device in a step, over ten steps", "fewest", "most")
    for name, step in steps().items():
        with table.guarded(name):
            step()
            counts = [waits(step) for _ in range(10)]
            table.row(name, min(counts), max(counts))
    return table


def tests(leg: str, expression: str, files: tuple[str, ...]) -> int:
    """pytest on the cases that a leg names; those that the time does not allow are not run, and it says so."""
    left = SECONDS - (time.monotonic() - START)
    print(f"\ntests: {leg} ({left:.0f} s are left)", flush=True)
    if left < 15:
        print("  not run", flush=True)
        return 0
    names = [f"tests/test_{name}.py" for name in files]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", expression, "--maxfail=20", "--tb=line", *names]
    code = subprocess.run(["timeout", str(int(left)), sys.executable, *pytest], check=False).returncode
    if code == 124:
        print("  stopped: no failure up to here", flush=True)
    return int(code not in (0, 5, 124))  # 5: none collected


if __name__ == "__main__":
    show_config()
    failed = sum(part().failed for part in (tf32, members, bad_batches, reads))
    few = FILES[:1] if DRY else FILES
    failed += tests("CUDA", "cuda", few)
    failed += tests("CuPy's double", "", ("cupy",)) if DRY else tests("CuPy", "cupy", few)
    failed += tests("JAX, outside of jit", "jax and not jit", few[:3])
    print(f"\n{failed} failed")
    sys.exit(bool(failed))
