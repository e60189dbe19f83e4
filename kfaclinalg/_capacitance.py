"""M = U diag(s) Uᵀ + diag(d) for s > 0 on a CPU, by the Cholesky factor R of its capacitance matrix (Woodbury 1950).

With V = D^(-½) U and R Rᵀ = S⁻¹ + Vᵀ V, M⁻¹ = D⁻¹ - D^(-½) V (R Rᵀ)⁻¹ Vᵀ D^(-½) and det M = det D det S det(R Rᵀ). What
fails is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.linalg import blas, lapack

from ._array import NAN
from ._blas import routine
from ._lapack import cholesky

REFINEMENTS = 3


def inverse(U: Any, s: Any, d: Any) -> tuple[Any, Any, Any]:
    """Those of M⁻¹ = diag(1/d) - T Tᵀ. T is written in one place."""
    V, R, root, doubt = _whitened(U, s, d)
    if R is not None:
        T = routine(blas, V, "trsm")(1.0, R, V.T, lower=1, overwrite_b=1).T
        if doubt < 0.5 or (1 - np.einsum("ij,ij->i", T, T) > (8 + len(s) ** 0.5) * np.finfo(T.dtype).eps).all():
            T /= root
            return T, -np.ones_like(s), 1 / d
    return np.full_like(U, NAN), -np.ones_like(s), np.full_like(d, NAN)


def solve(U: Any, s: Any, d: Any, X: Any) -> Any:
    """M⁻¹ X = Z, None where the inverse could be NaN.

    It is C in Z = D^(-½) (D^(-½) X - V C), C = S Vᵀ (D^½ Z), that is refined: its residual takes half of the products
    of that of Z.
    """
    V, R, root, doubt = _whitened(U, s, d)
    if R is None or not doubt < 0.5:
        return None
    potrs = routine(lapack, R, "potrs")
    Z, C = X / d[:, None], np.zeros((len(s), X.shape[1]), dtype=X.dtype)
    for i in range(1 + REFINEMENTS):
        change = potrs(R, V.T @ (root * Z) - C / s[:, None], lower=1)[0]
        step = V @ change / root
        C, Z = C + change, Z - step
        if i and (abs(step).max(axis=0) <= 0.1 * np.finfo(Z.dtype).eps ** 0.5 * abs(Z).max(axis=0)).all():
            break
    return Z


def logdet(U: Any, s: Any, d: Any) -> Any:
    """log det M."""
    _, R, root, _ = _whitened(U, s, d)
    half = NAN if R is None else np.sum(np.log(root)) + np.sum(np.log(R.diagonal() * np.sqrt(s)))
    return np.asarray(2 * half, dtype=U.dtype)


def _whitened(U: Any, s: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """V = D^(-½) U, lower R with R Rᵀ = S⁻¹ + Vᵀ V or None, D^½, and how near (D^½ M⁻¹ D^½)_ii may be to noise.

    That is at least 1/‖I + S^½ Vᵀ V S^½‖: as long as noise is below half of it, nobody needs to look at the diagonal.
    """
    if not (d.min() > 0 and d.max() < math.inf):
        return None, None, None, None
    root, scale = np.sqrt(d)[:, None], np.sqrt(s)
    V = U / root
    G = np.eye(len(s), dtype=s.dtype) + scale[:, None] * (V.T @ V) * scale
    L = cholesky(G)
    R = None if L is None else L / scale[:, None]
    return V, R, root, np.linalg.norm(G) * (8 + len(s) ** 0.5) * np.finfo(V.dtype).eps
