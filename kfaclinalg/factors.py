"""Second moments of one batch (Section 5).

Each layer i has A = E[a aᵀ] of its inputs and G = E[g gᵀ] of the loss's gradients with respect to its outputs, one
example's loss at a time. `Factors` holds them for a network, with the links between neighbouring layers that the
block-tridiagonal inverse needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import _backends, _checks, _moments
from ._backends import ArrayT


class LayerFactors(NamedTuple):
    """The factors of one layer: A (..., n, n) on the input side, G (..., m, m) on the output side.

    Damping and the block-diagonal inverse also take a `Diagonal` or a `LowRankPlusDiagonal` for each.

    >>> import numpy as np
    >>> LayerFactors(A=np.eye(3), G=np.eye(2)).A.shape
    (3, 3)
    """

    A: Any
    G: Any


class Link(NamedTuple):
    """The cross moments of layers i and i+1: A = E[a_i a_{i+1}ᵀ], G = E[g_i g_{i+1}ᵀ] (Section 4.3).

    >>> import numpy as np
    >>> Link(A=np.ones((3, 4)), G=np.ones((2, 5))).G.shape
    (2, 5)
    """

    A: Any
    G: Any


class Factors(NamedTuple):
    """The factors of a network, in the order of its layers; `links` is empty or has one entry fewer than `layers`.

    >>> import numpy as np
    >>> factors = batch_factors([np.ones((5, 3)), np.ones((5, 2))], [np.ones((5, 2)), np.ones((5, 1))], links=True)
    >>> len(factors.layers), len(factors.links)
    (2, 1)
    """

    layers: tuple[LayerFactors, ...]
    links: tuple[Link, ...] = ()


def homogeneous(a: ArrayT, /) -> ArrayT:
    """(..., N, d) -> (..., N, d + 1): a column of ones, last, so that the last column of W is the bias. No flops.

    Raises:
        TypeError, ValueError: `a` is not a float32 or float64 array of two dimensions or more.

    >>> import numpy as np
    >>> homogeneous(np.asarray([[2.0, 3.0]]))
    array([[2., 3., 1.]])
    """
    b = _backends.resolve(a=a)
    _backends.operand(b, "a", a, ("N", "d"))
    return b.xp.concat([a, b.zeros(*a.shape[:-1], 1) + 1], axis=-1)


def second_moment(x: ArrayT, /) -> ArrayT:
    """xᵀx / N (..., n, n) of N rows x (..., N, n), exactly symmetric. N n² flops, or 2 N n² where there is no SYRK.

    Raises:
        TypeError, ValueError: x is not a float32 or float64 array of two dimensions or more; N = 0.

    >>> import numpy as np
    >>> second_moment(np.asarray([[1.0, 1.0], [3.0, 1.0]]))
    array([[5., 2.],
           [2., 1.]])
    """
    if _backends.operand(_backends.resolve(x=x), "x", x, ("N", "n")).shape[-2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., N, n) with N > 0")
    return _backends.moment(x)


def batch_factors(
    inputs: Sequence[ArrayT],
    output_gradients: Sequence[ArrayT],
    /,
    *,
    links: bool = False,
) -> Factors:
    """The second moments of one batch of N examples: A_i = aᵀa / N and G_i = gᵀg / N, exactly symmetric.

    Σ 2 N (n_i² + m_i²) flops, and 2 N (n_i n_{i+1} + m_i m_{i+1}) a link.

    Args:
        inputs: one array (..., N, n_i) a layer, used as given; see `homogeneous` for the bias.
        output_gradients: one (..., N, m_i) a layer; a row is the gradient of the loss *of one example*.
        links: also the cross moments of neighbouring layers, from the same examples.

    Raises:
        TypeError, ValueError: the sequences differ in length, or an array in N, dtype, namespace or device; N = 0.

    >>> import numpy as np
    >>> a, g = np.asarray([[1.0, 1.0], [3.0, 1.0]]), np.asarray([[2.0], [0.0]])
    >>> batch_factors([a], [g]).layers[0]
    LayerFactors(A=array([[5., 2.],
           [2., 1.]]), G=array([[2.]]))
    """
    _checks.check_flag("links", links)
    inputs, output_gradients = _moments.check_batch(inputs, output_gradients)
    moment = _backends.moment
    layers = tuple(LayerFactors(moment(a), moment(g)) for a, g in zip(inputs, output_gradients, strict=True))
    return Factors(layers, tuple(Link(*pair) for pair in _moments.links(inputs, output_gradients)) if links else ())
