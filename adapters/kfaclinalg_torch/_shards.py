"""Gradients on their way to who holds a layer's inverse, and the updates on their way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ._grid import Grid
from ._layer import Layer
from ._wire import Form, sent

Holders = Mapping[Tensor, int | None]  #: by the parameters the place in a row of who has the inverse; None: all do
UPDATES = "the updates"


class Whole:
    """Every process has the gradients of all parameters, the same ones (DistributedDataParallel)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def of(self, p: Tensor) -> Any:
        """What this process has of a gradient."""
        return p.grad

    def there(self, layers: Sequence[Layer]) -> list[Tensor]:
        """What this process has of all gradients of these layers that there are."""
        return [self.of(p) for layer in layers for p in layer.parameters if p.grad is not None]

    def fetched(self, holders: Holders) -> dict[Tensor, Tensor]:
        """The gradients that this process preconditions."""
        return {p: self.of(p) for p, holder in holders.items() if holder in (None, self.grid.row.rank)}

    def returned(self, holders: Holders, updates: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The updates of all parameters, from who made them."""
        if self.grid.row.size == 1:
            return dict(updates)
        found: dict[Tensor, Tensor] = {}
        for dtype in _dtypes(holders):
            some = [p for p in holders if p.dtype == dtype]
            forms, owners = [Form(tuple(p.shape)) for p in some], [holders[p] or 0 for p in some]
            own = partial(_picked, updates, some)
            found |= {some[i]: U for i, U in sent(self.grid.row, owners, forms, own, dtype, UPDATES)}
        return found


class Sharded(Whole):
    """Every process of a row has a part of each gradient, along one dimension (FSDP2)."""

    def of(self, p: Tensor) -> Any:
        return p.grad.to_local()  # type: ignore[union-attr]

    def fetched(self, holders: Holders) -> dict[Tensor, Tensor]:
        def parts(p: Tensor, rank: int) -> Tensor:
            return self.of(p)

        row, found = self.grid.row, dict[Tensor, Tensor]()
        for dtype in _dtypes(holders):
            to = [[p for p in holders if p.dtype == dtype and holders[p] in (None, rank)] for rank in range(row.size)]
            mine = to[row.rank]
            came = self._exchanged(to, [mine] * row.size, parts, dtype, "the rows of the gradients")
            found |= {p: torch.cat(pieces, _dim(p)) for p, *pieces in zip(mine, *came, strict=True)}
        return found

    def returned(self, holders: Holders, updates: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        row, found = self.grid.row, dict[Tensor, Tensor]()
        for dtype in _dtypes(holders):
            some = [p for p in holders if p.dtype == dtype]
            if self.grid.replicated:
                found |= {p: self._part(p, updates[p], row.rank) for p in some}
                continue
            mine = [p for p in some if holders[p] == row.rank]
            of = [[p for p in some if holders[p] == rank] for rank in range(row.size)]
            came = self._exchanged(
                [mine] * row.size, of, lambda p, rank: self._part(p, updates[p], rank), dtype, UPDATES
            )
            found |= {p: U for ps, Us in zip(of, came, strict=True) for p, U in zip(ps, Us, strict=True)}
        return found

    def _exchanged(
        self,
        to: Sequence[Sequence[Tensor]],
        of: Sequence[Sequence[Tensor]],
        part: Callable[[Tensor, int], Tensor],
        dtype: torch.dtype,
        what: str,
    ) -> list[list[Tensor]]:
        """From each process the parts of the parameters `of` it; to each go those of the parameters `to` it."""
        row = self.grid.row
        outgoing = [[part(p, rank).reshape(-1) for p in to[rank]] for rank in range(row.size)]
        shapes = [[self._shape(p, row.rank if what == UPDATES else rank) for p in of[rank]] for rank in range(row.size)]
        sizes = [[shape.numel() for shape in some] for some in shapes]
        flat = torch.cat([x for some in outgoing for x in some] or [torch.empty(0, dtype=dtype, device=row.device)])
        counts, expected = [sum(x.numel() for x in some) for some in outgoing], list(map(sum, sizes))
        came = flat.new_empty(sum(expected))
        with row.waiting(what):
            distributed.all_to_all_single(came, flat, expected, counts, group=row.group)
        pieces = zip(came.split(expected), sizes, shapes, strict=True)
        return [[x.view(s) for x, s in zip(x.split(n), some, strict=True)] for x, n, some in pieces]

    def _part(self, p: Tensor, x: Tensor, rank: int) -> Tensor:
        return x.narrow(_dim(p), *self._span(p, rank))

    def _span(self, p: Tensor, rank: int) -> tuple[int, int]:
        """Where the part of a process begins, and its length: as `torch.chunk` does."""
        d = p.shape[_dim(p)]
        chunk = -(-d // self.grid.row.size)
        start = min(rank * chunk, d)
        return start, min(chunk, d - start)

    def _shape(self, p: Tensor, rank: int) -> torch.Size:
        shape = list(p.shape)
        shape[_dim(p)] = self._span(p, rank)[1]
        return torch.Size(shape)


def mesh_of(model: nn.Module) -> Any:
    """The mesh over which `fully_shard` has spread the parameters; None where they are whole.

    Raises:
        ValueError: they are sharded in another way, or only some of them.
    """
    sharded = {name: p for name, p in model.named_parameters() if hasattr(p, "device_mesh")}
    if not sharded:
        return None
    from torch.distributed.fsdp import FSDPModule

    held = {p for module in model.modules() if isinstance(module, FSDPModule) for p in module.parameters()}
    meshes = {p.device_mesh for p in sharded.values()}
    for name, p in sharded.items():
        placements: Any = p.placements  # type: ignore[attr-defined]
        whole_first = all(one.is_replicate() for one in placements[:-1])
        if p not in held or type(placements[-1]).__name__ != "Shard" or not whole_first or len(placements) > 2:
            raise ValueError(
                f"{name!r} is a DTensor with placements {tuple(placements)}, expected those of fully_shard over one "
                "dimension, or two of which the first replicates: a tensor-parallel layer shows each process a part of "
                "its inputs or outputs alone, of which neither A nor G can be made"
            )
    whole = [name for name, p in model.named_parameters() if name not in sharded and p.requires_grad]
    if whole or len(meshes) > 1:
        raise ValueError(
            f"{whole or len(meshes)} beside sharded parameters of one mesh, expected one fully_shard of all"
        )
    mesh = meshes.pop()
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(f"the mesh of the parameters has the processes {ranks}, expected them in ascending order")
    _check_devices(mesh, sharded.values())
    return mesh


def _check_devices(mesh: Any, parameters: Iterable[Tensor]) -> None:
    devices = {p.device.type for p in parameters}
    if devices != {mesh.device_type}:
        raise ValueError(
            f"parameters are on {', '.join(sorted(devices))}, and their mesh is of {mesh.device_type}, where A and G "
            "are made: expected them there, neither left with the CPU by CPUOffloadPolicy nor still on meta"
        )


def _picked(tensors: Mapping[Tensor, Tensor], some: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    return [tensors[some[i]] for i in places]


def _dim(p: Any) -> int:
    return p.placements[-1].dim


def _dtypes(holders: Holders) -> list[torch.dtype]:
    """In the order of the parameters."""
    return list(dict.fromkeys(p.dtype for p in holders))
