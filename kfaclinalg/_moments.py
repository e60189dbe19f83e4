"""Second moments of a batch of N examples, x (..., N, n), and the checks that a batch is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from . import _array, _blas, _host, _linalg


def moment(b: _array.Backend, blas: str, x: Any) -> Any:
    """xᵀx / N, exactly symmetric."""
    return _host.run(b, blas, _blas.moment, _moment, x)


def updated(b: _array.Backend, blas: str, decay: float, C: Any, x: Any) -> Any:
    """decay C + (1 - decay) xᵀx / N for symmetric C, exactly symmetric if C is."""
    return _host.run(b, blas, _blas.updated, _updated, decay, C, x)


def cross(x: Any, y: Any) -> Any:
    """xᵀy / N."""
    return (x.mT @ y) / x.shape[-2]


def links(inputs: Sequence[Any], output_gradients: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Those of neighbouring layers: of their inputs, of their output gradients."""
    for a, g in zip(pairwise(inputs), pairwise(output_gradients), strict=True):
        yield cross(*a), cross(*g)


def check_batch(inputs: Sequence[Any], output_gradients: Sequence[Any]) -> _array.Backend:
    if len(inputs) != len(output_gradients) or not inputs:
        raise ValueError(
            f"got {len(inputs)} inputs and {len(output_gradients)} output_gradients, expected one of each a layer"
        )
    named = {f"inputs[{i}]": a for i, a in enumerate(inputs)}
    named |= {f"output_gradients[{i}]": g for i, g in enumerate(output_gradients)}
    b = _array.resolve(**named)
    N = inputs[0].shape[-2] if inputs[0].ndim > 1 else 0
    for name, x in named.items():
        if x.ndim < 2 or x.shape[-2] != N or N == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., N, d) with the same N > 0 for all")
    return b


def check_old(layers: Sequence[tuple[Any, Any]], inputs: Sequence[Any], output_gradients: Sequence[Any]) -> None:
    """The factors of `layers` must be averages of such batches."""
    batch = [x for pair in zip(inputs, output_gradients, strict=True) for x in pair]
    held = {f"old.layers[{i}].{side}": M for i, pair in enumerate(layers) for side, M in zip("AG", pair, strict=True)}
    _array.resolve(**{"inputs[0]": inputs[0]}, **held)
    came = [tuple(M.shape) for M in held.values()]
    expected = [(*x.shape[:-2], x.shape[-1], x.shape[-1]) for x in batch]
    if came != expected:
        raise ValueError(f"the layers of old have shapes {came}, expected {expected}, as the batch")


def _moment(x: Any) -> Any:
    return _linalg.symmetrised(cross(x, x))  # BLAS does not promise that xᵀx is symmetric bit for bit


def _updated(decay: float, C: Any, x: Any) -> Any:
    return decay * C + (1 - decay) * _moment(x)
