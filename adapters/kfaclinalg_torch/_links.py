"""The cross moments of neighbouring layers, from the same examples and positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Link

from ._layer import Layer
from ._rows import Rows, rows_of
from ._statistics import Statistic


def chained(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that can have neighbours, as they stand in the model: dense ones, neither tied nor grouped."""
    found = [layer for layer in layers if layer.dense is not None]
    moments = {layer.name: layer.blocks[0].empty_moments() for layer in found}
    return [layer for layer in found if all(M.ndim == 2 for M in moments[layer.name])]


def cross_moments(statistic: Statistic, layers: Sequence[Layer], scale: float) -> tuple[Link, ...]:
    """The links of neighbouring layers that `chained` gives: the means of `cross_sums` over all processes."""
    return means(*statistic.team.sums(*cross_sums(statistic, layers, scale), "the links"))


def means(sums: Sequence[Tensor], counts: Sequence[int]) -> tuple[Link, ...]:
    """The links, of the sums and the counts that `cross_sums` gives."""
    N, *rows = counts
    pairs = zip(sums[::2], sums[1::2], rows, strict=True)
    return tuple(Link(A / max(r, 1), G / max(N, 1)) for A, G, r in pairs)


def cross_sums(statistic: Statistic, layers: Sequence[Layer], scale: float) -> tuple[list[Tensor], list[int]]:
    """The sums of which the links E[a_i a_{i+1}ᵀ] and E[g_i g_{i+1}ᵀ] are the means (Section 4.3), Σ a aᵀ and
    Σ g gᵀ of each in turn, and how many examples and, for each, positions they are of.

    Under weight sharing A = (1/NR) Σ a aᵀ and G = (1/N) Σ g gᵀ over N examples of R positions, and so the links of two
    layers with the same positions: (1/NR) Σ a_i a_{i+1}ᵀ and (1/N) Σ g_i g_{i+1}ᵀ. Positions that differ (a stride, a
    pooling) are reduced first, to ā, the mean of an example, and ĝ = c Σ g, with c = 1 in the reduce setting, whose own
    factors are those of ā and Σ g, and c = 1/√R in the expand setting: then E[ā āᵀ] <= A and E[ĝ ĝᵀ] <= G, so that
    the correlations stay below one and F̂ positive definite.
    """
    sums: list[list[Any]] = [[0.0, 0.0] for _ in layers[1:]]
    counts = [0] * len(sums)
    reduced = [statistic.sharing[layer.blocks[0].name] == "reduce" for layer in layers]
    for (_, draw), uses in statistic.uses.items():
        shown = [rows_of(statistic, layer.blocks[0], uses) for layer in layers]  # type: ignore[arg-type]
        for i, (one, other) in enumerate(pairwise(shown)):
            if one is None or other is None or len(one.a) != len(other.a):
                continue
            same = one.mask.shape == other.mask.shape and not (reduced[i] or reduced[i + 1])
            x, y = (one, other) if same else (_joint(one, reduced[i]), _joint(other, reduced[i + 1]))
            if draw == 0:
                sums[i][0] = sums[i][0] + _cross(x.a, y.a)
                counts[i] += x.counted
            sums[i][1] = sums[i][1] + scale**2 * _cross(x.g, y.g)
    empty = [_zero(one, other, statistic.dtype) for one, other in pairwise(layers)]
    tensors = [Z + M for zeros, pair in zip(empty, sums, strict=True) for Z, M in zip(zeros, pair, strict=True)]
    return tensors, [statistic.examples, *counts]


def _joint(rows: Rows, reduced: bool) -> Rows:
    return rows.reduced(1.0 if reduced else rows.mask.sum(1).clamp(min=1)[:, None, None] ** -0.5)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return x.flatten(0, 1).mT @ y.flatten(0, 1)


def _zero(one: Layer, other: Layer, dtype: torch.dtype) -> Sequence[Tensor]:
    """What no pass showed."""
    (A, G), (B, H) = one.blocks[0].empty_moments(), other.blocks[0].empty_moments()
    return A.new_zeros(len(A), len(B), dtype=dtype), G.new_zeros(len(G), len(H), dtype=dtype)
