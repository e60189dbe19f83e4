"""Second moments of a batch of N examples, x (..., N, n), and the checks that a batch is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from . import _backends
from ._typing import Array


def cross(x: Array, y: Array) -> Array:
    """xᵀy / N."""
    return (x.mT @ y) / x.shape[-2]


def links(inputs: Sequence[Array], output_gradients: Sequence[Array]) -> Iterator[tuple[Array, Array]]:
    """Those of neighbouring layers: of their inputs, of their output gradients."""
    for a, g in zip(pairwise(inputs), pairwise(output_gradients), strict=True):
        yield cross(*a), cross(*g)


def check_batch(inputs: Sequence[Array], output_gradients: Sequence[Array]) -> _backends.Backend:
    if len(inputs) != len(output_gradients) or not inputs:
        raise ValueError(
            f"got {len(inputs)} inputs and {len(output_gradients)} output_gradients, expected one of each a layer"
        )
    named = {f"inputs[{i}]": a for i, a in enumerate(inputs)}
    named |= {f"output_gradients[{i}]": g for i, g in enumerate(output_gradients)}
    b = _backends.resolve(**named)
    N = inputs[0].shape[-2] if inputs[0].ndim > 1 else 0
    for name, x in named.items():
        if x.ndim < 2 or x.shape[-2] != N or N == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., N, d) with the same N > 0 for all")
    return b


def check_old(
    layers: Sequence[tuple[Array, Array]], inputs: Sequence[Array], output_gradients: Sequence[Array]
) -> None:
    """The factors of `layers` must be averages of such batches."""
    batch = [x for pair in zip(inputs, output_gradients, strict=True) for x in pair]
    held = {f"old.layers[{i}].{side}": M for i, pair in enumerate(layers) for side, M in zip("AG", pair, strict=True)}
    _backends.resolve(**{"inputs[0]": inputs[0]}, **held)
    came = [tuple(M.shape) for M in held.values()]
    expected = [(*x.shape[:-2], x.shape[-1], x.shape[-1]) for x in batch]
    if came != expected:
        raise ValueError(f"the layers of old have shapes {came}, expected {expected}, as the batch")
