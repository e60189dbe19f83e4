"""Embeddings as blocks: linear maps of one-hot rows, which are never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._blocks import Like, Mask, Rows, outline, second_moment


@dataclass(frozen=True, eq=False)
class Embedding(Rows):
    """W = weightᵀ (m, n) on one-hot rows a; of their moment the diagonal is kept, in the expand setting all of it."""

    name: str
    weight: Tensor
    padding: int | None = None
    turned = True

    def positions(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def matrix(self, like: Like) -> Tensor:
        return like(self.weight).mT

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(like(self.weight), W.mT)]

    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        return self._counts(x, 1, mask)[0], x.numel() if mask is None else int(mask.sum())

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return second_moment(self.outputs(x, g, N).flatten(0, 1))

    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        g = g if self.padding is None else g * (x != self.padding)[..., None]
        return g.reshape(N, -1, g.shape[-1])

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        return outline(self.weight).new_zeros(len(self.weight)), super().empty_moments()[1]

    def pooled_inputs(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, Any]:
        return self._counts(x, N, mask), x.numel() // N if mask is None else mask.reshape(N, -1).sum(1)

    def pooled_moment(self, a: Tensor) -> Tensor:
        return a.square().sum(0)

    def gradients(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        s, index = self.outputs(x, g, N), x.reshape(N, -1, 1)
        return s.new_zeros(N, *self.weight.shape).scatter_add_(1, index.expand(s.shape), s).mT

    def _counts(self, x: Tensor, N: int, mask: Mask) -> Tensor:
        """How often each index came in each example (N, n)."""
        V, x = self.weight.shape[0], x.reshape(N, -1)
        cells = (x + V * torch.arange(N, device=x.device)[:, None]).flatten()
        cells = cells if mask is None else cells[mask.flatten()]
        counts = torch.bincount(cells, minlength=N * V).reshape(N, V).double()  # exact, whatever the weights are
        if self.padding is not None:
            counts[:, self.padding] = 0
        return counts


class Unpadded(TorchFunctionMode):
    """Within it the padding of an embedding is constant in forward mode as well, in which torch lets it move."""

    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = f(*args, **(kwargs or {}))
        if f is not functional.embedding:
            return found
        x, padding = _words_of(*args, **(kwargs or {}))
        return found if padding is None else torch.where((x == padding)[..., None], found.detach(), found)


def _words_of(input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **others: Any) -> Any:
    """The words and which of them is padding, by whatever way they came."""
    return input, padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + len(weight)
