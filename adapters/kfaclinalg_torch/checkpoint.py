"""The state of a run as tensors, numbers, lists and dictionaries, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

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

KIND = "kind of"  # no name of a module or field has a space


def packed(value: Any) -> Any:
    """Records and operators become {KIND: ..., field: ...}, tuples lists; the rest stays as it is."""
    if type(value).__name__ in KINDS:
        names = [field.name for field in fields(value)] if is_dataclass(value) else value._fields
        return {KIND: type(value).__name__} | {name: packed(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: packed(item) for name, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, tuple) else value


def unpacked(value: Any, like: Tensor) -> Any:
    """What `packed` was given, its tensors in the dtype and on the device of `like`."""
    if isinstance(value, dict):
        items = {name: unpacked(item, like) for name, item in value.items() if name != KIND}
        return KINDS[value[KIND]](**items) if KIND in value else items
    if isinstance(value, list):
        return tuple(unpacked(item, like) for item in value)
    return value.to(like, copy=True) if isinstance(value, Tensor) else value
