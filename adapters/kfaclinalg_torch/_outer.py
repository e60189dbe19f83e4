"""The gradient of a linear layer as the batch gives it, Σ g aᵀ, where `p.grad` is that (the end of Section 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfaclinalg import OuterProduct

from ._capture import Use
from ._linear import Linear


def outer_gradient(block: Linear, uses: Sequence[tuple[Use, Tensor]], seed: int) -> OuterProduct | None:
    """The `OuterProduct` of what the loss's backward pass showed; None if the gradient is not that, or that is dearer.

    `p.grad` may hold more: a penalty on the weights, another process's share, what was clipped or scaled since. Random
    signs r tell, since ‖(∇W - Σ g aᵀ) r‖² is ‖∇W - Σ g aᵀ‖² on average. What is let pass is of the order of the
    rounding of ∇W and of the products with r, eps √(N + n) √(Σ ‖g‖² ‖a‖²) for N terms.
    """
    dtype = uses[0][1].dtype
    pairs = [use.pair(g, dtype) for use, g in uses]
    a, g = _joined([block.inputs(x, len(x))[:, 0] for x, _ in pairs]), _joined([g for _, g in pairs])
    if not OuterProduct.pays((g.shape[1], a.shape[1]), len(a)):
        return None
    r = torch.randint(2, (a.shape[1],), generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 - 1
    excess = -(g.mT @ (a @ r))
    for gradient in (p.grad for p in block.parameters if p.grad is not None):
        excess = excess + (gradient @ r[: gradient.shape[1]] if gradient.ndim > 1 else gradient * r[-1])
    lengths = torch.linalg.vecdot(a, a) @ torch.linalg.vecdot(g, g)
    rounding = torch.finfo(dtype).eps * ((len(a) + a.shape[1]) * lengths).sqrt()
    return OuterProduct(g.mT, a.mT) if bool(torch.linalg.vector_norm(excess) <= rounding) else None


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
