"""The members of a batch of operators as the blocks of one."""

from __future__ import annotations

from typing import Any

from . import _backends, _blocks
from ._backends import Array
from ._blocks import Operator
from ._value import Value, as_scipy_on_matrices, value
from .outer_product import OuterProduct


@value
class DirectSum(Value):
    """diag(P_1, ..., P_k) of the members P_i of a batch of operators, on V (..., k, m, n) as a whole.

    The curvature of a layer with weights (k, m, n) that do not meet, the groups of a convolution or the channels of a
    normalisation: its determinant, trace and quadratic forms are those of all together, where the batch has k of each.

    Raises:
        TypeError: `members` is no operator.

    >>> import numpy as np
    >>> from kfaclinalg import Kronecker
    >>> P = Kronecker(np.asarray([[[2.0]], [[4.0]]]), np.ones((2, 1, 1)))
    >>> float(DirectSum(P).trace()), P.trace()
    (6.0, array([2., 4.]))
    """

    members: Operator
    as_scipy = as_scipy_on_matrices

    def __post_init__(self) -> None:
        _blocks.check_operators("members", (self.members,))

    @property
    def shape(self) -> tuple[int, ...]:
        """(k, m, n), the shape of the arrays that it acts on."""
        return tuple(self.members.diagonal().shape)

    def apply(self, V: Array, /) -> Array:
        """P_i V_i (..., k, m, n). The flops of k of them."""
        return _blocks.applied(self.members, V)

    __matmul__ = apply

    def inverse(self) -> DirectSum:
        """Of the inverses. The flops of k of them."""
        return DirectSum(self.members.inverse())

    def solve(self, V: Array) -> Array:
        """P_i⁻¹ V_i (..., k, m, n). The flops of k of them."""
        return self.members.solve(V)

    def logdet(self) -> Array:
        """Σ log det P_i. The flops of k of them."""
        return _summed(self.members.logdet())

    def trace(self) -> Array:
        """Σ tr P_i. The flops of k of them."""
        return _summed(self.members.trace())

    def diagonal(self) -> Array:
        """The diagonals (k, m, n). The flops of k of them."""
        return self.members.diagonal()

    def gram(self, U: Array | OuterProduct, V: Array | OuterProduct, /) -> Array:
        """The matrix (p, q) of Σ_k vec(U_ik)ᵀ P_k vec(V_jk), for U (p, k, m, n) and V (q, k, m, n), or outer products.

        The flops of k of them.
        """
        both: Any = self.members.gram(U, V)
        return _backends.namespace_of(both).sum(both, axis=tuple(range(both.ndim - 2)))

    def to_dense(self) -> Array:
        """The matrix that acts on the stacked vec(V_i), zero outside the diagonal blocks. The flops of k of them."""
        dense = self.members.to_dense()
        rows = _backends.namespace_of(dense).reshape(dense, (-1, *dense.shape[-2:]))
        return _blocks.assembled({(i, i): rows[i, ...] for i in range(rows.shape[0])})


def _summed(x: Array) -> Array:
    return _backends.namespace_of(x).sum(x)
