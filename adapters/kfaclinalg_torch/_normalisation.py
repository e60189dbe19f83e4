"""The scale and shift of a normalisation as a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._modules import Block, Like, second_moment


@dataclass(frozen=True, eq=False)
class Scale(Block):
    """The scale and shift of a normalisation, y = scale ∘ x̂ + shift: for each channel the column W (channels, 2, 1).

    G is the exact Fisher matrix of a channel, the second moment of an example's gradient v = Σ g (x̂, 1); a is 1.
    """

    name: str
    module: nn.Module
    scale: Tensor
    shift: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.scale,) if self.shift is None else (self.scale, self.shift)

    def matrix(self, like: Like) -> Tensor:
        return torch.stack([like(p).flatten() for p in self.parameters], dim=1)[..., None]

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(like(p), W[:, i, 0].reshape(p.shape)) for i, p in enumerate(self.parameters)]

    def seen(self, x: Tensor) -> Tensor:
        """x̂ as the forward pass made it: the module's mode and statistics may be others later."""
        return normalised(self.module, x)

    def input_moment(self, x: Tensor, N: int) -> tuple[Tensor, int]:
        return x.new_full((self.scale.numel(), 1, 1), N), N

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        scales, shifts = (self._by_channel(t, N).sum(1) for t in (g * x, g))
        v = torch.stack([scales, shifts][: len(self.parameters)], dim=-1)  # (N, channels, 2)
        return second_moment(v)

    def _by_channel(self, x: Tensor, N: int) -> Tensor:
        """(N, R, channels)."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            return x.reshape(N, -1, self.scale.numel())
        return x.reshape(N, -1, x.shape[1], x[0, 0].numel()).mT.flatten(1, 2)


def normalised(module: Any, x: Tensor) -> Tensor:
    """x̂, what the module scales and shifts."""
    match module:
        case nn.LayerNorm():
            return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        case nn.RMSNorm():
            return functional.rms_norm(x, module.normalized_shape, eps=module.eps)
        case nn.GroupNorm():
            return functional.group_norm(x, module.num_groups, eps=module.eps)
    batch = module.training or module.running_mean is None
    mean, variance = (None, None) if batch else (module.running_mean, module.running_var)
    return functional.batch_norm(x, mean, variance, training=batch, eps=module.eps)
