"""What the parts share: the device, a table, and times that wait for the device."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
if DRY:
    torch.set_num_threads(1)


class Table:
    """Rows printed as they come; `failed` counts those that do not hold or raised."""

    def __init__(self, title: str, *columns: str) -> None:
        self.failed = 0
        print(f"\n{title}\n  {'':52}" + "".join(f"{name:>16}" for name in columns), flush=True)

    def row(self, name: str, *cells: Any, holds: bool = True) -> None:
        self.failed += not holds
        shown = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)
        print(f"  {name:52}" + "".join(f"{x:>16}" for x in shown) + ("" if holds else "   DOES NOT HOLD"), flush=True)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """What raises is a row, with the last line of its error, and the next one follows."""
        try:
            yield
        except Exception as error:  # one measurement must not cost the others
            text = str(error).strip().splitlines() or [""]
            self.row(name, f"{type(error).__name__}: {text[-1][:200]}", holds=False)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def times(f: Callable[[], Any], count: int = 20, warmup: int = 3) -> list[float]:
    """Seconds of each call, the device waited for."""
    for _ in range(1 if DRY else warmup):
        f()
    wait()
    seconds = []
    for _ in range(3 if DRY else count):
        start = time.perf_counter()
        f()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def median_ms(f: Callable[[], Any], count: int = 20) -> float:
    return 1e3 * statistics.median(times(f, count))


def peak_memory(f: Callable[[], Any]) -> float:
    """MiB that a call takes beyond what is held already; NaN on a CPU."""
    if DEVICE.type != "cuda":
        f()
        return float("nan")
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def random_factor(n: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A second moment of 2 n examples whose features shrink, and a ridge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    return (x.mT @ x / (2 * n) + 1e-3 * torch.eye(n, dtype=torch.float64)).to(DEVICE, dtype)
