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
    """λ = `fraction` tr(A) tr(G)/(n m), that part of the mean eigenvalue of A ⊗ G.

    Factored Tikhonov damping (Section 6.3) then adds √fraction of its own mean eigenvalue to each factor, so that
    neither the scale of the loss nor that of the inputs matters. The fraction may be a 0-d array, as in a schedule.

    >>> Relative(0.01).fraction
    0.01
    """

    fraction: Any = 0.1

    def __post_init__(self) -> None:
        value = self.fraction
        if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "dtype")):
            raise TypeError(f"fraction is {value!r}, expected a number")
        if isinstance(value, Real) and not 0 <= float(value) < math.inf:
            raise ValueError(f"fraction is {value!r}, expected a number in [0, ∞)")


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
