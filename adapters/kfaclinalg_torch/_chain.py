"""The block-tridiagonal inverse of a chain of layers, and those of the layers beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockTridiagonalInverse, Factored, Factors, Link, Tridiagonal

from ._averages import Averaged
from ._checkpoint import check
from ._damping import Relative
from ._inverses import LADDER, Inverses, are_finite, cast
from ._layer import Layer
from ._links import chained, cross_moments
from ._settings import Period
from ._statistics import Statistic

CHAIN = "the chain"


class ChainInverse(Inverses):
    """Ξᵀ Λ Ξ (Section 4.3) of the layers that follow each other as they stand in the model, all of it in one step.

    What can have no neighbours, normalisations, embeddings, tied and grouped weights, is block-diagonal beside it.
    """

    keeps_uses = True

    def __init__(self, structure: Tridiagonal, layers: Sequence[Layer]) -> None:
        super().__init__(Factored(structure.norm), layers)
        self.whole, self.chain = structure, chained(layers)

    def links(self, statistic: Statistic, scale: float) -> tuple[Link, ...]:
        return cross_moments(statistic, self.chain, scale)

    def refresh(self, step: int, period: int, damping: Relative | float, factors: Averaged) -> None:
        names = [layer.name for layer in self.chain]
        linked = [factors.layers[name] for name in names if name in factors.layers]
        complete = len(linked) == len(names) and len(factors.links) == len(names) - 1 and names
        beside = {name: M for name, M in factors.layers.items() if not (complete and name in names)}
        super().refresh(step, period, damping, Averaged(beside, (), factors.rows))
        if complete and (step % period == 0 or CHAIN not in self.inverses):
            made = self._whole(Factors(tuple(linked), factors.links), damping)
            self._keep(CHAIN, None if made is None else (None, made), *linked)

    def apply(self, Vs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        named, chain = dict(Vs), self.inverses.get(CHAIN)
        if chain is not None:
            # what has no gradient in this step takes none from its neighbours, and gives them none
            linked = {layer.name: named.pop(layer.name, None) for layer in self.chain}
            shapes = (K.shape for K in chain.Lambda)
            like = chain.Lambda[-1].diagonal()
            Us = chain.apply(
                tuple(like.new_zeros(s) if V is None else V for V, s in zip(linked.values(), shapes, strict=True))
            )
            yield from ((name, U) for (name, V), U in zip(linked.items(), Us, strict=True) if V is not None)
        yield from super().apply(named.items())

    def _check_one(self, name: str, inverse: Any, weights: Mapping[str, Tensor]) -> None:
        if name != CHAIN:
            super()._check_one(name, inverse, weights)
            return
        check(isinstance(inverse, BlockTridiagonalInverse), "the inverse of the chain is none")
        came, expected = [K.shape for K in inverse.Lambda], [tuple(weights[layer.name].shape) for layer in self.chain]
        check(came == expected, f"its inverse is of layers with shapes {came}, expected {expected}")

    def _whole(self, factors: Factors, damping: Relative | float) -> Any | None:
        for dtype, times in ((None, 1), *((torch.float64, times) for times in LADDER)):
            wide = factors if dtype is None else _cast(factors, dtype)
            pairs = zip(self.chain, wide.layers, strict=True)
            gammas: Any = tuple(self.gamma(layer.name, M, damping, times) for layer, M in pairs)
            inverse: Any = self.whole.inverse(wide, gammas)
            ones = tuple(layer.G.new_ones(len(layer.G), len(layer.A)) for layer in factors.layers)
            inverse = inverse if dtype is None else inverse.astype(factors.layers[0].A.dtype)
            if all(are_finite(inverse.apply(ones))):
                return inverse
        return None


def inverses_of(structure: Any, period: Period, layers: Sequence[Layer]) -> Inverses:
    """What makes the inverses of these layers by this structure."""
    if isinstance(structure, Tridiagonal):
        return ChainInverse(structure, layers)
    if structure == Factored(getattr(structure, "norm", "")) and period == 1:
        structure = Factored(structure.norm, "cholesky")  # what is applied once is not worth an inverse
    return Inverses(structure, layers)


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    links = tuple(Link(*(M.to(dtype) for M in link)) for link in factors.links)
    return Factors(tuple(cast(layer, dtype) for layer in factors.layers), links)
