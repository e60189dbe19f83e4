"""The moments of a statistic, summed over the processes that each saw a part of the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfaclinalg import Diagonal, LayerFactors

from ._blocks import Block
from ._team import Team
from ._wire import Form, Way, arrived, reduced

WHAT = "the statistics"


class Trip(NamedTuple):
    """Σ a aᵀ and Σ g gᵀ of some blocks on their way; an error of making them comes with them."""

    blocks: Sequence[Block]
    forms: list[Form]
    ways: list[Way]
    failure: Exception | None
    team: Team

    def sums(self) -> Iterator[tuple[tuple[str, int], Tensor]]:
        """((name, 0 or 1), sum over the processes) of what is this one's."""
        for i, M in arrived(self.team, self.forms, self.ways, WHAT):
            yield (self.blocks[i // 2].name, i % 2), M
        if self.failure is not None:
            raise self.failure


def departed(
    team: Team, statistic: Any, blocks: Sequence[Block], scale: float, to: Mapping[str, int], wire: torch.dtype
) -> Trip:
    """What this process has seen of these blocks goes to who owns them, or to all. What it has not seen is zero."""
    forms = [_form(M) for block in blocks for M in block.empty_moments()]

    def make(places: list[int]) -> list[Tensor]:
        return [_side(statistic, blocks[i // 2], i % 2, scale, forms[i], team) for i in places]

    owners = [to.get(block.name) for block in blocks for _ in "AG"]
    return Trip(blocks, forms, *reduced(team, owners, forms, make, wire, WHAT), team)


def shared(
    statistic: Any, scale: float, owners: Mapping[str, int], wire: torch.dtype, early: Trip | None = None
) -> dict[str, LayerFactors]:
    """A and G over all processes, of the blocks that this one owns, or that have no owner, by their names.

    What nobody has seen is left out; `statistic.rows` are of what any process has. All that this one has seen is in its
    sums, or on an `early` trip. `wire` is the dtype on the way.
    """
    team, dtype, work = statistic.team, statistic.dtype, statistic.work
    blocks = sorted(statistic.all, key=lambda block: block.name)
    seen, k = [_rows(statistic, block) for block in blocks], statistic.updates
    counts = [statistic.examples, *work, len(statistic.sums), k, k * k, *seen]
    N, model, added, left, once, twice, *rows = team.sums([], counts, "the counts of the statistics")[1]
    statistic.work = type(work)(model // team.size, added // team.size)
    statistic.steady = once // team.size if once * once == team.size * twice else 0
    of = {block.name: r for block, r in zip(blocks, rows, strict=True) if r and N}
    statistic.rows = of
    trips = [] if early is None else [early]
    if left or not trips:
        trips.append(departed(team, statistic, [b for b in blocks if b.name in of], scale, owners, wire))
    totals: dict[tuple[str, int], Tensor] = {}
    with team.agreed(WHAT):
        for trip in trips:
            for key, M in trip.sums():
                totals[key] = totals[key] + M.to(dtype) if key in totals else M.to(dtype)
    found: dict[str, list[Any]] = {}
    for name, i in sorted(totals):
        M = totals.pop((name, i))
        if name in of:
            mean = M / (max(N, 1) if i else of[name])
            found.setdefault(name, []).append(Diagonal(mean) if mean.ndim == 1 else mean)
    return {name: LayerFactors(*pair) for name, pair in found.items()}


def _form(M: Tensor) -> Form:
    return Form(tuple(M.shape), "symmetric" if M.ndim > 1 else "plain")


def _side(statistic: Any, block: Block, i: int, scale: float, form: Form, team: Team) -> Tensor:
    statistic.unpool()
    statistic.fold(block)
    sums = statistic.sums.get(block)
    M = None if sums is None else sums.whole().G if i else sums.whole().A
    if not isinstance(M, Tensor):
        return torch.zeros(form.shape, dtype=statistic.dtype, device=team.device)
    return scale**2 * M if i else M


def _rows(statistic: Any, block: Block) -> int:
    return sum(sums[block].rows for sums in (statistic.sums, statistic.left) if block in sums)
