"""The eigenvalues of a network's curvature, a layer at a time, and the operator that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import BlockDiagonal, DirectSum, Factors, Kronecker, KroneckerEigen


def spectra_of(factors: Factors) -> tuple[KroneckerEigen, ...]:
    """A ⊗ G of each layer by its eigenvalues; of moments what rounding leaves below zero is zero."""
    return tuple(Kronecker(A, G).eigh().map(lambda s: s.clamp(min=0.0)) for A, G in factors.layers)  # type: ignore[attr-defined]


def at_device(F: KroneckerEigen, device: torch.device) -> KroneckerEigen:
    """The same, on this device."""
    return F if F.eigenvalues.device == device else F.to_device(device)  # type: ignore[attr-defined]


def network_of(blocks: Sequence[Any]) -> BlockDiagonal:
    """One operator a layer; the groups of a convolution or the channels of a normalisation are one together."""
    found: list[Any] = [P if P.trace().ndim == 0 else DirectSum(P) for P in blocks]
    return BlockDiagonal(tuple(found))


def one_a_layer(name: str, value: Any, count: int) -> list[Any]:
    """A number > 0, or a tensor of one, for each of so many layers."""
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not sequence and not (isinstance(value, Tensor) and value.ndim):
        return [strength(name, value, positive=True)] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} items, expected a number or one for each of {count} layers")
    return [strength(name, x, positive=True) for x in value]


def strength(name: str, value: Any, *, positive: bool = False) -> Any:
    """A finite number >= 0, or > 0, as a float; a tensor of one is not looked into."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a number or a tensor of shape ()")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, expected a number or a tensor of one")
    number = float(value)
    if not 0 <= number < math.inf or (positive and number == 0):
        raise ValueError(f"{name} is {value!r}, expected a number {'>' if positive else '>='} 0")
    return number


def indicator(s: Any, energy: float, top: bool) -> Tensor:
    """1 for the largest eigenvalues that make this share of the sum, 0 for the others, or the other way round."""
    order = s.flatten().argsort(descending=True)
    before = s.flatten()[order].cumsum(0) - s.flatten()[order]
    chosen = torch.zeros_like(s.flatten())
    chosen[order] = (before < energy * s.sum()).to(s)
    return (chosen if top else 1 - chosen).reshape(s.shape)
