"""The block-tridiagonal inverse of a chain of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockTridiagonalInverse, Factors, Link, block_tridiagonal_inverse

from ._checkpoint import check
from ._discovery import Layer
from ._inverses import LADDER, Factored, Inverses, are_finite, cast, factored
from ._modules import Block, Linear
from ._statistics import Statistic, over_processes


class ChainInverse(Inverses):
    """Ξᵀ Λ Ξ (Section 4.3) of layers that follow each other as they stand in the model, all of it in one step."""

    keeps_uses = True

    def __init__(self, norm: str, layers: Sequence[Layer]) -> None:
        super().__init__(partial(factored, norm=norm))
        self.norm, self.blocks = norm, [layer.dense for layer in layers if isinstance(layer.dense, Linear)]
        if odd := [layer.name for layer in layers if not isinstance(layer.dense, Linear)]:
            raise ValueError(
                f"structure 'block-tridiagonal' takes a chain of Linear layers, got {', '.join(odd)} as well"
            )

    def links(self, statistic: Statistic, scale: float) -> tuple[Link, ...]:
        return cross_moments(statistic, self.blocks, scale)

    def refresh(self, step: int, period: int, damping: float, factors: Factored) -> None:
        if factors.layers and (step % period == 0 or "chain" not in self.inverses):
            layers = tuple(factors.layers.values())
            self._keep("chain", self._whole(Factors(layers, factors.links), damping), *layers)

    def apply(self, Vs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        named, chain = dict(Vs), self.inverses.get("chain")
        Us = named.values() if chain is None else chain.apply(tuple(named.values()))
        yield from zip(named, Us, strict=True)

    def _check_one(self, name: str, inverse: Any, weights: Mapping[str, Tensor]) -> None:
        check(name == "chain" and isinstance(inverse, BlockTridiagonalInverse), f"{name!r} is no inverse of a chain")
        came, expected = [K.shape for K in inverse.Lambda], [tuple(W.shape) for W in weights.values()]
        check(came == expected, f"its inverse is of layers with shapes {came}, expected {expected}")

    def _whole(self, factors: Factors, damping: float) -> Any | None:
        for dtype, times in ((None, 1), *((torch.float64, times) for times in LADDER)):
            wide = factors if dtype is None else _cast(factors, dtype)
            inverse: Any = block_tridiagonal_inverse(wide, (times * damping) ** 0.5, norm=self.norm)
            ones = tuple(layer.G.new_ones(len(layer.G), len(layer.A)) for layer in factors.layers)
            inverse = inverse if dtype is None else inverse.astype(factors.layers[0].A.dtype)
            if all(are_finite(inverse.apply(ones))):
                return inverse
        return None


def cross_moments(statistic: Statistic, blocks: Sequence[Linear], scale: float) -> tuple[Link, ...]:
    """E[a_i a_{i+1}ᵀ] and E[g_i g_{i+1}ᵀ] of neighbouring layers.

    Raises:
        ValueError: a pass does not use each layer once, or not on inputs (N, features).
    """
    sums: list[list[Any]] = [[0.0, 0.0] for _ in blocks[1:]]
    for (_, draw), uses in statistic.uses.items():
        rows: dict[Block, Any] = {use.block: use.pair(g, statistic.dtype) for use, g in uses}
        if len(uses) != len(blocks) or any(use.inputs.shape[:-1] != (use.of.examples,) for use, _ in uses):
            raise ValueError("structure 'block-tridiagonal' needs each layer once a pass, on inputs (N, features)")
        ordered = [(block.inputs(x, len(x))[:, 0], g) for block in blocks for x, g in [rows[block]]]
        for total, ((a, g), (a_next, g_next)) in zip(sums, pairwise(ordered), strict=True):
            total[0] = total[0] + a.mT @ a_next if draw == 0 else total[0]
            total[1] = total[1] + scale**2 * (g.mT @ g_next)
    moments, (N,) = over_processes([M for pair in sums for M in pair], [statistic.examples])
    return tuple(Link(A / N, G / N) for A, G in zip(moments[::2], moments[1::2], strict=True))


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    links = tuple(Link(*(M.to(dtype) for M in link)) for link in factors.links)
    return Factors(tuple(cast(layer, dtype) for layer in factors.layers), links)
