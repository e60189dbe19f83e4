"""Convolutions, transposed ones too, as a block: the patches of the inputs are what a linear layer's inputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _patches as patches
from ._blocks import LARGEST, Dense, Like, Mask, outline
from ._panels import flops_of
from ._patch_moments import patch_moment


@dataclass(frozen=True, eq=False)
class Convolution(Dense):
    """W (m, n) or, with groups, (groups, m, n), for patches a of the input in the place of a Linear's inputs."""

    name: str
    module: patches.Convolution
    weight: Tensor
    bias: Tensor | None
    channels_last = False

    def positions(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), *patches.grid_of(self.module, x).outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        g, m, n = patches.matrix_of_weight(self.module, outline(self.weight)).shape
        return (m, n + (self.bias is not None)) if g == 1 else (g, m, n + (self.bias is not None))

    @property
    def batched_ndim(self) -> int:  # type: ignore[override]
        return 2 + len(self.module.kernel_size)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, like: Like) -> Tensor:
        W = patches.matrix_of_weight(self.module, like(self.weight))
        if self.bias is not None:
            W = torch.cat([W, like(self.bias).reshape(*W.shape[:2], 1)], dim=2)
        return self._ungrouped(W, 0)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        W = W[None] if W.ndim == 2 else W
        n = W.shape[-1] - (self.bias is not None)
        found = [(like(self.weight), patches.weight_of_matrix(self.module, W[..., :n]))]
        return found if self.bias is None else [*found, (like(self.bias), W[..., -1].flatten())]

    def inputs(self, x: Tensor, N: int) -> Tensor:
        a = self._ungrouped(patches.patches(self.module, x, self.bias is not None), 2)
        return a.reshape(N, -1, *a.shape[2:])

    def outputs(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        s = self._ungrouped(patches.rows(self.module, g), 2)
        return s.reshape(N, -1, *s.shape[2:])

    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        if mask is not None:
            return super().input_moment(x, N, mask)
        bias, R = self.bias is not None, patches.positions(self.module, x)
        if self.module.groups == 1 and self.shape[1] > LARGEST:
            return R * patches.mean_patches(self.module, x.square(), bias).sum((0, 1)), len(x) * R
        return self._ungrouped(patch_moment(self.module, x, bias), 0), len(x) * R

    def input_work(self, n: int) -> int:
        """Of patches: shifts take fewer, but of narrow products, at a lower rate."""
        return flops_of(n)

    def pooled_inputs(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, Any]:
        if mask is not None:
            return super().pooled_inputs(x, N, mask)
        R = patches.positions(self.module, x)
        a = self._ungrouped(patches.mean_patches(self.module, x, self.bias is not None), 1)
        return R * a.reshape(N, -1, *a.shape[1:]).sum(1), R * (len(x) // N)

    def _ungrouped(self, x: Tensor, dim: int) -> Tensor:
        return x.squeeze(dim) if self.module.groups == 1 else x
