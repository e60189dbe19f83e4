"""The moving averages of the factors over the batches (Section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import _backends, _moments
from ._typing import Array, ArrayT
from .factors import Factors, LayerFactors, Link, batch_factors


def update_factors(
    old: Factors | None,
    inputs: Sequence[ArrayT],
    output_gradients: Sequence[ArrayT],
    /,
    *,
    decay: float,
) -> Factors:
    """moving_average(old, batch_factors(inputs, output_gradients), decay=decay), with links where `old` has them.

    Each factor is one symmetric rank-N update of a copy, Σ N (n_i² + m_i²) flops, where there is a
    BLAS. Those of `old` must be symmetric: only one half of each may be read.

    Raises:
        TypeError, ValueError: as for `batch_factors` and `moving_average`, or old is of another dtype or device.

    >>> import numpy as np
    >>> old = Factors((LayerFactors(np.ones((1, 1)), np.ones((1, 1))),))
    >>> update_factors(old, [np.asarray([[2.0]])], [np.asarray([[0.0]])], decay=0.75).layers[0]
    LayerFactors(A=array([[1.75]]), G=array([[0.75]]))
    """
    if old is None or decay == 1:  # what it multiplies by zero no rank-N update reads
        new = batch_factors(inputs, output_gradients, links=old is not None and old.links != ())
        return moving_average(old, new, decay=decay)
    _moments.check_batch(inputs, output_gradients)
    _moments.check_old(old.layers, inputs, output_gradients)
    links = tuple(Link(*pair) for pair in _moments.links(inputs, output_gradients)) if old.links else ()
    averaged = moving_average(Factors((), old.links), Factors((), links), decay=decay).links

    def updated(C: Array, x: Array) -> Array:
        return _backends.updated_moment(C, x, float(decay))

    layers = zip(old.layers, inputs, output_gradients, strict=True)
    return Factors(tuple(LayerFactors(updated(A, a), updated(G, g)) for (A, G), a, g in layers), averaged)


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


def _mix(old: tuple[Array, ...], new: tuple[Array, ...], decay: float) -> Iterator[Array]:
    return (decay * x + (1 - decay) * y for x, y in zip(old, new, strict=True))


def _check_alike(old: Factors, new: Factors) -> None:
    shapes = [[tuple(x.shape) for pair in (*f.layers, *f.links) for x in pair] for f in (old, new)]
    if len(old.layers) != len(new.layers) or shapes[0] != shapes[1]:
        raise ValueError(f"new has shapes {shapes[1]}, expected {shapes[0]}, those of old")
