"""The state of a run as tensors, numbers, lists and dictionaries, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import (
    BlockDiagonal,
    BlockTridiagonalInverse,
    CholeskyInverse,
    Diagonal,
    Factors,
    KFACState,
    Kronecker,
    KroneckerBasis,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
)

KINDS = {
    kind.__name__: kind
    for kind in (
        *(KFACState, Factors, LayerFactors, Link),
        *(BlockDiagonal, BlockTridiagonalInverse, Kronecker, KroneckerBasis),
        *(CholeskyInverse, Diagonal, LowRankPlusDiagonal),
    )
}

LARGEST = 1e300  # a strength of damping that is finite
KIND = "kind of"  # no name of a module or field has a space


def packed(value: Any) -> Any:
    """Records and operators become {KIND: ..., field: ...}, tuples lists; the rest stays as it is."""
    if type(value).__name__ in KINDS:
        names = [field.name for field in fields(value)] if is_dataclass(value) else value._fields
        return {KIND: type(value).__name__} | {name: packed(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: packed(item) for name, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, tuple) else value


def restored(value: Any, like: Tensor) -> Any:
    """`unpacked`, whatever is wrong with it a ValueError."""
    try:
        return unpacked(value, like)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, StopIteration) as error:
        raise ValueError(f"the state is not one that state_dict() gave: {error!r}") from error


def check(holds: Any, what: str) -> None:
    """A ValueError says what of a state does not hold."""
    if holds is not True:
        raise ValueError(f"the state is not one that state_dict() gave to such a model: {what}")


def check_keys(state: Any, names: Iterable[str]) -> None:
    """It must be a dictionary of these."""
    expected = sorted(names)
    found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
    check(found == expected, f"got {found}, expected {expected}")


def check_generator(generator: torch.Generator, state: Any) -> None:
    """A state that it would take."""
    try:
        torch.Generator(generator.device).set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the state has a generator that cannot be set: {error}") from error


def is_matrix(x: Any, *shape: int) -> bool:
    return isinstance(x, Tensor) and tuple(x.shape) == shape and x.is_floating_point()


def is_number(x: Any, low: float = 0.0, high: float = math.inf) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


def unpacked(value: Any, like: Tensor) -> Any:
    """What `packed` was given, its tensors in the dtype and on the device of `like`."""
    if isinstance(value, dict):
        items = {name: unpacked(item, like) for name, item in value.items() if name != KIND}
        return KINDS[value[KIND]](**items) if KIND in value else items
    if isinstance(value, list):
        return tuple(unpacked(item, like) for item in value)
    return value.to(like, copy=True) if isinstance(value, Tensor) else value


def check_run(state: Any, shapes: Sequence[tuple[int, int]], structure: str) -> None:
    """A `KFACState` of layers with weights of these shapes."""
    check(isinstance(state, KFACState), "no KFACState")
    check(isinstance(state.iteration, int) and is_number(state.iteration), f"iteration is {state.iteration!r}")
    for name, high in (("damping", LARGEST), ("gamma", LARGEST), ("curvature_fraction", 1.0), ("ceiling", math.inf)):
        check(is_number(getattr(state, name), 0.0, high), f"{name} is {getattr(state, name)!r}")
    started = state.factors is not None
    check(started == (state.inverse is not None) == (state.iteration > 0), "a part of it is missing")
    if started:
        linked = structure == "block-tridiagonal"
        check_factors(state.factors, shapes, linked)
        kind = BlockTridiagonalInverse if linked else BlockDiagonal
        check(isinstance(state.inverse, kind), f"its inverse is not of structure {structure!r}")
        blocks = getattr(state.inverse, "Lambda" if linked else "blocks")
        found = [block.shape for block in blocks]
        check(found == list(shapes), f"its inverse is of layers with shapes {found}, expected {list(shapes)}")
    if state.update is not None:
        check(isinstance(state.update, tuple) and len(state.update) == len(shapes), "its update has other layers")
        check(all(is_matrix(U, *shape) for U, shape in zip(state.update, shapes, strict=True)), "its update differs")


def check_factors(factors: Any, shapes: Sequence[tuple[int, int]], linked: bool) -> None:
    """Averages of layers with weights of these shapes."""
    check(isinstance(factors, Factors) and isinstance(factors.layers, tuple), "its factors are none")
    check(all(isinstance(layer, LayerFactors) for layer in factors.layers), "a layer of its factors is none")
    check(all(isinstance(M, Tensor) and M.ndim == 2 for layer in factors.layers for M in layer), "A or G is no matrix")
    found = [(G.shape[-1], A.shape[-1]) for A, G in factors.layers]
    check(found == list(shapes), f"it is of layers with shapes {found}, expected {list(shapes)}")
    for (m, n), (A, G) in zip(shapes, factors.layers, strict=True):
        check(is_matrix(A, n, n) and is_matrix(G, m, m), "A or G is not square")
    check_links(factors.links, shapes if linked else [])
    check(bool(factors.links) == (linked and len(shapes) > 1), "links are missing")


def check_links(links: Any, shapes: Sequence[Sequence[int]]) -> None:
    """None, or one between each two neighbours of layers with weights of these shapes."""
    sizes = [(n, k, m, j) for (m, n), (j, k) in pairwise(shapes)]
    check(isinstance(links, tuple) and len(links) in (0, len(sizes)), f"it has links {links!r}, expected {len(sizes)}")
    for (n, k, m, j), link in zip(sizes, links, strict=False):
        fits = isinstance(link, Link) and is_matrix(link.A, n, k) and is_matrix(link.G, m, j)
        check(fits, "a link does not fit its layers")
