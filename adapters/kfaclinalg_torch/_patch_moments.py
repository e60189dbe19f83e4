"""The second moments of a convolution's patches, made of products of the image with itself, shifted."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations_with_replacement
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ._patches import Convolution, Grid, grid_of, pixels_of

BUFFER = 16 * 2**20  # bytes of patches that `moment` holds at once, or those of one example
# MKL's float32 product of fewer than 12 columns sums its rows one by one and loses 2e-5 over 150 000: pieces lose 1e-7.
NARROW, PIECE = 16, 4096
# What a product of rows costs beyond its w² a row, and what a pair of kernel elements does, both in multiply-adds:
# measured on one core (Zen 5 with MKL's AVX2 kernels).
ROW, PAIR = 60, 2.5e6


def patch_moment(module: Convolution, x: Tensor, bias: bool) -> Tensor:
    """Σ a aᵀ (g, n, n) over examples and positions, or (g, n + 1, n + 1) with a bias; exactly symmetric.

    The patches, K times the size of x, are at no time all in memory.
    """
    grid = grid_of(module, x)
    g, c, K = module.groups, module.in_channels // module.groups, prod(grid.kernel)
    n = c * K
    M = x.new_empty(g, n + bias, n + bias)
    blocks = M[:, :n, :n].unflatten(2, (c, K)).unflatten(1, (c, K))
    if bias:
        total = grid._replace(pixels=grid.pixels.sum(0, keepdim=True)).sums()
        M[:, -1, :-1] = M[:, :-1, -1] = total.reshape(g, n)
        M[:, -1, -1] = len(x) * grid.positions
    # The borders are lists made on the host, which would hold up an accelerator.
    if x.device.type == "cpu" and K > 1 and set(grid.stride) == {1}:
        live = pixels_of(module, torch.ones(1, 1, *x.shape[2:]))[0, ..., 0] != 0
        unseen = _unseen(grid, live)
        if _shifts_pay(grid, g, unseen):
            _fill_by_shifts(blocks, grid, live.flatten(), unseen)
            return M
    _fill_by_patches(blocks, grid)
    return M


def _fill_by_patches(blocks: Tensor, grid: Grid) -> None:
    """The blocks (g, c, K, c, K) of Σ a aᵀ, from the patches of a few examples at a time."""
    g, c, K = blocks.shape[:3]
    total = blocks.new_zeros(g, K * c, K * c)
    size = max(1, BUFFER // (grid.positions * g * K * c * blocks.element_size()))
    kernel = range(3 + grid.rank, 3 + 2 * grid.rank)
    order = (1 + grid.rank, *kernel, 2 + grid.rank, *range(1 + grid.rank))  # (g, *kernel, c, N, *outputs)
    for pixels in grid.pixels.split(size):
        windows = grid._replace(pixels=pixels).windows(g)
        if pixels.stride(-1) == 1:  # channels last in memory too: a 1x1 kernel is not copied
            a = windows.movedim(2 + grid.rank, -1).reshape(-1, g, K * c).permute(1, 2, 0)
        else:
            a = windows.permute(order).reshape(g, K * c, -1)
        _add_product(total, a, a)
    parts = total.view(g, K, c, K, c)
    for p, q in combinations_with_replacement(range(K), 2):
        _place(blocks, p, q, parts[:, p, :, q])


def _unseen(grid: Grid, live: Tensor) -> Tensor:
    """(K, pixels): those live (that can be other than zero) which a kernel element sees from no position, stride 1."""
    unseen = torch.stack([live] * prod(grid.kernel))
    for p, step in enumerate(grid.steps()):
        window: tuple[Any, ...] = (p, *(slice(o, o + out) for o, out in zip(step, grid.outputs, strict=True)))
        unseen[window] = False
    return unseen.flatten(1)


def _shifts_pay(grid: Grid, g: int, unseen: Tensor) -> bool:
    """Whether the products of `_fill_by_shifts`, w = c wide, cost less than that of the patches, w = K c."""
    N, C, K = len(grid.pixels), grid.pixels.shape[-1], prod(grid.kernel)
    shifts = (prod(2 * k - 1 for k in grid.kernel) + 1) // 2
    borders = int(unseen.sum(1) @ torch.arange(K, 0, -1))  # at most
    narrow = (shifts * prod(grid.extent) + borders) * C * (C // g + ROW)
    wide = grid.positions * K * C * (K * C // g + ROW)
    return N * narrow + PAIR * K * (K + 1) / 2 < N * wide


def _fill_by_shifts(blocks: Tensor, grid: Grid, live: Tensor, unseen: Tensor) -> None:
    """The same at stride 1 from products of the image with itself, shifted: 13 of them for 3x3 instead of 81.

    Block (p, q) is Σ X[t]ᵀ X[t + f] over the pixels t that element p of the kernel sees, f = offset q - offset p. Over
    all pixels it depends on f alone: T_f = X[:-f]ᵀ X[f:]. What p does not see is a border, and is taken off again.
    """
    g, c, K = blocks.shape[:3]
    N, size = len(grid.pixels), prod(grid.extent)
    pitch = [prod(grid.extent[i:]) for i in range(1, grid.rank + 1)]
    offsets = [sum(map(mul, step, pitch)) for step in grid.steps()]
    pairs = defaultdict(list)
    for p, q in combinations_with_replacement(range(K), 2):
        pairs[offsets[q] - offsets[p]].append((p, q))

    image = blocks.new_empty(N * size + offsets[-1], g, c)
    image[N * size :] = 0  # where the last X[t + f] lie
    image[: N * size].view(grid.pixels.shape).copy_(grid.pixels)
    for f, same in pairs.items():
        X, Y = image[: N * size], image[f : f + N * size]
        met = live.roll(-f)  # past the end of an example lies the next
        T = blocks.new_zeros(g, c, c)
        if bool((live & met).any()):
            _add_product(T, X.permute(1, 2, 0), Y.permute(1, 2, 0))
        for p, q in same:
            border = (unseen[p] & met).nonzero()[:, 0]
            block = T.clone()
            if len(border):
                left, right = (Z.unflatten(0, (N, size)).index_select(1, border).flatten(0, 1) for Z in (X, Y))
                _add_product(block, left.permute(1, 2, 0), right.permute(1, 2, 0), -1)
            _place(blocks, p, q, block)


def _add_product(total: Tensor, X: Tensor, Y: Tensor, scale: int = 1) -> None:
    """total += scale X Yᵀ, a group at a time: (g, w, rows) twice and (g, w, w)."""
    if total.shape[-1] >= NARROW:
        total.baddbmm_(X, Y.mT, alpha=scale)
        return
    for x, y in zip(X.split(PIECE, dim=2), Y.split(PIECE, dim=2), strict=True):
        total.add_(x @ y.mT, alpha=scale)


def _place(blocks: Tensor, p: int, q: int, block: Tensor) -> None:
    if p == q:
        block = (block + block.mT) / 2
    blocks[:, :, p, :, q] = block
    blocks[:, :, q, :, p] = block.mT
