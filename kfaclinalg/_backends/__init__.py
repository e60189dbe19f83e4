"""The cellar: all that knows array-api-compat, NumPy, SciPy, a backend, BLAS or LAPACK.

`door` says which backend an array has, `routines` and `composed` compute, `home` holds the rule for torch's CPU. Each
routine has one body in the array API's terms; another one stands here where a measurement shows that it pays:

| routine | single matrices, by the rule of `home` | by torch's, in place | torch | JAX | CuPy | NumPy's batches |
|---|---|---|---|---|---|---|
| product, moment, updated_moment | x | | | | | |
| shifted | | | x | | | |
| cholesky, solve | x | x | x | | | |
| eigh, eigvalsh, pencil, pencil_values | x | x | | | | |
| general_inverse, completed | x | | x | | | |
| inverse | x | x | x | x | | |
| trace | | | | x | | |
| inverse_of_factor | | | x | | | |
| forward_substitution, back_substitution | x | | x | x | x | x |
| substituted, inverse_root, logdet, log_abs_det | x | | | | | |
"""

from .._typing import Array, ArrayT, Device, DType, Namespace, Scalar, Scalars
from .composed import completed, conditional, left_singular, pencil, pencil_values
from .config import show_config
from .door import (
    NAN,
    Backend,
    backend_of,
    namespace_of,
    narrowed,
    operand,
    picked,
    resolve,
    widest,
)
from .finiteness import LinAlgError, all_finite, assert_finite, values
from .home import formula, in_full_precision
from .members import kept, per_member, reciprocal, symmetrised
from .routines import (
    back_substitution,
    cholesky,
    eigh,
    eigvalsh,
    forward_substitution,
    general_inverse,
    inverse,
    inverse_of_factor,
    inverse_root,
    kron,
    log_abs_det,
    logdet,
    moment,
    nonsingular,
    product,
    shifted,
    solve,
    substituted,
    trace,
    updated_moment,
)
from .scalars import array_beside, beside, count, in_double, in_dtype, is_finite, scalar, weight, where
from .stacking import each
from .views import may_read

__all__ = [
    "NAN",
    "Array",
    "ArrayT",
    "Backend",
    "DType",
    "Device",
    "LinAlgError",
    "Namespace",
    "Scalar",
    "Scalars",
    "all_finite",
    "array_beside",
    "assert_finite",
    "formula",
    "back_substitution",
    "beside",
    "backend_of",
    "cholesky",
    "completed",
    "conditional",
    "count",
    "each",
    "eigh",
    "eigvalsh",
    "forward_substitution",
    "general_inverse",
    "in_double",
    "in_dtype",
    "in_full_precision",
    "inverse",
    "inverse_of_factor",
    "inverse_root",
    "is_finite",
    "kept",
    "kron",
    "left_singular",
    "log_abs_det",
    "logdet",
    "trace",
    "may_read",
    "moment",
    "namespace_of",
    "narrowed",
    "nonsingular",
    "operand",
    "pencil",
    "pencil_values",
    "per_member",
    "picked",
    "product",
    "reciprocal",
    "resolve",
    "scalar",
    "shifted",
    "show_config",
    "solve",
    "substituted",
    "symmetrised",
    "updated_moment",
    "values",
    "weight",
    "where",
    "widest",
]
