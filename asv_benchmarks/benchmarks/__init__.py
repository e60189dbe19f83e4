"""Benchmarks. What they share: the backends, matrices to work on, and waiting for a result."""

from typing import Any

import numpy as np
import torch

BACKENDS = ["numpy", "torch"] + (["cuda"] if torch.cuda.is_available() else [])


def asarray(x: np.ndarray, backend: str) -> Any:
    """x in float32 on that backend."""
    x = x.astype(np.float32)
    return x if backend == "numpy" else torch.asarray(x, device="cuda" if backend == "cuda" else "cpu")


def spd_matrix(n: int, backend: str) -> Any:
    """A second moment of 2n samples, which is what a factor is."""
    x = np.random.default_rng(n).normal(size=(2 * n, n))
    return asarray(x.T @ x / (2 * n), backend)


def wait(result: Any) -> None:
    """CUDA returns before the result is there."""
    if isinstance(result, torch.Tensor) and result.is_cuda:
        torch.cuda.synchronize()
