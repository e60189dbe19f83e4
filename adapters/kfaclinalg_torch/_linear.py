"""Linear and bilinear maps as blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._blocks import Dense, Like, outline


@dataclass(frozen=True, eq=False)
class Linear(Dense):
    """s = W a with W = [weight, bias], the last entry of a being 1.

    Of the parameters only `part`, rows of them or one matrix of a stack; where it is `transposed` the weight is
    (inputs, outputs). Without a weight it is the bias alone.
    """

    name: str
    weight: Tensor | None
    bias: Tensor | None = None
    part: slice | int = field(default_factory=lambda: slice(None))
    transposed: bool = False
    scattered: bool = False
    batched_ndim = 2

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(p for p in (self.weight, self.bias) if p is not None)

    @property
    def turned(self) -> bool:  # type: ignore[override]
        return self.transposed

    @property
    def whole(self) -> bool:
        """Whether its W is the weight as it stands, beside the bias."""
        return self.part == slice(None) and self.weight is not None and not self.transposed

    @cached_property
    def shape(self) -> tuple[int, ...]:
        tensors = self._tensors(outline)
        return len(tensors[0]), sum(t.shape[1] if t.ndim > 1 else 1 for t in tensors)

    def matrix(self, like: Like) -> Tensor:
        columns = [t if t.ndim > 1 else t[:, None] for t in self._tensors(like)]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(t, W[:, : t.shape[1]] if t.ndim > 1 else W[:, -1]) for t in self._tensors(like)]

    def inputs(self, x: Tensor, N: int) -> Tensor:
        a = x.reshape(N, -1, x.shape[-1])
        if self.weight is None:
            return a.new_ones(*a.shape[:2], 1)
        return a if self.bias is None else functional.pad(a, (0, 1), value=1.0)

    def projected(self, x: Tensor, N: int, Q: Tensor) -> Tensor:
        if self.weight is None or self.bias is None or type(self).inputs is not Linear.inputs:
            return super().projected(x, N, Q)
        a = x.reshape(-1, x.shape[-1])
        return torch.addmm(Q[-1], a, Q[:-1]).view(N, -1, Q.shape[1])

    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return g.reshape(N, -1, g.shape[-1])

    def _tensors(self, like: Like) -> list[Tensor]:
        tensors = [like(p) for p in self.parameters]
        return [(t.mT if self.transposed and t.ndim > 1 else t)[self.part] for t in tensors]


@dataclass(frozen=True, eq=False)
class Bilinear(Linear):
    """s_k = x₁ᵀ W_k x₂ + b_k: a linear map of the products of the two inputs."""

    def seen(self, x: Tensor, *others: Any) -> Tensor:
        return (x[..., :, None] * others[0].detach()[..., None, :]).flatten(-2)

    @property
    def whole(self) -> bool:
        return False

    def _tensors(self, like: Like) -> list[Tensor]:
        return [t.flatten(1) if t.ndim > 1 else t for t in super()._tensors(like)]
