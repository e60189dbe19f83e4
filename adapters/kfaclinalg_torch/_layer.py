"""What shares one inverse, and who holds its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfaclinalg import Diagonal, LayerFactors

from ._blocks import Block, Dense, Like
from ._tied import combined


@dataclass(frozen=True, eq=False)
class Layer:
    """What shares one inverse: a block, or several whose weights are the same tensor (tied)."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.blocks[0].parameters

    @property
    def dense(self) -> Dense | None:
        """Its one block, if that is a dense one."""
        (block, *tied) = self.blocks
        return block if isinstance(block, Dense) and not tied else None

    def empty_moments(self) -> tuple[Tensor, Tensor]:
        """Those of no rows; a diagonal where one of its blocks has one."""
        A, G = self.blocks[0].empty_moments()
        for block in self.blocks[1:]:
            B, H = block.empty_moments()[:: -1 if block.turned != self.blocks[0].turned else 1]
            A, G = (min(x, y, key=lambda M: M.ndim) for x, y in ((A, B), (G, H)))
        return A, G

    def no_factors(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LayerFactors:
        """Those of a layer that nothing has shown: an expert that no row was given to."""
        A, G = (M.to(device or M.device, dtype or M.dtype) for M in self.empty_moments())
        return LayerFactors(*(Diagonal(M) if M.ndim == 1 else M for M in (A, G)))

    def matrix(self, like: Like) -> Tensor:
        return self.blocks[0].matrix(like)

    def parts(self, like: Like, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        return self.blocks[0].parts(like, W)

    def factors(self, averages: Mapping[str, LayerFactors]) -> LayerFactors | None:
        """Those of the shared weight, in the orientation of the first block; None before there are any."""
        shown = [
            (averages[block.name], block.turned != self.blocks[0].turned)
            for block in self.blocks
            if block.name in averages
        ]
        return combined([LayerFactors(M.G, M.A) if turn else M for M, turn in shown]) if shown else None


class Owner(NamedTuple):
    """Who holds a parameter or a module, among which of its own, under which key, and its name in the model."""

    holder: nn.Module
    kept: str  # "_parameters" or "_modules", dictionaries that deleting from a Sequential makes anew
    key: str
    thing: Any
    name: str
    kind: Any  # of a parameter, its dtype and device

    def check(self, who: str) -> None:
        """A ValueError names what was replaced since, or moved."""
        items = getattr(self.holder, self.kept)
        if hasattr(self.thing, "device_mesh") and not hasattr(items.get(self.key), "device_mesh"):
            return  # FSDP has put the whole parameter there, for a while
        if items.get(self.key) is not self.thing:
            raise ValueError(f"{self.name!r} was replaced since the {who} was made: make a new one, after fully_shard")
        if self.kind != _kind(self.thing):
            raise ValueError(f"{self.name!r} was {self.kind} when the {who} was made, now it is {_kind(self.thing)}")


def owners(model: nn.Module, layers: Sequence[Layer]) -> list[Owner]:
    """Who holds each parameter of the layers, and each module on the way to it."""
    known = {id(p) for layer in layers for block in layer.blocks for p in block.parameters}
    held: list[Owner] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for kept in ("_parameters", "_modules"):
            things = getattr(module, kept).items()
            held += [Owner(module, kept, k, x, prefix + k, _kind(x)) for k, x in things if _holds(x, known)]
    return held


def _kind(thing: Any) -> Any:
    return (thing.dtype, str(thing.device)) if isinstance(thing, Tensor) else None


def _holds(thing: Any, known: set[int]) -> bool:
    held = thing.parameters() if isinstance(thing, nn.Module) else (thing,)
    return any(id(p) in known for p in held)
