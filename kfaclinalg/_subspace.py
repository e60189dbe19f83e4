"""Eigenpairs of the largest magnitude of one symmetric matrix, by subspace iteration: arrays beneath `low_rank`."""

from __future__ import annotations

from math import pi
from typing import Any

from . import _backends, _checks

OVERSAMPLING = 5  # columns beyond the rank: they speed up the convergence, and find what a start has never seen
PRIME, MULTIPLIER = 32749, 20239  # below 2^15, so that products fit int32; their ratio is the golden one


@_backends.in_full_precision
def dominant_eigenpairs(b: _backends.Backend, M: Any, rank: int, iterations: int, start: Any | None) -> tuple[Any, Any]:
    """U (..., n, rank) with orthonormal columns and s (..., rank), in descending magnitude. NaN where M is not finite.

    Q <- the Q of M Q, `iterations` times, then Rayleigh-Ritz: the eigenpairs of Qᵀ M Q. What is missing shrinks by
    |λ_(k+6) / λ_i| an iteration for the i-th pair. `start` (..., n, rank) spans what Q begins with, where it is finite.
    """
    xp, n = b.xp, M.shape[-1]
    if n == 0:
        return M, xp.sum(M, axis=-1)
    finite = xp.all(xp.isfinite(M), axis=(-2, -1), keepdims=True)
    size = xp.max(xp.abs(M), axis=(-2, -1), keepdims=True)
    size = xp.where(finite & (size > 0), size, 1.0)  # divided by it no product overflows
    M = xp.where(finite, M, b.eye(n)) / size
    Q = _orthonormal(b, _begin(b, M, rank, start))
    for _ in range(iterations):
        Q = _orthonormal(b, M @ Q)
    w, P = _backends.eigh(Q.mT @ (M @ Q))
    order = xp.argsort(xp.abs(w), axis=-1, descending=True)[..., :rank]
    P = xp.take_along_axis(P, xp.broadcast_to(order[..., None, :], (*P.shape[:-1], rank)), axis=-1)
    s = xp.take_along_axis(w, order, axis=-1) * size[..., 0]
    return xp.where(finite, Q @ P, _backends.NAN), xp.where(finite[..., 0], s, _backends.NAN)


def _orthonormal(b: _backends.Backend, X: Any) -> Any:
    return b.xp.linalg.qr(X)[0]


def _begin(b: _backends.Backend, M: Any, rank: int, start: Any | None) -> Any:
    """`start`, or without one as many columns of `_mixing`, and OVERSAMPLING columns more of that."""
    xp, n = b.xp, M.shape[-1]
    X = _mixing(b, n, min(rank + OVERSAMPLING, n))
    if start is None:
        return xp.broadcast_to(X, (*M.shape[:-1], X.shape[-1]))
    batch = _checks.common_batch(M.shape[:-2], start.shape[:-2])
    usable = xp.all(xp.isfinite(start), axis=(-2, -1), keepdims=True)
    known = xp.broadcast_to(xp.where(usable, start, X[:, :rank]), (*batch, n, rank))
    return xp.concat([known, xp.broadcast_to(X[:, rank:], (*batch, n, X.shape[-1] - rank))], axis=-1)


def _mixing(b: _backends.Backend, n: int, k: int) -> Any:
    """cos(2π g (i³ + j i) / p), i = 1, ..., n and j = 0, ..., k - 1: a fixed matrix that looks random.

    Alltop's cubic phases (IEEE Trans. Inf. Theory 26, 1980): columns as incoherent with each other and with sinusoids
    as can be, and no entry is zero. Integers modulo a prime give every backend and dtype the same matrix.
    """
    xp = b.xp
    i, j = (xp.arange(start, start + size, dtype=xp.int32, device=b.device) % PRIME for start, size in ((1, n), (0, k)))
    i = i[:, None]
    phase = (((i * i % PRIME) * i + i * j % PRIME) % PRIME) * MULTIPLIER % PRIME
    return xp.cos(xp.astype(phase, b.dtype) * (2 * pi / PRIME))
