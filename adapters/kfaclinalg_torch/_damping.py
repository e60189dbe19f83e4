"""λ of each layer: a number for all of them, or a part of what the layer's own eigenvalues are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, KroneckerEigen, LayerFactors


@dataclass(frozen=True)
class Relative:
    """λ = `fraction` tr(A) tr(G)/(n m), that part of the mean eigenvalue of A ⊗ G.

    Factored Tikhonov damping (Section 6.3) then adds √fraction of its own mean eigenvalue to each factor, so that
    neither the scale of the loss nor that of the inputs matters.

    >>> Relative(0.01).fraction
    0.01
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        value: Any = self.fraction
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"fraction is {value!r}, expected a number")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"fraction is {value!r}, expected a number in [0, ∞)")


def gamma_of(damping: Relative | float, fitted: LayerFactors | KroneckerEigen) -> Any:
    """γ = √λ of one layer; each member of a batch has its own. √fraction where all eigenvalues are zero."""
    if not isinstance(damping, Relative):
        return damping**0.5
    if isinstance(fitted, KroneckerEigen):
        eigenvalues: Any = fitted.eigenvalues
        root = eigenvalues.mean((-2, -1)).sqrt()
    else:
        a, g = (_mean_eigenvalue(M).sqrt() for M in fitted)
        root = a * g  # the product of two extreme sizes may leave the range, that of their roots less soon
    return damping.fraction**0.5 * torch.where(root == 0, 1.0, root)


def gammas_of(damping: Relative | float, layers: Sequence[LayerFactors]) -> Any:
    """γ of a chain: one for all, or a tuple of one for each."""
    if not isinstance(damping, Relative):
        return damping**0.5
    return tuple(gamma_of(damping, layer) for layer in layers)


def raised(damping: Relative | float, times: float) -> Relative | float:
    """So many times as much."""
    return Relative(times * damping.fraction) if isinstance(damping, Relative) else times * damping


def _mean_eigenvalue(M: Any) -> Tensor:
    diagonal: Any = M.d if isinstance(M, Diagonal) else M.diagonal(dim1=-2, dim2=-1)
    mean: Tensor = diagonal.mean(-1)
    return mean
