"""Functions of one symmetric positive definite matrix M (..., n, n), batched over the leading dimensions.

All of them act on (M + Mᵀ)/2. A member that is not positive definite to working precision, or holds a NaN or an
infinity, gives NaN; the other members of the batch are not touched by it.
"""

from __future__ import annotations

from typing import Any

from . import _array, _linalg
from ._typing import ArrayT


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
    b = _matrix(M)
    return _linalg.cholesky_inverse(b, _linalg.cholesky(b, _linalg.symmetrised(M)))


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
    _array.check_batches(M=M.shape[:-2], X=X.shape[:-2])
    X_wide = _array.operand(b, "X", X, (M.shape[-1], X.shape[-1]))
    L = _linalg.cholesky(b, _linalg.symmetrised(M))
    return _array.narrowed(b, _linalg.back_substitution(b, L, _linalg.forward_substitution(b, L, X_wide)), X.dtype)


def inverse_root(M: ArrayT, p: float, /) -> ArrayT:
    """M^(-1/p) (..., n, n) for p > 0, by the eigendecomposition of M. About 9 n³ flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array, or p is not positive.

    >>> import numpy as np
    >>> inverse_root(np.asarray([[4.0, 0.0], [0.0, 0.25]]), 2)
    array([[0.5, 0. ],
           [0. , 2. ]])
    """
    if not p > 0:
        raise ValueError(f"p is {p}, expected a number > 0")
    b = _matrix(M)
    w, Q = _linalg.eigh(b, _linalg.symmetrised(M))
    definite = b.xp.all(w > 0, axis=-1)[..., None]
    root = b.xp.where(definite, w, _array.NAN) ** (-0.5 / p)
    K = Q * root[..., None, :]
    return _linalg.symmetrised(K @ K.mT)


def logdet(M: ArrayT, /) -> ArrayT:
    """log det M (...), as the sum of the logarithms of the Cholesky factor's diagonal. n³/3 flops.

    Raises:
        TypeError, ValueError: M is not a square float32 or float64 array.

    >>> import numpy as np
    >>> float(logdet(np.asarray([[4.0, 0.0], [0.0, 0.25]])))
    0.0
    """
    b = _matrix(M)
    diagonal = b.xp.linalg.diagonal(_linalg.cholesky(b, _linalg.symmetrised(M)))
    return 2 * b.xp.sum(b.xp.log(diagonal), axis=-1)


def _matrix(M: Any) -> _array.Backend:
    b = _array.resolve(M=M)
    _array.check_square(M=M)
    return b
