"""The eigenvalues of a network's curvature, a layer at a time, and the operator that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockDiagonal, DirectSum, Factors, Kronecker, KroneckerEigen


def spectra_of(factors: Factors) -> tuple[KroneckerEigen, ...]:
    """A ⊗ G of each layer by its eigenvalues; of moments what rounding leaves below zero is zero."""
    return tuple(Kronecker(A, G).eigh().map(lambda s: s.clamp(min=0.0)) for A, G in factors.layers)  # type: ignore[attr-defined]


def network_of(blocks: Sequence[Any]) -> BlockDiagonal:
    """One operator a layer; the groups of a convolution or the channels of a normalisation are one together."""
    found: list[Any] = [P if P.trace().ndim == 0 else DirectSum(P) for P in blocks]
    return BlockDiagonal(tuple(found))


def one_a_layer(name: str, value: Any, count: int) -> list[Any]:
    values = (
        list(value) if isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim) else [value] * count
    )
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} items, expected a number or one for each of {count} layers")
    for x in values:
        if not isinstance(x, Tensor) and not (isinstance(x, int | float) and x > 0):
            raise ValueError(f"{name} is {x!r}, expected a number > 0")
    return values


def indicator(s: Any, energy: float, top: bool) -> Tensor:
    """1 for the largest eigenvalues that make this share of the sum, 0 for the others, or the other way round."""
    order = s.flatten().argsort(descending=True)
    before = s.flatten()[order].cumsum(0) - s.flatten()[order]
    chosen = torch.zeros_like(s.flatten())
    chosen[order] = (before < energy * s.sum()).to(s)
    return (chosen if top else 1 - chosen).reshape(s.shape)
