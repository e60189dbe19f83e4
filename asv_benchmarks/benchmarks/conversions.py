"""Operators in another dtype, device or namespace, and as SciPy's. The floors are the same copies, array by array."""

import numpy as np
from array_api_compat import device, to_device

from kfaclinalg import Dense, Diagonal, LowRankPlusDiagonal

from .dense import factor
from .network_by_hand import blocks, members, tridiagonal
from .operation import Operation
from .operators import basis, eigen, layer, outer, pair

OPERATORS = {  # each with what it acts on
    "OuterProduct": lambda new, n: outer(new, n)[::-1],
    "Kronecker": layer,
    "KroneckerBasis": basis,
    "KroneckerEigen": eigen,
    "KroneckerPair": pair,
    "CholeskyInverse": lambda new, n: (factor(new, n)[0], new.matrix(n, 1)),
    "Dense": lambda new, n: (Dense(new.spd(n)), new.matrix(n, 1)),
    "Diagonal": lambda new, n: (Diagonal(new.positive(n)), new.matrix(n, 1)),
    "LowRankPlusDiagonal": lambda new, n: (
        LowRankPlusDiagonal(new.matrix(n, n // 8), new.positive(n // 8), new.positive(n)),
        new.matrix(n, 1),
    ),
    "BlockDiagonal": blocks,
    "DirectSum": members,
    "BlockTridiagonalInverse": tridiagonal,
}
ONE = {"sizes": (256,), "dtypes": ("float32",), "mode": "eager"}


def arrays(x):
    """All that an operator, a tuple or a list holds."""
    if not isinstance(x, tuple | list):
        names = getattr(x, "__match_args__", None)
        if names is None:
            return [x]
        x = [getattr(x, name) for name in names]
    return [y for part in x for y in arrays(part)]


def stacked(V):
    """vec(V), or those of a tuple."""
    return np.concatenate([X.mT.reshape(-1) for X in (V if isinstance(V, tuple) else (V,))])


def with_vector(P, V):
    return P, V, stacked(V)


def rows(name, make):
    yield (
        "astype",
        Operation(
            lambda new, n: (make(new, n)[0], new.by.xp.float64),
            lambda P, dtype: P.astype(dtype),
            lambda by, P, dtype: [by.cast(x, "float64") for x in arrays(P)],
            **ONE,
        ),
    )
    yield (
        "to_device",
        Operation(
            lambda new, n: (make(new, n)[0], device(new.by.asarray(np.zeros(1)))),
            lambda P, place: P.to_device(place),
            lambda by, P, place: [to_device(x, place) for x in arrays(P)],
            **ONE,
        ),
    )
    yield (
        "to_namespace",
        Operation(
            lambda new, n: make(new, n)[:1],
            lambda P: P.to_namespace(np),
            lambda by, P: [np.asarray(x).copy() for x in arrays(P)],
            **ONE,
            backends=("torch", "jax"),
        ),
    )
    if name != "OuterProduct":
        yield (
            "as_scipy",
            Operation(
                lambda new, n: with_vector(*make(new, n)),
                lambda P, V, v: P.as_scipy() @ v,
                lambda by, P, V, v: stacked(P @ V),
                **ONE,
                backends=("numpy",),
            ),
        )


OPERATIONS = {f"{name}.{method}": row for name, make in OPERATORS.items() for method, row in rows(name, make)}
