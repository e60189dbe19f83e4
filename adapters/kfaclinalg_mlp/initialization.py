"""Initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .checks import check_generator


def sparse_weights(
    sizes: Sequence[int], *, rng: Any, connections: int = 15, scale: float = 1.0, bias: float = 0.0
) -> tuple[Any, ...]:
    """The sparse initialisation of Martens (2010), with which the paper's experiments start (Section 13).

    Each unit gets `connections` incoming weights from N(0, scale²), at random inputs; the others are zero. Unlike a
    dense initialisation of the same scale it leaves wide layers unsaturated, and the units of a layer differ.

    Args:
        sizes: of the layers, from the inputs to the outputs.
        rng: a `numpy.random.Generator`.
        connections: a unit; all of them where a layer has fewer inputs.
        scale: standard deviation of the weights that are not zero.
        bias: of every unit.

    Returns:
        NumPy float64 arrays, one (m, n + 1) a layer, the bias in the last column. For another namespace, dtype or
        device: `tuple(xp.asarray(W, dtype=..., device=...) for W in weights)`.

    Raises:
        TypeError: sizes that are none, or no generator.
        ValueError: fewer than two sizes, a size or `connections` below 1, a negative scale.

    >>> import numpy as np
    >>> W1, W2 = sparse_weights((100, 30, 2), rng=np.random.default_rng(0), bias=0.5)
    >>> W1.shape, W2.shape
    ((30, 101), (2, 31))
    >>> (W1[:, :-1] != 0).sum(axis=1).tolist() == 30 * [15], float(W1[0, -1])
    (True, 0.5)
    """
    check_generator(rng)
    if not hasattr(sizes, "__len__"):
        raise TypeError(f"sizes is {sizes!r}, expected a sequence of integers")
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes is {tuple(sizes)}, expected two or more, each >= 1")
    if connections < 1:
        raise ValueError(f"connections is {connections}, expected an integer >= 1")
    if not scale >= 0:
        raise ValueError(f"scale is {scale}, expected a number >= 0")

    def layer(n: int, m: int) -> Any:
        W = scale * rng.standard_normal((m, n + 1))
        order = rng.random((m, n)).argsort(axis=1)  # a random permutation a unit
        W[:, :-1][order >= connections] = 0.0
        W[:, -1] = bias
        return W

    return tuple(layer(n, m) for n, m in pairwise(sizes))
