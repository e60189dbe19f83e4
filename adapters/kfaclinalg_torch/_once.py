"""What happens once in a step of many forward passes: random numbers are drawn, running statistics move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Once:
    """The first pass over a chunk of the batch is as any other; those after it replay its random numbers."""

    def __init__(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.devices = [device] if device.type == "cuda" else []
        self.states: dict[int, list[Tensor]] = {}

    @contextmanager
    def passing(self, place: int) -> Iterator[None]:
        """One pass over the chunk at this place."""
        if place not in self.states:
            self.states[place] = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]
            yield
            return
        cpu, *others = self.states[place]
        with torch.random.fork_rng(self.devices), still(self.model):
            torch.set_rng_state(cpu)
            for device, state in zip(self.devices, others, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Normalisations in training that take the batch's statistics, as they do, and keep no account of them."""
    modules: list[Any] = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    for module in modules:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in modules:
            module.track_running_stats = True


def restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, held in buffers:
            buffer.copy_(held)
