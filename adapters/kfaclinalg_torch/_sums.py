"""The sums of one block's moments over what a pass after the other shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._blocks import Block
from ._panels import mirrored


class Sums:
    """Σ a aᵀ of so many rows, and Σ g gᵀ. What is first given is kept as it is; what follows grows in place.

    `A` and `G` hold what is on and above the diagonal, until they are asked for as `whole`.
    """

    def __init__(self, A: Any, rows: int, G: Any) -> None:
        self.A, self.rows, self.G = A, rows, G
        self._own = False  # whether nobody else holds these tensors
        self._partial = False  # whether what is below the diagonal lags behind

    def add(self, A: Any, rows: int, G: Any) -> None:
        """Moments, whole; None where no inputs were shown that were not seen before."""
        self._take()
        self.rows += rows
        if A is not None:
            self.A = A if self.A is None else self.A.add_(A.to(self.A.device))
        self.G.add_(G.to(self.G.device))

    def show(self, block: Block, x: Tensor, g: Tensor, N: int, mask: Tensor | None, draw: int) -> None:
        """What one use of the block has shown, for one draw of the targets."""
        if self.A is None or self.G.device != g.device:
            A, rows = block.input_moment(x, N, mask) if draw == 0 else (None, 0)
            self.add(A, rows, block.output_moment(x, g, N))
            return
        self._take()
        self._partial = True
        if draw == 0:
            self.rows += block.add_input_moment(self.A, x, N, mask)
        block.add_output_moment(self.G, x, g, N)

    def whole(self) -> Sums:
        """With all of the symmetric matrices."""
        if self._partial:
            for M in (self.A, self.G):
                if M.ndim > 1:
                    mirrored(M)
            self._partial = False
        return self

    def move(self, device: torch.device) -> None:
        self.A, self.G = (M if M is None else M.to(device) for M in (self.A, self.G))

    def _take(self) -> None:
        """From now on they are nobody else's."""
        if not self._own:
            self.A, self.G = (
                M if M is None else M.clone(memory_format=torch.contiguous_format) for M in (self.A, self.G)
            )
            self._own = True
