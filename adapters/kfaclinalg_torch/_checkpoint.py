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
    KroneckerEigen,
    LayerFactors,
    Link,
    LowRankPlusDiagonal,
)

from ._blocks import outline
from ._control import BOUNDS
from ._layer import Layer
from ._links import chained

KINDS = {
    kind.__name__: kind
    for kind in (
        *(KFACState, Factors, LayerFactors, Link),
        *(BlockDiagonal, BlockTridiagonalInverse, Kronecker, KroneckerBasis, KroneckerEigen),
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


def made(structure: Any, estimator: Any, layers: Sequence[Layer]) -> dict[str, Any]:
    """What a state was made with."""
    shapes = {layer.name: list(layer.matrix(outline).shape) for layer in layers}
    return {"structure": repr(structure), "estimator": repr(estimator), "layers": shapes}


def check_made(came: Any, expected: dict[str, Any]) -> None:
    """A ValueError names what a state was made with and what it should have been."""
    check_keys(came, expected)
    check(isinstance(came["structure"], str) and isinstance(came["estimator"], str), "it does not say what made it")
    for name in ("structure", "estimator"):
        if came[name] != expected[name]:
            raise ValueError(f"the state was made with {name} {came[name]}, expected {expected[name]}")
    shapes = came["layers"].values() if isinstance(came["layers"], dict) else [None]
    named = all(isinstance(shape, list) and all(isinstance(n, int) for n in shape) for shape in shapes)
    check(named, "it does not name its layers")
    if came["layers"] != expected["layers"]:
        here, there = (
            {name: one["layers"][name] for name in one["layers"] if one["layers"][name] != other["layers"].get(name)}
            for one, other in ((expected, came), (came, expected))
        )
        raise ValueError(f"the state was made with layers {there or 'none'}, expected {here or 'none'}")


def check_gone(gone: Any) -> None:
    """By the names of layers the reason why they are none."""
    check(isinstance(gone, dict) and all(isinstance(why, str) for why in gone.values()), "it names no layers as none")


def check_periods(periods: Any) -> None:
    """Of "auto", none before the first statistic."""
    check(isinstance(periods, dict) and periods.keys() <= BOUNDS.keys(), "its periods are none")
    check(all(type(period) is int and period > 0 for period in periods.values()), f"its periods are {periods!r}")


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


def check_run(state: Any, layers: Sequence[Layer], structure: Any) -> None:
    """A `KFACState` of these layers."""
    check(isinstance(state, KFACState), "no KFACState")
    check(isinstance(state.iteration, int) and is_number(state.iteration), f"iteration is {state.iteration!r}")
    for name, high in (("damping", LARGEST), ("gamma", LARGEST), ("curvature_fraction", 1.0), ("ceiling", math.inf)):
        check(is_number(getattr(state, name), 0.0, high), f"{name} is {getattr(state, name)!r}")
    shapes = [tuple(layer.matrix(torch.detach).shape) for layer in layers]
    started = state.factors is not None
    check(started == (state.inverse is not None) == (state.iteration > 0), "a part of it is missing")
    check((state.fitted is not None) == (started and structure.observes), "what its inverse is made of is missing")
    if started:
        check_factors(state.factors, layers)
        links = chained(layers) if structure.linked else []
        check_links(state.factors.links, [layer.matrix(torch.detach).shape for layer in links])
        check(bool(state.factors.links) == (len(links) > 1), "links are missing")
        kind, name = (BlockTridiagonalInverse, "Lambda") if structure.linked else (BlockDiagonal, "blocks")
        check(isinstance(state.inverse, kind), f"its inverse is not of structure {structure!r}")
        for blocks in (getattr(state.inverse, name), state.fitted or ()):
            found = [tuple(b.diagonal().shape) for b in blocks if not isinstance(b, LayerFactors)]
            expected = [s for s, b in zip(shapes, blocks, strict=False) if not isinstance(b, LayerFactors)]
            fits = found == expected and len(blocks) in (0, len(shapes))
            check(fits, f"its inverse is of layers with shapes {found}, expected {expected}")
    if state.update is not None:
        check(isinstance(state.update, tuple) and len(state.update) == len(shapes), "its update has other layers")
        check(all(is_matrix(U, *shape) for U, shape in zip(state.update, shapes, strict=True)), "its update differs")


def check_factors(factors: Any, layers: Sequence[Layer]) -> None:
    """Averages of these layers."""
    check(isinstance(factors, Factors) and isinstance(factors.layers, tuple), "its factors are none")
    check(len(factors.layers) == len(layers), f"it is of {len(factors.layers)} layers, expected {len(layers)}")
    for layer, pair in zip(layers, factors.layers, strict=True):
        check_moments(layer.name, pair, layer.empty_moments())


def check_moments(name: str, pair: Any, like: Sequence[Tensor]) -> None:
    """A and G of the layer of this name, shaped like its empty ones; a vector stands for a diagonal."""
    check(isinstance(pair, LayerFactors), f"the moments of {name!r} are none")
    sides = [M.d if isinstance(M, Diagonal) else M for M in pair]
    came = [tuple(M.shape) if isinstance(M, Tensor) else type(M).__name__ for M in sides]
    W = tuple(M.shape[-1] for M in reversed(like))
    fits = all(is_matrix(M, *empty.shape) for M, empty in zip(sides, like, strict=True))
    check(fits, f"{name!r} has moments of shapes {came}, expected those of W of shape {W}")


def check_links(links: Any, shapes: Sequence[Sequence[int]]) -> None:
    """None, or one between each two neighbours of layers with weights of these shapes."""
    sizes = [(n, k, m, j) for (m, n), (j, k) in pairwise(shapes)]
    check(isinstance(links, tuple) and len(links) in (0, len(sizes)), f"it has links {links!r}, expected {len(sizes)}")
    for (n, k, m, j), link in zip(sizes, links, strict=False):
        fits = isinstance(link, Link) and is_matrix(link.A, n, k) and is_matrix(link.G, m, j)
        check(fits, "a link does not fit its layers")
