"""What a pass showed of a dense block, the rows of all its uses together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._blocks import Dense
from ._masks import spread
from ._statistics import Statistic
from ._use import Use


class Rows(NamedTuple):
    """a (N, R, ..., n) and g (N, R, ..., m), both zero where a position does not count, and which do (N, R)."""

    a: Tensor
    g: Tensor
    mask: Tensor
    complete: bool  # whether all count

    @property
    def counted(self) -> int:
        """How many positions count; without a mask no device is waited for."""
        return self.mask.numel() if self.complete else int(self.mask.sum())

    def reduced(self, c: Tensor | float = 1.0) -> Rows:
        """One position for each example: the mean of a over those that count, and c Σ g."""
        counts = self.mask.sum(1, keepdim=True).clamp(min=1)
        a = self.a.sum(1, keepdim=True) / spread(counts, self.a.ndim)
        return Rows(a, c * self.g.sum(1, keepdim=True), self.mask.any(1, keepdim=True), self.complete)


def rows_of(
    statistic: Statistic,
    block: Dense,
    uses: Sequence[tuple[Use, Tensor]],
    inputs: Callable[[Use, Tensor, int], Tensor] | None = None,
) -> Rows | None:
    """Those of the uses that are the block's; None where there are none, or of several numbers of examples.

    `inputs(use, x, N)` is what stands for a: those of the block, or a linear function of them.
    """
    found = []
    for use, g in (pair for pair in uses if pair[0].block is block):
        N, (x, s) = use.examples(), use.pair(g, statistic.dtype)
        a = block.inputs(x, N) if inputs is None else inputs(use, x, N)
        if use.mask is None:
            mask = a.new_ones(a.shape[:2], dtype=torch.bool)
        else:
            mask = use.mask.reshape(N, -1)
            a = torch.where(spread(mask, a.ndim), a, 0.0)
        found.append((a, block.outputs(x, s, N), mask))
    if len({len(a) for a, _, _ in found}) != 1:
        return None
    a, g, mask = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return Rows(a, g, mask, all(use.mask is None for use, _ in uses))
