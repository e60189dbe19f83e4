"""From the gradients at a network's outputs to those at its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from ._entries import Entries
from ._statistics import Statistic
from ._use import Pass, Use


def in_full_precision(f: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, and without autocast, which would take products in half precision."""

    @wraps(f)
    def wrapped(self: Any, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return f(self, *args)

    return wrapped


def keep_what_is_saved() -> None:
    """What torch compiles from now on goes through several backward passes, as `gather` takes them.

    Else the first one may use the memory of what the forward pass has saved, and torch refuses the second.
    """
    config: Any = torch._functorch.config
    if getattr(config, "donated_buffer", False):  # from torch 2.5 on
        config.donated_buffer = False
        torch.compiler.reset()  # what was compiled before


def gather(
    statistic: Statistic,
    uses: Sequence[Use],
    leaves: Mapping[Tensor, Tensor],
    outputs: Tensor,
    cotangents: Iterable[Tensor],
    of: Pass,
) -> list[bool]:
    """Send each cotangent back from the outputs to the uses, and to the parameters of which the diagonal is taken.

    `leaves` are what stands for the parameters in the graph. Returns which uses were reached.
    """
    entries = [block for block in statistic.all if isinstance(block, Entries)]
    sources: list[Any] = [*(use.outputs for use in uses), *(leaves[block.parameter] for block in entries)]
    reached = [False] * len(sources)
    for draw, cotangent in enumerate(cotangents if sources else ()):
        try:
            slopes = torch.autograd.grad(outputs, sources, cotangent, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError("update(outputs) comes before loss.backward(), which frees the graph") from error
        reached = [g is not None for g in slopes]
        for use, g in zip(uses, slopes, strict=False):
            if g is not None:
                statistic.add(use, g, draw)
        for block, g in zip(entries, slopes[len(uses) :], strict=True):
            if g is not None:
                statistic.saw(of)
                statistic.add_entries(block, g)
    return reached[: len(uses)] if uses else reached
