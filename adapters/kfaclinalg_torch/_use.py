"""One use of a block in a forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ._blocks import Block
from ._masks import counting, spread


class Pass(NamedTuple):
    """One forward pass of the model, over so many examples, whose first input has so many entries.

    The `mask` (N, ...) says which positions count.
    """

    number: int
    examples: int
    entries: int = 0
    mask: Tensor | None = None

    @property
    def counted(self) -> int:
        """The examples of which any position counts."""
        return self.examples if self.mask is None else int(counting(self.mask).sum())


class Use(NamedTuple):
    """One use of a block: what it saw, and where its outputs stand in autograd's graph."""

    block: Block
    of: Pass
    inputs: Tensor
    version: int
    single: bool  # no batch: one example without a dimension for it
    outputs: GradientEdge | None
    mask: Tensor | None  # of the positions of this block

    def examples(self) -> int:
        """Those of the pass; 1 where the first dimension holds none of them, as in an embedding of positions."""
        rows = self.inputs.shape[0]
        return rows if self.block.scattered else self.of.examples if rows % self.of.examples == 0 else 1

    def pair(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inputs and the gradient at the outputs, the batch first, in the dtype of the factors."""
        if self.inputs._version != self.version:
            raise RuntimeError(f"the inputs of {self.block.name!r} were changed in place after its forward pass")
        x = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        g = (g[None] if self.single else g).to(dtype)
        if self.mask is None:
            return x, g
        counts = spread(self.mask, g.ndim) if self.block.channels_last else self.mask[:, None]
        return x, torch.where(counts, g, 0.0)


def size_of(inputs: Any) -> tuple[int, int]:
    """The length of the first dimension of the first tensor, and how many entries it has; 0 where there is none."""
    for x in tree_leaves(inputs, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(x, PackedSequence):
            return int(x.batch_sizes[0]), x.data.numel()
        if isinstance(x, Tensor) and x.ndim > 0:
            return x.shape[0], x.numel()
    return 0, 0
