"""From the factors of a network and a damping strength to its inverse curvature (Sections 4.2, 4.3 and 6.3)."""

from __future__ import annotations

from ._typing import Scalar
from .blocks import BlockDiagonal
from .damping import factored_tikhonov
from .factors import Factors
from .kronecker import Kronecker


def block_diagonal_inverse(factors: Factors, gamma: Scalar, /, *, norm: str = "trace") -> BlockDiagonal:
    """F̆⁻¹ with the blocks (A_i + π_i γ I)⁻¹ ⊗ (G_i + γ/π_i I)⁻¹ (Sections 4.2 and 6.3). Links are not used.

    About Σ n_i³ + m_i³ flops. A layer whose damped factors are not positive definite becomes NaN, the others do not.

    Raises:
        TypeError, ValueError: as for `factored_tikhonov`, or no layers.

    >>> import numpy as np
    >>> from kfaclinalg import LayerFactors
    >>> factors = Factors((LayerFactors(A=np.eye(2), G=3 * np.eye(1)),))
    >>> (block_diagonal_inverse(factors, 0.0) @ (np.asarray([[6.0, 3.0]]),))[0]
    array([[2., 1.]])
    """
    damped = (factored_tikhonov(layer, gamma, norm=norm) for layer in factors.layers)
    return BlockDiagonal(tuple(Kronecker(*layer).inverse() for layer in damped))


STRUCTURES = {"block-diagonal": block_diagonal_inverse}
