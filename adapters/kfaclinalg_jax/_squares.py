"""The squares of the gradients along the eigenvectors of A and G, of which EKFAC's diagonal is the mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kfaclinalg import KroneckerEigen

from ._statistics import Statistics

BUFFER = 2**22  # entries of the gradients of single examples at once


def mean_squares(statistics: Statistics, name: str, F: KroneckerEigen) -> Any:
    """The mean over the examples of (Q_Gᵀ ∇W Q_A)², elementwise, ∇W being the gradient of one: (..., m, n).

    Where the examples are not seen one at a time (normalisations, tied weights) it is what A ⊗ G says of it.
    """
    Q_A: Any = F.Q_A
    Q_G: Any = F.Q_B
    if name not in statistics.rows:
        a, g = (((M @ Q) * Q).sum(-2) for M, Q in zip(statistics.moments[name], (Q_A, Q_G), strict=True))
        return g[..., :, None] * a[..., None, :]
    rows = statistics.rows[name]
    a = jnp.concatenate([x @ Q_A[..., None, :, :] for x in rows.a], axis=-2)  # (*batch, N, R, n)
    g = jnp.concatenate([x @ Q_G[..., None, :, :] for x in rows.g], axis=-2)  # (draws, *batch, N, R, m)
    N, R = a.shape[-3:-1]
    if R == 1:
        return (jnp.square(g[..., 0, :]).sum(0).mT @ jnp.square(a[..., 0, :])) / N
    if g.size // R * a.shape[-1] <= BUFFER:
        return jnp.square(g.mT @ a).sum((0, -3)) / N

    def added(total: Any, pair: Any) -> Any:
        x, s = pair
        return total + jnp.square(s.mT @ x).sum(0), None

    zero = jnp.zeros((*a.shape[:-3], g.shape[-1], a.shape[-1]), a.dtype)
    total, _ = jax.lax.scan(added, zero, (jnp.moveaxis(a, -3, 0), jnp.moveaxis(g, -3, 0)))
    return total / N
