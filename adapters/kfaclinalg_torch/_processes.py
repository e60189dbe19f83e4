"""Sums over the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def several_processes() -> bool:
    return processes() > 1


def over_processes(tensors: Sequence[Tensor], counts: Sequence[int]) -> tuple[Sequence[Tensor], Sequence[int]]:
    """The sums over all processes of torch.distributed; what came, where there is but one."""
    if not several_processes():
        return tensors, counts
    flat = torch.cat([t.flatten() for t in tensors])
    numbers = torch.tensor(counts, dtype=torch.float64, device=flat.device)
    distributed.all_reduce(flat)
    distributed.all_reduce(numbers)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)], [int(n) for n in numbers.tolist()]
