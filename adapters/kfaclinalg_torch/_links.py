"""The cross moments of neighbouring layers, from the same examples and positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfaclinalg import Link

from ._layer import Layer
from ._processes import over_processes
from ._statistics import Statistic


class Shown(NamedTuple):
    """What a pass showed of a layer: a (N, R, n), g (N, R, m), and which positions count (N, R)."""

    a: Tensor
    g: Tensor
    mask: Tensor
    reduced: bool


def chained(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that can have neighbours, as they stand in the model: dense ones, neither tied nor grouped."""
    found = [layer for layer in layers if layer.dense is not None]
    moments = {layer.name: layer.blocks[0].empty_moments() for layer in found}
    return [layer for layer in found if all(M.ndim == 2 for M in moments[layer.name])]


def cross_moments(statistic: Statistic, layers: Sequence[Layer], scale: float) -> tuple[Link, ...]:
    """The links E[a_i a_{i+1}ᵀ] and E[g_i g_{i+1}ᵀ] of neighbouring layers that `chained` gives (Section 4.3).

    Under weight sharing A = (1/NR) Σ a aᵀ and G = (1/N) Σ g gᵀ over N examples of R positions, and so the links of two
    layers with the same positions: (1/NR) Σ a_i a_{i+1}ᵀ and (1/N) Σ g_i g_{i+1}ᵀ. Positions that differ (a stride, a
    pooling) are reduced first, to ā, the mean of an example, and ĝ = c Σ g, with c = 1 in the reduce setting, whose own
    factors are those of ā and Σ g, and c = 1/√R in the expand setting: then E[ā āᵀ] <= A and E[ĝ ĝᵀ] <= G, so that
    the correlations stay below one and F̂ positive definite.
    """
    sums: list[list[Any]] = [[0.0, 0.0] for _ in layers[1:]]
    rows = [0] * len(sums)
    for (_, draw), uses in statistic.uses.items():
        shown = [_shown(statistic, layer, uses) for layer in layers]
        for i, pair in enumerate(pairwise(shown)):
            one, other = pair
            if one is None or other is None or len(one.a) != len(other.a):
                continue
            one, other = _joined(one, other)
            if draw == 0:
                sums[i][0] = sums[i][0] + _cross(one.a, other.a)
                rows[i] += int(one.mask.sum()) if statistic.masked else one.mask.numel()
            sums[i][1] = sums[i][1] + scale**2 * _cross(one.g, other.g)
    empty = [_zero(one, other, statistic.dtype) for one, other in pairwise(layers)]
    tensors = [Z + M for zeros, pair in zip(empty, sums, strict=True) for Z, M in zip(zeros, pair, strict=True)]
    moments, (N, *counts) = over_processes(tensors, [statistic.examples, *rows])
    pairs = zip(moments[::2], moments[1::2], counts, strict=True)
    return tuple(Link(A / max(r, 1), G / max(N, 1)) for A, G, r in pairs)


def _shown(statistic: Statistic, layer: Layer, uses: Sequence[Any]) -> Shown | None:
    """All uses of a layer in one pass, one after the other."""
    block: Any = layer.dense
    rows, slopes, masks = [], [], []
    for use, g in (pair for pair in uses if pair[0].block is block):
        N, (x, s) = use.examples(), use.pair(g, statistic.dtype)
        a = block.inputs(x, N)
        mask = a.new_ones(a.shape[:2], dtype=torch.bool) if use.mask is None else use.mask.reshape(N, -1)
        rows.append(a if use.mask is None else a * mask[..., None])
        slopes.append(block.outputs(x, s, N))
        masks.append(mask)
    if not rows or len({len(a) for a in rows}) > 1:
        return None
    reduced = statistic.sharing[block.name] == "reduce"
    return Shown(torch.cat(rows, 1), torch.cat(slopes, 1), torch.cat(masks, 1), reduced)


def _joined(one: Shown, other: Shown) -> tuple[Shown, Shown]:
    """Position by position where they have the same and expand them, else reduced."""
    if one.reduced or other.reduced or one.mask.shape != other.mask.shape:
        return _reduced(one), _reduced(other)
    return one, other


def _reduced(shown: Shown) -> Shown:
    a, g, mask, reduced = shown
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    c = 1.0 if reduced else counts**-0.5
    return Shown((a.sum(1) / counts)[:, None], (c * g.sum(1))[:, None], mask.any(1, keepdim=True), reduced)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(0, 1).mT @ y.flatten(0, 1)


def _zero(one: Layer, other: Layer, dtype: torch.dtype) -> Sequence[Tensor]:
    """What no pass showed."""
    (A, G), (B, H) = one.blocks[0].empty_moments(), other.blocks[0].empty_moments()
    return A.new_zeros(len(A), len(B), dtype=dtype), G.new_zeros(len(G), len(H), dtype=dtype)
