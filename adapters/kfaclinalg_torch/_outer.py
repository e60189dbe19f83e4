"""The gradient of a layer as the batch gives it, Σ g aᵀ, where `p.grad` is that (the end of Section 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfaclinalg import OuterProduct

from ._blocks import Dense
from ._use import Use


def outer_gradient(
    block: Dense, uses: Sequence[tuple[Use, Tensor]], gradient: Tensor, seed: int
) -> OuterProduct | None:
    """The `OuterProduct` of what the loss's backward pass showed; None if the gradient is not that, or that is dearer.

    `p.grad` may hold more: a penalty on the weights, another process's share, what was clipped or scaled since. Random
    signs r tell, since ‖(∇W - Σ g aᵀ) r‖² is ‖∇W - Σ g aᵀ‖² on average. What is let pass is of the order of the
    rounding of ∇W and of the products with r, eps √(N + n) √(Σ ‖g‖² ‖a‖²) for N terms.
    """
    rows = [_rows(block, use, g) for use, g in uses]
    a, g = (_joined(side) for side in zip(*rows, strict=True))
    if not OuterProduct.pays((g.shape[1], a.shape[1]), len(a)):
        return None
    r = torch.randint(2, (a.shape[1],), generator=torch.Generator().manual_seed(seed)).to(a.dtype) * 2 - 1
    excess = gradient @ r - g.mT @ (a @ r)
    lengths = torch.linalg.vecdot(a, a) @ torch.linalg.vecdot(g, g)
    rounding = torch.finfo(a.dtype).eps * ((len(a) + a.shape[1]) * lengths).sqrt()
    return OuterProduct(g.mT, a.mT) if bool(torch.linalg.vector_norm(excess) <= rounding) else None


def _rows(block: Dense, use: Use, g: Tensor) -> tuple[Tensor, Tensor]:
    """a (N, n) and g (N, m), of all positions."""
    N, (x, s) = use.examples(), use.pair(g, g.dtype)
    return block.inputs(x, N).flatten(0, 1), block.outputs(x, s, N).flatten(0, 1)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
