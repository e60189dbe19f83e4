"""One statistic: the second moments of all that is captured between two steps, as if it were one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfaclinalg import Diagonal, LayerFactors

from ._blocks import LARGEST, Block, Dense, Rows, second_moment
from ._entries import Entries
from ._masks import spread
from ._reduction import shared
from ._sums import Sums
from ._team import ALONE, Team
from ._use import Pass, Use


class Work(NamedTuple):
    """Flops of a process: of the model's own forward and backward passes, and of the statistic."""

    model: int = 0
    statistic: int = 0


class Held(NamedTuple):
    """The rows themselves, A = E[a aᵀ] and G = E[g gᵀ] over them, where they take no more room than A and G twice."""

    a: Tensor
    g: Tensor


class Statistic:
    """Sums over the examples of A and G for each of the blocks; `sharing` gives "expand" or "reduce" by their names.

    The gradients of one `draw` of targets go together: where weights are shared, those of an example are parts of one.
    `uses` are kept where more than A and G is made of them.
    """

    def __init__(
        self, blocks: Sequence[Block], sharing: Mapping[str, str], dtype: torch.dtype, keep: bool, team: Team = ALONE
    ) -> None:
        self.all, self.sharing, self.dtype, self.keep, self.team = blocks, sharing, dtype, keep, team
        self.rows: dict[str, int] = {}  # of each block by its name, over all processes
        self.sums: dict[Block, Sums] = {}
        self.uses: dict[tuple[int, int], list[tuple[Use, Tensor]]] = {}
        self._rows: dict[Any, tuple[Use, Tensor]] = {}
        self._pooled: dict[Any, tuple[Any, Any, int]] = {}
        self._passes: dict[int, int] = {}
        self.work = Work()
        self.updates, self.steady, self.early = 0, 0, None
        self.left: dict[Block, Sums] = {}  # that have left early

    @property
    def blocks(self) -> set[Block]:
        """Those that have shown something."""
        return self.sums.keys() | self._rows.keys() | {key[0] for key in self._pooled}

    @property
    def empty(self) -> bool:
        return not self._passes

    @property
    def examples(self) -> int:
        return sum(self._passes.values())

    def add(self, use: Use, g: Tensor, draw: int = 0) -> None:
        """One use of a block, and the gradient at its outputs for one draw of the targets."""
        block: Any = use.block
        N, (x, s) = use.examples(), use.pair(g, self.dtype)
        self.saw(use.of)
        self._count(block, x, N, draw)
        if self.keep:
            self.uses.setdefault((use.of.number, draw), []).append((use, g))
        if self.sharing[block.name] == "reduce" and isinstance(block, Rows):
            pooled = block.pooled_inputs(x, N, use.mask)
            self._pool((block, use.of.number, N, draw), pooled, block.outputs(x, s, N).sum(1))
        elif self._holds(use, s):
            self._rows[block] = use, g
        else:
            self.fold(block)
            if sums := self.sums.get(block):
                sums.show(block, x, s, N, use.mask, draw)
            else:
                A, rows = block.input_moment(x, N, use.mask) if draw == 0 else (None, 0)
                self.add_sums(block, A, rows, block.output_moment(x, s, N))

    def add_entries(self, block: Entries, g: Tensor) -> None:
        """The gradient of a parameter in the sum of the losses of passes that it `saw`."""
        g = g.detach().to(self.dtype)
        self.add_sums(block, g.new_ones(1, 1), 1, block.output_moment(g, g, 1))

    def _count(self, block: Block, x: Tensor, N: int, draw: int) -> None:
        """Three products with W, and in the statistic one more for each draw; Σ a aᵀ once, Σ g gᵀ for each draw."""
        if not isinstance(block, Dense):
            return
        (*groups, m, n), rows = block.shape, prod(block.positions(x))
        of_input = n if n > LARGEST and not groups else block.input_work(n)
        of_output = m if m > LARGEST and not groups else m * m
        moments = of_output + (of_input if draw == 0 else 0)
        reduced = N if self.sharing[block.name] == "reduce" else rows
        W, (model, statistic) = prod(block.shape), self.work
        statistic += 2 * rows * W + reduced * prod(groups) * moments
        self.work = Work(model + (6 * rows * W if draw == 0 else 0), statistic)

    def saw(self, of: Pass) -> None:
        if of.number not in self._passes:
            self._passes[of.number] = of.counted

    def moments(self, scale: float) -> dict[str, LayerFactors | Held]:
        """A and G of each block by its name, over all processes; with several, of those that this one owns.

        `scale` takes a captured gradient to that of one example's loss.
        """
        if self.team.size > 1:
            with self.team.agreed("the factors"):
                self.complete()
            return dict(shared(self, scale, {}, self.dtype))
        self.unpool()
        N = self.examples
        self.rows = {block.name: sums.rows for block, sums in self.sums.items() if sums.rows}
        found: dict[str, LayerFactors | Held] = {
            block.name: LayerFactors(
                _as_side(sums.A.to(self.dtype) / sums.rows), _as_side(scale**2 * sums.G.to(self.dtype) / max(N, 1))
            )
            for block, sums in ((block, sums.whole()) for block, sums in self.sums.items())
            if sums.rows
        }
        for block, (use, g) in self._rows.items():
            x, s = use.pair(g, self.dtype)
            a, rows = block.inputs(x, N := use.examples()).flatten(0, 1), block.outputs(x, s, N).flatten(0, 1)
            self.rows[block.name] = len(a)
            found[block.name] = Held(a, rows * (scale * (len(a) / self.examples) ** 0.5))
        return dict(sorted(found.items()))

    def settle(self, device: torch.device | None = None) -> None:
        """Keep the sums alone, on this device where one is given: what was shown so far is complete."""
        self.complete()
        self.uses = {}
        if device is not None:
            for sums in self.sums.values():
                sums.move(device)

    def complete(self) -> None:
        """All that was shown is in the sums."""
        for block in list(self._rows):
            self.fold(block)
        self.unpool()

    def unpool(self) -> None:
        """Into the sums with what was pooled."""
        for (block, *_, draw), (a, g, positions) in self._pooled.items():
            pooled, count = _mean_moment(block, a, positions) if draw == 0 else (None, 0)
            self.add_sums(block, pooled, count, second_moment(g))
        self._pooled = {}

    def _holds(self, use: Use, g: Tensor) -> bool:
        """Whether its rows wait for the average."""
        if not isinstance(use.block, Dense) or use.mask is not None or self.keep or use.block in self.blocks:
            return False
        *groups, m, n = use.block.shape
        rows = g.numel() // m
        return not groups and max(m, n) < LARGEST and rows * (n + m) <= 2 * (n * n + m * m)

    def fold(self, block: Block) -> None:
        """Into the sums with the rows of a block, where any are held."""
        if block in self._rows:
            use, g = self._rows.pop(block)
            N, (x, s) = use.examples(), use.pair(g, self.dtype)
            self.add_sums(block, *block.input_moment(x, N), block.output_moment(x, s, N))

    def add_sums(self, block: Block, A: Any, rows: int, G: Any) -> None:
        if sums := self.sums.get(block):
            sums.add(A, rows, G)
        else:
            self.sums[block] = Sums(A, rows, G)

    def _pool(self, key: Any, pooled: tuple[Tensor, Any], g: Tensor) -> None:
        a, positions = pooled
        a_old, g_old, before = self._pooled.get(key, (0.0, 0.0, 0))
        self._pooled[key] = (a_old + a, g_old + g, before + positions)


def _mean_moment(block: Rows, a: Tensor, positions: Any) -> tuple[Tensor, int]:
    """Σ ā āᵀ over the examples, of the means ā over the positions that count, and how many examples have any."""
    if not isinstance(positions, Tensor):
        return block.pooled_moment(a / positions), len(a)
    a = a / spread(positions.clamp(min=1), a.ndim)
    return block.pooled_moment(a), int((positions > 0).sum())


def _as_side(M: Tensor) -> Any:
    return Diagonal(M) if M.ndim == 1 else M
