"""The passes of Algorithm 1 over a batch, and the forward pass of tangents of Appendix C.

An example is a row: s_i = ā_{i-1} W_iᵀ (N, m_i), where ā is a with a column of ones, and a_i = φ_i(s_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kfaclinalg import homogeneous

from .activations import Activation

Matrices = Sequence[Any]  # one (m, n + 1) array a layer, the bias in the last column


class Forward(NamedTuple):
    """What a forward pass leaves for the others."""

    inputs: tuple[Any, ...]  # ā_0, ..., ā_{l-1}
    slopes: tuple[Any, ...]  # φ'_1(s_1), ..., φ'_l(s_l)
    outputs: Any  # z = a_l


def forward(activations: Sequence[Activation], weights: Matrices, x: Any) -> Forward:
    """a_0 = x; s_i = W_i ā_{i-1}, a_i = φ_i(s_i)."""
    a, inputs, slopes = x, [], []
    for phi, W in zip(activations, weights, strict=True):
        inputs.append(homogeneous(a))
        a = phi.value(inputs[-1] @ W.mT)
        slopes.append(phi.slope(a))
    return Forward(tuple(inputs), tuple(slopes), a)


def backward(weights: Matrices, run: Forward, Dz: Any) -> tuple[Any, ...]:
    """g_i = Da_i ⊙ φ'_i(s_i) and Da_{i-1} = W_iᵀ g_i, from Da_l = Dz: the g of each layer, (N, m_i)."""
    g = [Dz * run.slopes[-1]]
    for W, slope in zip(weights[:0:-1], run.slopes[-2::-1], strict=True):  # layers l, ..., 2
        g.append(g[-1] @ W[:, :-1] * slope)  # without the bias: its input is constant
    return tuple(reversed(g))


def tangent(weights: Matrices, run: Forward, direction: Matrices) -> Any:
    """J d (N, m_l): ds_i = D_i ā_{i-1} + W_i dā_{i-1}, da_i = φ'_i(s_i) ⊙ ds_i, from da_0 = 0."""
    da = run.slopes[0] * (run.inputs[0] @ direction[0].mT)
    rest = zip(weights, direction, run.inputs, run.slopes, strict=True)
    next(rest)
    for W, D, a, slope in rest:
        da = slope * (a @ D.mT + da @ W[:, :-1].mT)
    return da
