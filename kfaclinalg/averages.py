"""The moving averages of the factors over the batches (Section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

from . import _backends, _checks, _moments
from ._backends import Array, ArrayT, Scalar, Scalars
from .diagonal import Diagonal
from .factors import Factors, LayerFactors, Link, batch_factors


def update_factors(
    old: Factors | None,
    inputs: Sequence[ArrayT],
    output_gradients: Sequence[ArrayT],
    /,
    *,
    decay: Scalar,
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
    inputs, output_gradients = _moments.check_batch(inputs, output_gradients)
    if old is not None:
        held = _arrays("old", old)
        _backends.resolve(**{"inputs[0]": inputs[0]}, **held)
        came, expected = [tuple(M.shape) for M in held.values()], _moments.shapes(inputs, output_gradients, old.links)
        if came != expected:
            raise ValueError(f"old has shapes {came}, expected {expected}, those of the batch")
    epsilon = _backends.weight(_backends.backend_of(inputs[0]), "decay", decay)
    if old is None or (isinstance(epsilon, float) and epsilon == 1):  # what a zero multiplies no rank-N update reads
        new = batch_factors(inputs, output_gradients, links=old is not None and old.links != ())
        return moving_average(old, new, decay=epsilon)

    def updated(C: Array, x: Array) -> Array:
        return _backends.updated_moment(C, x, epsilon)

    layers = zip(old.layers, inputs, output_gradients, strict=True)
    crosses = _moments.links(inputs, output_gradients) if old.links else ()
    links = (Link(*_mix(x, y, epsilon)) for x, y in zip(old.links, crosses, strict=True))
    return Factors(tuple(LayerFactors(updated(A, a), updated(G, g)) for (A, G), a, g in layers), tuple(links))


def moving_average(old: Factors | None, new: Factors, /, *, decay: Scalar) -> Factors:
    """decay * old + (1 - decay) * new, for every factor and link; `new` itself where there is no `old` (Section 5).

    decay is a number, or a 0-d array of any floating-point dtype, whose value is not looked at. 3 flops an entry. The
    average of a `Diagonal` is one.

    Raises:
        TypeError, ValueError: decay is outside [0, 1]; old or new holds something else than float32 or float64 arrays
            and `Diagonal` ones, or they differ in the number of layers or links, a shape, dtype, namespace or device.

    >>> import numpy as np
    >>> one, two = (Factors((LayerFactors(np.full((1, 1), x), np.full((1, 1), x)),)) for x in (1.0, 2.0))
    >>> moving_average(one, two, decay=0.75).layers[0].A
    array([[1.25]])
    """
    arrays = _arrays("new", new)
    b = _backends.resolve(**arrays)
    epsilon = _backends.weight(b, "decay", decay)
    if old is None:
        return new
    held = _arrays("old", old)
    _backends.resolve(**arrays, **held)
    came, expected = ([tuple(x.shape) for x in xs.values()] for xs in (arrays, held))
    if came != expected or len(old.layers) != len(new.layers):
        raise ValueError(f"new has shapes {came}, expected {expected}, those of old")
    return Factors(
        tuple(LayerFactors(*_mix(x, y, epsilon)) for x, y in zip(old.layers, new.layers, strict=True)),
        tuple(Link(*_mix(x, y, epsilon)) for x, y in zip(old.links, new.links, strict=True)),
    )


def averaging_decay(iteration: Scalars, /, *, maximum: float = 0.95) -> Scalars:
    """ε = min(1 - 1/k, maximum) for k = 1, 2, ...: a plain mean at first, so that the average is never biased
    towards a start value, then an exponentially decaying one (Section 5). Of an array (...) an array. Two flops.

    Raises:
        TypeError, ValueError: the iteration is not an integer of 1 or more, or maximum not in [0, 1].

    >>> [averaging_decay(k) for k in (1, 2, 4, 1000)]
    [0.0, 0.5, 0.75, 0.95]
    """
    bound = _checks.fraction("maximum", maximum)
    if isinstance(iteration, Real):
        return min(1 - 1 / _checks.integer("iteration", iteration, 1), bound)
    k = _backends.count("iteration", iteration)
    epsilon = 1 - 1 / k
    return _backends.namespace_of(k).where(epsilon < bound, epsilon, bound)


def _mix(old: tuple[Any, ...], new: tuple[Any, ...], decay: Scalar) -> Iterator[Any]:
    for x, y in zip(old, new, strict=True):
        if isinstance(x, Diagonal):
            yield Diagonal(decay * x.d + (1 - decay) * y.d)
        else:
            yield decay * x + (1 - decay) * y


def _arrays(name: str, factors: Factors) -> dict[str, Array]:
    """What the factors hold, under its name in a message."""
    _checks.check_class(name, factors, Factors)
    found: dict[str, Array] = {}
    for kind in ("layers", "links"):
        pairs = getattr(factors, kind)
        for i, pair in enumerate(() if pairs == () else _checks.items(f"{name}.{kind}", pairs)):
            at = f"{name}.{kind}[{i}]"
            sides = zip("AG", _checks.items(at, pair, 2), strict=True)
            found |= {f"{at}.{side}": M.d if isinstance(M, Diagonal) else M for side, M in sides}
    if not found:
        raise ValueError(f"{name} has neither layers nor links")
    return found
