"""Functions of one symmetric positive definite matrix M (..., n, n), batched over the leading dimensions.

All of them act on (M + Mᵀ)/2. A member that is not positive definite to working precision, or holds a NaN or an
infinity, gives NaN; the other members of the batch are not touched by it.
"""

from __future__ import annotations

from . import _backends, _checks, _newton_schulz
from ._typing import Array, ArrayT


def inverse(M: ArrayT, /) -> ArrayT:
    """M⁻¹ (..., n, n), exactly symmetric, by Cholesky. About n³ flops.

    Relative to `solve` an explicit inverse pays when it is applied many times; its backward error grows with the
    condition number, that of `solve` does not.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> inverse(np.asarray([[4.0]]))
    array([[0.25]])
    """
    _matrix(M)
    return _backends.inverse(M)


def cholesky(M: ArrayT, /) -> ArrayT:
    """Lower triangular L (..., n, n) with L Lᵀ = M. n³/3 flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    array([[2., 0.],
           [1., 1.]])
    """
    _matrix(M)
    return _backends.cholesky(M)


def solve(M: ArrayT, X: ArrayT, /) -> ArrayT:
    """M⁻¹ X for X (..., n, k), or (n,), by Cholesky and two substitutions: backward stable. n³/3 + 2 n² k flops.

    Raises:
        TypeError, ValueError: M is not square, or X does not fit it in shape, dtype, namespace or device.

    >>> import numpy as np
    >>> solve(np.asarray([[4.0, 0.0], [0.0, 0.5]]), np.asarray([1.0, 1.0]))
    array([0.25, 2.  ])
    """
    b = _matrix(M)
    if X.ndim == 1:
        return solve(M, X[:, None])[..., 0]
    _checks.check_batches(M=M.shape[:-2], X=X.shape[:-2])
    X_wide = _backends.operand(b, "X", X, (M.shape[-1], X.shape[-1]))
    return _backends.narrowed(_backends.solve(M, X_wide), X.dtype)


def inverse_root(M: ArrayT, p: float, /) -> ArrayT:
    """M^(-1/p) (..., n, n) for p > 0, by the eigendecomposition of M. About 9 n³ flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array, or p is not positive.

    >>> import numpy as np
    >>> inverse_root(np.asarray([[4.0, 0.0], [0.0, 0.25]]), 2)
    array([[0.5, 0. ],
           [0. , 2. ]])
    """
    _checks.check_positive("p", p)
    _matrix(M)
    return _backends.inverse_root(M, float(p))


def logdet(M: ArrayT, /) -> ArrayT:
    """log det M (...), as the sum of the logarithms of the Cholesky factor's diagonal. n³/3 flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> float(logdet(np.asarray([[4.0, 0.0], [0.0, 0.25]])))
    0.0
    """
    _matrix(M)
    return _backends.logdet(M)


def newton_schulz_inverse(
    M: ArrayT, start: ArrayT | None = None, /, *, iterations: int = 32, tolerance: float | None = None
) -> ArrayT:
    """M⁻¹ (..., n, n) by X <- X (2 I - M X) (Pan & Schreiber 1991; the end of Section 8). Symmetric up to rounding.

    Matrix products only, 4 n³ flops an iteration, of which a cold start takes log2(cond) + 5. Each squares I - M X: an
    earlier inverse as `start` saves all but the last few, where some multiple of it is near enough to converge; a
    member for which none is starts cold. What ends with ‖I - M X‖_F above `tolerance`, √eps by default, is NaN: that of
    the result is of the order eps cond.

    Raises:
        TypeError, ValueError: M is not square; `start` does not fit it; iterations < 0; tolerance is not positive.

    >>> import numpy as np
    >>> newton_schulz_inverse(np.asarray([[4.0]]))
    array([[0.25]])
    """
    b = _matrix(M)
    tolerance = _newton_schulz_options(b, M, start, iterations, tolerance)
    return _newton_schulz.inverse(b, M, start, iterations, tolerance)


def _newton_schulz_options(
    b: _backends.Backend, M: Array, start: Array | None, iterations: int, tolerance: float | None
) -> float:
    if start is not None:
        _backends.resolve(M=M, start=start)
        _backends.operand(b, "start", start, M.shape[-2:])
        _checks.check_batches(M=M.shape[:-2], start=start.shape[:-2])
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, expected an integer >= 0")
    tolerance = b.eps**0.5 if tolerance is None else tolerance
    _checks.check_positive("tolerance", tolerance)
    return float(tolerance)


def _matrix(M: Array) -> _backends.Backend:
    b = _backends.resolve(M=M)
    _checks.check_square(M=M)
    return b
