"""Symmetric sums that grow in place: products from the diagonal on, a panel of rows at a time, and what mirrors them.

Little more than half of the multiply-adds of a product of matrices are left, at its rate, and nothing is made but the
sum.
"""

from __future__ import annotations

from torch import Tensor

# MKL's float32 product of fewer than 12 columns sums its rows one by one and loses 2e-5 over 150 000: pieces lose 1e-7.
NARROW, PIECE = 16, 4096
PANEL = 128  # rows that one product makes from the diagonal on, or nearly twice as many


def add_moment(total: Tensor, a: Tensor) -> None:
    """total += a aᵀ for a (g, n, rows), on and above the diagonal of total (g, n, n)."""
    width = width_of(total.shape[-1])
    for i in range(0, total.shape[-1], width):
        add_product(total[:, i : i + width, i:], a[:, i : i + width], a[:, i:])


def add_product(total: Tensor, X: Tensor, Y: Tensor, scale: int = 1) -> None:
    """total += scale X Yᵀ, a group at a time: (g, w, rows) twice and (g, w, w)."""
    if total.shape[-1] >= NARROW:
        total.baddbmm_(X, Y.mT, alpha=scale)
        return
    for x, y in zip(X.split(PIECE, dim=2), Y.split(PIECE, dim=2), strict=True):
        total.add_(x @ y.mT, alpha=scale)


def mirrored(M: Tensor) -> Tensor:
    """M (..., n, n), from what it holds on and above its diagonal, in its place."""
    width = width_of(M.shape[-1])
    for i in range(0, M.shape[-1], width):
        j = i + width
        square = M[..., i:j, i:j].triu()
        M[..., i:j, i:j] = square + square.triu(1).mT
        M[..., j:, i:j] = M[..., i:j, j:].mT
    return M


def width_of(n: int) -> int:
    """Rows of a panel, of n: about as many in each, so that the last is not narrow."""
    return -(-n // max(1, n // PANEL))


def flops_of(n: int) -> int:
    """Those of `add_moment`, a row of n."""
    return n * (n + width_of(n))
