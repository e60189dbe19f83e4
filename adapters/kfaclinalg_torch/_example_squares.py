"""The squares of the gradients of single examples along the eigenvectors, of every kind of layer.

Of an embedding no more is formed than the rows of the words that an example has. Of tied weights, and of a
normalisation, each use adds a part to the gradient of an example, which is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import add
from typing import Any

import torch
from torch import Tensor

from kfaclinalg import KroneckerEigen

from ._blocks import Block, Dense, Rows
from ._embedding import Embedding
from ._forms import in_basis
from ._layer import Layer
from ._masks import spread
from ._rows import rows_of
from ._squares import BUFFER, by_pass, projected, squared_gradients
from ._statistics import Statistic
from ._use import Use

Uses = Sequence[tuple[Use, Tensor]]  # of one block in one pass, with the gradients at their outputs
Part = Callable[[slice], Tensor]  # of some of the examples what a block adds to Q_Gᵀ ∇W Q_A (k, ..., m, n)


def shows_gradients(layer: Layer) -> bool:
    """Whether its blocks say what the gradient of one example is."""
    return all(type(block).gradients is not Block.gradients for block in layer.blocks)


def squares_of_examples(statistic: Statistic, layer: Layer, F: KroneckerEigen) -> Tensor | None:
    """Σ (Q_Gᵀ ∇W Q_A)² over the examples, elementwise, ∇W being the gradient of one example: (..., m, n)."""
    if layer.dense is not None:
        return squared_gradients(statistic, layer.dense, F.Q_A, F.Q_B)
    total: Any = None
    for pairs in (pairs for draws in by_pass(statistic) for pairs in draws):
        uses = {block: [pair for pair in pairs if pair[0].block is block] for block in layer.blocks}
        if shown := {block: own for block, own in uses.items() if own}:
            squares = _of_one_draw(statistic, layer, shown, F)
            total = squares if total is None else total + squares
    return total


def _of_one_draw(statistic: Statistic, layer: Layer, uses: Mapping[Block, Uses], F: KroneckerEigen) -> Tensor:
    first = layer.blocks[0]
    if len(layer.blocks) == 1 and isinstance(first, Embedding) and statistic.sharing[first.name] == "expand":
        x, g = _words(statistic, first, uses[first])
        return _of_words(x, projected(g, F.Q_B), len(first.weight)).mT
    parts = [_part(statistic, block, own, F, block.turned != first.turned) for block, own in uses.items()]
    eigenvalues: Any = F.eigenvalues
    total, N = torch.zeros_like(eigenvalues), next(iter(uses.values()))[0][0].examples()
    step = max(1, BUFFER // max(1, total.numel()))
    for i in range(0, N, step):
        formed: Any = sum(part(slice(i, i + step)) for part in parts)
        total += formed.square().sum(0)
    return total


def _of_words(x: Tensor, g: Tensor, V: int) -> Tensor:
    """Σ over the examples of (Σ e_x gᵀ)² (V, m), of words x (N, R) and rows g (N, R, m)."""
    cells, place = torch.unique(x + V * torch.arange(len(x), device=x.device)[:, None], return_inverse=True)
    rows = g.new_zeros(len(cells), g.shape[-1]).index_add_(0, place.flatten(), g.flatten(0, 1))
    return g.new_zeros(V, g.shape[-1]).index_add_(0, cells % V, rows.square())


def _part(statistic: Statistic, block: Block, uses: Uses, F: KroneckerEigen, turned: bool) -> Part:
    """That of a block; `turned` where its W is the transpose of the layer's."""
    if turned:
        straight = _part(statistic, block, uses, KroneckerEigen(F.Q_B, F.Q_A, F.eigenvalues.mT), False)
        return lambda at: straight(at).mT
    if statistic.sharing[block.name] == "reduce" and isinstance(block, Rows):
        a, g = _pooled(statistic, block, uses)
        return lambda at: in_basis(F, g[at][..., :, None] * a[at][..., None, :])
    if isinstance(block, Embedding):
        x, g = _words(statistic, block, uses)
        s, index = projected(g, F.Q_B), x[..., None].expand(g.shape)
        V = len(block.weight)
        return lambda at: s.new_zeros(len(s[at]), V, s.shape[-1]).scatter_add_(1, index[at], s[at]).mT
    if isinstance(block, Dense):
        rows: Any = rows_of(statistic, block, uses)
        a, g = projected(rows.a, F.Q_A), projected(rows.g, F.Q_B)
        return lambda at: g[at].mT @ a[at]
    gradients = [block.gradients(*use.pair(g, statistic.dtype), use.examples()) for use, g in uses]
    return lambda at: in_basis(F, torch.stack([V[at] for V in gradients]).sum(0))


def _words(statistic: Statistic, block: Embedding, uses: Uses) -> tuple[Tensor, Tensor]:
    """The words (N, R) of all uses, and the gradients (N, R, m) at what stands for them."""
    found = []
    for use, g in uses:
        N, (x, s) = use.examples(), use.pair(g, statistic.dtype)
        found.append((x.reshape(N, -1), block.outputs(x, s, N)))
    x, g = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return x, g


def _pooled(statistic: Statistic, block: Rows, uses: Uses) -> tuple[Tensor, Tensor]:
    """One row for each example: the mean of a over the positions that count, and the sum of g."""
    total: Any = 0, 0, 0
    for use, slopes in uses:
        N, (x, s) = use.examples(), use.pair(slopes, statistic.dtype)
        a, positions = block.pooled_inputs(x, N, use.mask)
        total = tuple(map(add, total, (a.to(s.dtype), block.outputs(x, s, N).sum(1), positions)))
    a, g, positions = total
    return a / (spread(positions.clamp(min=1), a.ndim) if isinstance(positions, Tensor) else positions), g
