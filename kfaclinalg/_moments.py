"""Second moments of a batch of N examples, x (..., N, n), and the checks that a batch is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from . import _backends, _checks
from ._backends import Array, ArrayT


@_backends.in_full_precision
def cross(x: Array, y: Array) -> Array:
    """xᵀy / N."""
    return (x.mT @ y) / x.shape[-2]


def links(inputs: Sequence[Array], output_gradients: Sequence[Array]) -> Iterator[tuple[Array, Array]]:
    """Those of neighbouring layers: of their inputs, of their output gradients."""
    for a, g in zip(pairwise(inputs), pairwise(output_gradients), strict=True):
        yield cross(*a), cross(*g)


def shapes(inputs: Sequence[Array], output_gradients: Sequence[Array], linked: object) -> list[tuple[int, ...]]:
    """Those of the moments of each layer and then, where they are `linked`, of neighbours."""
    pairs = [(x, x) for layer in zip(inputs, output_gradients, strict=True) for x in layer]
    if linked:
        neighbours = zip(pairwise(inputs), pairwise(output_gradients), strict=True)
        pairs += [pair for both in neighbours for pair in both]
    return [(*_checks.common_batch(x.shape[:-2], y.shape[:-2]), x.shape[-1], y.shape[-1]) for x, y in pairs]


def check_batch(
    inputs: Iterable[ArrayT], output_gradients: Iterable[ArrayT]
) -> tuple[tuple[ArrayT, ...], tuple[ArrayT, ...]]:
    """The inputs and the output gradients, which must be of as many layers, and of the same examples."""
    a, g = _checks.items("inputs", inputs), _checks.items("output_gradients", output_gradients)
    if len(a) != len(g):
        raise ValueError(f"got {len(a)} inputs and {len(g)} output_gradients, expected one of each a layer")
    named = {f"inputs[{i}]": x for i, x in enumerate(a)} | {f"output_gradients[{i}]": x for i, x in enumerate(g)}
    _backends.resolve(**named)
    N = a[0].shape[-2] if a[0].ndim > 1 else 0
    for name, x in named.items():
        if x.ndim < 2 or x.shape[-2] != N or N == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., N, d) with the same N > 0 for all")
    _checks.check_batches(**{name: tuple(x.shape[:-2]) for name, x in named.items()})
    return a, g
