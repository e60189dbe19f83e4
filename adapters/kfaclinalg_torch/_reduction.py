"""The moments of a statistic, summed over the processes that each saw a part of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import Diagonal, LayerFactors

from ._blocks import Block
from ._wire import Form, reduced

Totals = Sequence[tuple[Block, Tensor, Tensor]]  #: Σ a aᵀ and Σ g gᵀ of each block


def totals(statistic: Any, scale: float) -> Totals:
    """What this process has seen of every block, in an order that all processes share."""
    statistic.complete()
    blocks = sorted(statistic.all, key=lambda block: block.name)
    for block in blocks:
        if not isinstance(getattr(statistic.sums.get(block), "A", None), Tensor):
            A, G = block.empty_moments()
            statistic.add_sums(block, A.to(statistic.dtype), 0, G.to(statistic.dtype))
    return [(block, statistic.sums[block].A, scale**2 * statistic.sums[block].G) for block in blocks]


def shared(
    statistic: Any, sums: Totals, owners: Mapping[str, int] | None = None, wire: torch.dtype | None = None
) -> dict[str, LayerFactors]:
    """A and G over all processes, of the blocks that this one owns, or that have no owner, by their names.

    What nobody has seen is left out; `statistic.shown` is what any process has. `wire` is the dtype on the way.
    """
    team, dtype, work = statistic.team, statistic.dtype, statistic.work
    seen = [statistic.sums[block].rows for block, *_ in sums]
    _, (N, model, added, *rows) = team.sums([], [statistic.examples, *work, *seen])
    statistic.work = type(work)(model // team.size, added // team.size)
    sides = [(block.name, r, M) for (block, *pair), r in zip(sums, rows, strict=True) if r for M in pair]
    statistic.shown = {name for name, *_ in sides}
    forms = [Form(tuple(M.shape), "symmetric" if M.ndim > 1 else "plain") for *_, M in sides]
    to = [(owners or {}).get(name) for name, *_ in sides]
    found: dict[str, list[Any]] = {}
    for i, M in reduced(team, to, forms, [M for *_, M in sides], wire or dtype):
        name, r, _ = sides[i]
        mean = M.to(dtype) / (max(N, 1) if i % 2 else r)
        found.setdefault(name, []).append(Diagonal(mean) if mean.ndim == 1 else mean)
    return {name: LayerFactors(*pair) for name, pair in sorted(found.items())}
