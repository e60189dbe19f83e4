"""The part of a mini-batch that a process has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from ._batch import Batch
from ._masks import check_count, mask_of
from ._team import Team


class Part(Batch):
    """This process's examples of a batch of all, `where` in it, of so many in the `whole`; there may be none."""

    fewest = 0
    where: Tensor
    whole: int

    def subset(self, fraction: float, generator: torch.Generator) -> Part:
        """Those of a random fraction of the whole batch that are this process's: there may be none."""
        size = max(1, round(fraction * self.whole))
        if size == self.whole:
            return self
        order = torch.randperm(self.whole, generator=generator, device=generator.device)[:size].cpu()
        first = int(self.where[0]) if len(self) else 0
        own = ((order >= first) & (order < first + len(self))).nonzero()[:, 0]
        found = Part(self.inputs, self.targets, self.mask, (order[own] - first).to(self.targets.device))
        found.where, found.whole = own, size
        return found

    def chunks(self, size: int | None) -> Iterator[tuple[float, Batch]]:
        for place, (share, piece) in enumerate(super().chunks(size) if len(self) else ()):
            start = place * (size or len(self))
            part = Part(piece.inputs, piece.targets, piece.mask, place=piece.place)
            part.where, part.whole = self.where[start : start + len(piece)], self.whole
            yield share, part


def batch_of(team: Team, inputs: Any, targets: Tensor, mask: Any, mask_from: Any) -> Batch:
    """What a process was given, and which positions of it count; `mask_from` gives that where no mask is."""
    kind = Batch if team.size == 1 else Part
    batch = kind(inputs, targets)
    given = batch.call(mask_from) if mask is None and mask_from is not None else mask
    return kind(inputs, targets, mask_of(given, (), {}))


def part_of(team: Team, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch as a part of that of all processes, one after the other; the random numbers are the first one's.

    Raises:
        ValueError: there are no examples, or of none a position counts.
    """
    told = team.told((len(batch), batch.counted), "the sizes of the parts")
    if not any(size for size, _ in told):
        raise ValueError("inputs and targets have no examples in any process, expected some")
    check_count(sum(counted for _, counted in told))
    if team.size == 1:
        return batch
    sizes = [size for size, _ in told]
    same_draws(team, generator, 0)
    part = Part(batch.inputs, batch.targets, batch.mask)
    part.where, part.whole = torch.arange(len(batch)) + sum(sizes[: team.rank]), sum(sizes)
    return part


def same_draws(team: Team, generator: torch.Generator, rank: int) -> None:
    """The random numbers go on as those of this process."""
    state = generator.get_state().to(team.device)
    with team.waiting("the random numbers"):
        distributed.broadcast(state, team.global_rank(rank), group=team.group)
    generator.set_state(state.cpu())
