"""The sums of a statistic that travel beside the loss's backward pass, before the step that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._grid import subgroup
from ._reduction import departed
from ._team import Team


class Ahead:
    """What is known of the next statistic: the blocks that the last one showed, and after how many updates.

    It is the same in all processes. After as many updates, in the order of the blocks' names and in a process group of
    their own, the sums of these blocks leave, whatever this process has seen; who has had fewer by the time of the step
    follows then. What comes later travels in the step.
    """

    def __init__(self, team: Team) -> None:
        self.all, self.team = team, None if team.size == 1 else team
        self.forget()

    def forget(self) -> None:
        """The next statistic travels in its step."""
        self.names: frozenset[str] = frozenset()
        self.updates = 0

    def learn(self, statistic: Any) -> None:
        """From a statistic over all processes; they make their group together."""
        if self.team is self.all and statistic.steady:
            self.team = subgroup([self.all.global_rank(rank) for rank in range(self.all.size)], self.all)
        self.names, self.updates = frozenset(statistic.rows), statistic.steady

    def leave(self, statistic: Any, owners: Mapping[str, int], wire: torch.dtype) -> None:
        """The sums leave, where they have not."""
        if not self.updates or statistic.early is not None or self.team is None:
            return
        blocks = [block for block in sorted(statistic.all, key=lambda b: b.name) if block.name in self.names]
        statistic.early = departed(self.team, statistic, blocks, 1.0, owners, wire)
        statistic.left = {block: statistic.sums.pop(block) for block in blocks if block in statistic.sums}

    def undone(self, statistic: Any) -> None:
        """A step was not taken: the statistic is whole again, and nothing leaves early any more."""
        if statistic.early is not None:
            statistic.early = None
            for block, sums in statistic.left.items():
                whole = sums.whole()
                statistic.add_sums(block, whole.A, whole.rows, whole.G)
            statistic.left = {}
        self.team = None  # whether or not this process had sent any
        self.forget()
