"""Functions of one symmetric positive definite matrix M (..., n, n), batched over the leading dimensions.

All of them act on (M + Mᵀ)/2. A member that is not positive definite to working precision, or holds a NaN or an
infinity, gives NaN; the other members of the batch are not touched by it.
"""

from __future__ import annotations

from . import _backends, _checks, _newton_schulz
from ._backends import Array, ArrayT


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
    Y = _backends.operand(b, "X", X, (), "M")
    if Y.ndim == 1:
        return solve(M, X[:, None])[..., 0]
    _backends.operand(b, "X", Y, (M.shape[-1], "k"))
    _checks.check_batches(M=M.shape[:-2], X=Y.shape[:-2])
    return _backends.narrowed(_backends.solve(M, Y), X.dtype)


def inverse_root(M: ArrayT, p: float, /) -> ArrayT:
    """M^(-1/p) (..., n, n) for p > 0, by the eigendecomposition of M. About 9 n³ flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array, or p is not positive.

    >>> import numpy as np
    >>> inverse_root(np.asarray([[4.0, 0.0], [0.0, 0.25]]), 2)
    array([[0.5, 0. ],
           [0. , 2. ]])
    """
    p = _checks.positive("p", p)
    _matrix(M)
    return _backends.inverse_root(M, p)


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
    M: ArrayT, /, start: ArrayT | None = None, *, iterations: int = 32, tolerance: float | None = None
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
    if start is not None:
        _backends.resolve(M=M, start=start)
        _backends.operand(b, "start", start, M.shape[-2:])
        _checks.check_batches(M=M.shape[:-2], start=start.shape[:-2])
    iterations = _checks.integer("iterations", iterations, 0)
    tolerance = b.eps**0.5 if tolerance is None else _checks.positive("tolerance", tolerance)
    return _newton_schulz.inverse(b, M, start, iterations, tolerance)


def _matrix(M: Array) -> _backends.Backend:
    b = _backends.resolve(M=M)
    _checks.check_square(M=M)
    return b
