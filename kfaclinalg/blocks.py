"""Operators on a whole network: tuples (V_1, ..., V_l) of one matrix a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

from . import _array


@dataclass(frozen=True, eq=False, slots=True)
class BlockDiagonal:
    """diag(blocks): one operator a layer, each on its own V_i (Section 4.2).

    Raises:
        TypeError, ValueError: no block, or a tuple of another length than the blocks.

    >>> import numpy as np
    >>> from kfaclinalg import Kronecker
    >>> F = BlockDiagonal((Kronecker(np.eye(1), 2 * np.eye(1)), Kronecker(np.eye(1), 4 * np.eye(1))))
    >>> F.inverse() @ (np.ones((1, 1)), np.ones((1, 1)))
    (array([[0.5]]), array([[0.25]]))
    """

    blocks: tuple[Any, ...]
    __array_ufunc__: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, tuple) or not self.blocks:
            raise ValueError(f"blocks is {self.blocks!r}, expected a tuple of one operator or more")

    def apply(self, Vs: Sequence[Any], /) -> tuple[Any, ...]:
        """(block_1 @ V_1, ..., block_l @ V_l)."""
        return tuple(block @ V for block, V in self._pairs(Vs))

    __matmul__ = apply

    def inverse(self) -> BlockDiagonal:
        """The block-diagonal operator of the blocks' inverses."""
        return BlockDiagonal(tuple(block.inverse() for block in self.blocks))

    def solve(self, Vs: Sequence[Any], /) -> tuple[Any, ...]:
        """Each block's `solve` of its V: backward stable, for one-off use."""
        return tuple(block.solve(V) for block, V in self._pairs(Vs))

    def logdet(self) -> Any:
        """Σ log det block_i (...)."""
        return reduce(add, (block.logdet() for block in self.blocks))

    def trace(self) -> Any:
        """Σ tr block_i (...)."""
        return reduce(add, (block.trace() for block in self.blocks))

    def diagonal(self) -> tuple[Any, ...]:
        """The blocks' diagonals, shaped like the Vs."""
        return tuple(block.diagonal() for block in self.blocks)

    def to_dense(self) -> Any:
        """The matrix that acts on the stacked vec(V_i), zero outside the diagonal blocks."""
        return _assembled([block.to_dense() for block in self.blocks])

    def _pairs(self, Vs: Sequence[Any]) -> Any:
        if len(Vs) != len(self.blocks):
            raise ValueError(f"got {len(Vs)} matrices, expected {len(self.blocks)}, one a block")
        return zip(self.blocks, Vs, strict=True)


def _assembled(blocks: Sequence[Any]) -> Any:
    """diag(blocks) (..., Σ n_i, Σ n_i) of matrices (..., n_i, n_i)."""
    b = _array.resolve(**{f"blocks[{i}]": block for i, block in enumerate(blocks)})
    total, before, rows = sum(block.shape[-1] for block in blocks), 0, []
    for block in blocks:
        *batch, n, _ = block.shape
        widths = (before, total - before - n)
        left, right = (b.xp.zeros((*batch, n, width), dtype=b.dtype, device=b.device) for width in widths)
        rows.append(b.xp.concat([left, block, right], axis=-1))
        before += n
    return b.xp.concat(rows, axis=-2)
