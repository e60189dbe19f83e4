"""Second moments of one batch and their moving average (Section 5).

Each layer i has A = E[a aᵀ] of its inputs and G = E[g gᵀ] of the loss's gradients with respect to its outputs, one
example's loss at a time. `Factors` holds them for a network, with the links between neighbouring layers that the
block-tridiagonal inverse needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from . import _array, _moments
from ._typing import ArrayT


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
    b = _array.resolve(a=a)
    if a.ndim < 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (..., N, d)")
    ones = b.xp.ones((*a.shape[:-1], 1), dtype=b.dtype, device=b.device)
    return b.xp.concat([a, ones], axis=-1)


def batch_factors(
    inputs: Sequence[ArrayT],
    output_gradients: Sequence[ArrayT],
    /,
    *,
    links: bool = False,
    blas: str = "auto",
) -> Factors:
    """The second moments of one batch of N examples: A_i = aᵀa / N and G_i = gᵀg / N, exactly symmetric.

    Σ 2 N (n_i² + m_i²) flops, and 2 N (n_i n_{i+1} + m_i m_{i+1}) a link.

    Args:
        inputs: one array (..., N, n_i) a layer, used as given; see `homogeneous` for the bias.
        output_gradients: one (..., N, m_i) a layer; a row is the gradient of the loss *of one example*.
        links: also the cross moments of neighbouring layers, from the same examples.
        blas: "auto" sends single matrices on torch's CPU to SciPy where that is faster, "native" keeps to torch.

    Raises:
        TypeError, ValueError: the sequences differ in length, or an array in N, dtype, namespace or device; N = 0.

    >>> import numpy as np
    >>> a, g = np.asarray([[1.0, 1.0], [3.0, 1.0]]), np.asarray([[2.0], [0.0]])
    >>> batch_factors([a], [g]).layers[0]
    LayerFactors(A=array([[5., 2.],
           [2., 1.]]), G=array([[2.]]))
    """
    b = _moments.check_batch(inputs, output_gradients)
    moment = partial(_moments.moment, b, blas)
    layers = tuple(LayerFactors(moment(a), moment(g)) for a, g in zip(inputs, output_gradients, strict=True))
    return Factors(layers, _links(inputs, output_gradients) if links else ())


def update_factors(
    old: Factors | None,
    inputs: Sequence[ArrayT],
    output_gradients: Sequence[ArrayT],
    /,
    *,
    decay: float,
    blas: str = "auto",
) -> Factors:
    """moving_average(old, batch_factors(inputs, output_gradients), decay=decay), with links where `old` has them.

    Each factor is one symmetric rank-N update of a copy, Σ N (n_i² + m_i²) flops, where the `blas` of `batch_factors`
    has one. Those of `old` must be symmetric: only one half of each may be read.

    Raises:
        TypeError, ValueError: as for `batch_factors` and `moving_average`, or old is of another dtype or device.

    >>> import numpy as np
    >>> old = Factors((LayerFactors(np.ones((1, 1)), np.ones((1, 1))),))
    >>> update_factors(old, [np.asarray([[2.0]])], [np.asarray([[0.0]])], decay=0.75).layers[0]
    LayerFactors(A=array([[1.75]]), G=array([[0.75]]))
    """
    if old is None or decay == 1:  # what it multiplies by zero no rank-N update reads
        new = batch_factors(inputs, output_gradients, links=old is not None and old.links != (), blas=blas)
        return moving_average(old, new, decay=decay)
    b = _moments.check_batch(inputs, output_gradients)
    _moments.check_old(old.layers, inputs, output_gradients)
    links = _links(inputs, output_gradients) if old.links else ()
    averaged = moving_average(Factors((), old.links), Factors((), links), decay=decay).links
    update = partial(_moments.updated, b, blas, float(decay))
    layers = zip(old.layers, inputs, output_gradients, strict=True)
    return Factors(tuple(LayerFactors(update(A, a), update(G, g)) for (A, G), a, g in layers), averaged)


def moving_average(old: Factors | None, new: Factors, /, *, decay: float) -> Factors:
    """decay * old + (1 - decay) * new, for every factor and link; `new` itself where there is no `old` (Section 5).

    3 flops an entry.

    Raises:
        ValueError: decay is outside [0, 1], or old and new differ in the number of layers or links or in a shape.

    >>> import numpy as np
    >>> one, two = (Factors((LayerFactors(np.full((1, 1), x), np.full((1, 1), x)),)) for x in (1.0, 2.0))
    >>> moving_average(one, two, decay=0.75).layers[0].A
    array([[1.25]])
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay is {decay}, expected a number in [0, 1]")
    if old is None:
        return new
    _check_alike(old, new)
    return Factors(
        tuple(LayerFactors(*_mix(x, y, decay)) for x, y in zip(old.layers, new.layers, strict=True)),
        tuple(Link(*_mix(x, y, decay)) for x, y in zip(old.links, new.links, strict=True)),
    )


def averaging_decay(iteration: int, /, *, maximum: float = 0.95) -> float:
    """ε = min(1 - 1/k, maximum) for k = 1, 2, ...: a plain mean at first, so that the average is never biased
    towards a start value, then an exponentially decaying one (Section 5). Two flops.

    Raises:
        ValueError: the iteration is below 1.

    >>> [averaging_decay(k) for k in (1, 2, 4, 1000)]
    [0.0, 0.5, 0.75, 0.95]
    """
    if iteration < 1:
        raise ValueError(f"iteration is {iteration}, expected 1, 2, ...")
    return min(1 - 1 / iteration, maximum)


def _links(inputs: Sequence[Any], output_gradients: Sequence[Any]) -> tuple[Link, ...]:
    neighbours = zip(pairwise(inputs), pairwise(output_gradients), strict=True)
    return tuple(Link(_moments.cross(*a), _moments.cross(*g)) for a, g in neighbours)


def _mix(old: tuple[Any, ...], new: tuple[Any, ...], decay: float) -> Any:
    return (decay * x + (1 - decay) * y for x, y in zip(old, new, strict=True))


def _check_alike(old: Factors, new: Factors) -> None:
    shapes = [[tuple(x.shape) for pair in (*f.layers, *f.links) for x in pair] for f in (old, new)]
    if len(old.layers) != len(new.layers) or shapes[0] != shapes[1]:
        raise ValueError(f"new has shapes {shapes[1]}, expected {shapes[0]}, those of old")
