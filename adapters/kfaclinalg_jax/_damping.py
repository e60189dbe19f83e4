"""λ of each layer: a number for all of them, or a part of what the layer's own eigenvalues are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax.numpy as jnp

from kfaclinalg import Diagonal, KroneckerEigen, LayerFactors


@dataclass(frozen=True)
class Relative:
    """λ = f tr(A) tr(G)/(n m), the part f of the mean eigenvalue of A ⊗ G.

    Factored Tikhonov damping (Section 6.3) then adds √f of its own mean eigenvalue to each factor, so that neither the
    scale of the loss nor that of the inputs matters. f is the geometric mean of `fraction` + (n - 1)/R and `fraction` +
    (m - 1)/R: the eigenvalues of a second moment over R rows are off by √(n/R) of their mean (Marchenko & Pastur 1967),
    and what is not known is no curvature. R is what the moving averages are worth, 1/Σ w² of rows with the weights w. A
    diagonal side adds nothing. With `sampling=False` f is the `fraction`. That may be a 0-d array, as in a schedule.

    >>> Relative(0.01)
    Relative(fraction=0.01, sampling=True)
    """

    fraction: Any = 0.1
    sampling: bool = True

    def __post_init__(self) -> None:
        value = self.fraction
        if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "dtype")):
            raise TypeError(f"fraction is {value!r}, expected a number")
        if isinstance(value, Real) and not 0 <= float(value) < math.inf:
            raise ValueError(f"fraction is {value!r}, expected a number in [0, ∞)")
        if not isinstance(self.sampling, bool):
            raise TypeError(f"sampling is {self.sampling!r}, expected True or False")


def of_rows(damping: Any, fitted: LayerFactors | KroneckerEigen, spread: Any) -> Any:
    """That of a layer whose averages are worth 1/`spread` rows."""
    if not isinstance(damping, Relative) or not damping.sampling:
        return damping
    if isinstance(fitted, KroneckerEigen):
        sizes = list(fitted.eigenvalues.shape[-2:])
    else:
        sizes = [1 if isinstance(M, Diagonal) else M.shape[-1] for M in fitted]
    f, g = (damping.fraction + (size - 1) * spread for size in sizes)
    return Relative(jnp.sqrt(f * g), sampling=False)


def gamma_of(damping: Any, fitted: LayerFactors | KroneckerEigen, times: Any = 1.0) -> Any:
    """γ = √(times λ) of one layer; each member of a batch has its own. √fraction where all eigenvalues are zero."""
    if not isinstance(damping, Relative):
        return jnp.sqrt(times * damping).astype(_dtype(fitted))
    if isinstance(fitted, KroneckerEigen):
        eigenvalues: Any = fitted.eigenvalues
        root = jnp.sqrt(eigenvalues.mean((-2, -1)))
    else:
        a, g = (jnp.sqrt(_mean_eigenvalue(M)) for M in fitted)
        root = a * g  # the product of two extreme sizes may leave the range, that of their roots less soon
    return (jnp.sqrt(times * damping.fraction) * jnp.where(root == 0, 1.0, root)).astype(root.dtype)


def _mean_eigenvalue(M: Any) -> Any:
    diagonal: Any = M.d if isinstance(M, Diagonal) else jnp.diagonal(M, axis1=-2, axis2=-1)
    return diagonal.mean(-1)


def _dtype(fitted: Any) -> Any:
    M = fitted.eigenvalues if isinstance(fitted, KroneckerEigen) else fitted.A
    return M.d.dtype if isinstance(M, Diagonal) else M.dtype
