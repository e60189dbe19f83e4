"""Convolutions as matrices: patches a of the inputs, one an output position, such that s = W a.

Every kind is taken as one at which nothing is padded or transposed, over pixels that were padded and, for a transposed
one, interleaved with zeros before. N examples, R output positions, g groups of c = C/g input and m/g output channels,
K elements of the kernel; the n = c K entries of a are in the order (channel of the group, *kernel).
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def matrix_of_weight(module: Convolution, weight: Tensor) -> Tensor:
    """W (g, m/g, n), without the bias, of a tensor shaped like the module's weight."""
    if isinstance(module, TRANSPOSED):  # (C, m/g, *kernel), the kernel back to front
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flip(*range(-len(module.kernel_size), 0))
    return weight.reshape(module.groups, module.out_channels // module.groups, -1)


def weight_of_matrix(module: Convolution, W: Tensor) -> Tensor:
    """The inverse of `matrix_of_weight`."""
    if isinstance(module, TRANSPOSED):
        W = W.unflatten(2, (-1, *module.kernel_size)).flip(*range(-len(module.kernel_size), 0)).transpose(1, 2)
    return W.reshape(module.weight.shape)


def rows(module: Convolution, g: Tensor) -> Tensor:
    """(N, R, g, m/g): gradients with respect to the outputs (N, m, *positions), as the rows of `patches` are."""
    return g.flatten(2).mT.unflatten(2, (module.groups, -1))


def patches(module: Convolution, x: Tensor, bias: bool) -> Tensor:
    """a (N, R, g, n) of the inputs x (N, C, *positions); with a bias (N, R, g, n + 1), the last column ones."""
    grid = grid_of(module, x)
    windows = grid.windows(module.groups)
    n = prod(windows.shape[-1 - grid.rank :])
    a = x.new_ones(len(x), grid.positions, module.groups, n + bias)
    a[..., :n].view(windows.shape).copy_(windows)
    return a


def positions(module: Convolution, x: Tensor) -> int:
    """R, the number of output positions."""
    return grid_of(module, x).positions


def mean_patches(module: Convolution, x: Tensor, bias: bool) -> Tensor:
    """(N, g, n), or (N, g, n + 1) with a bias: the mean of `patches` over positions, without forming them."""
    grid = grid_of(module, x)
    means = grid.sums().unflatten(1, (module.groups, -1)).flatten(2) / grid.positions
    return functional.pad(means, (0, 1), value=1.0) if bias else means


class Grid(NamedTuple):
    """Padded pixels (N, *extent, C), and where in them the windows lie."""

    pixels: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    reach: tuple[int, ...]  # from the first to the last pixel of a window
    outputs: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        return self.pixels.shape[1:-1]

    @property
    def positions(self) -> int:
        return prod(self.outputs)

    def steps(self) -> list[tuple[int, ...]]:
        """From the first pixel of a window to that of each kernel element, in the kernel's order."""
        return list(product(*(range(0, r + 1, d) for r, d in zip(self.reach, self.dilation, strict=True))))

    def windows(self, groups: int) -> Tensor:
        """(N, *outputs, g, c, *kernel), a view."""
        windows = self.pixels.unflatten(-1, (groups, -1))
        for i, (reach, s, d) in enumerate(zip(self.reach, self.stride, self.dilation, strict=True), start=1):
            windows = windows.unfold(i, reach + 1, s)[..., ::d]
        return windows

    def sums(self) -> Tensor:
        """(N, C, *kernel): what each kernel element sees, summed over the positions one dimension at a time."""
        sums = self.pixels
        layout = zip(self.outputs, self.kernel, self.stride, self.dilation, strict=True)
        for i, (out, k, s, d) in enumerate(layout, start=1):
            sums = sums.unfold(i, (out - 1) * s + 1, d).narrow(i, 0, k)[..., ::s].sum(-1)
        return sums.movedim(-1, 1)


def grid_of(module: Convolution, x: Tensor) -> Grid:
    stride = (1,) * len(module.stride) if isinstance(module, TRANSPOSED) else module.stride
    reach, pixels = _reach(module), pixels_of(module, x)
    outputs = tuple((e - r - 1) // s + 1 for e, r, s in zip(pixels.shape[1:-1], reach, stride, strict=True))
    return Grid(pixels, module.kernel_size, stride, module.dilation, reach, outputs)


def _reach(module: Convolution) -> tuple[int, ...]:
    return tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))


def pixels_of(module: Convolution, x: Tensor) -> Tensor:
    """x, interleaved with zeros if the module is transposed, and padded; the channels last."""
    reach, padding = _reach(module), module.padding
    if isinstance(padding, str):  # "same" or "valid"
        sides = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    elif isinstance(module, TRANSPOSED):
        spread = x.new_zeros(*x.shape[:2], *((e - 1) * s + 1 for e, s in zip(x.shape[2:], module.stride, strict=True)))
        every: tuple[Any, ...] = (..., *(slice(None, None, s) for s in module.stride))
        spread[every] = x
        x = spread
        sides = [(r - p, r - p + o) for r, p, o in zip(reach, padding, module.output_padding, strict=True)]
    else:
        sides = [(p, p) for p in padding]
    if any(map(any, sides)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, [side for pair in reversed(sides) for side in pair], mode)
    return x.movedim(1, -1)
