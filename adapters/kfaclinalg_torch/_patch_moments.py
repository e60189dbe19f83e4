"""The second moments of a convolution's patches, made of products of the image with itself, shifted."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations_with_replacement
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ._panels import add_moment, add_product, flops_of, mirrored
from ._patches import Convolution, Grid, grid_of, pixels_of

BUFFER = 16 * 2**20  # bytes of patches that `patch_moment` holds at once, or those of one example
# What takes time beside the multiply-adds of a product, counted in these, some 30 a nanosecond: an entry of its rows,
# an entry of M written apart from its neighbours, and a call, of which each pair of kernel elements makes so many.
ENTRY, APART, CALL, CALLS = 60, 150, 1e5, 14


def patch_moment(module: Convolution, x: Tensor, bias: bool) -> Tensor:
    """Σ a aᵀ (g, n, n) over examples and positions, or (g, n + 1, n + 1) with a bias; exactly symmetric.

    The patches, K times the size of x, are at no time all in memory.
    """
    grid = grid_of(module, x)
    g, K = module.groups, prod(grid.kernel)
    n = module.in_channels // g * K
    M = x.new_zeros(g, n + bias, n + bias)
    M[:, n:, n:] = len(x) * grid.positions
    # The borders are lists made on the host, which would hold up an accelerator.
    if x.device.type == "cpu" and K > 1 and set(grid.stride) == {1}:
        live = pixels_of(module, torch.ones(1, 1, *x.shape[2:]))[0, ..., 0] != 0
        unseen = _unseen(grid, live)
        if _shifts_pay(grid, g, unseen):
            _fill_by_shifts(M, grid, n, live.flatten(), unseen)
            return mirrored(M)
    _fill_by_patches(M, grid, n)
    return mirrored(M)


def _fill_by_patches(M: Tensor, grid: Grid, n: int) -> None:
    """M, on and above its diagonal, from the patches of a few examples at a time."""
    g, r = len(M), grid.rank
    products, sums = M[:, :n, :n], M[:, :n, n:]
    order = (*range(1 + r, 3 + 2 * r), *range(1 + r))  # (g, c, *kernel, N, *outputs)
    for pixels in grid.pixels.split(max(1, BUFFER // (grid.positions * g * n * M.element_size()))):
        windows = grid._replace(pixels=pixels).windows(g)
        if prod(grid.kernel) == 1 and pixels.stride(-1) == 1:  # channels last in memory: not copied
            a = windows.reshape(-1, g, n).permute(1, 2, 0)
        else:
            a = windows.permute(order).reshape(g, n, -1)
        add_moment(products, a)
        if sums.numel():
            sums.add_(a.sum(-1, keepdim=True))


def _unseen(grid: Grid, live: Tensor) -> Tensor:
    """(K, pixels): those live (that can be other than zero) which a kernel element sees from no position, stride 1."""
    unseen = torch.stack([live] * prod(grid.kernel))
    for p, step in enumerate(grid.steps()):
        window: tuple[Any, ...] = (p, *(slice(o, o + out) for o, out in zip(step, grid.outputs, strict=True)))
        unseen[window] = False
    return unseen.flatten(1)


def _shifts_pay(grid: Grid, g: int, unseen: Tensor) -> bool:
    """Whether the products of `_fill_by_shifts`, w = c wide, cost less than that of the patches, w = K c."""
    (N, *_, C), K = grid.pixels.shape, prod(grid.kernel)
    n = C // g * K
    shifts = (prod(2 * k - 1 for k in grid.kernel) + 1) // 2
    borders = int(unseen.sum(1) @ torch.arange(K, 0, -1))  # at most
    narrow = (shifts * prod(grid.extent) + borders) * C * (C // g + ENTRY)
    wide = grid.positions * g * (flops_of(n) / 2 + n * ENTRY)
    return N * narrow + APART * n**2 * g + CALL * CALLS * K * (K + 1) / 2 < N * wide


def _fill_by_shifts(M: Tensor, grid: Grid, n: int, live: Tensor, unseen: Tensor) -> None:
    """All of M at stride 1 from products of the image with itself, shifted: 13 of them for 3x3 instead of 81.

    Block (p, q) is Σ X[t]ᵀ X[t + f] over the pixels t that element p of the kernel sees, f = offset q - offset p. Over
    all pixels it depends on f alone: T_f = X[:-f]ᵀ X[f:]. What p does not see is a border, and is taken off again.
    """
    g, K, N, size = len(M), prod(grid.kernel), len(grid.pixels), prod(grid.extent)
    c = n // K
    blocks = M[:, :n, :n].unflatten(2, (c, K)).unflatten(1, (c, K))
    pitch = [prod(grid.extent[i:]) for i in range(1, grid.rank + 1)]
    offsets = [sum(map(mul, step, pitch)) for step in grid.steps()]
    pairs = defaultdict(list)
    for p, q in combinations_with_replacement(range(K), 2):
        pairs[offsets[q] - offsets[p]].append((p, q))

    image = M.new_empty(N * size + offsets[-1], g, c)
    image[N * size :] = 0  # where the last X[t + f] lie
    pixels = image[: N * size].view(grid.pixels.shape).copy_(grid.pixels)
    M[:, :n, n:] = grid._replace(pixels=pixels.sum(0, keepdim=True)).sums().reshape(g, n, 1)
    for f, same in pairs.items():
        X, Y = image[: N * size], image[f : f + N * size]
        met = live.roll(-f)  # past the end of an example lies the next
        T = M.new_zeros(g, c, c)
        if bool((live & met).any()):
            add_product(T, X.permute(1, 2, 0), Y.permute(1, 2, 0))
        for p, q in same:
            border = (unseen[p] & met).nonzero()[:, 0]
            block = T.clone()
            if len(border):
                left, right = (Z.unflatten(0, (N, size)).index_select(1, border).flatten(0, 1) for Z in (X, Y))
                add_product(block, left.permute(1, 2, 0), right.permute(1, 2, 0), -1)
            blocks[:, :, p, :, q] = block
            blocks[:, :, q, :, p] = block.mT
