"""Helpers for tests of linear algebra: matrices with a prescribed spectrum, dense references, error bounds.

They work on NumPy arrays; random numbers come from the `numpy.random.Generator` that the caller passes. A computed
result is judged against a bound of the form c * eps with c = 10, never against a tolerance chosen to pass:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> M = spd_matrix(spectrum("geometric", 8, condition=1e6), rng)
    >>> B = rng.standard_normal((8, 3))
    >>> bool(backward_error(M, np.linalg.solve(M, B), B) <= solve_bound(8, np.finfo(float).eps))
    True
"""

from __future__ import annotations

from typing import Any

C = 10
SPECTRA = ("geometric", "clustered", "one-tiny", "repeated")


def spectrum(kind: str, n: int, *, condition: float) -> list[float]:
    """n eigenvalues between 1/condition and 1, both attained where n > 1.

    "geometric" spaces them evenly on a logarithmic scale, "clustered" puts half of them within 1% of each end,
    "one-tiny" all but one at 1, "repeated" on two values.

    >>> spectrum("one-tiny", 3, condition=100.0)
    [0.01, 1.0, 1.0]
    """
    low = 1 / condition
    if kind == "geometric":
        return [low ** (1 - i / (n - 1)) for i in range(n)] if n > 1 else [1.0] * n
    if kind == "clustered":
        return [low * (1 + 0.01 * i / n) if i < n // 2 else 1 - 0.01 * (n - 1 - i) / n for i in range(n)]
    if kind == "one-tiny":
        return [low, *[1.0] * (n - 1)] if n > 1 else [1.0] * n
    if kind == "repeated":
        return [low if i < n // 2 else 1.0 for i in range(n)]
    raise ValueError(f"kind is {kind!r}, expected one of {', '.join(map(repr, SPECTRA))}")


def spd_matrix(eigenvalues: Any, rng: Any) -> Any:
    """Q diag(eigenvalues) Qᵀ (n, n) with a random orthogonal Q, exactly symmetric; Q is a product of n reflections.

    >>> import numpy as np
    >>> M = spd_matrix([1.0, 4.0], np.random.default_rng(0))
    >>> bool(abs(np.linalg.eigvalsh(M) - [1, 4]).max() < 1e-14)
    True
    """
    n = len(eigenvalues)
    M = rng.standard_normal((n, n)) * 0
    M[range(n), range(n)] = eigenvalues
    for v in rng.standard_normal((n, n)):
        M = M - (2 / (v @ v)) * v[:, None] * (v @ M)
        M = M - (2 / (v @ v)) * (M @ v)[:, None] * v
    return 0.5 * M + 0.5 * M.T


def dense_kronecker(A: Any, B: Any) -> Any:
    """A ⊗ B (n m, n m) entry by entry from its definition, for A (n, n) and B (m, m).

    >>> import numpy as np
    >>> dense_kronecker(np.asarray([[1.0, 2.0], [0.0, 3.0]]), np.asarray([[5.0]]))
    array([[ 5., 10.],
           [ 0., 15.]])
    """
    n, m = A.shape[0], B.shape[0]
    K = (A[:1, :1] * 0).repeat(n * m, 0).repeat(n * m, 1)
    for i in range(n):
        for j in range(n):
            K[i * m : (i + 1) * m, j * m : (j + 1) * m] = A[i, j] * B
    return K


def vec(V: Any) -> Any:
    """The columns of V (m, n), stacked (m n,)."""
    return V.T.reshape(-1)


def unvec(v: Any, shape: tuple[int, int]) -> Any:
    """The matrix of the given shape whose stacked columns are v."""
    return v.reshape(shape[::-1]).T


def backward_error(M: Any, X: Any, B: Any) -> float:
    """‖B - M X‖_F / (‖M‖_F ‖X‖_F + ‖B‖_F): the relative change of M and B that makes X the exact solution."""
    return float(_norm(B - M @ X) / (_norm(M) * _norm(X) + _norm(B)))


def solve_bound(n: int, eps: float) -> float:
    """For the backward error of a factorised solve: 10 n eps."""
    return C * n * eps


def inverse_bound(condition: float, eps: float) -> float:
    """For the backward error of an explicit inverse, applied: 10 cond eps."""
    return C * condition * eps


def logdet_bound(n: int, condition: float, logdet: float, eps: float) -> float:
    """For the absolute error of a log determinant: `10 eps (n cond + n |logdet|)`."""
    return C * eps * n * (condition + abs(logdet))


def _norm(x: Any) -> Any:
    return (x * x).sum() ** 0.5
