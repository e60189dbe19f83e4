"""λ of each layer: a number for all of them, or a part of what the layer's own eigenvalues are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, KroneckerEigen, LayerFactors


@dataclass(frozen=True)
class Relative:
    """λ = f tr(A) tr(G)/(n m), the part f of the mean eigenvalue of A ⊗ G.

    Factored Tikhonov damping (Section 6.3) then adds √f of its own mean eigenvalue to each factor, so that neither the
    scale of the loss nor that of the inputs matters. f is the geometric mean of `fraction` + (n - 1)/R and `fraction` +
    (m - 1)/R: the eigenvalues of a second moment over R rows are off by √(n/R) of their mean (Marchenko & Pastur 1967),
    and what is not known is no curvature. R is what the moving averages are worth, 1/Σ w² of rows with the weights w. A
    diagonal side adds nothing. With `sampling=False` f is the `fraction`.

    >>> Relative(0.01)
    Relative(fraction=0.01, sampling=True)
    """

    fraction: float = 0.1
    sampling: bool = True

    def __post_init__(self) -> None:
        value: Any = self.fraction
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"fraction is {value!r}, expected a number")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"fraction is {value!r}, expected a number in [0, ∞)")
        if not isinstance(self.sampling, bool):
            raise TypeError(f"sampling is {self.sampling!r}, expected True or False")


def of_rows(damping: Relative | float, fitted: LayerFactors | KroneckerEigen, rows: float) -> Relative | float:
    """That of a layer whose averages are worth so many rows."""
    if not isinstance(damping, Relative) or not damping.sampling:
        return damping
    if isinstance(fitted, KroneckerEigen):
        sizes = list(fitted.eigenvalues.shape[-2:])
    else:
        sizes = [1 if isinstance(M, Diagonal) else M.shape[-1] for M in fitted]
    f, g = (damping.fraction + (size - 1) / rows for size in sizes)
    return Relative((f * g) ** 0.5, sampling=False)


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


def raised(damping: Relative | float, times: float) -> Relative | float:
    """So many times as much."""
    return Relative(times * damping.fraction, damping.sampling) if isinstance(damping, Relative) else times * damping


def _mean_eigenvalue(M: Any) -> Tensor:
    diagonal: Any = M.d if isinstance(M, Diagonal) else M.diagonal(dim1=-2, dim2=-1)
    mean: Tensor = diagonal.mean(-1)
    return mean
