"""Functions of one symmetric positive definite matrix M (..., n, n), batched over the leading dimensions.

All of them act on (M + Mᵀ)/2. A member that is not positive definite to working precision, or holds a NaN or an
infinity, gives NaN; the other members of the batch are not touched by it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from . import _array, _host, _lapack, _linalg, _newton_schulz
from ._typing import ArrayT


def inverse(M: ArrayT, /, *, blas: str = "auto") -> ArrayT:
    """M⁻¹ (..., n, n), exactly symmetric, by Cholesky. About n³ flops.

    Relative to `solve` an explicit inverse pays when it is applied many times; its backward error grows with the
    condition number, that of `solve` does not. With `blas` "auto" a single matrix on torch's CPU goes to SciPy where
    that is faster, "native" keeps to torch; other backends have one way.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array; an unknown `blas`.

    >>> import numpy as np
    >>> inverse(np.asarray([[4.0]]))
    array([[0.25]])
    """
    b = _matrix(M)
    return _host.run(b, blas, _lapack.inverse, partial(_inverse, b), M)


def cholesky(M: ArrayT, /, *, blas: str = "auto") -> ArrayT:
    """Lower triangular L (..., n, n) with L Lᵀ = M. n³/3 flops. `blas` is as in `inverse`.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array; an unknown `blas`.

    >>> import numpy as np
    >>> cholesky(np.asarray([[4.0, 2.0], [2.0, 2.0]]))
    array([[2., 0.],
           [1., 1.]])
    """
    b = _matrix(M)
    return _host.run(b, blas, _lapack.factor, partial(_cholesky, b), M)


def solve(M: ArrayT, X: ArrayT, /, *, blas: str = "auto") -> ArrayT:
    """M⁻¹ X for X (..., n, k), or (n,), by Cholesky and two substitutions: backward stable. n³/3 + 2 n² k flops.

    `blas` is as in `inverse`.

    Raises:
        TypeError, ValueError: M is not square, or X does not fit it in shape, dtype, namespace or device; an unknown
            `blas`.

    >>> import numpy as np
    >>> solve(np.asarray([[4.0, 0.0], [0.0, 0.5]]), np.asarray([1.0, 1.0]))
    array([0.25, 2.  ])
    """
    b = _matrix(M)
    if X.ndim == 1:
        return solve(M, X[:, None], blas=blas)[..., 0]
    _array.check_batches(M=M.shape[:-2], X=X.shape[:-2])
    X_wide = _array.operand(b, "X", X, (M.shape[-1], X.shape[-1]))
    return _array.narrowed(b, _host.run(b, blas, _lapack.solve, partial(_solve, b), M, X_wide), X.dtype)


def inverse_root(M: ArrayT, p: float, /, *, blas: str = "auto") -> ArrayT:
    """M^(-1/p) (..., n, n) for p > 0, by the eigendecomposition of M. About 9 n³ flops. `blas` is as in `inverse`.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array, or p is not positive.

    >>> import numpy as np
    >>> inverse_root(np.asarray([[4.0, 0.0], [0.0, 0.25]]), 2)
    array([[0.5, 0. ],
           [0. , 2. ]])
    """
    _array.check_positive("p", p)
    b = _matrix(M)
    return _host.run(b, blas, _lapack.inverse_root, partial(_inverse_root, b), float(p), M)


def logdet(M: ArrayT, /, *, blas: str = "auto") -> ArrayT:
    """log det M (...), as the sum of the logarithms of the Cholesky factor's diagonal. n³/3 flops.

    `blas` is as in `inverse`.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> float(logdet(np.asarray([[4.0, 0.0], [0.0, 0.25]])))
    0.0
    """
    b = _matrix(M)
    return _host.run(b, blas, _lapack.logdet, partial(_logdet, b), M)


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


def _newton_schulz_options(b: Any, M: Any, start: Any | None, iterations: int, tolerance: float | None) -> float:
    if start is not None:
        _array.resolve(M=M, start=start)
        _array.operand(b, "start", start, M.shape[-2:])
        _array.check_batches(M=M.shape[:-2], start=start.shape[:-2])
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}, expected an integer >= 0")
    tolerance = b.eps**0.5 if tolerance is None else tolerance
    _array.check_positive("tolerance", tolerance)
    return float(tolerance)


def _cholesky(b: Any, M: Any) -> Any:
    return _linalg.cholesky(b, _linalg.symmetrised(M))


def _inverse(b: Any, M: Any) -> Any:
    return _linalg.cholesky_inverse(b, _cholesky(b, M))


def _solve(b: Any, M: Any, X: Any) -> Any:
    L = _cholesky(b, M)
    return _linalg.back_substitution(b, L, _linalg.forward_substitution(b, L, X))


def _inverse_root(b: Any, p: float, M: Any) -> Any:
    w, Q = _linalg.eigh(b, _linalg.symmetrised(M))
    definite = b.xp.all(w > 0, axis=-1)[..., None]
    root = b.xp.where(definite, w, _array.NAN) ** (-0.5 / p)
    K = Q * root[..., None, :]
    return _linalg.symmetrised(K @ K.mT)


def _logdet(b: Any, M: Any) -> Any:
    diagonal = b.xp.linalg.diagonal(_linalg.cholesky(b, _linalg.symmetrised(M)))
    return 2 * b.xp.sum(b.xp.log(diagonal), axis=-1)


def _matrix(M: Any) -> _array.Backend:
    b = _array.resolve(M=M)
    _array.check_square(M=M)
    return b
