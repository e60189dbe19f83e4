"""Sums of outer products as matrices that are not formed."""

from __future__ import annotations

from . import _backends, _checks
from ._backends import Array
from ._value import Value, value


@value
class OuterProduct(Value):
    """L Rᵀ for L (..., m, r) and R (..., n, r): a layer's gradient Σ g aᵀ over r examples, as the batch gives it.

    `Kronecker @` takes it as a V (m, n) without forming it, the low-rank form at the end of Section 8; `gram` takes a
    batch of them.

    >>> import numpy as np
    >>> from kfaclinalg import Kronecker
    >>> Kronecker(np.eye(3), 2 * np.eye(1)) @ OuterProduct(np.ones((1, 2)), np.ones((3, 2)))
    array([[4., 4., 4.]])
    """

    L: Array
    R: Array

    def __post_init__(self) -> None:
        b = _backends.resolve(L=self.L, R=self.R)
        _backends.operand(b, "L", self.L, ("m", "r"))
        _backends.operand(b, "R", self.R, ("n", self.L.shape[-1]))
        _checks.check_batches(L=self.L.shape[:-2], R=self.R.shape[:-2])

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return (self.L.shape[-2], self.R.shape[-2])

    @staticmethod
    def pays(shape: tuple[int, int], r: int) -> bool:
        """Whether (A ⊗ B) applied to L Rᵀ takes fewer flops than to the dense V of this shape.

        r (m² + n² + m n) against m n (m + n): for a square layer, r below two thirds of its size.

        >>> OuterProduct.pays((1000, 1000), 600), OuterProduct.pays((1000, 1000), 700)
        (True, False)
        """
        m, n = shape
        return r * (m * m + n * n + m * n) < m * n * (m + n)

    def to_dense(self) -> Array:
        """L Rᵀ (..., m, n). 2 m n r flops."""
        if self.L.shape[-1] == 1:  # of a batch of these a product would be one call a member
            return self.L * self.R.mT
        return _backends.product(self.L, self.R.mT)
