"""The scale and shift of a normalisation as a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._blocks import Block, Like, Mask, second_moment

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SPATIAL = NORMS[2:]  # the channels are the second dimension


@dataclass(frozen=True, eq=False)
class Scale(Block):
    """The scale and shift of a normalisation, y = scale ∘ x̂ + shift: for each channel the column W (channels, 2, 1).

    G is the exact Fisher matrix of a channel, the second moment of an example's gradient v = Σ g (x̂, 1); a is 1.
    """

    name: str
    module: nn.Module
    scale: Tensor
    shift: Tensor | None = None

    @property
    def channels_last(self) -> bool:  # type: ignore[override]
        return not isinstance(self.module, SPATIAL)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.scale,) if self.shift is None else (self.scale, self.shift)

    def matrix(self, like: Like) -> Tensor:
        return torch.stack([like(p).flatten() for p in self.parameters], dim=1)[..., None]

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(like(p), W[:, i, 0].reshape(p.shape)) for i, p in enumerate(self.parameters)]

    def seen(self, x: Tensor, *others: Any) -> Tensor:
        """x̂ as the forward pass made it: the module's mode and statistics may be others later."""
        return normalised(self.module, x)

    def positions(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[: x.ndim - self.scale.ndim] if self.channels_last else (len(x), *x.shape[2:]))

    def input_moment(self, x: Tensor, N: int, mask: Mask = None) -> tuple[Tensor, int]:
        return x.new_full((self.scale.numel(), 1, 1), N), N

    def output_moment(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        return second_moment(self.gradients(x, g, N)[..., 0])

    def gradients(self, x: Tensor, g: Tensor, N: int) -> Tensor:
        scales, shifts = (self._by_channel(t, N).sum(1) for t in (g * x, g))
        return torch.stack([scales, shifts][: len(self.parameters)], dim=-1)[..., None]  # (N, channels, 2, 1)

    def _by_channel(self, x: Tensor, N: int) -> Tensor:
        """(N, R, channels)."""
        if self.channels_last:
            return x.reshape(N, -1, self.scale.numel())
        return x.reshape(N, -1, x.shape[1], x[0, 0].numel()).mT.flatten(1, 2)


def normalised(module: Any, x: Tensor) -> Tensor:
    """x̂, what the module scales and shifts; one of an unknown class divides by the root mean square."""
    match module:
        case nn.LayerNorm():
            return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        case nn.GroupNorm():
            return functional.group_norm(x, module.num_groups, eps=module.eps)
        case nn.modules.batchnorm._BatchNorm():
            batch = module.training or module.running_mean is None
            mean, variance = (None, None) if batch else (module.running_mean, module.running_var)
            return functional.batch_norm(x, mean, variance, training=batch, eps=module.eps)
    return functional.rms_norm(x, tuple(module.weight.shape), eps=epsilon(module))


def epsilon(module: Any) -> float | None:
    """What an RMSNorm adds to the mean square, under whatever name."""
    names = ("eps", "epsilon", "variance_epsilon", "norm_eps")
    return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), float)), None)


def is_root_mean_square(module: nn.Module) -> bool:
    """Whether it may be an RMSNorm of a class of one's own: one weight, a vector, and nothing else."""
    alone = not any(True for _ in module.children()) and not any(True for _ in module.buffers(recurse=False))
    return alone and [(name, p.ndim) for name, p in module.named_parameters()] == [("weight", 1)]


def root_mean_square(module: Any, x: Tensor) -> Tensor:
    """What an RMSNorm of a class of one's own returns, as most of them write it."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return module.weight * normalised(module, wide).to(x.dtype)
