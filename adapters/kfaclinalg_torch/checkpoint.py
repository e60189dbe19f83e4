"""The state of a run as tensors, numbers, lists and dictionaries, which `torch.load(weights_only=True)` reads."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from kfaclinalg import (
    BlockDiagonal,
    BlockTridiagonalInverse,
    Factors,
    KFACState,
    Kronecker,
    KroneckerBasis,
    LayerFactors,
    Link,
)

KINDS = {
    kind.__name__: kind
    for kind in (
        *(KFACState, Factors, LayerFactors, Link),
        *(BlockDiagonal, BlockTridiagonalInverse, Kronecker, KroneckerBasis),
    )
}


def packed(value: Any) -> Any:
    """Records and operators become {"kind": ..., field: ...}, tuples lists; tensors, numbers and None stay."""
    if type(value).__name__ in KINDS:
        names = [field.name for field in fields(value)] if is_dataclass(value) else value._fields
        return {"kind": type(value).__name__} | {name: packed(getattr(value, name)) for name in names}
    return [packed(item) for item in value] if isinstance(value, tuple) else value


def unpacked(value: Any, like: Tensor) -> Any:
    """What `packed` was given, its tensors in the dtype and on the device of `like`."""
    if isinstance(value, dict):
        kind = KINDS[value["kind"]]
        return kind(**{name: unpacked(item, like) for name, item in value.items() if name != "kind"})
    if isinstance(value, list):
        return tuple(unpacked(item, like) for item in value)
    return value.to(like) if isinstance(value, Tensor) else value
