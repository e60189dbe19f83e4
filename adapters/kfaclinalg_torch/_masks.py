"""Which positions of the examples count: boolean tensors (N, ...)."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._blocks import Block


def mask_of(mask: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The mask of a pass with these inputs: the mask itself, or what it gives for them."""
    found = mask(*args, **kwargs) if callable(mask) else mask
    if found is not None and (not isinstance(found, Tensor) or found.dtype != torch.bool):
        raise TypeError(f"mask gives a {getattr(found, 'dtype', type(found).__name__)}, expected a boolean tensor")
    return found


def checked_mask_of(mask: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The same, a ValueError where no position counts."""
    found = mask_of(mask, args, kwargs)
    if found is not None:
        check_count(int(found.any()))
    return found


def check_count(count: int) -> None:
    if not count:
        raise ValueError("mask counts no position")


def check_examples(mask: Tensor, examples: int) -> None:
    """A ValueError where it is of another number of examples; all positions in one row are known by their number."""
    of_others = mask.numel() % examples if mask.ndim == 1 and examples else len(mask) - examples
    if examples and of_others:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected ({examples}, ...), that of the examples")


def counting(mask: Tensor) -> Tensor:
    """The examples of which any position counts (N,)."""
    return mask.reshape(len(mask), prod(mask.shape[1:])).any(1)


def mask_of_block(mask: Tensor | None, block: Block, seen: Tensor) -> Tensor | None:
    """The mask of a block's positions: of all of them, or of the examples where it has but one for each."""
    if mask is None:
        return None
    positions = block.positions(seen)
    if positions[: mask.ndim] == mask.shape:
        return spread(mask, len(positions)).expand(positions)
    if torch.Size(positions).numel() == mask.numel():
        return mask.reshape(positions)
    return counting(mask) if positions == mask.shape[:1] else None


def spread(mask: Tensor, ndim: int) -> Tensor:
    """With as many dimensions, the new ones last and of length 1."""
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))
