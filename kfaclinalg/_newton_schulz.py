"""The Newton-Schulz iteration for M⁻¹: arrays beneath `spd.newton_schulz_inverse`."""

from __future__ import annotations

from . import _backends
from ._backends import Array, ArrayT


@_backends.in_full_precision
def inverse(b: _backends.Backend, M: ArrayT, start: Array | None, iterations: int, tolerance: float) -> ArrayT:
    """X <- X (2 I - M X), NaN for a member that ends with ‖I - M X‖_F above `tolerance`."""
    xp, I = b.xp, b.eye(M.shape[-1])
    d = xp.linalg.diagonal(M)
    proper = xp.all(xp.isfinite(M), axis=(-2, -1)) & xp.all(d > 0, axis=-1)
    M = _backends.symmetrised(xp.where(proper[..., None, None], M, I))
    # The unknown is the inverse of H = D^-½ M D^-½, better conditioned; where an entry exceeds the diagonal's 1, M is
    # not definite.
    root = xp.sqrt(xp.linalg.diagonal(M))
    scale = root[..., :, None] * root[..., None, :]
    H = M / scale
    proper = proper & xp.all(xp.abs(H) < 2, axis=(-2, -1))
    H = xp.where(proper[..., None, None], H, I)
    X = _start(b, H, None if start is None else _backends.symmetrised(start) * scale)
    for _ in range(iterations):
        R = I - H @ X
        bounded = xp.linalg.matrix_norm(R) < 1 / b.eps  # where M is not definite R may grow: NaN before it overflows
        X = xp.where(bounded[..., None, None], X + X @ R, _backends.NAN)
    X = X / scale  # not symmetrised: that would square the condition number in I - M X
    accepted = proper & (xp.linalg.matrix_norm(I - M @ X) <= tolerance)
    return xp.where(accepted[..., None, None], X, _backends.NAN)


def _start(b: _backends.Backend, H: Array, earlier: Array | None) -> Array:
    """I / ‖H‖ or, where that must converge, the best multiple a of the earlier inverse, which must be definite.

    H times a definite matrix has real eigenvalues μ, with the signs of those of H: from here the iteration converges if
    and only if all are in (0, 2), and then H is definite. Σ (1 - a μ)² = n - 2 a tr P + a² tr P² < 1 is enough.
    """
    xp, n, norm = b.xp, H.shape[-1], b.xp.linalg.matrix_norm
    cold = b.eye(n) / xp.minimum(norm(H), norm(H, ord=1))[..., None, None]  # both bound the largest eigenvalue
    if earlier is None:
        return cold
    finite = xp.all(xp.isfinite(earlier), axis=(-2, -1))[..., None, None]
    earlier = xp.where(finite, earlier, -b.eye(n))
    definite = xp.all(xp.linalg.diagonal(_backends.cholesky(earlier)) > 0, axis=-1)
    P = H @ earlier
    trace, square = xp.linalg.trace(P), xp.sum(P * P.mT, axis=(-2, -1))
    near = definite & (square > 0) & (n * square - trace * trace < square)
    a = trace / xp.where(near, square, 1.0)
    return xp.where(near[..., None, None], a[..., None, None] * earlier, cold)
